r"""Forecasts whose errors are bounded by Bernstein's inequality, in place of normal quantiles.

Of n residuals with the variance v and the extent e (largest less smallest), the mean is off by more than

    w = sqrt(2 v log(2 / d) / n) + 7 e log(2 / d) / (3 (n - 1))

with a chance of d at most (Maurer and Pontil 2009, theorem 4: the empirical Bernstein inequality), here d = risk / B of
each winner. The Brier score is bounded, and nll is not: the extent is that which has been seen of the problem's
residuals. What is forecast of the remaining T - n of T tokens is then off by (T - n)/T w, which stands where a standard
deviation times the quantile stands otherwise, two of them joined as these are.

Stated assumptions: residuals are independent draws, the later ones of the same distribution as the earlier (no drift),
and none is beyond what has been seen. Nothing is assumed of that distribution's form, and it is the heavy tail of nll
which makes such intervals wide.
"""

import math

import numpy as np
from numpy.typing import NDArray

from lark_fast.racing.forecast import Forecaster


class BernsteinForecaster(Forecaster):
    """See ``Forecaster``."""

    def _spread(
        self, residuals: NDArray[np.float64], seen: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shrunk, _ = super()._spread(residuals, seen)
        known, rules = self.count(seen), self._rules
        log = math.log(2 * rules.budget / rules.risk)
        mean = self._sum(residuals) / known
        variance = np.maximum(0.0, self._sum(residuals**2) / known - mean**2) * known / np.maximum(1, known - 1)
        extent = float(residuals.max() - residuals.min())
        width = np.sqrt(2 * variance * log / known) + 7 * extent * log / (3 * np.maximum(1, known - 1))
        return shrunk, (self.lengths - known) / self.lengths * width / rules.deviations
