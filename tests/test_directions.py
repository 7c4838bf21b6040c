"""Directions against NumPy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from heretic.editing.directions import LayerMix, mean_residual, mix, mix_at, refusal_directions, separating_layer, winsorize


def residuals(n: int = 6, layers: int = 3, d: int = 40, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_t(df=2, size=(n, layers, d))  # with a few enormous coordinates
    return torch.from_numpy(values).float()


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995])
def test_winsorize(quantile: float) -> None:
    values = residuals()
    limits = np.quantile(np.abs(values.double().numpy()), quantile, axis=-1, keepdims=True)
    expected = np.clip(values.double().numpy(), -limits, limits)
    np.testing.assert_allclose(winsorize(values, quantile).numpy(), expected, rtol=1e-5)
    assert (np.abs(expected) < np.abs(values.numpy())).any(axis=-1).all()


def test_winsorize_at_one_is_off() -> None:
    values = residuals()
    assert torch.equal(winsorize(values, 1.0), values)


def test_mean_is_accumulated_in_float64() -> None:
    """Batches of unequal size, around an offset that costs float32 sums most of their digits."""
    values = residuals(500, 2, 8) + 3e4
    mean = mean_residual(values.split([128, 128, 128, 115, 1]))
    assert (mean.dtype, mean.shape) == (torch.float64, (2, 8))
    np.testing.assert_allclose(mean.numpy(), values.double().numpy().mean(axis=0), rtol=1e-14)
    assert np.abs(values.numpy().cumsum(axis=0)[-1] / 500 - mean.numpy()).max() > 1e-4  # so a float32 sum would be seen


def test_mean_of_winsorized_residuals() -> None:
    values = residuals(9)
    limits = np.quantile(np.abs(values.double().numpy()), 0.8, axis=-1, keepdims=True)
    expected = np.clip(values.double().numpy(), -limits, limits).mean(axis=0)
    np.testing.assert_allclose(mean_residual(values.split(4), 0.8).numpy(), expected, rtol=1e-5, atol=1e-7)


def test_mean_of_no_residuals() -> None:
    with pytest.raises(ValueError, match="no residuals to average"):
        mean_residual([])


def means(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    good = generator.normal(size=(4, 30)) + 2
    return good, good + 0.3 * generator.normal(size=(4, 30))


def test_directions_are_the_normalized_differences() -> None:
    good, bad = means()
    expected = (bad - good) / np.linalg.norm(bad - good, axis=1, keepdims=True)
    directions = refusal_directions(torch.from_numpy(good), torch.from_numpy(bad))
    np.testing.assert_allclose(directions.numpy(), expected, rtol=0, atol=1e-15)


def test_orthogonalized_directions() -> None:
    good, bad = means()
    directions = refusal_directions(torch.from_numpy(good), torch.from_numpy(bad), orthogonalize=True).numpy()
    np.testing.assert_allclose((directions * good).sum(axis=1), 0, atol=1e-13)
    for direction, g, b in zip(directions, good, bad, strict=True):
        plain = b - g
        rest = plain - g * (plain @ g) / (g @ g)
        np.testing.assert_allclose(direction, rest / np.linalg.norm(rest), rtol=0, atol=1e-13)
    plain = refusal_directions(torch.from_numpy(good), torch.from_numpy(bad)).numpy()
    assert np.abs((plain * good).sum(axis=1)).min() > 1e-3


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_no_difference_gives_the_zero_vector(orthogonalize: bool) -> None:
    good, bad = means()
    bad[0] = good[0]
    directions = refusal_directions(torch.from_numpy(good), torch.from_numpy(bad), orthogonalize)
    assert not directions[0].any()
    np.testing.assert_allclose(np.linalg.norm(directions[1:].numpy(), axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, LayerMix(1, 2, 0.0)),  # layer 0 has its direction at index 1: index 0 is the embedding output
        (0.25, LayerMix(1, 2, 0.25)),
        (3.0, LayerMix(4, 5, 0.0)),
        (8.5, LayerMix(9, 10, 0.5)),
        (9, LayerMix(10, 10, 0.0)),  # the last of ten layers has no neighbour above
    ],
)
def test_mix_at(index: float, expected: LayerMix) -> None:
    assert mix_at(index, 10) == expected


def test_mix_at_the_only_layer() -> None:
    assert mix_at(0, 1) == LayerMix(1, 1, 0.0)


@pytest.mark.parametrize("index", [-0.01, 9.01])
def test_mix_at_outside_the_layers(index: float) -> None:
    with pytest.raises(ValueError, match=f"^direction_index {index} is outside layers 0 to 9$"):
        mix_at(index, 10)


def test_mix_is_the_weighted_sum_of_neighbours() -> None:
    vectors = np.random.default_rng(3).normal(size=(4, 5))
    mixed = mix(torch.from_numpy(vectors), LayerMix(1, 2, 0.3))
    np.testing.assert_allclose(mixed.numpy(), 0.7 * vectors[1] + 0.3 * vectors[2], rtol=1e-14)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.9, 1.0, 1.0], 3),  # decided late
        ([0.9, 0.9, 1.0, 1.1, 1.1, 1.0], 0),  # decided at once
        ([0.1, 0.61, 0.2, 1.0], 1),
        ([0.5], 0),
        ([0.0, 0.0], 0),  # never
    ],
)
def test_the_layer_in_which_prompts_part(distances: list[float], expected: int) -> None:
    generator = np.random.default_rng(4)
    lengths = 2.0 ** np.arange(len(distances) + 1)  # the stream grows, which is no reason
    good = generator.normal(size=(len(lengths), 6))
    good *= (lengths / np.linalg.norm(good, axis=1))[:, None]
    across = np.stack([np.linalg.svd(row[None])[2][1] for row in good])  # unit vectors at right angles: both means have equal lengths
    half = np.array([5.0, *distances])[:, None] / 2 * lengths[:, None] * across  # the embedding's distance does not count
    turned = good * np.sqrt(np.clip(1 - (np.array([0.0, *distances]) / 2) ** 2, 0, 1))[:, None]
    assert separating_layer(torch.from_numpy(turned - half), torch.from_numpy(turned + half)) == expected
