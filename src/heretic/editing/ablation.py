"""The algebra of directional ablation: strengths over the layers, output maps, exact weight edits, adapter factors.

Tensors in, tensors out. Notation: a writer has the weight `W (d_out, d_in)`, optionally a bias `b (d_out,)`, and the output
`y = W x + b`; `r (d_out,)` is a unit direction, `strength` the value of the kernel in the writer's layer, `n (d_out,)` the row
norms of `W`, and `What = diag(1/n) W`, with `1/n = 0` for rows of norm 0.

Modes of row normalization:
- `none`: `W' = W - strength r r^T W`
- `pre`:  `W' = W - strength diag(n) r r^T What`
- `full`: `W' = diag(n) rownormalize(What - strength r r^T What)`; directions change, row norms do not.
In every mode `b' = b - strength r (r . b)`, since a bias writes to the residual stream as well (Arditi et al. 2024,
arXiv 2406.11717, section 4.1, edit output biases too).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RowNormalization = Literal["none", "pre", "full"]


# Elements of a weight that are edited at once: 2 MiB in float32.
BLOCK_ELEMENTS = 2**19


@dataclass(frozen=True)
class ComponentParameters:
    """Strength over the layers for one component. Positions and distances are fractions of the last layer index."""

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float


@dataclass(frozen=True, eq=False)
class LearnedEdit:
    """A learned edit: by writer, the unit direction `(d,)` to remove from its output (float32, on the CPU) and the strength."""

    directions: Mapping[str, Tensor]
    strengths: Mapping[str, float]


@dataclass(frozen=True)
class Ablation:
    """One trial as data. `direction_index` is a fraction of the last layer index; None: each layer's own direction.

    A `learned` edit is complete in itself and has no parameters.
    """

    direction_index: float | None
    parameters: Mapping[str, ComponentParameters]
    learned: LearnedEdit | None = None


@dataclass(frozen=True)
class OutputMap:
    """The edit of one writer as a map of its output: `y' = edited_bias + scale * (y0 - left (right . y0))`, `y0 = y - bias`.

    For fused experts, every tensor has an axis `expert` before `d_out`.

    `left`, `right`, `scale`, `edited_bias` `(trial, d_out)`, `bias (d_out,)`, all float32 (float64 in tests). `scale` None means 1.
    `bias` None means that none has to be subtracted: there is none, or (mode `none`) the map applies to it in the same way.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    edited_bias: Tensor | None = None

    def of(self, trial: int) -> "OutputMap":
        """The map of a single trial."""
        own = slice(trial, trial + 1)
        scale = None if self.scale is None else self.scale[own]
        edited_bias = None if self.edited_bias is None else self.edited_bias[own]
        return OutputMap(self.left[own], self.right[own], scale, self.bias, edited_bias)


def kernel(layer: float, parameters: ComponentParameters, last_layer: int) -> float:
    """Strength in layer `layer`: falls linearly from `max_weight` at its position to `min_weight` at the distance, 0 beyond."""
    distance = abs(layer - parameters.max_weight_position * last_layer)
    reach = parameters.min_weight_distance * last_layer
    if distance > reach:
        return 0.0
    if reach == 0:
        return parameters.max_weight
    return parameters.max_weight + (distance / reach) * (parameters.min_weight - parameters.max_weight)


def inverse_norms(norms: Tensor) -> Tensor:
    """`1 / n`, and 0 if `n` is 0, so that zero rows stay zero."""
    return torch.where(norms > 0, 1 / norms, 0)


def row_gram(weight: Tensor, norms: Tensor, directions: Tensor) -> Tensor:
    """`c = What What^T r` for each row of `directions (k, d_out)`, as `(k, d_out)`; for experts `(expert, k, d_out)`.

    `c` is linear in `r`, so one call at load time is enough for all interpolations of these directions.
    """
    inverse = inverse_norms(norms).unsqueeze(-2)
    return ((directions * inverse) @ weight @ weight.mT) * inverse


