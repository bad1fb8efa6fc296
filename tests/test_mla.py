"""Claims about mla.py: rotary positions, YaRN, attention twins, segments, cache.

Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_mla.py
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mla import (
    LATENT_NORM_EPS, MLA, LatentCache, RMSNorm, Yarn, apply_rope, apply_rope_half_split, interleaved_to_half_split,
    max_logits_fused, max_logits_reference, mla_attention_absorbed, mla_attention_fused, mla_attention_reference,
    rope_frequencies, rope_table, softmax_scale, visibility,
)  # fmt: skip

ATTENTIONS = pytest.mark.parametrize(
    "attention", [mla_attention_reference, mla_attention_fused, mla_attention_absorbed]
)
IMPLS = pytest.mark.parametrize("impl", ["reference", "fused"])
RELEASED = Yarn(factor=64.0)
SHORT = Yarn(factor=8.0, original_max_position_embeddings=64)  # a ramp that tiny models feel


@dataclass(frozen=True)
class Shape:
    """What the MLA module reads of a config; every dimension differs from every other."""

    hidden_size: int = 11
    num_attention_heads: int = 3
    q_lora_rank: int = 10
    kv_lora_rank: int = 7
    qk_nope_head_dim: int = 5
    qk_rope_head_dim: int = 4
    v_head_dim: int = 6
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    yarn: Yarn = SHORT
    impl: str = "reference"


@st.composite
def layouts(draw):
    """Segments (B,S) with packed runs and padding, and T ≤ S: the last T tokens are the queries."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    row = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    runs = torch.tensor([draw(row) for _ in range(batch)]).sort(dim=1).values
    segments = torch.where(runs == 3, -1, runs)  # the last run is padding
    return segments, draw(st.integers(1, length))


@st.composite
def attention_cases(draw):
    """Inputs of the attention twins in float64: N, P, V all different, V below, between and above N + P; T from 1."""
    segments, tokens = draw(layouts())
    heads, nope, rope = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([2, 4]))
    value, latent = draw(st.sampled_from([6, 7, 11])), draw(st.integers(1, 9))
    batch, length = segments.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = ((batch, tokens, heads, nope), (batch, tokens, heads, rope), (batch, length, latent),
              (batch, length, rope), (heads * (nope + value), latent))  # fmt: skip
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return inputs, visibility(segments[:, length - tokens :], segments), 0.7


def gradients(function, inputs):
    """Gradients of a fixed random projection of function's result, for each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.autograd.grad(result, leaves, direction.to(result))


def built(shape, seed=0):
    """An MLA in float64 whose norm weights matter."""
    torch.manual_seed(seed)
    attention = MLA(shape).double()
    for norm in (attention.q_a_layernorm, attention.kv_a_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return attention


def run(attention, x, segments, positions, cache=None):
    """The module's output for a whole row of segments."""
    shape = attention.config
    table = rope_table(positions, shape.qk_rope_head_dim, shape.rope_theta, shape.yarn, torch.float64)
    keys = segments if cache is None else cache.extend(segments, positions)
    return attention(x, table, visibility(segments, keys), cache)[0]


# Independent NumPy versions, float64, written from the papers


def numpy_frequencies(dim, theta, yarn):
    """YaRN by turns: a pair that makes ≥ beta_fast turns keeps its angle, one that makes ≤ beta_slow slows down."""
    base = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if yarn.factor <= 1:
        return base
    # index i at which original · base_i / 2π = turns, rounded outwards
    bound = [math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns), theta) * dim / 2
             for turns in (yarn.beta_fast, yarn.beta_slow)]  # fmt: skip
    low, high = max(math.floor(bound[0]), 0), min(math.ceil(bound[1]), dim - 1)
    slow = np.array([min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)])
    return base * (1 - slow) + base / yarn.factor * slow


