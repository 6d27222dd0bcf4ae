"""95% intervals of ratios and means from few measurements, for all figures: ``ratio_interval``, ``mean_interval``.

The plain percentile bootstrap is too narrow for few rounds. With 5 rounds it covers the true ratio in 81 to 89% of all
experiments instead of 95%. So it is widened in two ways, and the farther end of the two counts:

- *expanded percentiles*: the level of the quantiles is that of Student's t, with the factor sqrt(n / (n - 1));
- *t with the bootstrap's standard error*, for 2 to 5 values, where no quantile reaches far enough.

Both are from T. Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69(4), 2015,
sections 5.4 and 5.2. In simulations, the interval of a ratio covers the truth in at least 94% of all experiments,
mostly in 96 to 98%. They had noise of 3 and 20%, with and without outliers and drift, and 3 to 60 rounds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import DataError

_Array: TypeAlias = "npt.NDArray[np.float64]"
_Values: TypeAlias = "Sequence[float] | npt.NDArray[np.float64]"

_N_DRAWS = 2000
_TRIM = 0.2  # share of log ratios dropped at either end: for disturbed runs; without any, better than the median
# Quantile of Student's t at 97.5% with 1 to 10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, from ``n`` measurements; the ends are NaN from fewer than 2."""

    value: float
    low: float
    high: float
    n: int

    def excludes(self, x: float = 1.0) -> bool:
        """Whether ``x`` is outside: 1 for a ratio, 0 for a difference. False if the ends are NaN."""
        return self.low > x or self.high < x


def ratio_interval(a: _Values, b: _Values) -> Interval:
    """Return the ratio ``a / b``, pair by pair: a slow moment that affects both sides of a pair cancels out.

    ``a[i]`` and ``b[i]`` are positive and of one round. The value is the exponential of the mean log ratio, without a
    fifth of the log ratios at either end. ``ratio_interval(b, a)`` is its reciprocal.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise DataError(f"cannot pair shapes {first.shape} and {second.shape}; give one measurement of each per round")
    if not (np.isfinite(first) & np.isfinite(second) & (first > 0) & (second > 0)).all():
        raise DataError("a ratio needs positive finite measurements; leave out rounds without a result")
    log = _interval(np.log(first) - np.log(second), _trimmed_mean)
    value, low, high = np.exp((log.value, log.low, log.high)).tolist()
    return Interval(value, low, high, log.n)


def mean_error(values: _Values) -> tuple[float, float]:
    """Return the mean of independent values and its standard error, NaN for fewer than 2 values."""
    x = _items(values)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def mean_interval(values: _Values) -> Interval:
    """Return the mean of independent values, one per item (items, not tokens, are independent), and its interval.

    Show the number of items beside it: five right answers of five give 1 to 1, values with a long tail need about 60.
    """
    return _interval(_items(values), lambda x: np.asarray(x.mean(axis=-1)))


def _items(values: _Values) -> _Array:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise DataError(f"there is no mean of values of the shape {x.shape}; give at least one item")
    return x


def _trimmed_mean(x: _Array) -> _Array:
    k = int(_TRIM * x.shape[-1])
    return np.asarray(np.sort(x, axis=-1)[..., k : x.shape[-1] - k].mean(axis=-1))


def _interval(x: _Array, estimate: Callable[[_Array], _Array]) -> Interval:
    n, value = len(x), float(estimate(x))
    if n < 2:
        return Interval(value, math.nan, math.nan, n)
    draws = estimate(x[np.random.default_rng(0).integers(0, n, (_N_DRAWS, n))])
    df, z = n - 1, NormalDist().inv_cdf(0.975)
    # Quantiles of Student's t at 97.5%: the table, then the expansion of Abramowitz and Stegun, 26.7.5.
    t = _T[df - 1] if df <= len(_T) else z + (z**3 + z) / 4 / df + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / df**2
    widening = t * math.sqrt(n / df)
    half = widening * float(draws.std())
    tail = NormalDist().cdf(-widening)
    low, high = np.quantile(draws, (tail, 1 - tail)).tolist()
    return Interval(value, min(low, value - half), max(high, value + half), n)
