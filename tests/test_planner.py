"""The planner: what it counts is what is there, and hand-worked schedules take the time it says.

Run: .venv/bin/python -m pytest tests/test_planner.py
"""

import argparse
import dataclasses

import pytest
import torch
import torch.distributed as dist

import planner
from activations import Memory, saving
from footprint import RECIPES, RECOMPUTE, holdings, layer_kept, measure_peak, measure_saved, selective_kept, stage_kept
from k25 import K25, K25Config, cross_entropy_fused, sizes
from mla import rope_table, visibility
from optim import MuonClip
from parallel import ExpertParallel, Layout, Place, keep_units, split_units, zero1
from planner import GPUS, LADDER, Assumed, choose, exchange_seconds, ladder, make_plan, report
from schedule import Work, bubble, most_in_flight, predict_bubble, pretended, schedule_tables, simulate

TOY, SMALL = K25Config.preset("toy"), K25Config.preset("small")
SHORT = dataclasses.replace(SMALL, num_hidden_layers=3)
H800 = GPUS["h800"]
TORCH = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32, "bfloat16-weights": torch.bfloat16}


# Weights, gradients, optimizer state


def test_k25s_weights_are_counted_to_the_last_one():
    config = K25Config.preset("k2.5")
    layout = Layout(pp=16, virtual_stages=2, ep=1, dp=1, microbatches=16, encoder="stage0")
    held = holdings(config, layout, RECIPES["float32"])
    s = sizes(config)
    assert s.text == 1_026_408_232_448
    assert sum(h.numbers for h in held) == s.text + s.vision + s.projector


