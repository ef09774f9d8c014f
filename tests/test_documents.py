"""docs/results.md, docs/method.md and docs/less.md are what the records say, and say it for other records too."""

import json

import pytest

from benchmarks.documents import DOCS, FROM_RECORDS, LESS, read_record, read_records, render, revive
from lark_fast.diagnosis.measures import Measures, measure
from lark_fast.files import without_nan
from tests.test_diagnosis_measures import lines


@pytest.mark.parametrize("name", [*FROM_RECORDS, LESS])
def test_committed_as_written(name):
    assert (DOCS / name).read_text(encoding="utf-8") == render(name, read_records()), "run `make docs`"


def test_figures_come_back_from_json():
    from dataclasses import asdict

    measured = measure(lines(9), budget=3)
    assert without_nan(asdict(revive(Measures, json.loads(json.dumps(without_nan(asdict(measured))))))) == without_nan(
        asdict(measured)
    )


@pytest.mark.parametrize("name", FROM_RECORDS)
def test_a_record_without_a_pilot(tmp_path, name):
    record = read_records()[0]
    raw = json.loads((DOCS.parent / record["path"]).read_text(encoding="utf-8"))
    alone = {key: value for key, value in raw.items() if key not in ("pilot", "selection")}
    (tmp_path / "evidence.json").write_text(json.dumps(alone))
    again = {"name": "gsm8k", "path": record["path"], **read_record(tmp_path / "evidence.json")}
    assert again["pilot"] is None
    text = render(name, [again])
    assert "Spearman" in text
    assert "nan" not in text
