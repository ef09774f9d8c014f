"""``python -m benchmarks.lm_eval_memory``: time and peak memory of lm_eval's Transformers model and ours.

Each is a process of its own with the same random model, whose vocabulary is all that is large about it, and the same
requests: windows of a text, of which every token is asked about, and four options of one or of sixteen tokens behind a
shared context. The peak is what a process (on Linux) or the GPU's memory grew by over what it held before.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("hf", "lark-fast")
KINDS = {"windows": (1, None), "options of a token": (4, 1), "options of 16 tokens": (4, 16)}
GIB = 1 << 30


def main() -> None:
    """Print a table; ``--out`` keeps its rows as JSON."""
    options = _options()
    if options.model:
        print(json.dumps(measured(options)))
        return
    rows = []
    for kind, tokens, batch_size in itertools.product(KINDS, options.tokens, options.batch_sizes):
        for model in MODELS:
            given = ["--model", model, "--kind", kind, "--tokens", str(tokens), "--batch-sizes", str(batch_size)]
            command = [sys.executable, "-m", "benchmarks.lm_eval_memory", *given, "--vocabulary"]
            done = subprocess.run([*command, str(options.vocabulary)], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            told = "{kind}, T = {tokens}, batch {batch_size}, {model}: {seconds:.2f} s, {gib:.2f} GiB"
            print(told.format(**rows[-1]), flush=True)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_eval_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of a window, or context and option")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="of lm_eval's own model")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)  # this process is that model's
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace, questions: int = 4) -> dict[str, Any]:
    """One model's time and peak in this process, and its answers' sum."""
    from lm_eval.models.huggingface import HFLM

    from lark_fast.dropins.lm_eval import LarkLM

    (tokens,), (batch_size,) = options.tokens, options.batch_sizes
    kind = {"hf": HFLM, "lark-fast": LarkLM}[options.model]
    model, tokenizer = random_model(options.vocabulary)
    lm = kind(model, tokenizer=tokenizer, max_length=tokens, batch_size=batch_size)
    asked = requests(options.vocabulary, tokens, questions, *KINDS[options.kind])
    lm._loglikelihood_tokens(requests(options.vocabulary, 8, 1, 1, 1), disable_tqdm=True)  # libraries come in here
    before, start = _forget_peak(), time.perf_counter()
    answers = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    seconds = time.perf_counter() - start
    said = {"kind": options.kind, "tokens": tokens, "batch_size": batch_size, "model": options.model}
    gib = (_peak() - before) / GIB
    return said | {"seconds": seconds, "gib": gib, "logprob": sum(logprob for logprob, _ in answers)}


def random_model(vocabulary: int) -> tuple[Any, Any]:
    """Two layers 64 wide, and a tokenizer that nobody asks."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=4, max_position_embeddings=4096, **sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config).float().eval().to(device)
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def requests(vocabulary: int, tokens: int, questions: int, options: int, length: int | None) -> list[Any]:
    """``questions`` times ``options`` random continuations, of all but a token where ``length`` is None."""
    import random

    rng, asked = random.Random(0), []
    for _ in range(questions):
        context = rng.choices(range(vocabulary), k=tokens + 1 - (length or tokens))
        for _ in range(options):
            asked.append((None, context, rng.choices(range(vocabulary), k=length or tokens)))
    return asked


def _forget_peak() -> int:
    """Let the peak begin anew, and return how many bytes are held now: of a GPU's memory, else of this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    return _status("VmRSS")


def _peak() -> int:
    """Bytes at most since ``_forget_peak``."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
