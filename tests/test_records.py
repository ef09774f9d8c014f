import copy
import datetime
import decimal
import json

import pytest

from lark_fast.errors import RejectError
from lark_fast.pool.records import Record, normalise

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
PLAIN = {"problem_id": 7, "candidate_id": "a", "teacher": "t", "messages": [QUESTION, ANSWER]}


def reason_of(raw) -> str:
    with pytest.raises(RejectError) as caught:
        normalise(raw)
    reason = str(caught.value)
    # Reasons are shown on terminals and written to a log, one a line.
    assert reason.isprintable()
    assert len(reason) < 300
    reason.encode()
    return reason


def contents(record: Record) -> list[tuple[str, str]]:
    assert all(set(message) == {"role", "content"} for message in record.messages)
    return [(message["role"], message["content"]) for message in record.messages]


def test_messages():
    raw = copy.deepcopy(PLAIN)
    record = normalise(raw, source="pool.jsonl", line=3, ordinal=2)
    assert contents(record) == [("user", "What is 2 + 2?"), ("assistant", "4")]
    assert (record.source, record.line, record.ordinal) == ("pool.jsonl", 3, 2)
    assert (record.problem_id, record.candidate_id, record.teacher) == (7, "a", "t")
    assert record.key == ("7", "a")
    assert (record.input_ids, record.labels, record.extra) == (None, None, {})
    assert raw == PLAIN, "the caller's dict must not change"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_roles(role):
    turns = [{"role": role, "content": "s"}, QUESTION, ANSWER, {"role": "tool", "content": "r"}, ANSWER]
    record = normalise({"messages": turns})
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_sharegpt_roles():
    roles = {
        "system": "system",
        "human": "user",
        "gpt": "assistant",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "model": "assistant",
        "observation": "tool",
        "chatgpt": "assistant",
        "bing": "assistant",
    }
    record = normalise({"conversations": [{"from": name, "value": name} for name in roles]})
    assert contents(record) == [(role, name) for name, role in roles.items()]


def test_sharegpt_with_role_and_content_names():
    assert contents(normalise({"conversations": [QUESTION, ANSWER]})) == contents(normalise(PLAIN))


def test_sharegpt_system_column():
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    system = {"from": "system", "value": "s"}
    with_column = normalise({"conversations": talk, "system": "s"})
    assert contents(with_column)[0] == ("system", "s")
    assert "system" not in with_column.extra
    assert contents(normalise({"conversations": [system, *talk], "system": "s"})) == contents(with_column)
    for nothing in ("", None):
        assert contents(normalise({"conversations": talk, "system": nothing}))[0] == ("user", "q")
    assert "two system prompts" in reason_of({"conversations": [system, *talk], "system": "other"})
    assert "system is a list" in reason_of({"conversations": talk, "system": ["s"]})
    # Only ShareGPT has such a column; elsewhere it is the user's own.
    assert normalise(PLAIN | {"system": 1}).extra == {"system": 1}


@pytest.mark.parametrize("answer", ["completion", "response"])
@pytest.mark.parametrize("prompt", ["What is 2 + 2?", [QUESTION]])
@pytest.mark.parametrize("completion", ["4", [ANSWER]])
def test_prompt_and_answer(answer, prompt, completion):
    record = normalise({"prompt": prompt, answer: completion, "candidate_id": 1})
    assert contents(record) == contents(normalise(PLAIN))
    assert record.extra == {}
    assert record.problem_id == normalise({"messages": [QUESTION, ANSWER]}).problem_id


def test_completion_wins_over_response_and_nulls_do_not_count():
    both = normalise({"prompt": "q", "completion": "c", "response": "r"})
    assert (contents(both)[1], both.extra) == (("assistant", "c"), {"response": "r"})
    # Parquet fills the columns that a row lacks with nulls.
    nulls = dict.fromkeys(["messages", "conversations", "completion", "input_ids", "labels", "teacher", "note"])
    record = normalise(nulls | {"prompt": "q", "response": "r"})
    assert (contents(record)[1], record.extra) == (("assistant", "r"), {"note": None})


