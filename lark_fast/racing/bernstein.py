r"""Forecasts whose errors are bounded by Bernstein's inequality, in place of normal quantiles.

Of n independent draws with the variance v and the extent e (largest less smallest), the mean lies further below its
expectation than

    w(n) = sqrt(2 v log(2 / d) / n) + 7 e log(2 / d) / (3 (n - 1))

with a chance of d at most (Maurer and Pontil 2009, theorem 4: the empirical Bernstein inequality), and as well further
above it; here d = risk / B of each winner. A forecast puts the mean of the n residuals that are known in place of the
mean of the T - n others, and either may lie apart from what is expected:

    |error of the mean| <= (T - n)/T (min(w(n), e) + min(w(T - n), e)).

The Brier score is bounded, and nll is not: e is the extent that has been seen of the problem's residuals. v of the
others is that of those that are known.

Stated assumptions: residuals are independent draws of one distribution (no drift), and none is beyond what has been
seen; the errors of two candidates are joined as independent ones are, by the root of their squares. Nothing is assumed
of the distribution's form, and it is the heavy tail of nll that makes such bounds wide.
"""

import math

import numpy as np
from numpy.typing import NDArray

from lark_fast.racing.forecast import Forecaster


class BernsteinForecaster(Forecaster):
    """See ``Forecaster``; its errors are bounds already."""

    @property
    def quantile(self) -> float:
        """See ``Forecaster``."""
        return 1.0

    def _spread(
        self, residuals: NDArray[np.float64], seen: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shrunk, _ = super()._spread(residuals, seen)
        known, rules = self.count(seen), self._rules
        rest, log = self.lengths - known, math.log(2 * rules.budget / rules.risk)
        mean = self._sum(residuals) / known
        variance = np.maximum(0.0, self._sum(residuals**2) / known - mean**2) * known / np.maximum(1, known - 1)
        extent = float(residuals.max() - residuals.min())

        def width(n: NDArray[np.int64]) -> NDArray[np.float64]:
            found = np.sqrt(2 * variance * log / np.maximum(1, n)) + 7 * extent * log / (3 * np.maximum(1, n - 1))
            return np.minimum(found, extent)

        return shrunk, rest / self.lengths * (width(known) + width(rest))
