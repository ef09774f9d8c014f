"""A student spread over ranks, in processes of their own over gloo: the scores of one process, and a part each."""

import json
import os
import shutil
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version

from lark_fast import Scorer
from lark_fast.errors import UserError
from lark_fast.kernels.token_stats import TokenStats
from lark_fast.scoring.estimate import Footprint
from lark_fast.student import load_student
from tests.command import make_records, write_jsonl, write_student
from tests.score_rows import table
from tests.tiny import tiny_decoder, tiny_gemma2, tiny_llama, tiny_phi, tiny_qwen2

# Transformers 5.17 cuts no vocabulary that the ranks do not divide, and no embedding but one that is the head too.
OLD = Version(transformers.__version__) < Version("5.23")
WORDS = 402 if OLD else 401
THREE_HEADS = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
MODELS = {
    2: {
        "own head, grouped heads": lambda: tiny_llama(WORDS),
        "tied head": lambda: tiny_qwen2(WORDS),
        "softcap": lambda: tiny_gemma2(WORDS),
    },
    3: {
        "bias": lambda: tiny_phi(WORDS, **THREE_HEADS),
        "head not in the plan": lambda: tiny_llama(WORDS, **THREE_HEADS),
        "heads that cannot be dealt out": lambda: tiny_qwen2(WORDS),
        "no plan": lambda: tiny_decoder("gpt2", WORDS),
    },
}
REFUSED = {
    "heads that cannot be dealt out": "4 attention heads and 2 key-value heads cannot be dealt out to 3 ranks; "
    "--nproc-per-node can be 1, 2",
    "no plan": "Transformers has no tensor-parallel plan for gpt2; --device-map",
}
QUICK = "import math, lark_fast.flop as f; f.matmul_ceiling = lambda *_: math.nan\n"
# At the pass of that number, between the moment when all have heard of it and the moment when it is run.
AT_PASS = """
from lark_fast.scoring.forward import Passes
import signal, torch
launch, launched = Passes._launch, 0
def at(self, batch):
    global launched
    launched += 1
    if launched == {number}:
        {what}
    return launch(self, batch)
Passes._launch = at
"""

pytestmark = pytest.mark.usefixtures("one_thread")


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (length,), generator=generator).tolist() for length in (17, 30, 1, 22)]


def scorer(path, **options):
    student = load_student(str(path), device="cpu", dtype="float32", tokenizer=False, **options)
    return Scorer(student, top_k=9, tokens_per_batch=40)


def score_on_rank(directory, names):
    """What a rank does: the scores by each model, or what it says of it; and what it holds of it."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        if name == "head not in the plan":
            transformers.LlamaForCausalLM._tp_plan = {}
        try:
            made = scorer(directory / name, tensor_parallel=True)
        except UserError as error:
            found[name] = str(error)
            continue
        stats = made.score_tokens(*[sequences()] * 2)
        held = made.student.head.weight, Footprint.of(made.student.model).weights, made.student.unpackable
        found[name] = stats, made.student.ranks.sizes, *held
    with pytest.raises(ValueError, match="different sequences"):
        made.score_tokens(*[[[1, 2, rank]]] * 2)
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.parametrize("ranks", MODELS)
def test_ranks_score_as_one_process(tmp_path, forks, ranks):
    for name, make in MODELS[ranks].items():
        make().save_pretrained(tmp_path / name)
    code = (
        "from pathlib import Path; from tests import test_tensor_parallel as t\n"
        f"t.score_on_rank(Path({str(tmp_path)!r}), {list(MODELS[ranks])})\n"
    )
    for rank in forks.start_ranks([code] * ranks):
        rank.ended()
    with torch.serialization.safe_globals([TokenStats]):
        everyone = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name in MODELS[ranks]:
        if name in REFUSED:
            assert all(REFUSED[name] in found[name] for found in everyone)
            continue
        alone = scorer(tmp_path / name)
        expected = alone.score_tokens(*[sequences()] * 2)
        for rank, (stats, sizes, weight, n_bytes, unpackable) in enumerate(found[name] for found in everyone):
            for one, other, first in zip(stats, expected, everyone[0][name][0], strict=True):
                for field in ("nll", "brier", "brier_topk", "entropy"):
                    torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-5, atol=1e-5)
                    assert torch.equal(getattr(one, field), getattr(first, field))
                assert torch.equal(one.rank, other.rank)
            assert unpackable == alone.student.unpackable
            start, end = ([0, *accumulate(sizes)][place] for place in (rank, rank + 1))
            assert torch.equal(weight, alone.student.head.weight[start:end])
            assert len(set(sizes[:-1])) == 1
            assert sizes[0] - sizes[-1] == -WORDS % ranks
            # Norms are whole on every rank, and a head that is in no plan.
            if name != "head not in the plan" and not OLD:
                assert n_bytes < 1.05 / ranks * Footprint.of(alone.student.model).weights


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", [{"messages": "broken"}, *make_records(20, 4)])


def words(pool, student, out, *more):
    own = ("--dtype", "float32", "--device", "cpu", "--tokens-per-batch", 256)
    return ("score", "--pool", pool, "--student", student, "--out", out, *own, *more)


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks, pool, student):
    """The directory of a run of two ranks, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "scores"
    return out, [rank.ended() for rank in forks.start_ranks([QUICK] * 2, *words(pool, student, out))]


