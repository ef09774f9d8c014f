"""The report: what it says is what was scored and selected, and nothing that a pool holds does anything in it."""

import json
import re
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import spearmanr

from lark_fast.report.config import ReportConfig
from lark_fast.report.run import make_report
from lark_fast.report.sections import _spearman
from lark_fast.scoring.parts import part_files
from tests.command import write_jsonl
from tests.reports import NAMES, write_harmful, write_large
from tests.score_rows import table

MOST_BYTES = 5_000_000


class Page(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.parts, self.scripts, self._inside = [], [], [], [], []
        self.heat = 0
        self.feed(self.source)
        self.text = "".join(self.parts)
        self.charts = json.loads(self.scripts[0])

    def rows(self, chart):
        """The numbers that a chart shows."""
        (values,) = self.charts[chart]["datasets"].values()
        return values

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self._inside.append(tag)
        self.heat += tag == "span" and re.fullmatch(r"h\d", dict(attributes).get("class") or "") is not None
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self._inside:
            self.scripts[-1] += data
        elif "style" not in self._inside:
            self.parts.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory, forks):
    """A harmful pool scored, selected from and reported, by the real commands."""
    directory = tmp_path_factory.mktemp("report")
    pool, student = write_harmful(directory)
    forks.run("score", "--pool", pool, "--student", student, "--out", directory / "scores", "--per-token",
              "--dtype", "float32")  # fmt: skip
    select = ("select", "--scores", directory / "scores", "--pool", pool, "--out", directory / "selection")
    forks.run(*select, "--budget", 2, "--where", "correct")
    run = forks.run("report", "--scores", directory / "scores", "--selection", directory / "selection",
                    "--out", directory / "report.html")  # fmt: skip
    return directory, run


@pytest.fixture(scope="module")
def page(made):
    return Page(made[0] / "report.html")


