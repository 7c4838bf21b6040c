"""Axes of plots, for pages and terminals alike: values to places, and round values to mark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Positive values that lie further apart than this are shown on a logarithmic axis.
LOG_RATIO = 30
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Axis:
    """Maps `low` to `start` and `high` to `end`, straight or, with `log`, by their logarithms; values beyond go to the ends.

    With `whole` only whole numbers are marked.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between `start` and `end`."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, n: int) -> list[float]:
        """At most about `n` round values on the axis: 1, 2 or 5 times a power of ten."""
        return _log_ticks(self.low, self.high, n) if self.log else _linear_ticks(self.low, self.high, n, 1.0 if self.whole else 0.0)


def axis_for(values: Sequence[float], start: float, end: float, log: bool | None = None) -> Axis:
    """An axis that holds all `values` with a little room; `log` None: logarithmic where positive values lie far apart.

    On a logarithmic axis zeros lie at the lower end.
    """
    positive = [value for value in values if value > 0]
    if log is None:
        log = bool(positive) and max(positive) > LOG_RATIO * min(positive)
    if log and positive:
        return Axis(min(positive) / 1.3, max(positive) * 1.3, start, end, log=True)
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return Axis(0.0 if 0 <= low < high / 2 or low == high == 0 else low - room, high + room, start, end)


def _linear_ticks(low: float, high: float, n: int, least_step: float) -> list[float]:
    rough = max((high - low) / n, least_step)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in _STEPS if factor * unit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, n: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
        if len(ticks) <= n:
            return ticks
    return ticks[:: math.ceil(len(ticks) / n)]


def tick_label(value: float) -> str:
    """A value as short as it goes: `0.02`, `100`, `1e-05`."""
    return f"{value:g}"