def numpy_rope(x, position, frequencies):
    """Adjacent pairs as complex numbers, turned by exp(j · position · frequency); x: (...,P)."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * position * frequencies)
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def numpy_attention(q_nope, q_rope, latent, rope_key, kv_b, mask, scale):
    """One query, one head at a time over the keys it sees."""
    batch, tokens, heads, nope = q_nope.shape
    per_head = kv_b.reshape(heads, -1, kv_b.shape[1])
    out = []
    for b in range(batch):
        for t in range(tokens):
            seen = np.flatnonzero(mask[b, 0, t])
            for h in range(heads):
                keys = latent[b, seen] @ per_head[h, :nope].T
                logits = scale * (keys @ q_nope[b, t, h] + rope_key[b, seen] @ q_rope[b, t, h])
                weights = np.exp(logits - logits.max())
                out.append(weights / weights.sum() @ (latent[b, seen] @ per_head[h, nope:].T))
    return np.concatenate(out).reshape(batch, tokens, -1)


def numpy_mla(weights, shape, x, segments, positions):
    """The whole attention block, from the formulas of the module's docstring; x: (B,T,C)."""
    rope, nope, latent_dim = shape.qk_rope_head_dim, shape.qk_nope_head_dim, shape.kv_lora_rank
    frequencies = numpy_frequencies(rope, shape.rope_theta, shape.yarn)

    def norm(a, weight):
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + LATENT_NORM_EPS) * weight

    query = norm(x @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"]) @ weights["q_b_proj.weight"].T
    query = query.reshape(*x.shape[:2], shape.num_attention_heads, nope + rope)
    down = x @ weights["kv_a_proj_with_mqa.weight"].T
    latent, key = norm(down[..., :latent_dim], weights["kv_a_layernorm.weight"]), down[..., latent_dim:]
    q_rope = numpy_rope(query[..., nope:], positions[..., None, None], frequencies)
    key = numpy_rope(key, positions[..., None], frequencies)
    past = np.tril(np.ones((x.shape[1],) * 2, dtype=bool))
    mask = (past & (segments[:, :, None] == segments[:, None, :]))[:, None]
    magnitude = 0.1 * shape.yarn.mscale_all_dim * math.log(shape.yarn.factor) + 1
    scale = magnitude**2 / math.sqrt(nope + rope)
    mixed = numpy_attention(query[..., :nope], q_rope, latent, key, weights["kv_b_proj.weight"], mask, scale)
    return mixed @ weights["o_proj.weight"].T


# Rotary positions


def test_rope_of_a_hand_worked_pair():
    """P = 4, θ = 100: pair 0 turns by 1 rad per token, pair 1 by 0.1."""
    table = rope_table(torch.tensor([[2]]), 4, 100.0, Yarn(), torch.float64)
    turned = apply_rope(torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], dtype=torch.float64), table)[0, 0]
    assert_close(turned, np.array([math.cos(2), math.sin(2), -math.sin(0.2), math.cos(0.2)]))


@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([2, 4, 10]), st.sampled_from([(), (1,), (3,)]))
def test_bug5_rope_is_a_complex_multiplication_of_adjacent_pairs(seed, tokens, dim, middle):
    rng = np.random.default_rng(seed)
    x, positions = rng.normal(size=(2, tokens, *middle, dim)), rng.integers(0, 300_000, size=(2, tokens))
    table = rope_table(torch.from_numpy(positions), dim, 50000.0, RELEASED, torch.float64)
    at = positions.reshape(2, tokens, *[1] * len(middle), 1)
    frequencies = numpy_frequencies(dim, 50000.0, RELEASED)
    assert_close(apply_rope(torch.from_numpy(x), table), numpy_rope(x, at, frequencies), 1e-9)
    pairs = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * at * frequencies)
    expected = np.concatenate((pairs.real, pairs.imag), axis=-1)
    assert_close(apply_rope_half_split(torch.from_numpy(x), table), expected, 1e-9)


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 10]))
def test_bug5_the_permutation_links_both_layouts(seed, dim):
    """Permuting the rows of a rope projection makes the half-split layout give the same logits."""
    generator = torch.Generator().manual_seed(seed)
    weight_q, weight_k, x = (torch.randn(s, generator=generator).double() for s in ((dim, 3), (dim, 3), (1, 5, 3)))
    table, order = rope_table(torch.arange(5)[None], dim, 50000.0, SHORT, torch.float64), interleaved_to_half_split(dim)
    query, key = (apply_rope(x @ w.T, table) for w in (weight_q, weight_k))
    other_query, other_key = (apply_rope_half_split(x @ w[order].T, table) for w in (weight_q, weight_k))
    assert_close(other_query, query[..., order])
    assert_close(other_query @ other_key.mT, query @ key.mT)
    if dim > 2:  # without the permutation they differ: the layouts are not interchangeable
        wrong = apply_rope_half_split(x @ weight_q.T, table) @ apply_rope_half_split(x @ weight_k.T, table).mT
        assert (wrong - query @ key.mT).abs().max() > 1e-3


