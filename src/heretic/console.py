"""Everything that is printed: live in a terminal, plain lines without control codes elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import measure_renderables
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .config import DEFAULT_OBJECTIVES, Objectives
from .editing.ablation import Ablation
from .loading.trust import screen_text
from .parameters import Choice, Range
from .reporting.residual_geometry import LayerGeometry
from .reporting.text_plot import text_plot
from .scoring.score_tables import finalist_rows, format_figure, refusals_text, title_of
from .session.answers import can_ask
from .study.search import ablation_of, pareto_front, score_of
from .study.space import SearchSpace
from .utils import format_duration

# Steps shorter than this are not worth a second line where the output is no terminal.
WORTH_SAYING_SECONDS = 5.0
LAST_TRIALS = 6
FRONT_ROWS = 8
# The plot of the search stands beside the tables where they leave room for it.
MIN_PLOT_WIDTH, PLOT_WIDTH, PLOT_HEIGHT = 24, 60, 15
PLOT_AXIS_WIDTH = 12  # its labels and the space between


class _Screen(RichConsole):
    """Rich's console. Only its own codes control the terminal, not those that a text brings."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(screen_text(segment.text), segment.style)


class Console:
    """The screen. Implements `utils.Progress`."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.can_ask = can_ask()
        width = None if self.is_terminal else 10_000
        self.rich = _Screen(highlight=False, width=width, no_color=not self.is_terminal, emoji=False)
        self.errors = _Screen(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 10_000, emoji=False)

    def message(self, text: str) -> None:
        self.rich.print(escape(text))

    def warning(self, text: str) -> None:
        self.rich.print(f"[yellow]Warning:[/] {escape(text)}")

    def error(self, text: str) -> None:
        """An error in plain words, on the standard error stream."""
        self.errors.print(f"[bold red]Error:[/] {escape(text)}")

    def heading(self, text: str) -> None:
        """The title of a stage of the run."""
        self.rich.print(f"\n[bold]{escape(text)}[/]")

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = time.monotonic()
        if self.is_terminal:
            with _bar(self.rich, total) as bar:
                task = bar.add_task(escape(description), total=total)
                yield lambda n: bar.advance(task, n)
            self.rich.print(f"[dim]{escape(description)}: {format_duration(time.monotonic() - start)}[/]")
            return
        self.message(f"{description} ...")
        yield lambda n: None
        seconds = time.monotonic() - start
        if seconds >= WORTH_SAYING_SECONDS:
            self.message(f"{description}: done in {format_duration(seconds)}")

    def search_space(self, space: SearchSpace, parting: int, last_layer: int) -> None:
        """Where the search looks, in fractions with the layers beside."""
        lines = [f"Harmless and harmful prompts part in layer {parting}. Searched:", *describe_space(space, last_layer)]
        self.message("\n  ".join(lines))

    def front(
        self,
        front: Sequence[FrozenTrial],
        last_layer: int | None,
        base_refusals: int | None,
        objectives: Objectives = DEFAULT_OBJECTIVES,
    ) -> None:
        """The Pareto front as a table."""
        self.rich.print(front_table(front, last_layer, base_refusals, objectives))

    def finalists(self, front: Sequence[FrozenTrial], known: Mapping[str, Any]) -> None:
        """What came of scoring trials of the front again, where that was done (`finalists.known_finalists`)."""
        headers, rows = finalist_rows(front, known)
        if not rows:
            return
        conditions = known["conditions"]
        title = (
            f"Scored again on {known['n_bad_prompts']} harmful and {known['n_good_prompts']} harmless prompts, "
            f"{conditions['max_response_length']} tokens at most (in brackets 95 % bootstrap intervals)"
        )
        table = Table(title=title, title_justify="left")
        for header in headers:
            table.add_column(escape(header), justify="right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table)

    def columns(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts, wrapped in their columns."""
        table = Table(title=escape(title), show_lines=True, expand=self.is_terminal)
        for header in headers:
            table.add_column(escape(header), ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table)

    def residual_geometry(self, layers: Sequence[LayerGeometry]) -> None:
        """A table of how residuals lie in each layer."""
        table = Table(title="Residual geometry", title_justify="left", caption=_GEOMETRY_CAPTION, caption_justify="left")
        for header in ("Layer", *_GEOMETRY_HEADERS):
            table.add_column(header, justify="right", no_wrap=self.is_terminal is False)
        for layer in layers:
            _, *values = astuple(layer)
            cells = [
                f"{value:.4g}" if header.startswith("|") else f"{value:.3f}"
                for header, value in zip(_GEOMETRY_HEADERS, values, strict=True)
            ]
            table.add_row("embedding" if layer.layer is None else str(layer.layer), *cells)
        self.rich.print(table)


_GEOMETRY_HEADERS = "S(g,b) S(g*,b*) S(g,r) S(g*,r*) S(b,r) S(b*,r*) |g| |g*| |b| |b*| |r| |r*| Silhouette".split()
_GEOMETRY_CAPTION = (
    "g, b: means of the residuals of harmless and harmful prompts; g*, b*: their geometric medians; r = b - g, r* = b* - g*; "
    "S: cosine similarity; |.|: norm; Silhouette: 1 well apart, 0 mixed."
)