def in_order(out):
    return sorted(table(out).to_pylist(), key=lambda row: (row["problem_id"], row["candidate_id"]))


def test_the_command_over_ranks(tmp_path, forks, pool, student, two):
    out, (first, second) = two
    assert "80 trajectories scored" in first.stdout
    assert "rejected" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    assert json.loads((out / "manifest.json").read_text())["config"]["ranks"] == 2
    more = ("--top-k", 9, "--per-token", "--local-steps", 1)
    forks.run(*words(pool, student, tmp_path / "one", *more), before=QUICK)
    for rank in forks.start_ranks([QUICK] * 2, *words(pool, student, tmp_path / "two", *more)):
        rank.ended()
    for one, other in zip(in_order(tmp_path / "one"), in_order(tmp_path / "two"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float | list):
                np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-5)
            else:
                assert other[name] == value


def test_score_lark_over_ranks(tmp_path, forks, pool, student):
    """Its JSON is rank 0's to write."""
    made = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        flags = ("--input", pool, "--output", output, "--student_model", student, "--dtype", "float32")
        first, *others = [rank.ended() for rank in forks.start_ranks([QUICK] * ranks, "score-lark", *flags)]
        assert f"{output}: written" in first.stdout
        assert [(other.stdout, other.stderr) for other in others] == [("", "")] * (ranks - 1)
        whole = json.loads(output.read_text())
        assert whole["n_scored"] == 80
        made.append([[row["L"], row["Brier"], row["g_hat"]] for rows in whole["scores"].values() for row in rows])
    np.testing.assert_allclose(*made, rtol=1e-4, atol=1e-5)


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
LOST = "another rank has ended"
ENDS = [  # what happens to which ranks, and how each ends: its code and what it says
    # Ctrl-C reaches all of them, at moments of its own.
    ("os.kill(os.getpid(), signal.SIGINT)", (0, 1), ((130, "interrupted"), (0, ""))),
    (KILLED, (0,), ((-9, ""), (1, ""))),
    (KILLED, (1,), ((2, LOST), (-9, ""))),
    ("raise torch.OutOfMemoryError", (1,), ((2, LOST), (2, "rank 1: the memory of cpu does not suffice for a pass"))),
]


def test_whatever_ends_one_rank_ends_all_and_nothing_is_lost(tmp_path, forks, pool, student, two):
    out, left = tmp_path / "scores", []
    for what, of, ends in ENDS:
        befores = [QUICK + (AT_PASS.format(number=3, what=what) if rank in of else "") for rank in range(2)]
        started = forks.start_ranks(befores, *words(pool, student, out))
        for rank, (code, says) in zip(started, ends, strict=True):
            rank.ended(code)
            assert says in rank.stderr
            assert says or not rank.stderr.strip()
        left.append(sum(path.stat().st_size for path in out.glob("journal-*")))
    assert sorted(set(left)) == left  # each has added something
    first, _ = [rank.ended() for rank in forks.start_ranks([QUICK] * 2, *words(pool, student, out))]
    assert 0 < int(first.stdout.split()[0]) < 80  # trajectories scored
    assert in_order(out) == in_order(two[0])


def test_rank_0_alone_says_what_is_wrong(tmp_path, forks, pool, student, two):
    missing, wordless = tmp_path / "missing.jsonl", shutil.copytree(student, tmp_path / "wordless")
    for file in wordless.glob("tokenizer*"):
        file.unlink()
    # As on a machine that has no such directory.
    elsewhere = "import lark_fast.scoring.ranks as r; find = r.students_of\n"
    elsewhere += "r.students_of = lambda config: find(r.replace(config, student='/elsewhere'))\n"
    for pool_, student_, more, of_second, message in [
        (missing, student, (), "", f"{missing}' does not exist"),
        (pool, tmp_path / "nobody", (), "", "nobody: no such directory"),
        (pool, student, (), elsewhere, "rank 1: /elsewhere: no such directory"),
        (pool, wordless, (), "", "wordless: its tokenizer cannot be loaded"),
        (pool, student, ("--devices", 2), "", "--devices starts one process a GPU by itself"),
        (pool, student, ("--top-k", 5), "", "holds scores made otherwise"),
    ]:
        befores = [QUICK, QUICK + of_second]
        first, second = forks.start_ranks(befores, *words(pool_, student_, two[0], *more))
        first.ended(2)
        assert message in first.stderr
        second.wait()
        assert (second.stdout, second.stderr) == ("", "")
