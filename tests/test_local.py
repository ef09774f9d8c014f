"""Local scores: where steps begin, the numbers of a plain loop over steps, and a run that makes them."""

import json
import random
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from lark_fast import Scorer
from lark_fast.cli.app import app
from lark_fast.errors import UserError
from lark_fast.pool.records import normalise
from lark_fast.rendering.renderer import Renderer, RenderOptions
from lark_fast.scoring.forward import Passes
from lark_fast.scoring.journal import Journal
from lark_fast.scoring.local import LocalPasses, _Place, local_pieces, step_starts
from lark_fast.scoring.parts import part_files, schema_of
from lark_fast.scoring.store import ScoreStore, read_manifest
from lark_fast.student import Student
from tests.command import write_jsonl, write_student
from tests.score_rows import IDENTITY, go_on, row, table
from tests.templates import CHATML
from tests.tiny import (
    TINY_MODELS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    slow_tokenizer,
    tiny_decoder,
    tiny_llama,
    word_tokenizer,
)

# Each as its steps; behind the last one, the template ends the turn.
ANSWERS = [
    ["It is 4."],
    [
        "Okay.\n\n",
        "First the sum: 12.\nThen 12 / 3.\n\n\n",
        "  It is 4.\n \t\n",
        "Let me check.\n\n",
        "四 ≠ 5 🙂, so 4.",
    ],
    ["<think>\nTwo and two.\n\n", "The answer is four.\n</think>\n\n", "It is 4."],
    ["Let me check, by lines.\r\n\r\n", "The answer is 4.\n\n  \n"],
    [f"{step} and the answer is right. " * (1 + step % 3) + "\n\n" for step in range(9)] + ["A: 9"],
]


def record(*answers, candidate=0, problem="p"):
    turns = []
    for number, answer in enumerate(answers):
        turns.append({"role": "user", "content": f"What is {number}?\n\nTell me."})
        turns.append({"role": "assistant", "content": "".join(answer)})
    return {"problem_id": problem, "candidate_id": candidate, "teacher": "t", "messages": turns}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(CHATML)


def steps_of(raw, tokenizer, **options):
    """The text of each step as the tokens have it."""
    renderer = Renderer(tokenizer, RenderOptions(**options))
    rendered = renderer(normalise(raw))
    starts = step_starts(rendered, renderer).tolist()
    scored = [position for position, label in enumerate(rendered.labels) if label >= 0]
    bounds = [position for position in scored if position in starts or position - 1 not in scored]
    assert bounds == starts, "each turn begins with a step, and steps begin at scored tokens alone"
    pieces = [[p for p in scored if start <= p < end] for start, end in zip(starts, [*starts[1:], 10**9], strict=True)]
    return [tokenizer.decode([rendered.input_ids[p] for p in piece]) for piece in pieces]