def row_rescaling(strength: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """The factor `s (..., d_out)` that restores the unit norm of each edited row of `What` (mode `full`).

    Row `i` of `What - strength r a` with `a = r^T What` has the squared norm
    `1 - 2 strength r_i c_i + strength^2 r_i^2 (r . c)`. A row that the edit (nearly) removes gets 0, since
    zero rows stay zero. `strength (..., 1)`, `r`, `c` `(..., d_out)`.
    """
    squared = 1 - 2 * strength * r * c + (strength * r) ** 2 * (r * c).sum(dim=-1, keepdim=True)
    least = torch.finfo(squared.dtype).eps
    # Clamped before the root, since `torch.where` would pass on infinite gradients of values that it does not select.
    return torch.where(squared > least, squared.clamp(min=least).rsqrt(), 0)


def output_map(
    mode: RowNormalization,
    strength: Tensor,
    r: Tensor,
    norms: Tensor | None = None,
    c: Tensor | None = None,
    bias: Tensor | None = None,
) -> OutputMap:
    """The edit of `edit_weight` and `edit_bias` as a map of the output, exact in all three modes, for a batch of trials.

    `strength (trial,)`, `r (trial, d_out)`; `norms (d_out,)` in modes `pre` and `full`, `c (trial, d_out)` from `row_gram`
    in mode `full`. For experts `r (trial, 1, d_out)`, `norms` and `bias` `(expert, d_out)`, `c (trial, expert, d_out)`.
    No weight is needed, so quantized and offloaded weights work as well.
    """
    strength = strength.view(-1, *[1] * (r.dim() - 1))
    if mode == "none":
        return OutputMap(strength * r, r)
    if norms is None:
        raise ValueError(f"mode {mode} needs the row norms")
    left, right = strength * norms * r, r * inverse_norms(norms)
    scale = None
    if mode == "full":
        if c is None:
            raise ValueError("mode full needs c")
        # A trial of strength 0 has exactly the factor 1, and zero rows stay zero through `right` and `left`.
        scale = row_rescaling(strength, r, c)
    edited_bias = None if bias is None else bias - strength * r * (r * bias).sum(dim=-1, keepdim=True)
    return OutputMap(left, right, scale, bias, edited_bias)


def trial_membership(trial_of_row: Tensor, n_trials: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`(row, trial)`: 1 if the row belongs to the trial, else 0. `trial_of_row (row,)` contains trial numbers."""
    return (trial_of_row[:, None] == torch.arange(n_trials, device=trial_of_row.device)).to(dtype)


def apply_output_map(y: Tensor, edit: OutputMap, membership: Tensor | None = None) -> Tensor:
    """`y (row, ..., d_out)` edited. Row `k` belongs to the trial that `membership (row, trial)` marks with a 1 (None: one trial).

    Every row is projected on the directions of all trials, and all but its own are multiplied by zero: two matrix products, which cost less
    than gathering a vector for each row. They are computed in the map's dtype (float32) whatever the model's: in bfloat16 the direction
    would be removed to only three digits.
    """
    y0 = y.to(edit.left.dtype)
    if edit.bias is not None:
        y0 = y0 - edit.bias
    flat = y0.flatten(end_dim=-2)  # (row * ..., d_out)
    if membership is None:
        edited = torch.addr(flat, flat @ edit.right[0], edit.left[0], alpha=-1)
    else:
        per_row = flat.shape[0] // membership.shape[0]
        membership = membership.repeat_interleave(per_row, dim=0) if per_row > 1 else membership
        edited = torch.addmm(flat, flat @ edit.right.T * membership, edit.left, alpha=-1)
    if edit.scale is not None:
        edited = edited * (edit.scale if membership is None else membership @ edit.scale)
    if edit.edited_bias is not None:
        edited = edited + (edit.edited_bias if membership is None else membership @ edit.edited_bias)
    return edited.view(y.shape).to(y.dtype)


def apply_output_map_by_expert(y: Tensor, edit: OutputMap, trial: Tensor, expert: Tensor) -> Tensor:
    """`y (pair, d_out)` edited. Pair `k` is the output of expert `expert[k]` under trial `trial[k]`."""
    y0 = y.to(edit.left.dtype)
    if edit.bias is not None:
        y0 = y0 - edit.bias[expert]
    edited = y0 - edit.left[trial, expert] * (edit.right[trial, expert] * y0).sum(dim=-1, keepdim=True)
    if edit.scale is not None:
        edited = edited * edit.scale[trial, expert]
    if edit.edited_bias is not None:
        edited = edited + edit.edited_bias[trial, expert]
    return edited


def edit_weight(weight: Tensor, r: Tensor, strength: float, mode: RowNormalization, out: Tensor | None = None) -> Tensor:
    """The edited `W' (d_out, d_in)`, computed in float32 (float64 for float64 input).

    It is written to `out`, rounded once to that tensor's dtype, or returned unrounded. Rows are processed in blocks, so that only one block
    is in float32 at a time and fits in the CPU's cache: first for `r^T W` (`none`) or `r^T What`, a sum over all rows, then for the rows
    themselves.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    r = r.to(weight.device, dtype)
    n_rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    blocks = list(zip(weight.split(n_rows), r.split(n_rows), out.split(n_rows), strict=True))
    total = r.new_zeros(weight.shape[1])
    for stored, own, _ in blocks:
        W = stored.to(dtype)
        total += (own if mode == "none" else own * inverse_norms(torch.linalg.vector_norm(W, dim=1))) @ W
    for stored, own, target in blocks:
        W = stored.to(dtype)
        if mode == "none":
            target.copy_(torch.addr(W, own, total, alpha=-strength))
            continue
        norms = torch.linalg.vector_norm(W, dim=1)
        if mode == "pre":
            target.copy_(torch.addr(W, norms * own, total, alpha=-strength))
        else:
            edited = torch.addr(W * inverse_norms(norms)[:, None], own, total, alpha=-strength)
            target.copy_(edited * (norms * inverse_norms(torch.linalg.vector_norm(edited, dim=1)))[:, None])
    return out


def edit_bias(bias: Tensor, r: Tensor, strength: float) -> Tensor:
    """`b' = b - strength r (r . b)` for `(..., d_out)` in float32 (float64 for float64 input), not rounded back."""
    b = bias.to(torch.promote_types(bias.dtype, torch.float32))
    r = r.to(b)
    return b - strength * r * (b @ r)[..., None]


def adapter_factors(weight: Tensor, r: Tensor, strength: float, mode: RowNormalization, rank: int) -> tuple[Tensor, Tensor, float]:
    """`A (rank, d_in)`, `B (d_out, rank)` with `B A` close to `W' - W`, and the relative error (Frobenius norm).

    Exact with rank 1 in modes `none` and `pre`, whose change is an outer product; in mode `full` the singular value decomposition
    truncated at `rank`, which is optimal for that rank.
    """
    W = weight.to(torch.promote_types(weight.dtype, torch.float32))
    r = r.to(W)
    if mode == "none":
        return (r @ W)[None], (-strength * r)[:, None], 0.0
    if mode == "pre":
        norms = torch.linalg.vector_norm(W, dim=1)
        return ((r * inverse_norms(norms)) @ W)[None], (-strength * norms * r)[:, None], 0.0
    change = edit_weight(W, r, strength, mode) - W
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    total = torch.linalg.vector_norm(S)
    error = float(torch.linalg.vector_norm(S[rank:]) / total) if total > 0 else 0.0
    # A weight smaller than the rank has fewer singular vectors; the adapter's shape is the same for all of its modules.
    kept = min(rank, len(S))
    A, B = W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank)
    root = S[:kept].sqrt()
    A[:kept], B[:, :kept] = root[:, None] * Vh[:kept], U[:, :kept] * root
    return A, B, error
