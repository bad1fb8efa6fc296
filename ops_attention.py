"""The operations of attention: norm, visibility, MLA, its cache, its largest logits — K2.5 report 4.2, K2 report 2.

Each block holds one operation: its reference, how inputs are drawn, the mistakes that people make in it.

Public names: rms_norm, visibility, mla_attention, mla_decode, cache_update, max_logits, OPS.
Letters: B batch, T query tokens, S key tokens, H heads, C hidden, R latent rank, N/P/V nope/rope/value head dims,
W cache capacity.     Tests: pytest tests/test_ops_attention.py
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

import mla
from mla import LatentCache, RMSNorm
from op import Op, Suspect, normal

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# ------------------------------------------------------------------------------------------- rms_norm


def rms_norm(x, weight, eps):
    """Root-mean-square norm over the last dimension.

        y = x / √(mean(x²) + eps) · weight          the mean in at least float32

    x: (...,C) float; weight: (C,) float; eps: float. Returns y (...,C), dtype of x. Source: K2 report 2.3.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@st.composite
def _norm_cases(draw):
    lead = draw(st.sampled_from([(2,), (1,), (2, 3)]))
    width = draw(st.sampled_from([3, 1, 2, 9]))
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))  # tiny rows show a missing or misplaced eps
    x, weight = normal(draw, *lead, width, scale=scale), 1 + normal(draw, width)
    return {"x": x, "weight": weight, "eps": draw(st.sampled_from([1e-5, 1e-6]))}


def _norm_module(x, weight, eps):
    return torch.func.functional_call(RMSNorm(x.shape[-1], eps).to(x.dtype), {"weight": weight}, (x,))


def _norm_by_length(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * weight / ((wide * wide).sum(dim=-1, keepdim=True) / x.shape[-1] + eps).sqrt()).to(x.dtype)


def _eps_outside(x, weight, eps):
    return weight * x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps)


def _one_norm_for_all(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean() + eps)


def _unbiased_mean(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) / max(x.shape[-1] - 1, 1) + eps)