class TestSteps:
    @pytest.mark.parametrize("answer", ANSWERS)
    @pytest.mark.parametrize("trim_offsets", [False, True])
    def test_end_behind_blank_lines(self, answer, trim_offsets):
        found = steps_of(record(answer), byte_level_tokenizer(CHATML, trim_offsets=trim_offsets))
        assert found == [*answer[:-1], answer[-1] + "<|im_end|>\n"]

    @pytest.mark.parametrize("answer", [*ANSWERS, ["\n \nBlank lines open no step.\n\n", "Two."]])
    def test_without_offsets_they_are_those_of_the_tokens(self, answer):
        if not "".join(answer).isascii():
            answer = [step for step in answer if step.isascii()]
        assert steps_of(record(answer), slow_tokenizer(CHATML)) == [*answer[:-1], answer[-1] + "<|im_end|>\n"]

    @pytest.mark.parametrize("make", [sentencepiece_tokenizer, word_tokenizer])
    def test_with_other_tokenizers(self, make):
        # Of these, one falls back on bytes, and the other has no token for blanks at all.
        found = steps_of(record(ANSWERS[2]), make(CHATML, special=("<|im_start|>", "<|im_end|>")))
        assert ["two" in text for text in found] == [True, False, False]
        assert ["four" in text for text in found] == [False, True, False]
        assert ["4" in text for text in found] == [False, False, True]

    def test_a_token_across_the_border_belongs_to_the_step_it_begins_in(self):
        tokenizer = slow_tokenizer(CHATML, words=[".\n\nThen"])
        assert steps_of(record(["One.\n\nThen two.\n\n", "Three."]), tokenizer) == [
            "One.\n\nThen",
            " two.\n\n",
            "Three.<|im_end|>\n",
        ]

    def test_of_every_turn(self, tokenizer):
        raw = record(["One.\n\n", "Two."], ["\n\n\nThree."], ["Four.\n\n", "Five.\n\n"])
        end = "<|im_end|>\n"
        assert steps_of(raw, tokenizer) == [
            "One.\n\n",
            "Two." + end,
            "\n\nThree." + end,
            "Four.\n\n",
            "Five.\n\n" + end,
        ]
        assert steps_of(raw, tokenizer, last_turn_only=True) == ["Four.\n\n", "Five.\n\n" + end]
        assert steps_of(raw, tokenizer, span="content")[-1] == "Five.\n\n"

    def test_of_what_was_left_by_truncation(self, tokenizer):
        raw = record(["One.\n\n", "Two.\n\n", "Three."])
        whole = steps_of(raw, tokenizer)
        length = len(Renderer(tokenizer)(normalise(raw)).input_ids)
        for max_length in range(length - 12, length):
            cut = steps_of(raw, tokenizer, max_length=max_length)
            assert "".join(whole).startswith("".join(cut))
            assert cut[:-1] == whole[: len(cut) - 1]

    def test_of_token_ids(self, tokenizer):
        renderer = Renderer(tokenizer)
        for answer in ANSWERS:
            rendered = renderer(normalise(record(answer)))
            ids = {"input_ids": rendered.input_ids, "labels": rendered.labels}
            again = renderer(normalise(ids))
            assert again.text == ""
            assert step_starts(again, renderer).tolist() == step_starts(rendered, renderer).tolist()


def step_numbers(steps, tokenizer, ids, first, end):
    """Which step each token of a turn is part of, by counting characters."""
    bounds, numbers, seen = np.cumsum([len(step.encode()) for step in steps]), [], 0
    for position in range(first, end):
        numbers.append(min(int(np.searchsorted(bounds, seen, side="right")), len(steps) - 1))
        word = tokenizer.convert_ids_to_tokens(ids[position])
        seen += len(word) if not word.startswith("<|") else 0  # byte-level: a character a byte
    return numbers


@torch.no_grad()
def naive(model, ids, turns, k):
    """(local_nll, local_step_nll) by one plain pass a step; ``turns``: (first token, the step of each token)."""
    losses = []
    for first, numbers in turns:
        for step in range(max(numbers) + 1):
            kept = [first + i for i, number in enumerate(numbers) if step - k <= number <= step]
            own = sum(number == step for number in numbers)
            context = torch.tensor([[*ids[:first], *(ids[position] for position in kept)]])
            logits = model(input_ids=context).logits[0, -own - 1 : -1].double()
            losses.append(F.cross_entropy(logits, context[0, -own:], reduction="none"))
    return torch.cat(losses).mean().item(), torch.stack([loss.mean() for loss in losses]).mean().item()


def turns_of(answers, tokenizer, rendered):
    labels = np.asarray(rendered.labels)
    edges = np.flatnonzero(np.diff(np.r_[False, labels >= 0, False])).reshape(-1, 2)
    return [
        (int(first), step_numbers(steps, tokenizer, rendered.input_ids, first, end))
        for steps, (first, end) in zip(answers, edges, strict=True)
    ]


CONVERSATIONS = [*([answer] for answer in ANSWERS), [ANSWERS[1], ANSWERS[4]], [ANSWERS[4], ANSWERS[0], ANSWERS[2]]]
RECORDS = [record(*answers, candidate=number) for number, answers in enumerate(CONVERSATIONS)]


