"""Weighted supervised fine-tuning.

data (files -> tokens) -> batches (steps, micro-batches) -> step (loss, gradient, AdamW), with ``objective`` for the
formulas, ``state`` for the directory of a run and ``output`` for what it leaves; ``run`` is ``lark-fast train``.
"""
