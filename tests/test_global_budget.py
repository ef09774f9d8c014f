"""Selection under constraints: the dual solver against cvxpy, linear programs, brute force and its own optimality."""

import itertools
import re
import sys
import warnings

import numpy as np
import pytest

from lark_fast.errors import UserError
from lark_fast.kernels.chi2 import chi2_weights
from lark_fast.selection.constrained import constrained_weights
from lark_fast.selection.constraints import NO_VALUE, Constraints, Share
from lark_fast.selection.global_budget import _bounded_quadratic
from lark_fast.selection.program import Candidates, chi2_of_problems, kkt_residuals, pose, solve_with_cvxpy

SAID = "limits.yaml"
KINDS = ("t", "g", "tg", "st", "sg", "stg", "r", "rtg")  # tokens, groups, samples, chi2 radius


def pool(seed):
    """A few ragged problems in any order: smooth, tied, offset, heavy-tailed and flat energies, holes, K = 1."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, size=int(rng.integers(2, 12)))
    if seed % 5 == 0:
        sizes[:] = 1 + seed % 3  # nothing or next to nothing to choose
    problem = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(problem)
    count = len(problem)
    e = rng.normal(size=count)
    if seed % 4 == 1:
        e = np.round(e)
    if seed % 4 == 2:
        e = 0.02 * e + 7  # the size and offset of real g_hat values
    if seed % 4 == 3:
        e = e**3
    if seed % 7 == 0:
        e[rng.random(count) < 0.2] = np.nan
        e[0] = 0.0
    if seed % 11 == 0:
        e[:] = 1.0
    return rng, Candidates(
        problem=problem,
        energies=e,
        n_tokens=rng.integers(1, 3000, size=count),
        groups={
            "teacher": (rng.integers(0, 3, size=count), ["a", "b", "c"]),
            "tag": (rng.integers(NO_VALUE, 2, size=count), ["x", "y"]),
        },
        prior=None if seed % 2 else rng.dirichlet(np.ones(count)) + 1e-3,
    )


def asked(rng, candidates, kind):
    """Constraints of a kind, some of which cannot hold, and what sets tau."""
    valid = ~np.isnan(candidates.energies)
    problems = np.unique(candidates.problem[valid])
    says = {}
    if "t" in kind:
        of_problem = [candidates.n_tokens[valid & (candidates.problem == n)] for n in problems]
        fewest, mean = (sum(map(f, of_problem)) for f in (min, np.mean))
        says["tokens"] = float(fewest + rng.random() * (mean - fewest)) + 1
    if "g" in kind:
        says["groups"] = {"teacher": {}}
        for code in set(candidates.groups["teacher"][0][valid]):
            least = 0.2 * rng.random()
            most = least if rng.random() < 0.1 else least + 0.6 * rng.random()
            share = Share(min=least if rng.random() < 0.6 else None, max=most if rng.random() < 0.7 else None)
            says["groups"]["teacher"]["abc"[code]] = share
        if rng.random() < 0.3:
            says["groups"]["tag"] = {"*": Share(max=0.3 + 0.5 * rng.random())}
    if "s" in kind:
        says["samples"] = float(len(problems) * rng.uniform(0.05, 1.0))
    if "r" in kind:
        says["chi2_radius"] = float(0.05 + 2 * rng.random())
    if rng.random() < 0.3:
        says["length_penalty"] = 1e-4 * float(rng.random())
    flags = {}
    if "s" in kind or ("r" not in kind and rng.random() < 0.4):
        flags["tau"] = float(rng.choice([0.01, 0.3, 3.0]))
    elif "r" not in kind:
        flags["budget"] = int(rng.integers(1, 4))
    return Constraints(source=SAID, **says), flags


def tried(candidates, constraints, solver, flags):
    """The weights, or None when the constraints cannot hold together."""
    try:
        found = constrained_weights(candidates, constraints, solver=solver, **flags)
    except UserError as error:
        assert "cannot" in str(error) or "infeasible" in str(error)  # noqa: PT017
        return None
    assert found.residual <= (1e-9 if solver == "dual" else 1e-6)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_dual_agrees_with_the_general_solver(kind):
    pytest.importorskip("cvxpy")
    solved = 0
    for seed in range(8 if "r" in kind else 16):
        rng, candidates = pool(seed)
        constraints, flags = asked(rng, candidates, kind)
        ours = tried(candidates, constraints, "dual", flags)
        theirs = tried(candidates, constraints, "cvxpy", flags)
        assert (ours is None) == (theirs is None), seed
        if ours is not None:
            solved += 1
            np.testing.assert_allclose(ours.weight, theirs.weight, rtol=0, atol=1e-6, err_msg=f"seed {seed}")
    assert solved >= 5  # not all of them infeasible


def written_out(candidates, constraints, budget, tau):
    """The program in the words of its definition, problem by problem, by another solver; (weights, objective)."""
    cp = pytest.importorskip("cvxpy")
    e = candidates.energies - constraints.length_penalty * candidates.n_tokens
    tokens, q = candidates.n_tokens, cp.Variable(len(e), nonneg=True)
    limits, linear, chi2 = [q[np.isnan(e)] == 0] if np.isnan(e).any() else [], 0, 0
    problems = np.unique(candidates.problem[~np.isnan(e)])
    for n in problems:
        of = np.flatnonzero((candidates.problem == n) & ~np.isnan(e))
        p = np.full(len(of), 1 / len(of)) if candidates.prior is None else candidates.prior[of]
        p = p / p.sum()
        limits.append(cp.sum(q[of]) <= 1 if constraints.samples else cp.sum(q[of]) == 1)
        order = of[np.argsort(-e[of])]
        ranked, mass = e[order], p[np.argsort(-e[of])]
        critical = [mass[:m] @ (ranked[:m] - ranked[m]) for m in range(1, len(of))]
        of_budget = [t for t in critical[(budget or 3) - 1 :] if t > 1e-12]
        of_n = tau or (1.0 if constraints.chi2_radius else of_budget[0] if of_budget else np.inf)
        linear += np.where(np.isfinite(of_n), e[of] / of_n, 0) @ q[of] if np.isfinite(of_n) else 0
        chi2 += cp.sum(cp.multiply(1 / p, cp.square(q[of] - p)))
    total = constraints.samples or len(problems)
    if constraints.samples:
        limits.append(cp.sum(q) == total)
    if constraints.tokens:
        limits.append(tokens / 1000 @ q <= constraints.tokens / 1000)
    for group, shares in constraints.groups.items():
        codes, names = candidates.groups[group]
        for code, name in enumerate(names):
            share = shares.get(name, shares.get("*", Share()))
            if share.min is not None:
                limits.append(cp.sum(q[codes == code]) >= share.min * total)
            if share.max is not None:
                limits.append(cp.sum(q[codes == code]) <= share.max * total)
    if constraints.chi2_radius:
        problem = cp.Problem(cp.Maximize(linear), [*limits, chi2 <= len(problems) * constraints.chi2_radius])
    else:
        problem = cp.Problem(cp.Maximize(linear - chi2 / 2), limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    objective = cp.Problem(problem.objective)
    if problem.status not in ("optimal", "optimal_inaccurate"):
        return None, None, None

    def value(weights):
        q.value = weights
        return objective.objective.value, max((limit.violation().max() for limit in limits), default=0.0)

    return q.value, problem.value, value


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_the_program_is_the_one_that_is_meant(seed):
    """Posed without any of our code: feasible, and the objective is not below an interior point's."""
    rng, candidates = pool(seed)
    constraints, flags = asked(rng, candidates, KINDS[seed // 2 % len(KINDS)])
    weights, best, value = written_out(candidates, constraints, flags.get("budget"), flags.get("tau"))
    ours = tried(candidates, constraints, "auto", flags)
    assert (ours is None) == (weights is None)
    if ours is None:
        return
    objective, violation = value(ours.weight)
    assert violation < 1e-8
    assert objective >= best - 1e-7 * max(1.0, abs(best))
    np.testing.assert_allclose(ours.weight, weights, rtol=0, atol=3e-3)  # an interior point leaves the root of its gap


@pytest.mark.parametrize("flags", [{}, {"budget": 1}, {"budget": 2}, {"budget": 50}, {"tau": 0.02}, {"tau": 5.0}])
@pytest.mark.parametrize("solver", ["auto", "dual"])
def test_what_does_not_bind_changes_nothing(flags, solver):
    """The closed form comes out bit for bit, and the dual comes to it as well: ties, flat problems, holes, K = 1."""
    e = np.array(
        [
            [3.0, 2.0, 1.0, 0.5, 0.2],
            [1.0, 1.0, 1.0, 1.0, 1.0],  # nothing to tell apart
            [2.0, 2.0, 2.0, 1.0, 0.0],  # the top 1 and 2 tie with the next
            [5.0, 4.0, 4.0, 3.0, 3.0],  # ties at the boundary
            [7.02, 7.01, np.nan, np.nan, np.nan],
            [0.1, np.nan, np.nan, np.nan, np.nan],
            [np.nan, np.nan, np.nan, np.nan, np.nan],
        ]
    )
    shuffled = np.random.default_rng(0).permutation(e.size)
    candidates = Candidates(
        problem=np.repeat([4, -1, 9, 2, 3, 7, 5], 5)[shuffled],
        energies=e.ravel()[shuffled],
        n_tokens=np.full(e.size, 10),
        groups={"teacher": (np.arange(e.size) % 2, ["a", "b"])},
    )
    loose = Constraints(source=SAID, tokens=60.0, groups={"teacher": {"*": Share(min=0.0, max=1.0)}})
    found = constrained_weights(candidates, loose, solver=solver, **flags)
    expected = chi2_weights(e, **flags).ravel()[shuffled]
    if solver == "auto":
        assert found.solver == "closed form"
        np.testing.assert_array_equal(found.weight, expected)
    else:
        np.testing.assert_allclose(found.weight, expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.weight > 0, expected > 1e-9)
    assert found.multipliers == {"budget.tokens": 0.0}


def test_a_token_budget_from_just_loose_to_the_fewest_there_are():
    rng = np.random.default_rng(1)
    problem, tokens = np.repeat(np.arange(40), 6), rng.integers(10, 5000, size=240)
    candidates = Candidates(problem=problem, energies=rng.normal(size=240), n_tokens=tokens)

    def within(limit):
        return constrained_weights(candidates, Constraints(source=SAID, tokens=limit), budget=3)

    free = chi2_weights(candidates.energies.reshape(40, 6), budget=3).ravel()
    np.testing.assert_array_equal(within(float(free @ tokens)).weight, free)
    np.testing.assert_allclose(within(float(free @ tokens) * (1 - 1e-7)).weight, free, rtol=0, atol=1e-5)
    fewest = tokens.reshape(40, 6).min(axis=1)
    tight = within(float(fewest.sum()))
    shortest = tokens.reshape(40, 6) == fewest[:, None]
    np.testing.assert_allclose(tight.weight, shortest.ravel(), rtol=0, atol=1e-9)
    spent = [within(float(x)).weight @ tokens for x in np.linspace(fewest.sum(), free @ tokens, 7)]
    np.testing.assert_allclose(spent, np.linspace(fewest.sum(), free @ tokens, 7), rtol=1e-9)
    with pytest.raises(UserError, match=f"no selection has fewer than {fewest.sum():,} tokens"):
        within(float(fewest.sum()) - 0.01)


def rows_at(e, p, tokens, tau):
    weights = chi2_weights(e, tau=tau, prior=p)
    held = weights > 1e-9
    return held.sum(), tokens[held].sum()


@pytest.mark.parametrize("with_prior", [False, True])
def test_rows_take_the_largest_tau_that_keeps_to_them(with_prior):
    rng = np.random.default_rng(2)
    e, tokens = rng.normal(size=(9, 7)), rng.integers(1, 100, size=(9, 7))
    e[rng.random(e.shape) < 0.2] = np.nan
    e[3] = np.round(e[3])
    prior = rng.dirichlet(np.ones(7), size=9) + 0.01 if with_prior else None
    candidates = Candidates(
        problem=np.repeat(np.arange(9), 7),
        energies=e.ravel(),
        n_tokens=tokens.ravel(),
        prior=None if prior is None else prior.ravel(),
    )
    valid = int((~np.isnan(e)).sum())
    for rows, row_tokens in [(11, None), (20, None), (33, None), (None, 700.0), (None, 1500.0), (25, 900.0), (25, 4e3)]:
        says = Constraints(source=SAID, rows=rows, row_tokens=row_tokens)
        found = constrained_weights(candidates, says)
        most = (rows or valid, row_tokens or np.inf)
        held = found.weight > 0
        assert held.sum() <= most[0]
        assert tokens.ravel()[held].sum() <= most[1]
        assert (held.sum(), tokens.ravel()[held].sum()) == rows_at(e, prior, tokens, found.tau)
        more = rows_at(e, prior, tokens, found.tau * (1 + 1e-6))
        assert more[0] > most[0] or more[1] > most[1]
    everything = constrained_weights(candidates, Constraints(source=SAID, rows=valid))
    assert everything.tau == np.inf
    assert np.count_nonzero(everything.weight) == valid


def test_samples_are_met_exactly_and_problems_compete():
    rng = np.random.default_rng(3)
    problem = np.repeat(np.arange(300), rng.integers(1, 12, size=300))
    candidates = Candidates(
        problem=problem, energies=0.02 * rng.normal(size=len(problem)) + 7, n_tokens=np.ones(len(problem), dtype=int)
    )
    for samples in (0.5, 100.0, 299.0, 300.0):
        found = constrained_weights(candidates, Constraints(source=SAID, samples=samples), tau=0.01)
        mass = np.bincount(problem, weights=found.weight)
        assert abs(mass.sum() - samples) <= 1e-9 * samples
        assert mass.max() <= 1 + 1e-12
    best = np.maximum.reduceat(candidates.energies, np.flatnonzero(np.diff(problem, prepend=-1)))
    few = constrained_weights(candidates, Constraints(source=SAID, samples=5.0), tau=1e-7)
    chosen = np.bincount(problem, weights=few.weight) > 0.5
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(np.argsort(-best)[:5]))


def test_a_radius_is_met_and_does_not_bind_where_it_cannot():
    rng = np.random.default_rng(4)
    problem, e = np.repeat(np.arange(50), 8), rng.normal(size=400)
    candidates = Candidates(problem=problem, energies=e, n_tokens=np.ones(400, dtype=int))
    for radius in (1e-3, 0.5, 3.0, 6.5):
        found = constrained_weights(candidates, Constraints(source=SAID, chi2_radius=radius))
        mean = 8 * np.square(found.weight - 1 / 8).sum() / 50
        assert abs(mean / radius - 1) < 1e-9
        np.testing.assert_allclose(
            found.weight, chi2_weights(e.reshape(50, 8), tau=found.tau).ravel(), rtol=0, atol=1e-9
        )
        assert found.multipliers["chi2_radius"] == pytest.approx(50 * found.tau / 2)
    loose = constrained_weights(candidates, Constraints(source=SAID, chi2_radius=7.5))  # 7 is the most there is
    assert loose.multipliers == {"chi2_radius": 0.0}
    np.testing.assert_array_equal(loose.weight.reshape(50, 8).argmax(axis=1), e.reshape(50, 8).argmax(axis=1))
    assert np.count_nonzero(loose.weight) == 50


def test_multipliers_are_what_a_unit_of_the_bound_is_worth():
    rng = np.random.default_rng(5)
    problem, e, tokens = np.repeat(np.arange(200), 10), rng.normal(size=2000), rng.integers(50, 900, size=2000)
    teacher = rng.integers(0, 4, size=2000)
    candidates = Candidates(problem=problem, energies=e, n_tokens=tokens, groups={"teacher": (teacher, list("abcd"))})

    def solved(tokens_=60_000.0, most=0.2, radius=None):
        says = {"tokens": tokens_, "groups": {"teacher": {"a": Share(max=most)}}, "chi2_radius": radius}
        return constrained_weights(candidates, Constraints(source=SAID, **says), **({} if radius else {"tau": 0.2}))

    def objective(found):
        return found.weight @ e / 0.2 - 10 * np.square(found.weight - 0.1).sum() / 2

    at = solved()
    step = 30.0
    gain = (objective(solved(tokens_=60_000 + step)) - objective(solved(tokens_=60_000 - step))) / (2 * step)
    assert gain == pytest.approx(at.multipliers["budget.tokens"], rel=1e-4)
    gain = (objective(solved(most=0.2005)) - objective(solved(most=0.1995))) / (0.001 * 200)
    assert gain == pytest.approx(at.multipliers["groups.teacher.a max"], rel=1e-3)

    ball = solved(radius=2.0)
    worth = [solved(radius=2.0 + d).weight @ e for d in (0.001, -0.001)]
    assert (worth[0] - worth[1]) / 0.002 == pytest.approx(ball.multipliers["chi2_radius"], rel=1e-3)
    worth = [solved(tokens_=60_000 + d, radius=2.0).weight @ e for d in (step, -step)]
    assert (worth[0] - worth[1]) / (2 * step) == pytest.approx(ball.multipliers["budget.tokens"], rel=1e-3)


@pytest.mark.parametrize("kind", ["tg", "stg", "rtg"])
def test_many_ragged_problems_meet_the_optimality_conditions(kind):
    """20,000 candidates, K from 1 to 400, against bounds and conditions written out here."""
    rng = np.random.default_rng(6)
    sizes = np.concatenate([rng.integers(1, 40, size=900), rng.integers(100, 400, size=10)])
    problem = np.repeat(np.arange(910), sizes)
    count = len(problem)
    e, tokens, teacher = (
        0.02 * rng.normal(size=count),
        rng.lognormal(7, 0.8, size=count),
        rng.integers(0, 5, size=count),
    )
    e[rng.random(count) < 0.05] = np.nan
    candidates = Candidates(problem=problem, energies=e, n_tokens=tokens, groups={"teacher": (teacher, list("abcde"))})
    total = 500.0 if "s" in kind else float(len(np.unique(problem[~np.isnan(e)])))
    says = {"tokens": 0.7 * tokens.mean() * total, "groups": {"teacher": {"a": Share(min=0.3), "*": Share(max=0.21)}}}
    says |= {"samples": total} if "s" in kind else {"chi2_radius": 4.0} if "r" in kind else {}
    found = constrained_weights(candidates, Constraints(source=SAID, **says), **({"tau": 0.01} if "s" in kind else {}))
    assert found.solver == "dual"
    q, z = found.weight, found.multipliers
    shares = np.bincount(teacher, weights=q) / total
    assert q @ tokens <= says["tokens"] * (1 + 1e-9)
    assert shares[0] >= 0.3 - 1e-9
    assert shares[1:].max() <= 0.21 + 1e-9
    assert z["budget.tokens"] > 0
    assert q @ tokens == pytest.approx(says["tokens"], rel=1e-9)
    assert (z["groups.teacher.a min"] > 0) == (abs(shares[0] - 0.3) < 1e-9)
    if kind == "tg":
        return
    # Stationarity, for one tau: (e - prices)/tau - (q/p - 1) is the same on a problem's support and not above off it.
    tau = found.tau
    price = z["budget.tokens"] * tokens - np.where(teacher == 0, z["groups.teacher.a min"], 0.0)
    price += np.array([0, *(z[f"groups.teacher.{name} max"] for name in "bcde")])[teacher]
    price = price / tau if "r" in kind else price
    price += z.get("budget.samples", 0.0)
    for n in range(910):
        of = np.flatnonzero((problem == n) & ~np.isnan(e))
        if len(of) == 0:
            continue
        slope = e[of] / tau - price[of] - (q[of] * len(of) - 1)
        held = q[of] > 0
        nu = slope[held].mean() if held.any() and (q[of].sum() > 1 - 1e-9 or "s" not in kind) else 0.0
        scale = max(1.0, np.abs(slope).max())
        np.testing.assert_allclose(slope[held], nu, rtol=0, atol=1e-9 * scale)
        assert (slope[~held] <= nu + 1e-9 * scale).all()


@pytest.mark.parametrize("seed", range(30))
def test_constraints_that_fight_are_named_and_none_is_named_in_vain(seed):
    """Against linear programs: what is named cannot hold, and can once any of it is left out."""
    optimize = pytest.importorskip("scipy.optimize")
    rng, candidates = pool(seed)
    constraints, _ = asked(rng, candidates, ("g", "tg", "sg", "stg")[seed % 4])
    program = pose(candidates, constraints, tau=0.3)
    sides, count = program.sides, len(program.energy)
    a = np.stack([sides.sign[c] * program.rows.row(int(sides.row[c]), slice(0, count)) for c in range(len(sides))])
    of_problem = np.repeat(np.arange(program.n_problems), program.sizes) == np.arange(program.n_problems)[:, None]

    def holds(chosen):
        equal = [c for c in chosen if sides.free[c]]
        below = [c for c in chosen if not sides.free[c]]
        sums, ones = of_problem.astype(float), np.ones(program.n_problems)
        upper, lower = [a[below]], [a[equal]]
        if program.competing:
            bounds = {"A_ub": np.vstack([*upper, sums]), "b_ub": np.append(sides.bound[below], ones)}
            bounds |= {"A_eq": lower[0], "b_eq": sides.bound[equal]} if equal else {}
        else:
            bounds = {"A_eq": np.vstack([*lower, sums]), "b_eq": np.append(sides.bound[equal], ones)}
            bounds |= {"A_ub": upper[0], "b_ub": sides.bound[below]} if below else {}
        return optimize.linprog(np.zeros(count), **bounds).status == 0

    everything = range(len(sides))
    if holds(everything):
        constrained_weights(candidates, constraints, tau=0.3)
        return
    with pytest.raises(UserError) as caught:
        constrained_weights(candidates, constraints, tau=0.3)
    listed = re.match(rf"--constraints {SAID}: (.*) cannot (?:both |all )?hold", str(caught.value)).group(1)
    named = [c for c in everything if sides.texts[c] in re.split(", | and ", listed)]
    assert len(named) == len(re.split(", | and ", listed))
    assert not holds(named)
    for c in named:
        assert holds([other for other in named if other != c])


def test_a_tiny_tau_is_followed_down_to():
    """Next to a linear program Newton's method sees flat faces only; this one it cannot do from scratch."""
    pytest.importorskip("cvxpy")
    _, candidates = pool(27)
    says = {"samples": 0.457, "length_penalty": 4.6e-5}
    says["groups"] = {"teacher": {"c": Share(min=0.004, max=0.454)}, "tag": {"*": Share(max=0.6275)}}
    constraints = Constraints(source=SAID, **says)
    ours, theirs = (constrained_weights(candidates, constraints, tau=0.01, solver=name) for name in ("dual", "cvxpy"))
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [1e-300, 1e-30, 1e-5, 1e30, 1e300])
def test_tau_of_any_size(tau):
    """It is met, or what float64 cannot resolve is refused; nothing overflows."""
    rng = np.random.default_rng(10)
    problem, e, tokens = np.repeat(np.arange(20), 5), rng.normal(size=100), rng.integers(1, 50, size=100)
    candidates = Candidates(problem=problem, energies=e, n_tokens=tokens)
    free = chi2_weights(e.reshape(20, 5), tau=tau).ravel()
    limit = 0.8 * float(free @ tokens)
    loose = constrained_weights(candidates, Constraints(source=SAID, tokens=1e9), tau=tau)
    np.testing.assert_allclose(loose.weight, free, rtol=0, atol=1e-9)
    says = Constraints(source=SAID, tokens=limit)
    if tau < 1e-6:
        with pytest.raises(UserError, match=rf"--tau {tau:g}: too small beside these energies .* give at least \de-06"):
            constrained_weights(candidates, says, tau=tau)
        return
    found = constrained_weights(candidates, says, tau=tau)
    assert found.weight @ tokens == pytest.approx(limit, rel=1e-9)
    np.testing.assert_allclose(found.weight.reshape(20, 5).sum(axis=1), 1.0, rtol=1e-12)
    if tau < 1:
        assert np.count_nonzero(found.weight) <= 21  # a vertex of the linear program: one row more than problems


