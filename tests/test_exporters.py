"""Each export comes back through ``datasets``, and reads as that program's documentation says (docs/formats.md)."""

import json
import math

import pytest
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar

from lark_fast.errors import UserError
from lark_fast.selection.exporters import FORMATS, Exporter, export, find_format

disable_progress_bar()

TALKS = [
    [("user", "2 + 2?"), ("assistant", "<think>\nTwo and two.\n</think>\n\nIt is 4.")],
    [("system", "Be brief.\u2028"), ("user", 'Un "été" à 😀\x00?'), ("assistant", "  oui\n")],
    [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")],
    [("user", "call"), ("tool", "42"), ("assistant", "It is 42.")],
    [("user", "hi"), ("assistant", "hello"), ("user", "and no answer")],
    [("user", "late rules"), ("system", "Be long."), ("assistant", "yes")],
]
WEIGHTS = [1.0, 0.25, 0.7499999999999, 1e-7, 1 / 3, 2e-3]
MEAN = math.fsum(WEIGHTS) / len(WEIGHTS)


def training_row(talk, weight, number):
    """A line of train.jsonl; ids and the pool's own column change their type from row to row."""
    return {
        "messages": [{"role": role, "content": text} for role, text in talk],
        "weight": weight,
        "meta": {
            "problem_id": number if number % 2 else f"p{number}",
            "candidate_id": f"c{number}" if number % 2 else number,
            "teacher": "",
            "g_hat": number / 7,
            "train_weight": weight,
        },
        "level": [1, "hard", None, {"a": 1}, [2], 0.5][number],
    }


ROWS = [training_row(talk, weight, number) for number, (talk, weight) in enumerate(zip(TALKS, WEIGHTS, strict=True))]


def written(name, folder, rows=ROWS, mean=MEAN):
    """(what ``datasets`` reads, the notes)."""
    with Exporter(name, folder, mean) as exporter:
        for line in rows:
            exporter.write(line)
    assert exporter.paths[0] == folder / name / "train.jsonl"
    assert all(path.exists() for path in exporter.paths)
    dataset = load_dataset("json", data_files=str(exporter.paths[0]), split="train", cache_dir=str(folder / "cache"))
    return dataset.to_list(), exporter.notes()


def plain(messages):
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def test_every_format_is_tested_below():
    tests = "\n".join(name for name in globals() if name.startswith("test_"))
    for name in FORMATS:
        assert f"test_{name.replace('-', '_')}_" in tests


def test_trl_rows_have_messages_and_weights(tmp_path):
    rows, notes = written("trl", tmp_path)
    assert [set(row) for row in rows] == [{"messages", "weight"}] * len(ROWS)
    assert [row["messages"] for row in rows] == [row["messages"] for row in ROWS]
    assert [row["weight"] for row in rows] == WEIGHTS
    assert notes == [
        f"{tmp_path}/trl/train.jsonl: 6 rows for TRL. lark_fast.trainers.WeightedSFTTrainer uses the weights; "
        "TRL's own SFTTrainer does not."
    ]


def test_trl_prompt_completion_rows_split_before_the_last_answer(tmp_path):
    rows, notes = written("trl-prompt-completion", tmp_path)
    assert [row["weight"] for row in rows] == WEIGHTS
    for given, row in zip(ROWS, rows, strict=True):
        assert [message["role"] for message in row["completion"]] == ["assistant"]
        whole = row["prompt"] + row["completion"]
        assert whole == given["messages"][: len(whole)]
        assert all(message["role"] != "assistant" for message in given["messages"][len(whole) :])
    assert [note.partition(": ")[2] for note in notes[1:]] == [
        "1 rows: of several answers only the last one is trained on; the export trl has them all",
        "1 rows: the turns behind the last answer are left out",
    ]
    _, notes = written("trl-prompt-completion", tmp_path / "unasked", [training_row([("assistant", "a")], 1.0, 0)])
    assert notes[1].endswith("1 rows: TRL takes no empty prompt; the export trl has none")


def test_llama_factory_rows_read_by_its_dataset_info(tmp_path):
    rows, notes = written("llama-factory", tmp_path)
    (info,) = json.loads((tmp_path / "llama-factory" / "dataset_info.json").read_text()).values()
    assert info["file_name"] == "train.jsonl"
    assert info["formatting"] == "sharegpt"
    tags, taken = info["tags"], []
    for line in rows:
        messages = line[info["columns"]["messages"]]
        if messages[0][tags["role_tag"]] == tags["system_tag"]:
            messages = messages[1:]
        odd, even = {tags["user_tag"], tags["observation_tag"]}, {tags["assistant_tag"], tags["function_tag"]}
        turns = [message[tags["role_tag"]] in (even if place % 2 else odd) for place, message in enumerate(messages)]
        taken.append(all(turns) and len(turns) % 2 == 0)
        assert all(isinstance(message[tags["content_tag"]], str) for message in messages)
    assert taken == [True, True, True, False, False, False]
    assert [row["messages"] for row in rows] == [row["messages"] for row in ROWS]
    assert "NOT used" in notes[0]
    assert notes[1].partition(": ")[2].startswith("3 rows: LLaMA-Factory skips them")


def test_llama_factory_v1_rows_weigh_the_answers(tmp_path):
    rows, notes = written("llama-factory-v1", tmp_path)
    for given, line, weight in zip(ROWS, rows, WEIGHTS, strict=True):
        assert set(line) == {"messages"}
        for message, turn in zip(given["messages"], line["messages"], strict=True):
            assert turn["role"] == message["role"]
            assert turn["content"] == [{"type": "text", "value": message["content"]}]
            assert turn["loss_weight"] == (weight if message["role"] == "assistant" else 0.0)
    assert [note.partition(": ")[2] for note in notes[1:]] == [
        "1 rows: LLaMA-Factory makes an example of each answer, each with the row's weight",
        "1 rows: not trained on: a loss_weight of 1e-06 or less counts as 0",
    ]


def test_ms_swift_rows_scale_the_loss_of_answers(tmp_path):
    rows, notes = written("ms-swift", tmp_path)
    total = 0.0
    for given, line in zip(ROWS, rows, strict=True):
        assert set(line) == {"messages"}
        assert plain(line["messages"]) == given["messages"]
        for message in line["messages"]:
            assert set(message) <= {"role", "content", "loss", "loss_scale"}
            assert message["role"] in {"system", "user", "tool_call", "tool_response", "tool", "assistant"}
            if message["role"] != "assistant":
                assert message.get("loss_scale") is None
        scales = {message["loss_scale"] for message in line["messages"] if message["role"] == "assistant"}
        (scale,) = scales
        assert scale == pytest.approx(given["weight"] / MEAN, rel=1e-15)
        total += scale
    assert total == pytest.approx(len(ROWS))
    assert "--is_binary_loss_scale false" in notes[0]
    assert notes[0].endswith(f"The weights were divided by their mean, {MEAN:.6g}.")


def test_axolotl_rows_have_no_flag_that_a_fraction_would_switch_off(tmp_path):
    rows, notes = written("axolotl", tmp_path)
    assert [row["messages"] for row in rows] == [row["messages"] for row in ROWS]
    assert not {"weight", "train"} & {key for line in rows for message in line["messages"] for key in message}
    assert "NOT used" in notes[0]


def test_fireworks_rows_all_have_a_weight(tmp_path):
    rows, notes = written("fireworks", tmp_path)
    for given, line in zip(ROWS, rows, strict=True):
        assert set(line) == {"messages", "weight"}
        assert line["messages"] == given["messages"]
        assert line["weight"] == pytest.approx(given["weight"] / MEAN, rel=1e-15)
    assert sum(line["weight"] for line in rows) == pytest.approx(len(rows))
    assert notes[1].endswith("1 rows: Fireworks takes a system turn at the beginning only")
    _, notes = written("fireworks", tmp_path / "few", ROWS[:2])
    assert notes[-1].endswith("Fireworks takes from 3 to 3,000,000 rows")


def test_reference_rows_have_train_weight_in_meta(tmp_path):
    rows, notes = written("reference", tmp_path)
    for given, line in zip(ROWS, rows, strict=True):
        assert float(line.get("meta", {}).get("train_weight", 1.0)) == given["weight"]
        assert line["messages"] == given["messages"]
        assert line["meta"]["problem_id"] == str(given["meta"]["problem_id"])
        assert line["meta"]["score"] == given["meta"]["g_hat"]
    assert notes[1].partition(": ")[2].startswith("2 rows: the reference takes the wrong tokens")


@pytest.mark.parametrize("name", FORMATS)
def test_lines_are_those_of_train_jsonl_as_utf_8(name, tmp_path):
    paths = export(name, iter(ROWS), tmp_path, MEAN)
    lines = paths[0].read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(ROWS)
    assert "été" in lines[1]
    assert [path.name for path in sorted((tmp_path / name).iterdir())] == sorted(path.name for path in paths)


@pytest.mark.parametrize("name", FORMATS)
def test_token_ids_are_refused_and_nothing_is_left(name, tmp_path):
    tokens = {"input_ids": [1, 2], "labels": [-100, 2], "weight": 1.0, "meta": {"problem_id": "p", "candidate_id": 3}}
    with pytest.raises(UserError, match=rf"^--export {name}: problem 'p', candidate 3 is made of token ids, and exp"):
        export(name, [ROWS[0], tokens], tmp_path, 1.0)
    assert list((tmp_path / name).iterdir()) == []


def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path):
    (path,) = export("trl", ROWS, tmp_path, MEAN)
    before = path.read_bytes()

    def broken():
        yield ROWS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export("trl", broken(), tmp_path, MEAN)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_name_that_is_unknown():
    with pytest.raises(UserError, match=r"^--export trll: unknown; known are trl, trl-prompt-completion, ll"):
        find_format("trll")


@pytest.mark.parametrize("mean", [0.0, -1.0, float("nan")])
def test_a_mean_weight_is_above_0(mean, tmp_path):
    with pytest.raises(ValueError, match="mean_weight="):
        Exporter("trl", tmp_path, mean)
