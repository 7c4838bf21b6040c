"""Draws learned edits and a search's trials of one study in one plot: `docs/learned.png`.

uv run --all-extras python tools/picture_learned.py checkpoints/heretic-demo.jsonl docs/learned.png
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from heretic.study.checkpoint import read_study
from heretic.study.front import is_finished, is_learned

COLOURS = {"learned": "#1f5fbf", "search": "#8d8d86"}


def main(journal: Path, target: Path) -> None:
    """Write the picture."""
    study, settings = read_study(journal)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trials = [trial for trial in study.get_trials(deepcopy=False) if is_finished(trial)]
    for origin, label in (("search", "trials of the search"), ("learned", "learned edits")):
        own = [trial.user_attrs for trial in trials if is_learned(trial) == (origin == "learned")]
        x, y = [values["kl_divergence"] for values in own], [values["refusals"] for values in own]
        axes.scatter(x, y, s=36, color=COLOURS[origin], label=f"{len(own)} {label}", zorder=3 if origin == "learned" else 2)
    axes.set(xscale="log", xlabel="KL divergence (nats)", ylabel=f"Refused, of {study.user_attrs['n_bad_prompts']}", title=settings.model)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
