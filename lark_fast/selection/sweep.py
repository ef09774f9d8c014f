"""Selections side by side: what they share, what they cost, whom they prefer."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lark_fast.selection.config import SelectionSummary
from lark_fast.selection.weighing import Weighed
from lark_fast.tables import table

HISTOGRAM_EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


def overlaps(selections: Sequence[Weighed]) -> NDArray[np.float64]:
    """Jaccard similarity |A and B| / |A or B| of any two selections' rows, ``[S, S]``; 1 when both are empty."""
    size = 1 + max((int(one.rows[-1]) for one in selections if len(one.rows)), default=0)
    found = np.eye(len(selections))
    for i, a in enumerate(selections):
        chosen = np.zeros(size, dtype=bool)
        chosen[a.rows] = True
        for j, b in enumerate(selections[:i]):
            shared = int(np.count_nonzero(chosen[b.rows]))
            union = len(a.rows) + len(b.rows) - shared
            found[i, j] = found[j, i] = shared / union if union else 1.0
    return found


def weight_histogram(weighed: Weighed) -> list[int]:
    """How many rows have a weight in each interval of HISTOGRAM_EDGES, which are open below and closed above."""
    # Rows of weight 0, which only ties="reference" writes, count in the first.
    bins = np.searchsorted(HISTOGRAM_EDGES[1:-1], weighed.weight, side="left")
    return np.bincount(bins, minlength=len(HISTOGRAM_EDGES) - 1).tolist()


def comparison(selections: Mapping[str, Weighed], summaries: Mapping[str, SelectionSummary]) -> dict[str, Any]:
    """Facts of each selection by its name, and how much any two overlap, as JSON."""
    shared = overlaps(list(selections.values())).tolist()
    return {
        "selections": {
            name: {
                "rows": summary.rows,
                "problems": summary.problems - summary.problems_without_row,
                "tokens": summary.selected_tokens,
                "mean_effective_sample_size": summary.mean_effective_sample_size,
                "mean_chi2_divergence": summary.mean_chi2_divergence,
                "teachers": {teacher: shares["weight"] for teacher, shares in summary.teachers.items()},
                "weight_histogram": weight_histogram(selections[name]),
                "notes": summary.lines()[1:],
            }
            for name, summary in summaries.items()
        },
        "weight_histogram_edges": list(HISTOGRAM_EDGES),
        "jaccard": {a: dict(zip(selections, row, strict=True)) for a, row in zip(selections, shared, strict=True)},
    }


def as_markdown(compared: Mapping[str, Any]) -> str:
    """The comparison as tables for readers."""
    # A number each, for the columns of the last table.
    found = {f"{number} {name}": facts for number, (name, facts) in enumerate(compared["selections"].items(), 1)}
    teachers = sorted({teacher for facts in found.values() for teacher in facts["teachers"]})
    edges = compared["weight_histogram_edges"]
    bins = [f"{low:g}-{high:g}" for low, high in pairwise(edges)]
    main = table(
        ["selection", "rows", "problems", "tokens", "effective size", "chi2"],
        [
            [
                name,
                f"{facts['rows']:,}",
                f"{facts['problems']:,}",
                f"{facts['tokens']:,}",
                f"{facts['mean_effective_sample_size']:.2f}",
                f"{facts['mean_chi2_divergence']:.2f}",
            ]
            for name, facts in found.items()
        ],
    )
    shares = table(
        ["weight by teacher", *(teacher or "(none)" for teacher in teachers)],
        [[name, *(f"{facts['teachers'].get(t, 0):.1%}" for t in teachers)] for name, facts in found.items()],
    )
    histogram = table(
        ["rows by weight", *bins], [[name, *map("{:,}".format, f["weight_histogram"])] for name, f in found.items()]
    )
    overlap = table(
        ["overlap (Jaccard)", *(str(number) for number in range(1, len(found) + 1))],
        [
            [name, *(f"{value:.2f}" for value in row.values())]
            for name, row in zip(found, compared["jaccard"].values(), strict=True)
        ],
    )
    return "\n".join([main, shares, histogram, overlap])