@pytest.mark.parametrize("turn", [apply_rope, apply_rope_half_split])
@pytest.mark.parametrize("yarn", [Yarn(), RELEASED, SHORT])
def test_bug3_rope_keeps_lengths(turn, yarn):
    x = torch.randn(1, 50, 2, 64, dtype=torch.float64)
    table = rope_table(torch.arange(0, 262144, 5243)[None, :50], 64, 50000.0, yarn, torch.float64)
    assert_close(turn(x, table).norm(dim=-1), x.norm(dim=-1), 1e-12)


def test_rope_logits_depend_on_distance_only():
    query, key = torch.randn(2, 1, 1, 64, dtype=torch.float64).unbind()

    def logit(at, distance):
        tables = (rope_table(torch.tensor([[p]]), 64, 50000.0, RELEASED, torch.float64) for p in (at, at - distance))
        return (apply_rope(query, next(tables)) * apply_rope(key, next(tables))).sum()

    assert_close(logit(100_007, 7), logit(7, 7), 1e-9)
    assert (logit(7, 6) - logit(7, 7)).abs() > 1e-3


@given(st.sampled_from([2, 8, 64]), st.sampled_from([100.0, 10000.0, 50000.0]), st.sampled_from([1.0, 4.0, 64.0]),
       st.sampled_from([64, 4096]))  # fmt: skip
def test_yarn_frequencies_follow_the_formula_in_numpy(dim, theta, factor, original):
    yarn = Yarn(factor, original)
    assert_close(rope_frequencies(dim, theta, yarn), numpy_frequencies(dim, theta, yarn), 1e-14)


def test_yarn_ramp_runs_over_indices_8_to_20_of_32_at_released_size():
    plain, stretched = (rope_frequencies(64, 50000.0, yarn) for yarn in (Yarn(), RELEASED))
    share = (stretched / plain - 1 / 64) / (1 - 1 / 64)  # 1: untouched, 0: divided by 64
    assert len(share) == 32
    assert_close(share[:9], torch.ones(9), 1e-12)
    assert_close(share[20:], torch.zeros(12), 1e-12)
    assert_close(share[8:21], 1 - torch.arange(13).double() / 12, 1e-12)


def test_yarn_without_a_ramp_is_a_step():
    """beta_fast = beta_slow falls between two indices or on one; nothing divides by zero."""
    turns = 4096 / (2 * math.pi)  # exactly the index 0
    frequencies = rope_frequencies(8, 10000.0, Yarn(4.0, 4096, turns, turns))
    assert_close(frequencies, numpy_frequencies(8, 10000.0, Yarn()) / [1, 4, 4, 4], 1e-12)


def test_an_odd_rope_dimension_is_refused():
    with pytest.raises(ValueError, match="rope dimension 5 is odd"):
        rope_frequencies(5, 10000.0, Yarn())


