"""Axes of plots, for HTML and terminal: mapping values to positions, and tick values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# If positive values span a larger ratio than this, the axis is logarithmic.
LOG_RATIO = 30
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Axis:
    """Maps `low` to `start` and `high` to `end`, linearly or, with `log`, logarithmically. Values outside are clamped.

    With `integer`, ticks are integers.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    integer: bool = False

    def place(self, value: float) -> float:
        """The position of a value between `start` and `end`."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, n: int) -> list[float]:
        """About `n` tick values at most: 1, 2 or 5 times a power of ten."""
        return _log_ticks(self.low, self.high, n) if self.log else _linear_ticks(self.low, self.high, n, 1.0 if self.integer else 0.0)


def axis_for(values: Sequence[float], start: float, end: float, log: bool | None = None) -> Axis:
    """An axis that covers all `values` with a margin; `log` None: logarithmic if positive values span more than `LOG_RATIO`.

    On a logarithmic axis, zeros are at the lower end.
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
    """A value in its shortest form: `0.02`, `100`, `1e-05`."""
    return f"{value:g}"