def test_nothing_in_a_pool_becomes_an_element(page):
    assert page.tags.count("script") == 3
    assert not {"img", "i", "b", "iframe", "object", "embed", "link", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcdoc")]
    assert {value for name, value in page.attributes if name == "href"} == {
        f"#{value}" for name, value in page.attributes if name == "id" and f'href="#{value}"' in page.source
    }


def test_everything_in_a_pool_is_there_as_text(page):
    assert "<script>alert(1)</script>" in page.text
    assert "</script><img src=x onerror=alert(2)>" in page.text
    assert "<!-- {{ 7*7 }} {% raw %} ${7*7} `x` &lt;b&gt; &amp;" in page.text
    assert "\\x1b[31mred" in page.text
    assert "\\u202e evil" in page.text
    assert "<b>bold</b>" in page.text
    assert "p<0>" in page.text


def test_no_character_acts_on_its_own(made, page):
    bad = {c for c in page.source if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"}
    bundle = {c for c in page.scripts[1] + page.scripts[2] if c in bad}
    assert bad == bundle, "only what the library's own source holds"
    _, run = made
    assert not [c for c in run.stdout + run.stderr if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"]


def test_tokens_are_coloured_and_make_up_the_text(made, page):
    directory, _ = made
    assert page.heat - 10 == table(directory / "scores")["n_tokens"].to_numpy().sum()  # 10 are the legend's
    assert page.text.count("<|im_end|>") == 4 * 7


def test_the_figures_say_what_was_selected(made, page):
    directory, _ = made
    shares = json.loads((directory / "selection/manifest.json").read_text())["teachers"]
    values = page.rows("teachers")
    drawn = {(one["teacher"], one["what"]): one["share"] for one in values}
    assert len(shares) == len(NAMES)
    assert sorted(s for (_, what), s in drawn.items() if what == "selected") == pytest.approx(
        sorted(share["weight"] for share in shares.values())
    )
    assert drawn["datum.x", "selected"] == pytest.approx(shares["datum.x"]["weight"])
    assert drawn["\\u202eright", "pool"] == pytest.approx(1 / 7)
    assert "12 trajectories" not in page.text
    assert "--where correct" in page.text


def test_rejects_and_what_filters_removed(made, page):
    directory, _ = made
    removed = len((directory / "selection/removed.jsonl").read_text().splitlines())
    assert removed == 12
    assert re.search(r"--where correct\s*12", page.text)
    assert "pool.jsonl:29" in page.text


def test_pngs(made):
    directory, run = made
    figures = sorted((directory / "report-figures").iterdir())
    assert len(figures) > 8
    for figure in figures:
        assert figure.suffix == ".png"
        head = figure.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert int.from_bytes(head[16:20], "big") >= 1200
    assert f"{len(figures)} figures" in run.stdout


def test_tokens_that_were_not_stored_are_scored_once_more(made, page, forks, tmp_path):
    directory, _ = made
    pool, student = directory / "pool.jsonl", directory / "student"
    forks.run("score", "--pool", pool, "--student", student, "--out", tmp_path / "scores", "--dtype", "float32")
    plain = ReportConfig(scores=str(tmp_path / "scores"), out=str(tmp_path / "plain.html"))
    assert "--student" in make_report(plain).notes[-1]
    assert Page(tmp_path / "plain.html").heat == 0
    asked = ReportConfig(scores=plain.scores, out=str(tmp_path / "asked.html"), student=str(student))
    make_report(asked)
    titles = [
        [value for name, value in one.attributes if name == "title"] for one in (page, Page(tmp_path / "asked.html"))
    ]
    assert sorted(titles[0]) == sorted(titles[1])


def test_a_pool_that_is_gone(made, tmp_path):
    directory, _ = made
    manifest = json.loads((directory / "scores/manifest.json").read_text())
    moved = tmp_path / "scores"
    moved.mkdir()
    for part in part_files(directory / "scores"):
        (moved / part.name).write_bytes(part.read_bytes())
    manifest["config"]["pool"] = [str(tmp_path / "gone.jsonl")]
    (moved / "manifest.json").write_text(json.dumps(manifest))
    summary = make_report(ReportConfig(scores=str(moved), out=str(tmp_path / "r.html")))
    assert "--pool" in " ".join(summary.notes)
    found = Page(tmp_path / "r.html")
    assert "details" in found.tags
    assert "alert(1)" not in found.text


@pytest.fixture(scope="module", params=[10, 10_000])
def large(request, tmp_path_factory):
    """Made-up scores, a selection from them, and their report."""
    from lark_fast.selection.run import SelectConfig, select

    directory = tmp_path_factory.mktemp("large")
    scores = write_large(directory / "scores", request.param, teachers=200)
    select(SelectConfig(scores=str(scores), out=str(directory / "selection"), budget=3))
    out = directory / "report.html"
    summary = make_report(ReportConfig(scores=str(scores), selection=str(directory / "selection"), out=str(out)))
    return request.param, summary, Page(out)


def test_of_any_size(large):
    problems, summary, page = large
    assert summary.size < MOST_BYTES
    assert f"{problems:,}" in page.text
    assert page.tags.count("details") <= 24
    values = page.rows("teachers")
    if problems > 10:
        assert len(values) == 2 * 13
        assert "others (188)" in {one["teacher"] for one in values}
    assert sum(one["count"] for one in page.rows("effective-sizes")) == problems
    assert len(page.rows("rho-nll")) == min(1500, 7 * problems)


def test_training_and_evaluation(made, forks, tmp_path):
    directory, _ = made
    for name, start in (("one", 3.0), ("two", 2.5)):
        (tmp_path / name).mkdir()
        steps = [{"step": step, "loss": start / (1 + step), "lr": 1e-4} for step in range(1000)]
        write_jsonl(tmp_path / name / "metrics.jsonl", steps)
    write_jsonl(tmp_path / "b.jsonl", [{"problem": f"{a}?", "answer": str(a), "level": a % 2} for a in range(6)])
    write_jsonl(tmp_path / "a.jsonl", [{"problem_id": str(a), "text": f"A: {min(a, 3)}"} for a in range(6)])
    forks.run("eval", "--answers", tmp_path / "a.jsonl", "--benchmark", tmp_path / "b.jsonl", "--out", tmp_path / "<e>")
    forks.run("report", "--scores", directory / "scores", "--checkpoint", tmp_path / "one", "--checkpoint",
              tmp_path / "two", "--eval", tmp_path / "<e>", "--out", tmp_path / "r.html")  # fmt: skip
    page = Page(tmp_path / "r.html")
    curve = page.rows("loss")
    assert {one["name"] for one in curve} == {"one", "two"}
    assert len(curve) <= 2 * 400
    assert "66.7 %" in page.text
    assert "<e>" in page.text
    assert "No selection is shown" in page.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--scores", "nowhere"), "no manifest.json"),
        (("--selection", "nowhere"), "lark-fast select"),
        (("--pool", "nowhere.jsonl"), "does not exist"),
        (("--student", "nowhere/at/all"), "no such directory"),
        (("--checkpoint", "nowhere"), "no metrics.jsonl"),
        (("--eval", "nowhere"), "no summary.json"),
        (("--out", "report"), ".html"),
        (("--out", "nowhere/report.html"), "there is no directory"),
        (("--problems", "-1"), "--problems -1"),
    ],
    ids=["scores", "selection", "pool", "student", "checkpoint", "eval", "out", "parent", "problems"],
)
def test_bad_input(made, forks, tmp_path, more, said):
    directory, _ = made
    run = forks.run("report", "--scores", directory / "scores", "--out", tmp_path / "r.html", *more, code=2)
    assert said in run.stderr
    assert not (tmp_path / "r.html").exists()


def test_what_does_not_go_together(made, forks, tmp_path):
    directory, _ = made
    other = write_large(tmp_path / "scores", 5)
    forks.run("select", "--scores", other, "--out", tmp_path / "selection")
    asked = ("report", "--scores", directory / "scores", "--out", tmp_path / "r.html")
    run = forks.run(*asked, "--selection", tmp_path / "selection", code=2)
    assert "other scores" in run.stderr
    (tmp_path / "r.html").write_text("mine")
    assert "--overwrite" in forks.run(*asked, code=2).stderr
    assert (tmp_path / "r.html").read_text() == "mine"


def test_rank_correlation():
    rng = np.random.default_rng(0)
    one, other = rng.integers(5, size=200), rng.normal(size=200)
    assert _spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert _spearman(np.ones(5), np.arange(5)) == 0