def test_bug1_softmax_scale_is_the_released_one_whatever_mscale():
    assert f"{softmax_scale(128, 64, RELEASED):.6f}" == "0.144680"
    assert softmax_scale(128, 64, replace(RELEASED, mscale=0.5)) == softmax_scale(128, 64, RELEASED)
    assert softmax_scale(128, 64, replace(RELEASED, mscale_all_dim=0.0)) == 192**-0.5
    assert softmax_scale(128, 64, Yarn()) == 192**-0.5


def test_bug1_cos_and_sin_carry_the_ratio_of_the_two_mscales():
    positions = torch.arange(5)[None]
    plain = rope_table(positions, 8, 50000.0, RELEASED, torch.float64)
    scaled = rope_table(positions, 8, 50000.0, replace(RELEASED, mscale=0.5), torch.float64)
    ratio = (0.05 * math.log(64) + 1) / (0.1 * math.log(64) + 1)
    for a, b in zip(scaled, plain):
        assert_close(a, b * ratio)
    assert (plain[0][:, 0] == 1).all()  # exactly 1 at K2.5's equal mscales


def test_bug6_tables_are_float32_and_exact_at_the_last_position():
    """Angles of 262,143 rad need float64; a bfloat16 table would be wrong by up to 1 in the fast pairs."""
    positions = torch.tensor([[262143]])
    table = rope_table(positions, 64, 50000.0, RELEASED)
    angle = 262143 * numpy_frequencies(64, 50000.0, RELEASED)
    for actual, expected in zip(table, (np.cos(angle), np.sin(angle))):
        assert actual.dtype == torch.float32
        assert_close(actual[0, 0], expected, 1e-7)


def test_bug6_bfloat16_vectors_are_turned_in_float32():
    x, table = torch.randn(1, 9, 2, 16).bfloat16(), rope_table(torch.arange(9)[None], 16, 100.0, Yarn())
    for turn in (apply_rope, apply_rope_half_split):
        assert turn(x, table).dtype == torch.bfloat16
        assert torch.equal(turn(x, table), turn(x.float(), table).bfloat16())


def test_bug8_tables_do_not_remember_where_they_were_first_made():
    """A first use on the meta device, under fake tensors or in inference mode leaves nothing behind."""
    yarn, positions = Yarn(3.0, 77), torch.arange(4)[None]
    with torch.device("meta"):
        rope_frequencies(12, 77.0, yarn)
    with FakeTensorMode():
        rope_frequencies(12, 77.0, yarn)
    with torch.inference_mode():
        rope_frequencies(12, 77.0, yarn).mul_(2)
    assert_close(rope_frequencies(12, 77.0, yarn), numpy_frequencies(12, 77.0, yarn), 1e-14)
    assert rope_table(positions, 12, 77.0, yarn)[0].device.type == "cpu"
    with torch.device("meta"):
        assert rope_table(torch.arange(4, device="cpu")[None], 12, 77.0, yarn)[0].device.type == "cpu"


# Attention


