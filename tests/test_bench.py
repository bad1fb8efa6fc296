"""The bench runs, both sides agree, its formulas count what is done, and its report says what was measured.

Nothing here looks at a clock: sizes are tiny and times mean nothing.

Run: .venv/bin/python -m pytest tests/test_bench.py
"""

import argparse
import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import oracle
import peer as peer_module
from bench import BenchError, Ceiling, Disagreement, disagreement, interleave, measure
from bench_cases import Case, Workload, image_grids, op_cases, released_cases
from k25 import K25, K25Config, cross_entropy_reference
from mla import mla_attention_absorbed, mla_attention_reference, max_logits_reference
from moe import experts_reference, route_reference
from optim import newton_schulz_reference
from peer import PeerError
from roofline import (Work, absorbed_work, decode_work, decoder_work, experts_work, layer_work, linear_work, max_logits_work,
                      mla_work, newton_schulz_work, seen_pairs, vision_attention_work, vision_work)  # fmt: skip

pytestmark = pytest.mark.xdist_group("bench")  # the bench is run once

TINY = Workload(train=24, prefill=24, context=16, long_context=32, short_context=4, batch=3, steps=4, images=8, largest=2,
                op_tokens=16, loop_tokens=8, gemm=32, copy=1024, repeats=1)  # fmt: skip
TOY = K25Config.preset("toy")
PEER_NAMES = ["train", "prefill", "decode", "decode x3", "decode long", "decode short", "images", "images and clips"]
OP_NAMES = ["mla attention", "mla absorbed", "max logits", "route", "experts", "experts, decoding", "balance loss",
            "cross entropy", "newton schulz", "vit attention", "pool merge", "siglip"]  # fmt: skip
RELEASED_NAMES = ["layer", "layer, training", "absorbed decoding", "vision tower"]