def _bar(console: RichConsole, total: int | None) -> Progress:
    counted = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) if total else ()
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn(), console=console, transient=True)


def describe_direction(ablation: Ablation, last_layer: int | None) -> str:
    """`per layer`, or the index with the layer beside it."""
    index = ablation.direction_index
    if index is None:
        return "per layer"
    return f"{index:.2f}" + ("" if last_layer is None else f" (layer {index * last_layer:.1f})")


def describe_component(ablation: Ablation, component: str, last_layer: int | None) -> str:
    """The kernel in short: greatest weight at its position, smallest at its distance, with layers beside the fractions."""
    p = ablation.parameters[component]
    place, reach = f"{p.max_weight_position:.2f}", f"{p.min_weight_distance:.2f}"
    if last_layer is not None:
        place += f" (layer {p.max_weight_position * last_layer:.1f})"
        reach += f" ({p.min_weight_distance * last_layer:.1f} layers)"
    return f"{p.max_weight:.2f} at {place}, {p.min_weight:.2f} at ±{reach}"


def describe_space(space: SearchSpace, last_layer: int) -> list[str]:
    """What is searched, layers beside the fractions: the direction, then each component's kernel, components alike together."""
    texts = []
    if "global" in space.direction_scope:
        index = space.direction_index
        texts.append(f"directions at {_between(index)} (layer {_between(index, last_layer)})")
    kernels: dict[str, list[str]] = {}
    for component, kernel in space.components.items():
        place, reach = kernel.max_weight_position, kernel.min_weight_distance
        text = (
            f"{_between(kernel.max_weight)} at {_between(place)} (layer {_between(place, last_layer)}), "
            f"{_between(kernel.min_weight)} of it at ±{_between(reach)} ({_between(reach, last_layer)} layers)"
        )
        kernels.setdefault(text, []).append(component)
    return texts + [f"{', '.join(components)}: {kernel}" for kernel, components in kernels.items()]


def _between(choice: Choice, last_layer: int | None = None) -> str:
    """`0.60 to 1.00`, or a constant; as layers, where the last one's index is given."""
    ends = (choice.low, choice.high) if isinstance(choice, Range) else (choice,)
    return " to ".join(dict.fromkeys(f"{end:.2f}" if last_layer is None else f"{end * last_layer:.1f}" for end in ends))


def other_scores(trials: Sequence[FrozenTrial], objectives: Objectives) -> list[str]:
    """Scores shown beside the usual two: the sequence KL divergence where all trials have it, and what else is an objective."""
    known = trials and all("sequence_kl_divergence" in trial.user_attrs for trial in trials)
    names = (["sequence_kl_divergence"] if known else []) + [name for name, _ in objectives]
    return [name for name in dict.fromkeys(names) if name not in ("refusals", "kl_divergence")]


