"""The running search: a live view in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.measure import measure_renderables
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..console import Console
from ..scoring.score_tables import Baseline, format_figure, title_of, verdict_columns, verdicts_text
from ..specifications import DEFAULT_OBJECTIVES, Objectives
from ..study.front import ablation_of, is_learned, pareto_front, score_of
from ..utils import format_duration
from .tables import describe_direction, other_scores
from .text_plot import text_plot

LAST_TRIALS = 6
FRONT_ROWS = 8
# The plot of the search is shown next to the tables if there is room.
MIN_PLOT_WIDTH, PLOT_WIDTH, PLOT_HEIGHT = 24, 60, 15
PLOT_AXIS_WIDTH = 12  # labels and margin
# Trials are stopped early if others dominate them, so they take less time once there are others: about this share of a search without
# learned edits (measured on a 135M model, see bench/LOG.md).
SAVED_LATER = 0.2


class StudyView:
    """The running search: live tables in a terminal, a line for each trial elsewhere."""

    def __init__(
        self,
        console: Console,
        n_trials: int,
        n_done: int,
        baseline: Baseline,
        last_layer: int | None = None,
        objectives: Objectives = DEFAULT_OBJECTIVES,
    ) -> None:
        self.console = console
        self.objectives = objectives
        self.n_trials = n_trials
        self.n_done = n_done
        self.baseline = baseline
        self.last_layer = last_layer
        self.trials: list[FrozenTrial] = []
        self.note = ""
        self._start = time.monotonic()
        # When each batch ended, and how many trials were done then. All trials of a batch have the same seconds.
        self._batches: list[tuple[float, int]] = []
        self._last_seconds: float | None = None
        self._live: Live | None = None

    def __enter__(self) -> "StudyView":
        if self.console.is_terminal:
            self._live = Live(console=self.console.rich, refresh_per_second=2, get_renderable=self._render, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def show(self, latest: FrozenTrial, trials: Sequence[FrozenTrial], n_done: int, n_scored: int | None = None) -> None:
        """Update the view with the trials so far; `latest` has just finished. `n_scored`: with those that are shown next."""
        self.trials, self.n_done = list(trials), n_done
        if self._batches and latest.user_attrs.get("seconds") == self._last_seconds:
            self._batches.pop()
        self._batches.append((time.monotonic(), n_done if n_scored is None else n_scored))
        self._last_seconds = latest.user_attrs.get("seconds")
        if latest.state == TrialState.FAIL:
            self.console.warning(f"Trial {latest.number} failed: {latest.user_attrs.get('failure', 'interrupted')}")
        elif self._live is None:
            front = ", ".join(map(self._point, self._front()))
            attributes = latest.user_attrs
            known = attributes.get("sequence_kl_divergence")
            sequence = "" if known is None else f" (sequence {known:.4f})"
            others = [f"{title_of(name)} {format_figure(score_of(latest, name))}" for name in self._others]
            self.console.message(
                f"Trial {self.n_done}/{self.n_trials}: {verdicts_text(attributes, self.baseline)}, "
                f"KL divergence {attributes['kl_divergence']:.4f}{sequence}; {''.join(f'{text}; ' for text in others)}{self._times()}; "
                f"front: {front}"
            )

    @property
    def _others(self) -> list[str]:
        """Objectives that a trial's line does not show anyway."""
        return [name for name, _ in self.objectives if name not in ("refusals", "kl_divergence", "sequence_kl_divergence")]

    def _point(self, trial: FrozenTrial) -> str:
        """A trial's objectives in short: `refusals at divergence` for the default objectives."""
        if self.objectives == DEFAULT_OBJECTIVES:
            return f"{trial.user_attrs['refusals']} at {trial.user_attrs['kl_divergence']:.4f}"
        return " / ".join(format_figure(score_of(trial, name)) for name, _ in self.objectives)

    def say(self, note: str) -> None:
        """Show a message that stays on the screen."""
        self.note = note
        if self._live is None:
            self.console.message(note)

    def _front(self) -> list[FrozenTrial]:
        return pareto_front(self.trials, self.objectives)

    def _times(self) -> str:
        text = f"{format_duration(time.monotonic() - self._start)} elapsed"
        left = self._seconds_left()
        return text if left is None else f"{text}, about {format_duration(left)} left"

    def _seconds_left(self) -> float | None:
        """None until two batches are done: the first one warms up, and none of its trials can be stopped for being dominated."""
        if len(self._batches) < 2 or self.n_done >= self.n_trials:
            return None
        (begun, n_before), (last, n_done) = self._batches[0], self._batches[-1]
        if n_done <= n_before:  # of a shared study: others had finished these before the first of them was shown
            return None
        n_left = self.n_trials - n_done
        left = (last - begun) / (n_done - n_before) * n_left
        if not any(map(is_learned, self.trials)):
            left *= 1 - SAVED_LATER * n_left / self.n_trials
        return max(0.0, left - (time.monotonic() - last))

    def _render(self) -> Group:
        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self._times()))
        bar.add_task("Trials", total=self.n_trials, completed=self.n_done)
        parts: list[object] = [bar.make_tasks_table(bar.tasks)]
        front = self._front()
        last = [trial for trial in self.trials if trial.state == TrialState.COMPLETE][-LAST_TRIALS:]
        if front:
            parts.append(
                self._beside_plot(front, self._table("Best so far", front[:FRONT_ROWS], len(front)), self._table("Last trials", last))
            )
        parts.append(self.note or "[dim]Ctrl+C stops within seconds; finished trials are kept.[/]")
        return Group(*parts)  # type: ignore[arg-type]

    def _beside_plot(self, front: Sequence[FrozenTrial], *tables: Table) -> Group | Table:
        screen = self.console.rich
        taken = measure_renderables(screen, screen.options, tables).maximum
        width = min(PLOT_WIDTH, screen.width - taken - PLOT_AXIS_WIDTH)
        if width < MIN_PLOT_WIDTH:
            return Group(*tables)
        plot = Text("\n".join(plot_lines(self.trials, front, self.baseline.refusals or 0, width, PLOT_HEIGHT)), no_wrap=True)
        title = Text("Refusals by KL divergence, front ●", style="italic")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Group(*tables), Group(title, plot))
        return grid

    def _table(self, title: str, trials: Sequence[FrozenTrial], n_all: int | None = None) -> Table:
        more = f" ({n_all - len(trials)} more)" if n_all is not None and n_all > len(trials) else ""
        table = Table(title=title + more, title_justify="left")
        others = other_scores(trials, self.objectives)
        verdicts = verdict_columns(trials, self.baseline)
        for header in ("Trial", *verdicts, "KL divergence", *map(title_of, others), "Direction"):
            table.add_column(escape(header), justify="right")
        for trial in trials:
            figures = [f"{trial.user_attrs['kl_divergence']:.4f}", *(format_figure(score_of(trial, name)) for name in others)]
            direction = describe_direction(ablation_of(trial), self.last_layer)
            table.add_row(str(trial.number), *(cell(trial.user_attrs) for cell in verdicts.values()), *figures, direction)
        return table


def plot_lines(trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], base_refusals: int, width: int, height: int) -> list[str]:
    """A text plot of complete trials by KL divergence and refusals, those of the front drawn on top."""
    numbers = {trial.number for trial in front}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    ordered = sorted(complete, key=lambda trial: trial.number in numbers)
    points = [(t.user_attrs["kl_divergence"], t.user_attrs["refusals"], "●" if t.number in numbers else "·") for t in ordered]
    return text_plot(points, (0, max([1, base_refusals, *(refusals for _, refusals, _ in points)])), width, height)
