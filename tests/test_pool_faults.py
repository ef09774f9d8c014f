import contextlib
import gzip
import io
import json
import os
import random
import tracemalloc
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.pool.decoding import DamagedFileError, read_chunks
from lark_fast.pool.parquet_rows import read_parquet_rows
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record

N = 40


def raw(number: int) -> dict:
    # Text with everything that a splitter could trip over: quotes, brackets, escapes, commas, long and wide characters.
    answer = f'{number}: "x", \\ {{[}}]\n\t é 😀 ' + "word " * (number % 7)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return {"problem_id": number // 4, "candidate_id": number, "messages": turns, "tags": [[], ["]{"]]}


RAWS = [raw(number) for number in range(N)]
LINES = [json.dumps(item, ensure_ascii=number % 2 == 0).encode() for number, item in enumerate(RAWS)]
JSONL = b"".join(line + b"\n" for line in LINES)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(raws, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(raws), sink, **options)
    return sink.getvalue()


def read(path: Path, content: bytes, **options) -> list[Record | Rejected]:
    path.write_bytes(content)
    pool = Pool([str(path)], **options)
    items = list(pool.read())
    assert pool.bytes_read == len(content)
    for item in items:
        assert isinstance(item, Record | Rejected)
        assert item.line >= 1
        if isinstance(item, Rejected):
            assert item.reason
            assert len(item.reason) < 500
            assert item.reason.isprintable()
    return items


def whole(items) -> list[int]:
    return [item.candidate_id for item in items if isinstance(item, Record)]


def rejects(items) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, Rejected)]


class TestSingleLines:
    """One broken line among good ones: rejected alone, with its line and a reason that says what to look for."""

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"not json", "invalid JSON: Expecting value at character 1"),
            (LINES[0][:-1], "invalid JSON"),
            (LINES[0][:10], "invalid JSON: Unterminated string"),
            (LINES[0] + LINES[1], "invalid JSON: Extra data"),
            (b'{"problem_id": 1,}', "invalid JSON"),
            (b"{'problem_id': 1}", "invalid JSON"),
            (b'{"a": "tab\there"}', "invalid JSON: Invalid control character"),
            (b"\x00" * 10, "invalid JSON"),
            (b'{"a": "\xff"}', "not UTF-8: byte 0xff at offset 7 of the record"),
            (b'{"a": "\xed\xa0\xbd"}', "not UTF-8: byte 0xed"),
            ("{}".encode("utf-16"), "not UTF-8"),
            (b"[1, 2]", "this is a list"),
            (b"null", "this is null"),
            (b"17", "this is an integer"),
            (b'"text"', "this is a string"),
            (b"NaN", "this is a float"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"a":' * 100_000, "nested too deeply"),
            (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "neither messages"),
            (LINES[0][:-1] + b', "x": ' + b"[" * 500 + b"]" * 500 + b"}", "column 'x' is nested more than 100"),
            (b'{"problem_id": ' + b"9" * 5000 + b"}", "an integer of too many digits"),
            (LINES[0].replace(b'"problem_id": 0', b'"problem_id": 1e999'), "problem_id is a float"),
            (LINES[0].replace(b'"problem_id": 0', b'"problem_id": NaN'), "problem_id is a float"),
            (LINES[0].replace(b'"q"', rb'"\ud800"'), "lone surrogate, U+D800"),
            (b'{"a": "' + b"x" * 3000 + b'"}', "longer than 2000 bytes"),
        ],
    )
    @pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
    def test_rejected_alone(self, tmp_path, line, reason, ending):
        options = {"max_record_bytes": 2000} if "longer" in reason else {}
        items = read(tmp_path / "p.jsonl", LINES[1] + b"\n\n" + line + ending + LINES[2], **options)
        assert whole(items) == [1, 2]
        assert [line for line, _ in rejects(items)] == [3]
        assert reason in rejects(items)[0][1]
        assert items[2].ordinal == 2

    def test_duplicate_names_the_last_counts(self, tmp_path):
        assert whole(read(tmp_path / "p.jsonl", b'{"candidate_id": 5,' + LINES[0][1:])) == [0]

    def test_not_a_number_in_an_unknown_column(self, tmp_path):
        line = LINES[0][:-1] + b', "x": NaN, "y": [-Infinity]}'
        assert read(tmp_path / "p.jsonl", line)[0].extra == {"tags": [[], ["]{"]], "x": None, "y": [None]}

    @pytest.mark.parametrize("excess", [0, 1])
    def test_the_limit_is_exact(self, tmp_path, excess):
        limit = len(LINES[0]) - excess
        for content in (LINES[0], LINES[0] + b"\n" + LINES[0], b"[" + LINES[0] + b"," + LINES[0] + b"]"):
            items = read(tmp_path / "p.jsonl", content, max_record_bytes=limit)
            assert len(items) == content.count(LINES[0])
            assert len(whole(items)) == (0 if excess else len(items))

    @pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd])
    @pytest.mark.parametrize("form", ["lines", "list", "pretty list"])
    def test_an_endless_record_is_skipped_in_bounded_memory(self, tmp_path, packed, form):
        long = b'{"a": "' + b"x \\n" * (8 << 20) + b'"}'
        start, separator, end = {
            "lines": (b"", b"\n", b""),
            "list": (b"[", b",", b"]"),
            "pretty list": (b"[\n", b",\n", b"\n]"),
        }[form]
        path = tmp_path / "p.json"
        path.write_bytes(packed(start + LINES[0] + separator + long + separator + LINES[1] + end))
        del long
        tracemalloc.start()
        items = list(Pool([str(path)], max_record_bytes=1 << 20).read())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert whole(items) == [0, 1]
        assert rejects(items) == [
            (1 if form == "list" else 2 if form == "lines" else 3, "the record is longer than 1048576 bytes")
        ]
        assert peak < 6 << 20


