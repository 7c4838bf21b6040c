"""The plot beside the live view's figures."""

import io

import pytest
from optuna.trial import FrozenTrial, create_trial
from rich.console import Console as RichConsole

from heretic.console import Console
from heretic.reporting import study_view
from heretic.reporting.study_view import StudyView, plot_lines
from heretic.reporting.text_plot import text_plot
from heretic.scoring.score_tables import Baseline


def test_points_stand_at_their_places_between_marked_axes() -> None:
    points = [(0.0, 100.0, "·"), (10.0, 0.0, "●"), (5.0, 50.0, "·"), (5.0, 50.0, "●")]
    assert text_plot(points, (0, 100), 21, 7) == [
        "100 ┤·",
        "    │",
        "    │",
        " 50 ┤          ●",
        "    │",
        "    │",
        "  0 ┤                   ●",
        "    └┬──────────────────┬─",
        "     0                 10",
    ]


@pytest.mark.parametrize("values", [[0.0], [0.3], [1e-9, 5.0], [0.0, 0.0], [0.001, 0.2, 90.0]])
@pytest.mark.parametrize("width", [10, 38, 60])
def test_every_point_is_seen_whatever_the_values(values: list[float], width: int) -> None:
    lines = text_plot([(value, i, "●") for i, value in enumerate(values)], (0, len(values)), width, 12)
    assert "".join(lines).count("●") == len(values)
    assert max(map(len, lines)) <= width + 8


def trial_of(number: int, refusals: int, divergence: float) -> FrozenTrial:
    parameters = {"attn.o_proj": {"max_weight": 1.0, "max_weight_position": 0.5, "min_weight": 0.0, "min_weight_distance": 0.5}}
    attributes = {"refusals": refusals, "kl_divergence": divergence, "direction_index": None, "parameters": parameters}
    trial = create_trial(values=[refusals, divergence], user_attrs=attributes)
    trial.number = number
    return trial


TRIALS = [trial_of(0, 9, 0.1), trial_of(1, 3, 0.5), trial_of(2, 9, 0.9), trial_of(3, 10, 1.0)]


def test_trials_of_the_front_are_told_apart() -> None:
    lines = plot_lines(TRIALS, TRIALS[:2], 10, 41, 11)
    assert lines[0].startswith("10 ┤") and lines[0].endswith("·"), "trial 3 in the upper right corner"
    assert lines[1].count("●") == 1 and lines[1].count("·") == 1
    assert "".join(lines).count("●") == 2 and "".join(lines).count("·") == 2


LEARNED = create_trial(values=[1.0, 0.1], user_attrs={"origin": "learned", "refusals": 1, "kl_divergence": 0.1})


@pytest.mark.parametrize(
    ("trials", "left"),
    [
        # After the second batch 12 of 24 trials are left, and 4 took 10 seconds; after the third 8, and 8 took 24.
        ([LEARNED], ["about 30 s left", "about 24 s left", "about 21 s left"]),
        # Without learned edits the first trials cannot be stopped early: 20 % less for 12 of 24 is 10 % less, for 8 a fifteenth.
        ([], ["about 27 s left", "about 22 s left", "about 19 s left"]),
    ],
)
def test_the_time_left_is_that_of_batches_after_the_first(
    monkeypatch: pytest.MonkeyPatch, trials: list[FrozenTrial], left: list[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(study_view.time, "monotonic", lambda: now)
    view = StudyView(Console(), 24, 4, Baseline(10, 10))
    told = []
    for batch, seconds in enumerate((100, 10, 14)):
        now += seconds
        told_of_batch = set()
        for i in range(4):
            attributes = {"seconds": seconds / 4, "refusals": 1, "kl_divergence": 0.1}
            view.show(create_trial(values=[0.0, 0.0], user_attrs=attributes), trials, 4 + 4 * batch + i + 1, 8 + 4 * batch)
            told_of_batch.add(view._times())
        told.append(view._times())
        assert told_of_batch == {told[-1]}, "the same with every trial of a batch"
    now += 3
    told.append(view._times())
    assert told == [
        "1 min 40 s elapsed",
        *(f"{e} elapsed, {t}" for e, t in zip(("1 min 50 s", "2 min 4 s", "2 min 7 s"), left, strict=True)),
    ]


def test_trials_of_others_that_are_shown_late_tell_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared study several trials may be done before the first of them is shown."""
    monkeypatch.setattr(study_view.time, "monotonic", lambda: 100.0)
    view = StudyView(Console(), 24, 4, Baseline(10, 10))
    for seconds in (1.0, 2.0):
        view.show(create_trial(values=[0.0, 0.0], user_attrs={"seconds": seconds, "refusals": 1, "kl_divergence": 0.1}), [], 8)
    assert view._times() == "0 s elapsed"


@pytest.mark.parametrize(("width", "has_plot"), [(120, True), (100, True), (80, False), (60, False)])
def test_the_live_view_shows_the_plot_beside_the_figures_where_there_is_room(width: int, has_plot: bool) -> None:
    console = Console()
    console.rich = RichConsole(width=width, force_terminal=True, color_system=None)
    view = StudyView(console, 10, 4, Baseline(10, 10))
    view.trials = TRIALS
    with console.rich.capture() as captured:
        console.rich.print(view._render())
    text = captured.get()
    assert ("Refusals by KL divergence, front ●" in text) == has_plot == ("┤" in text)
    assert all(len(line) <= width for line in text.splitlines())
    for trial in TRIALS:
        assert f"{trial.user_attrs['kl_divergence']:.4f}" in text, "no figure is squeezed out"


def test_a_study_without_any_refusal() -> None:
    """Neither the original nor a trial refuses, and something else is the objective."""
    trials = [trial_of(0, 0, 0.1), trial_of(1, 0, 0.3)]
    lines = plot_lines(trials, trials[:1], 0, 41, 11)
    assert "".join(lines).count("●") == 1 and "".join(lines).count("·") == 1
    view = StudyView(Console(), 3, 2, Baseline(10, 0), 7, (("kl_divergence", "minimize"),))
    view.trials = trials
    RichConsole(file=io.StringIO(), width=200, force_terminal=True).print(view._render())
