"""Near duplicates against brute force over the words themselves; contamination against a search for common runs."""

import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_fast.errors import UserError
from lark_fast.pool.records import normalise
from lark_fast.selection.hygiene import removed_entry
from lark_fast.selection.hygiene.decontamination import Decontamination, FileCount
from lark_fast.selection.hygiene.duplicates import PERMUTATIONS, ExactDuplicates, NearDuplicates
from lark_fast.selection.hygiene.texts import WordHashes, bare_words, compact, normalised, run_hashes, words

WORDS = [f"w{number}" for number in range(400)]
EACH = pytest.mark.parametrize("kind", [ExactDuplicates, NearDuplicates])


def record(answer, *, prompt="q", problem=0, candidate=0, line=1, source="pool.jsonl"):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    raw = {"messages": messages, "problem_id": problem, "candidate_id": candidate}
    return normalise(raw, source=source, line=line)


def token_record(ids, labels=None):
    return normalise({"input_ids": ids, "labels": labels or [-100, *ids[1:]], "problem_id": 0}, source="pool", line=1)


def removed(made, answers, problems=None, rows=None, gone=None):
    """{row: removal} when rows are seen in this order, each with its answer."""
    for line, row in enumerate(rows if rows is not None else range(len(answers)), start=1):
        problem = 0 if problems is None else problems[row]
        made.see(row, problem, record(answers[row], problem=problem, line=line))
    found = {removal.row: removal for removal in made.removals(gone)}
    made.close()
    return found


def variant(rng, text, changes):
    """The text with some words replaced."""
    changed = text.split()
    for place in rng.sample(range(len(changed)), changes):
        changed[place] = rng.choice(WORDS)
    return " ".join(changed)


def jaccard(one, other, length=5):
    sets = [{tuple(w[i : i + length]) for i in range(len(w) - length + 1)} for w in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


# Texts


def test_texts_are_compared_under_nfkc_without_case_and_white_space():
    assert normalised("  Ｘ² ﬁts\t\nSTRASSE straße \u3000İ ") == "x2 fits strasse strasse i\u0307"
    assert normalised("A  b\r\nC") == "a b c"


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_a_normalised_text_is_its_own_normal_form(text):
    assert normalised(normalised(text)) == normalised(text)


def test_words_of_scripts_without_spaces_are_characters():
    assert words(normalised("求 x=2 的值 and かな")) == ["求", "x=2", "的", "值", "and", "か", "な"]
    assert bare_words(normalised("求x的值, don't \\frac{1}{2}_a")) == [
        "求",
        "x",
        "的",
        "值",
        *["don", "t", "frac", "1", "2", "a"],
    ]


def test_compact_texts_keep_operators():
    assert compact(normalised("**What** is $2 \u2212 3$?")) == "whatis2-3"
    assert compact(normalised("What is 2+3?")) != compact(normalised("What is 2-3?"))


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_runs_have_one_hash_exactly_when_their_words_are_equal(found, length):
    runs = [tuple(found[start : start + length]) for start in range(len(found) - length + 1)]
    hashes = run_hashes(WordHashes()(found), length)
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs)) == len(set(zip(hashes.tolist(), runs, strict=True)))


def test_hashes_are_the_same_in_every_process():
    code = "from lark_fast.selection.hygiene.texts import WordHashes; print(WordHashes()(['a', 'ä']).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(WordHashes()(["a", "ä"]).tolist())


# Duplicates


def test_exact_duplicates_against_brute_force():
    rng = random.Random(1)
    forms = ["The  answer", "the answer", "THE\nANSWER", "the answer.", "Ｔhe answer", "another"]
    answers = [rng.choice(forms) for _ in range(200)]
    problems = [rng.randrange(40) for _ in answers]
    keep = np.array([rng.choice([0.5, 1.0, np.nan]) for _ in answers])
    order = rng.sample(range(200), 200)
    for preference in (None, keep):
        found = removed(ExactDuplicates(200, preference), answers, problems, order)
        stays = {}
        when = {row: place for place, row in enumerate(order)}
        rank = [0.0] * 200 if preference is None else [9.0 if value != value else value for value in preference]
        for row in sorted(order, key=lambda row: (rank[row], when[row])):
            stays.setdefault((problems[row], " ".join(answers[row].lower().replace("ｔ", "t").split())), row)
        assert set(found) == set(range(200)) - set(stays.values())
        for row, removal in found.items():
            kept = removal.of_row
            assert kept in stays.values()
            assert problems[kept] == problems[row]
            assert removal.matched == f"pool.jsonl:{when[kept] + 1}"
            assert removal.similarity == 1.0
            assert removal.reason == "--near-duplicates exact"


