"""``lark-fast report``: what is there is read, put into sections, and written as one page."""

from importlib.util import find_spec
from pathlib import Path

from lark_fast.errors import UserError
from lark_fast.files import refuse_overlap, writing_to
from lark_fast.pool.reading import Pool
from lark_fast.report.config import ReportConfig, ReportSummary
from lark_fast.report.shown import MOST_PROBLEMS, Problem, add_texts, add_tokens, choose
from lark_fast.report.sources import Scores, Selection, read_evaluations, read_selection, read_training
from lark_fast.student_files import find_student

_NEEDED = ("altair", "vl_convert", "jinja2")


def make_report(config: ReportConfig) -> ReportSummary:
    """Write the page and its figures.

    Raises:
        UserError: an input is missing or does not go with the scores; altair or vl-convert is not installed.
    """
    out = _checked(config)
    scores = Scores(config.scores)
    selection = None if config.selection is None else read_selection(config.selection, scores)
    training = {directory: read_training(directory) for directory in config.checkpoints}
    evaluations = read_evaluations(config.evaluations)
    problems, notes = _shown(config, scores, selection)
    notes = [*scores.caveats, *notes]
    if selection is None:
        notes.insert(0, "No selection is shown; --selection adds it.")

    from lark_fast.report.page import render, write_figures, write_page
    from lark_fast.report.sections import Sources, sections

    made = list(
        sections(
            Sources(
                scores=scores,
                selection=selection,
                problems=problems,
                training=training,
                evaluations=evaluations,
                notes=tuple(notes),
            )
        )
    )
    with writing_to(config.out):
        figures = write_figures(out.with_name(f"{out.stem}-figures"), made)
        size = write_page(out, render(Path(config.scores).resolve().name or "scores", made))
    return ReportSummary(out=config.out, size=size, figures=tuple(figures), notes=tuple(notes))


def _checked(config: ReportConfig) -> Path:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"a report needs {', '.join(missing)}: pip install 'lark-fast[report]'")
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {config.out}: is the report itself; give the name of an .html file")
    if not out.parent.is_dir():
        raise UserError(f"--out {config.out}: there is no directory {out.parent}")
    if out.is_dir():
        raise UserError(f"--out {config.out}: is a directory")
    if out.exists() and not config.overwrite:
        raise UserError(f"--out {config.out}: exists; --overwrite, or give another name")
    if not 0 <= config.problems <= MOST_PROBLEMS:
        raise UserError(f"--problems {config.problems}: must be 0 to {MOST_PROBLEMS}, for the page to stay small")
    return out


def _shown(config: ReportConfig, scores: Scores, selection: Selection | None) -> tuple[list[Problem], list[str]]:
    """Problems to open, and what they lack."""
    problems = choose(scores, selection, config.problems) if config.problems else []
    if not problems:
        return [], []
    remembered = scores.remembered("pool") or ()
    paths = config.pool or tuple(path for path in remembered if Path(path).exists())
    if not config.pool and len(paths) < max(1, len(remembered)):
        return problems, ["Texts are not shown, for the pool is not where it was; --pool brings them."]
    pool = Pool(paths)
    refuse_overlap(Path(config.out).parent / f"{Path(config.out).stem}-figures", {"--pool": pool.inputs})
    problems, records = add_texts(problems, scores, pool)
    stored = scores.manifest["identity"].get("per_token")
    student = config.student or scores.remembered("student")
    if config.student is None and (not stored or not Path(str(student)).is_dir()):
        wants = "--student brings them" if student else "--student DIR brings them"
        return problems, [f"Tokens have no colours, for their nll or the student is not at hand; {wants}."]
    try:
        base = config.base or (scores.remembered("base") if config.student is None else None)
        files = find_student(str(student), base)
        return add_tokens(problems, scores, records, files, rescore=config.student is not None), []
    except UserError as error:
        if config.student is not None:
            raise
        return problems, [f"Tokens have no colours, for the student that was scored is not at hand ({error})."]