class TestAgainstAPlainLoop:
    @pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
    @pytest.mark.parametrize(("k", "tokens_per_batch"), [(1, 300), (2, 1), (3, 10**6)])
    def test_every_step_sees_the_prompt_and_k_steps(self, name, k, tokens_per_batch, tokenizer):
        model = TINY_MODELS[name](len(tokenizer), max_position_embeddings=2048)
        scorer = Scorer(model, tokenizer, tokens_per_batch=tokens_per_batch)
        for answers, raw, score in zip(CONVERSATIONS, RECORDS, scorer.score(RECORDS, local_steps=k), strict=True):
            rendered = scorer.renderer(normalise(raw))
            expected = naive(model, rendered.input_ids, turns_of(answers, tokenizer, rendered), k)
            assert (score.local_nll, score.local_step_nll) == pytest.approx(expected, rel=1e-5)

    def test_where_trajectories_cannot_be_packed(self, tokenizer):
        model = tiny_decoder("mamba", len(tokenizer))
        scorer = Scorer(model, tokenizer, tokens_per_batch=500)
        assert scorer.student.unpackable
        for number in (1, 6):
            score = scorer.score([RECORDS[0], RECORDS[number]], local_steps=1)[1]
            rendered = scorer.renderer(normalise(RECORDS[number]))
            expected = naive(model, rendered.input_ids, turns_of(CONVERSATIONS[number], tokenizer, rendered), 1)
            assert (score.local_nll, score.local_step_nll) == pytest.approx(expected, rel=1e-5)

    def test_a_trajectory_that_was_cut(self, tokenizer):
        model = tiny_llama(len(tokenizer))
        for max_length in (100, 141, 150):
            scorer = Scorer(model, tokenizer, options=RenderOptions(max_length=max_length))
            (score,) = scorer.score([RECORDS[4]], local_steps=2)
            rendered = scorer.renderer(normalise(RECORDS[4]))
            assert score.truncated
            expected = naive(model, rendered.input_ids, turns_of(CONVERSATIONS[4], tokenizer, rendered), 2)
            assert (score.local_nll, score.local_step_nll) == pytest.approx(expected, rel=1e-5)

    def test_with_as_many_steps_as_there_are_it_is_the_nll(self, tokenizer):
        scorer = Scorer(tiny_llama(len(tokenizer), max_position_embeddings=2048), tokenizer, tokens_per_batch=400)
        plain = scorer.score(RECORDS)
        assert all(score.local_nll is None and score.local_step_nll is None for score in plain)
        for k in (1, 3, 8, 9, 100):
            for answers, score, other in zip(CONVERSATIONS, scorer.score(RECORDS, local_steps=k), plain, strict=True):
                assert score.nll == other.nll, "pieces share no pass with trajectories"
                assert (score.local_nll == score.nll) == (max(map(len, answers)) <= k + 1)

    def test_records_of_token_ids_and_twins(self, tokenizer):
        scorer = Scorer(tiny_llama(len(tokenizer)), tokenizer, tokens_per_batch=200)
        rendered = scorer.renderer(normalise(RECORDS[4]))
        ids = {"input_ids": rendered.input_ids, "labels": rendered.labels}
        scores = scorer.score([RECORDS[4], RECORDS[1], ids, RECORDS[4]], local_steps=1)
        assert scores[0].local_nll == scores[2].local_nll == scores[3].local_nll != scores[1].local_nll

    def test_below_one(self, tokenizer):
        with pytest.raises(ValueError, match="local_steps is at least 1, not 0"):
            Scorer(tiny_llama(len(tokenizer)), tokenizer).score(RECORDS, local_steps=0)


def close_to(scored, expected):
    """The same means, but for rounding."""
    ours, theirs = ({n: v for n, v in one.means.items() if v is not None} for one in (scored, expected))
    assert ours == pytest.approx(theirs, rel=1e-6)


