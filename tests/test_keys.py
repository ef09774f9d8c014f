import os
import pickle
import random
import subprocess
import sys
import tempfile
import tracemalloc

import pytest

from lark_fast.hashing import hash_fields
from lark_fast.pool.keys import KeyTable


def content_of(number: int) -> bytes:
    return hash_fields(str(number).encode(), size=16)


@pytest.mark.parametrize("capacity", [1, 2, 1024, 1 << 18])
def test_agrees_with_a_dict(capacity):
    # 1 and 2 make every insertion collide and grow; 2^18 never grows for these sizes.
    random_numbers = random.Random(capacity)
    table, truth = KeyTable(capacity), {}
    for _ in range(3000):
        key = (str(random_numbers.randrange(40)), str(random_numbers.randrange(40)))
        action = random_numbers.randrange(3)
        if action == 0:
            content, met = content_of(random_numbers.randrange(10**6)), random_numbers.random() < 0.5
            table.add(key, content, met)
            truth[key] = (KeyTable.short_content(content), met)
        elif action == 1 and key in truth:
            table.mark(key)
            truth[key] = (truth[key][0], True)
        assert table.find(key) == truth.get(key)
        assert len(table) == len(truth)
        assert table.unmet() == sum(not met for _, met in truth.values())
    assert all(table.find(key) == entry for key, entry in truth.items())


def test_every_slot_of_a_full_probe_sequence_is_reachable():
    # At most 0.8 of the slots may fill before a growth: with 8 slots the seventh key must move the table.
    table = KeyTable(8)
    for number in range(6):
        table.add((str(number), ""), content_of(number), met=False)
    assert len(table._words) == 2 * 8
    table.add(("6", ""), content_of(6), met=False)
    assert len(table._words) == 2 * 16
    for number in range(7):
        assert table.find((str(number), "")).content == KeyTable.short_content(content_of(number))
    assert table.find(("7", "")) is None


def test_equal_slots_and_equal_high_words_are_told_apart(monkeypatch):
    # Keys that agree in the 64 bits that place them differ only in the low 24: forced, as chance would need 10^9 keys.
    monkeypatch.setattr("lark_fast.pool.keys._hash_key", lambda key: (12345, int(key[0])))
    table = KeyTable(4)
    for number in range(200):
        table.add((str(number), ""), number.to_bytes(16, "little"), met=number % 2 == 0)
    assert [table.find((str(number), "")) for number in range(200)] == [(n, n % 2 == 0) for n in range(200)]
    assert table.find(("200", "")) is None


def test_extreme_hash_words_fit(monkeypatch):
    # All bits set in key, content and mark must not spill into one another, nor look like an empty slot.
    words = {"ones": (2**64 - 1, 2**24 - 1), "low zero": (1, 0)}
    monkeypatch.setattr("lark_fast.pool.keys._hash_key", lambda key: words[key[0]])
    table = KeyTable(2)
    table.add(("ones", ""), b"\xff" * 16, met=True)
    table.add(("low zero", ""), b"\x00" * 16, met=False)
    assert table.find(("ones", "")) == (2**39 - 1, True)
    assert table.find(("low zero", "")) == (0, False)
    assert (len(table), table.unmet()) == (2, 1)


def test_zero_hash_is_not_an_empty_slot(monkeypatch):
    monkeypatch.setattr("lark_fast.pool.keys.hash_fields", lambda *fields, size: bytes(size))
    table = KeyTable(2)
    assert table.find(("a", "b")) is None
    table.add(("a", "b"), bytes(16), met=False)
    assert table.find(("a", "b")) == (0, False)


def test_fields_of_a_key_do_not_run_together():
    table = KeyTable()
    table.add(("a", "bc"), content_of(0), met=True)
    assert table.find(("ab", "c")) is None
    assert table.find(("abc", "")) is None
    assert table.find(("bc", "a")) is None
    assert hash_fields(b"a", b"bc", size=16) != hash_fields(b"ab", b"c", size=16)
    assert hash_fields(b"", b"", size=16) != hash_fields(b"", size=16)


def test_hash_is_the_same_in_every_run():
    # A store written by one run is matched by the next: the value itself is part of the format.
    assert hash_fields(b"messages", b"user", "é".encode(), size=16).hex() == "c548b2af19409e4d30435bd28ff2277e"


def test_marking_an_unknown_key_is_an_error():
    with pytest.raises(KeyError):
        KeyTable().mark(("a", "b"))


@pytest.mark.parametrize("capacity", [0, 3, -4])
def test_capacity_must_be_a_power_of_two(capacity):
    with pytest.raises(ValueError, match="power of two"):
        KeyTable(capacity)


def test_200_000_keys_take_at_most_64_bytes_each_even_while_growing():
    table, most = KeyTable(), 0.0
    for number in range(200_000):
        key, content, met = (str(number // 5), str(number % 5)), content_of(number), number % 3 == 0
        old = table._words
        if (len(table) + 1) * 5 <= len(old) // 2 * 4:
            table.add(key, content, met)
            continue
        # Tracing is slow, so only the additions that grow the table are traced; the old array counts beside it.
        tracemalloc.start()
        table.add(key, content, met)
        most = max(most, (old.nbytes + tracemalloc.get_traced_memory()[1]) / len(table))
        tracemalloc.stop()
        assert table._words is not old
    assert 48 < most <= 64, most
    assert table._words.nbytes / len(table) <= 40
    assert len(table) == 200_000
    assert table.unmet() == sum(number % 3 != 0 for number in range(200_000))
    for number in range(0, 200_000, 7):
        entry = table.find((str(number // 5), str(number % 5)))
        assert entry == (KeyTable.short_content(content_of(number)), number % 3 == 0)
    assert table.find(("40000", "0")) is None


def test_a_snapshot_holds_what_was_there_when_it_was_taken():
    table = KeyTable(8)
    for number in range(500):
        assert not table.holds((str(number), ""), content_of(number))
        table.add((str(number), ""), content_of(number), met=number % 2 == 0)
        assert table.holds((str(number), ""), content_of(number))
        assert not table.holds((str(number), ""), content_of(number + 1))
    snapshot = table.snapshot()
    for number in range(500, 2000):
        table.add((str(number), ""), content_of(number), met=True)
    held = [snapshot.holds((str(number), ""), content_of(number)) for number in range(2000)]
    assert held == [number < 500 for number in range(2000)]
    snapshot.close()


def test_another_process_maps_the_snapshot_and_copies_nothing():
    # 2^20 slots: 16 MiB, which the reader's own memory must not grow by.
    table = KeyTable(1 << 20)
    for number in range(1000):
        table.add((str(number), "x"), bytes(16), met=False)
    snapshot = table.snapshot()
    script = """
import pickle, sys, tracemalloc
import lark_fast.pool.keys
tracemalloc.start()
snapshot = pickle.loads(bytes.fromhex(sys.argv[1]))
found = sum(snapshot.holds((str(number), "x"), bytes(16)) for number in range(3000))
print(found, tracemalloc.get_traced_memory()[1] < 1 << 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, pickle.dumps(snapshot).hex()],
        pass_fds=[snapshot.descriptor],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("1000 True\n", "")
    snapshot.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(snapshot.descriptor)


def test_a_snapshot_leaves_no_name_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    snapshot = KeyTable().snapshot()
    assert list(tmp_path.iterdir()) == []
    snapshot.close()