def test_near_duplicates_against_jaccard_of_the_words():
    rng = random.Random(2)
    answers, problems = [], []
    for problem in range(30):
        base = " ".join(rng.choice(WORDS) for _ in range(200))
        for _ in range(rng.choice([1, 2, 7])):
            answers.append(variant(rng, base, rng.choice([0, 1, 3, 30, 100])))
            problems.append(problem)
    order = rng.sample(range(len(answers)), len(answers))
    keep = np.array([rng.random() for _ in answers])
    found = removed(NearDuplicates(len(answers), 0.8, keep), answers, problems, order)
    assert 10 < len(found) < len(answers) - 30
    clear = 0.15  # more than four standard deviations of the estimate
    for row, removal in found.items():
        true = jaccard(answers[row], answers[removal.of_row])
        assert problems[row] == problems[removal.of_row]
        assert removal.of_row not in found
        assert keep[removal.of_row] <= keep[row]
        assert removal.similarity >= 0.8
        assert abs(removal.similarity - true) < clear
    left = [row for row in range(len(answers)) if row not in found]
    for row in left:
        for other in left:
            if row < other and problems[row] == problems[other]:
                assert jaccard(answers[row], answers[other]) < 0.8 + clear


def test_estimates_scatter_as_128_permutations_do():
    rng = random.Random(3)
    errors = []
    for _ in range(150):
        base = " ".join(rng.choice(WORDS) for _ in range(300))
        answers = [base, variant(rng, base, rng.randrange(5, 40))]
        true = jaccard(*answers)
        removal = removed(NearDuplicates(2, 1 / PERMUTATIONS), answers)[1]
        errors.append((removal.similarity - true) / (true * (1 - true) / PERMUTATIONS) ** 0.5)
    assert abs(np.mean(errors)) < 0.35
    assert 0.7 < np.std(errors) < 1.3


def test_of_a_chain_those_stay_that_are_unlike_each_other():
    # a is like b and b like c, but a is not like c: c stays beside a, where clusters by links would lose it.
    base = [f"x{number}" for number in range(300)]
    a = " ".join(base)
    b = " ".join(base[:270] + WORDS[:30])
    c = " ".join(base[:240] + WORDS[100:130] + WORDS[:30])
    assert jaccard(a, b) > 0.75 < jaccard(b, c)
    assert jaccard(a, c) < 0.7
    assert list(removed(NearDuplicates(3, 0.72), [a, b, c])) == [1]
    assert sorted(removed(NearDuplicates(3, 0.72, np.array([1.0, 0.0, 1.0])), [a, b, c])) == [0, 2]


def test_short_answers_differ_in_a_sign():
    answers = ["-3", "3", "x = -3", "x = 3", "X =  3"]
    assert set(removed(NearDuplicates(5), answers)) == {4}
    assert set(removed(ExactDuplicates(5), answers)) == {4}


@EACH
def test_other_problems_prompts_and_turns_do_not_count(kind):
    made = kind(4)
    made.see(0, 0, record("same", prompt="one"))
    made.see(1, 1, record("same", prompt="one", problem=1))
    made.see(2, 0, record("same", prompt="another prompt"))
    turns = [("user", "q"), ("assistant", "same"), ("user", "again"), ("assistant", "and more")]
    raw = {"messages": [{"role": role, "content": text} for role, text in turns], "problem_id": 0}
    made.see(3, 0, normalise(raw))
    assert [(removal.row, removal.of_row) for removal in made.removals()] == [(2, 0)]


@EACH
def test_token_ids_are_compared_from_the_first_scored_one_on(kind):
    made = kind(5)
    ids = list(range(100, 130))
    for row, (tokens, labels) in enumerate(
        [
            (ids, [-100] * 2 + ids[2:]),
            ([7, 8, *ids[2:]], [-100] * 2 + ids[2:]),
            (ids, [-100] * 9 + ids[9:]),
            ([5, *range(30)], None),
        ]
    ):
        made.see(row, 0, token_record(tokens, labels))
    made.see(4, 0, record(" ".join(map(str, range(30)))))
    # Row 2 starts seven ids later: 17 of 24 runs of five are shared.
    rows = [removal.row for removal in made.removals()]
    assert rows[0] == 1
    if kind is ExactDuplicates:
        assert rows == [1]


@EACH
def test_rows_that_are_gone_take_no_part(kind):
    gone = np.array([True, False, False])
    assert {row: removal.of_row for row, removal in removed(kind(3), ["same"] * 3, gone=gone).items()} == {2: 1}
    assert not removed(kind(3), ["same"] * 3, gone=~np.array([False, False, True]))