def mutated(line: bytes, chance: random.Random) -> bytes:
    """Return the line changed in one of the ways that disks, editors and scripts change lines; never with a newline."""
    kind = chance.randrange(9)
    if kind == 0:
        position = chance.randrange(len(line))
        flipped = bytes([line[position] ^ 1 << chance.randrange(8)])
        line = line[:position] + flipped + line[position + 1 :]
    elif kind == 1:
        line = line[: chance.randrange(1, len(line))]
    elif kind == 2:
        line = line[chance.randrange(len(line)) :]
    elif kind == 3:
        values = [None, True, 1.5, [], {}, "", "\ud800", 10**30, [[]], [None], {"role": []}, -1, float("nan")]
        item = json.loads(LINES[chance.randrange(N)])
        target = chance.choice([item, item["messages"][0], item["messages"][1]])
        target[chance.choice(list(target))] = chance.choice(values)
        line = json.dumps(item).encode()
    elif kind == 4:
        line = line.replace(b": ", b": " + b"9" * chance.choice([5, 400, 5000]), 1)
    elif kind == 5:
        depth = chance.choice([50, 990, 3000, 50_000])
        line = line[:-1] + b', "x": ' + b"[" * depth + b"]" * chance.choice([depth, depth - 1]) + b"}"
    elif kind == 6:
        line = chance.randbytes(chance.randrange(1, 200))
    elif kind == 7:
        cut, end = sorted((chance.randrange(len(line)), chance.randrange(len(line))))
        line = line[:cut] + line[end:]
    else:
        position = chance.randrange(len(line))
        line = (
            line[:position]
            + chance.choice([b'"', b"{", b"}", b"[", b"]", b"\\", b",", b"\x00", b"\xff"])
            + line[position:]
        )
    return line.replace(b"\n", b" ")


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd])
def test_1000_mutated_lines(tmp_path, packed):
    chance = random.Random(1)
    # The first line stays whole: it decides whether the file is a list.
    lines = [LINES[0]] + [mutated(chance.choice(LINES), chance) for _ in range(1000)]
    items = read(tmp_path / "p.jsonl", packed(b"\n".join(lines)))
    assert [item.line for item in items] == [number for number, line in enumerate(lines, 1) if line.strip()]
    # Mutations must hit both sides for the count to mean something.
    assert 50 < len(whole(items)) < 500
    # What a line becomes does not depend on its neighbours.
    for item, line in list(zip(items, (line for line in lines if line.strip()), strict=True))[1::10]:
        if line.lstrip().startswith(b"["):
            continue
        (alone,) = read(tmp_path / "alone.jsonl", line)
        assert type(alone) is type(item)
        if isinstance(item, Rejected):
            assert alone.reason == item.reason


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("layout", ["one line", "a line each", "pretty"])
def test_a_well_formed_list_splits_in_every_layout(tmp_path, layout, indent):
    text = {
        "one line": json.dumps(RAWS),
        "a line each": "[\n" + ",\n".join(json.dumps(item, indent=indent) for item in RAWS) + "\n]\n",
        "pretty": json.dumps(RAWS, indent=indent, ensure_ascii=False),
    }[layout]
    assert whole(read(tmp_path / "p.json", text.encode())) == list(range(N))


