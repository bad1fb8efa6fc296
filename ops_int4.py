"""The operations of int4 weights: pack, unpack, fake quantisation, multiplication — K2.5 report 2.1, the release.

Public names: OPS, int4_pack, int4_unpack, fake_quant, int4_linear.
Letters: T tokens; O, I output and input width of one matrix.     Tests: pytest tests/test_ops_int4.py
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import moe
from op import Op, Suspect, dyadic


def _wide(x):
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def int4_pack(weight):
    """Quantise to int4 and pack eight codes per int32, as the released routed experts are stored.

        scale = bfloat16(max |w| / 7) of each group of 32 consecutive inputs
        code = round(w / scale) in −7…7;  stored = code + 8
        word_w = Σ_j stored[8w + j] · 16^j                    the low nibble first

    weight: (O,I) float, I a multiple of 32. A group of zeros has scale 0 and codes 0.
    Returns packed (O,I/8) int32, scale (O,I/32) bfloat16. Source: compressed-tensors "pack-quantized", as released.
    """
    return moe.int4_pack(weight)


def int4_unpack(packed, scale):
    """Restore weights from int4.

        w[8w + j] = (nibble j of word w − 8) · scale of its group of 32        nibble 0 is the lowest

    packed: (O,I/8) int32; scale: (O,I/32) bfloat16. Returns weight (O,I) float32, exact. Source: as int4_pack.
    """
    return moe.int4_unpack(packed, scale)


def fake_quant(weight):
    """The weight as it will be after release, for training with it; the gradient passes as if nothing had happened.

        forward: int4_unpack(int4_pack(w)), bitwise, in the dtype of w        backward: the gradient itself

    weight: (O,I) float, I a multiple of 32. Returns weight (O,I), dtype of weight. Source: K2.5 report 2.1.
    """
    return moe.fake_quant(weight)


def int4_linear(x, packed, scale):
    """Multiply by a matrix that is kept as int4.

        y = x Wᵀ        W = int4_unpack(packed, scale), in the dtype of x

    x: (T,I) float; packed: (O,I/8) int32; scale: (O,I/32) bfloat16. Returns y (T,O), dtype of x. Source: as int4_pack.
    """
    return F.linear(x, int4_unpack(packed, scale).to(x.dtype))


@st.composite
def _int4_weights(draw):
    """(O,I) weights of which none lies near the edge between two codes, nor their scales between two bfloat16 values.

    One group, or five: more than 128 inputs tell groups of 128 from whole rows.
    """
    shape = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5])), 32
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16 - 1)))
    rand = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    steps = (rand(*shape) * 14 - 7).round() + 0.7 * rand(*shape) - 0.35  # at most 0.35 from a code
    largest = (7 + 0.014 * rand(*shape[:2], 1) - 0.007) * (rand(*shape[:2], 1) - 0.5).sign()  # within 0.1 % of 7
    steps = steps.clamp(-6.9, 6.9).scatter(2, (rand(*shape[:2], 1) * 32).long(), largest)
    scale = (1 + (rand(*shape[:2], 1) * 128).floor() / 128) * 2.0 ** -(rand(*shape[:2], 1) * 8).floor()
    empty = rand(*shape[:2], 1) < draw(st.sampled_from([0.3, 0.0]))
    return (steps * scale).masked_fill(empty, 0.0).flatten(1)  # (O,I)


_weight_cases = st.fixed_dictionaries({"weight": _int4_weights()})
_packed_cases = _int4_weights().map(lambda weight: dict(zip(("packed", "scale"), moe.int4_pack(weight))))


@st.composite
def _int4_linear_cases(draw):
    packed, scale = moe.int4_pack(draw(_int4_weights()))
    return {"x": dyadic(draw, draw(st.integers(1, 4)), packed.shape[1] * 8), "packed": packed, "scale": scale}


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def _codes(weight, divisor=7.0, group=32, lowest=-7, rounding=torch.round, size=torch.abs, dtype=torch.bfloat16):
    """The rounding of `int4_pack`, open to mistakes: codes (O,I) int32 and scale (O,I/32)."""
    groups = weight.float().unflatten(1, (-1, 32))  # (O,I/32,32)
    parts = size(groups).amax(2).split(group // 32, dim=1)
    largest = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in parts], dim=1)  # (O,I/32)
    scale = (largest / divisor).to(dtype)
    quotient = groups / scale.float().masked_fill(scale == 0, 1.0)[:, :, None]
    return rounding(quotient).clamp(lowest, 7).int().flatten(1), scale


def _pack(codes, scale, order=range(8), offset=8):
    nibbles = (codes + offset).unflatten(1, (-1, 8))[:, :, list(order)] & 15  # (O,I/8,8)
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32), scale


def _zero_group_scale(weight):
    packed, scale = int4_pack(weight)
    return packed, scale.masked_fill(scale == 0, 1.0)


def _released(codes, scale):
    return (codes.unflatten(1, (-1, 32)) * scale.float()[:, :, None]).flatten(1)  # (O,I)


def _straight_through(weight, value):
    return value.to(weight.dtype) + (weight - weight.detach())


def _faked(**mistake):
    return lambda weight: _straight_through(weight, _released(*_codes(weight.detach(), **mistake)))


def _through_round(weight):
    groups = weight.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(2, keepdim=True).float() / 7).bfloat16().float()
    codes = (groups / scale.masked_fill(scale == 0, 1.0)).round().clamp(-7, 7)
    return (codes * scale).flatten(1).to(weight.dtype)


def _clipped_gradient(weight):
    value, scale = fake_quant(weight.detach()), int4_pack(weight.detach())[1].float().repeat_interleave(32, dim=1)
    inside = weight.detach().abs() <= 7 * scale
    return value + inside * (weight - weight.detach())


def _zero_group_nan(weight):
    scale = int4_pack(weight.detach())[1].repeat_interleave(32, dim=1)
    return fake_quant(weight) + (0 / scale.float()).to(weight.dtype)


def _nibbles(packed):
    return ((packed[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).flatten(1)  # (O,I)


def _reordered(order):
    return lambda packed, scale: _released(_nibbles(packed).unflatten(1, (-1, 8))[:, :, order].flatten(1) - 8, scale)


def _sign_extended(packed, scale):
    low = _nibbles(packed).unflatten(1, (-1, 8))[:, :, :7]
    return _released(torch.cat([low, packed[:, :, None] >> 28], dim=2).flatten(1) - 8, scale)


def _shared_scale(groups):
    """`int4_unpack` with one scale for so many groups of 32: the first of them."""
    return lambda packed, scale: int4_unpack(packed, scale[:, ::groups].repeat_interleave(groups, 1)[:, : scale.shape[1]])


def _by_groups(x, packed, scale):
    """Right: integers are multiplied first, each group's sum is scaled, and the offset 8 is taken off as a sum over x."""
    stored = _wide(_nibbles(packed).unflatten(1, (-1, 32)).to(x.dtype))  # (O,I/32,32)
    groups = _wide(x).unflatten(1, (-1, 32))  # (T,I/32,32)
    sums = torch.einsum("tgi,ogi->tog", groups, stored) - 8 * groups.sum(2)[:, None]  # (T,O,I/32)
    return (sums * _wide(scale)).sum(2).to(x.dtype)


