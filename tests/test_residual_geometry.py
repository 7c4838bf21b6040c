"""Numbers of the residuals against NumPy, SciPy and scikit-learn; the table, and what is left of it in a run."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import tiny
from conftest import BAD, GOOD, Outcome
from heretic.prompts import Prompt
from heretic.reporting.residual_geometry import geometric_median, layer_geometry, residual_geometry, silhouette


def points(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)) * 3 + shift)


def sum_of_distances(x: np.ndarray, data: np.ndarray) -> float:
    return float(np.linalg.norm(data - x, axis=1).sum())


@pytest.mark.parametrize(("n", "d", "shift"), [(3, 2, 0.0), (40, 5, 0.0), (25, 60, 1000.0), (7, 1, 5.0)])
def test_the_geometric_median_has_the_least_sum_of_distances(n: int, d: int, shift: float) -> None:
    data = points(n, d, seed=n, shift=shift)
    found = geometric_median(data).numpy()
    best = minimize(sum_of_distances, data.numpy().mean(axis=0), args=(data.numpy(),), method="BFGS", options={"gtol": 1e-9})
    assert sum_of_distances(found, data.numpy()) <= best.fun * (1 + 1e-9)
    if d > 1:
        np.testing.assert_allclose(found, best.x, atol=1e-3)


def test_the_median_may_be_one_of_the_points() -> None:
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(corners), torch.zeros(2, dtype=torch.float64))
    # More than half of them in one place hold it there, whatever the others do.
    held = torch.tensor([[2.0, 2.0]] * 4 + [[9.0, 1.0], [-5.0, 7.0], [100.0, -30.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(held), torch.tensor([2.0, 2.0], dtype=torch.float64), atol=1e-6, rtol=0)
    same = torch.full((5, 3), 7.0, dtype=torch.float64)
    torch.testing.assert_close(geometric_median(same), same[0])
    torch.testing.assert_close(geometric_median(same[:1]), same[0])


def test_an_outlier_moves_the_mean_but_hardly_the_median() -> None:
    data = points(51, 4, seed=1)
    moved = data.clone()
    moved[0] = 1e6
    assert (geometric_median(moved) - geometric_median(data)).norm() < 1
    assert (moved.mean(dim=0) - data.mean(dim=0)).norm() > 1e4


@pytest.mark.parametrize(("n", "m", "shift"), [(20, 30, 0.0), (20, 30, 4.0), (5, 2, 1.0), (1, 6, 3.0), (4, 4, 1000.0)])
def test_silhouettes_are_those_of_scikit_learn(n: int, m: int, shift: float) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    first, second = points(n, 6, seed=3), points(m, 6, seed=4, shift=shift)
    expected = metrics.silhouette_score(torch.cat([first, second]).numpy(), [0] * n + [1] * m)
    assert silhouette(first, second) == pytest.approx(expected, abs=1e-9)


def test_groups_that_coincide_are_not_apart() -> None:
    same = torch.ones(4, 3, dtype=torch.float64)
    assert silhouette(same, same) == 0.0


def test_the_numbers_of_a_layer_are_those_of_numpy() -> None:
    good, bad = points(30, 8, seed=5, shift=1.0), points(20, 8, seed=6, shift=-2.0)
    found = layer_geometry(good, bad, 4)
    g, b = good.numpy().mean(axis=0), bad.numpy().mean(axis=0)
    r = b - g

    def cosine(a: np.ndarray, c: np.ndarray) -> float:
        return float(a @ c / np.sqrt((a @ a) * (c @ c)))

    assert found.layer == 4
    assert found.cosine_good_bad == pytest.approx(cosine(g, b))
    assert found.cosine_good_direction == pytest.approx(cosine(g, r))
    assert found.cosine_bad_direction == pytest.approx(cosine(b, r))
    assert (found.norm_good, found.norm_bad, found.norm_direction) == pytest.approx(tuple(np.sqrt((v * v).sum()) for v in (g, b, r)))
    gm, bm = geometric_median(good).numpy(), geometric_median(bad).numpy()
    assert found.cosine_good_bad_median == pytest.approx(cosine(gm, bm))
    assert found.cosine_good_direction_median == pytest.approx(cosine(gm, bm - gm))
    assert found.cosine_bad_direction_median == pytest.approx(cosine(bm, bm - gm))
    assert found.norm_direction_median == pytest.approx(np.linalg.norm(bm - gm))


def test_layers_are_counted_from_the_embedding_output_on() -> None:
    good, bad = torch.randn(6, 3, 8), torch.randn(5, 3, 8)
    found = residual_geometry(good, bad)
    assert [geometry.layer for geometry in found] == [None, 0, 1]
    assert found[2] == layer_geometry(good[:, 2].double(), bad[:, 2].double(), 1)


def test_the_table_of_a_run_holds_the_models_numbers(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--print-residual-geometry")
    assert outcome.code == 0
    table = outcome.out[outcome.out.index("Residual geometry") :].split("└")[0]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["embedding", "0", "1"]

    model = tiny.load("m")
    good, bad = (torch.cat([*model.residuals([Prompt("You are a helpful assistant.", t) for t in texts])]) for texts in (GOOD, BAD))
    for row, geometry in zip(rows, residual_geometry(good, bad), strict=True):
        values = [value for name, value in vars(geometry).items() if name != "layer"]
        assert [float(cell) for cell in row[1:]] == pytest.approx(values, abs=6e-4, rel=6e-3)


def test_without_being_asked_nothing_is_printed(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    assert not re.search("geometry", heretic().out)


def test_a_finished_study_tells_it_as_well(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    heretic()
    outcome = heretic("--print-residual-geometry")
    assert outcome.code == 0 and "Residual geometry" in outcome.out and "3 trials done" in outcome.out and "Trial 4" not in outcome.out
