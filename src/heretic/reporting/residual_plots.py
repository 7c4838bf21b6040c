"""Plots of the residuals, one for each layer and an animation over all layers (extra `research`).

Each layer's residuals are projected to two dimensions, by PaCMAP (which preserves neighbourhoods) or PCA (which preserves variance).
Such a projection is defined only up to rotation and reflection, so each layer's points are aligned with those of the layer before by the
best orthogonal map (Procrustes) and scaled to the same spread. What still moves between plots is the effect of the layer.
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
MIN_PROMPTS = 4  # in total; PaCMAP needs neighbours
SIZE, DPI = (8.0, 6.0), 100
# Frames between two layers in the animation, and how long (ms) a layer and a frame in between are shown.
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
            raise UsageError(f"{name}.residual_plot_color: {color!r} is not a color. Use a name such as royalblue, or #4169e1.")


def planes(residuals: Tensor, method: str, seed: int, progress: Progress) -> list[Points]:
    """The projected points of all prompts for each layer of `residuals (prompt, layer, d)`, aligned with the layer before."""
    found: list[Points] = []
    with progress.task(f"Projecting residuals ({method})", residuals.shape[1]) as advance:
        for layer in residuals.unbind(dim=1):
            points = _project(layer.float().numpy(), method, seed)
            found.append(align(points, found[-1]) if found else normalize_spread(points))
            advance(1)
    return found


def _project(residuals: NDArray[np.float32], method: str, seed: int) -> Points:
    if np.ptp(residuals, axis=0).max() == 0:  # all equal: nothing to project
        return np.zeros((len(residuals), 2))
    n_components = min(2, *residuals.shape)
    plane = PCA(n_components, random_state=seed).fit_transform(residuals)
    plane = np.pad(plane, ((0, 0), (0, 2 - n_components)))
    if method == "pca":
        return plane.astype(np.float64)
    import pacmap  # compiles itself, which takes seconds

    logging.getLogger(pacmap.__name__).setLevel(logging.ERROR)  # it warns about the seed and small sets, both intended
    logging.getLogger(pacmap.pacmap.__name__).setLevel(logging.ERROR)
    embedding = pacmap.PaCMAP(n_components=2, random_state=seed % 2**31).fit_transform(residuals, init="pca")
    return np.asarray(embedding, dtype=np.float64)


def normalize_spread(points: Points) -> Points:
    """The points centered at the origin and scaled to a root mean square distance of 1."""
    centered = points - points.mean(axis=0)
    spread = float(np.sqrt((centered**2).sum(axis=1).mean()))
    return centered / spread if spread > 0 else centered


def align(points: Points, reference: Points) -> Points:
    """`points` normalized, then rotated or reflected to minimize the squared distances to `reference`."""
    centered = normalize_spread(points)
    rotation, _ = orthogonal_procrustes(centered, reference)
    return centered @ rotation


def draw(points: Points, n_good: int, settings: Settings, heading: str, reach: float) -> Image.Image:
    """One plot, of the square up to `reach` from the origin; the first `n_good` points are those of harmless prompts."""
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
    """Write plots of the residuals `(prompt, layer, d)` of harmless and harmful prompts, and the animation. Returns their paths.

    The embedding output is left out: all prompts end in the same token. Raises `ReportError` if there are too few prompts or the folder
    cannot be written.
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
    """Save a looping GIF. All frames share one palette, so that colors do not flicker."""
    palette: Any = frames[0].quantize(64)
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [LAYER_MS if i % (BETWEEN + 1) == 0 else BETWEEN_MS for i in range(len(frames))]
    reduced[0].save(path, save_all=True, append_images=reduced[1:], duration=durations, loop=0, optimize=False)
