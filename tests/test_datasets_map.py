"""Scores as columns, with the real ``datasets``."""

import pickle
import signal
from contextlib import contextmanager

import pyarrow as pa
import pytest
import torch

from lark_fast import Scorer, g_hat
from lark_fast.dropins.datasets_map import ScoreRows, add_g_hat
from lark_fast.errors import UserError
from lark_fast.rendering.renderer import RenderOptions
from lark_fast.student import load_student
from tests.command import make_records, write_student

datasets = pytest.importorskip("datasets")
MEANS = ("nll", "brier", "entropy", "rank_mean", "rsr", "rho")
NUMBERS = ("n_tokens", "n_input_tokens", "truncated", *MEANS)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def records(problems=4):
    """With an answer given twice, and two rows that cannot be scored."""
    made = list(make_records(problems))
    made[4]["messages"] = made[5]["messages"]
    made[7]["messages"] = made[7]["messages"][:1]
    made[8]["messages"][1]["content"] = " "
    return made


def expected(student, rows, **options):
    """The numbers of the usable rows by their place."""
    places = [place for place in range(len(rows)) if place not in (7, 8)]
    scores = Scorer.from_pretrained(str(student), dtype="float32", **options).score([rows[place] for place in places])
    return dict(zip(places, scores, strict=True))


def agree(made, scores, names=NUMBERS):
    for place, row in enumerate(made):
        for name in names:
            value = getattr(scores[place], name) if place in scores else None
            assert row[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


def test_map_adds_the_scores_and_g_hat(student):
    rows, options = records(), RenderOptions(span="content", max_length=64)
    dataset = datasets.Dataset.from_list(rows)
    score = ScoreRows(student, dtype="float32", top_k=7, options=options)
    scored = dataset.map(score, batched=True, batch_size=5)
    scores = expected(student, rows, top_k=7, options=options)
    assert scored.column_names[: len(rows[0])] == dataset.column_names
    agree(scored, scores, (*NUMBERS, "brier_topk"))
    reasons = {place: row["rejected"] for place, row in enumerate(scored) if row["rejected"]}
    assert reasons == {7: "there is no assistant turn", 8: "the assistant turn at message 1 is empty"}
    assert scored.features == score.features(dataset.features)
    ranked = add_g_hat(scored)
    lists = zip(*((s.nll, s.brier_topk, s.problem_id) for s in scores.values()), strict=True)
    values = dict(zip(scores, g_hat(*lists), strict=True))
    assert ranked["g_hat"][7] is ranked["g_hat"][8] is None
    for place, value in values.items():
        assert ranked["g_hat"][place] == pytest.approx(value, abs=1e-6)
    assert ranked["g_hat"][4] == ranked["g_hat"][5]
    key = ("problem_id", "candidate_id")
    again = sorted(add_g_hat(ranked.shuffle(seed=3)), key=lambda row: [row[name] for name in key])
    assert again[4]["g_hat"] == again[5]["g_hat"]
    assert [row["g_hat"] for row in again] == pytest.approx(ranked["g_hat"][:], abs=1e-6)
    with pytest.raises(ValueError, match="no column 'token_hash'"):
        add_g_hat(dataset)


def test_a_stream(student):
    rows = records()
    dataset = datasets.Dataset.from_list(rows)
    whole = add_g_hat(dataset.map(ScoreRows(student, dtype="float32"), batched=True))
    stream = dataset.to_iterable_dataset().map(ScoreRows(student, dtype="float32"), batched=True, batch_size=5)
    scored = list(add_g_hat(stream))
    agree(scored, expected(student, rows))
    assert [row["g_hat"] for row in scored] == pytest.approx(list(whole["g_hat"]), abs=1e-6)
    assert list(scored[0]) == whole.column_names
    apart = datasets.Dataset.from_list([*rows, rows[0]]).to_iterable_dataset()
    with pytest.raises(ValueError, match="problem_id 0 comes again"):
        list(add_g_hat(apart.map(ScoreRows(student, dtype="float32"), batched=True)))


def test_other_columns_and_forms(student):
    """Prompts are problems where nothing else says so; what no score needs is not looked at, nor are Nones."""
    rows = [
        {"prompt": "What is two?", "completion": "The answer is 4.", "score": float("nan"), "system": None},
        {"prompt": "What is two?", "completion": "Two and two is four.", "score": 1.0, "system": None},
        {"prompt": "How many?", "completion": None, "score": 1.0, "system": None},
    ]
    scored = datasets.Dataset.from_list(rows).map(ScoreRows(student), batched=True)
    assert scored["problem_id"][0] == scored["problem_id"][1]
    assert scored["problem_id"][2] is None
    assert add_g_hat(scored)["g_hat"][2] is None
    ids = [[1, 5, 6, 7], [2, 3, 4, 5]]
    tokens = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    assert tokens.map(ScoreRows(student), batched=True)["n_tokens"][:].tolist() == [3, 3]
    nothing = datasets.Dataset.from_dict({"text": ["a", "b"]}).map(ScoreRows(student), batched=True)
    assert nothing["rejected"][1].startswith("there is neither messages")
    # The batch in front has no types to give.
    rows = [{"messages": None}, *({"messages": record["messages"]} for record in make_records(1))]
    dataset, score = datasets.Dataset.from_list(rows), ScoreRows(student)
    scored = dataset.map(score, batched=True, batch_size=1, features=score.features(dataset.features))
    assert [bool(row["rejected"]) for row in scored] == [True, False, False, False]
    unnamed = pa.table({"problem_id": [None, 1], "token_hash": ["a", "b"], "nll": [1.0, 2.0], "brier": [0.5, 0.4]})
    with pytest.raises(ValueError, match="row 0 is scored but has no problem_id"):
        add_g_hat(datasets.Dataset(unnamed))


def test_faults(student, tmp_path):
    rows = records()
    dataset = datasets.Dataset.from_list(rows)
    for one in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match="batched=True"):
            list(one.map(ScoreRows(student)))
    with pytest.raises(ValueError, match="row 7 of its batch: there is no assistant turn"):
        dataset.map(ScoreRows(student, strict=True), batched=True)
    with pytest.raises(UserError, match="nobody: no such directory"):
        dataset.map(ScoreRows(tmp_path / "nobody"), batched=True)
    with pytest.raises(ValueError, match="of several, each by itself"):
        add_g_hat(datasets.DatasetDict(train=dataset))


