"""Base, slope and curvature of a cost curve: time = base + slope * vCPUs + curvature * vCPUs^2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TERMS = ("base", "slope", "curvature")
Terms = tuple[float, float, float]
RESAMPLES, SEED, LEAST_ROUNDS = 400, 20, 5
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Fit:
    """A curve through medians.

    Attributes:
        terms: base, slope, curvature; in the times' unit, per vCPU and per vCPU squared.
        low, high: bounds of each term's 95 % confidence interval; None below five rounds.
        worst: largest relative distance of a median from the curve.
    """

    terms: Terms
    low: Terms | None
    high: Terms | None
    worst: float

    def at(self, vcpus: float) -> float:
        """The curve's time."""
        return sum(term * vcpus**power for power, term in enumerate(self.terms))

    def document(self) -> dict[str, object]:
        """For JSON: each term with its interval."""
        return {name: {"value": self.terms[n], "low": self.low and self.low[n], "high": self.high and self.high[n]}
                for n, name in enumerate(TERMS)} | {"worst_relative_error": self.worst}


def fit_curve(samples: Mapping[int, Sequence[float]]) -> Fit | None:
    """Fit the medians by least squares of the relative error; None below four vCPU counts.

    The relative error, because a curve over three orders of magnitude would otherwise be fitted to its last points
    alone. The interval comes from resampling the rounds (bootstrap): samples of one round are neighbours in time and
    go together, so a machine that was slow for a while widens the interval.

    Args:
        samples: times by vCPU count; sample k of each count belongs to round k.
    """
    import numpy as np

    if len(samples) < len(TERMS) + 1:
        return None
    vcpus = np.array(sorted(samples), float)
    rounds = min(len(samples[int(n)]) for n in vcpus)
    table = np.array([samples[int(n)][:rounds] for n in vcpus], float)
    terms = _solve(vcpus, np.median(table, axis=1))
    low, high = _interval(vcpus, table) if rounds >= LEAST_ROUNDS else (None, None)
    errors = np.abs(np.polynomial.polynomial.polyval(vcpus, terms) / np.median(table, axis=1) - 1)
    return Fit(_three(terms), low, high, float(errors.max()))


def _interval(vcpus: NDArray[np.float64], table: NDArray[np.float64]) -> tuple[Terms, Terms]:
    import numpy as np

    rounds = table.shape[1]
    draws = np.random.default_rng(SEED).integers(0, rounds, (RESAMPLES, rounds))
    spread = np.array([_solve(vcpus, np.median(table[:, draw], axis=1)) for draw in draws])
    low, high = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return _three(low), _three(high)


def _solve(vcpus: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    powers = np.vander(vcpus, len(TERMS), increasing=True)
    return np.asarray(np.linalg.lstsq(powers / times[:, None], np.ones(len(times)), rcond=None)[0], np.float64)


def _three(values: NDArray[np.float64]) -> Terms:
    base, slope, curvature = (float(value) for value in values)
    return base, slope, curvature
