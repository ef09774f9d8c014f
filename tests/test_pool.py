import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import UserError
from lark_fast.pool.reading import Pool, Rejected
from lark_fast.pool.records import Record

NEW_LINE_STYLES = {"unix": "\n", "windows": "\r\n", "blank lines between": "\n \n\n"}


def raw(number: int, text: str = 'four, "4" \\ {[}] \n é') -> dict:
    turns = [{"role": "user", "content": f"question {number // 2}"}, {"role": "assistant", "content": text}]
    return {"problem_id": number // 2, "candidate_id": number, "teacher": "t", "messages": turns, "score": number / 4}


def jsonl(raws, newline: str = "\n") -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + newline for item in raws).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read(path, **options) -> list[Record | Rejected]:
    return list(Pool([str(path)], **options).read())


def candidates(items) -> list[int]:
    assert all(isinstance(item, Record) for item in items), items
    return [item.candidate_id for item in items]


def rejects(items) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, Rejected)]


RAWS = [raw(number) for number in range(7)]


def parquet_bytes(raws, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(raws), sink, **options)
    return sink.getvalue()


FORMATS = {
    "pool.jsonl": jsonl(RAWS),
    "pool.ndjson": jsonl(RAWS),
    "pool.json": json.dumps(RAWS).encode(),
    "pool.jsonl.gz": gzip.compress(jsonl(RAWS)),
    "pool.json.gz": gzip.compress(json.dumps(RAWS, indent=1).encode()),
    "pool.jsonl.zst": zstd(jsonl(RAWS)),
    "pool.json.zst": zstd(json.dumps(RAWS).encode()),
    "pool.parquet": parquet_bytes(RAWS),
    "pool.PARQUET": parquet_bytes(RAWS, row_group_size=2),
    # Content decides where the name does not: a list called .jsonl, lines called .json, anything called .txt.
    "list.jsonl": json.dumps(RAWS).encode(),
    "lines.json": jsonl(RAWS),
    "gzip.txt": gzip.compress(jsonl(RAWS)),
    "zstd.txt": zstd(jsonl(RAWS)),
    "parquet.txt": parquet_bytes(RAWS),
    "members.gz": gzip.compress(jsonl(RAWS[:3])) + gzip.compress(b"") + gzip.compress(jsonl(RAWS[3:])) + bytes(600),
    "frames.zst": zstd(jsonl(RAWS[:3])) + zstd(b"") + zstd(jsonl(RAWS[3:])),
    "no newline at the end.jsonl": jsonl(RAWS).rstrip(),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(RAWS),
    "bom.json": b"\xef\xbb\xbf \n" + json.dumps(RAWS).encode(),
    "joined with bom.jsonl": jsonl(RAWS[:3]) + b"\xef\xbb\xbf" + jsonl(RAWS[3:]),
    "two lists.json": json.dumps(RAWS[:3]).encode() + b"\n" + json.dumps(RAWS[3:]).encode(),
    "list, then lines.json": json.dumps(RAWS[:3]).encode() + b"\n" + jsonl(RAWS[3:]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name):
    path = write(tmp_path / name, FORMATS[name])
    pool = Pool([path])
    items = list(pool.read())
    expected = read(write(tmp_path / "plain.jsonl", jsonl(RAWS)))
    assert candidates(items) == list(range(7))
    for item, other in zip(items, expected, strict=True):
        assert (item.source, item.ordinal) == (path, other.ordinal)
        for field in ("problem_id", "candidate_id", "teacher", "messages", "extra"):
            assert getattr(item, field) == getattr(other, field)
    assert pool.bytes_read == pool.total_bytes == os.path.getsize(path)
    assert [vars_of(item) for item in pool.read()] == [vars_of(item) for item in items], "a second reading"


def vars_of(record: Record) -> list:
    return [getattr(record, name) for name in Record.__slots__]


@pytest.mark.parametrize("newline", NEW_LINE_STYLES.values(), ids=NEW_LINE_STYLES)
def test_blank_lines_count_as_lines_only(tmp_path, newline):
    items = read(write(tmp_path / "p.jsonl", b"\n" + jsonl(RAWS, newline)))
    assert candidates(items) == list(range(7))
    step = newline.count("\n")
    assert [item.line for item in items] == [2 + step * number for number in range(7)]
    assert [item.ordinal for item in items] == list(range(7))


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl", "empty.json", "empty.parquet"])
def test_files_without_records(tmp_path, name):
    content = {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n\t\r\n",
        "empty.json": b" [ \n ] \n",
        "empty.parquet": parquet_bytes(RAWS[:1], row_group_size=1),
    }[name]
    if name == "empty.parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(RAWS).slice(0, 0), sink)
        content = sink.getvalue()
    assert read(write(tmp_path / name, content)) == []


def test_lines_of_list_elements(tmp_path):
    text = '\n[{"a": 1},\n  {"a":\n 2}, {"a": 3}\n,\n\n{"a": "\\n"}\n]'
    assert [line for line, _ in rejects(read(write(tmp_path / "p.json", text.encode())))] == [2, 3, 4, 7]


def test_parquet_lines_are_rows(tmp_path):
    items = read(write(tmp_path / "p.parquet", parquet_bytes(RAWS, row_group_size=3)))
    assert [item.line for item in items] == list(range(1, 8))


def test_parquet_values(tmp_path):
    # Columns that only some rows have come as nulls, and floats may be NaN: neither may reach the selection as such.
    rows = [RAWS[0] | {"x": float("nan"), "raw": b"\x00"}, RAWS[1] | {"x": 1.5, "prompt": "p"}]
    table = pa.Table.from_pylist([row | {"prompt": row.get("prompt"), "raw": row.get("raw")} for row in rows])
    pq.write_table(table, tmp_path / "p.parquet")
    first, second = read(tmp_path / "p.parquet")
    assert first.extra == {"score": 0.0, "x": None, "raw": "AA=="}
    assert second.extra == {"score": 0.25, "x": 1.5, "prompt": "p", "raw": None}


def test_parquet_types_that_pandas_writes(tmp_path):
    # Dictionary-encoded and large strings, small integers: what categories and polars leave behind.
    table = pa.table(
        {
            "problem_id": pa.array([1, 2], pa.int16()),
            "teacher": pa.array(["a", "b"]).dictionary_encode(),
            "prompt": pa.array(["q", "q"], pa.large_string()),
            "response": pa.array(["a", "b"], pa.string_view()).cast(pa.large_string()),
            "input_ids": pa.array([None, None], pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    items = read(tmp_path / "p.parquet")
    assert [(item.problem_id, item.teacher, item.messages[1]["content"]) for item in items] == [
        (1, "a", "a"),
        (2, "b", "b"),
    ]


def test_tokens_in_parquet(tmp_path):
    table = pa.table({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet")[0].labels == (-100, 2, 3)


def test_limit_counts_physical_records(tmp_path):
    first = write(tmp_path / "a.jsonl", jsonl(RAWS[:2]) + b"\nnot json\n")
    second = write(tmp_path / "b.jsonl", jsonl(RAWS[2:]))
    pool = Pool([first, second])
    everything = list(pool.read())
    assert len(everything) == 8
    assert [item.ordinal for item in everything if isinstance(item, Record)] == [0, 1, 3, 4, 5, 6, 7]
    for limit in range(10):
        assert [type(item) for item in pool.read(limit)] == [type(item) for item in everything[:limit]]
    # What lies behind the limit is not even opened.
    os.remove(second)
    assert len(list(pool.read(3))) == 3


def test_progress_grows_to_the_size_on_disk(tmp_path):
    paths = [
        write(tmp_path / f"{n}.jsonl.gz", gzip.compress(jsonl([raw(n, os.urandom(40_000).hex())]))) for n in range(9)
    ]
    write(tmp_path / "9.parquet", parquet_bytes(RAWS * 400, row_group_size=300))
    pool = Pool([*paths, str(tmp_path / "9.parquet")])
    seen = [pool.bytes_read]
    for _ in pool.read():
        seen.append(pool.bytes_read)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert len(set(seen)) > 15
    assert max(seen) <= pool.total_bytes == pool.bytes_read == sum(os.path.getsize(file) for file in pool.files)


class TestPaths:
    @pytest.fixture
    def tree(self, tmp_path):
        names = [
            "b.jsonl",
            "a.jsonl.gz",
            "deep/er/c.ndjson",
            "deep/d.json.zst",
            "deep/e.parquet",
            ".hidden.jsonl",
            ".cache/f.jsonl",
            "README.md",
            "g.jsonl.bz2",
            "h.parquet.gz",
            "jsonl",
        ]
        for name in names:
            write(tmp_path / "tree" / name, FORMATS.get("pool" + "".join(Path(name).suffixes), jsonl(RAWS)))
        return tmp_path / "tree"

    KNOWN = ("a.jsonl.gz", "b.jsonl", "deep/d.json.zst", "deep/e.parquet", "deep/er/c.ndjson")

    def names(self, tree, *paths) -> list[str]:
        return [str(file.relative_to(tree)) for file in Pool([str(path) for path in paths]).files]

    def test_directory(self, tree):
        assert self.names(tree, tree) == list(self.KNOWN)
        assert len(list(Pool([str(tree)]).read())) == 7 * len(self.KNOWN)

    def test_globs(self, tree):
        assert self.names(tree, tree / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
        assert self.names(tree, tree / "**" / "*.ndjson") == ["deep/er/c.ndjson"]
        assert self.names(tree, tree / "**") == list(self.KNOWN)
        # A directory that a glob meets is searched like one that is named.
        assert self.names(tree, tree / "d*p") == list(self.KNOWN[2:])

    def test_a_file_named_outright_is_read_whatever_its_name(self, tree):
        assert self.names(tree, tree / ".hidden.jsonl", tree / "jsonl") == [".hidden.jsonl", "jsonl"]

    def test_order_is_that_of_the_paths_and_sorted_within(self, tree):
        assert self.names(tree, tree / "deep", tree / "b.jsonl", tree) == [*self.KNOWN[2:], "b.jsonl", "a.jsonl.gz"]

    def test_a_file_reached_twice_is_read_once(self, tree):
        os.symlink(tree / "b.jsonl", tree / "z.jsonl")
        os.link(tree / "b.jsonl", tree / "y.jsonl")
        dotted = tree / "deep" / ".." / "b.jsonl"
        assert self.names(tree, tree / "b.jsonl", dotted, tree / "*.jsonl", tree) == [
            "b.jsonl",
            *self.KNOWN[:1],
            *self.KNOWN[2:],
        ]

    def test_links_that_form_a_loop(self, tree):
        os.symlink(tree, tree / "deep" / "loop")
        assert self.names(tree, tree) == list(self.KNOWN)

    def test_a_linked_directory_is_searched(self, tree, tmp_path):
        os.makedirs(tmp_path / "other")
        os.symlink(tree / "deep", tmp_path / "other" / "linked")
        assert [file.name for file in Pool([str(tmp_path / "other")]).files] == ["d.json.zst", "e.parquet", "c.ndjson"]

    def test_names_with_glob_characters(self, tmp_path):
        path = write(tmp_path / "a[1]*?.jsonl", jsonl(RAWS))
        write(tmp_path / "a1x.jsonl", jsonl(RAWS))
        assert [str(file) for file in Pool([path]).files] == [path]

    def test_source_is_the_path_as_found(self, tree, monkeypatch):
        monkeypatch.chdir(tree)
        assert {item.source for item in Pool(["b.jsonl", "deep/*.parquet"]).read()} == {"b.jsonl", "deep/e.parquet"}

    def test_one_path_needs_no_list(self, tree):
        assert Pool(tree / "b.jsonl").files == Pool(str(tree / "b.jsonl")).files == (tree / "b.jsonl",)

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("nothing.jsonl", "does not exist; give a file"),
            ("no/such/place/x", "does not exist; give a file"),
            ("data/pool.jsonl", "does not exist; give a file"),
            ("", "does not exist; give a file"),
            ("*.xyz", "matches no file named *.parquet"),
            ("*.md", "matches no file named *.parquet"),
            ("empty", "holds no file named *.parquet"),
            ("/dev/null", "is not a regular file"),
            ("https://localhost:1/pool.jsonl", "does not exist"),
        ],
    )
    def test_nothing_to_read(self, tree, monkeypatch, path, reason):
        monkeypatch.chdir(tree)
        os.mkdir("empty")
        with pytest.raises(UserError) as caught:
            Pool(["b.jsonl", path])
        message = str(caught.value)
        assert reason in message
        assert repr(path) in message
        assert "\n" not in message

    def test_no_path_at_all(self):
        with pytest.raises(UserError, match="no pool was given"):
            Pool([])

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tree):
        for path in (tree / "b.jsonl", tree / "deep"):
            path.chmod(0)
            with pytest.raises(UserError, match=f"{path.name}' cannot be read: Permission denied"):
                list(Pool([str(tree)]).read())
            path.chmod(0o700)

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl", "deep/d.json.zst", "deep/e.parquet"])
    def test_a_file_that_vanishes(self, tree, name):
        pool = Pool([str(tree)])
        os.remove(tree / name)
        with pytest.raises(UserError, match=f"{name}' cannot be read: No such file"):
            list(pool.read())

    def test_a_name_that_is_not_utf8(self, tmp_path):
        with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "wb"):
            pass
        with pytest.raises(UserError, match="the name is not UTF-8"):
            Pool([str(tmp_path)])


def test_dataset_ids(tmp_path):
    # The hub client reads its switches when it is imported, hence a process of its own, which must reach no network.
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / ("0" * 40)
    write(snapshot / "data" / "train.jsonl", jsonl(RAWS))
    write(tmp_path / "datasets--org--name" / "refs" / "main", b"0" * 40)
    write(tmp_path / "datasets--org--bare" / "snapshots" / ("1" * 40) / "README.md", b"hello")
    write(tmp_path / "datasets--org--bare" / "refs" / "main", b"1" * 40)
    code = """if True:
        import sys
        from lark_fast.errors import UserError
        from lark_fast.pool.reading import Pool
        assert "huggingface_hub" not in sys.modules and "pyarrow" not in sys.modules
        for name in ("org/name", "org/bare", "org/other"):
            try:
                print([item.line for item in Pool([name]).read()])
            except UserError as error:
                print(error)
    """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "[1, 2, 3, 4, 5, 6, 7]"
    assert "dataset 'org/bare' holds no file named" in lines[1]
    assert "pool 'org/other' does not exist, and it could not be fetched as a Hugging Face dataset" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.jsonl.gz", "p.jsonl.zst", "p.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    # 40 MB in records of 40 kB: reading may hold some chunks and a record, never the file.
    raws = [raw(number, f"{number} " * 10_000) for number in range(800)]
    content = parquet_bytes(raws, row_group_size=200) if name == "p.parquet" else jsonl(raws)
    if name == "p.json":
        content = json.dumps(raws).encode()
    packers = {".gz": gzip.compress, ".zst": zstd}
    content = packers.get(Path(name).suffix, bytes)(content)
    pool = Pool([write(tmp_path / name, content)])
    del content, raws
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    count = arrow = 0
    for item in pool.read():
        count += isinstance(item, Record)
        arrow = max(arrow, pa.total_allocated_bytes() - arrow_before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 800
    assert peak < 8 << 20
    assert arrow < 24 << 20
