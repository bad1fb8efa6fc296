"""The operations of rotary positions: both layouts, YaRN, its tables and its softmax scale — K2.5 report 4.2, K2 report 2.

Each block holds one operation: its reference, how inputs are drawn, the mistakes that people make in it.

Public names: rope, rope_half_split, rope_permutation, yarn_frequencies, rope_table, softmax_scale, OPS.
Letters: B batch, T tokens, H heads, N/P nope/rope head dims.     Tests: pytest tests/test_ops_rope.py
"""

import math

import torch
from hypothesis import strategies as st

import mla
from mla import Yarn
from op import Op, Suspect, normal

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# --------------------------------------------------------------------------------------- rotary positions


def rope(x, cos, sin):
    """Rotary positions on adjacent pairs, the layout of the released weights.

        y[2i] = x[2i] cosᵢ − x[2i + 1] sinᵢ,    y[2i + 1] = x[2i] sinᵢ + x[2i + 1] cosᵢ

    x: (B,T,H,P) float — queries or keys; cos, sin: (B,T,P/2) float32 — of each token's angles, same for all heads.
    Returns y (B,T,H,P), dtype of x; computed in the dtype of the table. Source: K2.5 report 4.2; DeepSeek-V3.
    """
    return mla.apply_rope(x, (cos, sin))


def rope_half_split(x, cos, sin):
    """Rotary positions on pairs (i, i + P/2): the layout of many ports, for weights permuted by `rope_permutation`.

        y[i] = x[i] cosᵢ − x[i + P/2] sinᵢ,    y[i + P/2] = x[i] sinᵢ + x[i + P/2] cosᵢ

    x: (B,T,H,P) float; cos, sin: (B,T,P/2) float32. Returns y (B,T,H,P), dtype of x. Source: GPT-NeoX.
    """
    return mla.apply_rope_half_split(x, (cos, sin))


def rope_permutation(rope_dim):
    """The index that turns the adjacent layout into the half-split one: even elements first, then the odd.

        half_split(x[..., index]) = rope(x)[..., index]

    rope_dim: int — P, even. Returns index (P,) int64; applied to a projection's rows it converts a checkpoint.
    """
    return mla.interleaved_to_half_split(rope_dim)


@st.composite
def _rope_cases(draw):
    batch, tokens = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 1, 5]))
    heads, width = draw(st.sampled_from([2, 1, 3])), draw(st.sampled_from([4, 6, 2, 8]))
    angle = normal(draw, batch, tokens, width // 2, scale=2.0)
    return {"x": normal(draw, batch, tokens, heads, width), "cos": angle.cos(), "sin": angle.sin()}


def _complex(x, cos, sin):
    """Of adjacent pairs: one multiplication by exp(i · angle)."""
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))  # (B,T,H,P/2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2).to(x.dtype)


def _via(turn, order):
    """Rotate in the other layout: permute by `order`, turn, and permute back."""

    def call(x, cos, sin):
        index = order(x.shape[-1])
        return turn(x[..., index], cos, sin)[..., index.argsort()]

    return call


