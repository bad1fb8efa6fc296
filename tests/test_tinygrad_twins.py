"""Claims about tinygrad_twins.py: right forward and backward, run and replayed, with fewer kernels than operations.

The truth is autograd of the torch reference twins in float64. Numbers after `bug` are those of the public bug list.
Run: .venv/bin/python -m pytest tests/test_tinygrad_twins.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from tinygrad import Device, Tensor, dtypes
from tinygrad.uop import GroupOp, Ops

import tinygrad_twins
from k25 import cross_entropy_reference
from mla import apply_rope, apply_rope_half_split, mla_attention_reference
from moe import experts_reference, fake_quant, int4_pack, int4_unpack, route_reference, swiglu
from tinygrad_twins import jitted, value_and_gradients
from vit3d import apply_rope_2d, patch_embed, pool_merge_reference, project, rope_table_2d, vit_attention_reference

GRIDS = [(1, 2, 4), (3, 4, 2), (1, 2, 2)]  # 8, 24 and 4 patches; an image, a clip, an image
LENGTHS = [8, 24, 4]


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def route(x, weight, bias, top_k, n_group, topk_group, scale, pinned):
    return route_reference(x, weight, bias, top_k, n_group, topk_group, scale, True, pinned)


REFERENCES = {
    "rms_norm": rms_norm,
    "rope": lambda x, cos, sin: apply_rope(x, (cos, sin)),
    "rope_half_split": lambda x, cos, sin: apply_rope_half_split(x, (cos, sin)),
    "rope_2d": lambda x, grids, theta: apply_rope_2d(x, rope_table_2d(grids, x.shape[-1], theta, x.dtype)),
    "mla_attention": mla_attention_reference,
    "mla_decode": mla_attention_reference,
    "route": lambda *arguments: route(*arguments).weights,
    "experts": experts_reference,
    "swiglu": swiglu,
    "int4_unpack": lambda packed, scale: int4_unpack(packed, scale).to(torch.float64),
    "int4_linear": lambda x, packed, scale: x @ int4_unpack(packed, scale).to(x.dtype).T,
    "fake_quant": fake_quant,
    "patch_embed": patch_embed,
    "vit_attention": vit_attention_reference,
    "pool_merge": pool_merge_reference,
    "project": project,
    "cross_entropy": cross_entropy_reference,
}
EACH = pytest.mark.parametrize("name", REFERENCES)
# Kernels measured with tinygrad 0.14: (forward, forward and gradients). A sum ends a kernel where others wait for it.
KERNELS = {
    "rms_norm": (2, 5),  # sum of squares; the rest
    "rope": (1, 2),
    "rope_half_split": (1, 2),
    "rope_2d": (1, 2),  # angles included
    "mla_attention": (6, 16),  # keys; values; logits; row maximum; row sum; weighted sum
    "mla_decode": (6, 16),  # query; logits; row maximum; row sum; weighted sum; output
    "route": (8, 13),  # scores; group scores; group ranks; ranks; index; chosen scores; their sum; weights
    "experts": (2, 15),  # gate and up of all chosen experts; down with the weighted sum
    "swiglu": (2, 8),  # gate and up; down
    "int4_unpack": (1, 1),
    "int4_linear": (1, 2),  # unpacking included
    "fake_quant": (2, 2),  # largest of each group; the rest
    "patch_embed": (1, 4),
    "vit_attention": (4, 10),  # logits; row maximum; row sum; weighted sum
    "pool_merge": (1, 2),  # whatever the grids
    "project": (5, 17),  # mean; variance; normed; first linear with GELU; second linear
    "cross_entropy": (3, 7),  # logits; row maximum; row sum with the chosen logit
}


def drawn(name, seed):
    """The operation's arguments in torch: every dimension odd where it may be, and different from the others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if name == "rms_norm":
        return normal(2, 3, 7), normal(7), 1e-5
    if name in ("rope", "rope_half_split"):
        angle = normal(2, 3, 2)
        return normal(2, 3, 5, 4), angle.cos(), angle.sin()
    if name == "rope_2d":
        return normal(sum(LENGTHS), 3, 8), GRIDS, 10000.0
    if name in ("mla_attention", "mla_decode"):
        mask = torch.ones(3, 5).tril(2).bool() & (torch.rand(2, 1, 3, 5, generator=generator) < 0.7)
        mask[..., 0] = True
        return normal(2, 3, 3, 5), normal(2, 3, 3, 4), normal(2, 5, 7), normal(2, 5, 4), normal(3 * (5 + 6), 7), mask, 0.4
    if name == "route":
        return normal(5, 6), normal(12, 6), normal(12), 3, 4, 2, 2.827, None
    if name == "experts":
        index = torch.rand(5, 7, generator=generator).argsort(1)[:, :3]
        return normal(5, 6), normal(5, 3).sigmoid(), index, normal(7, 4, 6), normal(7, 4, 6), normal(7, 6, 4)
    if name == "swiglu":
        return normal(5, 6), normal(4, 6), normal(4, 6), normal(6, 4)
    if name == "int4_unpack":
        return int4_pack(normal(3, 64))
    if name == "int4_linear":
        return normal(5, 64), *int4_pack(normal(3, 64))
    if name == "fake_quant":
        return (normal(3, 64),)
    if name == "patch_embed":
        return normal(5, 12), normal(7, 3, 2, 2), normal(7)
    if name == "vit_attention":
        return *normal(3, sum(LENGTHS), 3, 4), LENGTHS
    if name == "pool_merge":
        return normal(sum(LENGTHS), 5), GRIDS
    if name == "project":
        weights = normal(5), normal(5), normal(20, 20) / 4, normal(20), normal(7, 20) / 4, normal(7)
        return normal(3, 4, 5), *weights, 1e-5
    targets = torch.tensor([8, -100, 0, 3, -100])
    return normal(5, 6), normal(9, 6), targets  # cross_entropy


