"""The parameter budget: widths of all layers for which the exported model does not exceed p.

One threshold shift for the whole model turns trained logits into widths: a neuron, unit or value dim is kept if
its keep margin plus the shift is positive. :func:`solve_widths` finds the largest shift whose widths, equal
within a layer and rounded to hardware multiples, fit the budget.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import GUMBEL_MEDIAN, KEEP_BIAS, BlockShape, keep_margin, top_mask

NUM_QUANTILES = 513
"""Number of stored quantiles of the value logits: K is then exact to 1/8 of a dim at head_dim 64."""


@dataclass(frozen=True, kw_only=True)
class LayerLogits:
    """Mask logits of one layer, noise-free.

    experts: [N, F]; query_key: [U]; value: for ``vo_mode`` dynamic, :data:`NUM_QUANTILES` quantiles of
    the value logits over tokens of training text and dims; static, the logits [A]; none, None.
    """

    experts: Tensor
    query_key: Tensor
    value: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of every layer, and the threshold shift that gave them."""

    experts: list[int]
    qk_dims: list[int]
    vo_dims: list[int]
    shift: float

    def active_parameters(self, shape: BlockShape) -> int:
        """Active block parameters of the whole model (eq. 8)."""
        return sum(
            int(shape.active_parameters(qk, vo, mlp))
            for qk, vo, mlp in zip(self.qk_dims, self.vo_dims, self.experts, strict=True)
        )

    def active_ratio(self, shape: BlockShape) -> float:
        """Active over total block parameters."""
        return self.active_parameters(shape) / (shape.total_parameters * len(self.experts))


def round_width(width: float, multiple: int, limit: int) -> int:
    """Nearest positive multiple, or ``limit`` if that is nearer."""
    if width > limit - limit % multiple / 2:
        return limit
    return min(max(multiple, round(width / multiple) * multiple), limit)


