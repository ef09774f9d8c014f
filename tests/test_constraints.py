"""The constraints file: what it may say, and one clear line for everything else."""

import sys

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.selection.constrained import constrained_weights
from lark_fast.selection.constraints import NO_VALUE, Constraints, Share, linear_constraints, read_constraints
from lark_fast.selection.program import Candidates

EVERYTHING = """
budget: {samples: 50000, tokens: 2.0e7, rows: 100000, row_tokens: 2.0e8}
length_penalty: 1e-6
chi2_radius: 2
groups:
  teacher:
    qwq-32b: {min: 0.1, max: 0.5}
    "*": {max: 0.4}
  difficulty:
    3: {min: 0.2}
    true: {max: 0.25}
"""


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "limits.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def candidates(**changes):
    """Two problems of three candidates, teachers a, b, c in each."""
    settings = {
        "problem": np.array([0, 0, 0, 1, 1, 1]),
        "energies": np.array([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]),
        "n_tokens": np.array([100, 50, 10, 300, 200, 100]),
        "groups": {"teacher": (np.array([0, 1, 2, 0, 1, 2]), ["a", "b", "c"])},
    }
    return Candidates(**(settings | changes))


def test_a_file_says_all_that_it_can(write):
    path = write(EVERYTHING)
    read = read_constraints(path)
    assert read == Constraints(
        source=str(path),
        samples=50000.0,
        tokens=2.0e7,  # for YAML 1.1 this is text: no sign in the exponent
        rows=100000,
        row_tokens=2.0e8,
        length_penalty=1e-6,
        chi2_radius=2.0,
        groups={
            "teacher": {"qwq-32b": Share(min=0.1, max=0.5), "*": Share(max=0.4)},
            "difficulty": {"3": Share(min=0.2), "true": Share(max=0.25)},
        },
    )
    assert read.columns == ("difficulty",)


@pytest.mark.parametrize("text", ["length_penalty: 0.5", "budget:\n  tokens: 5\n", "groups: {tag: {x: {min: 0}}}"])
def test_a_file_may_say_one_thing(write, text):
    read_constraints(write(text))