def test_messages_come_first():
    record = normalise(PLAIN | {"prompt": "p", "completion": "c", "input_ids": [1], "conversations": []})
    assert contents(record) == contents(normalise(PLAIN))
    assert record.extra == {"prompt": "p", "completion": "c", "input_ids": [1], "conversations": []}


def test_tokens():
    record = normalise(
        {"problem_id": 1, "input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "attention_mask": [1]}
    )
    assert (record.input_ids, record.labels, record.messages) == ((5, 6, 7, 8), (-100, 6, -100, 8), None)
    assert record.extra == {"attention_mask": [1]}
    everything = normalise({"input_ids": [0, 2**31 - 1], "labels": [0, 2**31 - 1]})
    assert len(everything.content_hash()) == 16


@pytest.mark.parametrize(
    ("ids", "labels", "reason"),
    [
        ([], [], "input_ids is empty"),
        ([1, 2], [1], "input_ids has 2 entries but labels has 1"),
        ([1, 2], [-100, -100], "every label is -100"),
        ([1, 2], [1, 3], "labels[1] is neither -100 nor equal"),
        ([1, 2], [-1, 2], "labels[0] is neither -100 nor equal"),
        ([-100, 2], [-100, 2], "between 0 and"),
        ([1, 2**31], [-100, 2**31], "between 0 and"),
        ([1, 10**400], [1, 10**400], "between 0 and"),
        ([1, True], [1, 1], "input_ids[1] is a boolean"),
        ([1, 2.0], [1, 2], "input_ids[1] is a float"),
        ([1, None], [1, 2], "input_ids[1] is null"),
        ([1, 2], [1, "2"], "labels[1] is a string"),
        ([[1, 2]], [[1, 2]], "input_ids[0] is a list"),
        ("12", [1, 2], "input_ids is a string"),
        ([1, 2], {"0": 1}, "labels is an object"),
        ([1, 2], None, "there is input_ids but no labels"),
    ],
)
def test_broken_tokens(ids, labels, reason):
    assert reason in reason_of({"input_ids": ids, "labels": labels})


def test_text_parts_are_joined_and_nothing_else_is_taken():
    def part(**fields):
        return {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "a"}, fields]}]}

    assert contents(normalise(part(type="text", text="b\n")))[1] == ("assistant", "ab\n")
    # Parquet gives every part the columns of all.
    assert contents(normalise(part(type="text", text="b", image_url=None)))[1] == ("assistant", "ab")
    url = {"type": "image_url", "image_url": {"url": "http://localhost:1/x"}}
    assert "messages[1].content[1] is of type 'image_url'; only text parts" in reason_of(part(**url))
    assert "is of type null" in reason_of(part(text="b"))
    assert "is of type a list" in reason_of(part(type=["text"], text="b"))
    assert "content[1].text is null" in reason_of(part(type="text"))
    assert "content[0] is a string" in reason_of({"messages": [QUESTION, {"role": "assistant", "content": ["a"]}]})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_folded_in(name):
    def answer(content, reasoning):
        record = normalise({"messages": [QUESTION, {"role": "assistant", "content": content, name: reasoning}]})
        return record.messages[1]["content"]

    assert answer("4", "2 and 2") == "<think>\n2 and 2\n</think>\n\n4"
    # All thought and no answer, as a cut-off generation leaves it.
    assert answer(None, "2 and 2") == answer("", "2 and 2") == "<think>\n2 and 2\n</think>\n\n"
    for nothing in (None, "", " \n"):
        assert answer("4", nothing) == "4"
    # Given twice, it is taken once; a different thought is not lost.
    assert answer("<think>\n2 and 2\n</think>\n4", "2 and 2\n") == "<think>\n2 and 2\n</think>\n4"
    assert answer("<think>no</think>4", "2 and 2") == "<think>\n2 and 2\n</think>\n\n<think>no</think>4"
    assert answer("as 4 shows", "4") == "<think>\n4\n</think>\n\nas 4 shows"