def test_experts_are_split_and_the_rest_is_not():
    config, recipe = K25Config.preset("k2.5"), RECIPES["float32"]
    whole = holdings(config, Layout(pp=4, dp=16, microbatches=4), recipe)
    split = holdings(config, Layout(pp=4, ep=16, dp=16, microbatches=4), recipe)
    for a, b in zip(whole, split):
        assert a.experts == 16 * b.experts and a.numbers - a.experts == b.numbers - b.experts


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_gradients_and_optimizer_state_of_a_real_step_are_exactly_the_counted_ones(dtype):
    model = K25(TOY).to(TORCH[dtype])
    optimizer = MuonClip.from_named(model.named_parameters(), 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = holdings(TOY, Layout(), RECIPES[dtype])[0]
    assert held.weights == sum(t.nbytes for t in model.state_dict().values())
    assert held.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert held.state == sum(t.nbytes for name, t in optimizer.state_tensors().items() if not name.endswith(".step"))


@pytest.mark.parametrize("encoder", ["dep", "stage0"])
@pytest.mark.parametrize("pp, virtual, dp, ep", [(2, 2, 4, 2), (1, 1, 4, 4), (4, 1, 2, 1)])
def test_every_rank_holds_what_the_trainer_leaves_it(pp, virtual, dp, ep, encoder):
    layout = Layout(pp, virtual, ep, dp, microbatches=pp, zero1=True, encoder=encoder)
    held = holdings(TOY, layout, RECIPES["float32"])
    for rank in range(pp):
        with pretended(pp * dp, rank * dp):
            place = Place(layout)
            with torch.device("meta"):
                model = keep_units(K25(TOY), place)
            named = list(model.named_parameters())
            assert held[rank].numbers == sum(t.numel() for t in model.state_dict().values())
            state = 0
            for group in dict.fromkeys(place.group_of(name) for name, _ in named):
                own = [(name, torch.empty(p.shape)) for name, p in named if place.group_of(name) is group]
                optimizer = zero1(MuonClip.from_named(own, 1e-3), group)
                slots = {"muon": 1, "adamw": 2}
                state += max(sum(4 * p.numel() * slots[g["kind"]] for g in groups for p in g["params"])
                             for groups in optimizer._partition_parameters())  # fmt: skip
            assert held[rank].state == state


# Activations


def block_and_inputs(config, layer, dtype, rows, length):
    torch.manual_seed(0)
    config = dataclasses.replace(config, num_hidden_layers=2)
    model = K25(config).to(TORCH[dtype])
    segments = torch.zeros(rows, length, dtype=torch.long)
    x = torch.randn(rows, length, config.hidden_size, dtype=TORCH[dtype], requires_grad=True)
    table = rope_table(torch.arange(length).expand(rows, length), config.qk_rope_head_dim, config.rope_theta, config.yarn,
                       torch.promote_types(x.dtype, torch.float32))  # fmt: skip
    block = model.language_model.model.layers[layer]
    return config, block, (x, table, visibility(segments, segments), segments >= 0, None, True)


def saved(block, arguments, dtype):
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return block(*arguments)

    return measure_saved(run, [*block.parameters(), *block.buffers(), *arguments[1]])[0]


@pytest.mark.parametrize("dtype", list(RECIPES))
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
@pytest.mark.parametrize("config", [TOY, SMALL], ids=["toy", "small"])
def test_a_layer_keeps_what_the_model_says(config, layer, dtype):
    config, block, arguments = block_and_inputs(config, layer, dtype, 2, 96)
    counted = sum(kept.bytes for kept in layer_kept(config, RECIPES[dtype], 2, 96, layer == 0))
    assert counted == pytest.approx(saved(block, arguments, dtype), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16-weights"])
def test_experts_on_other_ranks_keep_their_rows_twice(dtype):
    config, block, arguments = block_and_inputs(SMALL, 1, dtype, 2, 96)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        block.mlp.experts = ExpertParallel(block.mlp.experts, dist.group.WORLD, "fused")
        measured = saved(block, arguments, dtype)
    finally:
        dist.destroy_process_group()
    counted = sum(kept.bytes for kept in layer_kept(config, RECIPES[dtype], 2, 96, False, ep=2))
    assert counted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("config, rows, dtype, recompute", [
    (TOY, 8, "float32", False), (TOY, 8, "float32", True), (TOY, 8, "bfloat16", False), (TOY, 2, "bfloat16", True),
    (SHORT, 1, "float32", False), (SHORT, 1, "float32", True),
], ids=["toy", "toy-recompute", "toy-autocast", "toy-autocast-recompute", "small", "small-recompute"])  # fmt: skip
def test_activations_and_peak_of_a_training_pass_are_the_models_within_ten_percent(config, rows, dtype, recompute):
    torch.manual_seed(0)
    model, length, memory = K25(config), 256, Memory("block" if recompute else "none")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as from the microbatch before
    ids = torch.randint(256, (rows, length))
    segments = (torch.arange(length) * 3 // length).expand(rows, length)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), saving(memory, model):
            hidden, stats = model.hidden(model.embed(ids), segment_ids=segments, want_max=True)
            return cross_entropy_fused(hidden.flatten(0, 1), model.language_model.lm_head.weight, ids.flatten()).sum(), stats

    kept, working = stage_kept(config, RECIPES[dtype], split_units(config.num_hidden_layers, 1)[0], rows, length,
                               recompute=("block",) if recompute else ())  # fmt: skip
    measured, result = measure_saved(forward, [*model.parameters(), *model.buffers()])
    assert kept == pytest.approx(measured, rel=0.1)
    del result
    assert kept + working == pytest.approx(measure_peak(lambda: forward()[0].backward()), rel=0.1)


def test_the_optimizers_step_needs_what_the_model_says_within_ten_percent():
    model = K25(TOY)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = MuonClip.from_named(model.named_parameters(), 1e-3, ns_dtype=torch.bfloat16)
    optimizer.step()  # makes the state
    assert holdings(TOY, Layout(), RECIPES["float32"])[0].step == pytest.approx(measure_peak(optimizer.step), rel=0.1)


@pytest.mark.parametrize("fp8", [False, True], ids=["selective", "selective-fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selective_recompute_keeps_what_the_model_says(dtype, fp8):
    torch.manual_seed(0)
    model, rows, length = K25(SHORT), 1, 64
    ids, segments = torch.randint(256, (rows, length)), torch.zeros(rows, length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), \
         saving(Memory("selective", fp8), model, count=True) as found:  # fmt: skip
        _ = model.hidden(model.embed(ids), segment_ids=segments, want_max=True)
    measured = sum(size for (layer, _), size in found.bytes.items() if isinstance(layer, int))
    counted = sum(kept.after((), fp8) for layer in range(SHORT.num_hidden_layers)
                  for half in selective_kept(SHORT, RECIPES[dtype], rows, length, layer == 0) for kept in half)  # fmt: skip
    assert counted == pytest.approx(measured, rel=0.02)


def test_every_recomputed_group_and_fp8_keep_less():
    def kept(**how):
        return stage_kept(K25Config.preset("k2.5"), RECIPES["bfloat16-weights"], [1, 2], 1, 4096, 16, **how)[0]

    falling = [kept(), kept(recompute=RECOMPUTE[:1]), kept(recompute=RECOMPUTE[:2]), kept(recompute=RECOMPUTE),
               kept(recompute=RECOMPUTE, fp8=True), kept(recompute=("block",))]  # fmt: skip
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(falling)
    table = 4096 * 64 * 4 + 4096 * 4097  # cos and sin; the mask and which tokens count
    assert kept(recompute=("block",)) == 2 * 4096 * 7168 * 2 + table


def test_the_measure_counts_a_storage_once_and_parameters_never():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4)
    size, _ = measure_saved(lambda: (x @ weight) * (x @ weight) + x[:4].sum(), [weight])
    assert size == 8 * 4 * 4 + 2 * 8 * 4 * 4  # x once, and the two factors


# Schedules


def test_one_forward_one_backward_of_two_ranks_by_hand():
    tables = {0: [Work("F", 0, 0), Work("F", 0, 1), Work("B", 0, 0), Work("B", 0, 1)],
              1: [Work("F", 1, 0), Work("B", 1, 0), Work("F", 1, 1), Work("B", 1, 1)]}  # fmt: skip
    spans = {(s.rank, s.work.kind, s.work.microbatch): (s.start, s.end) for s in simulate(tables, [1, 1], [2, 2], transfer=0.5)}
    assert spans == {(0, "F", 0): (0, 1), (0, "F", 1): (1, 2), (1, "F", 0): (1.5, 2.5), (1, "B", 0): (2.5, 4.5),
                     (0, "B", 0): (5, 7), (1, "F", 1): (4.5, 5.5), (1, "B", 1): (5.5, 7.5), (0, "B", 1): (8, 10)}  # fmt: skip
    assert bubble(simulate(tables, [1, 1], [2, 2])) == pytest.approx(1 - 2 * 6 / (2 * 9))


@pytest.mark.parametrize("pp, microbatches", [(1, 3), (2, 2), (2, 8), (4, 8), (4, 5)])
def test_the_bubble_of_1f1b_is_the_textbooks(pp, microbatches):
    layout = Layout(pp=pp, microbatches=microbatches)
    assert predict_bubble(layout, [1.0] * pp, [2.0] * pp) == pytest.approx((pp - 1) / (microbatches + pp - 1))


@pytest.mark.parametrize("pp, virtual, microbatches", [(2, 2, 4), (4, 2, 8), (4, 4, 16), (2, 3, 2)])
def test_virtual_stages_divide_the_bubble(pp, virtual, microbatches):
    layout = Layout(pp=pp, virtual_stages=virtual, microbatches=microbatches)
    even = [1.0 / virtual] * layout.stages
    wanted = (pp - 1) / virtual / (microbatches + (pp - 1) / virtual)
    assert predict_bubble(layout, even, [2 * t for t in even]) == pytest.approx(wanted)


def test_a_slow_stage_makes_all_wait():
    layout = Layout(pp=4, microbatches=64)
    assert predict_bubble(layout, [2, 1, 1, 1], [4, 2, 2, 2]) == pytest.approx(1 - 5 / 8, abs=0.03)


def test_every_pass_is_in_the_tables_once():
    layout = Layout(pp=2, virtual_stages=2, dp=4, ep=2, microbatches=4)
    for rank, order in schedule_tables(layout).items():
        assert sorted((w.kind, w.stage, w.microbatch) for w in order) == sorted(
            (kind, stage, number) for kind in "BF" for stage in (rank, rank + 2) for number in range(4))  # fmt: skip


def test_microbatches_in_flight_are_those_of_the_warmup():
    orders = schedule_tables(Layout(pp=4, microbatches=8))
    assert [most_in_flight(order, [1] * 4) for order in orders.values()] == [4, 3, 2, 1]
    orders = schedule_tables(Layout(pp=4, virtual_stages=2, microbatches=8))
    assert [most_in_flight(order, [1] * 8) for order in orders.values()] == [11, 9, 7, 5]  # (v − 1)·pp + 2·(pp − 1 − rank) + 1
    order = [Work("F", 0, 0), Work("F", 1, 0), Work("B", 1, 0), Work("B", 0, 0)]
    assert most_in_flight(order, [10, 3], [100, 5]) == 110


# Traffic and the plan


def test_an_all_to_all_inside_a_node_never_uses_the_network():
    inside, across = Layout(pp=1, dp=16, ep=8), Layout(pp=1, dp=16, ep=16)
    assert exchange_seconds(inside, H800, 8e9) == pytest.approx(7e9 / H800.nvlink)
    assert exchange_seconds(across, H800, 16e9) == pytest.approx(8e9 / H800.link)


@pytest.fixture(scope="module")
def plan():
    layout = Layout(pp=2, virtual_stages=2, ep=2, dp=4, microbatches=4, zero1=True)
    return make_plan(TOY, layout, H800, "float32", 2, 64)


def test_the_plan_adds_up(plan):
    assert plan.tokens == 4 * 4 * 2 * 64
    assert plan.step == plan.pipeline + plan.reduce + plan.optimizer + plan.encoder
    # rank 0 has stages 0 and 2, with layer 1 of the two MoE layers: half of its rows leave, four times
    assert plan.parts == [["embed", 0], [1], [2], ["head"]]
    assert plan.exchange == [4 * (2 * 64) * 2 * 128 * 4 / 2 * 4] * 2
    assert plan.messages == [4 * 2 * 64 * 128 * 4 * 3] * 2
    for f in plan.fills:
        stays = f.held.weights + f.held.gradients + f.held.state + f.buffers
        assert f.peak == stays + max(f.moments["pipeline"] - f.held.late, f.moments["encoder"], f.moments["reduction"], f.moments["optimizer"])
    assert 0 < plan.mfu(plan.step) < 1 and plan.exposed > 0


def test_the_encoder_in_stage_0_costs_stage_0(plan):
    conventional = make_plan(TOY, dataclasses.replace(plan.layout, encoder="stage0"), H800, "float32", 2, 64)
    assert conventional.forward[0] > plan.forward[0] and conventional.forward[1:] == plan.forward[1:]
    ours, theirs = plan.fills, conventional.fills
    assert theirs[0].moments["pipeline"] > ours[0].moments["pipeline"] and theirs[1].moments["pipeline"] == ours[1].moments["pipeline"]
    assert theirs[1].held.numbers < ours[1].held.numbers == theirs[1].held.numbers + sizes(TOY).vision + sizes(TOY).projector


def test_the_report_names_its_assumptions_and_the_worst_rank(plan):
    text = report(plan, ladder(TOY, plan.layout, H800, ('float32',), 2, 64, Assumed()))
    for words in ("← worst", "--efficiency 0.5", "--hidden 1.0", "bubble", "MFU", "400 Gb/s", "989 TFLOP/s", "routing is even"):
        assert words in text


# What fits


def with_memory(size):
    """The rungs of a plan on an H800 of which so many bytes are usable."""
    layout = Layout(pp=2, microbatches=8, dp=4, zero1=True)
    gpu = dataclasses.replace(H800, memory=size / Assumed().usable)
    return ladder(SMALL, layout, gpu, ("bfloat16-weights",), 8, 1024, Assumed()).values()


def test_the_fastest_that_fits_is_chosen_and_else_the_nearest():
    plenty = with_memory(80e9)
    assert choose(plenty).store == LADDER["everything kept"]
    peaks = {what: plan.fills[plan.worst].peak for what, plan in zip(LADDER, plenty)}
    assert peaks["everything kept"] > peaks["selective recompute"] > peaks["selective, FP8"] > peaks["blocks recomputed"]
    seconds = {what: plan.step for what, plan in zip(LADDER, plenty)}
    assert seconds["everything kept"] < seconds["selective recompute"] < seconds["blocks recomputed"]
    tight = with_memory(peaks["selective recompute"])
    assert all(plan.fits == (plan.excess <= 0) for plan in tight if not plan.store.offload) and not next(iter(tight)).fits
    assert choose(tight).store == LADDER["selective recompute"]
    none = choose(with_memory(1e6))
    assert not none.fits and none.fills[none.worst].peak == min(peaks.values())


def test_what_goes_to_the_cpu_must_get_there_in_time():
    layout, store = Layout(pp=2, microbatches=8), LADDER["selective, FP8, rest on the CPU"]
    for host, fits in ((1e15, True), (1e3, False)):
        plan = make_plan(SMALL, layout, dataclasses.replace(H800, host=host), rows=4, length=512, store=store)
        text = report(plan, {("bfloat16-weights", "this"): plan})
        assert plan.excess <= 0 and plan.fits is fits and (f"fits, if the host took {plan.offload / 1e9:.0f} GB/s" in text) is not fits


def test_k25_on_1024_h800_fits_by_itself(tmp_path, capsys):
    """Eighty gigabytes, and what is printed leads there: from the flags as they are, and from flags that do not fit."""
    asked = ("--preset", "k2.5", "--gpus", "1024", "--pp", "16", "--virtual-stages", "2", "--ep", "16", "--gpu", "h800")
    assert run(*asked) == 0
    printed = capsys.readouterr().out
    assert "GB of 73.6 usable — fits" in printed and "← chosen" in printed
    assert run(*asked, "--recompute", "none", "--microbatches", "16") == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "→ --dtype bfloat16-weights --recompute" in printed


def run(*arguments):
    return planner.main(arguments)


TINY = ("--preset", "toy", "--gpus", "4", "--pp", "2", "--virtual-stages", "2", "--ep", "2", "--length", "64", "--dtype", "float32")


def test_the_command_prints_the_plan_and_draws_the_schedule(tmp_path, capsys):
    assert run(*TINY, "--gpu", "cpu", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "plan.txt").read_text() in printed
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong, words", [
    (("--ep", "3"), "--ep 3 does not divide --dp 2; nearest: --pp 2 --virtual-stages 2 --ep 2"),
    (("--gpus", "5"), "needs 4 processes and 5 processes were started"),
    (("--virtual-stages", "3"), "6 stages, but embedding, 3 layers and head are 5"),
    (("--recompute", "norm"), "choose none, selective, block, or some of norms,swiglu,mla"),
    (("--rows", "0"), "must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(wrong, words, capsys):
    assert run(*TINY, *wrong) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_assumptions_are_flags():
    parser = argparse.ArgumentParser()
    planner.add_arguments(parser)
    options = parser.parse_args([])
    assert Assumed(options.efficiency, options.hidden, options.vision) == Assumed()
