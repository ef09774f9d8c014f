"""The report: what it says is what was scored and selected, and nothing that a pool holds does anything in it."""

import base64
import hashlib
import json
import re
import shutil
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import spearmanr

from lark_fast.errors import UserError
from lark_fast.evaluation.measures import measure
from lark_fast.evaluation.results import write_results
from lark_fast.ranks import rank_correlation
from lark_fast.rendering.renderer import RenderOptions
from lark_fast.report.config import ReportConfig
from lark_fast.report.measures import weighted_median
from lark_fast.report.run import make_report
from lark_fast.report.shown import Token, _ends, choose
from lark_fast.report.sources import Scores, read_selection
from lark_fast.report.texts import NAME_BYTES, labels, page_bytes, short, tails, without_middle
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.selection.run import SelectConfig, select
from tests.command import write_jsonl, write_student
from tests.reports import HARMFUL, NAMES, run, write_harmful, write_large
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
def made(tmp_path_factory):
    """A harmful pool scored, selected from and reported, by the real commands."""
    directory = tmp_path_factory.mktemp("report")
    pool, student = write_harmful(directory)
    run("score", "--pool", pool, "--student", student, "--out", directory / "scores", "--per-token",
              "--dtype", "float32")  # fmt: skip
    select = ("select", "--scores", directory / "scores", "--pool", pool, "--out", directory / "selection")
    run(*select, "--budget", 2, "--where", "correct")
    printed = run("report", "--scores", directory / "scores", "--selection", directory / "selection",
                  "--out", directory / "report.html")  # fmt: skip
    return directory, printed


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


def test_no_other_script_may_run(page):
    (policy,) = [value for _, value in page.attributes if value and value.startswith("default-src 'none'")]
    wanted = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    (allowed,) = re.findall(r"script-src ([^;]*);", policy)
    assert allowed.split() == [f"'sha256-{digest}'" for digest in wanted]


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
    _, printed = made
    assert not [
        c for c in printed.stdout + printed.stderr if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"
    ]


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


def test_candidates_are_compared_as_the_selection_did(made):
    directory, _ = made
    scores = Scores(str(directory / "scores"))
    selection = read_selection(str(directory / "selection"), scores)
    lines = [json.loads(line)["meta"] for line in (directory / "selection/train.jsonl").read_text().splitlines()]
    written = {(line["problem_id"], line["candidate_id"]): line["g_hat"] for line in lines}
    scored = table(directory / "scores")
    keys = list(zip(scored["problem_id"].to_pylist(), scored["candidate_id"].to_pylist(), strict=True))
    assert {keys[row]: selection.g_hat[row] for row in np.flatnonzero(selection.weight)} == written
    assert sum(np.isnan(selection.g_hat)) == 12
    for problem in choose(scores, selection, 24):
        assert [bool(one.removed) for one in problem.candidates] == [False] * 4 + [True] * 3


def test_pngs(made):
    directory, printed = made
    figures = sorted((directory / "report-figures").iterdir())
    assert len(figures) > 8
    for figure in figures:
        assert figure.suffix == ".png"
        head = figure.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert int.from_bytes(head[16:20], "big") >= 1200
    assert f"{len(figures)} figures" in printed.stdout


def copied(directory, to, **identity):
    """The scores, with a manifest that says something else."""
    shutil.copytree(directory / "scores", to, dirs_exist_ok=True)
    manifest = json.loads((directory / "scores/manifest.json").read_text())
    manifest["identity"] |= identity
    (to / "manifest.json").write_text(json.dumps(manifest))
    return str(to)


def test_tokens_that_were_not_stored_are_scored_once_more(made, page, tmp_path):
    directory, _ = made
    plain = ReportConfig(scores=copied(directory, tmp_path / "scores", per_token=False), out=str(tmp_path / "r.html"))
    assert "--student" in make_report(plain).notes[-1]
    assert Page(tmp_path / "r.html").heat == 0
    make_report(replace(plain, student=str(directory / "student"), overwrite=True))
    titles = [[value for name, value in one.attributes if name == "title"] for one in (page, Page(tmp_path / "r.html"))]
    assert sorted(titles[0]) == sorted(titles[1])


