"""K25's numeric operations a third time, in tinygrad: written from the report's formulas, not from the torch twins.

K2.5 report 4.2 (attention, experts, vision tower), 4.1 (projector), 2.1 (int4). Every function is one operation of the
oracle, under its name and with its arguments, on tinygrad tensors; settings stay plain numbers and lists. tinygrad
records what is written here and its scheduler decides which operations share a kernel: arithmetic, gathers and
broadcasts all melt into the sums around them, so a matrix product with its unpacking before and its bias after is one
kernel. A kernel ends where a sum must be finished before its result can be used: a softmax needs its row's maximum,
then its row's sum. tests/test_tinygrad_twins.py counts the kernels.

Sums run in at least float32 and results come back in the dtype of the input, or wider where an operation says so.
The environment's DEV chooses the device; without it the default is CPU, compiled by clang, or PYTHON, interpreted and
slow, where there is no clang.

Public names: ARRAYS, DTYPES, rms_norm, rope, rope_half_split, rope_2d, mla_attention, mla_decode, route, experts, swiglu,
int4_unpack, int4_linear, fake_quant, patch_embed, vit_attention, pool_merge, project, cross_entropy,
value_and_gradients, jitted.

Letters: B batch, T tokens, S keys, H heads, C hidden, R latent rank, N/P/V nope/rope/value head dims, E experts,
K chosen, F expert width, O, I output and input width of one matrix, U vocabulary, L patches, D vision width,
A vision heads, G vision head dim, M merged media tokens.     Tests: pytest tests/test_tinygrad_twins.py
"""

import itertools
import math
import shutil

from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.helpers import DEV, EMULATED_DTYPES

ARRAYS = "tinygrad"  # tells the conformance harness which arrays these functions take
DTYPES = ("float32", "bfloat16")

# Where the environment does not choose: compiled by clang, or interpreted where there is none.
if not DEV.device:
    DEV.value = "CPU" if shutil.which("clang") else "PYTHON"
# clang knows bfloat16 on x86 only from version 15 on, so tinygrad stores it as 16 bits and computes in float32.
EMULATED_DTYPES.value = EMULATED_DTYPES.value or "bfloat16"


def _wide(x):
    """x in at least float32."""
    return x if x.dtype == dtypes.float64 else x.float()


def _linear(x, weight):
    """x Wᵀ, in at least float32: x (...,I), weight (O,I) → (...,O)."""
    return _wide(x) @ _wide(weight).T


# ------------------------------------------------------------------------------------ norms and positions


def rms_norm(x, weight, eps):
    """x / √(mean(x²) + eps) · weight over the last dimension.

    x: (...,C) float; weight: (C,) float; eps: float. Returns x's shape and dtype. Source: K2.5 report 4.2.
    """
    wide = _wide(x)
    root = (wide.square().mean(-1, keepdim=True) + eps).sqrt()  # (...,1)
    return (wide / root * _wide(weight)).cast(x.dtype)


def _turn(first, second, cos, sin):
    """The two coordinates of each pair after a rotation by its angle, in at least float32."""
    first, second, cos, sin = _wide(first), _wide(second), _wide(cos), _wide(sin)
    return first * cos - second * sin, second * cos + first * sin


