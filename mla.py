"""Multi-head latent attention (MLA) with rotary positions and YaRN — K2.5 report 4.2, Kimi K2 report 2.

Keys and values of all heads are linear images of one small latent vector per token, so the cache holds
only that latent (R numbers, after its norm) and one rotated key shared by all heads (P numbers):
576 numbers per token and layer at released size.

    q          = q_b · norm(q_a · x)                     split per head into [q_nope N | q_rope P]
    [c, k_r]   = kv_a · x                                split into [R | P]
    [k_n, v]   = kv_b · norm(c)                          split per head into [N | V]
    logit(t,s) = scale · (q_nope·k_n + rope(q_rope)·rope(k_r))

Public names: Yarn, rope_frequencies, softmax_scale, rope_table, apply_rope, apply_rope_half_split,
interleaved_to_half_split, visibility, mla_attention_reference, mla_attention_fused,
mla_attention_absorbed, max_logits_reference, max_logits_fused, LatentCache, MLA, RMSNorm.

Letters: B batch, T query tokens, S key tokens, H heads, C hidden, Q query rank, R latent rank,
N/P/V nope/rope/value head dims, J = N + P.     Tests: pytest tests/test_mla.py
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------- rotary positions


@dataclass(frozen=True)
class Yarn:
    """YaRN's context extension, a property of the config and never of a length (`rope_scaling`).

    `factor` 1 switches it off: frequencies and scales are then those of plain RoPE.
    """

    factor: float = 1.0  # rope_scaling.factor
    original_max_position_embeddings: int = 4096  # rope_scaling.original_max_position_embeddings
    beta_fast: float = 32.0  # rope_scaling.beta_fast: full turns above which a frequency is left alone
    beta_slow: float = 1.0  # rope_scaling.beta_slow: full turns below which it is divided by `factor`
    mscale: float = 1.0  # rope_scaling.mscale: enters cos and sin only
    mscale_all_dim: float = 1.0  # rope_scaling.mscale_all_dim: enters cos and sin, and the softmax scale


def _mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(rope_dim, theta, yarn):
    """Angular frequencies of the P/2 rotated pairs, radians per token.

    f_i = θ^(−2i/P); under YaRN f_i is blended with f_i/factor by a linear ramp that runs from the index
    that makes `beta_fast` turns in the original context to the one that makes `beta_slow`.

    rope_dim: int — P, even; theta: float; yarn: Yarn.
    Returns (P/2,) float64 tensor on the CPU. Raises ValueError when P is odd. Source: K2 report 2.4.
    """
    if rope_dim % 2:
        raise ValueError(f"rope dimension {rope_dim} is odd: rotary positions turn pairs; choose an even one")
    pair = torch.arange(0, rope_dim, 2, dtype=torch.float64, device="cpu")  # (P/2,), whatever the default device
    frequency = theta ** (-pair / rope_dim)
    if yarn.factor <= 1:
        return frequency

    def index_of(turns):  # the (fractional) pair index whose frequency makes `turns` turns in the original context
        return rope_dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), rope_dim - 1)
    high = high + 0.001 if high == low else high  # a step instead of a ramp, without dividing by zero
    ramp = ((pair / 2 - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / yarn.factor * ramp


def softmax_scale(nope_dim, rope_dim, yarn):
    """(N+P)^−½ · (0.1 · mscale_all_dim · ln factor + 1)²; 0.144680 at released size. `mscale` has no part in it."""
    return (nope_dim + rope_dim) ** -0.5 * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rope_table(positions, rope_dim, theta, yarn, dtype=torch.float32):
    """cos and sin of every position's angles, computed in float64 and then rounded to `dtype`.

    Both are scaled by mscale(f, mscale)/mscale(f, mscale_all_dim), which is 1 for K2.5.

    positions: (B,T) int64. Returns two (B,T,P/2) tensors of `dtype` (float32 or float64, never less:
    bfloat16 tables cost 17 % in the low frequencies).
    """
    frequency = rope_frequencies(rope_dim, theta, yarn).to(positions.device)
    angle = positions[..., None].double() * frequency  # (B,T,P/2)
    ratio = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return (angle.cos() * ratio).to(dtype), (angle.sin() * ratio).to(dtype)


def apply_rope(x, table):
    """Turn adjacent pairs (x0,x1),(x2,x3)… by the table's angles: the layout of the released weights.

    x: (B,T,...,P) float; table: cos, sin of (B,T,P/2). Returns x's shape and dtype; lengths are kept.
    """
    cos, sin = (a.view(*a.shape[:2], *[1] * (x.ndim - 3), a.shape[-1]) for a in table)  # (B,T,1..,P/2)
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)  # (B,T,...,P/2,2)
    return turned.flatten(-2).to(x.dtype)  # (B,T,...,P)


def apply_rope_half_split(x, table):
    """The other layout in the field: pairs (x_i, x_{i+P/2}). Equal to `apply_rope` up to `interleaved_to_half_split`."""
    cos, sin = (a.view(*a.shape[:2], *[1] * (x.ndim - 3), a.shape[-1]) for a in table)  # (B,T,1..,P/2)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def interleaved_to_half_split(rope_dim):
    """The permutation p with half_split(x[..., p]) = interleaved(x)[..., p]; apply it to weight rows to convert a port."""
    return torch.cat((torch.arange(0, rope_dim, 2), torch.arange(1, rope_dim, 2)))


# ---------------------------------------------------------------------------------------- attention


def visibility(query_segments, key_segments):
    """Who may see whom: the same segment, and not the future. Queries are the last T of the S keys.

    query_segments: (B,T) int64; key_segments: (B,S) int64. Returns (B,1,T,S) bool. Padding (segment −1)
    sees padding, so no row of the softmax is ever empty.
    """
    past = _past(query_segments, key_segments)
    return past & (query_segments[:, :, None] == key_segments[:, None, :])[:, None]  # (B,1,T,S)


def _past(query, key, mask=None):
    """The mask (1,1,T,S) bool of rows of one segment, from (B,T,...) queries and (B,S,...) keys; or `mask` if given."""
    if mask is not None:
        return mask
    tokens, keys = query.shape[1], key.shape[1]
    query_index = torch.arange(keys - tokens, keys, device=key.device)
    return (query_index[:, None] >= torch.arange(keys, device=key.device))[None, None]


def _expand(latent, rope_key, kv_b, heads, nope_dim):
    """Latent (B,S,R) and shared rotated key (B,S,P) → keys (B,H,S,J) and values (B,H,S,V)."""
    batch, length = latent.shape[:2]
    expanded = F.linear(latent, kv_b).view(batch, length, heads, -1).transpose(1, 2)  # (B,H,S,N+V)
    nope_key, value = expanded.split((nope_dim, expanded.shape[-1] - nope_dim), dim=-1)
    shared = rope_key[:, None].expand(-1, heads, -1, -1)  # (B,H,S,P)
    return torch.cat((nope_key, shared), dim=-1), value


def mla_attention_reference(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """MLA written out: expand keys and values of every head, one full softmax.

    q_nope: (B,T,H,N); q_rope: (B,T,H,P) — already rotated; latent: (B,S,R) — after its norm;
    rope_key: (B,S,P) — rotated, shared by the heads; kv_b: (H·(N+V),R); mask: (B,1,T,S) bool, or None where each
    row is one segment, of which the queries are the last T tokens; scale: float. Returns (B,T,H·V).
    Source: K2.5 report 4.2; DeepSeek-V2 report 2.1.
    """
    heads, nope_dim = q_nope.shape[2:]
    mask = _past(q_nope, latent, mask)
    key, value = _expand(latent, rope_key, kv_b, heads, nope_dim)
    query = torch.cat((q_nope, q_rope), dim=-1)  # (B,T,H,J)
    logits = torch.einsum("bthj,bhsj->bhts", query, key) * scale
    weights = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)  # (B,H,T,S)
    return torch.einsum("bhts,bhsv->bthv", weights, value).flatten(2)  # (B,T,H·V)


def mla_attention_fused(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """The same through `scaled_dot_product_attention`: for training and prefill. Arguments as the reference.

    The flash kernels want equal head dims, so values are padded with zeros up to N + P where they are narrower.
    Without a mask they skip the blocks that lie in the future: their `is_causal`, which counts queries from key 0.
    """
    heads, nope_dim = q_nope.shape[2:]
    if q_nope.shape[1] < latent.shape[1]:
        mask = _past(q_nope, latent, mask)
    key, value = _expand(latent, rope_key, kv_b, heads, nope_dim)
    query = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B,H,T,J)
    value_dim, short = value.shape[-1], query.shape[-1] - value.shape[-1]
    if short > 0:
        value = F.pad(value, (0, short))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :value_dim].transpose(1, 2).flatten(2)  # (B,T,H·V)


def mla_attention_absorbed(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """The same without ever expanding keys or values: for decoding. Arguments as the reference.

    kv_b's key half is absorbed into the query (N → R) and its value half into the output (R → V), so that
    attention is multi-query over the cached latents themselves: S·(R+P) numbers read instead of S·H·(N+P+V).
    """
    tokens, heads, nope_dim = q_nope.shape[1:]
    up = kv_b.view(heads, -1, kv_b.shape[-1])  # (H,N+V,R)
    query = torch.einsum("bthn,hnr->bhtr", q_nope, up[:, :nope_dim]).flatten(1, 2)  # (B,H·T,R)
    # The heads share their keys, so they are rows of one product: as a batch they would each get a copy of the cache.
    logits = q_rope.transpose(1, 2).flatten(1, 2) @ rope_key.mT  # (B,H·T,S)
    logits = torch.baddbmm(logits, query, latent.mT, beta=scale, alpha=scale)
    logits = logits.unflatten(1, (heads, tokens)).masked_fill(~_past(q_nope, latent, mask), float("-inf"))  # (B,H,T,S)
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(latent.dtype)
    mixed = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, tokens))  # (B,H,T,R)
    return torch.einsum("bhtr,hvr->bthv", mixed, up[:, nope_dim:]).flatten(2)  # (B,T,H·V)


def max_logits_reference(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """The largest visible attention logit of each head, (H,): what QK-Clip looks at. Arguments as the attention."""
    mask = _past(q_nope, latent, mask)
    key, _ = _expand(latent, rope_key, kv_b, *q_nope.shape[2:])
    logits = torch.einsum("bthj,bhsj->bhts", torch.cat((q_nope, q_rope), dim=-1), key) * scale
    return logits.masked_fill(~mask, float("-inf")).amax(dim=(0, 2, 3)).detach()


@torch.no_grad()
def max_logits_fused(q_nope, q_rope, latent, rope_key, kv_b, mask, scale, block=256):
    """The same, streaming over blocks of queries and only their past, so the whole matrix never exists."""
    mask = _past(q_nope, latent, mask)
    key, _ = _expand(latent, rope_key, kv_b, *q_nope.shape[2:])
    query = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B,H,T,J)
    offset = key.shape[2] - query.shape[2]
    largest = query.new_full((query.shape[1],), float("-inf"))
    for start in range(0, query.shape[2], block):
        stop = min(start + block, query.shape[2])
        logits = query[:, :, start:stop] @ key[:, :, : offset + stop].transpose(-1, -2)  # (B,H,block,≤S)
        logits = logits.masked_fill_(~mask[:, :, start:stop, : offset + stop], float("-inf"))
        largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)))
    return largest * scale


# -------------------------------------------------------------------------------------------- modules


class LatentCache:
    """What decoding remembers: per layer and token the normed latent (R) and the rotated shared key (P).

    Nothing a model computes depends on `capacity`; only the filled part is ever read.

    layers, batch, capacity: int; latent_dim, rope_dim: int — R, P; dtype, device as the model's.
    """

    def __init__(self, layers, batch, capacity, latent_dim, rope_dim, dtype=torch.float32, device="cpu"):
        self.latent = torch.empty(layers, batch, capacity, latent_dim, dtype=dtype, device=device)
        self.rope_key = torch.empty(layers, batch, capacity, rope_dim, dtype=dtype, device=device)
        self.segment_ids = torch.empty(batch, capacity, dtype=torch.long, device=device)
        self.next_position = torch.zeros(batch, dtype=torch.long, device=device)
        self.length = 0

    @property
    def capacity(self):
        """Tokens there is room for."""
        return self.latent.shape[2]

    def extend(self, segment_ids, positions):
        """Make room for T new tokens; returns the segment ids (B,S) of all keys. Raises ValueError when full."""
        length = self.length + segment_ids.shape[1]
        if length > self.capacity:
            raise ValueError(f"cache holds {self.capacity} tokens and {length} are needed: make a larger LatentCache")
        self.segment_ids[:, self.length : length] = segment_ids
        self.next_position = positions[:, -1] + 1
        self.length = length
        return self.segment_ids[:, :length]

    def write(self, layer, latent, rope_key):
        """Store one layer's new (B,T,R) and (B,T,P) at the end; returns that layer's (B,S,R) and (B,S,P)."""
        start = self.length - latent.shape[1]
        self.latent[layer, :, start : self.length] = latent
        self.rope_key[layer, :, start : self.length] = rope_key
        return self.latent[layer, :, : self.length], self.rope_key[layer, :, : self.length]


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, in at least float32, over the last dimension."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        """x: (..., dim) float → the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


