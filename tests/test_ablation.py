"""The algebra against the definition written out with NumPy matrices in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from heretic.editing.ablation import (
    ComponentParameters,
    OutputMap,
    RowNormalization,
    adapter_factors,
    apply_output_map,
    edit_bias,
    edit_weight,
    inverse_norms,
    kernel,
    output_map,
    row_gram,
    trial_membership,
)
from tiny import explicit_bias, explicit_weight, unit_directions

MODES = ["none", "pre", "full"]


def a_weight(d_out: int = 12, d_in: int = 20, seed: int = 0, zero_rows: Sequence[int] = ()) -> Tensor:
    """Rows of very different norms, `zero_rows` all zeros."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(d_out, d_in)) * generator.uniform(0.1, 10, size=(d_out, 1))
    weight[list(zero_rows)] = 0
    return torch.from_numpy(weight)


def a_bias(d_out: int = 12, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=d_out))


def the_map(mode: RowNormalization, weight: Tensor, bias: Tensor | None, directions: Tensor, strengths: list[float]) -> OutputMap:
    """An output map as the hooks make it, in float64."""
    norms = torch.linalg.vector_norm(weight, dim=1)
    return output_map(mode, torch.tensor(strengths, dtype=torch.float64), directions, norms, row_gram(weight, norms, directions), bias)


@pytest.mark.parametrize("zero_rows", [(), (0, 7)], ids=["", "zero rows"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("mode", MODES)
def test_output_map_is_the_weight_edit(mode: RowNormalization, with_bias: bool, zero_rows: tuple[int, ...]) -> None:
    """Three trials share a batch of seven rows, two tokens each."""
    weight = a_weight(zero_rows=zero_rows)
    bias = a_bias() if with_bias else None
    directions, strengths = unit_directions(3, 12), [0.4, 1.0, 1.7]
    trial_of_row = torch.tensor([0, 0, 1, 2, 1, 2, 2])
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(7, 2, 20)))
    y = x @ weight.T + (0 if bias is None else bias)

    edited = apply_output_map(y, the_map(mode, weight, bias, directions, strengths), trial_membership(trial_of_row, 3, torch.float64))

    for row, trial in enumerate(trial_of_row.tolist()):
        W = explicit_weight(weight, directions[trial], strengths[trial], mode)
        b = 0 if bias is None else explicit_bias(bias, directions[trial], strengths[trial])
        np.testing.assert_allclose(edited[row].numpy(), x[row].numpy() @ W.T + b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_trial_has_all_rows(mode: RowNormalization) -> None:
    """With three axes as with two."""
    weight, bias, r = a_weight(), a_bias(), unit_directions(1, 12)
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 3, 20)))
    edit = the_map(mode, weight, bias, r, [0.8])
    edited = apply_output_map(x @ weight.T + bias, edit)
    expected = x.numpy() @ explicit_weight(weight, r[0], 0.8, mode).T + explicit_bias(bias, r[0], 0.8)
    np.testing.assert_allclose(edited.numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(apply_output_map((x @ weight.T + bias)[0], edit).numpy(), expected[0], rtol=0, atol=1e-10)


def test_trial_membership() -> None:
    membership = trial_membership(torch.tensor([2, 0, 0, 1]), 4)
    assert membership.dtype == torch.float32
    assert membership.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite_spoils_no_other(mode: RowNormalization) -> None:
    """One trial's numbers may overflow; the trials that share its forward pass must not notice."""
    weight, directions = a_weight(), unit_directions(2, 12)
    edit = the_map(mode, weight, None, directions, [0.8, 1.3])
    y = torch.from_numpy(np.random.default_rng(8).normal(size=(3, 12)))
    membership = trial_membership(torch.tensor([0, 1, 0]), 2, torch.float64)
    expected = apply_output_map(y, edit, membership)
    y[1, 5] = float("inf")
    edited = apply_output_map(y, edit, membership)
    assert torch.equal(edited[[0, 2]], expected[[0, 2]])
    assert not torch.isfinite(edited[1]).all()


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.9])
def test_c_of_an_interpolated_direction_is_the_interpolated_c(fraction: float) -> None:
    """What mode `full` relies on to need no weight in a trial."""
    weight, directions = a_weight(zero_rows=[4]), unit_directions(2, 12)
    norms = torch.linalg.vector_norm(weight, dim=1)
    mixed = (1 - fraction) * directions[0] + fraction * directions[1]
    length = np.linalg.norm(mixed.numpy())
    c = row_gram(weight, norms, directions)
    edit = output_map(
        "full",
        torch.tensor([0.9], dtype=torch.float64),
        (mixed / length)[None],
        norms,
        (((1 - fraction) * c[0] + fraction * c[1]) / length)[None],
        None,
    )
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(5, 20)))
    expected = x.numpy() @ explicit_weight(weight, mixed / length, 0.9, "full").T
    np.testing.assert_allclose(apply_output_map(x @ weight.T, edit).numpy(), expected, rtol=0, atol=1e-10)


