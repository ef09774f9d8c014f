"""Evaluation: a model answers the problems of benchmarks, and its answers are judged and counted."""
