"""The journal's frames: whole or not there; and the rows that the store keeps in them."""

import itertools
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import UserError
from lark_fast.scoring.journal import Journal
from lark_fast.scoring.parts import part_files
from lark_fast.scoring.store import ScoreStore
from tests.score_rows import IDENTITY, go_on, key, row, table, write_window

# No payload, one byte, and one with what looks like a frame inside.
PAYLOADS = [b"", b"x", bytes(range(40)), b"\x01\x00\x00\x00" * 5]


@pytest.fixture
def journal(tmp_path):
    """A journal of PAYLOADS; ``ends[i]`` is where the first i frames end."""
    path = tmp_path / "whole"
    made, ends = Journal(path), [0]
    for payload in PAYLOADS:
        made.append(payload)
        ends.append(path.stat().st_size)
    made.close()
    return path, ends


def frames(path):
    return [bytes(frame) for frame in Journal(path).frames]


def goes_on(path):
    """Another frame goes right behind the whole ones, whatever was there, and is found again."""
    before = frames(path)
    again = Journal(path)
    again.append(b"another")
    again.close()
    assert frames(path) == [*before, b"another"]


def test_frames_come_back(journal):
    path, ends = journal
    assert frames(path) == PAYLOADS
    assert ends == list(itertools.accumulate([8 + len(payload) for payload in PAYLOADS], initial=0))
    goes_on(path)


def test_cut_at_every_byte(journal, tmp_path):
    path, ends = journal
    content = path.read_bytes()
    for length in range(len(content) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(content[:length])
        whole = sum(end <= length for end in ends[1:])
        assert frames(torn) == PAYLOADS[:whole]
        assert torn.read_bytes() == content[:length], "reading changed it"
        goes_on(torn)
        assert torn.stat().st_size == ends[whole] + 8 + len(b"another")


def test_a_flipped_bit_at_every_byte(journal, tmp_path):
    path, ends = journal
    content = path.read_bytes()
    for place in range(len(content)):
        bad = bytearray(content)
        bad[place] ^= 1 << place % 8
        torn = tmp_path / "torn"
        torn.write_bytes(bad)
        # A frame behind a damaged one is not trusted: where it begins is what the damaged one says.
        assert frames(torn) == PAYLOADS[: sum(end <= place for end in ends[1:])]
        goes_on(torn)


# What file systems may show after a power cut, behind or instead of what was written.
@pytest.mark.parametrize("tail", [bytes(8), bytes(4096), b"\xff" * 100, b"\x00" * 7])
def test_a_tail_that_was_never_written(journal, tail):
    path, _ = journal
    path.write_bytes(path.read_bytes() + tail)
    assert frames(path) == PAYLOADS
    goes_on(path)
    path.write_bytes(tail)
    assert frames(path) == []


def test_a_disk_that_takes_half_a_frame(journal, monkeypatch):
    path, ends = journal
    made = Journal(path)
    real = os.pwrite

    def half(descriptor, data, offset):
        if offset > ends[-1]:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:5], offset)

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError, match="No space"):
        made.append(b"does not fit")
    assert path.stat().st_size == ends[-1]
    # Where even cutting fails, the next frame overwrites what is there.
    with monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", fails)
        with pytest.raises(OSError, match="No space"):
            made.append(b"does not fit")
    assert path.stat().st_size == ends[-1] + 5
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    made.append(b"fits, three bytes at a time")
    made.close()
    assert frames(path) == [*PAYLOADS, b"fits, three bytes at a time"]


def rows_of(problem, n):
    rng = np.random.default_rng(problem)
    return [row(problem, k, *rng.uniform(0.1, 1, 2)) for k in range(n)]


def test_a_window_is_a_part_in_the_order_of_the_pool(tmp_path):
    """The same bytes, however it was cut into packs and however often it was stopped."""
    rows = rows_of(1, 10)
    parts = []
    for cuts in ([10], [1] * 10, [4, 4, 2]):
        out = tmp_path / str(len(parts))
        shuffled = iter(np.random.default_rng(len(cuts)).permutation(10))
        for cut in cuts:
            with ScoreStore(out, IDENTITY) as store:
                store.append([rows[next(shuffled)] for _ in range(cut)])
                assert store.parts() == []
                assert list(store.scored_keys()) == []
        with ScoreStore(out, IDENTITY) as store:
            assert store.unfinished == {key(r): r["content_hash"] for r in rows}
            store.close_window([key(r) for r in rows])
            assert len(store.unfinished) == 10, "the run still asks it about its window"
        assert [path.name for path in sorted(out.iterdir())] == [".lock", "manifest.json", "part-000000.parquet"]
        parts.append((out / "part-000000.parquet").read_bytes())
        with ScoreStore(out, IDENTITY) as store:
            assert store.unfinished == {}
    assert parts[0] == parts[1] == parts[2]


