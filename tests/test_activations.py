"""Recompute, FP8 and offload change what is stored, not what is computed.

Run: .venv/bin/python -m pytest tests/test_activations.py
"""

import dataclasses
import gc
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

import activations
import mla
import moe
from activations import SETTINGS, ActivationError, Memory, Saved, fp8_pack, fp8_unpack, saving
from k25 import K25, K25Config
from mla import Yarn
from optim import MuonClip
from parallel import ExpertParallel
from step import train_step

TINY = dataclasses.replace(
    K25Config.preset("toy"), hidden_size=48, intermediate_size=80, moe_intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=3, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=2, yarn=Yarn(factor=4.0, original_max_position_embeddings=8),
    vision=dataclasses.replace(K25Config.preset("toy").vision, text_hidden_size=48),
)  # fmt: skip
EXACT = [name for name, memory in SETTINGS.items() if not memory.fp8]
ROUNDED = [name for name, memory in SETTINGS.items() if memory.fp8]


def model_of(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    return K25(dataclasses.replace(TINY, **changes)).to(dtype)


def tokens(rows=2, length=20):
    """Ids and segments: two documents in each row, and padding at the end of the last."""
    ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(length) >= length // 3).long().repeat(rows, 1)
    segments[-1, length - 4 :] = -1
    return ids, segments


def step(model, memory, rows=2, length=20, autocast=False, count=False):
    """Loss, hidden, Stats, gradients and Saved of one forward and backward pass."""
    ids, segments = tokens(rows, length)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saving(memory, model, count) as saved:
        hidden, stats = model.hidden(model.embed(ids), segment_ids=segments, want_max=True)
        loss = F.cross_entropy(model.language_model.lm_head(hidden).flatten(0, 1).float(), ids.flatten())
        loss = loss + 0.1 * stats.balance_loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), hidden.detach(), stats, gradients, saved


def relative(gradients, plain):
    """|g − plain| / |plain| of each parameter that has a gradient."""
    return {name: float((gradients[name] - g).norm() / g.norm()) for name, g in plain.items() if g.norm() > 0}


# Settings


def test_contradictions_are_refused_in_one_line():
    with pytest.raises(ActivationError, match="choose none, selective or block"):
        Memory(recompute="some")
    with pytest.raises(ActivationError, match="those are sensitive"):
        Memory("block", fp8=True)
    model = model_of()
    model.language_model.model.layers[0].compile()
    with pytest.raises(ActivationError, match="compiled"), saving(Memory("selective"), model):
        pass


def test_modules_are_themselves_again_afterwards():
    model = model_of()
    with pytest.raises(KeyError), saving(Memory("selective", fp8=True), model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


# FP8


binades = st.integers(0, 12)


@given(st.integers(-100, 100), st.lists(st.tuples(binades, st.integers(8, 15), st.sampled_from((1, 0, -1)))))
def test_numbers_of_four_bits_come_back_exactly_within_thirteen_binades(top, numbers):
    x = 2.0**top * torch.tensor([1.0] + [sign * n / 16 * 2.0**-below for below, n, sign in numbers])
    assert torch.equal(fp8_unpack(*fp8_pack(x), torch.float32), x)


@given(st.integers(-100, 100), st.integers(8, 15), st.lists(st.integers(0, 15)))
def test_powers_of_two_come_back_exactly_within_sixteen_binades(top, largest, below):
    x = 2.0**top * torch.tensor([largest / 8] + [2.0**-n for n in below])
    assert torch.equal(fp8_unpack(*fp8_pack(x), torch.float32), x)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(-90, 90))
def test_rounding_costs_at_most_a_sixteenth_of_a_number_or_a_tiny_part_of_its_rows_largest(seed, dtype, exponent):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 2.0**exponent).to(dtype)
    codes, exponents = fp8_pack(x)
    assert codes.shape == (5, 7) and exponents.shape == (5, 1) and codes.element_size() == exponents.element_size() == 1
    y = fp8_unpack(codes, exponents, dtype)
    assert y.dtype == dtype
    gap, scale = (y.double() - x.double()).abs(), 2.0 ** exponents.double()
    assert (gap <= torch.maximum(x.double().abs() / 16, scale * 2.0**-10)).all()
    amax = x.double().abs().amax(1, keepdim=True)
    assert (amax <= 448 * scale).all() and (amax > 224 * scale).all()  # the least power of two with which it fits
    assert torch.equal(fp8_unpack(*fp8_pack(y), dtype), y)  # what is rounded stays


