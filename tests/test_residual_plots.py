"""Residual plots: alignment, projections, files, and errors for invalid settings and missing packages."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from conftest import Outcome
from heretic.config import Settings
from heretic.errors import ReportError
from heretic.utils import SilentProgress

REASON = "the extra research is not installed"
pytest.importorskip("matplotlib", reason=REASON)
decomposition = pytest.importorskip("sklearn.decomposition", reason=REASON)
from PIL import Image  # noqa: E402

from heretic.reporting.residual_plots import BETWEEN, align, normalize_spread, planes, write_residual_plots  # noqa: E402


def two_groups(n: int, n_layers: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of two groups that part from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    good, bad = (torch.randn(n, n_layers, d, generator=generator) for _ in range(2))
    bad[..., 0] += 4 * torch.arange(n_layers)
    return good, bad


def test_alignment_undoes_turning_mirroring_scaling_and_moving() -> None:
    reference = normalize_spread(np.random.default_rng(2).normal(size=(30, 2)))
    angle = 2.1
    turned = reference @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([1, -1])
    np.testing.assert_allclose(align(7 * turned + [3, -5], reference), reference, atol=1e-12)


def test_no_other_turn_fits_better() -> None:
    rng = np.random.default_rng(3)
    reference, points = normalize_spread(rng.normal(size=(20, 2))), rng.normal(size=(20, 2))
    found = align(points, reference)
    centered = normalize_spread(points)
    least = ((found - reference) ** 2).sum()
    for mirror in (1, -1):
        for angle in np.linspace(0, 2 * np.pi, 200):
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([1, mirror])
            assert ((centered @ turn - reference) ** 2).sum() >= least - 1e-9


def test_spread_points_lie_around_the_origin_at_distance_one() -> None:
    points = normalize_spread(np.random.default_rng(4).normal(5, 9, size=(50, 2)))
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-12)
    assert (points**2).sum(axis=1).mean() == pytest.approx(1)
    np.testing.assert_array_equal(normalize_spread(np.full((3, 2), 4.0)), 0)


def test_principal_components_are_scikit_learns_up_to_a_turn() -> None:
    good, bad = two_groups(15, 3, 8)
    residuals = torch.cat([good, bad])
    found = planes(residuals, "pca", 0, SilentProgress())
    for layer, points in enumerate(found):
        expected = normalize_spread(decomposition.PCA(2).fit_transform(residuals[:, layer].numpy()))
        distances = [np.linalg.norm(p[:, None] - p, axis=2) for p in (points, expected)]
        np.testing.assert_allclose(*distances, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 2, 1), (4, 1, 8)])
def test_small_and_flat_residuals_have_a_plane_too(shape: tuple[int, int, int]) -> None:
    for residuals in (torch.randn(shape), torch.ones(shape)):
        assert all(points.shape == (shape[0], 2) and np.isfinite(points).all() for points in planes(residuals, "pca", 0, SilentProgress()))


@pytest.mark.slow
def test_pacmap_keeps_groups_apart_and_repeats_itself() -> None:
    pytest.importorskip("pacmap", reason=REASON)
    good, bad = two_groups(15, 3, 8)
    residuals = torch.cat([good, bad])
    found = planes(residuals, "pacmap", 5, SilentProgress())
    last = found[-1]
    gap = np.linalg.norm(last[:15].mean(axis=0) - last[15:].mean(axis=0))
    assert gap > 1 and all(np.isfinite(points).all() for points in found)
    for points, again in zip(found, planes(residuals, "pacmap", 5, SilentProgress()), strict=True):
        np.testing.assert_allclose(points, again)


def test_every_layer_gets_a_picture_and_all_of_them_an_animation(tmp_path: Path) -> None:
    good, bad = two_groups(10, 4, 8)
    settings = tiny.settings(
        "m", residual_plot_method="pca", bad_prompts={"dataset": "x", "residual_plot_label": "others", "residual_plot_color": "#ff0000"}
    )
    paths = write_residual_plots(good, bad, settings, tmp_path / "a/b", SilentProgress())
    assert [path.name for path in paths] == ["layer_000.png", "layer_001.png", "layer_002.png", "animation.gif"]
    with Image.open(paths[-2]) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}
        assert picture.size == (800, 600)
    assert any(red > 200 and green < 90 and blue < 90 for red, green, blue in colors), "harmful prompts are red"
    assert any(blue > 200 and red < 110 for red, _, blue in colors), "harmless ones are blue"
    with Image.open(paths[-1]) as animation:
        assert animation.n_frames == 3 + 2 * BETWEEN and animation.info["loop"] == 0

    with pytest.raises(ReportError, match=r"A plot of the residuals needs at least 4 prompts\."):
        write_residual_plots(good[:1], bad[:2], settings, tmp_path, SilentProgress())
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match=r"The plots in .*file/x cannot be written: Not a directory. Set another --residual-plot-path\."):
        write_residual_plots(good, bad, settings, tmp_path / "file/x", SilentProgress())


def test_a_run_draws_what_it_is_asked_to(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic(
        "--plot-residuals", "--residual-plot-method", "pca", "--residual-plot-path", "pictures", "--residual-plot-style", "dark_background"
    )
    assert outcome.code == 0
    assert "Plots of the residuals: pictures/m/layer_000.png to layer_001.png, and pictures/m/animation.gif\n" in outcome.out
    with Image.open("pictures/m/layer_000.png") as picture:
        assert picture.getpixel((1, 1)) == (0, 0, 0)
    # A label is no other study.
    assert heretic("--bad-prompts.dataset", "bad.txt", "--bad-prompts.residual-plot-label", "others").code == 0


def test_wrong_styles_and_colours_are_told_before_anything_is_loaded(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--plot-residuals", "--residual-plot-style", "no-such-style")
    assert outcome.code == 2 and outcome.err.startswith("Error: residual_plot_style: matplotlib has no style 'no-such-style'. It has: ")
    outcome = heretic("--plot-residuals", "--good-prompts.residual-plot-color", "nocolour")
    assert outcome.code == 2
    assert outcome.err == "Error: good_prompts.residual_plot_color: 'nocolour' is not a color. Use a name such as royalblue, or #4169e1.\n"


def test_plots_need_the_extra(workplace: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.session.answers.find_spec", lambda name: None)
    outcome = heretic("--plot-residuals")
    assert outcome.code == 2
    assert outcome.err == (
        "Error: plot_residuals needs the extra 'research', but matplotlib, pacmap, sklearn is not installed. Install it with: "
        "pip install 'heretic-llm[research]' (in a clone: uv sync --extra research).\n"
    )


def test_settings_of_these_plots_are_checked() -> None:
    with pytest.raises(ValueError, match="residual_plot_method"):
        Settings(model="m", residual_plot_method="umap")  # type: ignore[arg-type]
