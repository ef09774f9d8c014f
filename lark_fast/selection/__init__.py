"""Scores in, a weighted training set out.

scored_rows -> weighing, by one of ``policies`` -> train.jsonl; ``run`` is ``lark-fast select``.
"""
