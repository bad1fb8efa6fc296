"""Mixture of experts: router, experts, load balancing and int4 weights (K2.5 report 4.2, DeepSeek-V3 report 2.1.2).

A token goes to the K experts with the largest biased score sigmoid(W x) + b and gets their SwiGLU outputs back,
weighted by the *unbiased* scores; shared experts see every token. The bias b, moved once per optimizer step from the
global integer loads, balances the experts without a loss; a small sequence-wise balance loss exists beside it.
Routed experts are released as int4 weights (groups of 32 along the input), so int4 packing and its fake
quantisation for quantisation-aware training live here too.

Public names
    routing      Routing, route_reference, route_fused
    experts      swiglu, experts_reference, experts_fused
    balancing    RouterStats, load_counts, load_cv, balance_bias_,
                 sequence_balance_loss_reference, sequence_balance_loss_fused
    int4         int4_pack, int4_unpack, fake_quant, is_int4_expert, INT4_GROUP
    modules      MLP, Router, Experts, MoE
    other        normal_init_, MoEError

Dimension letters: B batch, T tokens (B*T after flattening), C hidden, E experts, K chosen experts per token,
F expert width; in the int4 part O and I are the output and input width of one matrix.

Tests: .venv/bin/python -m pytest tests/test_moe.py
"""

import functools
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INT4_GROUP = 32  # weights that share one scale, consecutive along the input


class MoEError(ValueError):
    """A shape, dtype or setting that this module cannot honour."""


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    weights: (T,K) float32 (float64 for float64 input): factor on each chosen expert's output
    index: (T,K) int64: the chosen experts, best biased score first
    scores: (T,E) like weights: sigmoid scores of all experts, unbiased
    """

    weights: Tensor
    index: Tensor
    scores: Tensor


@dataclass(frozen=True)
class RouterStats:
    """What one forward pass says about balance; returned, never stored, so recompute and evaluation change nothing.

    counts: (E,) int64: valid (token, choice) pairs per expert; sum over microbatches and ranks, then balance_bias_
    balance_loss: scalar: sequence-wise balance loss, to be multiplied by its coefficient (0.001) by the caller
    """

    counts: Tensor
    balance_loss: Tensor


# Routing


def _router_dtype(x: Tensor) -> torch.dtype:
    """Routing runs in float32: bf16 scores of 384 experts tie and reroute tokens. Float64 stays for exact tests."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_choice(n_experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    """Refuse group and top-k settings that leave too few experts to choose from."""
    if n_group < 1 or n_experts % n_group:
        raise MoEError(f"router: n_group {n_group} does not divide {n_experts} experts; choose a divisor")
    if not 1 <= topk_group <= n_group:
        raise MoEError(f"router: topk_group {topk_group} is outside 1..n_group ({n_group})")
    available = n_experts // n_group * topk_group
    if not 1 <= top_k <= available:
        raise MoEError(f"router: top_k {top_k} is outside 1..{available} ({topk_group} of {n_group} groups' experts)")


def _check_route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, pinned: Tensor | None) -> None:
    """Refuse router inputs whose shapes disagree and pinned experts that do not exist."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise MoEError(
            f"router: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} "
            "are not (T,C), (E,C), (E,)"
        )
    if pinned is None:
        return
    if pinned.shape != (len(x), top_k) or pinned.dtype != torch.int64:
        raise MoEError(
            f"router: pinned is {pinned.dtype} {tuple(pinned.shape)}, should be torch.int64 ({len(x)}, {top_k})"
        )
    if pinned.numel() and not 0 <= pinned.min() <= pinned.max() < len(weight):
        raise MoEError(f"router: pinned has an expert outside 0..{len(weight) - 1}")


