"""Pictures of the residuals, one for each layer and an animation through all of them (extra `research`).

Each layer's residuals are projected to a plane, by PaCMAP (which keeps neighbourhoods) or PCA (which keeps the greatest variance).
Such a plane may be turned and mirrored at will, so each layer's points are laid over those of the layer before by the orthogonal map
that fits best (Procrustes), and scaled to the same spread: what still moves from picture to picture is what the layer changes.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from torch import Tensor

from ..config import Settings
from ..errors import ReportError, UsageError
from ..utils import Progress

Points = NDArray[np.float64]  # (prompt, 2)

LABELS = {"good_prompts": "harmless prompts", "bad_prompts": "harmful prompts"}
COLORS = {"good_prompts": "royalblue", "bad_prompts": "darkorange"}
MIN_PROMPTS = 4  # in all; PaCMAP needs neighbours
SIZE, DPI = (8.0, 6.0), 100
# Pictures between two layers in the animation, and how long (ms) a layer and a picture between two stand.
BETWEEN, LAYER_MS, BETWEEN_MS = 6, 800, 60


def check_plot_settings(settings: Settings) -> None:
    """Raise `UsageError` for a style or colour that matplotlib does not know."""
    style = settings.residual_plot_style
    if style != "default" and style not in matplotlib.style.available:
        raise UsageError(
            f"residual_plot_style: matplotlib has no style {style!r}. It has: {', '.join(sorted(matplotlib.style.available))}."
        )
    for name in LABELS:
        color = getattr(settings, name).residual_plot_color
        if color is not None and not is_color_like(color):
            raise UsageError(f"{name}.residual_plot_color: {color!r} is no colour. Write a name such as royalblue, or #4169e1.")


def planes(residuals: Tensor, method: str, seed: int, progress: Progress) -> list[Points]:
    """For each layer of `residuals (prompt, layer, d)` the points of all prompts in a plane, each layer aligned with the one before."""
    found: list[Points] = []
    with progress.task(f"Projecting residuals ({method})", residuals.shape[1]) as advance:
        for layer in residuals.unbind(dim=1):
            points = _project(layer.float().numpy(), method, seed)
            found.append(align(points, found[-1]) if found else spread_evenly(points))
            advance(1)
    return found


def _project(residuals: NDArray[np.float32], method: str, seed: int) -> Points:
    if np.ptp(residuals, axis=0).max() == 0:  # all the same: nothing to lay out
        return np.zeros((len(residuals), 2))
    n_components = min(2, *residuals.shape)
    plane = PCA(n_components, random_state=seed).fit_transform(residuals)
    plane = np.pad(plane, ((0, 0), (0, 2 - n_components)))
    if method == "pca":
        return plane.astype(np.float64)
    import pacmap  # compiles itself, which takes seconds

    logging.getLogger(pacmap.__name__).setLevel(logging.ERROR)  # it warns of the seed and of small sets, which both are meant
    logging.getLogger(pacmap.pacmap.__name__).setLevel(logging.ERROR)
    embedding = pacmap.PaCMAP(n_components=2, random_state=seed % 2**31).fit_transform(residuals, init="pca")
    return np.asarray(embedding, dtype=np.float64)


def spread_evenly(points: Points) -> Points:
    """Points around the origin, at a root mean square distance of 1."""
    centered = points - points.mean(axis=0)
    spread = float(np.sqrt((centered**2).sum(axis=1).mean()))
    return centered / spread if spread > 0 else centered


def align(points: Points, reference: Points) -> Points:
    """`points` spread evenly and turned or mirrored so that their squared distances to `reference` are least."""
    centered = spread_evenly(points)
    rotation, _ = orthogonal_procrustes(centered, reference)
    return centered @ rotation


def draw(points: Points, n_good: int, settings: Settings, heading: str, reach: float) -> Image.Image:
    """One picture that shows places up to `reach` from the origin; the first `n_good` points are the harmless prompts'."""
    with matplotlib.style.context(settings.residual_plot_style):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, part in (("good_prompts", points[:n_good]), ("bad_prompts", points[n_good:])):
            specification = getattr(settings, name)
            color = specification.residual_plot_color or COLORS[name]
            axes.scatter(part[:, 0], part[:, 1], s=14, c=color, alpha=0.75, label=specification.residual_plot_label or LABELS[name])
        axes.set(xlim=(-1.4 * reach, 1.4 * reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
        axes.set_title(heading)
        figure.suptitle(settings.residual_plot_title)
        axes.legend(loc="upper right")
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def write_residual_plots(good: Tensor, bad: Tensor, settings: Settings, folder: Path, progress: Progress) -> list[Path]:
    """Pictures of the residuals `(prompt, layer, d)` of harmless and harmful prompts, and the animation; where they lie.

    The embedding output is left out: all prompts end in the same token. Raises `ReportError` where there are too few prompts or the
    folder cannot be written.
    """
    if len(good) + len(bad) < MIN_PROMPTS:
        raise ReportError(f"A plot of the residuals needs at least {MIN_PROMPTS} prompts.")
    seed = settings.seed or 0
    residuals = torch.cat([good, bad])[:, 1:]
    layers = planes(residuals, settings.residual_plot_method, seed, progress)
    reach = 1.1 * max(float(np.abs(points).max()) for points in layers) or 1.0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        frames: list[Image.Image] = []
        with progress.task("Drawing residuals", len(layers)) as advance:
            for i, points in enumerate(layers):
                picture = draw(points, len(good), settings, f"Layer {i}", reach)
                paths.append(folder / f"layer_{i:03}.png")
                picture.save(paths[-1])
                if i:
                    frames += _between(layers[i - 1], points, len(good), settings, f"Layer {i - 1} to {i}", reach)
                frames.append(picture)
                advance(1)
        paths.append(folder / "animation.gif")
        _save_animation(frames, paths[-1])
    except OSError as error:
        raise ReportError(
            f"The plots in {folder} cannot be written: {error.strerror or error}. Set another --residual-plot-path."
        ) from error
    return paths


def _between(start: Points, end: Points, n_good: int, settings: Settings, heading: str, reach: float) -> list[Image.Image]:
    shares = [(step + 1) / (BETWEEN + 1) for step in range(BETWEEN)]
    return [draw((1 - share) * start + share * end, n_good, settings, heading, reach) for share in shares]


def _save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """A GIF that never ends; colours of all frames from one palette, so that nothing flickers."""
    palette: Any = frames[0].quantize(64)
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [LAYER_MS if i % (BETWEEN + 1) == 0 else BETWEEN_MS for i in range(len(frames))]
    reduced[0].save(path, save_all=True, append_images=reduced[1:], duration=durations, loop=0, optimize=False)
