"""Weighted supervised fine-tuning.

data (files -> tokens) -> batches (steps, micro-batches, ranks) -> model (the loss as a module) -> step (loss, gradient,
AdamW) -> loop (all steps), with ``objective`` for the formulas, ``state`` for the directory of a run, and ``output``,
``probe`` and ``card`` for what it leaves; ``run`` is ``lark-fast train``.
"""