BROKEN_ELEMENTS = {
    "no value": b'{"a": }',
    "bare words": b"{a: b}",
    "bracket left open": b'{"a": [1, 2}',
    "bracket never opened": b'{"a": 1]}',
    "bad escape": rb'{"a": "\x"}',
    "lone surrogate": LINES[5].replace(b'"q"', rb'"\ud800"'),
    "not UTF-8": b'{"a": "\xff"}',
    "control character": b'{"a": "\x01"}',
    "scalar": b"17",
    "string": b'"a, ] b"',
    "null": b"null",
    "list": b'[{"a": [1]}]',
    "deep": b"[" * 3000 + b"]" * 3000,
    "stray closing brace": b"}",
}
SWALLOWING_ELEMENTS = {
    "no closing brace": LINES[5][:-1],
    "no closing quote": b'{"a": "text}',
    "cut in a string": LINES[5][:90],
    "cut in a list": b'{"a": [{"b": [1, ',
    "only a quote": b'"',
}


@pytest.mark.parametrize("element", BROKEN_ELEMENTS.values(), ids=BROKEN_ELEMENTS)
@pytest.mark.parametrize("separator", [b",", b" , ", b",\n"])
def test_a_broken_element_of_a_list_is_rejected_alone(tmp_path, element, separator):
    content = b"[" + separator.join([LINES[0], element, LINES[1], LINES[2]]) + b"]"
    items = read(tmp_path / "p.json", content)
    assert whole(items) == [0, 1, 2]
    assert [line for line, _ in rejects(items)] == [2 if b"\n" in separator else 1]


@pytest.mark.parametrize("element", SWALLOWING_ELEMENTS.values(), ids=SWALLOWING_ELEMENTS)
@pytest.mark.parametrize("margin", [b"", b"  "])
def test_an_element_that_swallows_its_neighbours_gives_them_back_at_the_next_line(tmp_path, element, margin):
    content = b"[\n" + b",\n".join(margin + item for item in [LINES[0], element, LINES[1], LINES[2]]) + b"\n]\n"
    items = read(tmp_path / "p.json", content)
    assert whole(items) == [0, 1, 2]
    assert [line for line, _ in rejects(items)] == [3]


def test_a_broken_element_of_a_pretty_list(tmp_path):
    text = json.dumps(RAWS[:4], indent=2).encode()
    cut = text.replace(b'"candidate_id": 1,', b'"candidate_id": "1,')
    items = read(tmp_path / "p.json", cut)
    assert whole(items) == [0, 2, 3]
    assert len(rejects(items)) == 1
    assert rejects(items)[0][0] == 1 + text[: text.index(b'{\n    "problem_id": 0,\n    "candidate_id": 1')].count(
        b"\n"
    )