def unit_sizes(shape: BlockShape, device: torch.device | None) -> Tensor:
    """Head dims in each unit: 2 for a RoPE pair, 1 for an unrotated dim. [U] int64."""
    sizes = torch.ones(shape.num_units, dtype=torch.long, device=device)
    sizes[: shape.rotary_dim // 2] = 2
    return sizes


def choose_units(logits: Tensor, num_dims: int, shape: BlockShape) -> Tensor:
    """Mask of the units with the best logits that hold exactly ``num_dims`` head dims: [U] bool.

    A pair that exceeds the last dim is skipped for the next single dim, or, if all of those are kept, takes the place
    of the last one. Does not wait for the device. Raises ``ValueError`` for an odd number of dims if all are pairs.
    """
    if num_dims % 2 and shape.rotary_dim == shape.head_dim:
        raise ValueError(f"{num_dims} Q/K dims cannot be made of RoPE pairs; use an even --head-dim-multiple")
    order = logits.argsort(descending=True, stable=True)
    sizes = unit_sizes(shape, logits.device)[order]
    kept = sizes.cumsum(0) <= num_dims
    has_left = (sizes * kept).sum() < num_dims  # one dim, and the next unit is a pair
    single, pair, last = ~kept & (sizes == 1), ~kept & (sizes == 2), kept & (sizes == 1)
    next_single, next_pair = (units & (units.cumsum(0) == 1) for units in (single, pair))
    last_single = last & (last.cumsum(0) == last.sum())
    change = torch.where(single.any(), next_single, next_pair | last_single)
    return torch.zeros_like(kept).scatter(0, order, kept ^ (change & has_left))


def _dims_above_threshold(layer: LayerLogits, shape: BlockShape, shift: float) -> tuple[float, float, float]:
    experts = (keep_margin(layer.experts) + shift > 0).sum(dim=-1).max().item()
    sizes = unit_sizes(shape, layer.query_key.device)
    query_key = ((keep_margin(layer.query_key) + shift > 0) * sizes).sum().item()
    if layer.value is None:
        return experts, query_key, shape.head_dim
    value = (keep_margin(layer.value) + shift > 0).float().mean().item() * shape.head_dim
    return experts, query_key, value


def _on_cpu(layer: LayerLogits) -> LayerLogits:
    value = None if layer.value is None else layer.value.cpu()
    return LayerLogits(experts=layer.experts.cpu(), query_key=layer.query_key.cpu(), value=value)


def widths_at(
    layers: list[LayerLogits], shape: BlockShape, shift: float, *, width_multiple: int, head_dim_multiple: int
) -> Widths:
    """Rounded widths at one threshold shift, at least one multiple each."""
    experts, qk_dims, vo_dims = [], [], []
    for layer in layers:
        mlp, query_key, value = _dims_above_threshold(layer, shape, shift)
        experts.append(round_width(mlp, width_multiple, shape.intermediate_size))
        qk_dims.append(round_width(query_key, head_dim_multiple, shape.head_dim))
        # Dynamic V/O dims are masked and need no multiple. Static V/O dims are sliced.
        is_dynamic = layer.value is not None and layer.value.numel() == NUM_QUANTILES
        vo_dims.append(round_width(value, 1 if is_dynamic else head_dim_multiple, shape.head_dim))
    return Widths(experts=experts, qk_dims=qk_dims, vo_dims=vo_dims, shift=shift)


def solve_widths(
    layers: list[LayerLogits],
    shape: BlockShape,
    active_ratio: float,
    *,
    width_multiple: int = 32,
    head_dim_multiple: int = 8,
) -> Widths:
    """Widths of the largest model whose active block parameters are at most ``active_ratio`` of all.

    Bisection over the shift, in which widths are monotonic. Each shift reads three counts per layer: the logits are
    copied to the CPU first. Raises ``ValueError`` if the narrowest model (one multiple everywhere) exceeds the budget.
    """

    layers = [_on_cpu(layer) for layer in layers]

    def at(shift: float) -> Widths:
        return widths_at(layers, shape, shift, width_multiple=width_multiple, head_dim_multiple=head_dim_multiple)

    logits = [t for layer in layers for t in (layer.experts, layer.query_key, layer.value) if t is not None]
    reach = max(keep_margin(t).abs().max().item() for t in logits) + 1.0
    low, high = -reach, reach
    if at(low).active_ratio(shape) > active_ratio:
        raise ValueError(
            f"active_ratio {active_ratio} is below the narrowest model of this shape, "
            f"{at(low).active_ratio(shape):.3f}; raise it, or lower --width-multiple and --head-dim-multiple"
        )
    if at(high).active_ratio(shape) <= active_ratio:
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        if at(middle).active_ratio(shape) <= active_ratio:
            low = middle
        else:
            high = middle
    return at(low)


@dataclass(frozen=True, kw_only=True)
class UnitImportance:
    """Importance of one layer's units, on one scale for all layers. [F] and [A] sorted descending; [U]."""

    neurons: Tensor
    query_key: Tensor
    value: Tensor


def allocate_widths(
    layers: list[UnitImportance],
    shape: BlockShape,
    active_ratio: float,
    *,
    width_multiple: int = 32,
    head_dim_multiple: int = 8,
    vo_mode: str = "dynamic",
) -> Widths:
    """Widths within ``active_ratio`` that keep the most importance.

    Greedy, in steps of one multiple: the step with the highest importance per parameter first. Every layer keeps at
    least one step of each kind. Raises ``ValueError`` if that exceeds the budget.
    """
    heads = shape.hidden_size * (shape.num_heads + shape.num_kv_heads)
    neuron = shape.num_mlp_matrices * shape.hidden_size
    steps: list[tuple[float, int, int, str, int]] = []  # (-importance per parameter, order, layer, kind, dims)
    widths = {kind: [0] * len(layers) for kind in ("experts", "qk_dims", "vo_dims")}
    left = active_ratio * shape.total_parameters * len(layers)
    for i, layer in enumerate(layers):
        sizes = unit_sizes(shape, layer.query_key.device).to(layer.query_key)
        pairs = (layer.query_key / sizes).repeat_interleave(sizes.long()).sort(descending=True).values
        kinds = [("experts", layer.neurons, width_multiple, neuron), ("qk_dims", pairs, head_dim_multiple, heads)]
        if vo_mode == "none":
            widths["vo_dims"][i] = shape.head_dim
            left -= shape.head_dim * heads
        else:
            # Dynamic V/O dims are masked, not sliced: they need no multiple.
            kinds.append(("vo_dims", layer.value, 1 if vo_mode == "dynamic" else head_dim_multiple, heads))
        for kind, importance, multiple, cost in kinds:
            first, *others = importance.double().split(multiple)
            widths[kind][i] = len(first)
            left -= len(first) * cost
            steps += [(-part.mean().item() / cost, n, i, kind, len(part)) for n, part in enumerate(others)]
    if left < 0:
        least = 1 - left / (active_ratio * shape.total_parameters * len(layers))
        raise ValueError(
            f"active_ratio {active_ratio} is below the narrowest model of this shape, {active_ratio * least:.3f}; "
            "raise it, or lower --width-multiple and --head-dim-multiple"
        )
    is_full: set[tuple[int, str]] = set()
    for _, _, i, kind, dims in sorted(steps):
        cost = dims * (neuron if kind == "experts" else heads)
        if cost > left or (i, kind) in is_full:
            is_full.add((i, kind))  # steps of a kind are added in order: skip the later ones too
            continue
        widths[kind][i] += dims
        left -= cost
    return Widths(**widths, shift=0.0)


def shift_to_widths(layer: LayerLogits, shape: BlockShape, widths: Widths, i: int) -> LayerLogits:
    """Shift a layer's logits so that exactly its widths in ``widths`` are above the threshold.

    Each row is shifted by a constant, which changes no top-``width`` mask. All experts get the same width.
    """
    value = layer.value
    if value is not None:
        value = _shift_rows(value, round(len(value) * widths.vo_dims[i] / shape.head_dim))
    return LayerLogits(
        experts=_shift_rows(layer.experts, widths.experts[i]),
        query_key=_shift_rows(layer.query_key, int(choose_units(layer.query_key, widths.qk_dims[i], shape).sum())),
        value=value,
    )


def _shift_rows(logits: Tensor, width: int) -> Tensor:
    """Shift each row so that ``width`` of its margins are positive. [..., F]."""
    ordered = logits.sort(dim=-1, descending=True).values
    last_kept = ordered[..., width - 1 : width]
    threshold = (last_kept + ordered[..., width : width + 1]) / 2 if width < logits.shape[-1] else last_kept - 1
    return logits - threshold - (KEEP_BIAS + GUMBEL_MEDIAN)


def expert_masks(logits: Tensor, width: int) -> Tensor:
    """Mask of the ``width`` best neurons of every expert: [N, F] bool."""
    return top_mask(logits, width)