def test_row_gram_is_normalized_rows_times_their_transpose_times_direction() -> None:
    weight, directions = a_weight(zero_rows=[2]), unit_directions(3, 12)
    norms = torch.linalg.vector_norm(weight, dim=1)
    W = weight.numpy()
    normalized = np.stack([row / np.linalg.norm(row) if row.any() else row for row in W])
    expected = np.stack([normalized @ normalized.T @ r for r in directions.numpy()])
    np.testing.assert_allclose(row_gram(weight, norms, directions).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_changes_nothing(mode: RowNormalization) -> None:
    weight, bias, directions = a_weight(zero_rows=[3]), a_bias(), unit_directions(2, 12)
    y = torch.from_numpy(np.random.default_rng(5).normal(size=(6, 12)))
    y[:, 3] = bias[3]  # what a row of zeros gives
    membership = trial_membership(torch.tensor([0, 1, 1, 1, 1, 1]), 2, torch.float64)
    edited = apply_output_map(y, the_map(mode, weight, bias, directions, [1.0, 0.0]), membership)
    np.testing.assert_allclose(edited[1:].numpy(), y[1:].numpy(), rtol=0, atol=1e-14)
    assert np.abs((edited[0] - y[0]).numpy()).max() > 0.01
    np.testing.assert_allclose(edit_weight(weight, directions[0], 0.0, mode).numpy(), weight.numpy(), rtol=1e-14)
    assert torch.equal(edit_bias(bias, directions[0], 0.0), bias)


def test_mode_none_twice_at_full_strength_equals_once() -> None:
    weight, bias, r = a_weight(), a_bias(), unit_directions(1, 12)
    once = edit_weight(weight, r[0], 1.0, "none")
    np.testing.assert_allclose((r[0] @ once).numpy(), 0, atol=1e-13)
    np.testing.assert_allclose(edit_weight(once, r[0], 1.0, "none").numpy(), once.numpy(), rtol=0, atol=1e-13)
    y = torch.from_numpy(np.random.default_rng(6).normal(size=(3, 12)))
    edit = the_map("none", weight, bias, r, [1.0])
    once = apply_output_map(y, edit)
    np.testing.assert_allclose((once @ r[0]).numpy(), 0, atol=1e-13)
    np.testing.assert_allclose(apply_output_map(once, edit).numpy(), once.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [0.3, 1.0, 1.5])
def test_edit_weight_and_bias(mode: RowNormalization, strength: float) -> None:
    weight, bias, r = a_weight(zero_rows=[1, 11]), a_bias(), unit_directions(1, 12)[0]
    np.testing.assert_allclose(
        edit_weight(weight, r, strength, mode).numpy(), explicit_weight(weight, r, strength, mode), rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(edit_bias(bias, r, strength).numpy(), explicit_bias(bias, r, strength), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_edit_of_a_narrow_weight_is_computed_in_float32(mode: RowNormalization, dtype: torch.dtype) -> None:
    weight, r = a_weight(40, 60).to(dtype), unit_directions(1, 40)[0]
    edited = edit_weight(weight, r, 1.2, mode)
    assert edited.dtype == torch.float32
    np.testing.assert_allclose(edited.numpy(), explicit_weight(weight, r, 1.2, mode), rtol=0, atol=2e-6 * float(weight.abs().max()))
    assert edit_bias(weight[:, 0], r, 1.2).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_mode_full_keeps_row_norms(dtype: torch.dtype, tolerance: float, strength: float) -> None:
    weight, r = a_weight(64, 96, zero_rows=[5]).to(dtype), unit_directions(1, 64)[0]
    edited = edit_weight(weight, r, strength, "full")
    before, after = (np.linalg.norm(w.double().numpy(), axis=1) for w in (weight, edited))
    np.testing.assert_allclose(after, before, rtol=tolerance)
    assert not edited[5].any()
    assert np.abs((edited - weight).numpy()).max() > 0.01


def test_a_row_that_the_edit_leaves_nothing_of() -> None:
    """A direction along one axis takes all of that row at strength 1: it becomes zero, in the weight and in the map."""
    weight = a_weight()
    r = torch.zeros(1, 12, dtype=torch.float64)
    r[0, 4] = 1
    edited = edit_weight(weight, r[0], 1.0, "full")
    assert not edited[4].any()
    rest = [i for i in range(12) if i != 4]
    np.testing.assert_allclose(edited[rest].numpy(), weight[rest].numpy(), rtol=1e-14)
    x = torch.from_numpy(np.random.default_rng(7).normal(size=(3, 20)))
    mapped = apply_output_map(x @ weight.T, the_map("full", weight, None, r, [1.0]))
    np.testing.assert_allclose(mapped.numpy(), (x @ edited.T).numpy(), rtol=0, atol=1e-10)


def test_inner_products_are_taken_in_float32_whatever_the_outputs_dtype() -> None:
    """Sums over 4096 entries in bfloat16 would be off by far more than the last rounding (a share of a half)."""
    r = unit_directions(1, 4096)
    y = (5 * r + unit_directions(8, 4096, seed=1)).to(torch.bfloat16)
    edit = output_map("none", torch.tensor([1.0]), r.float())
    edited = apply_output_map(y, edit)
    assert edited.dtype == torch.bfloat16
    exact = y.double() - (y.double() @ r[0])[:, None] * r
    share = float((edited == exact.to(torch.bfloat16)).double().mean())
    assert share > 0.99


def test_maps_that_lack_what_their_mode_needs() -> None:
    r, strength = unit_directions(1, 4), torch.ones(1)
    with pytest.raises(ValueError, match="mode pre needs the row norms"):
        output_map("pre", strength, r)
    with pytest.raises(ValueError, match="mode full needs c"):
        output_map("full", strength, r, torch.ones(4))


def test_inverse_norms() -> None:
    assert inverse_norms(torch.tensor([4.0, 0.0, 0.5])).tolist() == [0.25, 0.0, 2.0]


# Eight steps: the maximum at layer 4, the reach 2 layers. By hand: 1.2 falls by 0.4 a layer.
PARAMETERS = ComponentParameters(max_weight=1.2, max_weight_position=0.5, min_weight=0.4, min_weight_distance=0.25)


@pytest.mark.parametrize(("layer", "strength"), [(0, 0.0), (1, 0.0), (2, 0.4), (3, 0.8), (4, 1.2), (5, 0.8), (6, 0.4), (7, 0.0), (8, 0.0)])
def test_kernel_by_hand(layer: int, strength: float) -> None:
    assert kernel(layer, PARAMETERS, 8) == pytest.approx(strength, abs=1e-12)


def test_kernel_between_layers() -> None:
    parameters = ComponentParameters(max_weight=1.0, max_weight_position=0.55, min_weight=0.2, min_weight_distance=0.2)
    # Position 5.5, reach 2: layers 4 and 7 are 1.5 away, layers 5 and 6 0.5, layers 3 and 8 2.5.
    assert [round(kernel(i, parameters, 10), 12) for i in range(11)] == [0, 0, 0, 0, 0.4, 0.8, 0.8, 0.4, 0, 0, 0]


def test_kernel_may_rise_with_the_distance() -> None:
    parameters = ComponentParameters(max_weight=0.5, max_weight_position=1.0, min_weight=1.0, min_weight_distance=1.0)
    assert [kernel(i, parameters, 4) for i in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_kernel_without_reach_is_its_maximum_at_its_own_layer() -> None:
    parameters = ComponentParameters(max_weight=0.7, max_weight_position=0.5, min_weight=0.1, min_weight_distance=0.0)
    assert [kernel(i, parameters, 2) for i in range(3)] == [0.0, 0.7, 0.0]
    assert kernel(0, PARAMETERS, 0) == 1.2  # a model of one layer


@pytest.mark.parametrize("mode", ["none", "pre"])
def test_adapter_factors_are_exact_at_rank_one(mode: RowNormalization) -> None:
    weight, r = a_weight(zero_rows=[6]), unit_directions(1, 12)[0]
    A, B, error = adapter_factors(weight, r, 1.3, mode, rank=1)
    assert (A.shape, B.shape, error) == ((1, 20), (12, 1), 0.0)
    expected = explicit_weight(weight, r, 1.3, mode) - weight.numpy()
    np.testing.assert_allclose((B @ A).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7, 11, 12])
def test_adapter_factors_of_mode_full_are_the_best_of_their_rank_and_say_what_they_miss(rank: int) -> None:
    weight, r = a_weight(), unit_directions(1, 12)[0]
    A, B, error = adapter_factors(weight, r, 1.0, "full", rank)
    assert (A.shape, B.shape) == ((rank, 20), (12, rank))
    change = explicit_weight(weight, r, 1.0, "full") - weight.numpy()
    measured = np.linalg.norm(change - (B @ A).numpy()) / np.linalg.norm(change)
    singular = np.linalg.svd(change, compute_uv=False)
    best = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())  # Eckart and Young
    assert measured == pytest.approx(best, abs=1e-12)
    assert error == pytest.approx(measured, abs=1e-12)
    assert (error > 0.01) == (rank < 7)


def test_adapter_factors_have_the_rank_asked_for_even_where_the_matrix_has_less() -> None:
    weight, r = a_weight(), unit_directions(1, 12)[0]
    A, B, error = adapter_factors(weight, r, 1.0, "full", rank=30)
    assert (A.shape, B.shape) == ((30, 20), (12, 30))
    assert error == 0.0
    np.testing.assert_allclose((B @ A).numpy(), explicit_weight(weight, r, 1.0, "full") - weight.numpy(), rtol=0, atol=1e-12)