def test_another_student(made, tmp_path):
    """A student that was replaced since costs the colours; one that is named and does not fit is an error."""
    directory, _ = made
    other = copied(directory, tmp_path / "scores", tokenizer="0" * 64)
    asked = ReportConfig(scores=other, out=str(tmp_path / "r.html"))
    assert "has another tokenizer" in make_report(asked).notes[-1]
    named = replace(asked, student=str(directory / "student"), overwrite=True)
    with pytest.raises(UserError, match="has another tokenizer"):
        make_report(named)
    copied(directory, tmp_path / "scores", student="0" * 64, per_token=False)
    with pytest.raises(UserError, match="its weights are others"):
        make_report(named)


def test_a_pool_that_is_gone(made, tmp_path):
    directory, _ = made
    scores = copied(directory, tmp_path / "scores")
    manifest = json.loads((tmp_path / "scores/manifest.json").read_text())
    manifest["config"]["pool"] = [str(tmp_path / "gone.jsonl")]
    (tmp_path / "scores/manifest.json").write_text(json.dumps(manifest))
    summary = make_report(ReportConfig(scores=scores, out=str(tmp_path / "r.html")))
    assert "--pool" in " ".join(summary.notes)
    found = Page(tmp_path / "r.html")
    assert "details" in found.tags
    assert "alert(1)" not in found.text


@pytest.fixture(scope="module", params=[10, 10_000])
def large(request, tmp_path_factory):
    """Made-up scores, a selection from them, and their report."""
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


def test_why_a_candidate_was_chosen(tmp_path):
    scores = Scores(str(write_large(tmp_path / "scores", 50)))
    select(SelectConfig(scores=str(scores.directory), out=str(tmp_path / "selection"), budget=3))
    for problem in choose(scores, read_selection(str(tmp_path / "selection"), scores), 10):
        best = max(one.g_hat for one in problem.candidates if not one.weight)
        assert f"above g_hat {best:.4g}," in problem.why
        assert all((one.g_hat > best) == (one.weight > 0) for one in problem.candidates)


def test_texts_and_names_of_any_size(tmp_path):
    """8 MB if it were all shown."""
    wide, name = "\U000f0000", "\U0001f600&<" * 500
    records = [
        {
            "problem_id": f"{problem}{name}",
            "candidate_id": f"{name}{candidate}{name}",
            "teacher": f"{name}{candidate}{name}",
            "messages": [
                {"role": "user", "content": f"Problem {problem}?"},
                {"role": "assistant", "content": f"It is {candidate}. " + wide * 2_500 + "The end."},
            ],
        }
        for problem in range(20)
        for candidate in range(8)
    ]
    write_jsonl(tmp_path / "pool.jsonl", records)
    scores = tmp_path / "scores"
    score_pool(
        ScoreConfig(
            pool=(str(tmp_path / "pool.jsonl"),), student=str(write_student(tmp_path / "student")), out=str(scores),
            dtype="float32", workers=0, options=RenderOptions(max_length=64),
        )
    )  # fmt: skip
    summary = make_report(ReportConfig(scores=str(scores), out=str(tmp_path / "r.html"), problems=20))
    assert MOST_BYTES / 2 < summary.size < MOST_BYTES
    page = Page(tmp_path / "r.html")
    assert page.text.count("It is 3. \\U000f0000") == page.text.count("\\U000f0000The end.") / 8 == 20
    assert len({one["teacher"] for one in page.rows("nll-teacher")}) == 8


def test_what_is_left_of_texts():
    text = "".join(HARMFUL) * 20
    for budget in (0, 1, 7, 100, 999):
        shown, cut = without_middle(text, budget, "")
        assert page_bytes(shown) <= budget
        assert len(shown) == len(text) - cut
        half = len(shown) // 3
        assert text.startswith(shown[:half])
        assert text.endswith(shown[len(shown) - half :])
        assert page_bytes(shown) > budget - 2 * 10
    assert without_middle(text, page_bytes(text)) == (text, 0)
    assert short("a" * NAME_BYTES) == "a" * NAME_BYTES
    assert labels(["a", "a", "\x1b", "\\x1b", ""]) == ["a", "a (2)", "\\x1b", "\\x1b (2)", "(no name)"]
    assert tails(["x/a", "y/b"]) == ["a", "b"]
    assert tails(["x/a/eval", "x/b/eval", "x/c"]) == ["a/eval", "b/eval", "x/c"]
    assert tails(["a", "a"]) == ["a", "a"]