def test_a_bracket_of_the_wrong_kind_loses_nothing(tmp_path):
    # Where such an element ends is anybody's guess: a second reject is fair, the loss of a neighbour is not.
    items = read(tmp_path / "p.json", b"[" + LINES[0] + b', {"a": [1, 2}}, ' + LINES[1] + b"]")
    assert whole(items) == [0, 1]
    assert 1 <= len(rejects(items)) <= 2


def test_missing_and_surplus_commas_lose_nothing(tmp_path):
    content = b"[," + LINES[0] + b"\n" + LINES[1] + b",,\n" + LINES[2] + b",]"
    assert whole(read(tmp_path / "p.json", content)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"", "the list has no end"),
        (b",\n", "the list has no end"),
        (b',\n{"a": 1', "ends inside this list element"),
        (b',\n{"a": "x', "ends inside this list element"),
        (b',\n{"a": "x\\', "ends inside this list element"),
        (b",\n1", "ends inside this list element"),
    ],
)
def test_a_list_without_an_end(tmp_path, tail, reason):
    items = read(tmp_path / "p.json", b"[" + b",".join(LINES[:3]) + tail)
    assert whole(items) == [0, 1, 2]
    assert len(rejects(items)) == 1
    assert reason in rejects(items)[0][1]


def test_a_bracket_before_jsonl_loses_nothing(tmp_path):
    # A damaged first line may turn lines into what looks like a list.
    items = read(tmp_path / "p.jsonl", b"[" + JSONL)
    assert whole(items) == list(range(N))
    assert rejects(items) == [(N + 1, "the list has no end")]
    items = read(tmp_path / "p.jsonl", b"[1, 2]\n" + JSONL)
    assert whole(items) == list(range(N))
    assert [line for line, _ in rejects(items)] == [1, 1]


@pytest.mark.parametrize("indent", [None, 2])
def test_mutated_lists(tmp_path, indent):
    chance = random.Random(2)
    whole_list = json.dumps(RAWS[:8], indent=indent).encode()
    kept = 0
    for _ in range(300):
        position = chance.randrange(1, len(whole_list))
        flipped = bytes([whole_list[position] ^ 1 << chance.randrange(8)])
        content = whole_list[:position] + flipped + whole_list[position + 1 :]
        items = read(tmp_path / "p.json", content)
        assert items
        kept += len(whole(items))
    # One flipped bit costs its element; only in a list on one line may an unpaired quote cost more.
    assert kept / 300 > (6.9 if indent else 6.5)


def test_a_missing_bracket_costs_one_element_of_a_long_list(tmp_path):
    # 3 MB of elements: the search for the bracket ends long before the file does, as often as it is missing.
    elements = [LINES[number % N] for number in range(20_000)]
    for broken in range(50, 20_000, 700):
        elements[broken] = elements[broken][:-1]
    items = read(tmp_path / "p.json", b"[\n" + b",\n".join(elements) + b"\n]")
    assert [line - 2 for line, _ in rejects(items)] == list(range(50, 20_000, 700))
    assert len(items) == 20_000


def test_rescanning_a_hostile_list_ends(tmp_path, monkeypatch):
    # Every line swallows all that follow: going back to each of them would take time in the square of the file.
    monkeypatch.setattr("lark_fast.pool.json_list._RESCAN_BYTES", 1 << 20)
    items = read(tmp_path / "p.json", b"[\n" + b'{"a": 1,\n' * 20_000)
    assert 1 < len(items) < 200


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunk_borders_do_not_matter(tmp_path, monkeypatch, size):
    texts = {
        "lines": JSONL.replace(b"\n", b"\r\n \n"),
        "list": json.dumps(RAWS, indent=1).encode(),
        "broken": b"[\n"
        + b",\n".join([LINES[0], *SWALLOWING_ELEMENTS.values(), *BROKEN_ELEMENTS.values(), LINES[1]])
        + b"]",
    }
    for name, text in texts.items():
        expected = read(tmp_path / name, text)
        monkeypatch.setattr("lark_fast.pool.decoding._READ_BYTES", size)
        items = read(tmp_path / name, text)
        monkeypatch.undo()
        assert whole(items) == whole(expected)
        assert rejects(items) == rejects(expected)