def test_reasoning_of_other_forms():
    thought = "<think>\nt\n</think>\n\na"
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "reasoning_content": "t"}]
    assert contents(normalise({"conversations": sharegpt}))[1][1] == thought
    record = normalise({"prompt": "q", "response": "a", "reasoning_content": "t"})
    assert (contents(record)[1][1], record.extra) == (thought, {})
    # What a user turn or an object under a common name says is not the model's reasoning.
    turns = [QUESTION | {"reasoning_content": "t"}, ANSWER | {"reasoning": {"effort": "high"}, "thinking": True}]
    assert contents(normalise({"messages": turns})) == contents(normalise(PLAIN))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], "must be a JSON object, this is a list"),
        (None, "this is null"),
        ("text", "this is a string"),
        (1.5, "this is a float"),
        ({}, "neither messages, nor conversations"),
        ({"messages": None}, "messages is null"),
        ({"prompt": "q"}, "there is prompt but no completion or response"),
        ({"prompt": "q", "completion": None}, "there is prompt but no completion or response"),
        ({"completion": "a"}, "neither messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": {}}, "messages is an object"),
        ({"messages": "hi"}, "messages is a string"),
        ({"messages": [QUESTION, "hi"]}, "messages[1] is a string"),
        ({"messages": [{"content": "q"}, ANSWER]}, "messages[0] has no role"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0] has no content"),
        ({"messages": [{"role": 1, "content": "q"}, ANSWER]}, "messages[0].role is an integer"),
        ({"messages": [{"role": "human", "content": "q"}, ANSWER]}, "messages[0].role 'human' is unknown"),
        ({"messages": [{"role": "\x1b[31mred", "content": "q"}]}, r"'\x1b[31mred' is unknown"),
        ({"messages": [{"role": "r" * 10**6, "content": "q"}]}, "is unknown"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "messages[0].content is null"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "messages[0].content is an integer"),
        ({"messages": [QUESTION, {"role": "assistant", "content": {}}]}, "messages[1].content is an object"),
        ({"messages": [QUESTION]}, "no assistant turn"),
        ({"messages": [QUESTION, {"role": "assistant", "content": ""}]}, "assistant turn at message 1 is empty"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " \n\t"}]}, "assistant turn at message 1 is empty"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "assistant turn at message 1 is empty"),
        ({"messages": [QUESTION, {"role": "assistant", "content": []}]}, "assistant turn at message 1 is empty"),
        ({"messages": [QUESTION, ANSWER, QUESTION, ANSWER | {"content": ""}]}, "assistant turn at message 3 is empty"),
        ({"messages": [QUESTION, ANSWER | {"reasoning_content": 1}]}, "messages[1].reasoning_content is an integer"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}]}, "messages[1].tool_calls cannot be scored"),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "conversations[0].from 'alien' is unknown"),
        ({"conversations": [{"from": "human", "content": "q"}]}, "conversations[0] has no value"),
        ({"conversations": [{"from": "human", "value": 1}]}, "conversations[0].value is an integer"),
        ({"prompt": 1, "completion": "a"}, "prompt is an integer"),
        ({"prompt": [], "completion": "a"}, "prompt is empty"),
        ({"prompt": "q", "completion": 1}, "completion is an integer"),
        ({"prompt": "q", "response": [QUESTION]}, "response has no assistant turn"),
        ({"prompt": [QUESTION, ANSWER], "response": [QUESTION]}, "response has no assistant turn"),
        ({"prompt": "q", "completion": " "}, "assistant turn at message 1 is empty"),
        (PLAIN | {"problem_id": None}, "problem_id is null"),
        (PLAIN | {"problem_id": True}, "problem_id is a boolean"),
        (PLAIN | {"problem_id": 1.0}, "problem_id is a float"),
        (PLAIN | {"problem_id": float("nan")}, "problem_id is a float"),
        (PLAIN | {"problem_id": [1]}, "problem_id is a list"),
        (PLAIN | {"problem_id": ""}, "problem_id is empty"),
        (PLAIN | {"problem_id": 2**63}, "problem_id does not fit in 64 bits"),
        (PLAIN | {"problem_id": 10**5000}, "problem_id does not fit in 64 bits"),
        (PLAIN | {"candidate_id": None}, "candidate_id is null"),
        (PLAIN | {"candidate_id": False}, "candidate_id is a boolean"),
        (PLAIN | {"candidate_id": 0.5}, "candidate_id is a float"),
        (PLAIN | {"teacher": 4}, "teacher is an integer"),
    ],
)
def test_every_reject_has_its_own_reason(raw, reason):
    assert reason in reason_of(raw)


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"messages": [QUESTION, ANSWER | {"content": "a\ud83d"}]}, "messages[1].content"),
        ({"messages": [QUESTION | {"content": "\udc00"}, ANSWER]}, "messages[0].content"),
        ({"messages": [QUESTION, ANSWER | {"content": [{"type": "text", "text": "\ud83d"}]}]}, "content[0].text"),
        ({"messages": [QUESTION, ANSWER | {"reasoning_content": "\ud83d"}]}, "messages[1].reasoning_content"),
        ({"conversations": [QUESTION, ANSWER], "system": "\ud83d"}, "system"),
        ({"prompt": "\ud83d", "completion": "a"}, "prompt[0].content"),
        (PLAIN | {"problem_id": "\ud83d"}, "problem_id"),
        (PLAIN | {"candidate_id": "\ud83d"}, "candidate_id"),
        (PLAIN | {"teacher": "\ud83d"}, "teacher"),
        (PLAIN | {"note": "\ud83d"}, "column 'note'"),
        (PLAIN | {"note": [{"deep": ["\ud83d"]}]}, "column 'note'"),
        (PLAIN | {"\ud83d": 1}, r"column name '\ud83d'"),
        (PLAIN | {"note": {"\ud83d": 1}}, r"column name '\ud83d'"),
    ],
)
def test_lone_surrogates_are_found_everywhere(raw, where):
    reason = reason_of(raw)
    assert where in reason
    assert "lone surrogate, U+D" in reason