@pytest.fixture
def usual_depth():
    """How deep calls may go, which a library that another test uses may have changed."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file says nothing; give at least one of: budget, length_penalty"),
        ("# only a comment\n", "the file says nothing"),
        ("{}", "the file says nothing"),
        ("budget:", "budget: says nothing; give at least one of: samples, tokens"),
        ("groups:", "groups: says nothing"),
        ("groups: {teacher: }", "groups.teacher: says nothing"),
        ("groups: {teacher: {a: }}", "groups.teacher.a: says nothing; give at least one of: min, max"),
        ("- 1\n- 2", "must be a mapping (key: value lines); got [1, 2]"),
        ("just text", "must be a mapping"),
        ("budget: 5", "budget: must be a mapping"),
        ("groups: {teacher: [a, b]}", "groups.teacher: must be a mapping"),
        ("groups: {teacher: {a: 0.5}}", "groups.teacher.a: must be a mapping"),
        ("budgets: {tokens: 5}", "budgets: unknown key; known are budget, length_penalty, chi2_radius, groups"),
        ("budget: {token: 5}", "budget.token: unknown key; known are samples, tokens, rows, row_tokens"),
        ("groups: {teacher: {a: {least: 0.1}}}", "groups.teacher.a.least: unknown key; known are min, max"),
        ("budget: {tokens: many}", "budget.tokens: must be a finite number above 0; got 'many'"),
        ("budget: {tokens: -5}", "budget.tokens: must be a finite number above 0; got -5"),
        ("budget: {tokens: 0}", "budget.tokens: must be a finite number above 0"),
        ("budget: {tokens: .nan}", "budget.tokens: must be a finite number above 0; got nan"),
        ("budget: {tokens: .inf}", "budget.tokens: must be a finite number above 0; got inf"),
        ("budget: {tokens: true}", "budget.tokens: must be a finite number above 0; got True"),
        ("budget: {tokens: [5]}", "budget.tokens: must be a finite number above 0; got [5]"),
        ("budget: {tokens: }", "budget.tokens: must be a finite number above 0; got None"),
        ("budget: {tokens: 1" + "0" * 400 + "}", "budget.tokens: must be a finite number above 0; got 1000"),
        ("budget: {rows: 2.5}", "budget.rows: must be a whole number of at least 1; got 2.5"),
        ("budget: {samples: 2026-01-01}", "budget.samples: must be a finite number above 0"),
        ("length_penalty: -1e-6", "length_penalty: must be a finite number of at least 0; got '-1e-6'"),
        ("chi2_radius: 0", "chi2_radius: must be a finite number above 0; got 0"),
        ("groups: {teacher: {a: {max: 1.5}}}", "groups.teacher.a.max: is a share of the total weight, from 0 to 1"),
        (
            "groups: {teacher: {a: {max: 50%}}}",
            "groups.teacher.a.max: must be a finite number of at least 0; got '50%'",
        ),
        ("groups: {teacher: {a: {min: 0.5, max: 0.2}}}", "groups.teacher.a: min 0.5 is above max 0.2; lower min or"),
        ("groups: {t: {a: {min: 0.7}, b: {min: 0.4}}}", "groups.t: the minima sum to 1.1, and shares sum to 1; lower"),
        ("budget: {tokens: 5, tokens: 6}", ":1: not YAML: the key 'tokens' comes twice; mend it"),
        ('groups:\n  d:\n    1: {min: 0}\n    "1": {max: 1}', ":4: not YAML: the key '1' comes twice; mend it"),
        ("budget:\n  tokens: 5\n rows: 6", ":3: not YAML: "),
        ("budget: {tokens: 5", ":1: not YAML: "),
        ("a: !!python/object/apply:os.system ['true']", ":1: not YAML: "),
        ("? [a, b]\n: 1", ":1: not YAML: found unhashable key"),
        ("\t", ":1: not YAML: "),
        (b"budget: \xff", "not UTF-8 text"),
        ("a: \x00", "not YAML: "),
        ("[" * 600, "nested too deeply"),
    ],
)
def test_what_a_file_must_not_say(write, text, said, usual_depth):
    path = write(text)
    with pytest.raises(UserError) as caught:
        read_constraints(path)
    message = str(caught.value)
    assert message.startswith(f"--constraints {path}:")
    assert said in message
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_constraints(path)


@pytest.mark.parametrize(
    ("says", "flags", "said"),
    [
        ({"tokens": 5.0}, {"budget": 3, "tau": 1.0}, "--budget and --tau: give one"),
        ({"rows": 5}, {"budget": 3}, "budget.rows sets tau itself; leave --budget out"),
        ({"row_tokens": 5.0}, {"tau": 3.0}, "budget.row_tokens sets tau itself; leave --tau out"),
        ({"chi2_radius": 5.0}, {"tau": 3.0}, "chi2_radius sets tau itself; leave --tau out"),
        ({"rows": 5, "chi2_radius": 5.0}, {}, "budget.rows and chi2_radius: each sets the shared tau"),
        ({"samples": 5.0}, {}, "budget.samples lets problems compete, which needs one tau for all; give --tau"),
        ({"samples": 5.0}, {"budget": 2}, "give --tau instead of --budget"),
        ({"samples": 5.0, "chi2_radius": 1.0}, {}, "budget.samples and chi2_radius: samples needs --tau"),
        ({"samples": 5.0, "rows": 10}, {}, "budget.samples and budget.rows: samples needs --tau"),
        ({"rows": 5, "tokens": 10.0}, {}, "budget.rows and budget.tokens: rows can be counted beforehand only"),
        ({"row_tokens": 5.0, "groups": {"teacher": {"a": Share(max=0.5)}}}, {}, "budget.row_tokens and groups: "),
    ],
)
def test_what_does_not_go_together(says, flags, said):
    with pytest.raises(UserError) as caught:
        constrained_weights(candidates(), Constraints(source="f.yaml", **says), **flags)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("says", "flags", "said"),
    [
        (
            {"groups": {"teacher": {"d": Share(max=0.5)}}},
            {},
            "groups.teacher.d: no candidate has this value; mend or remove it; there are 'a', 'b', 'c'",
        ),
        (
            {"groups": {"teacher": {"a": Share(min=0.5), "*": Share(min=0.3)}}},
            {},
            'groups.teacher: with "*" for each value that is not named the minima sum to 1.1',
        ),
        ({"samples": 2.5}, {"tau": 1.0}, "budget.samples 2.5: more than the 2 problems that have candidates"),
        ({"rows": 1}, {}, "budget.rows 1: below one row a problem (ties included); give at least 2"),
        (
            {"row_tokens": 399.0},
            {},
            "budget.row_tokens 399: below the tokens of one row a problem (ties included); give",
        ),
        ({"length_penalty": 1e308}, {}, "length_penalty 1e+308: energies overflow; lower it"),
        ({"tokens": 109.0}, {}, "budget.tokens 109 cannot hold: no selection has fewer than 110 tokens; raise it"),
        (
            {"groups": {"teacher": {"a": Share(max=0.2), "b": Share(max=0.3), "c": Share(max=0.4)}}},
            {},
            "groups.teacher.a max 0.2, groups.teacher.b max 0.3 and groups.teacher.c max 0.4 cannot all hold: with the "
            "rest kept, no selection gives groups.teacher.a less than 0.3; loosen one of them",
        ),
        (
            {"tokens": 150.0, "groups": {"teacher": {"a": Share(min=0.5, max=0.9), "b": Share(max=0.4)}}},
            {},
            "budget.tokens 150 and groups.teacher.a min 0.5 cannot both hold: with the rest kept, no selection has "
            "fewer than 200 tokens; loosen one of them",
        ),
        (
            {"samples": 0.5, "tokens": 4.0},
            {"tau": 1.0},
            "budget.samples 0.5 and budget.tokens 4 cannot both hold: with the rest kept, no selection has fewer "
            "than 5 tokens; loosen one of them",
        ),
        (
            {"chi2_radius": 0.1, "tokens": 112.0, "groups": {"teacher": {"b": Share(max=0.9)}}},
            {},
            "chi2_radius 0.1 and budget.tokens 112 cannot both hold: with the rest kept, the mean chi2 is at least",
        ),
    ],
)
def test_what_these_candidates_cannot_meet(says, flags, said):
    with pytest.raises(UserError) as caught:
        constrained_weights(candidates(), Constraints(source="f.yaml", **says), **flags)
    assert str(caught.value).startswith(f"--constraints f.yaml: {said}")
    assert "\n" not in str(caught.value)


def test_arrays_that_do_not_fit():
    constraints = Constraints(source="f.yaml", tokens=1e9, groups={"teacher": {"a": Share(max=0.9)}})
    for changes, said in (
        ({"n_tokens": np.ones(5)}, "n_tokens must have the shape"),
        ({"problem": np.zeros((6, 1))}, "problem must have the shape"),
        ({"groups": {"teacher": (np.zeros(4, dtype=int), ["a"])}}, "groups\\['teacher'\\] must have the shape"),
        ({"groups": {}}, "lacks 'teacher', which f.yaml asks for"),
        ({"energies": np.full(6, np.nan)}, "there is no candidate"),
        ({"energies": np.array([1, 2, np.inf, 0, 0, 0])}, "energies: candidate 2 is inf"),
        ({"n_tokens": np.array([1, 2, 3, -4, 5, 6])}, "n_tokens: candidate 3 is -4"),
        ({"prior": np.array([1, 2, 3, 4, np.nan, 6])}, "prior: candidate 4 is nan"),
        ({"prior": np.zeros(6)}, "there is no candidate"),
        (
            {"groups": {"teacher": (np.full(6, 3), ["a", "b", "c"])}},
            "groups\\['teacher'\\]: candidate 0 has the code 3",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            constrained_weights(candidates(**changes), constraints)
    for flags, said in (({"budget": 0}, "budget"), ({"tau": 0.0}, "tau"), ({"solver": "simplex"}, "solver")):
        with pytest.raises(ValueError, match=f"^{said} must be"):
            constrained_weights(candidates(), constraints, **flags)


def test_rows_say_what_they_add_up():
    """A q, A^T z and single rows against the matrix written out; a candidate without a value counts in no share."""
    rng = np.random.default_rng(0)
    codes, tokens = rng.integers(NO_VALUE, 3, size=50), rng.integers(1, 9, size=50).astype(float)
    shares = {"x": Share(min=0.1, max=0.5), "*": Share(max=0.6)}
    says = Constraints(source="f.yaml", samples=7.0, tokens=20.0, groups={"tag": shares})
    rows, sides = linear_constraints(says, {"tag": (codes, ["x", "y", "z"])}, tokens, 7.0)
    dense = np.stack([np.ones(50), tokens / tokens.mean(), *(codes == value for value in range(3)), codes == NO_VALUE])
    part = slice(10, 40)
    for index in range(len(rows)):
        np.testing.assert_array_equal(rows.row(index, part), dense[index, part])
    with pytest.raises(IndexError):
        rows.row(len(rows), part)
    z, q = rng.normal(size=len(rows)), rng.random(30)
    np.testing.assert_allclose(rows.adjoint(z, part), dense[:, part].T @ z, rtol=1e-14)
    np.testing.assert_allclose(rows.times(q, part), dense[:, part] @ q, rtol=1e-14)
    assert dict(zip(sides.names, (sides.sign * sides.bound * sides.unit).round(12), strict=True)) == {
        "budget.samples": 7.0,
        "budget.tokens": 20.0,
        "groups.tag.x min": 0.7,
        "groups.tag.x max": 3.5,
        "groups.tag.y max": 4.2,
        "groups.tag.z max": 4.2,
    }