class TestTruncatedAndCorrupt:
    # Random text keeps the compressed file long enough to be cut in many places.
    BIG = b"".join(
        json.dumps(raw(number) | {"noise": random.Random(number).randbytes(300).hex()}).encode() + b"\n"
        for number in range(2000)
    )

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.999])
    def test_truncated_gzip(self, tmp_path, share):
        packed = gzip.compress(self.BIG)
        packed = packed[: int(len(packed) * share)]
        before = zlib.decompressobj(31).decompress(packed)
        items = read(tmp_path / "p.jsonl.gz", packed)
        n = before.count(b"\n")
        assert whole(items) == list(range(n))
        assert len(items) == n + 1
        assert items[-1].line == n + 1
        assert items[-1].reason.startswith("truncated gzip")

    @pytest.mark.parametrize("missing", range(1, 9))
    def test_gzip_without_the_end_of_its_trailer(self, tmp_path, missing):
        # All content is there, down to a last line without a newline.
        items = read(tmp_path / "p.jsonl.gz", gzip.compress(JSONL.rstrip())[:-missing])
        assert whole(items) == list(range(N))
        assert rejects(items) == [(N, "truncated gzip: the file ends inside the compressed data")]

    def test_second_member_truncated(self, tmp_path):
        packed = gzip.compress(JSONL) + gzip.compress(JSONL)[:200]
        items = read(tmp_path / "p.jsonl.gz", packed)
        assert whole(items)[:N] == list(range(N))
        assert len(rejects(items)) == 1

    def test_corrupt_gzip_keeps_every_line_before_the_damage(self, tmp_path):
        packed = bytearray(gzip.compress(self.BIG))
        middle = len(packed) // 2
        # A run of ones is no valid block header or code for long.
        packed[middle : middle + 64] = b"\xff" * 64
        items = read(tmp_path / "p.jsonl.gz", bytes(packed))
        # Byte by byte, so that nothing decodable is missed.
        decoder, before = zlib.decompressobj(31), bytearray()
        with contextlib.suppress(zlib.error):
            for byte in packed:
                before += decoder.decompress(bytes([byte]))
        n = before.count(b"\n")
        assert n > 900
        assert n <= len(items) - 1 <= n + 1
        assert items[-1].reason.startswith("corrupt gzip")
        assert all(isinstance(item, Record) for item in items[: int(n * 0.99)])

    def test_checksum(self, tmp_path):
        packed = bytearray(gzip.compress(JSONL))
        packed[-6] ^= 1
        items = read(tmp_path / "p.jsonl.gz", bytes(packed))
        assert whole(items) == list(range(N))
        assert [reason for _, reason in rejects(items)] == [
            "corrupt gzip: Error -3 while decompressing data: incorrect data check"
        ]

    def test_trailing_bytes(self, tmp_path):
        items = read(tmp_path / "p.jsonl.gz", gzip.compress(JSONL) + b"\0\0more")
        assert whole(items) == list(range(N))
        assert rejects(items)[0][1].startswith("corrupt gzip")
        items = read(tmp_path / "p.jsonl.zst", zstd(JSONL) + b"more")
        assert whole(items) == list(range(N))
        assert rejects(items)[0][1].startswith("corrupt zstd")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9999])
    def test_truncated_zstd(self, tmp_path, share):
        packed = zstd(self.BIG)
        items = read(tmp_path / "p.jsonl.zst", packed[: int(len(packed) * share)])
        n = len(items) - 1
        assert whole(items) == list(range(n))
        # The unit of zstd is a block, at most 128 KiB of content.
        assert n > share * 2000 - 2 * (128 << 10) / (len(self.BIG) / 2000)
        assert items[-1].reason.startswith("truncated zstd")
        assert items[-1].line == n + 1

    def test_not_what_the_name_says(self, tmp_path):
        assert "corrupt gzip" in rejects(read(tmp_path / "p.jsonl.gz", JSONL))[0][1]
        assert "corrupt zstd" in rejects(read(tmp_path / "p.jsonl.zst", JSONL))[0][1]
        assert "corrupt Parquet" in rejects(read(tmp_path / "p.parquet", JSONL))[0][1]
        for items in (read(tmp_path / name, JSONL) for name in ("p.jsonl.gz", "p.jsonl.zst", "p.parquet")):
            assert len(items) == 1

    def test_a_list_cut_by_damage(self, tmp_path):
        packed = gzip.compress(b"[" + b",\n".join(LINES) + b"]")
        items = read(tmp_path / "p.json.gz", packed[:-60])
        n = len(items) - 1
        assert whole(items) == list(range(n))
        assert n > N // 2
        assert items[-1].reason.startswith("truncated gzip")

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_mutated_archives(self, tmp_path, suffix):
        chance = random.Random(3)
        packed = {".gz": gzip.compress, ".zst": zstd}[suffix](JSONL)
        for _ in range(200):
            position = chance.randrange(len(packed))
            content = packed[:position] + bytes([packed[position] ^ 1 << chance.randrange(8)]) + packed[position + 1 :]
            if chance.random() < 0.3:
                content = content[: chance.randrange(len(content))]
            items = read(tmp_path / f"p.jsonl{suffix}", content)
            assert sum("gzip" in reason or "zstd" in reason for _, reason in rejects(items)) <= 1

    def test_corruption_before_good_files(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL)[:-20])
        (tmp_path / "b.parquet").write_bytes(parquet(RAWS)[:-20])
        (tmp_path / "c.jsonl").write_bytes(JSONL)
        items = list(Pool([str(tmp_path)]).read())
        assert whole(items)[-N:] == list(range(N))
        assert [Path(item.source).name for item in items if isinstance(item, Rejected)] == ["a.jsonl.gz", "b.parquet"]
        assert [item.ordinal for item in items if isinstance(item, Record)][-1] == len(items) - 1