def test_visibility_of_a_hand_worked_row():
    """Segments 0 0 1 −1 −1; the last three tokens ask."""
    segments = torch.tensor([[0, 0, 1, -1, -1]])
    expected = [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert torch.equal(visibility(segments[:, 2:], segments), torch.tensor(expected).bool()[None, None])


@ATTENTIONS
def test_attention_of_a_hand_worked_token(attention):
    """One head, N = P = V = R = 1: logits 2·(k + 3·r) for latents 1, 2 and rope keys 0, ln2/6 − 1/3 differ by ln 2."""
    numbers = [[1.0]], [[3.0]], [1.0, 2.0], [0.0, math.log(2) / 6 - 1 / 3], [1.0, 10.0]
    shapes = (1, 1, 1, 1), (1, 1, 1, 1), (1, 2, 1), (1, 2, 1), (2, 1)
    inputs = [torch.tensor(x, dtype=torch.float64).view(shape) for x, shape in zip(numbers, shapes)]
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert_close(attention(*inputs, mask, 2.0), np.array([[[10 / 3 + 20 * 2 / 3]]]))


@ATTENTIONS
@given(attention_cases())
def test_attention_follows_the_formula_in_numpy(attention, case):
    inputs, mask, scale = case
    assert_close(attention(*inputs, mask, scale), numpy_attention(*(a.numpy() for a in (*inputs, mask)), scale), 1e-12)


@given(attention_cases())
def test_attention_twins_agree_in_output_and_all_gradients(case):
    """Inputs q_nope, q_rope, latent and rope_key, and the weight kv_b."""
    inputs, mask, scale = case
    names = ("q_nope", "q_rope", "latent", "rope_key", "kv_b")
    expected = mla_attention_reference(*inputs, mask, scale)
    wanted = gradients(lambda *a: mla_attention_reference(*a, mask, scale), inputs)
    for twin in (mla_attention_fused, mla_attention_absorbed):
        assert_close(twin(*inputs, mask, scale), expected, 1e-12, twin.__name__)
        for name, actual, want in zip(names, gradients(lambda *a: twin(*a, mask, scale), inputs), wanted):
            assert_close(actual, want, 1e-11, f"{twin.__name__} gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ATTENTIONS
@given(attention_cases())
def test_attention_stays_near_float64_in_lower_precision(dtype, attention, case):
    inputs, mask, scale = case
    rounded = [x.to(dtype) for x in inputs]
    actual = attention(*rounded, mask, scale)
    assert actual.dtype == dtype
    assert_close(actual, mla_attention_reference(*(x.double() for x in rounded), mask, scale), dtype)


@given(attention_cases(), st.integers(1, 4))
def test_max_logits_twins_agree_and_are_the_largest_visible_logit(case, block):
    inputs, mask, scale = case
    q_nope, q_rope, latent, rope_key, kv_b = (x.numpy() for x in inputs)
    heads, nope = q_nope.shape[2:]
    keys = np.einsum("bsr,hnr->bshn", latent, kv_b.reshape(heads, -1, kv_b.shape[1])[:, :nope])
    logits = np.einsum("bthn,bshn->bhts", q_nope, keys) + np.einsum("bthp,bsp->bhts", q_rope, rope_key)
    expected = np.where(mask.numpy(), scale * logits, -np.inf).max(axis=(0, 2, 3))
    assert_close(max_logits_reference(*inputs, mask, scale), expected, 1e-12)
    assert_close(max_logits_fused(*inputs, mask, scale, block), expected, 1e-12)


@given(attention_cases())
def test_without_a_mask_each_row_is_one_segment_whose_last_tokens_ask(case):
    inputs, mask, scale = case
    batch, _, tokens, length = mask.shape
    one = visibility(torch.zeros(batch, tokens).long(), torch.zeros(batch, length).long())
    for twin in (mla_attention_reference, mla_attention_fused, mla_attention_absorbed):
        expected = mla_attention_reference(*inputs, one, scale)
        assert_close(twin(*inputs, None, scale), expected, 1e-12, twin.__name__)
    for twin in (max_logits_reference, max_logits_fused):
        assert_close(twin(*inputs, None, scale), max_logits_reference(*inputs, one, scale), 1e-12, twin.__name__)


def test_max_logits_carry_no_gradient():
    inputs = [torch.randn(s, requires_grad=True) for s in ((1, 2, 1, 3), (1, 2, 1, 2), (1, 2, 4), (1, 2, 2), (5, 4))]
    mask = visibility(torch.zeros(1, 2).long(), torch.zeros(1, 2).long())
    for largest in (max_logits_reference, max_logits_fused):
        assert not largest(*inputs, mask, 1.0).requires_grad


# The module


@given(layouts(), st.integers(0, 2**31), st.sampled_from(["reference", "fused"]))
def test_bug2_the_module_follows_the_formula_in_numpy_at_every_position(layout, seed, impl):
    """YaRN stretched, positions far from 0: a missing YaRN² factor or a wrong rope would show from position 1 on."""
    shape, segments = Shape(impl=impl), layout[0]
    attention = built(shape, seed)
    x = torch.randn(*segments.shape, shape.hidden_size, dtype=torch.float64)
    positions = torch.randint(0, 200, segments.shape)
    weights = {name: p.detach().numpy() for name, p in attention.named_parameters()}
    expected = numpy_mla(weights, shape, x.numpy(), segments.numpy(), positions.numpy())
    assert_close(run(attention, x, segments, positions), expected, 1e-12)
    if segments.shape[1] > 1 and (segments[:, 0] == segments[:, 1]).any():  # the case can tell: the factor matters
        flat = replace(shape, yarn=replace(SHORT, mscale_all_dim=0.0, mscale=0.0))
        assert np.abs(numpy_mla(weights, flat, x.numpy(), segments.numpy(), positions.numpy()) - expected).max() > 1e-9


@given(layouts(), st.integers(0, 2**31))
def test_module_twins_agree_in_input_and_weight_gradients(layout, seed):
    segments, grads = layout[0], []
    positions = torch.arange(segments.shape[1]).expand_as(segments)
    for impl in ("reference", "fused"):
        attention = built(Shape(impl=impl), seed)
        x = torch.randn(*segments.shape, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x.requires_grad_()
        out = run(attention, x, segments, positions)
        direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        named = {"x": x, **dict(attention.named_parameters())}
        grads.append(dict(zip(named, torch.autograd.grad(out, list(named.values()), direction))))
    for name, expected in grads[0].items():
        assert_close(grads[1][name], expected, 1e-11, name)


@IMPLS
def test_packed_segments_never_attend_across(impl):
    """A changed segment leaves the others bitwise as they were, and a row alone equals the same row packed."""
    attention, segments = built(Shape(impl=impl)), torch.tensor([[0, 0, 0, 1, 1, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    x = torch.randn(1, 7, 11, dtype=torch.float64)
    before = run(attention, x, segments, positions)
    for segment in (0, 1, 2, -1):
        mine = segments == segment
        after = run(attention, torch.where(mine[..., None], 100 * x + 1, x), segments, positions)
        assert torch.equal(after[~mine], before[~mine])
        assert not torch.equal(after[mine], before[mine])
        alone = run(attention, x[mine][None], segments[mine][None], positions[mine][None])
        assert_close(alone[0], before[mine], 1e-12)


@IMPLS
def test_padding_gives_finite_rows_and_gradients(impl):
    attention, segments = built(Shape(impl=impl)), torch.tensor([[-1, -1, 0], [-1, -1, -1]])
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    out = run(attention, x, segments, torch.zeros(2, 3).long())
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


@IMPLS
def test_padding_queries_stay_out_of_the_max_logits(impl):
    """QK-Clip must not shrink a head because of padding: only the queries asked for count."""
    attention, segments = built(Shape(impl=impl)), torch.tensor([[0, 0, -1, -1]])
    x, positions = torch.randn(1, 4, 11, dtype=torch.float64), torch.arange(4)[None]
    x[:, 2:] *= 1e3
    attention.q_a_layernorm.weight.data.mul_(50)
    table = rope_table(positions, 4, 50000.0, SHORT, torch.float64)
    mask = visibility(segments, segments)
    everyone = attention(x, table, mask, asked=torch.ones(1, 4, dtype=torch.bool))[1]
    real = attention(x, table, mask, asked=segments >= 0)[1]
    alone = attention(x[:, :2], [a[:, :2] for a in table], mask[:, :, :2, :2], asked=torch.ones(1, 2).bool())[1]
    assert_close(real, alone, 1e-12)
    assert (everyone > real).any()
    assert (attention(x, table, mask, asked=torch.zeros(1, 4).bool())[1] == -math.inf).all()
    assert attention(x, table, mask)[1] is None


# The cache


@IMPLS
@settings(max_examples=15)
@given(layouts(), st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=7, max_size=7))
def test_bug9_any_chunks_through_the_cache_equal_one_pass(impl, layout, seed, sizes):
    segments = layout[0]
    attention = built(Shape(impl=impl), seed)
    x, positions = torch.randn(*segments.shape, 11, dtype=torch.float64), torch.arange(7)[: segments.shape[1]]
    positions = positions.expand_as(segments)
    expected = run(attention, x, segments, positions)
    cache, pieces, start = LatentCache(1, len(x), segments.shape[1], 7, 4, torch.float64), [], 0
    for size in sizes:
        part = slice(start, start + size)
        if start < segments.shape[1]:
            pieces.append(run(attention, x[:, part], segments[:, part], positions[:, part], cache))
        start += size
    assert_close(torch.cat(pieces, dim=1), expected, 1e-12)


@IMPLS
def test_bug4_output_does_not_depend_on_the_capacity_of_the_cache(impl):
    """Bitwise, at YaRN's own 4096 too; unused room is filled with NaN and never read."""
    attention = built(Shape(impl=impl, yarn=replace(RELEASED, original_max_position_embeddings=4096)))
    x, segments, positions = torch.randn(2, 6, 11, dtype=torch.float64), torch.zeros(2, 6).long(), torch.arange(6)
    outputs = []
    for capacity in (6, 7, 4095, 4096, 4097):
        cache = LatentCache(1, 2, capacity, 7, 4, torch.float64)
        cache.latent.fill_(math.nan)
        cache.rope_key.fill_(math.nan)
        parts = [slice(0, 3), slice(3, 4), slice(4, 6)]
        outputs.append(torch.cat([run(attention, x[:, p], segments[:, p], positions[p].expand(2, -1), cache)
                                  for p in parts], dim=1))  # fmt: skip
    assert outputs[0].isfinite().all()
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


def test_cache_keeps_576_numbers_per_token_and_layer_at_released_size():
    cache = LatentCache(2, 1, 10, 512, 64)
    assert (cache.latent.numel() + cache.rope_key.numel()) / (2 * 10) == 576


def test_a_full_cache_says_both_numbers():
    cache = LatentCache(1, 1, 4, 2, 2)
    cache.extend(torch.zeros(1, 3).long(), torch.arange(3)[None])
    with pytest.raises(ValueError, match="cache holds 4 tokens and 5 are needed"):
        cache.extend(torch.zeros(1, 2).long(), torch.arange(3, 5)[None])
    assert cache.length == 3 and cache.next_position.tolist() == [3]


# Norm


@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([0.0, 1e-5, 0.5]))
def test_rms_norm_follows_the_formula_in_numpy(seed, dim, eps):
    rng = np.random.default_rng(seed)
    x, weight, norm = rng.normal(size=(3, dim)), rng.normal(size=dim), RMSNorm(dim, eps).double()
    norm.weight.data = torch.from_numpy(weight)
    assert_close(norm(torch.from_numpy(x)), x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weight, 1e-12)


def test_rms_norm_of_bfloat16_squares_in_float32():
    """300² overflows nothing but loses bits in bfloat16: the mean of 256 equal squares is exact only in float32."""
    x = torch.full((1, 256), 300.0).bfloat16()
    assert torch.equal(RMSNorm(256, 0.0).bfloat16()(x), torch.ones(1, 256).bfloat16())
    noisy = torch.randn(4, 300).bfloat16()
    assert torch.equal(RMSNorm(300, 1e-5).bfloat16()(noisy), RMSNorm(300, 1e-5)(noisy.float()).bfloat16())


# Accelerator


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@ATTENTIONS
def test_attention_on_cuda_equals_the_float64_reference(attention, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 33, 4, 16), (2, 33, 4, 8), (2, 70, 24), (2, 70, 8), (4 * (16 + 20), 24)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    segments = torch.cat((torch.zeros(2, 40), torch.ones(2, 30)), dim=1).long()
    mask = visibility(segments[:, 37:], segments)
    actual = attention(*(x.cuda() for x in (*inputs, mask)), 0.2)
    assert_close(actual.cpu(), mla_attention_reference(*(x.double() for x in inputs), mask, 0.2), dtype)