@EACH
def test_nothing_seen_and_rows_not_seen(kind):
    assert list(kind(0).removals()) == []
    assert list(kind(5).removals()) == []
    assert list(removed(kind(9), ["same"] * 9, rows=[8, 3])) == [3]


@EACH
def test_a_removal_is_the_same_whatever_the_order_of_rows(kind):
    rng = random.Random(4)
    base = " ".join(rng.choice(WORDS) for _ in range(100))
    answers = [variant(rng, base, rng.choice([0, 1, 50])) for _ in range(40)]
    keep = np.arange(40.0)
    one = removed(kind(40, keep=keep), answers)
    other = removed(kind(40, keep=keep), answers, rows=rng.sample(range(40), 40))
    assert {row: removal.of_row for row, removal in one.items()} == {row: r.of_row for row, r in other.items()}


@EACH
def test_a_row_is_seen_once(kind):
    made = kind(1)
    made.see(0, 0, record("a"))
    with pytest.raises(ValueError, match="row 0 was seen before"):
        made.see(0, 0, record("a"))


@EACH
def test_keep_has_a_number_a_row(kind):
    with pytest.raises(ValueError, match=r"keep has shape \(2,\), the scores have 3 rows"):
        kind(3, keep=np.zeros(2))


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match="threshold="):
        NearDuplicates(1, threshold)


def test_threshold_one_takes_equal_texts_only():
    rng = random.Random(5)
    base = " ".join(rng.choice(WORDS) for _ in range(60))
    assert set(removed(NearDuplicates(3, 1.0), [base, base.upper(), variant(rng, base, 12)])) == {1}


def test_many_blocks_of_many_sizes_as_one(monkeypatch):
    rng = random.Random(6)
    base = [" ".join(rng.choice(WORDS) for _ in range(50)) for _ in range(25)]
    problems = [rng.randrange(25) for _ in range(300)]
    answers = [variant(rng, base[problem], rng.choice([0, 1, 20])) for problem in problems]
    whole = removed(NearDuplicates(300, 0.7), answers, problems)
    monkeypatch.setattr("lark_fast.selection.hygiene.duplicates._BLOCK_ROWS", 20)
    assert removed(NearDuplicates(300, 0.7), answers, problems) == whole
    assert list(whole) == sorted(whole)


def test_the_temporary_file_has_no_name_and_a_directory_that_is_not_there_is_told(tmp_path):
    made = NearDuplicates(1, directory=tmp_path)
    made.see(0, 0, record("a"))
    assert list(tmp_path.iterdir()) == []
    made.close()
    with pytest.raises(UserError, match=r"^--near-duplicates minhash: the temporary file in .*none cannot be written"):
        NearDuplicates(1, directory=tmp_path / "none")


def test_a_full_disk_is_told():
    made = NearDuplicates(1)
    made._file.close()
    made._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match="cannot be written: No space left on device; it takes 256 bytes a trajectory"):
        made.see(0, 0, record("a"))


def test_without_rensa_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"needs the package rensa; pip install 'lark-fast\[hygiene\]'"):
        NearDuplicates(1)


def test_a_line_of_removed_jsonl():
    made = ExactDuplicates(2)
    first, second = record("a", candidate="x", line=3), record("A", problem="p", candidate=5, line=8, source="b.json")
    made.see(0, 0, first)
    made.see(1, 0, second)
    (removal,) = made.removals()
    assert removed_entry(second, removal) == {
        "problem_id": "p",
        "candidate_id": 5,
        "source": "b.json",
        "line": 8,
        "reason": "--near-duplicates exact",
        "matched": "pool.jsonl:3",
        "similarity": 1.0,
    }


# Decontamination

ITEM = "Find the number of positive integers n, at most 1000, for which n^2 + 3n + 2 is divisible by 6."


def write(path, items):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return str(path)


def hits(made, prompts):
    """The prompts that are removed."""
    for row, prompt in enumerate(prompts):
        made.see(row, row, record("an answer", prompt=prompt, problem=row))
    return [prompts[removal.row] for removal in made.removals()]