class TestParquet:
    @pytest.mark.parametrize(
        "content", [b"", b"PAR1", b"PAR1" + b"x" * 99, parquet(RAWS)[:-8], parquet(RAWS)[8:]], ids=len
    )
    def test_a_file_that_is_none(self, tmp_path, content):
        items = read(tmp_path / "p.parquet", content)
        assert len(items) == 1
        assert items[0].line == 1
        assert items[0].reason.startswith("corrupt Parquet")

    def test_a_damaged_row_group(self, tmp_path):
        content = bytearray(parquet(RAWS, row_group_size=10, compression="gzip"))
        group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(2)
        start = group.column(1).data_page_offset
        content[start : start + 40] = b"\xff" * 40
        items = read(tmp_path / "p.parquet", bytes(content))
        assert whole(items) == list(range(20))
        assert len(items) == 21
        assert items[-1].line == 21
        assert items[-1].reason.startswith("corrupt Parquet")

    def test_a_row_that_is_not_utf8(self, tmp_path):
        texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"prompt": ["p"] * 3, "response": texts}), tmp_path / "p.parquet")
        items = list(Pool([str(tmp_path / "p.parquet")]).read())
        assert whole(items) == [0, 2]
        assert rejects(items)[0][0] == 2
        assert "cannot be decoded" in rejects(items)[0][1]

    def test_values_that_python_cannot_hold(self, tmp_path):
        table = pa.table({"prompt": ["p"] * 2, "response": ["a"] * 2, "day": pa.array([2**40, 0], pa.timestamp("s"))})
        pq.write_table(table, tmp_path / "p.parquet")
        items = list(Pool([str(tmp_path / "p.parquet")]).read())
        assert whole(items) == [1]
        assert rejects(items)[0][0] == 1

    def test_a_long_row(self, tmp_path):
        rows = [raw(0), raw(1) | {"tags": [["x" * 5000]]}, raw(2)]
        items = read(tmp_path / "p.parquet", parquet(rows), max_record_bytes=4000)
        assert whole(items) == [0, 2]
        assert rejects(items) == [(2, "the record is longer than 4000 bytes")]

    def test_columns_of_the_same_name(self, tmp_path):
        table = pa.table([["p"], ["a"], ["b"]], names=["prompt", "response", "response"])
        pq.write_table(table, tmp_path / "p.parquet")
        (item,) = Pool([str(tmp_path / "p.parquet")]).read()
        assert isinstance(item, Rejected) or item.messages[1]["content"] == "b"

    def test_mutated_files(self, tmp_path):
        chance = random.Random(4)
        good = parquet(RAWS, row_group_size=16)
        for _ in range(300):
            position = chance.randrange(len(good))
            content = good[:position] + bytes([good[position] ^ 1 << chance.randrange(8)]) + good[position + 1 :]
            if chance.random() < 0.2:
                content = content[: chance.randrange(len(content))]
            items = read(tmp_path / "p.parquet", content)
            assert sum("corrupt Parquet" in reason for _, reason in rejects(items)) <= 1


