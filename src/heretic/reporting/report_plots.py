"""The main plots of a report as PNG files, drawn by matplotlib (extra `research`)."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import ReportError
from ..study.front import is_finished
from .learned import strength_curves
from .report import Facts, staircase

DOT, FRONT = "#8d8d86", "#1f5fbf"
BARS = (FRONT, "#7c8f1e", "#c2410c")
DPI = 150

matplotlib.use("Agg", force=False)  # only files are written; keeps a backend that the user has chosen


def write_plots(facts: Facts, report: Path) -> list[Path]:
    """Write the plots next to the report, named after it. Returns their paths. Raises `ReportError` if they cannot be written."""
    figures = {"front": front_figure(facts), "history": history_figure(facts), "kernels": kernel_figure(facts)}
    if facts.importances:
        figures["importance"] = importance_figure(facts)
    base = report.name.removesuffix(".report.html")
    paths = {name: report.with_name(f"{base}.{name}.png") for name in figures}
    try:
        for name, figure in figures.items():
            figure.savefig(paths[name], dpi=DPI)
    except OSError as error:
        raise ReportError(f"The plots of {report} cannot be written: {error.strerror}. The study itself is safe.") from error
    return list(paths.values())


def front_figure(facts: Facts) -> Figure:
    """All trials by KL divergence and refusals, with the front."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, facts, "kl_divergence", "refusals")
    x, y = zip(*staircase(facts.front, axes.get_xlim()[1]), strict=True)
    axes.plot(x, y, color=FRONT, linewidth=1, alpha=0.6, zorder=1)
    axes.set(xlabel="KL divergence (nats)", ylabel="Refusals", title=f"{facts.model}: {len(facts.trials)} trials")
    axes.legend(frameon=False)
    return figure


def history_figure(facts: Facts) -> Figure:
    """Both scores by trial number."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 2), (("refusals", "Refusals"), ("kl_divergence", "KL divergence (nats)")), strict=True
    ):
        _scatter(axes, facts, None, name)
        axes.set(xlabel="Trial", ylabel=label)
    return figure


def _scatter(axes: Axes, facts: Facts, x: str | None, y: str) -> None:
    """Scatter plot of trials by two attributes (`x` None: trial number), the front highlighted."""
    numbers = {trial.number for trial in facts.front}
    kinds: dict[str, list[tuple[float, float]]] = {"on the front": [], "other trials": [], "stopped early": []}
    for trial in facts.trials:
        kind = "on the front" if trial.number in numbers else "other trials" if is_finished(trial) else "stopped early"
        kinds[kind].append((trial.number if x is None else trial.user_attrs[x], trial.user_attrs[y]))
    styles = {"on the front": (FRONT, FRONT, 3), "other trials": (DOT, DOT, 2), "stopped early": ("none", DOT, 2)}
    for kind, places in kinds.items():
        if places:
            face, edge, order = styles[kind]
            x_values, y_values = zip(*places, strict=True)
            axes.scatter(x_values, y_values, s=28, facecolors=face, edgecolors=edge, zorder=order, label=kind)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def kernel_figure(facts: Facts) -> Figure:
    """The kernels of the front's trials for each component, from fewest refusals (dark) to the lowest divergence (light)."""
    figure = Figure(figsize=(5 * len(facts.components), 3.5), layout="constrained")
    colors = matplotlib.colormaps["viridis"]
    last_layer = facts.last_layer or 1
    for axes, component in zip(figure.subplots(1, len(facts.components), squeeze=False)[0], facts.components, strict=True):
        for i, trial in enumerate(facts.front):
            x, y = zip(*strength_curves(trial, last_layer)[component], strict=True)
            label = f"{trial.user_attrs['refusals']} at {trial.user_attrs['kl_divergence']:.4f}"
            axes.plot(x, y, color=colors(0.9 * i / max(1, len(facts.front) - 1)), label=label)
        axes.set(xlabel="Layer", ylabel="Strength", title=component)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small", title="refusals at KL")
    return figure


def importance_figure(facts: Facts) -> Figure:
    """Bar chart of parameter importances for each objective."""
    sums = {name: sum(values[name] for values in facts.importances.values()) for name in next(iter(facts.importances.values()))}
    names = sorted(sums, key=lambda name: sums[name])
    figure = Figure(figsize=(7, 0.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(facts.importances)
    for i, (objective, values) in enumerate(facts.importances.items()):
        places = [place + 0.4 - height * (i + 0.5) for place in range(len(names))]
        axes.barh(places, [values[n] for n in names], 0.95 * height, color=BARS[min(i, len(BARS) - 1)], label=objective)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="Importance (PED-ANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