class TestShortOfMemory:
    @pytest.fixture
    def made(self, tokenizer):
        """Passes, trajectories, and where their steps begin."""
        passes = Passes(
            Student(tiny_llama(len(tokenizer), max_position_embeddings=2048)),
            top_k=None, impl="auto", tokens_per_batch=2000,
        )  # fmt: skip
        renderer = Renderer(tokenizer)
        rendered = [renderer(normalise(raw)) for raw in RECORDS]
        return passes, [(r.input_ids, r.labels) for r in rendered], [step_starts(r, renderer) for r in rendered]

    @staticmethod
    def results(passes, sequences, starts):
        groups = passes.layout.plan([len(ids) for ids, _ in sequences])
        batches = [passes.layout.prepare(group, [sequences[i] for i in group]) for group in groups]
        with passes.student.packing():
            for batch, scored in LocalPasses(passes, 1, starts.__getitem__).run(batches):
                yield from zip(batch.members, scored or [None] * len(batch.members), strict=True)

    def test_packs_are_halved(self, made, monkeypatch):
        expected = dict(self.results(*made))
        launch, longest = Passes._launch, max(len(ids) for ids, _ in made[1])

        def short(self, batch):
            if batch.size > longest:
                raise torch.OutOfMemoryError
            return launch(self, batch)

        monkeypatch.setattr(Passes, "_launch", short)
        halved = list(self.results(*made))
        assert sorted(member for member, _ in halved) == list(range(len(RECORDS)))
        assert made[0].work.halvings
        for member, one in halved:
            close_to(one, expected[member])

    def test_who_loses_a_piece_is_lost_alone(self, made, monkeypatch):
        _, sequences, starts = made
        expected, launch = dict(self.results(*made)), Passes._launch
        piece = local_pieces(sequences[5][1], starts[5], 1)[-2]
        unlucky = sequences[5][0][piece.first : piece.end]

        def short(self, batch):
            for member, (ids, _) in zip(batch.members, batch.sequences, strict=True):
                if isinstance(member, _Place) and list(ids[-len(unlucky) :]) == unlucky and len(ids) == piece.n_tokens:
                    raise torch.OutOfMemoryError
            return launch(self, batch)

        monkeypatch.setattr(Passes, "_launch", short)
        found = dict(self.results(*made))
        assert len(found) == len(RECORDS)
        assert found[5] is None
        for member, one in found.items():
            if member != 5:
                close_to(one, expected[member])


class TestStore:
    def test_twins_of_other_windows_share_the_numbers(self, tmp_path):
        identity = IDENTITY | {"local_steps": 2}
        rows = [row("p", c, tokens=b"same") | {"local_nll": c, "local_step_nll": 2.0 * c} for c in (1.0, 2.0)]
        go_on(tmp_path / "s", [rows[:1], rows[1:]], identity)
        made = table(tmp_path / "s")
        assert made.schema.equals(schema_of(identity, final=True))
        assert made["local_nll"].to_pylist() == [1.0, 1.0]
        assert made["local_step_nll"].to_pylist() == [2.0, 2.0]

    def test_one_begun_before_there_were_local_scores(self, tmp_path):
        go_on(tmp_path / "s", [[row("p", 0)]])
        before = table(tmp_path / "s")
        go_on(tmp_path / "s", [[row("p", 0)]], IDENTITY | {"local_steps": None})
        assert table(tmp_path / "s").equals(before)
        assert "local_nll" not in before.schema.names
        with pytest.raises(UserError, match="local_steps was None, is 2"):
            ScoreStore(tmp_path / "s", IDENTITY | {"local_steps": 2})


# The matrix product timed before every run takes longer than these; and windows of four packs.
QUICK = "import math, os, lark_fast.flop as f, lark_fast.packing as p; f.matmul_ceiling = lambda *_: math.nan\n"
SMALL_WINDOWS = QUICK + "p.CPU_WINDOW_FLOP = 0\n"
LOCAL = ("local_nll", "local_step_nll")