def test_the_cache_knows_options_and_files(tmp_path):
    student = write_student(tmp_path / "student")
    dataset = datasets.Dataset.from_list(records())
    dataset.save_to_disk(tmp_path / "rows")
    dataset = datasets.load_from_disk(tmp_path / "rows")
    score = ScoreRows(student, dtype="float32")
    scored = dataset.map(score, batched=True)
    assert score._scorer is not None
    assert pickle.loads(pickle.dumps(score))._scorer is None
    for used, again in ((score, True), (ScoreRows(str(student), dtype="float32"), True), (ScoreRows(student), False)):
        used._scorer = None
        assert (dataset.map(used, batched=True)._fingerprint == scored._fingerprint) == again
        assert (used._scorer is None) == again, "what is in the cache needs no student"
    write_student(tmp_path / "student", seed=1)
    other = dataset.map(ScoreRows(student, dtype="float32"), batched=True)
    assert other["nll"][0] != scored["nll"][0]


def test_the_cache_knows_the_base_of_an_adapter(tmp_path, monkeypatch):
    base = write_student(tmp_path / "base")
    monkeypatch.chdir(tmp_path)

    def fingerprint(base):
        return datasets.fingerprint.Hasher.hash(ScoreRows("org/adapter", base=base))

    before = fingerprint("base")
    assert fingerprint(base) == before != fingerprint("org/base")
    write_student(base, seed=1)
    assert fingerprint("base") != before


@contextmanager
def at_most(seconds):
    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_several_processes(student):
    """Forked behind a parent whose threads have been at work, which OpenMP would wait for in vain."""
    rows = records()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = expected(student, rows)
        torch.rand(400, 400).exp().sum()
        load_student(str(student)).hidden(torch.ones(8, 200, dtype=torch.long))
        with at_most(40):
            scored = datasets.Dataset.from_list(rows).map(
                ScoreRows(student, dtype="float32"), batched=True, num_proc=2, with_rank=True
            )
    finally:
        torch.set_num_threads(threads)
    agree(scored, here)