def test_paired_surrogates_and_odd_characters_are_text():
    text = json.loads(r'"\ud83d\ude00 \u0000 \u2028 \ufeff \uffff"')
    assert normalise({"messages": [QUESTION, ANSWER | {"content": text}]}).messages[1]["content"] == text


def test_default_problem_is_the_prompt():
    def problem(*turns, **columns):
        return normalise({"messages": list(turns)} | columns).problem_id

    system = {"role": "system", "content": "s"}
    first = problem(QUESTION, ANSWER)
    assert isinstance(first, str)
    assert len(bytes.fromhex(first)) == 16
    # Answers, later turns and other columns do not matter; roles and texts of the prompt do, and where they end.
    assert problem(QUESTION, ANSWER | {"content": "5"}, teacher="x") == first
    assert problem(QUESTION, ANSWER, QUESTION, ANSWER) == first
    assert problem(system, QUESTION, ANSWER) != first
    assert problem(QUESTION | {"role": "system"}, ANSWER) != first
    assert problem({"role": "user", "content": "ab"}, {"role": "user", "content": "c"}, ANSWER) != problem(
        {"role": "user", "content": "a"}, {"role": "user", "content": "bc"}, ANSWER
    )
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    assert problem({"role": "user", "content": parts}, ANSWER) == first

    def token_problem(ids, labels):
        return normalise({"input_ids": ids, "labels": labels}).problem_id

    assert token_problem([1, 2, 3], [-100, -100, 3]) == token_problem([1, 2, 9, 9], [-100, -100, 9, -100])
    assert token_problem([1, 2, 3], [-100, -100, 3]) != token_problem([1, 2, 3], [-100, 2, 3])
    assert token_problem([1, 2], [1, 2]) == token_problem([3, 4], [3, 4])


