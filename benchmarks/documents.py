"""``python -m benchmarks.documents``: what is in docs/ and has figures in it.

docs/results.md and docs/method.md, and their pictures, come from records alone, which ``benchmarks.evidence`` wrote and
nobody edits: ``benchmarks/results/*/evidence-*.json``. docs/scale.md has the tables of ``benchmarks.scale``, and
docs/less.md those of the newest records of ``benchmarks.fp8``, ``benchmarks.racing`` and ``benchmarks.head_sampling``.
Words around the figures are in ``docs/*.md.j2``. Tests render all of them again and compare.
"""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import scale, scale_plan
from lark_fast.diagnosis.figure import draw_diagnosis
from lark_fast.diagnosis.measures import Measures as Diagnosed
from lark_fast.diagnosis.summary import DiagnoseSummary
from lark_fast.diagnosis.verdict import find
from lark_fast.files import atomic_open
from lark_fast.intervals import told
from lark_fast.pilot.figure import draw_pilot
from lark_fast.pilot.measures import Measures as Piloted
from lark_fast.pilot.runs import Run
from lark_fast.pilot.summary import PilotSummary
from lark_fast.progress import duration

ROOT = Path(__file__).resolve().parent.parent
DOCS, RECORDS = ROOT / "docs", "benchmarks/results/*/evidence-*.json"
FROM_RECORDS, SCALE, LESS = ("results.md", "method.md"), "scale.md", "less.md"
DOCUMENTS = (*FROM_RECORDS, SCALE, LESS)


def main() -> None:
    """Write them."""
    records = read_records()
    for name in DOCUMENTS:
        with atomic_open(DOCS / name) as file:
            file.write(render(name, records))
    for record in records:
        draw_diagnosis(record["diagnosis"], DOCS / f"diagnosis-{record['name']}.png")
        if record["pilot"] is not None:
            draw_pilot(record["pilot"], DOCS / f"pilot-{record['name']}.png")


def read_records() -> list[dict[str, Any]]:
    """Of each pool the newest, those with a pilot first: {name, path, device, ..., diagnosis, selection, pilot}."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(ROOT.glob(RECORDS), key=lambda path: path.name):
        name = path.stem.split("-", 4)[-1]  # evidence-2026-11-26-<pool>
        found[name] = {"name": name, "path": path.relative_to(ROOT).as_posix(), **read_record(path)}
    return sorted(found.values(), key=lambda record: record["pilot"] is None)


def read_record(path: Path) -> dict[str, Any]:
    """A record, its figures as the commands had them."""
    record = json.loads(path.read_text(encoding="utf-8"))
    diagnosis, pilot = record["diagnosis"], record.get("pilot")
    record["diagnosis"] = DiagnoseSummary(
        out="", measured=revive(Diagnosed, diagnosis), facts=_others(Diagnosed, diagnosis)
    )
    record["pilot"] = pilot and PilotSummary(
        out="",
        measured=revive(Piloted, pilot),
        runs=tuple(Run.from_json({**run, "nll_before": (), "nll_after": ()}) for run in pilot["runs"]),
        facts=_others(Piloted, pilot),
    )
    return {"selection": None, **record}


def revive(kind: Any, value: Any) -> Any:
    """A dataclass, and those in it, from the JSON that ``asdict`` and ``without_nan`` made of it."""
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: revive(hints[field.name], value[field.name]) for field in fields(kind)})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (one for one in arguments if one is not type(None))
        return None if value is None else revive(inner, value)
    if origin is tuple:
        return tuple(revive(arguments[0], one) for one in value)
    return float("nan") if kind is float and value is None else value


def render(name: str, records: list[dict[str, Any]]) -> str:
    """One of ``DOCUMENTS``; ``SCALE`` takes no records, and ``LESS`` its own."""
    environment = Environment(
        loader=FileSystemLoader(DOCS),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, of our own records
    )
    environment.filters |= {"told": told, "percent": _percent, "duration": duration, "demoted": _demoted}
    environment.globals |= {"find": find, "gap": _gap, "pace": _pace}
    if name == SCALE:
        assumed = {"passes": scale.Passes(), "fleet": scale.Fleet(), "seeds": scale.SEEDS}
        given = {"tables": scale.tables(), "plan": scale_plan, **assumed}
    elif name == LESS:
        given = {kind.replace("-", "_"): newest(kind) for kind in ("fp8", "racing", "head-sampling")}
    else:
        given = {"records": records, "first": records[0]}
    return environment.get_template(f"{name}.j2").render(given)


def newest(kind: str) -> list[dict[str, Any]]:
    """The newest record of a kind of each pool, as it was written, with its ``path``; by their pools' names."""
    found = {}
    for path in sorted(ROOT.glob(f"benchmarks/results/*/{kind}-*.json"), key=lambda path: path.name):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["pool"]] = record | {"path": path.relative_to(ROOT).as_posix()}
    return [found[pool] for pool in sorted(found)]


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _demoted(markdown: str) -> str:
    """A document of its own as a part of another: without its title and, of headings, two levels down."""
    lines = markdown.splitlines()[2:]
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in lines) + "\n"


def _gap(pilot: PilotSummary, policy: str) -> Any:
    return next((gap for gap in pilot.measured.gaps if gap.policy == policy), None)


def _pace(diagnosis: DiagnoseSummary, policy: str, beside: str) -> Any:
    return next(pace for pace in diagnosis.measured.paces if (pace.policy, pace.beside) == (policy, beside))


def _others(kind: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    measured = {field.name for field in fields(kind)} | {"runs", "verdict"}
    return {name: own for name, own in value.items() if name not in measured}


if __name__ == "__main__":
    main()