def wanted(name):
    """Positions of the arguments that a network would train or pass gradients through."""
    fixed = {"rope": (1, 2), "rope_half_split": (1, 2), "route": (2,), "int4_unpack": (0, 1), "int4_linear": (1, 2)}
    floats = [i for i, x in enumerate(drawn(name, 0)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [i for i in floats if i not in fixed.get(name, ())]


def to_tinygrad(value):
    """A torch tensor as a tinygrad tensor with memory of its own; anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        return Tensor(value.float().numpy()).cast(dtypes.bfloat16).realize()
    return Tensor(value.numpy()).realize()


def to_torch(tensor):
    """A tinygrad tensor as a torch tensor; bfloat16 comes back as float32."""
    return torch.tensor(tensor.numpy())


def truth(name, arguments, direction=None):
    """Value of the torch reference in float64 and the gradients of Σ direction · value for the wanted arguments."""
    exact = [x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in arguments]
    leaves = [exact[i].requires_grad_() for i in wanted(name)]
    value = REFERENCES[name](*exact)
    gradients = torch.autograd.grad(value, leaves, direction.double()) if leaves and direction is not None else ()
    return value.detach(), gradients


def counted(results):
    """(operations written, kernels planned) for unrealized results; copies of constants to the device are neither.

    Operations are the elementwise ones and the sums: a library that runs each by itself launches so many kernels.
    """
    graph = {u for tensor in results for u in tensor.uop.toposort()}
    written = sum((u.op in GroupOp.Elementwise or u.op is Ops.REDUCE) and u.device is not None for u in graph)
    return written, sum(call.src[0].op is not Ops.COPY for call in Tensor.schedule_linear(*results).src)


def test_the_default_device_is_clang_where_it_exists():
    expected = "CPU" if shutil.which("clang") else "PYTHON"
    assert Device.DEFAULT == os.environ.get("DEV", expected)


@EACH
def test_forward_and_gradients_are_right_when_run_recorded_and_replayed(name):
    """Three calls through TinyJit, each with new inputs."""
    function, wants = jitted(value_and_gradients(getattr(tinygrad_twins, name), wanted(name))), wanted(name)
    for seed in range(3):
        arguments = drawn(name, seed)
        shape = REFERENCES[name](*arguments).shape
        direction = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        results = function(to_tinygrad(direction), *map(to_tinygrad, arguments))
        value, *gradients = results if isinstance(results, tuple) else [results]
        expected, expected_gradients = truth(name, arguments, direction)
        assert_close(to_torch(value), expected, torch.float32, f"{name}, call {seed}")
        assert len(gradients) == len(wants) == len(expected_gradients)
        for i, gradient, right in zip(wants, gradients, expected_gradients):
            assert_close(to_torch(gradient), right, 4e-5, f"{name}, call {seed}, gradient of argument {i}")


@EACH
def test_fewer_kernels_than_operations(name):
    """Each prints one line of the table; run pytest with -s to see it."""
    function, arguments = getattr(tinygrad_twins, name), [to_tinygrad(x) for x in drawn(name, 0)]
    result = function(*arguments)
    result = result if isinstance(result, tuple) else (result,)
    written, forward = counted(result)
    direction = Tensor.full(result[0].shape, 0.5).contiguous().realize()
    written_both, both = counted(value_and_gradients(function, wanted(name))(direction, *arguments))
    print(f"\n{name:16} forward {written:3} operations, {forward:2} kernels", end="")
    print(f"    with gradients {written_both:3} operations, {both:2} kernels", end="")
    most_forward, most_both = KERNELS[name]
    assert forward <= most_forward < written
    assert both <= most_both < written_both


@pytest.mark.parametrize("name", ["rms_norm", "rope", "route", "swiglu", "int4_linear", "pool_merge"])
def test_bfloat16_in_is_bfloat16_out(name):
    arguments = [x.bfloat16() if i in wanted(name) else x for i, x in enumerate(drawn(name, 0))]
    result = getattr(tinygrad_twins, name)(*map(to_tinygrad, arguments))
    value = result[0] if isinstance(result, tuple) else result
    assert value.dtype == (dtypes.float32 if name == "route" else dtypes.bfloat16)
    exact = [x.float() if i in wanted(name) else x for i, x in enumerate(arguments)]
    assert_close(to_torch(value), truth(name, exact)[0], torch.bfloat16, name)


def test_bug18_ties_go_to_the_lower_index():
    """Scores of few distinct values: experts and groups tie all the time, and every choice is the reference's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.zeros(40, 2), torch.zeros(12, 2)
    for n_group, topk_group in ((1, 1), (4, 2)):
        bias = torch.randint(-2, 1, (12,), generator=generator).float()
        arguments = x, weight, bias, 4, n_group, topk_group, 1.0, None
        weights, index = tinygrad_twins.route(*map(to_tinygrad, arguments))
        expected = route(*arguments)
        assert torch.equal(to_torch(index).long(), expected.index)
        assert_close(to_torch(weights), expected.weights)


def test_bug11_experts_of_dropped_groups_are_never_chosen_however_negative_the_kept_ones():
    x, weight = torch.zeros(1, 2), torch.zeros(4, 2)
    bias = torch.tensor([-9.0, -8.0, -9.5, -0.6])  # group 1 wins by −0.6 − 9.5 > −9 − 8
    _, index = tinygrad_twins.route(*map(to_tinygrad, (x, weight, bias, 2, 2, 1, 1.0, None)))
    assert index.tolist() == [[3, 2]]


def test_pinned_experts_are_kept_and_weighed_by_their_own_scores():
    *arguments, _ = drawn("route", 0)
    pinned = torch.tensor([[3, 11, 0]]).expand(5, 3).contiguous()
    weights, index = tinygrad_twins.route(*map(to_tinygrad, (*arguments, pinned)))
    assert torch.equal(to_torch(index).long(), pinned)
    assert_close(to_torch(weights), route(*arguments, pinned).weights)


def test_experts_that_nobody_chose_are_never_read():
    x, weights, _, *matrices = drawn("experts", 0)
    index = torch.tensor([[0, 2, 4]]).expand(5, 3).contiguous()
    expected = experts_reference(x, weights, index, *matrices)
    for matrix in matrices:
        matrix[[1, 3, 5, 6]] = torch.nan
    assert_close(to_torch(tinygrad_twins.experts(*map(to_tinygrad, (x, weights, index, *matrices)))), expected)


def test_bug28_fake_quant_is_pack_and_unpack_bitwise_with_gradient_one():
    """Weights of every size, a group of zeros, and codes that lie on the border between two."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 96, generator=generator) * torch.logspace(-6, 3, 30)[:, None]
    weight[0, :32] = 0.0
    weight[1, :32] = (torch.arange(32) % 29 - 14) / 2 * 1.28125  # every second weight lies halfway between two codes
    weight[2, :32] = torch.arange(32) / 31 * 7 * 345 / 256  # the scale lies halfway between two bfloat16
    packed, scale = int4_pack(weight)
    given = to_tinygrad(weight)
    result = tinygrad_twins.fake_quant(given)
    (gradient,) = result.gradient(given, gradient=to_tinygrad(weight))
    assert torch.equal(to_torch(result), int4_unpack(packed, scale))
    unpacked = tinygrad_twins.int4_unpack(to_tinygrad(packed), to_tinygrad(scale))
    assert torch.equal(to_torch(unpacked), int4_unpack(packed, scale))
    assert torch.equal(to_torch(gradient), weight)


def test_no_tokens_and_no_items_give_empty_results():
    x, *weights = drawn("swiglu", 0)
    assert tinygrad_twins.swiglu(*map(to_tinygrad, (x[:0], *weights))).numpy().shape == (0, 6)
    x, *settings = drawn("route", 0)
    assert [y.numpy().shape for y in tinygrad_twins.route(*map(to_tinygrad, (x[:0], *settings)))] == [(0, 3), (0, 3)]
    x, weights, index, *matrices = drawn("experts", 0)
    given = map(to_tinygrad, (x[:0], weights[:0], index[:0], *matrices))
    assert tinygrad_twins.experts(*given).numpy().shape == (0, 6)
    nothing = to_tinygrad(torch.zeros(0, 3, 4))
    assert tinygrad_twins.vit_attention(nothing, nothing, nothing, []).numpy().shape == (0, 3, 4)
    assert tinygrad_twins.rope_2d(nothing, [], 10000.0).numpy().shape == (0, 3, 4)
    assert tinygrad_twins.pool_merge(to_tinygrad(torch.zeros(0, 5)), []).numpy().shape == (0, 4, 5)


def test_rope_2d_is_exact_far_from_the_corner():
    """Column 511, the last of the released limit: float32 angles would be wrong in the fifth digit."""
    x = torch.randn(1024, 1, 8, generator=torch.Generator().manual_seed(0))
    turned = tinygrad_twins.rope_2d(to_tinygrad(x), [(1, 2, 512)], 10000.0)
    assert_close(to_torch(turned), REFERENCES["rope_2d"](x.double(), [(1, 2, 512)], 10000.0), 1e-6)


def test_replayed_results_stay_and_settings_are_not_baked_in():
    norm = jitted(tinygrad_twins.rms_norm)
    x, weight = torch.full((1, 3), 2.0), torch.ones(3)
    expected = {eps: 2 / (4 + eps) ** 0.5 for eps in (1.0, 5.0)}
    kept = [(eps, scale, norm(to_tinygrad(x * scale), to_tinygrad(weight), eps))
            for scale in (1.0, 2.0, 3.0, 4.0) for eps in expected]  # fmt: skip
    for eps, scale, result in kept:
        assert_close(to_torch(result), torch.full((1, 3), 2 * scale / (4 * scale**2 + eps) ** 0.5))


def test_a_part_of_these_tests_passes_without_a_compiler(tmp_path):
    """A process that finds no clang and no compiled kernel chooses DEV=PYTHON, by itself, and interprets them."""
    chosen = "device or (replayed and (rms_norm or int4_linear or pool_merge))"
    environment = {k: v for k, v in os.environ.items() if k != "DEV" and not k.startswith("PYTEST")}
    environment |= {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CACHEDB": str(tmp_path / "kernels")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "failed" not in done.stdout