def test_runs_against_a_search_for_them(tmp_path):
    rng = random.Random(7)
    vocabulary = [f"v{number}" for number in range(6)]

    def text():
        return [rng.choice(vocabulary) for _ in range(rng.randrange(6, 25))]

    items, prompts = [text() for _ in range(40)], [text() for _ in range(200)]
    path = write(tmp_path / "items.jsonl", [{"problem": " ".join(item)} for item in items])
    for n in (5, 6, 7):
        runs = {tuple(item[i : i + n]) for item in items for i in range(len(item) - n + 1)}
        short = {tuple(item) for item in items if len(item) < n}

        def is_hit(prompt, n=n, runs=runs, short=short):
            windows = {tuple(prompt[i : i + m]) for m in range(1, 25) for i in range(len(prompt) - m + 1)}
            return bool(windows & (runs | short))

        expected = [" ".join(prompt) for prompt in prompts if is_hit(prompt)]
        assert 0 < len(expected) < 200
        assert hits(Decontamination([path], n), [" ".join(prompt) for prompt in prompts]) == expected


def test_layout_and_punctuation_do_not_hide_a_copy(tmp_path):
    path = write(tmp_path / "aime.jsonl", [{"id": 1, "problem": ITEM}])
    asked = "Please reason step by step. \\boxed{} your answer.\n\n"
    copies = [
        ITEM,
        asked + ITEM.upper(),
        ITEM.replace(" ", "\n").replace(".", " !"),
        asked + "... positive integers $n$, at most $1000$, for which $n^2+3n+2$ is **divisible** by 6",
    ]
    others = [ITEM.replace("1000", "100").replace("n^2", "n^3"), " ".join(ITEM.split()[:11]), "q"]
    made = Decontamination([path])
    assert hits(made, [*copies, *others]) == copies
    assert made.counts() == (FileCount(path=path, items=1, matched_items=1, records=4),)
    assert made.notes() == [f"--decontaminate {path}: the prompts of 4 trajectories match 1 of 1 items"]
    first = next(made.removals())
    assert first.matched == f"{path}:1: find the number of positive integers n at most 1000 for which n"
    assert (first.reason, first.of_row, first.similarity) == (f"--decontaminate {path}", None, None)


def test_thirteen_words_match_and_twelve_do_not(tmp_path):
    thirteen = [f"k{number}" for number in range(13)]
    path = write(tmp_path / "a.jsonl", [{"text": " ".join(["a", *thirteen, "b"])}])
    prompts = [" ".join(["x", *thirteen, "y"]), " ".join(["x", *thirteen[:12], "y"]), " ".join(thirteen[1:])]
    assert hits(Decontamination([path]), prompts) == prompts[:1]


def test_short_items_match_as_a_whole(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Compute 2 + 3 and 4 - 1.\n\nProve it!\n-----\nWhat is 2 + 3?\n", encoding="utf-8")
    prompts = [
        "Please answer:  compute $2+3$ and $4-1$",  # five words or more: anywhere in a turn
        "compute 2 - 3 and 4 - 1",  # an operator differs
        "Prove it.",  # fewer: the whole turn
        "If it holds, prove it.",
        "what is 2 − 3?",
        "**What is 2+3 ?**",
    ]
    made = Decontamination([str(path)])
    assert hits(made, prompts) == [prompts[0], prompts[2], prompts[5]]
    assert made.counts()[0].items == 4
    assert next(made.removals()).matched == f"{path}:1: compute 2 3 and 4 1"


def test_system_and_user_turns_are_looked_at_each_by_itself_and_answers_on_request(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": ITEM}])
    half = len(ITEM) // 2
    talks = [
        [("system", ITEM), ("user", "q"), ("assistant", "a")],
        [("user", "q"), ("assistant", "a"), ("user", ITEM), ("assistant", "a")],
        [("user", ITEM[:half]), ("assistant", ITEM[half:])],
        [("user", "q"), ("assistant", f"The question was: {ITEM}")],
        [("user", "q"), ("tool", ITEM), ("assistant", "a")],
    ]
    for answers, expected in ((False, [0, 1]), (True, [0, 1, 3])):
        made = Decontamination([path], answers=answers)
        for row, talk in enumerate(talks):
            made.see(row, 0, normalise({"messages": [{"role": role, "content": text} for role, text in talk]}))
        assert [removal.row for removal in made.removals()] == expected


def test_several_files_count_for_themselves_and_the_first_gives_the_reason(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"problem": "an item that no one has ever seen anywhere"}, {"problem": ITEM}])
    two = write(tmp_path / "two.jsonl", [{"question": ITEM}])
    made = Decontamination([one, two, one])
    made.see(0, 0, record("a", prompt=ITEM))
    made.see(1, 0, record("b", prompt=ITEM))
    assert [(count.items, count.matched_items, count.records) for count in made.counts()] == [(2, 1, 2), (1, 1, 2)]
    assert {removal.reason for removal in made.removals()} == {f"--decontaminate {one}"}
    assert next(made.removals()).matched.startswith(f"{one}:2: find the number")
    assert [removal.row for removal in made.removals(np.array([True, False]))] == [1]