def test_rows_do_not_disturb_each_other():
    x = torch.tensor([[1e-20, 3e-20], [1e20, 3e20]])
    both = fp8_unpack(*fp8_pack(x), x.dtype)
    assert torch.equal(both[0], fp8_unpack(*fp8_pack(x[0]), x.dtype)) and (both != 0).all()


def test_zeros_stay_and_what_is_not_finite_is_clamped_or_kept():
    assert torch.equal(fp8_unpack(*fp8_pack(torch.zeros(2, 3)), torch.float32), torch.zeros(2, 3))
    assert fp8_unpack(*fp8_pack(torch.empty(0, 3)), torch.float32).shape == (0, 3)
    x = torch.tensor([7.0, -torch.inf, torch.inf, torch.nan, 0.0])
    y = fp8_unpack(*fp8_pack(x), torch.float32)
    assert y[0] == 7 and y[1] == -y[2] == -7 and y[3].isnan() and y[4] == 0  # 448 · 2⁻⁶ = 7
    most = torch.tensor([torch.finfo(torch.float32).max, 1.0])
    assert torch.equal(fp8_unpack(*fp8_pack(most), torch.float32), torch.tensor([448 * 2.0**119, 0.0]))


# What is computed stays


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_recompute_and_offload_change_no_bit(name, dtype):
    autocast = dtype == torch.bfloat16
    model = model_of(torch.float32 if autocast else dtype)
    loss, hidden, stats, gradients, _ = step(model, Memory(), autocast=autocast)
    loss2, hidden2, stats2, gradients2, _ = step(model, SETTINGS[name], autocast=autocast)
    assert torch.equal(loss, loss2) and torch.equal(hidden, hidden2)
    assert torch.equal(stats.max_logits, stats2.max_logits) and torch.equal(stats.balance_loss, stats2.balance_loss)
    assert gradients.keys() == gradients2.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], gradients2[name])] == []


@pytest.mark.parametrize("changes", [{"impl": "reference"}, {"qat": True, "hidden_size": 64, "moe_intermediate_size": 32},
                                     {"n_shared_experts": 0}, {"n_group": 4, "topk_group": 2}, {"qk_nope_head_dim": 4},
                                     {"moe_intermediate_size": TINY.hidden_size}], ids=str)  # fmt: skip
def test_every_kind_of_layer_can_be_recomputed(changes):
    if "hidden_size" in changes:
        changes = changes | {"vision": dataclasses.replace(TINY.vision, text_hidden_size=changes["hidden_size"])}
    model = model_of(**changes)
    plain = step(model, Memory())
    for memory in (Memory("selective"), Memory("selective", offload=True)):
        loss, hidden, _, gradients, _ = step(model, memory)
        assert torch.equal(hidden, plain[1]) and all(torch.equal(gradients[name], g) for name, g in plain[3].items())


