"""Benchmarks in the formats that people keep them in, and what is refused."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark_fast.errors import UserError
from lark_fast.evaluation import benchmark_files
from lark_fast.evaluation.benchmarks import INSTRUCTIONS, read_benchmark, read_benchmarks
from lark_fast.pool import objects

ADD = {"problem": "What is 1+1?", "answer": "2"}
GPQA = {
    "Record ID": "rec06pnAkLOr2t2mp",
    "Pre-Revision Question": "An older wording",
    "Question": 'Two states, with "lifetimes", are to be\nresolved.\n',
    "Correct Answer": "10^-4 eV\n",
    "Incorrect Answer 1": "10^-11 eV",
    "Incorrect Answer 2": "10^-8 eV, or less",
    "Incorrect Answer 3": "10^-9 eV",
    "High-level domain": "Physics",
    "Subdomain": "Physics (general)",
}


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def read_one(tmp_path, item, **options):
    (question,) = read_benchmark(write_lines(tmp_path / "one.jsonl", [item]), **options)
    return question


FORMATS = {
    "math-500": (
        {
            "problem": "P?",
            "solution": r"so \boxed{3}.",
            "answer": r"\left( 3, \frac{\pi}{2} \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        ("test/precalculus/807.json", "P?", "math", r"\left( 3, \frac{\pi}{2} \right)", "2"),
    ),
    "math": (
        {"problem": "P?", "level": "Level 5", "type": "Algebra", "solution": r"Not \boxed{1} but \boxed{\frac{1}{2}}."},
        ("0", "P?", "math", r"\frac{1}{2}", "5"),
    ),
    "aime-2024": (
        {"id": 60, "problem": "P?", "solution": "long", "answer": "072", "url": "https://x", "year": "2024"},
        ("60", "P?", "math", "072", ""),
    ),
    "aime-upper": (
        {"ID": "2024-II-4", "Problem": "P?", "Solution": "S", "Answer": 33},
        ("2024-II-4", "P?", "math", "33", ""),
    ),
    "aime-2025": ({"question": "P?", "answer": "468"}, ("0", "P?", "math", "468", "")),
    "aime-numbered": ({"id": "I-1", "problem": 1, "question": "P?", "answer": "70"}, ("I-1", "P?", "math", "70", "")),
    "amc": ({"id": 0, "problem": "P?", "answer": 142.0, "url": "https://x"}, ("0", "P?", "math", "142", "")),
    "amc-fraction": ({"id": 1.0, "problem": "P?", "answer": 0.5}, ("1", "P?", "math", "0.5", "")),
    "gsm8k": ({"question": "P?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, ("0", "P?", "math", "1,004", "")),
    "own": ({"problem_id": 7, "prompt": "P?", "answer": "$x$", "level": "hard"}, ("7", "P?", "math", "$x$", "hard")),
    "boxed": ({"question": "P?", "answer": r"\boxed{34}"}, ("0", "P?", "math", "34", "")),
    "level-unknown": ({"problem": "P?", "answer": "1", "level": "Level ?"}, ("0", "P?", "math", "1", "?")),
    "nulls": ({"problem": "P?", "answer": None, "solution": r"\boxed{5}", "level": None}, ("0", "P?", "math", "5", "")),
    "choices-of-none": ({"problem": "P?", "answer": "A", "choices": []}, ("0", "P?", "math", "A", "")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_mathematics(tmp_path, name):
    item, (problem_id, text, kind, answer, group) = FORMATS[name]
    question = read_one(tmp_path, item)
    assert (question.problem_id, question.kind, question.answer, question.group) == (problem_id, kind, answer, group)
    assert question.messages == ({"role": "user", "content": f"{text}\n\n{INSTRUCTIONS['math']}"},)
    assert question.choices == ()
    assert (question.benchmark, question.line) == ("one", 1)


CHOICES = {
    "mmlu-pro": {
        "question_id": 70,
        "question": "Q?",
        "options": ["x", "y", "z"],
        "answer": "B",
        "answer_index": 1,
        "category": "law",
    },
    "index-only": {"question": "Q?", "options": ["x", "y", "z"], "answer_index": 1},
    "mmlu": {"question": "Q?", "subject": "law", "choices": ["x", "y", "z"], "answer": 1},
    "arc": {
        "id": "M_1",
        "question": "Q?",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "arc-numbers": {
        "id": "M_1",
        "question": "Q?",
        "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "text": {"question": "Q?", "options": ["x", "y", "z"], "answer": " y "},
    "bracket": {"question": "Q?", "options": ["x", "y", "z"], "answer": "(b)"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_options_in_a_field(tmp_path, name):
    question = read_one(tmp_path, CHOICES[name])
    assert (question.kind, question.answer, question.choices) == ("choice", "B", ("x", "y", "z"))
    assert question.messages[0]["content"] == f"Q?\n\nA. x\nB. y\nC. z\n\n{INSTRUCTIONS['choice']}"
    assert question.group == CHOICES[name].get("category", "")


SHOWN = {
    "lines": "Q?\n\nA. x\nB. y and\nmore\nC. z",
    "brackets": "Q?\n(A) x\n(B) y and\nmore\n(C) z\n\nWhich is it?",
    "tight": "Q? Not A. or so:\nA)x\nB)y and\nmore\nC)z",
    "small": "Q?\na) x\nb) y and\nmore\nc) z",
    "bold-bullets": "Q?\n- **A)** x\n- **B)** y and\nmore\n- **C)** z",
    "in-a-row": "Q? (A) x (B) y and\nmore (C) z",
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("answer", ["B", "(B)", "B."])
def test_options_in_the_question(tmp_path, name, answer):
    question = read_one(tmp_path, {"question": SHOWN[name], "answer": answer, "domain": "Chemistry"})
    assert (question.kind, question.answer, question.group) == ("choice", "B", "Chemistry")
    assert question.choices == ("x", "y and\nmore", "z")
    assert question.messages[0]["content"] == f"{SHOWN[name]}\n\n{INSTRUCTIONS['choice']}"


@pytest.mark.parametrize(
    ("text", "answer"), [("Angles A and B. Which is larger?", "A"), ("Let (A) be.\nA. only", "A"), ("A. x\nB. y", "AB")]
)
def test_a_letter_need_not_be_a_choice(tmp_path, text, answer):
    assert read_one(tmp_path, {"question": text, "answer": answer}).kind == "math"


def test_gpqa_in_csv(tmp_path):
    rows = [GPQA | {"Record ID": f"rec{n}"} for n in range(60)]
    questions = read_benchmark(write_csv(tmp_path / "gpqa_diamond.csv", rows))
    texts = ["10^-4 eV", "10^-11 eV", "10^-8 eV, or less", "10^-9 eV"]
    for n, question in enumerate(questions):
        assert (question.problem_id, question.kind, question.group) == (f"rec{n}", "choice", "Physics")
        assert sorted(question.choices) == sorted(texts)
        assert question.choices["ABCD".index(question.answer)] == texts[0]
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", question.choices, strict=True))
        asked = f'Two states, with "lifetimes", are to be\nresolved.\n\n{listed}\n\n{INSTRUCTIONS["choice"]}'
        assert question.messages == ({"role": "user", "content": asked},)
    letters = [question.answer for question in questions]
    assert all(5 <= letters.count(letter) <= 28 for letter in "ABCD")
    # A question takes two lines, an answer one more.
    assert [question.line for question in questions[:3]] == [2, 6, 10]


def test_the_order_of_gpqa_hangs_on_seed_and_problem_alone(tmp_path):
    rows = [GPQA | {"Record ID": f"rec{n}"} for n in range(20)]
    one = {q.problem_id: q.choices for q in read_benchmark(write_csv(tmp_path / "a.csv", rows))}
    other = {q.problem_id: q.choices for q in read_benchmark(write_csv(tmp_path / "b.csv", rows[::-1]))}
    assert one == other
    assert {q.problem_id: q.choices for q in read_benchmark(str(tmp_path / "a.csv"), seed=1)} != one
    # The same on every machine and in every version.
    assert [read_one(tmp_path, GPQA, seed=seed).answer for seed in range(6)] == ["B", "A", "D", "D", "D", "C"]


def test_files_of_every_kind_say_the_same(tmp_path):
    items = [{"id": 10 + n, "problem": f"What is {n}·1?", "answer": str(n)} for n in range(5)]
    (tmp_path / "b.json").write_text(json.dumps(items, indent=1))
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "b.parquet")
    text = "".join(json.dumps(item) + "\n" for item in items).encode()
    (tmp_path / "b.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "b.jsonl.zst").write_bytes(pa.compress(text, "zstd", asbytes=True))
    write_csv(tmp_path / "b.csv", items)
    table = (tmp_path / "b.csv").read_bytes()
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(table))
    (tmp_path / "b.CSV").write_bytes(b"\xef\xbb\xbf" + table.rstrip())
    found = {}
    for path in sorted(tmp_path.iterdir()):
        questions = read_benchmark(str(path))
        assert {question.benchmark for question in questions} == {"b"}
        assert questions[0].source == str(path)
        found[path.name] = [(q.problem_id, q.messages, q.answer) for q in questions]
    assert len(found) == 8
    assert all(one == found["b.jsonl"] for one in found.values())


def test_limit_takes_the_first_and_looks_no_further(tmp_path):
    path = write_lines(tmp_path / "b.jsonl", [ADD, ADD, {"nothing": 1}])
    assert [question.line for question in read_benchmark(path, limit=2)] == [1, 2]
    with pytest.raises(UserError, match="--limit 0: must be at least 1"):
        read_benchmark(path, limit=0)


def test_what_is_asked_around_the_question(tmp_path):
    def asked(item, **options):
        return [(turn["role"], turn["content"]) for turn in read_one(tmp_path, item, **options).messages]

    own = {
        "answer": "2",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1+1 "}],
    }
    assert asked(ADD, instruction="") == [("user", "What is 1+1?")]
    assert asked(ADD, instruction="Say it.", system="S") == [("system", "S"), ("user", "What is 1+1?\n\nSay it.")]
    assert asked(own) == [("system", "Be brief."), ("user", " 1+1 ")]
    assert asked(own, instruction="Say it.")[1] == ("user", " 1+1 \n\nSay it.")
    chat = {"answer": "2", "prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1"}]}]}
    assert asked(chat, system="S") == [("system", "S"), ("user", "1+1")]
    with pytest.raises(UserError, match=r"one.jsonl:1: .*leave --system away"):
        asked(own, system="S")


def test_several_files(tmp_path):
    paths = []
    for directory in ("x", "y", "z"):
        (tmp_path / directory).mkdir()
        paths.append(write_lines(tmp_path / directory / "math 500!.jsonl", [ADD]))
    questions = read_benchmarks(paths, instruction="", system="S", limit=1)
    assert [question.benchmark for question in questions] == ["math_500_", "math_500_-2", "math_500_-3"]
    assert all(question.messages[0]["content"] == "S" for question in questions)
    with pytest.raises(UserError, match="is given twice"):
        read_benchmarks([paths[0], f"{tmp_path}/x/../x/math 500!.jsonl"])
    with pytest.raises(UserError, match="no benchmark was given"):
        read_benchmarks([])


@pytest.mark.parametrize(
    ("file", "name"),
    [("..jsonl", "benchmark"), (".hidden.json.gz", "hidden"), ("ab\x1b[1m.csv", "ab_1m"), ("prüfung", "prüfung")],
)
def test_names_fit_for_a_directory(tmp_path, file, name):
    (tmp_path / file).write_bytes(b"problem,answer\n1,2\n" if file.endswith("csv") else b"")
    if file.endswith("gz"):
        (tmp_path / file).write_bytes(gzip.compress(json.dumps([ADD]).encode()))
    elif not file.endswith("csv"):
        write_lines(tmp_path / file, [ADD])
    assert read_benchmark(str(tmp_path / file))[0].benchmark == name


Q = {"question": "Q?"}
P = {"problem": "P?", "answer": "2"}
TWO = ["x", "y"]
BAD = {
    "no-answer": (
        {"problem": "P?", "Level": 3},
        "no answer: looked for answer, correct_answer, solution; found problem, level; add",
    ),
    "solution-without": ({"problem": "P?", "solution": "because"}, "the solution has neither"),
    "empty-answer": ({"problem": "P?", "answer": " "}, "answer is empty; there is no judging without"),
    "nothing-behind-the-mark": ({"problem": "P?", "answer": "so ####"}, "answer is empty"),
    "nan-answer": ({"problem": "P?", "answer": float("nan")}, "answer is nan, it must be a finite number"),
    "list-answer": ({"problem": "P?", "answer": ["2"]}, "answer must be a text or a number, not list"),
    "bool-answer": ({"problem": "P?", "answer": True}, "answer must be a text or a number, not bool"),
    "no-question": (
        {"task": "P?", "answer": "2"},
        "no question: looked for a text in messages, problem, question, prompt; found task, answer",
    ),
    "empty-question": ({"problem": "\n", "answer": "2"}, "problem is empty; it must hold the question"),
    "empty-messages": ({"messages": [], "answer": "2"}, "messages is an empty list"),
    "assistant-last": (
        {"messages": [{"role": "user", "content": "P?"}, {"role": "assistant", "content": "2"}], "answer": "2"},
        r"messages end with an assistant's turn (messages[1]); leave it to the model",
    ),
    "system-last": (
        {"messages": [{"role": "system", "content": "P?"}], "answer": "2"},
        "role system; the last must be the user's",
    ),
    "strange-role": (
        {"messages": [{"role": "human", "content": "P?"}], "answer": "2"},
        "messages[0]: the role must be one of",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "answer": "2"},
        "messages[0]: the content must be a text",
    ),
    "no-message": ({"messages": ["P?"], "answer": "2"}, "messages[0] is no message"),
    "empty-id": ({"id": "", "problem": "P?", "answer": "2"}, "id is empty"),
    "list-id": ({"id": [1], "problem": "P?", "answer": "2"}, "id must be a text or a number"),
    "surrogate": ({"problem": "\ud800", "answer": "2"}, "problem holds a lone surrogate, U+D800"),
    "answer-not-among": (Q | {"options": TWO, "answer": "C"}, "the answer 'C' is none of the 2 options"),
    "index-not-among": (Q | {"options": TWO, "answer": 2}, "the answer '2' is none of the 2 options"),
    "fraction-of-an-index": (Q | {"options": TWO, "answer": 0.5}, "the answer '0.5' is none of the 2 options"),
    "label-not-among": (Q | {"choices": {"text": TWO, "label": ["1", "2"]}, "answerKey": "B"}, "'B' is none of the 2"),
    "answers-at-odds": (Q | {"options": TWO, "answer": "A", "answer_index": 1}, "name different options, A and B"),
    "options-without-answer": (Q | {"options": TWO}, "no answer: looked for answer, answerKey, answer_index; found"),
    "empty-choice": (Q | {"options": TWO, "answer": ""}, "the answer is empty"),
    "one-option": (Q | {"options": ["x"], "answer": "A"}, "options: 1 options; there must be 2 to 26"),
    "empty-option": (Q | {"options": ["x", ""], "answer": "A"}, "options: option 2 is no text, or empty"),
    "options-as-text": (Q | {"options": "['x', 'y']", "answer": "A"}, "options must be a list of texts"),
    "uneven-labels": (Q | {"choices": {"text": TWO, "label": ["A"]}, "answerKey": "A"}, "of one length"),
    "shown-not-among": (
        {"question": "Q?\nA. x\nB. y", "answer": "D"},
        "the answer is D, but the question shows 2 options",
    ),
    "gpqa-without-answer": (
        {k: v for k, v in GPQA.items() if k != "Correct Answer"},
        "no answer: looked for correct_answer; found",
    ),
    "terminal": ({"\x1b[31mred": 1}, "found _31mred"),
    "no-object": (["P?"], "an item must be a JSON object; a benchmark is JSONL, a JSON list, Parquet, or CSV"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_problem_that_cannot_be_used(tmp_path, name):
    item, told = BAD[name]
    path = write_lines(tmp_path / "b.jsonl", [ADD, item])
    with pytest.raises(UserError) as caught:
        read_benchmark(path)
    message = str(caught.value)
    assert message.startswith(f"--benchmark {path}:2: ")
    assert told in message
    assert message.isprintable()


def test_ids_that_come_twice(tmp_path):
    path = write_lines(tmp_path / "b.jsonl", [ADD | {"id": 4}, ADD | {"id": "5"}, ADD | {"id": "4"}])
    with pytest.raises(UserError, match=r"b.jsonl:3: problem '4' stands in line 1 already; give each an id of its own"):
        read_benchmark(path)


FAULTY_FILES = {
    "empty.jsonl": (b"", "--benchmark {path}: holds no problem"),
    "empty-list.json": (b"[]", "--benchmark {path}: holds no problem"),
    "names-alone.csv": (b"problem,answer\n", "--benchmark {path}: holds no problem"),
    "plain.txt": (b"What is 1+1?\n2\n", "{path}:1: invalid JSON: "),
    "latin.jsonl": (b'{"problem": "\xe9", "answer": "2"}\n', "{path}:1: not UTF-8: byte 0xe9 at offset 13"),
    "latin.csv": (b"problem,answer\nP,2\nr\xe9s,2\n", "{path}:3: not UTF-8: byte 0xe9 at offset 1"),
    "cut.jsonl.gz": (
        gzip.compress(b"".join(b'{"problem": "%d", "answer": "2"}\n' % n for n in range(999)))[:-99],
        "truncated gzip",
    ),
    "cut.csv.gz": (gzip.compress(b"problem,answer\n" + b"P,2\n" * 99)[:-9], "truncated gzip"),
    "deep.jsonl": (b"[" * 20_000, "{path}:1: "),
    "uneven.csv": (b'problem,answer\n"a\nb",2\n\nP,2,3\n', "{path}:5: 3 fields, but the first line names 2"),
    "quoted.csv": (b'problem,answer\nP,2\n"P,2\n', "{path}:3: invalid CSV: unexpected end of data"),
    "field.csv": (
        b"problem,answer\n" + b"P" * 200_000 + b",2\n",
        "{path}:2: invalid CSV: field larger than field limit",
    ),
    "broken.parquet": (b"PAR1 nothing PAR1", "{path}:1: corrupt Parquet"),
}


@pytest.mark.parametrize("name", FAULTY_FILES)
def test_a_file_that_cannot_be_used(tmp_path, name):
    content, told = FAULTY_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_benchmark(str(path))
    assert told.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["long.jsonl", "long.csv"])
def test_a_problem_too_large(tmp_path, monkeypatch, name):
    for module in (benchmark_files, objects):
        monkeypatch.setattr(module, "MAX_OBJECT_BYTES", 50_000)
    path = tmp_path / name
    start = b"problem,answer\nP,2\n" if name.endswith("csv") else json.dumps(ADD).encode() + b"\n\n"
    path.write_bytes(start + b"x" * 120_000)
    with pytest.raises(UserError, match=rf"{name}:3: .*longer than 50000 bytes"):
        read_benchmark(str(path))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="is a directory; give the file in it"):
        read_benchmark(str(tmp_path))
    with pytest.raises(UserError, match="there is no such file"):
        read_benchmark(str(tmp_path / "b.jsonl"))