@pytest.mark.parametrize("gap", [1e-4, 1e-7, 2e-9])
def test_near_ties_make_a_tiny_tau_for_some_problems(gap):
    """Top candidates that all but tie set T_B to the gap; the tie tolerance is 1e-9 of the spread."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 30))
        e, tokens = rng.normal(size=(n, 6)), rng.integers(1, 100, size=6 * n)
        e[::2, 1] = e[::2].max(axis=1) + gap * rng.random((n + 1) // 2)
        e[::2, 2] = e[::2].max(axis=1) + gap * rng.random((n + 1) // 2)
        limit = 0.7 * tokens.reshape(n, 6).min(axis=1).sum() + 0.3 * tokens.mean() * n
        candidates = Candidates(problem=np.repeat(np.arange(n), 6), energies=e.ravel(), n_tokens=tokens)
        found = constrained_weights(candidates, Constraints(source=SAID, tokens=float(limit)), budget=2)
        assert found.weight @ tokens <= limit * (1 + 1e-9)
        assert found.solver != "cvxpy"


def test_neither_order_nor_names_nor_split_priors_matter():
    rng = np.random.default_rng(7)
    problem, e, tokens = np.repeat(np.arange(30), 5), rng.normal(size=150), rng.integers(1, 50, size=150)
    says = Constraints(source=SAID, tokens=float(0.7 * tokens.mean() * 30))
    first = constrained_weights(Candidates(problem=problem, energies=e, n_tokens=tokens), says, tau=0.1)
    order = rng.permutation(150)
    moved = Candidates(problem=-7 * problem[order], energies=e[order], n_tokens=tokens[order])
    np.testing.assert_allclose(
        constrained_weights(moved, says, tau=0.1).weight, first.weight[order], rtol=0, atol=1e-10
    )
    # A candidate in two halves of its prior is the same candidate; one with prior 0 is none.
    halves = np.concatenate([np.arange(150), [0, 1]])
    prior = np.ones(152)
    prior[[0, 150]] = 0.5
    prior[151] = 0.0
    split = Candidates(problem=problem[halves], energies=e[halves], n_tokens=tokens[halves], prior=prior)
    weight = constrained_weights(split, says, tau=0.1).weight
    assert weight[151] == 0
    weight[0] += weight[150]
    np.testing.assert_allclose(weight[:150], first.weight, rtol=0, atol=1e-10)


def test_a_length_penalty_is_taken_off_the_energies():
    rng = np.random.default_rng(8)
    e, tokens = rng.normal(size=(20, 6)), rng.integers(1, 4000, size=(20, 6))
    candidates = Candidates(problem=np.repeat(np.arange(20), 6), energies=e.ravel(), n_tokens=tokens.ravel())
    found = constrained_weights(candidates, Constraints(source=SAID, length_penalty=1e-3), budget=2)
    np.testing.assert_array_equal(found.weight, chi2_weights(e - 1e-3 * tokens, budget=2).ravel())
    assert found.weight @ tokens.ravel() < chi2_weights(e, budget=2).ravel() @ tokens.ravel()


def test_bounded_quadratics_by_enumeration():
    """Every choice of coordinates at 0 tried; singular but for the damping, as group shares make them."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        m = int(rng.integers(1, 6))
        factor = rng.normal(size=(m, int(rng.integers(1, m + 1))))
        hessian, linear = factor @ factor.T + 1e-6 * np.eye(m), rng.normal(size=m)
        free, best = rng.random(m) < 0.2, (np.inf, None)
        for held in itertools.product([False, True], repeat=m):
            held = np.array(held) | free
            w = np.zeros(m)
            if held.any():
                w[held] = np.linalg.solve(hessian[np.ix_(held, held)], -linear[held])
            if (w[~free] >= 0).all():
                best = min(best, (w @ hessian @ w / 2 + linear @ w, w), key=lambda pair: pair[0])
        start = np.where(free, rng.normal(size=m), np.maximum(rng.normal(size=m), 0))
        found = _bounded_quadratic(hessian, linear, free, start)
        assert (found[~free] >= 0).all()
        np.testing.assert_allclose(found, best[1], rtol=1e-6, atol=1e-8)