def test_records_of_token_ids_are_counted(tmp_path):
    made = Decontamination([write(tmp_path / "a.jsonl", [{"problem": ITEM}])])
    made.see(0, 0, token_record([1, 2, 3]))
    assert list(made.removals()) == []
    assert made.notes()[1] == "--decontaminate: 1 trajectories are token ids without text and were not compared"


def test_chinese_items_match_by_characters(tmp_path):
    path = write(tmp_path / "cn.jsonl", [{"problem": "小明有十六个苹果，吃了三个，又送给朋友四个，还剩几个？"}])
    made = Decontamination([path])
    assert len(hits(made, ["问题：小明有十六个苹果, 吃了三个, 又送给朋友四个", "小红有十六个梨"])) == 1


@pytest.mark.parametrize(
    "item",
    [
        {"problem": ITEM, "text": "other"},
        {"question": ITEM},
        {"problem": None, "prompt": ITEM},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": ITEM}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ITEM}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"text": ITEM},
    ],
)
def test_fields_of_an_item(item, tmp_path):
    path = write(tmp_path / "a.jsonl", [item])
    made = Decontamination([path])
    assert hits(made, [ITEM, "other", "s"]) == [ITEM]
    assert made.counts()[0].items == 1


@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz", "parquet", "txt", "txt.gz", ""])
def test_files_of_items(form, tmp_path):
    path = tmp_path / f"items.{form}".rstrip(".")
    items = [{"problem": "one two three four five six"}, {"problem": ITEM}]
    lines = "".join(f"{item['problem']}\n" for item in items)
    content = {
        "jsonl": "".join(json.dumps(item) + "\n" for item in items),
        "json": json.dumps(items, indent=1),
        "txt": "\ufeff" + lines,
        "": lines,
    }
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(items), path)
    elif form.endswith(".gz"):
        path.write_bytes(gzip.compress(content[form[:-3]].encode()))
    else:
        path.write_text(content[form], encoding="utf-8")
    made = Decontamination([str(path)])
    assert hits(made, [ITEM]) == [ITEM]
    assert made.counts()[0].items == 2
    assert next(made.removals()).matched.startswith(f"{path}:{5 if form == 'json' else 2}: ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"problem": "x y"}\n{"problem": 1', r":2: invalid JSON: .* at character \d+ of the item"),
        (
            "a.jsonl",
            b'{"answer": 4}\n',
            r":1: has none of the fields problem, question, prompt, text, messages; rename",
        ),
        ("a.jsonl", b'{"problem": 5}\n', r":1: problem is neither a text nor a list of messages"),
        ("a.jsonl", b'{"prompt": ["x"]}\n', r":1: prompt is neither a text nor a list of messages"),
        ("a.jsonl", b'{"messages": [{"role": "system", "content": "x"}]}', r":1: messages has no turn of the user"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 5}]}', r":1: the content of a turn in messages is not"),
        ("a.jsonl", b'"x"\n', r":1: an item must be a JSON object; plain text goes into a file named \*\.txt"),
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, r":1: the JSON is nested too deeply|:1: an item must be"),
        ("a.jsonl", b'{"problem": "\xff"}\n', r":1: not UTF-8: byte 0xff at offset 13"),
        ("a.jsonl", b"", r": holds no text to compare with"),
        ("a.txt", b"\n ---- \n", r": holds no text to compare with"),
        ("a.txt", b"ok\n\xff\n", r":2: not UTF-8: byte 0xff at offset 0"),
        ("a.txt", b'{"problem": "x"}\n', r":1: is JSON, but the file is read as plain text; name it \*\.jsonl"),
        ("a.json", b'[{"problem": "x"}, {"problem"', r":1: invalid JSON: the file ends inside this list element"),
        ("a.txt.gz", gzip.compress(b"one\ntwo\n", mtime=0)[:-9], r":\d+: truncated gzip"),
        ("a.parquet", b"PAR1 is not enough", r":1: corrupt Parquet"),
    ],
)
def test_bad_files_are_named_with_the_line(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        Decontamination([str(path)])
    assert str(raised.value).startswith(f"--decontaminate {path}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (str(tmp_path / "none.jsonl"), "org/benchmark", str(tmp_path)):
        with pytest.raises(UserError, match=r"there is no such file"):
            Decontamination([path])


def test_a_run_has_a_word():
    with pytest.raises(ValueError, match="ngram=0"):
        Decontamination([], 0)