def _multiplies(unpack):
    return lambda x, packed, scale: F.linear(x, unpack(packed, scale).to(x.dtype))


# ------------------------------------------------------------------------------------------------- ops

READINGS = (  # of packed int4, by mistake
    Suspect("nibbles_reversed", "the high nibble is taken first; nibble 0 is the lowest", _reordered([7, 6, 5, 4, 3, 2, 1, 0])),
    Suspect("awq_order", "the nibbles are in AWQ's order 0, 2, 4, 6, 1, 3, 5, 7", _reordered(AWQ_ORDER)),
    Suspect("twos_complement", "nibbles are read as two's complement; they are offset binary, code + 8",
            lambda packed, scale: _released((_nibbles(packed) + 8) % 16 - 8, scale)),
    Suspect("no_offset", "8 is not subtracted from the nibbles", lambda packed, scale: _released(_nibbles(packed), scale)),
    Suspect("sign_extended", "the shift of a negative word drags its sign into the highest nibble; mask it with 15",
            _sign_extended),
    Suspect("group_128", "one scale serves 128 inputs instead of 32", _shared_scale(4), "radixark/miles#2478"),
    Suspect("row_scale", "the first scale of a row serves the whole row", _shared_scale(10**6)),
    Suspect("product_in_bf16", "code · scale is rounded to bfloat16; it is exact in float32",
            lambda packed, scale: int4_unpack(packed, scale).bfloat16().float()),
)  # fmt: skip

