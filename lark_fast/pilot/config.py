"""What ``lark-fast pilot`` is asked to do."""

from dataclasses import dataclass, field

from lark_fast.kernels.chi2 import DEFAULT_BUDGET
from lark_fast.rendering.renderer import RenderOptions
from lark_fast.training.config import PRECISIONS, LoraOptions

FULL, BUCKET = "full", "bucket"  # of every trajectory alike; of those that g_hat ranks alike
FEWEST_PROBLEMS = 8  # held out, or trained on: below, intervals say nothing
FEWEST_STEPS = 10  # of a run: below, hardly anything is learnt
DEFAULT_STEPS = 50  # of an average batch, where no number of tokens is given
_MOST_BUCKETS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotConfig:
    """What was asked for.

    Attributes:
        pool: JSONL, JSON or Parquet files of several candidates a problem.
        student: directory or hub id that every run starts from, an adapter's too.
        base: of an adapter, instead of the one that it names.
        out: directory; the same config again goes on with the next run, and more seeds or policies add runs.
        policies: of ``select``, and "full" for every trajectory; the first of "random" and the others is what they are
            compared with.
        seeds: runs of each, with seeds 0, 1, ...: of the order of the data and of random choices.
        buckets: parts by rank of g_hat within a problem, each trained on by itself; fewer where the problems have
            too few candidates for so many; 0: none.
        budget: candidates that a policy keeps of a problem.
        tokens: input tokens of a run, to half a step; None: 50 steps of an average batch.
        lr: peak learning rate, the same for all.
        global_batch: trajectories of a step.
        evaluations: how often the held-out loss is measured after the start.
        problems: of the pool that are scored and trained on, at most, drawn by chance.
        held_out: a file of trajectories to measure the loss on; None: problems of the pool that nobody trains on.
        held_out_problems: how many of these; never more than a fifth of the pool's.
        where: COLUMN or COLUMN=VALUE of the pool; only such trajectories of it are looked at.
        held_out_where: the same, of held-out ones: only their loss is measured.
        top_k: as ``score --top-k``.
        lora: train adapters, or None for all weights.
        dtype: "auto", "float32" or "bfloat16", of scoring and of training.
        device: "auto", "cpu", "cuda", ...
        tokens_per_batch: of a forward pass of training; None: by the device.
        gradient_checkpointing: less memory, slower.
        options: how conversations become tokens.
        chat_template: a Jinja template in place of the tokenizer's own.
        keep_checkpoints: leave the trained weights in ``runs/``.
        overwrite: throw away an earlier pilot in ``out``.
        trust_remote_code: run model code that the student brings along.

    Raises:
        ValueError: a value out of range.
    """

    pool: tuple[str, ...]
    student: str
    out: str
    base: str | None = None
    policies: tuple[str, ...] = ("chi2", "topb", "random", "nll", "rsr", FULL)
    seeds: int = 3
    buckets: int = 5
    budget: int = DEFAULT_BUDGET
    tokens: int | None = None
    lr: float = 1e-5
    global_batch: int = 16
    evaluations: int = 4
    problems: int = 1000
    held_out: str | None = None
    held_out_problems: int = 50
    where: tuple[str, ...] = ()
    held_out_where: tuple[str, ...] = ()
    top_k: int | None = None
    lora: LoraOptions | None = None
    dtype: str = "auto"
    device: str = "auto"
    tokens_per_batch: int | None = None
    gradient_checkpointing: bool = False
    options: RenderOptions = field(default_factory=RenderOptions)
    chat_template: str | None = None  # the template itself
    keep_checkpoints: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "budget", "global_batch", "evaluations", "problems", "held_out_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is at least 1, not {self.tokens}")
        if not 0 <= self.buckets <= _MOST_BUCKETS or self.buckets == 1:
            raise ValueError(f"buckets is 0 for none or 2 to {_MOST_BUCKETS}, not {self.buckets}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is a positive number, not {self.lr}")
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype is one of {', '.join(PRECISIONS)}, not {self.dtype!r}")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies name one twice: {','.join(self.policies)}")
        if not self.policies and not self.buckets:
            raise ValueError("there is neither a policy nor a bucket to train on")

    @property
    def contenders(self) -> tuple[str, ...]:
        """What is trained on: policies, then buckets from the lowest g_hat up."""
        return self.policies + tuple(bucket_name(number, self.buckets) for number in range(self.buckets))

    @property
    def baseline(self) -> str | None:
        """The policy that the others are compared with."""
        return "random" if "random" in self.policies else next(iter(self.policies), None)


def bucket_name(number: int, buckets: int) -> str:
    """Of bucket 0, 1, ..., as people count them: "bucket-1-of-5"."""
    return f"{BUCKET}-{number + 1}-of-{buckets}"