def test_residuals_see_what_is_wrong():
    _, candidates = pool(6)
    program = pose(candidates, Constraints(source=SAID, tokens=1e4), tau=0.3)
    right = solve_with_cvxpy(program) if pytest.importorskip("cvxpy") else None
    assert max(kkt_residuals(program, right.weight, right.z, right.rate).values()) < 1e-8
    for weight, z, name in (
        (right.weight * 1.01, right.z, "problem"),
        (program.prior, right.z, "stationary"),
        (right.weight, right.z - 1.0, "sign"),
        (right.weight, right.z + 1.0, "stationary"),
    ):
        assert kkt_residuals(program, weight, z, right.rate)[name] > 1e-3
    tight = pose(
        candidates,
        Constraints(source=SAID, tokens=float(right.weight @ candidates.n_tokens[program.place]) / 2),
        tau=0.3,
    )
    assert kkt_residuals(tight, right.weight, right.z, right.rate)["constraint"] > 0.5
    within = pose(
        candidates, Constraints(source=SAID, chi2_radius=float(chi2_of_problems(program, right.weight).mean()) / 2)
    )
    assert kkt_residuals(within, right.weight, np.zeros(0), right.rate)["radius"] == pytest.approx(1.0)


def test_without_cvxpy_only_what_needs_it_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    _, candidates = pool(6)
    says = Constraints(source=SAID, tokens=1e5)
    constrained_weights(candidates, says)
    with pytest.raises(UserError, match=re.escape('pip install "lark-fast[solver]"')):
        constrained_weights(candidates, says, solver="cvxpy")


def test_lines_say_what_binds():
    rng = np.random.default_rng(9)
    candidates = Candidates(
        problem=np.repeat(np.arange(50), 4),
        energies=rng.normal(size=200),
        n_tokens=np.full(200, 1000),
        groups={"teacher": (np.tile(np.arange(4), 50), list("abcd"))},
    )
    says = Constraints(source=SAID, tokens=60_000.0, groups={"teacher": {"a": Share(min=0.5), "*": Share(max=0.4)}})
    lines = constrained_weights(candidates, says).lines
    assert lines[0] == "budget.tokens: weight x tokens 50,000 of at most 60,000, which does not bind"
    assert lines[1].startswith("groups.teacher.a min 0.5: 50.00% of the weight, multiplier ")
    assert lines[2] == "more bounds on shares that hold: 3"