def flops_of(function, *arguments):
    """What torch itself counts of matrix products."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


# The formulas


def test_work_of_a_hand_worked_linear_layer():
    """Two rows, 3 outputs, 4 inputs: 24 products and 24 sums; 8 + 12 + 6 numbers of 4 bytes."""
    assert linear_work(2, 3, 4, 4) == Work(48, 104)
    assert linear_work(2, 3, 4, 4) * 2 + Work(1, 1) == Work(97, 209)


def test_seen_pairs_of_hand_worked_rows():
    assert [seen_pairs(*sizes) for sizes in ((1, 1), (3, 3), (1, 5), (2, 5))] == [1, 1 + 2 + 3, 5, 4 + 5]


def test_work_of_a_hand_worked_attention():
    """H = 2, N = 3, P = 2, V = 5, R = 7: two of three tokens ask in 2 + 3 pairs."""
    config = dataclasses.replace(TOY, num_attention_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=5, kv_lora_rank=7)
    numbers = 2 * 2 * (5 + 5) + 3 * (7 + 2) + 2 * (3 + 5) * 7  # queries and outputs, latents and keys, kv_b
    assert mla_work(1, 2, 3, config, 4) == Work(2 * 3 * 7 * 2 * 8 + 2 * 5 * 2 * (3 + 2 + 5), 4 * numbers)
    assert absorbed_work(1, 2, 3, config, 4) == Work(2 * 2 * 7 * 2 * 8 + 2 * 5 * 2 * (7 + 7 + 2), 4 * numbers)


def test_work_of_hand_worked_experts():
    """One token touches K experts, very many touch all: C = 4, F = 3, K = 2 of E = 8."""
    config = dataclasses.replace(
        TOY, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=3, hidden_size=4,
        vision=dataclasses.replace(TOY.vision, text_hidden_size=4),
    )  # fmt: skip
    assert experts_work(1, config, 2) == Work(6 * 2 * 4 * 3, 2 * (3 * 2 * 4 * 3 + 2 * 4))
    two = experts_work(2, config, 1).bytes - 2 * 2 * 4
    assert two == pytest.approx(3 * 4 * 3 * 8 * (1 - (6 / 8) ** 2))
    assert experts_work(1000, config, 1).bytes - 2 * 1000 * 4 == pytest.approx(3 * 8 * 4 * 3)


def test_newton_schulz_of_a_hand_worked_matrix():
    """2 × 3, one step: Gram 2·2·2·3, its square 2·2·2·2, the product 2·2·2·3; the same transposed."""
    assert newton_schulz_work(5, 2, 3, 1, 4) == newton_schulz_work(5, 3, 2, 1, 4) == Work(5 * (24 + 16 + 24), 2 * 4 * 5 * 6)
    assert flops_of(newton_schulz_reference, torch.randn(3, 8, 6), 5) == newton_schulz_work(3, 8, 6, 5, 4).flops


def test_vision_attention_never_crosses_items():
    assert vision_attention_work([3, 2], 8, 4) == Work(4 * 8 * (9 + 4), 4 * 4 * 5 * 8)


def attention_inputs(keys, tokens=1):
    heads, nope, rope, rank = TOY.num_attention_heads, TOY.qk_nope_head_dim, TOY.qk_rope_head_dim, TOY.kv_lora_rank
    shapes = ((1, tokens, heads, nope), (1, tokens, heads, rope), (1, keys, rank), (1, keys, rope))
    return [*map(torch.randn, shapes), torch.randn(heads * (nope + TOY.v_head_dim), rank), None, 1.0]


def test_flops_are_those_that_torch_counts():
    """Of one query, which sees every key: there the references waste nothing on the future."""
    assert flops_of(mla_attention_reference, *attention_inputs(9)) == mla_work(1, 1, 9, TOY, 4).flops
    assert flops_of(mla_attention_absorbed, *attention_inputs(9)) == absorbed_work(1, 1, 9, TOY, 4).flops
    values = 2 * TOY.kv_lora_rank * TOY.num_attention_heads * TOY.v_head_dim  # the reference expands these too
    assert flops_of(max_logits_reference, *attention_inputs(1)) == max_logits_work(1, TOY, 4).flops + values
    rows, head = torch.randn(6, 128), torch.randn(512, 128)
    assert flops_of(cross_entropy_reference, rows, head, torch.zeros(6).long()) == linear_work(6, 512, 128, 4).flops
    matrices = [torch.randn(16, 96, 128), torch.randn(16, 96, 128), torch.randn(16, 128, 96)]
    routing = route_reference(rows, torch.randn(16, 128), torch.zeros(16), 2)
    assert flops_of(experts_reference, rows, routing.weights, routing.index, *matrices) == experts_work(6, TOY, 4).flops


@torch.no_grad()
def test_flops_of_the_whole_model_are_those_that_torch_counts():
    model = K25(dataclasses.replace(TOY, impl="reference"))
    future = 2 * TOY.num_attention_heads * (TOY.qk_nope_head_dim + TOY.qk_rope_head_dim + TOY.v_head_dim)  # the masked pair
    wasted = TOY.num_hidden_layers * future
    assert flops_of(model, torch.tensor([[1, 2]])) == decoder_work(1, 2, 2, 2, TOY, 4).flops + wasted
    assert decode_work(2, 5, 2, TOY, 4) == sum(
        (decoder_work(2, 1, keys, 1, TOY, 4, absorbed=True) for keys in (6, 7)), Work(0, 0)
    )
    for grid in ((1, 4, 6), (3, 2, 4)):
        patches = torch.randn(math.prod(grid), 588)
        assert flops_of(model.encode_media, patches, torch.tensor([grid])) == vision_work([grid], TOY.vision, 4).flops


def test_the_bytes_of_decoding_one_token_are_the_weights_it_touches_and_the_cache():
    """All parameters but the embedding, the idle experts and norms and biases; and S·(R+P) numbers per layer."""
    model = K25(TOY)
    used = sum(p.numel() for p in model.language_model.parameters() if p.ndim > 1) - 512 * 128 - 2 * 3 * 14 * 128 * 96
    keys, layers = 1000, TOY.num_hidden_layers
    cache = layers * keys * (TOY.kv_lora_rank + TOY.qk_rope_head_dim)
    counted = decode_work(1, keys - 1, 1, TOY, 1).bytes
    assert 0 < counted - used - cache < 0.02 * counted  # what is left are activations


def test_a_released_layer_is_mostly_experts():
    released = K25Config.preset("k2.5")
    whole, experts = layer_work(1, 8192, 8192, released, 2, False), experts_work(8192, released, 2)
    assert experts.flops == 6 * 8192 * 8 * 7168 * 2048 and experts.bytes > 2 * 3 * 384 * 7168 * 2048
    assert 0.5 < experts.flops / whole.flops < 0.8


# Comparing and timing


def test_disagreement_finds_one_wrong_row_of_many():
    right = torch.randn(2, 500, 8)
    wrong = right.clone()
    wrong[1, 77, 3] += right.abs().max()
    assert disagreement([right], [right]) == 0
    assert disagreement([right, (wrong,)], [right, (right,)]) == pytest.approx(1)
    assert disagreement(wrong, right, quantile=0.5) == 0  # the median row is right


@pytest.mark.parametrize("broken", [torch.zeros(2, 1), torch.full((2, 3), math.nan)])
def test_disagreement_of_other_shapes_or_numbers_that_are_none_is_infinite(broken):
    assert disagreement(broken, torch.ones(2, 3)) == math.inf


def test_sides_run_in_turn():
    ran = []
    sides = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    for seconds in interleave(sides, 3, "cpu"):
        assert ran == ["a", "b"] * (len(ran) // 2)
        assert len(seconds["a"]) == len(seconds["b"]) == len(ran) // 2 - 1 >= 3  # the first turn is not counted


@pytest.fixture
def ceiling():
    """A machine of 100 FLOPs and 10 bytes per second."""
    made = Ceiling(4, 16, torch.float32, "cpu")
    made.rates = lambda: (100.0, 10.0)
    return made


def pair(ours, theirs, work, target=None):
    return Case("pair", "two", "reference", ours, theirs, work, target)


def seconds_of(monkeypatch, ours, theirs=None):
    def told(sides, *_):
        clock = {name: [0.0, 1.0, 9.0] for name in sides} | {"ours": ours} | ({"reference": theirs} if theirs else {})
        return clock, {"ours": [2.0], "reference": [3.0]}

    monkeypatch.setattr(bench, "interleave", told)


def test_an_entry_of_hand_worked_times(monkeypatch, ceiling):
    """Medians 5 and 10 seconds, ours at best 4; 200 FLOPs need 2 seconds, 10 bytes need 1."""
    seconds_of(monkeypatch, [5.0, 4.0, 50.0], [10.0, 9.0, 80.0])
    ones = torch.ones(2, 2)
    entry = measure(pair(lambda: ones @ ones, lambda: ones + 1, Work(200, 10), 3.0), ceiling, 3, torch.float32, "cpu")
    assert (entry.seconds, entry.best_seconds, entry.their_seconds, entry.ratio, entry.turns) == (5, 4, 10, 2, 3)
    assert (entry.bound, entry.share, entry.disagreement, entry.processor_ratio) == ("GEMM", 0.5, 0, 1.5)
    assert "aten::mm" in dict(entry.profile) and "missed" in bench.line(entry)  # 2 of 3
    entry = measure(pair(lambda: ones, lambda: ones, Work(20, 10), 2.0), ceiling, 3, torch.float32, "cpu")
    assert (entry.bound, entry.share, entry.profile) == ("copy", 0.25, ()) and "missed" not in bench.line(entry)
    seconds_of(monkeypatch, [10.0], [9.0])
    assert measure(pair(lambda: ones @ ones, lambda: ones + 1, Work(1, 1)), ceiling, 1, torch.float32, "cpu").profile  # slower
    entry = measure(pair(lambda: ones, None, Work(200, 10)), ceiling, 3, torch.float32, "cpu")
    assert entry.ratio is entry.their_seconds is entry.disagreement is None and "20% of the GEMM" in bench.line(entry)


def test_sides_that_disagree_are_not_timed(monkeypatch, ceiling):
    monkeypatch.setattr(bench, "interleave", None)
    case = pair(lambda: torch.ones(2, 2), lambda: torch.full((2, 2), 1.01), Work(1, 1))
    with pytest.raises(Disagreement, match="pair: ours and reference differ by 9.9e-03"):
        measure(case, ceiling, 1, torch.float32, "cpu")


def test_the_ceiling_is_the_best_of_all_turns():
    ceiling = Ceiling(10, 5, torch.float32, "cpu")
    ceiling.hear({"GEMM": [1e-9, 2.0], "copy": [4.0, 1e-9]})
    ceiling.hear({"GEMM": [3.0], "copy": [3.0]})
    assert ceiling.rates() == pytest.approx((2 * 10**3 / 1e-9, 2 * 5 * 4 / 1e-9))


def test_images_are_of_mixed_sizes_and_the_same_each_time():
    grids = image_grids(32, 8)
    assert grids == image_grids(32, 8) and len(set(grids)) > 16
    assert all(t == 1 and 2 <= side <= 16 and side % 2 == 0 for t, *sides in grids for side in sides)


# Whole runs


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("transformers.models.kimi_k25", reason="this transformers has no Kimi K2.5")
    folder = tmp_path_factory.mktemp("bench")
    released = released_cases(TOY, torch.float32, "cpu", tokens=12, rows=2, context=20, side=4)
    entries = bench.run(TOY, TINY, out=folder, released=released)
    return folder, entries, json.loads((folder / "bench.json").read_text())


def test_a_run_measures_every_pair_and_all_agree(report):
    _, entries, _ = report
    assert [entry.name for entry in entries] == PEER_NAMES + OP_NAMES + RELEASED_NAMES
    for entry in entries:
        assert entry.seconds > 0 and entry.flops >= 0 and entry.bytes > 0 and entry.share > 0, entry
        if entry.against == "ceiling":
            assert entry.ratio is None
        else:
            assert entry.ratio == entry.their_seconds / entry.seconds and entry.disagreement < 1e-4, entry


def test_the_written_report_says_what_was_measured_on_what(report):
    folder, entries, written = report
    assert written["entries"] == json.loads(json.dumps([dataclasses.asdict(entry) for entry in entries]))
    assert written["workload"] == dataclasses.asdict(TINY)
    assert {"device", "dtype", "threads", "torch", "load"} <= written["machine"].keys()
    assert written["machine"]["peer"]["attention"] == "sdpa" and "transformers" in written["machine"]["peer"]["version"]
    assert (folder / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_operations_agree_with_their_references_in_each_dtype(dtype):
    bound, quantile = bench.AGREEMENT[dtype]
    for case in op_cases(TOY, TINY, dtype, "cpu"):
        assert disagreement(case.ours(), case.theirs(), quantile) <= bound, case.name


def test_without_a_peer_the_operations_are_measured(capsys):
    entries = bench.run(TOY, TINY, peer="none")
    assert [entry.name for entry in entries] == OP_NAMES
    assert all(entry.against == "reference" for entry in entries)


def test_a_peer_with_other_weights_is_found_out(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers.models.kimi_k25")
    opened = bench.open_peer

    def damaged(*arguments):
        other = opened(*arguments)
        other.text.norm.weight.data *= 1.01
        return other

    monkeypatch.setattr(bench, "open_peer", damaged)
    monkeypatch.setitem(bench.WORKLOADS, "full", TINY)
    assert oracle.main(["bench", "--preset", "toy", "--out", str(tmp_path / "out")]) == 1
    assert "train: ours and transformers differ" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_without_transformers_one_line_names_the_extra(monkeypatch, capsys, tmp_path):
    def missing():
        raise PeerError("transformers cannot be imported (No module named 'transformers')")

    monkeypatch.setattr(peer_module, "import_transformers", missing)
    assert oracle.main(["bench", "--preset", "toy", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "pip install '.[test]'" in told and len(told.strip().splitlines()) == 1


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--threads", "-1"], ["--device", "nowhere"]])
def test_impossible_settings_are_refused(flags):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(BenchError):
        bench.main(parser.parse_args(flags))


@pytest.mark.cuda
def test_the_released_cases_run_on_cuda():
    for case in released_cases(TOY, torch.bfloat16, "cuda", tokens=64, rows=2, context=64, side=8):
        measure(case, Ceiling(64, 1024, torch.bfloat16, "cuda"), 1, torch.bfloat16, "cuda")
