"""Places on axes and round marks."""

import math

import pytest

from heretic.reporting.axis import Axis, axis_for, tick_label


def test_a_straight_axis_maps_its_ends_and_keeps_what_lies_beyond_at_them() -> None:
    axis = Axis(10, 20, 100, 0)
    assert [axis.place(value) for value in (10, 15, 20, 5, 25)] == [100, 50, 0, 100, 0]


def test_a_logarithmic_axis_gives_each_decade_the_same_length() -> None:
    axis = Axis(0.001, 1, 0, 300, log=True)
    assert [axis.place(value) for value in (0.001, 0.01, 0.1, 1)] == pytest.approx([0, 100, 200, 300])
    assert axis.place(0) == 0


@pytest.mark.parametrize(
    ("low", "high", "n", "ticks"),
    [
        (0, 100, 5, [0, 20, 40, 60, 80, 100]),
        (-3, 103, 6, [0, 20, 40, 60, 80, 100]),
        (0.0021, 0.0232, 6, [0.005, 0.01, 0.015, 0.02]),
        (0, 7, 5, [0, 2, 4, 6]),
    ],
)
def test_marks_of_a_straight_axis_are_round(low: float, high: float, n: int, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 1).ticks(n) == ticks


def test_marks_of_a_logarithmic_axis_are_as_many_as_fit() -> None:
    axis = Axis(0.0009, 1.1, 0, 1, log=True)
    assert axis.ticks(10) == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1] or len(axis.ticks(10)) <= 10
    assert axis.ticks(4) == [0.001, 0.01, 0.1, 1]
    assert Axis(1e-9, 10, 0, 1, log=True).ticks(4) == [1e-9, 1e-6, 1e-3, 1]


@pytest.mark.parametrize("values", [[0.002, 0.02], [0.0, 0.0], [5.0], [], [0.0, 0.01, 2.0], [1e-6, 3.0], [0.0, 1e-12], [7.0, 7.0]])
def test_an_axis_holds_all_its_values_with_room(values: list[float]) -> None:
    axis = axis_for(values, 0, 100)
    assert axis.low < axis.high and (not axis.log or axis.low > 0)
    for value in values:
        assert 0 <= axis.place(value) <= 100 and math.isfinite(axis.place(value))
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks(5))


def test_values_far_apart_make_an_axis_logarithmic() -> None:
    assert axis_for([0.001, 1.0], 0, 1).log and not axis_for([0.1, 1.0], 0, 1).log
    assert not axis_for([0.001, 1.0], 0, 1, log=False).log


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (100.0, "100"), (0.005, "0.005"), (1e-05, "1e-05")])
def test_labels_are_short(value: float, text: str) -> None:
    assert tick_label(value) == text