def test_default_candidate_is_the_ordinal():
    assert normalise({"messages": [QUESTION, ANSWER]}, ordinal=12).candidate_id == 12
    assert normalise({"problem_id": "p", "messages": [QUESTION, ANSWER]}, ordinal=12).key == ("p", "12")


def test_ids_keep_their_type():
    for value in (0, -5, 2**63 - 1, "0", "é", " x "):
        record = normalise(PLAIN | {"problem_id": value, "candidate_id": value})
        assert (record.problem_id, record.candidate_id) == (value, value)
        assert type(record.problem_id) is type(value)


def test_content_hash_sees_content_only():
    base = normalise(PLAIN)
    assert len(base.content_hash()) == 16
    same = normalise(PLAIN | {"problem_id": 8, "candidate_id": 0, "teacher": "", "x": 1}, source="f", line=9, ordinal=4)
    assert same.content_hash() == base.content_hash()
    changes = [
        [QUESTION, ANSWER | {"content": "4 "}],
        [QUESTION | {"role": "system"}, ANSWER],
        [QUESTION, ANSWER, QUESTION],
        [QUESTION, QUESTION, ANSWER],
        [ANSWER, QUESTION],
        [{"role": "user", "content": "What is 2 + 2?assistant4"}, ANSWER],
    ]
    hashes = {normalise({"messages": turns}).content_hash() for turns in changes}
    assert len(hashes | {base.content_hash()}) == len(changes) + 1

    tokens = [([1, 2], [-100, 2]), ([1, 2], [1, 2]), ([1, 3], [-100, 3]), ([1, 2, 3], [-100, 2, -100])]
    hashes = {normalise({"input_ids": ids, "labels": labels}).content_hash() for ids, labels in tokens}
    assert len(hashes) == len(tokens)
    # A number pinned here is a promise that stores written by older versions still match.
    assert base.content_hash().hex() == "045adc8e545a766c0d5cb872914a6d1d"
    assert (
        normalise({"input_ids": [1, 2], "labels": [-100, 2]}).content_hash().hex() == "d17f838fd5521c963ebef0a883a27c9f"
    )


def test_unknown_columns_travel_as_strict_json():
    meta = {"problem_id": "other", "candidate_id": [1], "teacher": None}
    extra = {"correct": True, "score": 0.5, "tags": ["a", {"b": None}], "meta": meta, "weight": 3, "": 10**30}
    assert normalise(PLAIN | extra).extra == extra
    infinite = json.loads('{"x": NaN, "y": [Infinity, -Infinity, 1e999], "z": {"w": NaN}}')
    assert normalise(PLAIN | infinite).extra == {"x": None, "y": [None, None, None], "z": {"w": None}}


def test_python_values_of_unknown_columns():
    # Parquet and pandas hand over values that JSON has no form for.
    values = {
        "day": datetime.date(2024, 2, 29),
        "time": datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=datetime.UTC),
        "price": decimal.Decimal("1.10"),
        "raw": b"\xff\x00",
        "pair": (1, "b"),
    }
    extra = normalise(PLAIN | values).extra
    assert json.loads(json.dumps(extra, allow_nan=False)) == {
        "day": "2024-02-29",
        "time": "2024-02-29T01:02:03+00:00",
        "price": "1.10",
        "raw": "/wA=",
        "pair": [1, "b"],
    }
    assert "column 'x' holds a set" in reason_of(PLAIN | {"x": {1}})
    assert "column name an integer is an integer, it must be a string" in reason_of(PLAIN | {1: 2})


@pytest.mark.parametrize("depth", [99, 100, 101, 900, 100_000])
def test_nesting_of_unknown_columns(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    if depth <= 100:
        assert normalise(PLAIN | {"x": value}).extra == {"x": value}
    else:
        assert "column 'x' is nested more than 100 levels deep" in reason_of(PLAIN | {"x": value})


def test_records_are_frozen():
    record = normalise(PLAIN)
    with pytest.raises(AttributeError):
        record.teacher = "x"
