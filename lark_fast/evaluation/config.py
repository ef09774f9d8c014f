"""What ``lark-fast eval`` was asked to do."""

import math
from dataclasses import dataclass, field

PRESETS = {"paper": {"n": 5, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 12_288}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    Args:
        n: answers to each problem.
        temperature: 0 takes the likeliest token always.
        top_p: the likeliest tokens that together have this probability are drawn from.
        max_new_tokens: of an answer; fewer where the model has no more positions.
        seed: of the draws; each answer has a stream of random numbers of its own.
        stop_at_answer: an answer ends behind its first complete box outside of its thoughts.

    Raises:
        ValueError: a value out of range.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 12_288
    seed: int = 0
    stop_at_answer: bool = True

    def __post_init__(self) -> None:
        """Refuse what no backend can do."""
        for name in ("n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature {self.temperature}: must be a finite number, 0 or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.n > 1 and not self.temperature:
            raise ValueError(f"-n {self.n}: without a --temperature all answers to a problem are the same")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Everything that an evaluation is told."""

    model: str | None
    benchmarks: tuple[str, ...]
    out: str
    sampling: Sampling = field(default_factory=Sampling)
    answers: str | None = None  # a file of answers that were made elsewhere, instead of a model
    base: str | None = None  # of an adapter, where it is not where the adapter says
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None  # answers written at a time; None: by the memory
    system: str | None = None
    instruction: str | None = None
    chat_template: str | None = None  # the template itself
    limit: int | None = None  # problems of each benchmark
    judge_seconds: float = 10.0
    overwrite: bool = False
    trust_remote_code: bool = False