def trial_rows(
    trials: Sequence[FrozenTrial], last_layer: int | None, base_refusals: int | None, objectives: Objectives = DEFAULT_OBJECTIVES
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows that describe trials: scores, then what was done."""
    others = other_scores(trials, objectives)
    components = list(ablation_of(trials[0]).parameters) if trials else []
    headers = ["#", "Trial", "Refusals", "KL divergence", *map(title_of, others), "Direction", *components]
    rows = []
    for i, trial in enumerate(trials):
        ablation = ablation_of(trial)
        kernels = [describe_component(ablation, component, last_layer) for component in components]
        scores = [str(i), str(trial.number), refusals_text(trial, base_refusals), f"{trial.user_attrs['kl_divergence']:.4f}"]
        scores += [format_figure(score_of(trial, name)) for name in others]
        rows.append([*scores, describe_direction(ablation, last_layer), *kernels])
    return headers, rows


def front_table(
    front: Sequence[FrozenTrial], last_layer: int | None, base_refusals: int | None, objectives: Objectives = DEFAULT_OBJECTIVES
) -> Table:
    """The Pareto front; the first column is what `--trial-index` counts."""
    headers, rows = trial_rows(front, last_layer, base_refusals, objectives)
    table = Table(title="Pareto front (# is the trial index)", title_justify="left")
    numbers = headers[: headers.index("Direction")]
    for header in headers:
        table.add_column(escape(header), justify="right" if header in numbers else "left", no_wrap=header in numbers)
    for row in rows:
        table.add_row(*row)
    return table


class StudyView:
    """The search as it goes: a live table in a terminal, a line for each trial elsewhere."""

    def __init__(
        self,
        console: Console,
        n_trials: int,
        n_done: int,
        base_refusals: int,
        last_layer: int | None = None,
        objectives: Objectives = DEFAULT_OBJECTIVES,
    ) -> None:
        self.console = console
        self.objectives = objectives
        self.n_trials = n_trials
        self.n_done = n_done
        self.base_refusals = base_refusals
        self.last_layer = last_layer
        self.trials: list[FrozenTrial] = []
        self.note = ""
        self._start = time.monotonic()
        self._n_before = n_done
        self._live: Live | None = None

    def __enter__(self) -> "StudyView":
        if self.console.is_terminal:
            self._live = Live(console=self.console.rich, refresh_per_second=2, get_renderable=self._render, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def show(self, latest: FrozenTrial, trials: Sequence[FrozenTrial], n_done: int) -> None:
        """Take note of the trials so far, `latest` of which has just finished."""
        self.trials, self.n_done = list(trials), n_done
        if latest.state == TrialState.FAIL:
            self.console.warning(f"Trial {latest.number} failed: {latest.user_attrs.get('failure', 'cut off')}")
        elif self._live is None:
            front = ", ".join(map(self._point, self._front()))
            attributes = latest.user_attrs
            known = attributes.get("sequence_kl_divergence")
            sequence = "" if known is None else f" (sequence {known:.4f})"
            others = [f"{title_of(name)} {format_figure(score_of(latest, name))}" for name in self._others]
            self.console.message(
                f"Trial {self.n_done}/{self.n_trials}: {_refusals(latest, self.base_refusals)}, "
                f"KL divergence {attributes['kl_divergence']:.4f}{sequence}; {''.join(f'{text}; ' for text in others)}{self._times()}; "
                f"front: {front}"
            )

    @property
    def _others(self) -> list[str]:
        """Objectives that a trial's line would not show."""
        return [name for name, _ in self.objectives if name not in ("refusals", "kl_divergence", "sequence_kl_divergence")]

    def _point(self, trial: FrozenTrial) -> str:
        """A trial's objectives in short: the usual two as refusals at a divergence."""
        if self.objectives == DEFAULT_OBJECTIVES:
            return f"{trial.user_attrs['refusals']} at {trial.user_attrs['kl_divergence']:.4f}"
        return " / ".join(format_figure(score_of(trial, name)) for name, _ in self.objectives)

    def say(self, note: str) -> None:
        """A remark that stays on the screen."""
        self.note = note
        if self._live is None:
            self.console.message(note)

    def _front(self) -> list[FrozenTrial]:
        return pareto_front(self.trials, self.objectives)

    def _times(self) -> str:
        elapsed = time.monotonic() - self._start
        text = f"{format_duration(elapsed)} elapsed"
        run = self.n_done - self._n_before
        if run and self.n_done < self.n_trials:
            text += f", about {format_duration(elapsed / run * (self.n_trials - self.n_done))} left"
        return text

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
        parts.append(self.note or "[dim]Ctrl+C stops after the running trials; everything finished is kept.[/]")
        return Group(*parts)  # type: ignore[arg-type]

    def _beside_plot(self, front: Sequence[FrozenTrial], *tables: Table) -> Group | Table:
        screen = self.console.rich
        taken = measure_renderables(screen, screen.options, tables).maximum
        width = min(PLOT_WIDTH, screen.width - taken - PLOT_AXIS_WIDTH)
        if width < MIN_PLOT_WIDTH:
            return Group(*tables)
        plot = Text("\n".join(plot_lines(self.trials, front, self.base_refusals, width, PLOT_HEIGHT)), no_wrap=True)
        title = Text("Refusals by KL divergence, front ●", style="italic")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Group(*tables), Group(title, plot))
        return grid

    def _table(self, title: str, trials: Sequence[FrozenTrial], n_all: int | None = None) -> Table:
        more = f" ({n_all - len(trials)} more)" if n_all is not None and n_all > len(trials) else ""
        table = Table(title=title + more, title_justify="left")
        others = other_scores(trials, self.objectives)
        for header in ("Trial", "Refusals", "KL divergence", *map(title_of, others), "Direction"):
            table.add_column(escape(header), justify="right")
        for trial in trials:
            figures = [f"{trial.user_attrs['kl_divergence']:.4f}", *(format_figure(score_of(trial, name)) for name in others)]
            direction = describe_direction(ablation_of(trial), self.last_layer)
            table.add_row(str(trial.number), refusals_text(trial, self.base_refusals), *figures, direction)
        return table


def plot_lines(trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], base_refusals: int, width: int, height: int) -> list[str]:
    """Complete trials by KL divergence and refusals as lines of text, those of the front above the others."""
    numbers = {trial.number for trial in front}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    ordered = sorted(complete, key=lambda trial: trial.number in numbers)
    points = [(t.user_attrs["kl_divergence"], t.user_attrs["refusals"], "●" if t.number in numbers else "·") for t in ordered]
    return text_plot(points, (0, max([1, base_refusals, *(refusals for _, refusals, _ in points)])), width, height)


def _refusals(trial: FrozenTrial, base_refusals: int) -> str:
    """`9/100 refusals`, with how many of them are degenerate where any is."""
    text, bracket, degenerate = refusals_text(trial, base_refusals).partition(" (")
    return f"{text} refusals{bracket}{degenerate}"