def _both_plus(x, cos, sin):
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
    return torch.stack((even * cos + odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _table_of_the_other_layout(x, cos, sin):
    cos, sin = torch.cat((cos, cos), dim=-1)[:, :, None], torch.cat((sin, sin), dim=-1)[:, :, None]
    crossed = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + crossed * sin


def _half_split_with_repeated_table(x, cos, sin):
    cos, sin = (a.repeat_interleave(2, dim=-1)[:, :, None] for a in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rope_suspects(turn):
    """Mistakes that both layouts share."""
    return (
        Suspect("inverse", "turns backwards: the sign of the sine, or the two elements of a pair, are exchanged",
                lambda x, cos, sin: turn(x, cos, -sin)),
        Suspect("cos_sin_exchanged", "cos and sin are exchanged", lambda x, cos, sin: turn(x, sin, cos)),
        Suspect("twice", "the rotation is applied twice", lambda x, cos, sin: turn(turn(x, cos, sin), cos, sin)),
        Suspect("first_row_only", "every row of the batch gets the positions of the first row",
                lambda x, cos, sin: turn(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin))),
        Suspect("first_token_only", "every token gets the angles of the first token",
                lambda x, cos, sin: turn(x, cos[:, :1].expand_as(cos), sin[:, :1].expand_as(sin))),
    )  # fmt: skip


_ROPE = Op(
    name="rope",
    formula="(y_2i, y_2i+1) = (x_2i + j x_2i+1) exp(j angle_i)",
    source="K2.5 report 4.2",
    reference=rope,
    cases=_rope_cases(),
    outputs=("y",),
    differentiable=("x",),
    fixed=("cos", "sin"),
    dtypes=ALL_DTYPES,
    twins={"half-split, permuted": _via(rope_half_split, rope_permutation)},
    variants={"complex multiplication": _complex},
    suspects=(
        Suspect("half_split", "pairs (i, i+P/2) instead of adjacent ones, or weights that were not permuted for it",
                rope_half_split, "NVIDIA/Megatron-LM#3900"),
        Suspect("stays_permuted", "the right pairs, but left in half-split order; harmless only while query, key and "
                "cache all do so",
                lambda x, cos, sin: rope_half_split(x[..., rope_permutation(x.shape[-1])], cos, sin),
                "huggingface/transformers#39687"),
        Suspect("table_of_the_other_layout", "adjacent pairs with a table repeated as for half-split (cat instead of "
                "repeat_interleave)", _table_of_the_other_layout),
        Suspect("odd_first", "takes the odd element of a pair as the first",
                lambda x, cos, sin: rope(x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), cos, sin)),
        Suspect("both_plus", "the minus of the rotation is missing", _both_plus),
        *_rope_suspects(rope),
    ),
)  # fmt: skip

_ROPE_HALF_SPLIT = Op(
    name="rope_half_split",
    formula="(y_i, y_i+P/2) = (x_i + j x_i+P/2) exp(j angle_i)",
    source="GPT-NeoX",
    reference=rope_half_split,
    cases=_rope_cases(),
    outputs=("y",),
    differentiable=("x",),
    fixed=("cos", "sin"),
    dtypes=ALL_DTYPES,
    twins={"adjacent, permuted": _via(rope, lambda width: rope_permutation(width).argsort())},
    suspects=(
        Suspect("adjacent", "adjacent pairs instead of (i, i+P/2)", rope, "NVIDIA/Megatron-LM#3900"),
        Suspect("table_of_the_other_layout", "half-split pairs with a table repeated as for adjacent ones "
                "(repeat_interleave instead of cat)", _half_split_with_repeated_table),
        Suspect("stays_adjacent", "the right pairs, but the result is in adjacent order",
                lambda x, cos, sin: rope_half_split(x, cos, sin)[..., rope_permutation(x.shape[-1]).argsort()]),
        *_rope_suspects(rope_half_split),
    ),
)  # fmt: skip

_ROPE_PERMUTATION = Op(
    name="rope_permutation",
    formula="half_split(x[..., index]) = rope(x)[..., index]",
    source="the definitions of both layouts",
    reference=rope_permutation,
    cases=st.fixed_dictionaries({"rope_dim": st.sampled_from([6, 2, 4, 8, 10, 64])}),
    outputs=("index",),
    variants={"transposed pairs": lambda rope_dim: torch.arange(rope_dim).view(-1, 2).T.flatten()},
    suspects=(
        Suspect("inverse", "the permutation back from half-split to adjacent",
                lambda rope_dim: rope_permutation(rope_dim).argsort()),
        Suspect("identity", "nothing is permuted", torch.arange),
        Suspect("odd_first", "the odd elements come first", lambda rope_dim: rope_permutation(rope_dim).roll(rope_dim // 2)),
        Suspect("second_half_backwards", "the odd elements are in falling order",
                lambda rope_dim: torch.cat((torch.arange(0, rope_dim, 2), torch.arange(1, rope_dim, 2).flip(0)))),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------ YaRN and its table


def yarn_frequencies(rope_dim, theta, factor, original_length, beta_fast, beta_slow):
    """Angular frequency of each rotated pair, radians per token, stretched by YaRN.

        fᵢ = θ^(−2i/P)                                        i = 0 … P/2 − 1
        index(turns) = P · ln(original_length / (2π · turns)) / (2 ln θ)
        low, high = ⌊index(beta_fast)⌋, ⌈index(beta_slow)⌉    kept within 0 … P − 1
        rampᵢ = (i − low) / (high − low)                      kept within 0 … 1; high = low: high is low + 0.001
        frequencyᵢ = fᵢ (1 − rampᵢ) + fᵢ / factor · rampᵢ     factor ≤ 1: fᵢ

    rope_dim: int — P, even; theta, factor: float; original_length: int — tokens; beta_fast, beta_slow: float — turns.
    Returns frequencies (P/2,) float64. Source: YaRN, arXiv:2309.00071; K2 report 2.4.
    """
    return mla.rope_frequencies(rope_dim, theta, Yarn(factor, original_length, beta_fast, beta_slow))


_YARN = {
    "theta": st.sampled_from([50000.0, 100.0, 10000.0]), "factor": st.sampled_from([64.0, 4.0, 40.0, 1.0]),
    "original_length": st.sampled_from([4096, 131072, 64]), "beta_fast": st.sampled_from([32.0, 16.0]),
    "beta_slow": st.sampled_from([1.0, 2.0]),
}  # fmt: skip


def _yarn(rope_dim, theta, factor, original_length, beta_fast, beta_slow, rounded=True, last=None, step=1, wrong=None):
    """YaRN written out once more, with places to go wrong in."""
    index = torch.arange(rope_dim // 2, dtype=torch.float64)
    plain = theta ** (-2 * index / rope_dim)
    slow = plain / factor if wrong is None else wrong(index)
    index_of = lambda turns: rope_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(theta))  # noqa: E731
    low, high = index_of(beta_fast), index_of(beta_slow)
    if rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1 if last is None else last)
    ramp = ((index * step - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + slow * ramp if factor > 1 else plain


def _plain(rope_dim, theta, *_):
    return yarn_frequencies(rope_dim, theta, 1.0, 1, 1.0, 1.0)


_YARN_FREQUENCIES = Op(
    name="yarn_frequencies",
    formula="f_i = theta^(-2i/P); f_i (1 - ramp_i) + f_i / factor * ramp_i",
    source="YaRN, arXiv:2309.00071",
    reference=yarn_frequencies,
    cases=st.fixed_dictionaries({"rope_dim": st.sampled_from([64, 8, 16, 2])} | _YARN),
    outputs=("frequencies",),
    variants={"written out": _yarn},
    suspects=(
        Suspect("no_yarn", "YaRN is off: plain frequencies whatever the factor", _plain, "pytorch/torchtitan#4117"),
        Suspect("factor_on_all", "all frequencies are divided by factor (linear interpolation), the fast ones too",
                lambda p, theta, factor, *rest: _plain(p, theta) / factor),
        Suspect("theta_stretched", "theta is enlarged instead (NTK-aware scaling)",
                lambda p, theta, factor, *rest: _plain(p, theta * factor ** (p / max(p - 2, 1)))),
        Suspect("ramp_reversed", "the ramp is reversed: slow frequencies are kept and fast ones divided",
                lambda *a: _plain(*a) * (1 + 1 / a[2]) - yarn_frequencies(*a)),
        Suspect("betas_exchanged", "beta_fast and beta_slow are exchanged",
                lambda p, theta, factor, length, fast, slow: yarn_frequencies(p, theta, factor, length, slow, fast),
                "pytorch/torchtitan#3787"),
        Suspect("ends_not_rounded", "the ends of the ramp are not rounded outwards (floor and ceil)",
                lambda *a: _yarn(*a, rounded=False), "keras-team/keras-hub#2981"),
        Suspect("end_kept_below_half", "the end of the ramp is kept below P/2 instead of P",
                lambda *a: _yarn(*a, last=a[0] // 2 - 1), "keras-team/keras-hub#2981"),
        Suspect("ramp_counts_dimensions", "the ramp counts dimensions (0, 2, 4) instead of pairs (0, 1, 2)",
                lambda *a: _yarn(*a, step=2)),
        Suspect("factor_in_the_power", "the slow frequencies are (factor theta)^(-2i/P): factor belongs outside the power",
                lambda *a: _yarn(*a, wrong=lambda i: (a[2] * a[1]) ** (-2 * i / a[0])), "apache/tvm#18576"),
        Suspect("extended_length", "the ramp is laid by the extended length instead of the original one",
                lambda p, theta, factor, length, *betas: yarn_frequencies(p, theta, factor, length * factor, *betas),
                "NVIDIA/Megatron-LM#1418"),
        Suspect("no_two_pi", "2 pi is missing: turns are not radians",
                lambda p, theta, factor, length, *betas: yarn_frequencies(p, theta, factor, length * 2 * math.pi, *betas)),
        Suspect("theta_10000", "theta is 10000 whatever the config says",
                lambda p, theta, *rest: yarn_frequencies(p, 10000.0, *rest)),
        Suspect("exponent_halved", "the exponent is i/P instead of 2i/P",
                lambda p, theta, *rest: yarn_frequencies(p, theta, *rest) * theta ** (torch.arange(p // 2).double() / p)),
        Suspect("bfloat16", "the frequencies are rounded to bfloat16, as module.to(bfloat16) does to a buffer",
                lambda *a: yarn_frequencies(*a).bfloat16().double(), "NVIDIA-NeMo/Automodel#2549"),
        Suspect("float32", "the frequencies are computed in float32", lambda *a: yarn_frequencies(*a).float().double()),
    ),
)  # fmt: skip


def rope_table(positions, rope_dim, theta, factor, original_length, beta_fast, beta_slow, mscale, mscale_all_dim):
    """cos and sin of every token's angles.

        angle = position · yarn_frequencies(…)
        cos, sin = ratio · cos(angle), ratio · sin(angle)
        ratio = m(mscale) / m(mscale_all_dim),  m(a) = 0.1 · a · ln factor + 1 (factor ≤ 1: 1)      1 for K2.5

    positions: (B,T) int64 — restart in every packed document; rope_dim … beta_slow: as yarn_frequencies;
    mscale, mscale_all_dim: float. Returns cos, sin (B,T,P/2) float32, never less. Source: DeepSeek-V3; YaRN.
    """
    yarn = Yarn(factor, original_length, beta_fast, beta_slow, mscale, mscale_all_dim)
    return mla.rope_table(positions, rope_dim, theta, yarn)


@st.composite
def _table_cases(draw):
    batch, tokens = draw(st.sampled_from([1, 2, 2])), draw(st.sampled_from([3, 1, 2]))
    width = draw(st.sampled_from([8, 64, 2]))
    # Angles up to some 450 rad are right in float32 too, within the tolerance; with P = 2 the only frequency is 1, and
    # they are right at any position.
    starts = st.sampled_from([70, 301, 1, 0, 451] + [65535, 262001] * (width == 2))
    positions = torch.tensor([[draw(starts)] for _ in range(batch)]) + torch.arange(tokens)
    if draw(st.booleans()):
        positions[:, -1] = 0  # the next document begins
    scales = {"mscale": draw(st.sampled_from([1.0, 0.707])), "mscale_all_dim": draw(st.sampled_from([1.0, 0.5]))}
    yarn = draw(st.fixed_dictionaries(_YARN | {"original_length": st.sampled_from([64, 4096])}))
    return {"positions": positions, "rope_dim": width} | yarn | scales


def _table_in_float32(positions, rope_dim, theta, factor, *rest):
    *yarn, mscale, mscale_all_dim = rest
    angle = positions[..., None].float() * yarn_frequencies(rope_dim, theta, factor, *yarn).float()
    ratio = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return angle.cos() * ratio, angle.sin() * ratio


def _magnitude(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _times(factor_of):
    """A table whose cos and sin are multiplied by factor_of(factor, mscale, mscale_all_dim)."""
    return lambda *a: tuple(x * factor_of(a[3], a[7], a[8]) for x in rope_table(*a))


def _yarn_only_when_long(positions, rope_dim, theta, factor, original_length, *rest):
    used = factor if positions.max() >= original_length else 1.0
    return rope_table(positions, rope_dim, theta, used, original_length, *rest)


def _bfloat16_frequencies(positions, *settings):
    angle = positions[..., None].double() * yarn_frequencies(*settings[:6]).bfloat16().double()
    ratio = _magnitude(settings[2], settings[6]) / _magnitude(settings[2], settings[7])
    return (angle.cos() * ratio).float(), (angle.sin() * ratio).float()


_ROPE_TABLE = Op(
    name="rope_table",
    formula="cos, sin = ratio * (cos, sin)(position * frequency); ratio = m(mscale) / m(mscale_all_dim)",
    source="DeepSeek-V3, modelling code",
    reference=rope_table,
    cases=_table_cases(),
    outputs=("cos", "sin"),
    loose=4.0,  # float32 angles of hundreds of radians
    variants={"float32 angles": _table_in_float32},
    suspects=(
        Suspect("yarn_only_when_long", "YaRN begins only when a position passes the original length: the same token "
                "then depends on the length of its neighbours", _yarn_only_when_long, "pytorch/torchtitan#4117"),
        Suspect("no_yarn", "YaRN is off: plain frequencies, whatever the factor",
                lambda x, p, theta, factor, *rest: rope_table(x, p, theta, 1.0, *rest)),
        Suspect("inflated", "cos and sin carry m(mscale) without dividing by m(mscale_all_dim): lengths grow, 1.26-fold "
                "in DeepSeek-V2", _times(lambda factor, mscale, all_dim: _magnitude(factor, all_dim)), "kekzl/imp#880"),
        Suspect("no_ratio", "the ratio of the two mscales is missing",
                _times(lambda factor, mscale, all_dim: _magnitude(factor, all_dim) / _magnitude(factor, mscale))),
        Suspect("ratio_inverted", "the ratio of the two mscales is upside down",
                _times(lambda factor, mscale, all_dim: (_magnitude(factor, all_dim) / _magnitude(factor, mscale)) ** 2)),
        Suspect("tables_bfloat16", "cos and sin are rounded to bfloat16",
                lambda *a: tuple(x.bfloat16().float() for x in rope_table(*a)), "NVIDIA-NeMo/Automodel#2549"),
        Suspect("frequencies_bfloat16", "the frequencies are rounded to bfloat16, as module.to(bfloat16) does to a buffer",
                _bfloat16_frequencies, "NVIDIA-NeMo/Automodel#2549"),
        Suspect("positions_bfloat16", "positions pass through bfloat16, which has no odd numbers above 256",
                lambda x, *rest: rope_table(x.bfloat16().long(), *rest), "nkalyanv99/UNI-D2#6"),
        Suspect("positions_from_zero", "counts tokens from 0 instead of taking their positions: wrong after a cache and in "
                "packed documents", lambda x, *rest: rope_table(torch.arange(x.shape[1]).expand_as(x), *rest),
                "NVIDIA/Megatron-LM#453"),
        Suspect("one_late", "positions are one too large", lambda x, *rest: rope_table(x + 1, *rest)),
        Suspect("one_early", "positions are one too small", lambda x, *rest: rope_table(x - 1, *rest)),
        Suspect("first_row_only", "every row of the batch gets the positions of the first row",
                lambda x, *rest: rope_table(x[:1].expand_as(x), *rest)),
        Suspect("table_too_short", "the table ends at the original length and later positions get its last row",
                lambda x, p, theta, factor, length, *rest: rope_table(
                    x.clamp(max=length - 1), p, theta, factor, length, *rest)),
        Suspect("exchanged", "cos and sin are returned in the wrong order", lambda *a: rope_table(*a)[::-1]),
        Suspect("full_width", "cos and sin are repeated to width P; the table holds one angle for each pair",
                lambda *a: tuple(torch.cat((x, x), dim=-1) for x in rope_table(*a))),
    ),
)  # fmt: skip


# -------------------------------------------------------------------------------------------- softmax_scale


def softmax_scale(nope_dim, rope_dim, factor, mscale, mscale_all_dim):
    """The factor on MLA's logits before the softmax.

        (N + P)^−½ · (0.1 · mscale_all_dim · ln factor + 1)²      0.144680 at released size; mscale has no part in it

    nope_dim, rope_dim: int — N, P; factor, mscale, mscale_all_dim: float — of rope_scaling; factor 1 is plain RoPE.
    Returns float. Source: released modelling code; DeepSeek-V3's YaRN.
    """
    return mla.softmax_scale(nope_dim, rope_dim, Yarn(factor=factor, mscale=mscale, mscale_all_dim=mscale_all_dim))


_SOFTMAX_SCALE = Op(
    name="softmax_scale",
    formula="(N+P)^-1/2 (0.1 mscale_all_dim ln factor + 1)^2",
    source="DeepSeek-V3, modelling code",
    reference=softmax_scale,
    cases=st.fixed_dictionaries({
        "nope_dim": st.sampled_from([128, 4, 1]), "rope_dim": st.sampled_from([64, 2]),
        "factor": st.sampled_from([64.0, 1.0, 4.0]), "mscale": st.sampled_from([0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([1.0, 0.5, 0.0]),
    }),
    outputs=("scale",),
    suspects=(
        Suspect("mscale_for_all_dim", "the factor comes from mscale instead of mscale_all_dim",
                lambda n, p, factor, mscale, all_dim: softmax_scale(n, p, factor, 1.0, mscale), "NVIDIA/Megatron-LM#1429"),
        Suspect("no_yarn_factor", "YaRN's squared factor is missing",
                lambda n, p, factor, mscale, all_dim: (n + p) ** -0.5, "huggingface/transformers#47435"),
        Suspect("ratio_squared", "takes the ratio of the mscales, which belongs to cos and sin",
                lambda n, p, factor, mscale, all_dim:
                (n + p) ** -0.5 * (_magnitude(factor, mscale) / _magnitude(factor, all_dim)) ** 2),
        Suspect("not_squared", "the factor is applied once instead of squared: it belongs to the query and to the key",
                lambda n, p, factor, mscale, all_dim: (n + p) ** -0.5 * _magnitude(factor, all_dim)),
        Suspect("nope_only", "the root of N alone: the rope part has been forgotten",
                lambda n, p, *rest: softmax_scale(n, 0, *rest)),
        Suspect("rope_only", "the root of P alone", lambda n, p, *rest: softmax_scale(0, p, *rest)),
        Suspect("no_root", "divides by N + P instead of its root",
                lambda n, p, *rest: softmax_scale(n, p, *rest) * (n + p) ** -0.5),
        Suspect("inverted", "multiplies by the root instead of dividing",
                lambda n, p, *rest: softmax_scale(n, p, *rest) * (n + p)),
        Suspect("log10", "the decimal logarithm instead of the natural one",
                lambda n, p, factor, mscale, all_dim: (n + p) ** -0.5 * (0.1 * all_dim * math.log10(factor) + 1) ** 2),
    ),
)  # fmt: skip


OPS = (_ROPE, _ROPE_HALF_SPLIT, _ROPE_PERMUTATION, _YARN_FREQUENCIES, _ROPE_TABLE, _SOFTMAX_SCALE)