def words(pool, student, out, *more):
    """The words of the command; float32, so that what differs differs for a reason."""
    return (
        *("score", "--pool", pool, "--student", student, "--out", out, "--dtype", "float32"),
        *("--tokens-per-batch", 256, *more),
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Candidates of one to ten steps, twins among them."""
    raws = []
    for number in range(60):
        answer = ["Okay.\n\n", *ANSWERS[4][: 7 * number % 10], f"It is {number % 4}."]
        raws.append(record(answer, candidate=number, problem=number // 3))
    assert len({json.dumps(raw["messages"]) for raw in raws}) < len(raws)
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", raws)


@pytest.fixture(scope="module")
def whole(forks, pool, student, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "s"
    forks.run(*words(pool, student, out, "--local-steps", 2, "--per-token"), before=SMALL_WINDOWS)
    assert len(part_files(out)) > 3
    return out


class TestARun:
    def test_adds_columns_and_changes_nothing_else(self, tmp_path, forks, pool, student, whole):
        forks.run(*words(pool, student, tmp_path / "s", "--per-token"), before=SMALL_WINDOWS)
        made, plain = table(whole), table(tmp_path / "s")
        assert made.drop_columns(LOCAL).equals(plain)
        same = np.asarray(made["local_nll"]) == np.asarray(made["nll"])
        assert 10 < same.sum() < len(same) - 10

    def test_numbers_are_the_scorers(self, pool, student, whole):
        raws = [json.loads(line) for line in pool.read_text().splitlines()]
        scorer = Scorer.from_pretrained(str(student), device="cpu", dtype="float32")
        made = table(whole).to_pylist()
        for score, stored in zip(scorer.score(raws, local_steps=2), made, strict=True):
            assert (score.local_nll, score.local_step_nll) == pytest.approx([stored[n] for n in LOCAL], rel=1e-6)

    def test_a_dry_run_counts_what_passes_besides(self, tmp_path, forks, pool, student):
        done = forks.run(*words(pool, student, tmp_path / "s", "--dry-run", "--local-steps", 2), before=QUICK)
        renderer, more = Renderer(byte_level_tokenizer(CHATML)), 0
        for line in pool.read_text().splitlines():
            rendered = renderer(normalise(json.loads(line)))
            starts = [*step_starts(rendered, renderer).tolist(), len(rendered.input_ids)]
            more += sum(starts[0] + starts[j + 1] - starts[j - 2] for j in range(3, len(starts) - 1))
        assert f"{more:,} tokens more pass through the student for local scores" in done.stdout
        assert not (tmp_path / "s").exists()

    def test_workers_change_no_bit(self, tmp_path, forks, pool, student, whole):
        more = ("--local-steps", 2, "--workers", 2, "--json", "--per-token")
        done = forks.run(*words(pool, student, tmp_path / "s", *more), before=SMALL_WINDOWS)
        assert json.loads(done.stdout)["local_tokens"] > 0
        assert table(tmp_path / "s").equals(table(whole))

    def test_another_number_of_steps_is_refused(self, forks, pool, student, whole):
        assert read_manifest(whole)["identity"]["local_steps"] == 2
        refused = forks.run(*words(pool, student, whole, "--per-token", "--local-steps", 3), code=2, before=QUICK)
        assert "(local_steps was 2, is 3); give another directory" in refused.stderr
        none = CliRunner().invoke(app, ["score", *map(str, words(pool, student, whole, "--local-steps", 0)[1:])])
        assert none.exit_code == 2
        assert "--local-steps" in none.output

    def test_kills_at_any_moment_and_bit_for_bit_the_whole_run(self, tmp_path, forks, pool, student, whole):
        out, chance, seen = tmp_path / "s", random.Random(0), 0
        arguments = words(pool, student, out, "--local-steps", 2, "--per-token")
        # At a pass that is drawn, most often one over pieces, the process is gone or asked to go.
        stop = (
            "from lark_fast.scoring.forward import Passes\n"
            "launch, passes = Passes._launch, 0\n"
            "def stopping(self, batch):\n"
            "    global passes\n"
            "    passes += 1\n"
            "    passes == {at} and os.kill(os.getpid(), {number})\n"
            "    return launch(self, batch)\n"
            "Passes._launch = stopping\n"
        )
        for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            before = SMALL_WINDOWS + stop.format(at=chance.randint(15, 40), number=int(number))
            forks.start(*arguments, before=before).ended(130 if number == signal.SIGTERM else -number)
            rows = sum(pq.read_metadata(part).num_rows for part in part_files(out))
            frames = [frame for path in out.glob("journal-*") for frame in Journal(path).frames]
            rows += sum(len(pa.ipc.open_stream(frame).read_all()) for frame in frames)
            assert rows >= seen
            seen = rows
        assert 0 < seen < 60
        forks.run(*arguments, before=SMALL_WINDOWS)
        assert table(out).equals(table(whole))
        assert not list(out.glob("journal-*"))