def test_experts_that_are_weighed_by_another_process_are_computed_again(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = model_of()
        routed = model.language_model.model.layers[1].mlp
        routed.experts = ExpertParallel(routed.experts, torch.distributed.group.WORLD, "fused")
        plain = step(model, Memory())
        for name in EXACT:
            gradients = step(model, SETTINGS[name])[3]
            assert all(torch.equal(gradients[name], g) for name, g in plain[3].items())
        assert max(relative(step(model, Memory(fp8=True))[3], plain[3]).values()) < 0.08
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_weights_and_frozen_first_layers_are_no_obstacle():
    model = model_of()
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers.1" in name and "kv_a_proj" not in name)
    plain, other = step(model, Memory()), step(model, Memory("selective"))
    assert plain[3].keys() == other[3].keys() and all(torch.equal(other[3][name], g) for name, g in plain[3].items())


def test_without_gradients_and_with_a_cache_it_is_the_plain_forward():
    model, (ids, _) = model_of().requires_grad_(False), tokens()
    plain = model(ids)
    for memory in SETTINGS.values():
        with saving(memory, model):
            with torch.no_grad():
                assert torch.equal(model(ids), plain)
            cache = model.new_cache(2, 20)
            halves = [model(half, cache=cache) for half in ids.split(10, dim=1)]
        torch.testing.assert_close(torch.cat(halves, dim=1), plain)


def test_routers_count_each_token_once():
    ids, segments = tokens()
    for memory in SETTINGS.values():
        counts = step(model_of(), memory)[2].counts
        assert [int(c.sum()) for c in counts] == [2 * int((segments >= 0).sum())]


@pytest.mark.parametrize("impl, again", [("fused", 0), ("reference", 2)])
def test_max_logits_are_not_computed_again(monkeypatch, impl, again):
    calls = []
    original = getattr(mla, f"max_logits_{impl}")
    monkeypatch.setattr(mla, f"max_logits_{impl}", lambda *a: calls.append(1) or original(*a))
    step(model_of(impl=impl), Memory("selective"))
    assert len(calls) == 2 + again  # the reference's are part of the graph until they are detached


def test_backward_runs_only_the_up_projections_again(monkeypatch):
    """Of two layers: q_b and kv_b. Attention, other products and the experts run once."""
    counted = []
    for module, name in ((F, "scaled_dot_product_attention"), (moe, "_segment_linear")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name, **k: counted.append(_n) or _f(*a, **k))
    model, (ids, segments) = model_of(), tokens()
    with saving(Memory("selective"), model):
        loss = model.hidden(model.embed(ids), segment_ids=segments)[0].square().sum()

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        shapes = []

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            if function in (*activations.ATTENTION, torch.ops.aten._grouped_mm.default):
                self.shapes.append(str(function))
            if function is torch.ops.aten.mm.default:
                self.shapes.append(tuple(arguments[1].shape))
            return function(*arguments, **(named or {}))

    inside = Products()
    original = activations._Giving.__torch_dispatch__

    def giving(self, function, types, arguments=(), named=None):
        with inside:
            return original(self, function, types, arguments, named)

    monkeypatch.setattr(activations._Giving, "__torch_dispatch__", giving)
    loss.backward()
    up = [(24, 3 * 16), (16, 3 * 20)]
    assert sorted(inside.shapes, key=str) == sorted(2 * up + [(40, 48)], key=str)  # and the shared experts' down


# Bytes


def per_token(model, memory, dtype=torch.float32):
    """Stored bytes per token of (the dense layer, the MoE layer): what a second row adds, on device and host."""
    one, two = (step(model, memory, rows=rows, length=24, count=True)[4].bytes for rows in (1, 2))
    return [{place: (two[layer, place] - one[layer, place]) / 24 for place in ("device", "host")} for layer in (0, 1)]


C, I, N, P, V, H, Q, R, W, E, K = 48, 80, 12, 4, 8, 3, 24, 16, 40, 8, 2  # W is F, the expert width; T = 24
J = N + P


def test_a_block_stores_its_input():
    dense, routed = per_token(model_of(), Memory("block"))
    assert dense == routed == {"device": 4 * C, "host": 0}


def test_selective_stores_what_narrow_products_and_attention_put_out():
    attention = C + Q + (R + P) + H * max(J, V) + H  # block input; q_a; kv_a; attention; its log-sum-exp
    mlp = C + 2 * I  # second half's input; gate and up
    moe_ = C + E + 2 * K * W + 2 * W  # the same; router; experts' gate and up; the shared expert's
    dense, routed = per_token(model_of(), Memory("selective"))
    assert dense == {"device": 4 * (attention + mlp), "host": 0}
    assert routed == {"device": 4 * (attention + moe_), "host": 0}


def test_plain_stores_every_step_of_mla_and_mlp():
    T = 24
    norm = lambda width: 2 * width + 1  # noqa: E731 - input, normed, 1/rms
    attention = (norm(C) + C  # and the output, for q_a and kv_a
                 + norm(Q) + Q
                 + (R + P) + R + 1 + R  # all of kv_a's output, normed, 1/rms, output
                 + H * 3 * J + T  # query, key, padded value; mask as numbers
                 + H * J + H + H * V)  # attention, log-sum-exp, and its values without padding  # fmt: skip
    mlp = norm(C) + C + 4 * I  # output; gate, up, silu(gate), the product
    dense, _ = per_token(model_of(), Memory())
    assert dense == {"device": 4 * (attention + mlp), "host": 0}


def test_fp8_stores_a_byte_a_number_and_one_a_row_in_mlps_and_experts():
    plain, plain_routed = per_token(model_of(), Memory())
    dense, routed = per_token(model_of(), Memory(fp8=True))
    assert plain["device"] - dense["device"] == 4 * (C + 4 * I) - (C + 1) - 4 * (I + 1)
    # of K experts: rows; gate, up, silu(gate), the product, the weighted product. Of the shared one: the last five less one.
    # Its input is the router's too, and so stays exact.
    saved = 4 * (K * (C + 5 * W) + 4 * W) - K * (C + 1 + 5 * (W + 1)) - 4 * (W + 1)
    assert plain_routed["device"] - routed["device"] == pytest.approx(saved)
    selective, selective_routed = per_token(model_of(), Memory("selective"))
    dense, routed = per_token(model_of(), Memory("selective", fp8=True))
    assert selective["device"] - dense["device"] == 2 * (4 * I - (I + 1))
    assert selective_routed["device"] - routed["device"] == 2 * (K + 1) * (4 * W - (W + 1))


@pytest.mark.parametrize("name", [name for name, memory in SETTINGS.items() if memory.offload])
def test_offload_leaves_nothing_on_the_device(name):
    stays = dataclasses.replace(SETTINGS[name], offload=False)
    for here, there in zip(per_token(model_of(), stays), per_token(model_of(), SETTINGS[name])):
        assert there == {"device": 0, "host": here["device"]}


def test_weights_are_neither_counted_nor_moved():
    model = model_of()
    saved = Saved(Memory(fp8=True, offload=True), model.parameters())
    weight = model.language_model.lm_head.weight
    assert saved.pack(weight.T).data_ptr() == weight.data_ptr() and not saved.bytes


def test_a_storage_is_stored_once_however_often_it_is_saved():
    x = torch.randn(6, 8)
    for memory, size in ((Memory(offload=True), 6 * 8 * 4), (Memory(fp8=True), 6 * 9), (Memory(fp8=True, offload=True), 6 * 9)):
        saved = Saved(memory, [])
        saved.widths = {8}
        packed = [saved.pack(x), saved.pack(x.view(2, 3, 8)), saved.pack(x.detach())]
        assert sum(saved.bytes.values()) == size
        assert [tuple(saved.unpack(p).shape) for p in packed] == [(6, 8), (2, 3, 8), (6, 8)]
        assert torch.equal(saved.unpack(packed[0]).view(2, 3, 8), saved.unpack(packed[1]))


def test_a_new_tensor_at_an_old_address_is_not_taken_for_the_old_one():
    saved = Saved(Memory(fp8=True, offload=True), [])
    saved.widths = {64}
    values = []
    for number in range(50):
        x = torch.full((64, 64), float(number % 16))
        values.append((saved.pack(x), saved.pack(x.T)))
        del x
    for back in zip(*values):
        assert [float(saved.unpack(packed)[0, 0]) for packed in back] == [number % 16 for number in range(50)]


def test_a_column_of_a_storage_comes_back_with_its_strides():
    x = torch.arange(24.0).view(4, 6)[:, 1::2]
    saved = Saved(Memory(offload=True), [])
    back = saved.unpack(saved.pack(x))
    assert torch.equal(back, x) and back.stride() == x.stride()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_nothing_but_the_graph_holds_what_is_stored(name, backward, monkeypatch):
    model, (ids, segments), held = model_of(), tokens(), []
    keep = Saved._keep

    def kept(self, tensor, storage):
        packed = keep(self, tensor, storage)
        held.append(StorageWeakRef(packed.whole.host.untyped_storage() if self.memory.offload else storage))
        return packed

    monkeypatch.setattr(Saved, "_keep", kept)
    gc.disable()  # a cycle would keep a step's activations until the next collection
    try:
        with saving(SETTINGS[name], model, count=True) as saved:
            x = model.embed(ids)
            loss = model.hidden(x, segment_ids=segments)[0].sum()
        if backward:
            loss.backward()
        del x, loss
        mine = {tensor.untyped_storage()._cdata for tensor in (ids, segments, *model.parameters())}
        assert len(held) > 4 and saved.bytes
        assert not [ref for ref in held if not ref.expired() and ref.cdata not in mine]
    finally:
        gc.enable()


# FP8 gradients


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fp8_leaves_the_forward_pass_and_bends_gradients_by_a_few_percent(name, dtype):
    model = model_of(dtype)
    plain, rounded = step(model, Memory()), step(model, SETTINGS[name])
    assert torch.equal(plain[0], rounded[0]) and torch.equal(plain[1], rounded[1])
    errors = relative(rounded[3], plain[3])
    # a number is off by at most 1/16, and by √(1/3)/16·¾ on average; a gradient is a product of two such
    assert 0.005 < max(errors.values()) < 0.08
    assert max(v for n, v in errors.items() if "lm_head" in n or n.endswith("model.norm.weight")) == 0


def test_in_fp8_a_linear_layers_gradient_is_that_of_the_rounded_input():
    torch.manual_seed(0)
    mlp, x = moe.MLP(16, 24).double(), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    saved = Saved(Memory(fp8=True), mlp.parameters())
    saved.widths = {16, 24}
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        y = mlp(x)
    y.sum().backward()
    rough = lambda t: fp8_unpack(*fp8_pack(t), t.dtype)  # noqa: E731
    gate, up = F.linear(x, mlp.gate_proj.weight).detach(), F.linear(x, mlp.up_proj.weight).detach()
    back = torch.ones(5, 16, dtype=torch.float64) @ mlp.down_proj.weight  # into the product
    up_gradient = back * rough(F.silu(gate))
    torch.testing.assert_close(mlp.up_proj.weight.grad, up_gradient.T @ rough(x.detach()))
    torch.testing.assert_close(mlp.down_proj.weight.grad, torch.ones(16, 5, dtype=torch.float64) @ rough(F.silu(gate) * up))


def test_only_rows_of_mlps_and_experts_are_rounded(monkeypatch):
    """Norms, routers, attention and weights in another dtype stay as they are."""
    model, found, running = model_of(), [], ["outside"]
    original = Saved._round
    monkeypatch.setattr(Saved, "_round", lambda self, tensor, storage: found.append((running[-1], tensor)) or original(self, tensor, storage))
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: running.append(name))
        module.register_forward_hook(lambda m, a, out: running.pop() and None)
    for autocast in (False, True):
        step(model, Memory(fp8=True), autocast=autocast)
    assert {place.partition("layers.")[2] for place, _ in found} == {"0.mlp", "1.mlp.experts", "1.mlp.shared_experts"}
    tokens_or_choices = {2 * 20, 2 * 20 * TINY.num_experts_per_tok}
    assert {tensor.numel() // tensor.shape[-1] for _, tensor in found} == tokens_or_choices


# The trainer's step


class OneBatch:
    """Two rows of text as data.Batch has them."""

    def __init__(self):
        self.ids, self.segment_ids = tokens()
        self.positions = torch.arange(20).repeat(2, 1)
        self.targets, self.loss_mask = self.ids.roll(-1, 1), self.segment_ids >= 0
        self.vision = torch.zeros_like(self.loss_mask)
        self.patches = self.grid_thw = None


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: str = "bfloat16"
    clip_norm: float = 1.0
    qk_clip: float = 100.0
    balance_gamma: float = 0.01
    contrastive: float = 0.0
    recompute: str = "none"
    fp8: bool = False
    offload: bool = False


def test_optimizer_steps_are_bitwise_those_without_it():
    results = []
    for settings in ({}, {"recompute": "selective"}, {"recompute": "selective", "offload": True}, {"recompute": "block"}):
        model = model_of()
        optimizer = MuonClip([{"params": list(model.language_model.named_parameters()), "kind": "adamw", "lr": 0.01, "weight_decay": 0.0}])
        for _ in range(2):
            result = train_step(model, optimizer, [OneBatch(), OneBatch()], Settings(**settings))
        results.append((result, [p.clone() for p in model.state_dict().values()]))
    for result, state in results[1:]:
        assert result == results[0][0] or math.isnan(result.loss_vision)
        assert all(torch.equal(a, b) for a, b in zip(state, results[0][1]))


# CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(SETTINGS))
def test_on_cuda_offload_frees_the_device_and_changes_no_bit(name):
    model = K25(K25Config.preset("toy")).cuda()
    ids = torch.randint(256, (4, 512), device="cuda")
    segments = torch.zeros_like(ids)
    _, plain, _, _ = activations._step(model, ids, segments, Memory(), False)
    _, gradients, saved, _ = activations._step(model, ids, segments, SETTINGS[name], False, count=True)
    if not SETTINGS[name].fp8:
        assert all(torch.equal(gradients[n], g) for n, g in plain.items())
    if SETTINGS[name].offload:
        assert not any(size for (_, place), size in saved.bytes.items() if place == "device")


# The command


def test_the_command_measures_prints_and_writes(tmp_path, capsys):
    activations.main(["--rows", "1", "--length", "16", "--repeats", "1", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in SETTINGS) and "offload on a CPU moves nothing" in table
    told = json.loads((tmp_path / "activations.json").read_text())
    by_name = {entry["name"]: entry for entry in told["settings"]}
    assert by_name["selective"]["device"] < 0.4 * by_name["plain"]["device"] and by_name["plain"]["host"] == 0
    assert all(entry["same_loss"] and (max(entry["errors"].values()) == 0) == ("fp8" not in name) for name, entry in by_name.items())
    assert (tmp_path / "activations.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [["--preset", "huge"], ["--rows", "0"], ["--device", "abacus"]])
def test_misuse_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        activations.main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