# The released modelling code gives its two latent norms this eps, not the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """The attention block under the released names; owns weights and calls one twin.

    config: has hidden_size, num_attention_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim,
    qk_rope_head_dim, v_head_dim, rope_theta, yarn and impl ("reference" | "fused").
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_attention_heads
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)

    def project(self, x, table):
        """x (B,T,C) → q_nope (B,T,H,N), rotated q_rope (B,T,H,P), normed latent (B,T,R) and rotated rope_key (B,T,P)."""
        config = self.config
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.view(*x.shape[:2], config.num_attention_heads, -1)  # (B,T,H,J)
        q_nope, q_rope = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        latent, rope_key = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return q_nope, apply_rope(q_rope, table), self.kv_a_layernorm(latent), apply_rope(rope_key, table)

    def forward(self, x, table, mask, cache=None, layer=0, asked=None):
        """x: (B,T,C); table: rope_table of the T tokens; mask: as the twins'; cache: LatentCache or None;
        layer: int — row of the cache; asked: (B,T) bool — the queries whose max logits are wanted (padding must not
        reach QK-Clip), or None. Returns out (B,T,C) and max logits (H,), −inf where no query was asked, or None.
        """
        config = self.config
        q_nope, q_rope, latent, rope_key = self.project(x, table)
        decoding = cache is not None and cache.length > x.shape[1]
        if cache is not None:
            latent, rope_key = cache.write(layer, latent, rope_key)  # (B,S,R), (B,S,P)
        inputs = (q_nope, q_rope, latent, rope_key, self.kv_b_proj.weight)
        scale = softmax_scale(config.qk_nope_head_dim, config.qk_rope_head_dim, config.yarn)
        if config.impl == "reference":
            attend, largest = mla_attention_reference, max_logits_reference
        else:
            attend, largest = mla_attention_absorbed if decoding else mla_attention_fused, max_logits_fused
        out = self.o_proj(attend(*inputs, mask, scale))
        return out, None if asked is None else largest(*inputs, _past(q_nope, latent, mask) & asked[:, None, :, None], scale)