def rope(x, cos, sin):
    """Turn adjacent pairs: (x0 + i·x1) · exp(i·angle), (x2 + i·x3) · …

    x: (B,T,H,P) float; cos, sin: (B,T,P/2) float. Returns x's shape and dtype. Source: K2.5 report 4.2.
    """
    pairs = x.unflatten(-1, (x.shape[-1] // 2, 2))  # (B,T,H,P/2,2)
    turned = _turn(pairs[..., 0], pairs[..., 1], cos.unsqueeze(2), sin.unsqueeze(2))
    return Tensor.stack(*turned, dim=-1).flatten(-2).cast(x.dtype)  # (B,T,H,P)


def rope_half_split(x, cos, sin):
    """Turn pairs (x_i, x_{i+P/2}) by angle i: the layout of many ports. Arguments and result as `rope`."""
    pairs = x.unflatten(-1, (2, x.shape[-1] // 2))  # (B,T,H,2,P/2)
    turned = _turn(pairs[..., 0, :], pairs[..., 1, :], cos.unsqueeze(2), sin.unsqueeze(2))
    return Tensor.stack(*turned, dim=-2).flatten(-2).cast(x.dtype)  # (B,T,H,P)


def rope_2d(x, grids, theta):
    """Turn adjacent pairs of every patch by its column (pairs 0, 2, …) and row (pairs 1, 3, …), θ^(−4i/G) rad per step.

    No table exists: each angle is computed, in float64, inside the kernel that uses it.

    x: (L,A,G) float; grids: one (t,h,w) per item; theta: float. Returns x's shape and dtype.
    Source: K2.5 report 4.2; the released tower's 2-D rotary embedding.
    """
    if not grids:
        return x
    seats = [(column, row) for t, h, w in grids for _ in range(t) for row in range(h) for column in range(w)]
    width = x.shape[-1]
    frequency = Tensor([theta ** (-i / width) for i in range(0, width, 4)], dtype=dtypes.float64)  # (G/4,)
    angle = Tensor(seats, dtype=dtypes.float64).unsqueeze(1) * frequency.unsqueeze(1)  # (L,G/4,2)
    cos, sin = (a.cast(_wide(x).dtype).reshape(len(seats), 1, -1) for a in (angle.cos(), angle.sin()))  # (L,1,G/2)
    pairs = x.unflatten(-1, (width // 2, 2))  # (L,A,G/2,2)
    return Tensor.stack(*_turn(pairs[..., 0], pairs[..., 1], cos, sin), dim=-1).flatten(-2).cast(x.dtype)  # (L,A,G)


# --------------------------------------------------------------------------------------- latent attention


def _attend(logits, mask, values, formula):
    """Softmax of the visible logits (last dimension: keys), then `formula` with the values."""
    weights = mask.where(logits, -math.inf).softmax(-1)
    return Tensor.einsum(formula, weights, values)


def mla_attention(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """Latent attention with keys and values of every head: softmax(scale · (q·W_k c + q_r·k_r)) · W_v c.

    q_nope: (B,T,H,N); q_rope: (B,T,H,P), rotated; latent c: (B,S,R), after its norm; rope_key k_r: (B,S,P), rotated,
    shared by the heads; kv_b: (H·(N+V),R), per head W_k above W_v; mask: (B,1,T,S) bool; scale: float.
    Returns (B,T,H·V) in latent's dtype. Source: K2.5 report 4.2; DeepSeek-V2 report 2.1.
    """
    heads, nope_dim = q_nope.shape[2:]
    up = _wide(kv_b).unflatten(0, (heads, -1))  # (H,N+V,R)
    key = Tensor.einsum("bsr,hnr->bshn", _wide(latent), up[:, :nope_dim])
    value = Tensor.einsum("bsr,hvr->bshv", _wide(latent), up[:, nope_dim:])
    logits = Tensor.einsum("bthn,bshn->bhts", _wide(q_nope), key)
    logits = logits + Tensor.einsum("bthp,bsp->bhts", _wide(q_rope), _wide(rope_key))
    return _attend(logits * scale, mask, value, "bhts,bshv->bthv").flatten(2).cast(latent.dtype)  # (B,T,H·V)


def mla_decode(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """The same with W_k moved to the query and W_v to the output: softmax(scale · (W_kᵀq·c + q_r·k_r)) · c, then W_v.

    No key or value of any head ever exists: for few queries and many keys. Arguments and result as `mla_attention`.
    """
    heads, nope_dim = q_nope.shape[2:]
    up = _wide(kv_b).unflatten(0, (heads, -1))  # (H,N+V,R)
    query = Tensor.einsum("bthn,hnr->bthr", _wide(q_nope), up[:, :nope_dim])
    logits = Tensor.einsum("bthr,bsr->bhts", query, _wide(latent))
    logits = logits + Tensor.einsum("bthp,bsp->bhts", _wide(q_rope), _wide(rope_key))
    mixed = _attend(logits * scale, mask, _wide(latent), "bhts,bsr->bthr")
    return Tensor.einsum("bthr,hvr->bthv", mixed, up[:, nope_dim:]).flatten(2).cast(latent.dtype)  # (B,T,H·V)


# ------------------------------------------------------------------------------------------------ experts


def _rank(values):
    """Place of each value in descending order, the lower index first among equals: (...,n) → (...,n) int.

    By counting those that go before: a comparison of all pairs fuses into one kernel, a sort does not.
    """
    mine, other = values.unsqueeze(-1), values.unsqueeze(-2)  # (...,n,1), (...,1,n)
    seat = Tensor.arange(values.shape[-1])
    before = (other > mine) | ((other == mine) & (seat < seat.unsqueeze(-1)))  # (...,n,n)
    return before.sum(-1)


def route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    """Choose K experts per token by s + bias, s = sigmoid(W x); weigh them by s alone: scale · s / Σ chosen s.

    With groups, only the topk_group groups with the largest sum of their two best s + bias may be chosen from. The
    lower index wins a tie, among experts and among groups.

    x: (T,C) float; weight: (E,C) float; bias: (E,) float; top_k: K; n_group, topk_group: int; scale: float;
    pinned: (T,K) int or None — experts to take instead of choosing.
    Returns weights (T,K) in at least float32, index (T,K) int32, best first. Source: DeepSeek-V3 report, equations 12–16.
    """
    # stored once, so that all comparisons see the same rounding
    scores = _linear(x, weight).sigmoid().contiguous()  # (T,E)
    index = pinned
    if index is None:
        biased = (scores + bias).detach().unflatten(1, (n_group, weight.shape[0] // n_group))  # (T,n_group,E/n_group)
        group_score = (_rank(biased) < 2).where(biased, 0).sum(-1)  # (T,n_group)
        kept = _rank(group_score) < topk_group
        rank = _rank(kept.unsqueeze(-1).where(biased, -math.inf).flatten(1))  # (T,E)
        at_place = rank.unsqueeze(1) == Tensor.arange(top_k).unsqueeze(-1)  # (T,K,E): one expert per place
        index = (at_place * Tensor.arange(weight.shape[0])).sum(-1)  # (T,K)
    chosen = scores.gather(1, index)  # (T,K)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale, index


def experts(x, weights, index, gate, up, down):
    """Σ_k weights[t,k] · down_e (silu(gate_e x_t) · up_e x_t) with e = index[t,k].

    Each token gathers the matrices of its own experts, (T,K,F,C) in formula only: the gather is an address inside the
    kernel that sums over C or F.

    x: (T,C) float; weights: (T,K) float32; index: (T,K) int; gate, up: (E,F,C) float; down: (E,C,F) float.
    Returns (T,C) in x's dtype. Source: DeepSeek-V3 report, equation 12.
    """
    gated = Tensor.einsum("tc,tkfc->tkf", _wide(x), _wide(gate[index])).silu()
    hidden = gated * Tensor.einsum("tc,tkfc->tkf", _wide(x), _wide(up[index]))  # (T,K,F)
    return Tensor.einsum("tk,tkf,tkcf->tc", weights, hidden, _wide(down[index])).cast(x.dtype)


def swiglu(x, gate, up, down):
    """down (silu(gate x) · up x).

    x: (T,C) float; gate, up: (F,C) float; down: (C,F) float. Returns (T,C) in x's dtype. Source: K2.5 report 4.2.
    """
    return _linear(_linear(x, gate).silu() * _linear(x, up), down).cast(x.dtype)


def int4_unpack(packed, scale):
    """weight = (nibble − 8) · scale: nibble j of word w is input 8w + j; 32 inputs share one scale.

    packed: (O,I/8) int32; scale: (O,I/32) bfloat16. Returns (O,I) float32. Source: the released checkpoint.
    """
    nibbles = packed.bitcast(dtypes.uint32).unsqueeze(-1) >> Tensor.arange(0, 32, 4, dtype=dtypes.uint32)  # (O,I/8,8)
    codes = (nibbles & 15).flatten(1).float() - 8  # (O,I)
    return (codes.unflatten(1, (-1, 32)) * scale.float().unsqueeze(-1)).flatten(1)


def int4_linear(x, packed, scale):
    """x Wᵀ with W kept as int4: unpacked inside the kernel that multiplies.

    x: (T,I) float; packed, scale: as `int4_unpack`. Returns (T,O) in x's dtype.
    """
    return _linear(x, int4_unpack(packed, scale)).cast(x.dtype)


def fake_quant(weight):
    """weight rounded to int4 and back, per group of 32 inputs: round(w / s) · s with s = bfloat16(max |w| / 7); gradient 1.

    weight: (O,I) float, I a multiple of 32. Returns (O,I) in weight's dtype. Source: K2.5 report 2.1.
    """
    # Quotients are taken in float64 and then rounded: tinygrad divides by multiplying with a rounded reciprocal.
    groups = weight.detach().float().unflatten(1, (-1, 32))  # (O,I/32,32)
    scale = (groups.abs().max(-1, keepdim=True).double() / 7).float().bfloat16().float()  # (O,I/32,1)
    divisor = (scale == 0).where(1, scale)  # a group of zeros stays zero
    codes = (groups.double() / divisor.double()).float().round().clamp(-7, 7)
    # w − w is exactly 0 forward and carries the gradient backward
    return (codes * scale).flatten(1).cast(weight.dtype) + (weight - weight.detach())


# ------------------------------------------------------------------------------------------------- vision


def patch_embed(patches, weight, bias):
    """The patch convolution as one matrix product: x Wᵀ + b.

    patches: (L,3pp) float; weight: (D,3,p,p) float; bias: (D,) float. Returns (L,D) in weight's dtype.
    """
    return (_linear(patches, weight.flatten(1)) + _wide(bias)).cast(weight.dtype)


def vit_attention(q, k, v, lengths):
    """Bidirectional attention inside each item: softmax_j(q_i·k_j / √G) over the patches j of i's own item.

    q, k, v: (L,A,G) float; lengths: patches of each item, in order. Returns (L,A,G) in v's dtype.
    Source: K2.5 report 4.2 (NaViT packing).
    """
    if not lengths:
        return q + k + v  # (0,A,G)
    item = sum((Tensor.arange(q.shape[0]) >= end).int() for end in itertools.accumulate(lengths))  # (L,), by arithmetic
    same = item.unsqueeze(1) == item  # (L,L)
    logits = Tensor.einsum("qag,kag->aqk", _wide(q), _wide(k)) / math.sqrt(q.shape[-1])
    return _attend(logits, same, _wide(v), "aqk,kag->qag").cast(v.dtype)


def pool_merge(x, grids):
    """Mean over the frames of an item, then each 2×2 block of patches side by side.

    x: (L,D) float; grids: one (t,h,w) per item, h and w even. Returns (M,4,D) in x's dtype, M = Σ (h/2)(w/2).
    Source: K2.5 report 4.2 (temporal pooling, patch merger).
    """
    width = x.shape[1]
    if not grids:
        return x.reshape(0, 4, width)
    items = _wide(x).split([t * h * w for t, h, w in grids])
    merged = []
    for (t, h, w), item in zip(grids, items):
        blocks = item.reshape(t, h // 2, 2, w // 2, 2, width).permute(0, 1, 3, 2, 4, 5)  # (t,h/2,w/2,2,2,D)
        merged.append(blocks.mean(0).reshape(-1, 4, width))  # ((h/2)(w/2),4,D)
    return Tensor.cat(*merged).cast(x.dtype)


def project(merged, norm_weight, norm_bias, fc0_weight, fc0_bias, fc1_weight, fc1_bias, eps):
    """LayerNorm of each patch, concatenate 4, linear, GELU(erf), linear.

    merged: (M,4,D) float; norm_weight, norm_bias: (D,); fc0_weight: (4D,4D); fc0_bias: (4D,); fc1_weight: (C,4D);
    fc1_bias: (C,); eps: float. Returns (M,C) in merged's dtype; tinygrad's erf is good to 1.5e-7 in any dtype.
    Source: K2.5 report 4.1.
    """
    wide = _wide(merged)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normed = (normed * _wide(norm_weight) + _wide(norm_bias)).flatten(1)  # (M,4D)
    hidden = (_linear(normed, fc0_weight) + _wide(fc0_bias)).gelu(approximate="none")
    return (_linear(hidden, fc1_weight) + _wide(fc1_bias)).cast(merged.dtype)


# --------------------------------------------------------------------------------------------------- loss


def cross_entropy(hidden, head, targets):
    """−log softmax(head · hidden)[target] per token, 0 where the target is −100.

    hidden: (T,C) float; head: (U,C) float; targets: (T,) int. Returns (T,) in at least float32.
    """
    logits = _linear(hidden, head)  # (T,U)
    chosen = logits.gather(1, targets.maximum(0).unsqueeze(1)).squeeze(1)  # (T,)
    return (targets == -100).where(0, logits.logsumexp(1) - chosen)


# ------------------------------------------------------------------------------- gradients and replay


def value_and_gradients(function, wanted):
    """A function of (direction, *arguments) that returns [value, gradient, …].

    The value is `function`'s first result; the gradients are those of Σ direction · value.
    wanted: positions of the tensor arguments whose gradients are returned, in order.
    """

    def both(direction, *arguments):
        result = function(*arguments)
        value = result[0] if isinstance(result, tuple) else result
        return [value, *value.gradient(*(arguments[i] for i in wanted), gradient=direction)]

    return both


def jitted(function):
    """`function` through TinyJit: the first call runs, the second records its kernels, later ones only replay them.

    TinyJit bakes plain settings into the recording, gives back the recording's input where a result is an input, and
    writes every call's results into the same buffers. Here each combination of settings, shapes and dtypes has its own
    recording, and results are copied inside it and after it.
    """
    recordings = {}

    def copies(*arguments):
        result = function(*arguments)
        return tuple(tensor.clone() for tensor in (result if isinstance(result, list | tuple) else [result]))

    def call(*arguments):
        key = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else repr(a) for a in arguments)
        results = tuple(tensor.clone().realize() for tensor in recordings.setdefault(key, TinyJit(copies))(*arguments))
        return results if len(results) > 1 else results[0]

    return call