def route_reference(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1,
    scale: float = 1.0, normalize: bool = True, pinned: Tensor | None = None,
) -> Routing:
    """Choose K experts per token and weigh them, one token at a time.

        s = sigmoid(W x)                        in float32
        group score = sum of the two largest s + b of the group; keep the best topk_group groups
        index = the K largest s + b of the kept groups (others are -inf); the lower index wins a tie
        weights = scale * s[index] / (sum of s[index] + 1e-20)     (undivided if not normalize)

    With top_k = 1 and normalize every weight is the constant `scale`, so the router would get no gradient; MoE
    therefore refuses that pair.

    Args:
        x: (T,C) float: tokens
        weight: (E,C) float: router matrix
        bias: (E,) float32: e_score_correction_bias; moves the choice, never the weights
        top_k: K
        n_group, topk_group: groups of consecutive experts, and how many of them a token may use
        scale: routed_scaling_factor
        normalize: norm_topk_prob, divide by the sum over the chosen
        pinned: (T,K) int64: experts to use instead of the choice (replay, numeric tests); the weights still come
            from the scores and keep their gradient
    Returns: Routing
    Raises: MoEError for disagreeing shapes or too few experts to choose from
    Source: DeepSeek-V3 report, equations 12-16; `noaux_tc` of the released config
    """
    _check_choice(len(weight), top_k, n_group, topk_group)
    _check_route(x, weight, bias, top_k, pinned)
    dtype = _router_dtype(x)
    scores = torch.sigmoid(x.to(dtype) @ weight.to(dtype).T)  # (T,E)

    def best(values: Tensor, n: int) -> list[int]:
        values = values.tolist()
        return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]

    index = torch.empty(len(x), top_k, dtype=torch.int64, device=x.device) if pinned is None else pinned
    if pinned is None:
        for t, biased in enumerate((scores + bias).detach()):
            groups = list(biased.chunk(n_group))  # n_group times (E/n_group,)
            group_scores = torch.stack([group.sort(descending=True).values[:2].sum() for group in groups])
            for g in set(range(n_group)) - set(best(group_scores, topk_group)):
                groups[g] = torch.full_like(groups[g], -torch.inf)
            index[t] = torch.tensor(best(torch.cat(groups), top_k))

    weights = scores.gather(1, index)  # (T,K)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return Routing(weights * scale, index, scores)


def route_fused(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1,
    scale: float = 1.0, normalize: bool = True, pinned: Tensor | None = None,
) -> Routing:
    """Choose K experts per token and weigh them, all tokens at once; see route_reference for formula and arguments."""
    _check_choice(len(weight), top_k, n_group, topk_group)
    _check_route(x, weight, bias, top_k, pinned)
    dtype = _router_dtype(x)
    scores = torch.sigmoid(x.to(dtype) @ weight.to(dtype).T)  # (T,E)
    if pinned is None:
        biased = (scores + bias).detach()
        if topk_group < n_group:
            groups = biased.unflatten(1, (n_group, -1))  # (T,n_group,E/n_group)
            group_scores = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2)  # (T,n_group)
            rank = group_scores.sort(dim=1, descending=True, stable=True).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, rank[:, :topk_group], False)
            biased = groups.masked_fill(dropped[:, :, None], -torch.inf).flatten(1)  # (T,E)
        # topk leaves the order of ties open; a stable sort gives them to the lower index, here and in recompute
        index = biased.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    else:
        index = pinned
    weights = scores.gather(1, index)  # (T,K)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return Routing(weights * scale, index, scores)


# Experts


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Gated feed-forward: y = down (silu(gate x) * up x).

    Args: x: (...,C) float; gate, up: (F,C) float; down: (C,F) float
    Returns: (...,C)
    """
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _check_experts(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Refuse expert inputs whose shapes disagree."""
    width, hidden = gate.shape[1:]
    for name, tensor, shape in (
        ("x", x, (len(index), hidden)),
        ("weights", weights, tuple(index.shape)),
        ("up", up, (len(gate), width, hidden)),
        ("down", down, (len(gate), hidden, width)),
    ):
        if tensor.shape != shape:
            given = f"gate {tuple(gate.shape)} and index {tuple(index.shape)}"
            raise MoEError(f"experts: {name} is {tuple(tensor.shape)}, should be {shape} for {given}")