def test_columns_of_tokens_may_be_arrays(tmp_path):
    identity = {"top_k": 5, "per_token": True}
    names = ["token_nll", "token_brier", "token_brier_topk", "token_entropy", "token_rank"]
    rows, as_lists = rows_of(1, 4), []
    for n, made in enumerate(rows):
        made |= {"brier_topk": 0.5, **{name: np.arange(n * 2.0, dtype=np.float32) for name in names[:4]}}
        made["token_rank"] = np.arange(n * 2, dtype=[np.int32, np.int64][n % 2])
        as_lists.append(made | {name: made[name].tolist() for name in names})
    for out, given in (("arrays", rows), ("lists", as_lists)):
        go_on(tmp_path / out, [given], identity)
    made = table(tmp_path / "arrays")
    assert made.equals(table(tmp_path / "lists"))
    assert made["token_rank"].to_pylist() == [r["token_rank"] for r in as_lists]


def test_nothing_to_write(tmp_path):
    with ScoreStore(tmp_path, IDENTITY) as store:
        store.append([])
        store.close_window([])
        assert store.finish()["counts"] == {"rows": 0, "problems": 0, "not_finite": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json"]


def test_rows_that_no_window_names_are_kept(tmp_path):
    """The pool lost a record, or is cut otherwise than when the rows were appended."""
    rows = rows_of(1, 6)
    with ScoreStore(tmp_path, IDENTITY) as store:
        store.append(rows)
    with ScoreStore(tmp_path, IDENTITY) as store:
        store.close_window([key(r) for r in (rows[4], rows[2])])
        assert table(tmp_path)["candidate_id"].to_pylist() == ["4", "2", "0", "1", "3", "5"]
        # The next windows hold some of them: those are written already.
        new = row(2, 0)
        store.append([new])
        store.close_window([key(r) for r in (rows[0], new, rows[5])])
        store.close_window([key(rows[1])])
        assert len(store.parts()) == 2
        with pytest.raises(ValueError, match="in a part already"):
            store.append([rows[3]])
        store.finish()
    assert table(tmp_path)["candidate_id"].to_pylist() == ["4", "2", "0", "1", "3", "5", "0"]


def test_a_row_that_was_never_appended_is_a_mistake(tmp_path):
    rows = rows_of(1, 3)
    with ScoreStore(tmp_path, IDENTITY) as store:
        store.append(rows[:2])
        with pytest.raises(ValueError, match=r"\('1', '2'\) was never appended"):
            store.close_window([key(r) for r in rows])
        assert store.parts() == []
        write_window(store, rows)
    assert len(table(tmp_path)) == 3


def test_a_row_given_again_replaces_the_first(tmp_path):
    with ScoreStore(tmp_path, IDENTITY) as store:
        store.append([row(1, 0, 0.5), row(1, 1, 0.6)])
        store.append([row(1, 0, 0.7)])
    with ScoreStore(tmp_path, IDENTITY) as store:
        store.close_window([("1", "0"), ("1", "1")])
    assert table(tmp_path)["nll"].to_pylist() == [0.7, 0.6]


def test_finish_makes_a_part_of_a_window_that_was_not_closed(tmp_path):
    rows = rows_of(1, 5)
    with ScoreStore(tmp_path, IDENTITY) as store:
        write_window(store, rows[:2])
        store.append(rows[2:])
    with ScoreStore(tmp_path, IDENTITY) as store:
        assert store.finish()["counts"]["rows"] == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == [
        ".lock",
        "part-000000.parquet",
        "part-000001.parquet",
    ]


def test_the_journal_of_a_window_outlives_the_part_before_it(tmp_path):
    """The last part is removed, as the message about a damaged one asks: the journal's number is not the next one."""
    windows = [rows_of(w, 4) for w in range(3)]
    with ScoreStore(tmp_path, IDENTITY) as store:
        for window in windows[:2]:
            write_window(store, window)
        store.append(windows[2][:3])
    (tmp_path / "part-000001.parquet").unlink()
    with ScoreStore(tmp_path, IDENTITY) as store:
        assert set(store.unfinished) == {key(r) for r in windows[2][:3]}
    go_on(tmp_path, windows)
    made = table(tmp_path)
    assert sorted(zip(made["problem_id"].to_pylist(), made["candidate_id"].to_pylist(), strict=True)) == sorted(
        key(r) for window in windows for r in window
    )


class TestWindowsAhead:
    """Rows of later windows may come before those of the one in hand: passes of several windows are under way."""

    def test_each_has_its_journal_and_its_part(self, tmp_path):
        windows = [rows_of(w, 4) for w in range(3)]
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append(windows[2][2:], 2)
            store.append(windows[0][:3])
        assert sorted(path.name for path in tmp_path.glob("journal-*")) == ["journal-000000", "journal-000002"]
        with ScoreStore(tmp_path, IDENTITY) as store:
            assert set(store.unfinished) == {key(r) for r in windows[2][2:] + windows[0][:3]}
            store.append(windows[1], 1)
            store.append(windows[0][3:])
            store.close_window([key(r) for r in windows[0]])
            store.append(windows[2][:2], 1)
        with ScoreStore(tmp_path, IDENTITY) as store:
            for window in windows[1:]:
                store.close_window([key(r) for r in window])
            store.finish()
        assert [pq.read_table(part)["candidate_id"].to_pylist() for part in part_files(tmp_path)] == [
            [r["candidate_id"] for r in window] for window in windows
        ]
        assert not list(tmp_path.glob("journal-*"))

    def test_finish_makes_parts_of_all(self, tmp_path):
        windows = [rows_of(w, 4) for w in range(3)]
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append(windows[2], 2)
            store.append(windows[0])
        with ScoreStore(tmp_path, IDENTITY) as store:
            assert store.finish()["counts"]["rows"] == 8
        assert [part.name for part in part_files(tmp_path)] == ["part-000000.parquet", "part-000002.parquet"]
        with ScoreStore(tmp_path, IDENTITY) as store:
            write_window(store, windows[1])
            assert store.finish()["counts"]["rows"] == 12
        assert [part.name for part in part_files(tmp_path)][2:] == ["part-000003.parquet"]

    @pytest.mark.parametrize("killed", [False, True])
    def test_a_pool_that_is_cut_otherwise(self, tmp_path, killed):
        """A part takes a row from where it is; the journal it comes from is there for a while, and counts no more."""
        windows = [rows_of(w, 4) for w in range(3)]
        first, second = windows[0] + windows[1][:2], windows[1][2:] + windows[2]
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append(windows[1], 1)
            store.append(windows[0])
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.close_window([key(r) for r in first])
            if not killed:
                store.append(windows[2])
                store.close_window([key(r) for r in second])
        if killed:
            with ScoreStore(tmp_path, IDENTITY) as store:
                assert set(store.unfinished) == {key(r) for r in windows[1][2:]}
                store.append(windows[2])
                store.close_window([key(r) for r in second])
        made = [
            list(zip(*(pq.read_table(part)[name].to_pylist() for name in ("problem_id", "candidate_id")), strict=True))
            for part in part_files(tmp_path)
        ]
        assert made == [[key(r) for r in first], [key(r) for r in second]]

    def test_a_window_of_which_nothing_is_left(self, tmp_path):
        """Its records were too long for the memory; those behind it go on."""
        rows = rows_of(1, 4)
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append(rows, 1)
            store.close_window([])
            store.close_window([key(r) for r in rows])
            assert store.finish()["counts"]["rows"] == 4

    def test_journals_that_somebody_has_moved(self, tmp_path):
        windows = [rows_of(w, 4) for w in range(2)]
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append(windows[0])
        (tmp_path / "journal-000000").rename(tmp_path / "aside")
        with ScoreStore(tmp_path, IDENTITY) as store:
            store.append(windows[1])
        (tmp_path / "journal-000000").rename(tmp_path / "journal-000003")
        (tmp_path / "aside").rename(tmp_path / "journal-000000")
        with ScoreStore(tmp_path, IDENTITY) as store:
            assert set(store.unfinished) == {key(r) for window in windows for r in window}
            assert store.finish()["counts"]["rows"] == 8


def test_a_stranger_s_journal_is_left_alone(tmp_path):
    (tmp_path / "journal-000000").write_text("Dear diary")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"no manifest\.json"):
            ScoreStore(tmp_path, IDENTITY, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["journal-000000"]
    assert (tmp_path / "journal-000000").read_text() == "Dear diary"