class TestBombs:
    LINE = b'{"a": "' + b"x" * 1000 + b'"}\n'

    @pytest.mark.parametrize("packed", [gzip.compress, zstd], ids=["gzip", "zstd"])
    def test_content_out_of_proportion_is_cut_off(self, tmp_path, packed):
        content = packed(self.LINE * 20_000)
        (tmp_path / "p.x").write_bytes(content)
        ratio = len(self.LINE) * 20_000 // len(content)

        def chunks(**limits):
            return read_chunks(tmp_path / "p.x", lambda size: None, **limits)

        # Both limits must be exceeded.
        for limits in ({"free_bytes": 1 << 30, "max_ratio": 10}, {"free_bytes": 1 << 20, "max_ratio": ratio + 1}):
            assert sum(map(len, chunks(**limits))) == len(self.LINE) * 20_000
        sizes = []
        with pytest.raises(DamagedFileError, match="the rest is not read"):
            sizes.extend(map(len, chunks(free_bytes=1 << 20, max_ratio=10)))

    def test_a_gibibyte_of_nothing(self, tmp_path):
        # The true limits, once: 1 MB on disk becomes 1.1 GB of blank, which no limit on records would stop.
        content = gzip.compress(LINES[0] + b"\n") + gzip.compress(b" " * (1 << 24)) * 66
        path = tmp_path / "p.jsonl.gz"
        path.write_bytes(content)
        items = list(Pool([str(path)]).read())
        assert whole(items) == [0]
        assert "500 times the file's size" in rejects(items)[-1][1]

    def test_parquet_of_one_vast_page(self, tmp_path):
        # It must be seen in the file's own figures, before the page is unpacked.
        table = pa.table({"prompt": ["p"] * 2000, "response": ["a" * 10_000] * 2000})
        pq.write_table(table, tmp_path / "p.parquet", use_dictionary=False, compression="zstd")
        before = pa.total_allocated_bytes()
        ((row, reject),) = read_parquet_rows(
            tmp_path / "p.parquet", lambda n: None, 1 << 20, free_bytes=1 << 20, max_ratio=10
        )
        assert row == 1
        assert "the rest is not read" in str(reject)
        assert pa.total_allocated_bytes() - before < 1 << 20

    def test_parquet_of_one_repeated_value(self, tmp_path):
        # A dictionary stores the text once however many rows there are.
        table = pa.table({"prompt": ["p"] * 2000, "response": ["a" * 10_000] * 2000})
        pq.write_table(table, tmp_path / "p.parquet")
        size = os.path.getsize(tmp_path / "p.parquet")
        assert size < 20_000
        rows = list(
            read_parquet_rows(tmp_path / "p.parquet", lambda n: None, 1 << 20, free_bytes=1 << 22, max_ratio=10)
        )
        assert len(rows) < 500
        assert "the rest is not read" in str(rows[-1][1])
        assert len(list(read_parquet_rows(tmp_path / "p.parquet", lambda n: None, 1 << 20))) == 2000