def experts_reference(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sum of the chosen experts' outputs, expert by expert.

        y_t = sum_k weights[t,k] * swiglu_{index[t,k]}(x_t)

    Args:
        x: (T,C) float: tokens
        weights: (T,K) float32 or float64: from Routing; the sum is accumulated in this dtype
        index: (T,K) int64: chosen experts
        gate, up: (E,F,C) float, like x; down: (E,C,F) float, like x
    Returns: (T,C), dtype of x
    Raises: MoEError for disagreeing shapes
    Source: DeepSeek-V3 report, equation 12
    """
    _check_experts(x, weights, index, gate, up, down)
    total = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for e in range(len(gate)):
        token, choice = (index == e).nonzero(as_tuple=True)  # each (tokens of expert e,)
        y = swiglu(x[token], gate[e], up[e], down[e]) * weights[token, choice, None]
        total = total.index_add(0, token, y.to(total.dtype))
    return total.to(x.dtype)


class _Dispatch(torch.autograd.Function):
    """Copy each token to its K choices, rows sorted by expert. The gradient is _Combine.

    Written as gathers in both directions: the gradient of a plain index_select would add rows by atomics on CUDA,
    in no fixed order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)  # (T*K,C)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Combine.apply(grad, *ctx.saved_tensors, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    """Bring the sorted rows back to their tokens and sum over K in choice order. The gradient is _Dispatch.

    That gradient is a fresh contiguous tensor, which grouped_mm needs: its backward rejects an expanded one.
    """

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.top_k = top_k
        return y.index_select(0, inverse).unflatten(0, (-1, top_k)).sum(1)  # (T*K,C) -> (T,K,C) -> (T,C)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Dispatch.apply(grad, *ctx.saved_tensors, ctx.top_k), None, None, None


def _eagerly(function):
    """Have torch.compile step around a function, as torch.compiler.disable does, which would load the whole compiler here."""
    around = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*arguments, **settings):
        return (around if torch.compiler.is_compiling() else function)(*arguments, **settings)

    return call


_grouped_mm_eager = _eagerly(F.grouped_mm)  # torch.compile traces grouped_mm in bf16 only


@_eagerly
def _segment_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """_grouped_linear as a loop over the experts that have rows, for any dtype and width."""
    loads = {e: load for e, load in enumerate(counts.tolist()) if load} or {0: 0}
    matrices = weight.unbind() if torch.is_grad_enabled() else weight  # one gradient for all, or just the few that work
    return torch.cat([rows @ matrices[e].T for e, rows in zip(loads, x.split(list(loads.values())))])  # (T*K,o)


def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the first counts[0] rows by weight[0], the next counts[1] by weight[1], and so on.

    Args: x: (T*K,i) float; weight: (E,o,i) float; counts: (E,) int64, sum T*K
    Returns: (T*K,o)
    """
    # grouped_mm takes no float64, and rows only at multiples of 16 bytes. On the CPU it pays for every expert, even one
    # without rows; backward that is worth it, because it writes one gradient instead of one per expert.
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    answering = x.device.type == "cpu" and not torch.is_grad_enabled()
    if not aligned or x.dtype == torch.float64 or answering:
        return _segment_linear(x, weight, counts)
    ends = counts.cumsum(0).to(torch.int32)
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return _grouped_mm_eager(x, weight.transpose(1, 2), offs=ends)