OPS = (
    Op(
        name="int4_pack",
        formula="scale = bf16(max|w| / 7) per 32 inputs; word = sum_j (round(w_j / scale) + 8) 16^j",
        source='compressed-tensors "pack-quantized"',
        reference=int4_pack,
        cases=_weight_cases,
        outputs=("packed", "scale"),
        exact=("scale",),
        dtypes=(torch.float32, torch.bfloat16),
        variants={"by_rounding_in_steps": lambda weight: _pack(*_codes(weight.float()))},
        suspects=(
            Suspect("divisor_7_5", "the scale is max / 7.5 instead of max / 7", lambda w: _pack(*_codes(w, 7.5, lowest=-8)),
                    "ggml-org/llama.cpp#17064"),
            Suspect("divisor_8", "the scale is max / 8 instead of max / 7", lambda w: _pack(*_codes(w, 8.0, lowest=-8))),
            Suspect("nibbles_reversed", "the first input goes to the high nibble; it belongs into the low one",
                    lambda w: _pack(*_codes(w), order=range(7, -1, -1))),
            Suspect("awq_order", "the nibbles are in AWQ's order 0, 2, 4, 6, 1, 3, 5, 7",
                    lambda w: _pack(*_codes(w), order=AWQ_ORDER)),
            Suspect("twos_complement", "codes are stored as two's complement instead of code + 8",
                    lambda w: _pack(*_codes(w), offset=0)),
            Suspect("offset_7", "codes are stored as code + 7 instead of code + 8", lambda w: _pack(*_codes(w), offset=7)),
            Suspect("group_128", "the scale is taken over groups of 128 inputs instead of 32",
                    lambda w: _pack(*_codes(w, group=128)), "radixark/miles#2478"),
            Suspect("per_row", "the scale is taken over the whole row instead of 32 inputs",
                    lambda w: _pack(*_codes(w, group=10**6))),
            Suspect("scale_in_float32", "the scale stays in float32; it is stored in bfloat16",
                    lambda w: _pack(*_codes(w, dtype=torch.float32)), "NVIDIA-NeMo/Megatron-Bridge#3220"),
            Suspect("truncated", "codes are cut off towards 0 instead of rounded",
                    lambda w: _pack(*_codes(w, rounding=torch.trunc))),
            Suspect("max_without_abs", "the scale is max(w) / 7 instead of max|w| / 7",
                    lambda w: _pack(*_codes(w, size=lambda groups: groups))),
            Suspect("zero_group_scale", "a group of zeros gets the scale 1 instead of 0: other bytes, the same weights",
                    _zero_group_scale),
        ),
    ),
    Op(
        name="int4_unpack",
        formula="w[8w + j] = (nibble j of word w - 8) scale",
        source='compressed-tensors "pack-quantized"',
        reference=int4_unpack,
        cases=_packed_cases,
        outputs=("weight",),
        fixed=("scale",),
        exact=("weight",),
        variants={"in_steps": lambda packed, scale: _released(_nibbles(packed) - 8, scale)},
        suspects=READINGS,
    ),
    Op(
        name="fake_quant",
        formula="forward int4_unpack(int4_pack(w)), backward 1",
        source="K2.5 report 2.1",
        reference=fake_quant,
        cases=_weight_cases,
        outputs=("weight",),
        differentiable=("weight",),
        dtypes=(torch.float32, torch.bfloat16),
        twins={"packed": lambda weight: _straight_through(weight, int4_unpack(*int4_pack(weight.detach())))},
        variants={"in_steps": _faked()},
        suspects=(
            Suspect("zero_gradient", "rounding stops the gradient; it must pass straight through",
                    lambda w: fake_quant(w.detach()) + 0 * w),
            Suspect("through_round", "the gradient is that of round and max: only the largest of a group gets any",
                    _through_round),
            Suspect("clipped_gradient", "weights beyond 7 scales lose their gradient; the largest of a group may lie there",
                    _clipped_gradient),
            Suspect("scale_in_float32", "the scale is not rounded to bfloat16", _faked(dtype=torch.float32)),
            Suspect("divisor_7_5", "the scale is max / 7.5 instead of max / 7", _faked(divisor=7.5, lowest=-8),
                    "ggml-org/llama.cpp#17064"),
            Suspect("divisor_8", "the scale is max / 8 instead of max / 7", _faked(divisor=8.0, lowest=-8)),
            Suspect("group_128", "the scale is taken over groups of 128 inputs instead of 32", _faked(group=128),
                    "radixark/miles#2478"),
            Suspect("per_row", "the scale is taken over the whole row instead of 32 inputs", _faked(group=10**6)),
            Suspect("truncated", "codes are cut off towards 0 instead of rounded", _faked(rounding=torch.trunc)),
            Suspect("zero_group_nan", "a group of zeros divides 0 by 0", _zero_group_nan),
        ),
    ),
    Op(
        name="int4_linear",
        formula="y = x int4_unpack(packed, scale)^T",
        source='compressed-tensors "pack-quantized"',
        reference=int4_linear,
        cases=_int4_linear_cases(),
        outputs=("y",),
        differentiable=("x",),
        fixed=("scale",),
        dtypes=(torch.float32, torch.bfloat16),
        loose=4.0,
        variants={"by_groups": _by_groups},
        suspects=tuple(replace(suspect, wrong=_multiplies(suspect.wrong)) for suspect in READINGS),
    ),
)  # fmt: skip
