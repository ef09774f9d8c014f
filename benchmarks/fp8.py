"""``python -m benchmarks.fp8 --student DIR --pool FILE --out FILE.json --commit SHA``: what FP8 costs, what it brings.

A student scores the last problems of a pool in its own precision and in FP8: how far nll, Brier score and g_hat are
apart, and the selections made of them. On a CPU plain torch stands for FP8, in the same numbers but for the order of
sums, and everything else is in ``--dtype``. On a GPU it is FP8 itself beside bfloat16, and passes of random students of
known shapes are timed both ways; ``--tiny`` tries that path anywhere.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from benchmarks import baselines
from benchmarks.comparison import DEVICE
from benchmarks.timing import take_turns
from lark_fast.files import write_json
from lark_fast.fp8 import BLOCKS_KEPT, Fp8Layers
from lark_fast.pool.reading import Pool
from lark_fast.pool.records import Record
from lark_fast.scoring.agreement import Scores, agreement
from lark_fast.scoring.scorer import Scorer
from lark_fast.student import Student
from lark_fast.versions import versions

CUDA = DEVICE.type == "cuda"
SECONDS = 10.0  # of timing one shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A student of Qwen2's kind; blocks are alike, so few of them say what many take."""

    name: str
    width: int
    inner: int
    heads: int
    key_heads: int
    blocks: int
    tokens: int


SHAPES = (
    Shape(name="7B", width=3584, inner=18944, heads=28, key_heads=4, blocks=5, tokens=8192),
    Shape(name="7B", width=3584, inner=18944, heads=28, key_heads=4, blocks=5, tokens=32768),
    Shape(name="1.5B", width=1536, inner=8960, heads=12, key_heads=2, blocks=5, tokens=32768),
    Shape(name="0.5B", width=896, inner=4864, heads=14, key_heads=2, blocks=5, tokens=32768),
)
TINY = (Shape(name="tiny", width=64, inner=96, heads=4, key_heads=2, blocks=2, tokens=64),)


def main(arguments: list[str] | None = None) -> None:
    """Write the record, anew after each part."""
    options = _options(arguments)
    impl = "auto" if CUDA else "torch"
    record = {
        "device": baselines.device_name(),
        "versions": versions("torch", "transformers", "numpy", "triton"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit,
        "fp8": "torch._scaled_mm" if CUDA else "plain torch, in the same numbers",
        "agreement": [],
        "passes": [],
    }
    if options.pool:
        record |= {"student": Path(options.student).name, "pool": Path(options.pool).name}
        for entry in _agreements(options, impl):
            record["agreement"].append(entry)
            write_json(options.out, record)
    for shape in TINY if options.tiny else SHAPES if CUDA else ():
        record["passes"].append(time_pass(shape, impl))
        write_json(options.out, record)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__.partition("\n")[0])
    parser.add_argument("--student", metavar="DIR")
    parser.add_argument("--pool", metavar="FILE")
    parser.add_argument("--problems", type=int, default=300, help="the last so many of the pool")
    parser.add_argument("--dtype", default="bfloat16" if CUDA else "float32", help="of all but the products in FP8")
    parser.add_argument(
        "--blocks-kept", type=int, nargs="+", default=[BLOCKS_KEPT], help="at the beginning; several: each"
    )
    parser.add_argument("--budget", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="time a pass that proves the path and measures nothing")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--commit", required=True, metavar="SHA")
    options = parser.parse_args(arguments)
    if (options.pool is None) != (options.student is None):
        parser.error("--student and --pool go together")
    return options


def _agreements(options: argparse.Namespace, impl: str) -> Iterator[dict]:
    records = _last_problems(options.pool, options.problems)
    problem = [record.problem_id for record in records]
    exact = None
    for blocks in options.blocks_kept:
        scorer = Scorer.from_pretrained(options.student, dtype=options.dtype, device=DEVICE.type)
        exact = exact or _scores(scorer, records)
        layers = Fp8Layers(scorer.student, impl=impl, blocks_kept=blocks)
        found = agreement(exact, _scores(scorer, records), problem, options.budget)
        print(f"{blocks} blocks as they are: {found}", file=sys.stderr, flush=True)
        yield {
            "dtype": options.dtype,
            "blocks": len(scorer.student.layers),
            "blocks_kept": blocks,
            "layers_in_fp8": layers.replaced,
            "share_in_fp8": layers.share,
            **found.as_json(),
        }


def _last_problems(pool: str, number: int) -> list[Record]:
    records = [record for record in Pool((pool,)).read() if isinstance(record, Record)]
    names = list(dict.fromkeys(record.problem_id for record in records))
    kept = set(names[-number:])
    return [record for record in records if record.problem_id in kept]


def _scores(scorer: Scorer, records: list[Record]) -> Scores:
    scored = scorer.score(records)
    return Scores([one.nll for one in scored], [one.brier for one in scored])


@torch.no_grad()
def time_pass(shape: Shape, impl: str) -> dict:
    """Milliseconds of a pass up to the head, in both precisions in turn."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        num_hidden_layers=shape.blocks,
        vocab_size=1024,
        max_position_embeddings=shape.tokens,
        tie_word_embeddings=True,
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    student = Student(model)
    layers = Fp8Layers(student, impl=impl, blocks_kept=0, keep=True)
    # Sequences of 1,024 tokens, so that attention takes as little as it does in a pool of short answers.
    ids = torch.arange(shape.tokens, device=DEVICE).remainder(1024).view(-1, min(1024, shape.tokens))

    def own() -> torch.Tensor:
        with layers.own_precision():
            return student.hidden(ids)

    samples = take_turns({"fp8": lambda: student.hidden(ids), "bfloat16": own}, SECONDS if CUDA else 0.0)
    medians = {name: median(own) for name, own in samples.items()}
    return {
        "shape": shape.name,
        "tokens": shape.tokens,
        "blocks": shape.blocks,
        "fp8_ms": medians["fp8"],
        "bfloat16_ms": medians["bfloat16"],
        "speedup": medians["bfloat16"] / medians["fp8"],
        "samples_ms": samples,
    }


if __name__ == "__main__":
    main()