_RMS_NORM = Op(
    name="rms_norm",
    formula="y = x / sqrt(mean(x^2) + eps) * weight",
    source="K2 report 2.3",
    reference=rms_norm,
    cases=_norm_cases(),
    outputs=("y",),
    differentiable=("x", "weight"),
    dtypes=ALL_DTYPES,
    twins={"module": _norm_module},
    variants={"sum over width, weight before rounding": _norm_by_length},
    suspects=(
        Suspect("subtracts_mean", "subtracts the mean: that is LayerNorm",
                lambda x, weight, eps: rms_norm(x - x.mean(dim=-1, keepdim=True), weight, eps)),
        Suspect("no_eps", "eps is missing", lambda x, weight, eps: rms_norm(x, weight, 0.0)),
        Suspect("eps_fixed", "eps is a constant 1e-6, whatever is asked",
                lambda x, weight, eps: rms_norm(x, weight, 1e-6), "apache/tvm#15856"),
        Suspect("eps_outside", "eps is added to the root instead of under it", _eps_outside),
        Suspect("one_plus_weight", "multiplies by 1 + weight, as Gemma does",
                lambda x, weight, eps: rms_norm(x, 1 + weight, eps)),
        Suspect("no_weight", "the weight is missing",
                lambda x, weight, eps: rms_norm(x, torch.ones_like(weight), eps)),
        Suspect("one_norm_for_all", "the mean runs over the whole tensor instead of each token", _one_norm_for_all),
        Suspect("unbiased_mean", "divides the sum of squares by C - 1, as a variance", _unbiased_mean),
        Suspect("sum", "takes the sum of squares instead of their mean",
                lambda x, weight, eps: rms_norm(x, weight, eps / x.shape[-1]) * x.shape[-1] ** -0.5),
    ),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------- visibility


def visibility(query_segments, key_segments):
    """Who may see whom: the same document, and not the future. The queries are the last T of the S keys.

        mask[b,0,t,s] = (s ≤ S − T + t) and (query_segments[b,t] = key_segments[b,s])

    query_segments: (B,T) int64; key_segments: (B,S) int64 — document of each token, −1 for padding.
    Returns mask (B,1,T,S) bool, true where seen. Padding sees padding, so no row is empty.
    Source: K2.5 report C.1, sequence packing.
    """
    return mla.visibility(query_segments, key_segments)


def _draw_segments(draw, batch, keys, documents):
    """Rows of packed documents 0, 1, …, the last of them sometimes padding (−1); documents: of how many, choices."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16 - 1)))
    runs = torch.randint(draw(st.sampled_from(documents)), (batch, keys), generator=generator).sort(dim=1).values
    return torch.where(runs == runs.max(), -1, runs) if draw(st.booleans()) else runs


@st.composite
def _visibility_cases(draw):
    keys = draw(st.sampled_from([6, 9, 1, 2]))
    tokens = max(keys - draw(st.sampled_from([2, 0, 5])), 1)
    segments = _draw_segments(draw, draw(st.sampled_from([1, 2, 2])), keys, (2, 3, 1))
    return {"query_segments": segments[:, keys - tokens :], "key_segments": segments}


def _triangle(query, key, shift):
    """(1,1,T,S) bool: query t sees keys up to S − T + t + shift."""
    tokens, keys = query.shape[1], key.shape[1]
    return torch.ones(1, 1, tokens, keys, dtype=torch.bool).tril(keys - tokens + shift)


def _same(query, key):
    return (query[:, :, None] == key[:, None])[:, None]  # (B,1,T,S)


_VISIBILITY = Op(
    name="visibility",
    formula="mask[b,0,t,s] = s <= S - T + t and same segment",
    source="K2.5 report C.1, sequence packing",
    reference=visibility,
    cases=_visibility_cases(),
    outputs=("mask",),
    variants={"triangle": lambda query, key: _triangle(query, key, 0) & _same(query, key)},
    suspects=(
        Suspect("sees_the_future", "only documents count: the future is seen", _same),
        Suspect("sees_earlier_documents", "earlier documents are seen (>= instead of ==)",
                lambda query, key: _triangle(query, key, 0) & (query[:, :, None] >= key[:, None])[:, None]),
        Suspect("sees_other_documents", "only the past counts: other documents of the pack are seen",
                lambda query, key: _triangle(query, key, 0).repeat(len(query), 1, 1, 1), "huggingface/transformers#46634"),
        Suspect("queries_at_the_start", "the queries are taken as the first T keys instead of the last: wrong after a cache",
                lambda query, key: _triangle(query, key, query.shape[1] - key.shape[1]) & _same(query, key),
                "pytorch/pytorch#144858"),
        Suspect("blind_to_itself", "a token does not see itself (> instead of >=)",
                lambda query, key: _triangle(query, key, -1) & _same(query, key)),
        Suspect("sees_the_next", "a token sees the next one",
                lambda query, key: _triangle(query, key, 1) & _same(query, key)),
        Suspect("padding_sees_nothing", "rows of padding are empty: their softmax is 0/0, and NaN spreads from there",
                lambda query, key: visibility(query, key) & (query >= 0)[:, None, :, None], "pytorch/pytorch#103963"),
        Suspect("inverted", "true where hidden instead of where seen", lambda query, key: ~visibility(query, key)),
        Suspect("additive", "a float mask of 0 and -inf instead of bool",
                lambda query, key: torch.zeros(()).masked_fill(~visibility(query, key), -torch.inf)),
        Suspect("first_row_only", "every row of the batch gets the mask of the first",
                lambda query, key: visibility(query, key)[:1].repeat(len(query), 1, 1, 1)),
        Suspect("no_head_dimension", "the dimension of the heads is missing: (B,T,S)",
                lambda query, key: visibility(query, key)[:, 0]),
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- latent attention


def mla_attention(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """Multi-head latent attention with keys and values written out: for training and prefill.

        [kₕₛ N | vₕₛ V] = kv_bₕ · latentₛ             kv_b: head after head, N rows for keys, then V for values
        logitₕₜₛ = scale · (q_nopeₜₕ · kₕₛ + q_ropeₜₕ · rope_keyₛ)     −∞ where mask is false
        outₜ = concatenation over h of Σₛ softmaxₛ(logitₕₜₛ) vₕₛ

    q_nope: (B,T,H,N) float; q_rope: (B,T,H,P) float — rotated; latent: (B,S,R) float — after its norm;
    rope_key: (B,S,P) float — rotated, one for all heads; kv_b: (H·(N+V),R) float; mask: (B,1,T,S) bool, true where seen;
    scale: float. Returns out (B,T,H·V), dtype of latent. Source: K2.5 report 4.2; DeepSeek-V2 report 2.1.
    """
    return mla.mla_attention_reference(q_nope, q_rope, latent, rope_key, kv_b, mask, scale)


def mla_decode(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """The same numbers without expanding a key or a value, for few queries and many keys.

        q'ₜₕ = kv_bₕ[:N]ᵀ · q_nopeₜₕ                                   the key half moves to the query: N → R
        logitₕₜₛ = scale · (q'ₜₕ · latentₛ + q_ropeₜₕ · rope_keyₛ)       −∞ where mask is false
        outₜ = concatenation over h of kv_bₕ[N:] · Σₛ softmaxₛ(logitₕₜₛ) latentₛ

    Arguments as mla_attention; scale stays that of N + P. Returns out (B,T,H·V), dtype of latent.
    Source: DeepSeek-V2 report 2.1.2.
    """
    return mla.mla_attention_absorbed(q_nope, q_rope, latent, rope_key, kv_b, mask, scale)


class _Inputs(NamedTuple):
    """The arguments of the attention, to be changed one at a time."""

    q_nope: torch.Tensor
    q_rope: torch.Tensor
    latent: torch.Tensor
    rope_key: torch.Tensor
    kv_b: torch.Tensor
    mask: torch.Tensor
    scale: float


@st.composite
def _attention_cases(draw, tokens, spare, documents):
    """N ≠ P ≠ V; tokens: how many queries; spare: how many more keys; documents: how many in a row."""
    batch, heads, tokens = draw(st.sampled_from([1, 2, 2])), draw(st.sampled_from([2, 1, 3])), draw(st.sampled_from(tokens))
    nope, width, value = draw(st.sampled_from([(3, 2, 5), (1, 4, 2), (4, 2, 7), (5, 6, 3)]))
    rank, keys = draw(st.sampled_from([4, 1, 6])), tokens + draw(st.sampled_from(spare))
    segments = _draw_segments(draw, batch, keys, documents)
    return {
        "q_nope": normal(draw, batch, tokens, heads, nope), "q_rope": normal(draw, batch, tokens, heads, width),
        "latent": normal(draw, batch, keys, rank), "rope_key": normal(draw, batch, keys, width),
        "kv_b": normal(draw, heads * (nope + value), rank, scale=rank**-0.5),
        "mask": visibility(segments[:, keys - tokens :], segments), "scale": draw(st.sampled_from([0.6, 0.14468])),
    }  # fmt: skip


def _written_out(i):
    """Logits (B,H,T,S) before the mask and values (B,H,S,V), in at least float32."""
    wide = torch.promote_types(i.latent.dtype, torch.float32)
    q_nope, q_rope, latent, rope_key, kv_b = (x.to(wide) for x in i[:5])
    up = kv_b.unflatten(0, (q_nope.shape[2], -1))  # (H,N+V,R)
    expanded = torch.einsum("bsr,hur->bhsu", latent, up)
    key, value = expanded.tensor_split((q_nope.shape[3],), dim=-1)
    logits = torch.einsum("bthn,bhsn->bhts", q_nope, key) + torch.einsum("bthp,bsp->bhts", q_rope, rope_key)
    return logits * i.scale, value


def _by_blocks(*values, block=2):
    """Right in another way: a few keys at a time, with a running maximum and sum."""
    inputs = _Inputs(*values)
    logits, value = _written_out(inputs)
    logits = logits.masked_fill(~inputs.mask, -torch.inf)
    top, total, out = torch.full_like(logits[..., :1], -1e30), 0.0, 0.0
    for start in range(0, logits.shape[-1], block):
        part = logits[..., start : start + block]  # (B,H,T,block)
        higher = torch.maximum(top, part.amax(dim=-1, keepdim=True)).detach()
        weights, shrink = (part - higher).exp(), (top - higher).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        out = out * shrink + weights @ value[:, :, start : start + block]
        top = higher
    return (out / total).transpose(1, 2).flatten(2).to(inputs.latent.dtype)  # (B,T,H·V)


def _other_rope_layout(function):
    """Right in another way: q_rope and rope_key in half-split order, which no dot product sees."""

    def call(*values):
        i = _Inputs(*values)
        index = mla.interleaved_to_half_split(i.q_rope.shape[-1])
        return function(*i._replace(q_rope=i.q_rope[..., index], rope_key=i.rope_key[..., index]))

    return call


def _changed(function, change):
    """`function` on inputs that `change` has spoilt: _Inputs → _Inputs."""
    return lambda *values: function(*change(_Inputs(*values)))


def _weighed(weigh):
    """Attention with weigh(logits, mask) in place of the masked softmax."""

    def call(*values):
        i = _Inputs(*values)
        logits, value = _written_out(i)
        return torch.einsum("bhts,bhsv->bthv", weigh(logits, i.mask), value).flatten(2)  # (B,T,H·V)

    return call


def _halves_exchanged(i):
    up = i.kv_b.unflatten(0, (i.q_nope.shape[2], -1))  # (H,N+V,R), read as V value rows and then N key rows
    value_dim = up.shape[1] - i.q_nope.shape[3]
    return i._replace(kv_b=torch.cat((up[:, value_dim:], up[:, :value_dim]), dim=1).flatten(0, 1))


def _keys_then_values(i):
    heads, nope = i.q_nope.shape[2:]
    keys, values = (part.unflatten(0, (heads, -1)) for part in i.kv_b.tensor_split((heads * nope,)))  # (H,N,R), (H,V,R)
    return i._replace(kv_b=torch.cat((keys, values), dim=1).flatten(0, 1))


def _heads_inside(i):
    return i._replace(kv_b=i.kv_b.unflatten(0, (-1, i.q_nope.shape[2])).transpose(0, 1).flatten(0, 1))


def _parts_crossed(i):
    query, nope = torch.cat((i.q_rope, i.q_nope), dim=-1), i.q_nope.shape[3]  # against keys [nope | rope]
    return i._replace(q_nope=query[..., :nope], q_rope=query[..., nope:])


def _first_head_turned(i):
    first = torch.zeros(i.q_rope.shape[2], 1, dtype=i.q_rope.dtype)
    first[0] = 1
    return i._replace(q_rope=i.q_rope * first)


def _no_rope_part(i):
    return i._replace(q_rope=torch.zeros_like(i.q_rope), rope_key=torch.zeros_like(i.rope_key))


def _latent_suspects(function):
    """Mistakes in reading MLA's inputs, shared by everything that makes logits of them."""
    of = lambda change: _changed(function, change)  # noqa: E731
    return (
        Suspect("no_rope_part", "the rope part of the logits is missing", of(_no_rope_part)),
        Suspect("rope_key_for_one_head", "the shared rope key reaches only the first head", of(_first_head_turned)),
        Suspect("rope_part_unscaled", "scale multiplies the nope part only",
                of(lambda i: i._replace(q_rope=i.q_rope / i.scale))),
        Suspect("parts_crossed", "queries are laid [rope | nope] and keys [nope | rope]", of(_parts_crossed)),
        Suspect("halves_exchanged", "kv_b's halves are exchanged: a head's rows are N for its key, then V for its value",
                of(_halves_exchanged)),
        Suspect("keys_then_values", "kv_b is read as the keys of all heads, then the values of all heads; it is laid head "
                "by head", of(_keys_then_values)),
        Suspect("heads_inside", "kv_b is read with the heads innermost; it is laid head by head", of(_heads_inside)),
        Suspect("no_scale", "scale is missing", of(lambda i: i._replace(scale=1.0))),
        Suspect("own_scale", "takes (N+P)^-1/2 instead of the scale that is given, which holds YaRN's factor",
                of(lambda i: i._replace(scale=(i.q_nope.shape[3] + i.q_rope.shape[3]) ** -0.5)), "onnxruntime/mobius#548"),
        Suspect("scale_twice", "scale is applied twice: to the query and to the logits",
                of(lambda i: i._replace(scale=i.scale**2))),
        Suspect("absorbed_width_scale", "takes (R+P)^-1/2, the width of the absorbed query, for the scale",
                of(lambda i: i._replace(scale=(i.latent.shape[2] + i.q_rope.shape[3]) ** -0.5)), "ollama/ollama#13893"),
        Suspect("no_mask", "the mask is ignored", of(lambda i: i._replace(mask=torch.ones_like(i.mask)))),
        Suspect("mask_inverted", "the mask is read as true where hidden", of(lambda i: i._replace(mask=~i.mask))),
    )  # fmt: skip


def _top_left(i):
    return i._replace(mask=torch.ones_like(i.mask).tril())


def _without_newest(i):
    return i._replace(latent=i.latent[:, :-1], rope_key=i.rope_key[:, :-1], mask=i.mask[..., :-1])


def _without_oldest(i):
    return i._replace(latent=i.latent[:, 1:], rope_key=i.rope_key[:, 1:], mask=i.mask[..., 1:])


def _softmax(dim):
    return lambda logits, mask: logits.masked_fill(~mask, -torch.inf).softmax(dim)


def _heads_scrambled(*values):
    out = mla_attention(*values)
    heads = values[0].shape[2]
    return out.unflatten(-1, (heads, -1)).transpose(1, 2).reshape(out.shape)  # (B,H,T,V) read as (B,T,H·V)


def _heads_interleaved(*values):
    return mla_attention(*values).unflatten(-1, (values[0].shape[2], -1)).transpose(-1, -2).flatten(-2)


_WEIGHT_SUSPECTS = (
    Suspect("mask_of_first_row", "every row of the batch gets the mask of the first",
            _changed(mla_attention, lambda i: i._replace(mask=i.mask[:1].expand_as(i.mask)))),
    Suspect("softmax_over_heads", "the softmax runs over the heads instead of the keys", _weighed(_softmax(1))),
    Suspect("softmax_over_queries", "the softmax runs over the queries instead of the keys", _weighed(_softmax(2))),
    Suspect("mask_added", "the bool mask is added to the logits as 0 and 1",
            _weighed(lambda logits, mask: (logits + mask).softmax(-1)), "huggingface/diffusers#14342"),
    Suspect("hidden_is_zero", "hidden logits become 0 instead of -inf",
            _weighed(lambda logits, mask: logits.masked_fill(~mask, 0).softmax(-1))),
    Suspect("mask_after_softmax", "the mask comes after the softmax, so the weights no longer sum to 1",
            _weighed(lambda logits, mask: logits.softmax(-1) * mask)),
    Suspect("one_more_in_the_sum", "the sum of the softmax holds an extra 1 (an attention sink)",
            _weighed(lambda logits, mask: torch.nn.functional.pad(
                logits.masked_fill(~mask, -torch.inf), (1, 0)).softmax(-1)[..., 1:])),
    Suspect("heads_scrambled", "(B,H,T,V) is reshaped to (B,T,HV) without transposing first", _heads_scrambled,
            "jsbaan/transformer-from-scratch#6"),
    Suspect("heads_interleaved", "the heads are innermost in the output", _heads_interleaved),
)  # fmt: skip

_INPUTS = ("q_nope", "q_rope", "latent", "rope_key", "kv_b")

_MLA_ATTENTION = Op(
    name="mla_attention",
    formula="out = softmax(scale (q_nope . W_k c + q_rope . k_r) + mask) W_v c",
    source="K2.5 report 4.2",
    reference=mla_attention,
    cases=_attention_cases(tokens=(3, 1, 2, 6), spare=(0, 2), documents=(2, 3, 1)),
    outputs=("out",),
    differentiable=_INPUTS,
    dtypes=ALL_DTYPES,
    twins={"fused": mla.mla_attention_fused, "absorbed": mla.mla_attention_absorbed},
    variants={"by blocks of keys": _by_blocks, "other rope layout": _other_rope_layout(mla_attention)},
    suspects=(
        *_latent_suspects(mla_attention),
        *_WEIGHT_SUSPECTS,
        Suspect("latent_detached", "no gradient reaches the latents: the cache cuts it off",
                _changed(mla_attention, lambda i: i._replace(latent=i.latent.detach()))),
    ),
)  # fmt: skip

_MLA_DECODE = Op(
    name="mla_decode",
    formula="out = W_v softmax(scale (W_k^T q_nope . c + q_rope . k_r) + mask) c",
    source="DeepSeek-V2 report 2.1.2",
    reference=mla_decode,
    cases=_attention_cases(tokens=(2, 1), spare=(3, 1, 8), documents=(1, 2, 2)),
    outputs=("out",),
    differentiable=_INPUTS,
    dtypes=ALL_DTYPES,
    twins={"expanded": mla.mla_attention_reference, "fused": mla.mla_attention_fused},
    variants={"by blocks of keys": _by_blocks, "other rope layout": _other_rope_layout(mla_decode)},
    suspects=(
        Suspect("queries_at_the_start", "its own causal mask takes the queries as the first keys: the new token sees only "
                "the oldest", _changed(mla_decode, _top_left), "pytorch/pytorch#144858"),
        Suspect("newest_not_cached", "attends before the new token is written: the newest key is missing",
                _changed(mla_decode, _without_newest)),
        Suspect("oldest_left_out", "the oldest key is left out", _changed(mla_decode, _without_oldest)),
        *_latent_suspects(mla_decode),
        *_WEIGHT_SUSPECTS,
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------- cache_update


def cache_update(latent_cache, rope_cache, length, latent, rope_key):
    """The filled part of the cache after T new tokens have been written behind its first `length`.

        latent = [latent_cache[:, :length], latent];  rope_key likewise

    latent_cache: (B,W,R) float; rope_cache: (B,W,P) float — what lies beyond `length` is undefined (here NaN);
    length: int — tokens held, W ≥ length + T; latent: (B,T,R) float — normed; rope_key: (B,T,P) float — rotated.
    Returns latent (B,length+T,R) and rope_key (B,length+T,P), bitwise; the caches given stay as they are.
    Source: DeepSeek-V2 report 2.1.2.
    """
    return tuple(torch.cat((old[:, :length], new), dim=1) for old, new in ((latent_cache, latent), (rope_cache, rope_key)))


@st.composite
def _cache_cases(draw):
    batch, tokens = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 1, 3]))
    length = draw(st.sampled_from([2, 0, 1, 5]))
    rank, width = draw(st.sampled_from([3, 1])), draw(st.sampled_from([2, 4]))
    capacity = length + tokens + draw(st.sampled_from([2, 0, 1]))
    caches = normal(draw, batch, capacity, rank), normal(draw, batch, capacity, width)
    for cache in caches:
        cache[:, length:] = torch.nan
    return {"latent_cache": caches[0], "rope_cache": caches[1], "length": length,
            "latent": normal(draw, batch, tokens, rank), "rope_key": normal(draw, batch, tokens, width)}  # fmt: skip


def _latent_cache(latent_cache, rope_cache, length, latent, rope_key):
    batch, capacity, rank = latent_cache.shape
    cache = LatentCache(1, batch, capacity, rank, rope_cache.shape[2], latent.dtype)
    cache.latent[0], cache.rope_key[0], cache.length = latent_cache, rope_cache, length
    cache.extend(*torch.zeros(2, batch, latent.shape[1], dtype=torch.long))
    return cache.write(0, latent, rope_key)


def _written(cache, length, new, begin, end):
    """The first `end` tokens of a copy of the cache into which `new` was written at `begin`."""
    cache = cache.clone()
    cache[:, begin : begin + new.shape[1]] = new[:, : cache.shape[1] - begin]
    return cache[:, :end]


def _both(write):
    """write(cache, length, new) for the latents and for the rope keys."""
    return lambda latents, keys, length, latent, key: (write(latents, length, latent), write(keys, length, key))


_CACHE_UPDATE = Op(
    name="cache_update",
    formula="latent = [latent_cache[:, :length], latent]; rope_key likewise",
    source="DeepSeek-V2 report 2.1.2",
    reference=cache_update,
    cases=_cache_cases(),
    outputs=("latent", "rope_key"),
    exact=("latent", "rope_key"),
    dtypes=ALL_DTYPES,
    twins={"LatentCache": _latent_cache},
    suspects=(
        Suspect("one_late", "writes one place too far and leaves a gap",
                _both(lambda old, n, new: _written(old, n, new, n + 1, n + new.shape[1]))),
        Suspect("one_early", "writes one place too early, over the newest token",
                _both(lambda old, n, new: _written(old, n, new, max(n - 1, 0), n + new.shape[1]))),
        Suspect("from_zero", "writes at the beginning, over the oldest tokens",
                _both(lambda old, n, new: _written(old, n, new, 0, n + new.shape[1])), "wyf3/llm_related#21"),
        Suspect("in_front", "puts the new tokens in front of the old ones",
                _both(lambda old, n, new: torch.cat((new, old[:, :n]), dim=1))),
        Suspect("whole_capacity", "returns the whole buffer, with the part that was never written",
                _both(lambda old, n, new: _written(old, n, new, n, old.shape[1]))),
        Suspect("new_tokens_only", "returns the new tokens alone", _both(lambda old, n, new: new)),
        Suspect("last_token_repeated", "writes the last new token in every new place",
                _both(lambda old, n, new: _written(old, n, new[:, -1:].expand_as(new), n, n + new.shape[1]))),
        Suspect("first_row_only", "writes the first row of the batch into every row",
                _both(lambda old, n, new: _written(old, n, new[:1].expand_as(new), n, n + new.shape[1]))),
        Suspect("rope_key_forgotten", "the rope keys are not written",
                lambda latents, keys, n, latent, key: (
                    cache_update(latents, keys, n, latent, key)[0], keys[:, : n + key.shape[1]].clone())),
    ),
)  # fmt: skip


# --------------------------------------------------------------------------------------------- max_logits


def max_logits(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """The largest visible attention logit of each head: what QK-Clip looks at.

        largestₕ = max over b, t, s with mask[b,0,t,s] of logitₕₜₛ          logits as mla_attention's, scale included

    Arguments as mla_attention; a row of the mask may be empty (its query is not asked). Returns largest (H,), dtype of
    q_nope, −∞ for no visible logit at all; it carries no gradient. Source: K2 report 2.1, QK-Clip.
    """
    return mla.max_logits_reference(q_nope, q_rope, latent, rope_key, kv_b, mask, scale)


@st.composite
def _logit_cases(draw):
    case = draw(_attention_cases(tokens=(3, 1, 2, 6), spare=(0, 2), documents=(2, 3, 1)))
    if draw(st.booleans()):  # most logits are negative
        case["q_rope"], case["rope_key"] = -3 * case["q_rope"].abs(), case["rope_key"].abs()
    if draw(st.booleans()):
        case["mask"][:, :, -1] = False  # the last query is padding, which nobody asks
    return case


def _largest(reduce):
    """max_logits with reduce((B,H,T,S) logits, −∞ where hidden) in place of the maximum."""

    def call(*values):
        i = _Inputs(*values)
        return reduce(_written_out(i)[0].masked_fill(~i.mask, -torch.inf)).to(i.q_nope.dtype)

    return call


def _smallest(*values):
    i = _Inputs(*values)
    return -max_logits(*i._replace(scale=-i.scale))


def _absolute(*values):
    return torch.maximum(max_logits(*values), -_smallest(*values))


_MAX_LOGITS = Op(
    name="max_logits",
    formula="largest_h = max over visible b, t, s of logit_bhts",
    source="K2 report 2.1",
    reference=max_logits,
    cases=_logit_cases(),
    outputs=("largest",),
    dtypes=ALL_DTYPES,
    twins={"fused": mla.max_logits_fused, "small blocks": lambda *values: mla.max_logits_fused(*values, block=2)},
    variants={"written out": _largest(lambda logits: logits.amax(dim=(0, 2, 3))),
              "other rope layout": _other_rope_layout(max_logits)},
    suspects=(
        Suspect("smallest", "the smallest logit", _smallest),
        Suspect("absolute", "the largest absolute value: QK-Clip bounds logits from above", _absolute),
        Suspect("begins_at_zero", "the running maximum begins at 0 instead of -inf: heads with negative logits report 0",
                lambda *values: max_logits(*values).clamp(min=0)),
        Suspect("one_for_all_heads", "one maximum over all heads", lambda *values: max_logits(*values).amax().expand(
            values[0].shape[2]).clone()),
        Suspect("first_row_only", "only the first row of the batch is looked at",
                _largest(lambda logits: logits[0].amax(dim=(1, 2)))),
        Suspect("mean_over_batch", "averages the rows of the batch (or ranks) instead of taking their maximum",
                _largest(lambda logits: logits.amax(dim=(2, 3)).mean(dim=0))),
        Suspect("last_query_only", "every block of queries overwrites the maximum of the one before",
                _largest(lambda logits: logits[:, :, -1].amax(dim=(0, 2)))),
        Suspect("probabilities", "the largest weight after the softmax instead of the logit",
                _largest(lambda logits: logits.softmax(dim=-1).nan_to_num().amax(dim=(0, 2, 3)))),
        Suspect("keeps_queries", "the maximum over keys only: one number for each query is left",
                _largest(lambda logits: logits.amax(dim=-1))),
        *_latent_suspects(max_logits),
    ),
)  # fmt: skip


OPS = (_RMS_NORM, _VISIBILITY, _MLA_ATTENTION, _MLA_DECODE, _CACHE_UPDATE, _MAX_LOGITS)