def experts_fused(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sum of the chosen experts' outputs by three grouped GEMMs; see experts_reference for formula and arguments.

    Tokens are sorted by expert once. The weights act on the F-wide activation, before the down projection, where
    they cost least. Every sum has a fixed order: the result is the same at each run.
    """
    _check_experts(x, weights, index, gate, up, down)
    top_k = index.shape[1]
    counts = load_counts(index, len(gate))
    order = index.flatten().argsort(stable=True)  # (T*K,) choice t*K+k of each sorted row
    inverse = order.argsort()  # (T*K,) sorted row of each choice
    rows = _Dispatch.apply(x, order, inverse, top_k)  # (T*K,C)
    hidden = F.silu(_grouped_linear(rows, gate, counts)) * _grouped_linear(rows, up, counts)  # (T*K,F)
    hidden = (hidden * weights.flatten()[order, None]).to(x.dtype)
    return _Combine.apply(_grouped_linear(hidden, down, counts), order, inverse, top_k)  # (T,C)


# Balancing


def load_counts(index: Tensor, n_experts: int, valid: Tensor | None = None) -> Tensor:
    """How many (token, choice) pairs each expert received.

    Args: index: (...,K) int64; n_experts: E; valid: (...) bool, False where a token is padding and does not count
    Returns: (E,) int64
    """
    counted = torch.ones_like(index) if valid is None else valid[..., None].expand_as(index).long()
    # integers add up to the same sum in any order, and unlike bincount this does not wait for the device
    return index.new_zeros(n_experts).scatter_add_(0, index.flatten(), counted.flatten())


def load_cv(counts: Tensor) -> Tensor:
    """Coefficient of variation of the expert loads: standard deviation / mean, 0 when perfectly even.

    Args: counts: (...,E) int64
    Returns: (...) float32; 0 where there is no load at all
    """
    loads = counts.float()
    return loads.std(-1, correction=0) / loads.mean(-1).clamp(min=1e-20)


@torch.no_grad()
def balance_bias_(bias: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """Nudge each expert's bias towards the mean load, in place: b_e += gamma * sign(mean load - load_e).

    Call once per optimizer step, with counts summed over all microbatches and ranks; a layer without any load stays
    as it is. The sign comes from integers, so every rank moves its copy alike.

    Args: bias: (E,) float32; counts: (E,) int64; gamma: bias update speed
    Returns: bias
    Raises: MoEError for rounded biases (gamma would vanish in bf16) or counts that are not integers
    Source: DeepSeek-V3 report 2.1.2, auxiliary-loss-free load balancing
    """
    if bias.dtype not in (torch.float32, torch.float64):
        raise MoEError(f"balance_bias_: the bias is {bias.dtype}; keep it in torch.float32, or steps vanish")
    if counts.is_floating_point() or counts.shape != bias.shape:
        raise MoEError(
            f"balance_bias_: counts are {counts.dtype} {tuple(counts.shape)}, should be integers {tuple(bias.shape)}"
        )
    below_mean = torch.sign(counts.sum() - len(counts) * counts)  # sign(mean - load), without a division
    return bias.add_(below_mean.to(bias.dtype), alpha=gamma)


def sequence_balance_loss_reference(scores: Tensor, index: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss, token by token, without its coefficient.

    Per sequence of n valid tokens:
        f_e = E / (K n) * number of tokens that chose e          (no gradient)
        P_e = 1 / n * sum over tokens of s_e / (sum over all experts of s)
        loss = sum_e f_e P_e                                     (1 when even)
    and the mean over the sequences that have a valid token; 0 if none has.

    Args: scores: (B,T,E) float: unbiased sigmoid scores; index: (B,T,K) int64; valid: (B,T) bool, False at padding
    Returns: scalar, dtype of scores
    Source: DeepSeek-V3 report, equations 17-20
    """
    E, K = scores.shape[2], index.shape[2]
    losses = []
    for b in range(len(scores)):
        tokens = [t for t in range(scores.shape[1]) if valid is None or valid[b, t]]
        chosen = scores.new_zeros(E)
        share = scores.new_zeros(E)
        for t in tokens:
            for e in index[b, t].tolist():
                chosen[e] += 1
            share = share + scores[b, t] / (scores[b, t].sum() + 1e-20)
        if tokens:
            losses.append((E / (K * len(tokens)) * chosen * share / len(tokens)).sum())
    return torch.stack(losses).mean() if losses else scores.sum() * 0.0


def sequence_balance_loss_fused(scores: Tensor, index: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss, whole tensors; see sequence_balance_loss_reference for formula and arguments."""
    E, K = scores.shape[2], index.shape[2]
    if valid is None:
        valid = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    n = valid.sum(1, keepdim=True)  # (B,1)
    pairs = valid.to(scores.dtype)[:, :, None].expand_as(index)  # (B,T,K)
    chosen = scores.new_zeros(len(scores), E).scatter_add(1, index.flatten(1), pairs.flatten(1))  # (B,E)
    share = scores / (scores.sum(2, keepdim=True) + 1e-20)  # (B,T,E)
    share = share.masked_fill(~valid[:, :, None], 0.0).sum(1)  # (B,E)
    loss = E / K * (chosen * share).sum(1, keepdim=True) / n.clamp(min=1) ** 2  # (B,1)
    return loss.sum() / (n > 0).sum().clamp(min=1)


# Int4


def is_int4_expert(name: str) -> bool:
    """Whether a tensor of the released model is kept as int4: exactly the routed experts' matrices.

    Args: name: full parameter name, for example "language_model.model.layers.3.mlp.experts.7.up_proj.weight"
    """
    pattern = r"language_model\.model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight"
    return re.fullmatch(pattern, name) is not None


def _int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int4: scale = bf16(amax / 7), code = round(weight / scale), within -7..7.

    Args: weight: (...,O,I) float
    Returns: codes (...,O,I/32,32) float32 holding integers; scale (...,O,I/32) bf16
    """
    if weight.shape[-1] % INT4_GROUP:
        raise MoEError(
            f"int4: the input width {weight.shape[-1]} of weight {tuple(weight.shape)} is no multiple of {INT4_GROUP}"
        )
    groups = weight.float().unflatten(-1, (-1, INT4_GROUP))  # (...,O,I/32,32)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)  # (...,O,I/32)
    # a group of zeros has scale 0; dividing by 1 instead leaves its codes at 0
    divisor = scale.float().masked_fill(scale == 0, 1.0)
    return (groups / divisor[..., None]).round().clamp(-7, 7), scale


def int4_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to int4 and pack eight codes per int32, as the released routed experts are stored.

    Groups of 32 along the input share scale = amax / 7, stored in bf16; codes are -7..7 in offset binary (code + 8);
    nibble j of word w, counted from the low end, is input 8 w + j. A group of zeros has scale 0 and codes 0.

    Args: weight: (...,O,I) float, I a multiple of 32
    Returns: packed (...,O,I/8) int32; scale (...,O,I/32) bf16
    Raises: MoEError for another I, or weights that are not finite
    Source: compressed-tensors "pack-quantized", the released checkpoint
    """
    codes, scale = _int4_codes(weight)
    if not (codes.isfinite().all() and scale.isfinite().all()):
        raise MoEError(f"int4: weight {tuple(weight.shape)} holds values that are not finite")
    nibbles = (codes.to(torch.int32) + 8).unflatten(-1, (-1, 8))  # (...,O,I/32,4,8)
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    words = (nibbles << shift).sum(-1, dtype=torch.int32)  # disjoint bits: the sum is their union
    return words.flatten(-2), scale


def int4_unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Restore weight = code * scale from int4; exact in float32, so packing it again returns every code.

    Args: packed: (...,O,I/8) int32; scale: (...,O,I/32) bf16; dtype: of the result
    Returns: (...,O,I)
    Raises: MoEError if packed and scale do not belong together
    """
    words = INT4_GROUP // 8
    if packed.dtype != torch.int32 or packed.shape != (*scale.shape[:-1], scale.shape[-1] * words):
        raise MoEError(
            f"int4: packed {packed.dtype} {tuple(packed.shape)} does not fit scale {tuple(scale.shape)}; "
            f"expected torch.int32 with {words} words per scale"
        )
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    codes = ((packed[..., None] >> shift) & 15) - 8  # (...,O,I/8,8)
    groups = codes.flatten(-2).unflatten(-1, (-1, INT4_GROUP))  # (...,O,I/32,32)
    return (groups * scale.float()[..., None]).flatten(-2).to(dtype)


class _StraightThroughInt4(torch.autograd.Function):
    """Round to int4 forward, identity backward (amax scaling clips nothing, so no weight loses its gradient)."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        codes, scale = _int4_codes(weight)
        return (codes * scale.float()[..., None]).flatten(-2).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def fake_quant(weight: Tensor) -> Tensor:
    """The weight as it will be after release: bitwise int4_unpack(*int4_pack(weight)), with gradient 1.

    Args: weight: (...,O,I) float, I a multiple of 32
    Returns: (...,O,I), dtype of weight
    """
    return _StraightThroughInt4.apply(weight)


# Modules


@torch.no_grad()
def normal_init_(weight: Tensor, std: float = 0.02) -> Tensor:
    """Fill with normal(0, std) sampled in float32 and then rounded: sampling in bf16 would bend the distribution."""
    return weight.copy_(torch.empty_like(weight, dtype=torch.float32).normal_(0.0, std))


def _choose_twin(impl: str, reference, fused):
    """The twin that `impl` names."""
    if impl not in ("reference", "fused"):
        raise MoEError(f'impl is {impl!r}, should be "reference" or "fused"')
    return reference if impl == "reference" else fused


class MLP(nn.Module):
    """Dense SwiGLU feed-forward; also the shared experts. hidden: C; width: F."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        for weight in self.parameters():
            normal_init_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (...,C) float -> (...,C)."""
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Router(nn.Module):
    """Owns the router matrix `weight` (E,C) and the buffer `e_score_correction_bias` (E,), float32 whatever the model.

    Arguments as in route_reference, and impl: "reference" or "fused".
    """

    def __init__(
        self, hidden: int, n_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1,
        scale: float = 1.0, normalize: bool = True, impl: str = "fused",
    ):
        super().__init__()
        _check_choice(n_experts, top_k, n_group, topk_group)
        self.settings = (top_k, n_group, topk_group, scale, normalize)
        self.route = _choose_twin(impl, route_reference, route_fused)
        self.weight = nn.Parameter(normal_init_(torch.empty(n_experts, hidden)))
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Let the bias follow .to(device) but no change of dtype: in bf16 its steps vanish and tokens reroute."""
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        device = self.e_score_correction_bias.device
        materialised = kept.is_meta and device.type != "meta"  # there were no values to move
        self.e_score_correction_bias = torch.zeros_like(kept, device=device) if materialised else kept.to(device)
        return self

    def forward(self, x: Tensor, pinned: Tensor | None = None) -> Routing:
        """x: (T,C) float; pinned: (T,K) int64 or None -> Routing."""
        with torch.autocast(x.device.type, enabled=False):  # scores stay float32
            return self.route(x, self.weight, self.e_score_correction_bias, *self.settings, pinned)


class Experts(nn.Module):
    """Owns the routed experts, stacked: gate_proj and up_proj (E,F,C), down_proj (E,C,F).

    hidden: C; width: F; n_experts: E; impl: "reference" or "fused"; qat: quantise the weights to int4 in forward.
    Weights act in the dtype of the tokens.
    """

    def __init__(self, hidden: int, width: int, n_experts: int, impl: str = "fused", qat: bool = False):
        super().__init__()
        if qat and (hidden % INT4_GROUP or width % INT4_GROUP):
            raise MoEError(f"qat: hidden {hidden} and expert width {width} must be multiples of {INT4_GROUP}")
        self.qat = qat
        self.run = _choose_twin(impl, experts_reference, experts_fused)
        self.gate_proj = nn.Parameter(normal_init_(torch.empty(n_experts, width, hidden)))
        self.up_proj = nn.Parameter(normal_init_(torch.empty(n_experts, width, hidden)))
        self.down_proj = nn.Parameter(normal_init_(torch.empty(n_experts, hidden, width)))

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x: (T,C) float; weights: (T,K) float; index: (T,K) int64 -> (T,C)."""
        matrices = (self.gate_proj, self.up_proj, self.down_proj)
        if self.qat:
            matrices = tuple(fake_quant(matrix) for matrix in matrices)
        return self.run(x, weights, index, *(matrix.to(x.dtype) for matrix in matrices))


class MoE(nn.Module):
    """Router, routed experts and shared experts under the released names `gate`, `experts`, `shared_experts`.

        y = sum over the chosen of weight * expert(x) + shared_experts(x)

    hidden: C; width: F; n_experts: E; top_k: K; n_group, topk_group, scale, normalize: as in route_reference;
    n_shared: shared experts, one MLP of n_shared * width (0: none); impl: "reference" or "fused";
    qat: int4 fake quantisation of the routed experts.
    Raises MoEError for settings the router cannot honour, and for top_k = 1 with normalize: the weight would be
    constant and the router never learn.
    """

    def __init__(
        self, hidden: int, width: int, n_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1,
        scale: float = 1.0, normalize: bool = True, n_shared: int = 1, impl: str = "fused", qat: bool = False,
    ):
        super().__init__()
        if top_k == 1 and normalize:
            raise MoEError("top_k = 1 with normalized weights gives the router no gradient; take top_k >= 2")
        self.balance_loss = _choose_twin(impl, sequence_balance_loss_reference, sequence_balance_loss_fused)
        self.gate = Router(hidden, n_experts, top_k, n_group, topk_group, scale, normalize, impl)
        self.experts = Experts(hidden, width, n_experts, impl, qat)
        self.shared_experts = MLP(hidden, width * n_shared) if n_shared else None

    def forward(self, x: Tensor, valid: Tensor | None = None, pinned: Tensor | None = None):
        """Send each token through its experts.

        Args: x: (B,T,C) float; valid: (B,T) bool, False at padding, which is computed but not counted;
            pinned: (B,T,K) int64: experts to use instead of the router's choice
        Returns: y (B,T,C), RouterStats
        """
        B, T, _ = x.shape
        tokens = x.flatten(0, 1)  # (B*T,C)
        routing = self.gate(tokens, None if pinned is None else pinned.flatten(0, 1))
        y = self.experts(tokens, routing.weights, routing.index).unflatten(0, (B, T))  # (B,T,C)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        scores = routing.scores.unflatten(0, (B, T))  # (B,T,E)
        index = routing.index.unflatten(0, (B, T))  # (B,T,K)
        counts = load_counts(index, scores.shape[2], valid)
        return y, RouterStats(counts, self.balance_loss(scores, index, valid))
