"""What ``lark-fast diagnose`` is asked to do."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from lark_fast.rendering.renderer import RenderOptions

Parameters = Literal["all", "last-layer", "lora"]
FEWEST_PROBLEMS = 8  # below, intervals over problems say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseConfig:
    """What was asked for.

    Attributes:
        pool: JSONL, JSON or Parquet files of several candidates a problem.
        student: directory or hub id, an adapter's too.
        base: of an adapter, instead of the one that it names.
        out: directory; the same config again goes on with the next problem.
        problems: how many are drawn from the pool, by ``seed``.
        candidates: of a problem, at most; drawn too where there are more.
        parameters: whose gradients: "all", "last-layer" (the output embedding, hidden states held still), or "lora":
            adapters as ``train --lora`` would begin with.
        where: COLUMN or COLUMN=VALUE of the pool; only such trajectories are looked at.
        budget: of the selections that are tried on each problem.
        lr: of the AdamW steps.
        steps: how many AdamW steps a rate is measured over.
        top_k: make rho and g_hat of the Brier score over so many logits, as ``score --top-k`` does.
        dtype: of the student; gradients in bfloat16 have three digits.
        device: "auto", "cpu", "cuda", ...
        seed: of the draws and of adapters.
        options: how conversations become tokens.
        chat_template: a Jinja template in place of the tokenizer's own.
        overwrite: throw away an earlier diagnosis in ``out``.
        trust_remote_code: run model code that the student brings along.

    Raises:
        ValueError: a value out of range.
    """

    pool: tuple[str, ...]
    student: str
    out: str
    base: str | None = None
    problems: int = 40
    candidates: int = 8
    where: tuple[str, ...] = ()
    parameters: Parameters = "all"
    budget: int = 3
    lr: float = 1e-5
    steps: int = 2
    top_k: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    options: RenderOptions = field(default_factory=RenderOptions)
    chat_template: str | None = None  # the template itself
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("problems", 1), ("candidates", 2), ("budget", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, not {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is a positive number, not {self.lr}")
        if self.parameters not in get_args(Parameters):
            raise ValueError(f"parameters is one of {', '.join(get_args(Parameters))}, not {self.parameters!r}")