def test_what_is_left_of_tokens():
    tokens = [Token(text=str(place), nll=1.0) for place in range(1000)]
    assert _ends(tokens, 10**6) == (tuple(tokens), 0)
    shown, cut = _ends(tokens, 6_500)
    assert len(shown) == 1000 - cut + 1
    assert 95 < len(shown) < 105
    gap = len(shown) // 2
    assert (*shown[:gap], *shown[gap + 1 :]) == (*tokens[:gap], *tokens[gap + cut :])
    assert f"{cut} tokens" in shown[gap].text


def test_training_and_evaluation(made, tmp_path):
    directory, _ = made
    for name, start in (("one/run", 3.0), ("two/run", 2.5)):
        (tmp_path / name).mkdir(parents=True)
        steps = [{"step": step, "loss": start / (1 + step), "lr": 1e-4} for step in range(1000)]
        write_jsonl(tmp_path / name / "metrics.jsonl", steps)
    right = np.arange(6)[:, None] < 4
    no, levels = np.zeros((6, 1)), [f"<level {place % 2}>" for place in range(6)]
    found = measure(right, right[:, 0], unanswered=no, cut=no, tokens=no, groups=levels)
    (tmp_path / "<e>").mkdir()
    write_results(tmp_path / "<e>", [], {"model": "m", "settings": {}, "benchmarks": {"<b>": found.as_json()}})
    run("report", "--scores", directory / "scores", "--checkpoint", tmp_path / "one/run", "--checkpoint",
              tmp_path / "two/run", "--eval", tmp_path / "<e>", "--out", tmp_path / "r.html")  # fmt: skip
    page = Page(tmp_path / "r.html")
    curve = page.rows("loss")
    assert {one["name"] for one in curve} == {"one/run", "two/run"}
    assert len(curve) <= 2 * 400
    assert "66.7 %" in page.text
    assert "<e>" in page.text
    assert "<b> <level 1>" in page.text
    assert "No selection is shown" in page.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scores": "nowhere"}, "no manifest.json"),
        ({"selection": "nowhere"}, "lark-fast select"),
        ({"pool": ("nowhere.jsonl",)}, "does not exist"),
        ({"student": "nowhere/at/all"}, "no such directory"),
        ({"checkpoints": ("nowhere",)}, "no metrics.jsonl"),
        ({"evaluations": ("nowhere",)}, "no summary.json"),
        ({"out": "report"}, ".html"),
        ({"out": "nowhere/report.html"}, "there is no directory"),
        ({"problems": 101}, "--problems 101"),
    ],
    ids=["scores", "selection", "pool", "student", "checkpoint", "eval", "out", "parent", "problems"],
)
def test_bad_input(made, tmp_path, more, said):
    asked = {"scores": str(made[0] / "scores"), "out": str(tmp_path / "r.html")}
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        make_report(ReportConfig(**asked | more))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "r.html").exists()


def test_what_does_not_go_together(made, tmp_path):
    directory, _ = made
    other = write_large(tmp_path / "scores", 5)
    run("select", "--scores", other, "--out", tmp_path / "selection")
    asked = ("report", "--scores", directory / "scores", "--out", tmp_path / "r.html")
    assert "other scores" in run(*asked, "--selection", tmp_path / "selection", code=2).stderr
    (tmp_path / "r.html").write_text("mine")
    assert "--overwrite" in run(*asked, code=2).stderr
    assert (tmp_path / "r.html").read_text() == "mine"


def test_weighted_median():
    rng = np.random.default_rng(0)
    values, weight = rng.integers(9, size=50), rng.integers(4, size=50)
    assert weighted_median(values, weight.astype(float)) == np.quantile(
        np.repeat(values, weight), 0.5, method="inverted_cdf"
    )


def test_rank_correlation():
    rng = np.random.default_rng(0)
    one, other = rng.integers(5, size=200), rng.normal(size=200)
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation(np.ones(5), np.arange(5)) == 0
