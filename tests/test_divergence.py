"""Claims about divergence.py and peer.py: each bug of the list is found at its operation, and right stacks are left alone.

Run: .venv/bin/python -m pytest tests/test_divergence.py
"""

import argparse
import dataclasses
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the network

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import conformance
import divergence
import mla
import vit3d
from divergence import DivergenceError, Theirs, trace_prompt
from k25 import load, save
from mla import Yarn
from moe import Routing
from op import Suspect
from patterns import pattern, shape_pattern
from taps import capture, read_taps, standard_prompts, write_taps
from test_k25 import built

PROMPTS = ("text", "image", "clip", "mixed")


@pytest.fixture(scope="module")
def model():
    """A tiny model in float32 of weights that bfloat16 holds; router biases so low that groups masked with 0 would win."""
    model = built(dtype=torch.bfloat16).float()
    for router in model.routers():
        router.e_score_correction_bias -= 1.0
    return model.eval()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "checkpoint"
    save(model, path)
    return path


def captured(model, names=PROMPTS, **options):
    prompts = standard_prompts(model.config)
    return {name: (prompts[name], capture(model, prompts[name], **options)) for name in names}


def outputs(model, name, **options):
    return {tap.name: tap.output for tap in captured(model, (name,), **options)[name][1].values()}


def rows_of(model, name, theirs, **options):
    return trace_prompt(model, standard_prompts(model.config)[name], theirs, **options)


def divergences(rows):
    return [row for row in rows if row.diverges]


def run(directory, against, out, *flags):
    """The command's exit code and its report."""
    parser = argparse.ArgumentParser()
    divergence.add_arguments(parser)
    code = divergence.main(parser.parse_args(["--checkpoint", str(directory), "--against", str(against),
                                              "--out", str(out), *flags]))  # fmt: skip
    return code, json.loads((out / "trace.json").read_text())


# Right stacks


def test_a_checkpoint_does_not_diverge_from_itself(directory, tmp_path, capsys):
    code, report = run(directory, directory, tmp_path, "--prompts", ",".join(PROMPTS))
    assert code == 0 and tuple(report["prompts"]) == PROMPTS
    assert {row["status"] for rows in report["prompts"].values() for row in rows} == {"OK"}
    assert {row["error"] for rows in report["prompts"].values() for row in rows} == {0.0}
    printed = capsys.readouterr().out
    assert printed.count("no operation diverges") == 4 and "[DIFF]" not in printed


def test_the_reference_twins_do_not_diverge(model, directory):
    reference = load(directory, impl="reference")
    for name in PROMPTS:
        assert not divergences(rows_of(model, name, Theirs(outputs(reference, name))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_is_inherited_and_diverges_nowhere(model, directory, dtype):
    other = load(directory, dtype)
    for name in PROMPTS:
        rows = rows_of(model, name, Theirs(outputs(other, name)))
        assert not divergences(rows), [row.text() for row in divergences(rows)]
        assert max(row.error for row in rows) > 0


def test_rounding_that_an_operation_amplifies_is_forgiven(directory):
    """Attention logits in the thousands: their rounding is far beyond the tolerance after the softmax."""

    def sharpened(dtype):
        model = load(directory, dtype)
        with torch.no_grad():
            for layer in model.language_model.model.layers:
                layer.self_attn.q_b_proj.weight *= 1024.0
                layer.self_attn.kv_a_layernorm.weight *= 10.0
        return model

    rows = rows_of(sharpened(torch.float32), "text", Theirs(outputs(sharpened(torch.float64), "text")))
    assert max(row.own for row in rows if row.op == "mla_attention") > 1e-4
    assert not divergences(rows)


@pytest.mark.parametrize("seed", [2, 3, 10])
@pytest.mark.parametrize("kept", [(".output", "merged", "logits"), (".output", "merged", "logits", "router.index")])
def test_bfloat16_layer_outputs_diverge_nowhere_although_near_ties_flip(seed, kept):
    exact, rounded = built(seed, torch.bfloat16).float(), built(seed, torch.bfloat16)
    prompt = standard_prompts(exact.config, seed)["text"]
    sparse = {name: tap.output for name, tap in capture(rounded, prompt).items() if name.endswith(kept)}
    rows = trace_prompt(exact, prompt, Theirs(sparse))
    assert not divergences(rows)
    (note,) = [row.note for row in rows if "near-tie" in row.note]
    assert ("tokens flipped by a margin of" if "router.index" in kept else "router.index is not told") in note


def test_rounding_may_grow_where_many_operations_are_missing():
    settings = dict(first_k_dense_replace=3, dtype=torch.bfloat16)  # no routers, so that nothing flips
    exact, rounded = built(**settings).float(), built(**settings)
    logits = outputs(rounded, "text")["decoder.logits"]
    (row,) = [row for row in rows_of(exact, "text", Theirs({"decoder.logits": logits})) if row.status != "MISSING"]
    assert row.own > 0.03 and not row.diverges


def test_the_order_of_the_chosen_experts_does_not_matter(model):
    tensors = outputs(model, "text")
    for name in [name for name in tensors if ".router." in name]:
        tensors[name] = tensors[name].flip(-1)
    rows = rows_of(model, "text", Theirs(tensors))
    assert all(row.status == "OK" for row in rows)


# Bugs. Each returns nothing and breaks the model's own code by monkeypatching.


def half_split_rope(patch, model):
    patch.setattr(mla, "apply_rope", mla.apply_rope_half_split)


def no_yarn_in_the_scale(patch, model):
    patch.setattr(mla, "softmax_scale", lambda nope_dim, rope_dim, yarn: (nope_dim + rope_dim) ** -0.5)


def attention_without_scale(patch, model):
    plain = mla.mla_attention_fused
    patch.setattr(mla, "mla_attention_fused", lambda *inputs, **named: plain(*inputs, **(named | {"scale": 1.0})))


def rope_table_in_bfloat16(patch, model):
    plain = mla.rope_table
    patch.setattr(mla, "rope_table", lambda *inputs: tuple(a.bfloat16().float() for a in plain(*inputs)))


def inflated_rope(patch, model):
    plain = mla.apply_rope
    patch.setattr(mla, "apply_rope", lambda x, table: plain(x, table) * 1.261)


def weights_of_biased_scores(patch, model):
    for router in model.routers():

        def route(x, weight, bias, top_k, n_group, topk_group, scale, normalize, pinned, plain=router.route):
            routing = plain(x, weight, bias, top_k, n_group, topk_group, scale, normalize, pinned)
            weights = (routing.scores + bias).gather(1, routing.index)
            return Routing(weights / weights.sum(1, keepdim=True) * scale, routing.index, routing.scores)

        patch.setattr(router, "route", route)


def groups_masked_with_zero(patch, model):
    for router in model.routers():

        def route(x, weight, bias, top_k, n_group, topk_group, scale, normalize, pinned, plain=router.route):
            routing = plain(x, weight, bias, top_k, n_group, topk_group, scale, normalize, pinned)
            biased = (routing.scores + bias).unflatten(1, (n_group, -1))
            kept = biased.topk(2, dim=2).values.sum(2).topk(topk_group, dim=1).indices
            mask = torch.zeros(biased.shape[:2], dtype=torch.bool).scatter(1, kept, True)[:, :, None]
            index = biased.masked_fill(~mask, 0.0).flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
            index = index if pinned is None else pinned
            return plain(x, weight, bias, top_k, n_group, topk_group, scale, normalize, index)

        patch.setattr(router, "route", route)


def rows_before_columns_in_the_vision_rope(patch, model):
    def swapped(grids, *options, **named):
        table = plain(grids, *options, **named)
        return table.unflatten(1, (-1, 2)).flip(-1).flatten(1)  # y0, x0, y1, x1, …

    plain = vit3d.rope_table_2d
    patch.setattr(vit3d, "rope_table_2d", swapped)


def time_embedding_on_images(patch, model):
    def timed(table, grids):
        first = torch.cat([torch.full((h * w,), t == 1) for t, h, w in grids])[:, None]
        return plain(table, grids) + first * vit3d.frame_sinusoid(1, table.shape[-1])

    plain = vit3d.position_embedding
    patch.setattr(vit3d, "position_embedding", timed)


def columns_before_rows_in_the_merge(patch, model):
    plain = model.vision_tower.pool_merge
    patch.setattr(model.vision_tower, "pool_merge", lambda x, grids: plain(x, grids)[:, [0, 2, 1, 3]])


def attention_across_items(patch, model):
    plain = model.vision_tower.attention
    patch.setattr(model.vision_tower, "attention", lambda q, k, v, lengths: plain(q, k, v, [sum(lengths)]))


def tokens_that_see_the_next_one(patch, model):
    def shifted(queries, keys):
        mask = plain(queries, keys)
        return torch.nn.functional.pad(mask[..., 1:, :], (0, 0, 0, 1), value=True)

    plain = mla.visibility
    patch.setattr(mla, "visibility", shifted)


BUGS = {  # bug: prompt, tap, operation, words of the cause
    half_split_rope: ("text", "decoder.layers.0.q_rope", "rope", "Megatron-LM#3900"),
    no_yarn_in_the_scale: ("text", "decoder.softmax_scale", "softmax_scale", "transformers#47435"),
    attention_without_scale: ("text", "decoder.layers.0.attention", "mla_attention", "scale is missing"),
    rope_table_in_bfloat16: ("text", "decoder.rope.cos", "rope_table", "Automodel#2549"),
    inflated_rope: ("text", "decoder.layers.0.q_rope", "rope", "every value is 1.261 times what it should be"),
    weights_of_biased_scores: ("text", "decoder.layers.1.router.weights", "route", "vllm#12002"),
    groups_masked_with_zero: ("text", "decoder.layers.1.router.index", "route", "transformers#45440"),
    tokens_that_see_the_next_one: ("text", "decoder.mask", "visibility", "sees the next"),
    rows_before_columns_in_the_vision_rope: ("image", "vision.blocks.0.query", "rope_2d", "rows come before columns"),
    time_embedding_on_images: ("image", "vision.position_embedding", "position_embedding", "mlxcel#762"),
    columns_before_rows_in_the_merge: ("clip", "vision.merged", "pool_merge", "kornia#3968"),
    attention_across_items: ("clip", "vision.blocks.0.attention", "vit_attention", "mlx-vlm#1436"),
}  # fmt: skip
each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)


def buggy(model, bug, name):
    """The taps of a prompt, computed by the model with a bug in it."""
    with pytest.MonkeyPatch.context() as patch:
        bug(patch, model)
        return outputs(model, name)


@each_bug
def test_each_bug_is_found_at_its_operation_and_its_cause_is_named(model, bug):
    name, tap, op, words = BUGS[bug]
    found = divergences(rows_of(model, name, Theirs(buggy(model, bug, name))))
    assert (found[0].tap, found[0].op) == (tap, op), found[0].text()
    assert words in found[0].cause, found[0].cause
    assert {row.op for row in found} == {op}  # what follows from it is inherited, in every layer


@each_bug
def test_each_bug_is_found_between_layer_outputs_too(model, bug):
    """A stack that gives only the output of each layer: the first layer that is wrong on its own input, and still why."""
    name, tap, op, words = BUGS[bug]
    sparse = {n: v for n, v in buggy(model, bug, name).items() if n.endswith((".output", "merged", "logits"))}
    first = divergences(rows_of(model, name, Theirs(sparse)))[0]
    layer = ".".join(tap.split(".")[:3])
    elsewhere = {"vision.merged": "vision.merged", "vision.position_embedding": "vision.blocks.0.output"}
    inside = layer if ".blocks." in layer or ".layers." in layer else "decoder.layers.0"
    assert first.tap == elsewhere.get(tap, f"{inside}.output")
    if "#" in words:
        assert words in first.cause and (first.op == op or f"{op}: " in first.cause), first.cause


PATTERNS = {
    rope_table_in_bfloat16: "about 8 bits",
    inflated_rope: "every value is 1.261 times",
    columns_before_rows_in_the_merge: "slices in another order, [0, 2, 1, 3], along axis 1",
}


@pytest.mark.parametrize("bug", PATTERNS, ids=lambda bug: bug.__name__)
def test_without_a_suspect_the_numbers_are_described(model, bug, monkeypatch):
    name, _, op, _ = BUGS[bug]
    monkeypatch.setitem(conformance.OPS, op, dataclasses.replace(conformance.OPS[op], suspects=()))
    found = divergences(rows_of(model, name, Theirs(buggy(model, bug, name))))
    assert PATTERNS[bug] in found[0].cause


# Suspects


def halves(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@pytest.fixture
def one_suspect(monkeypatch):
    """The registry with one suspect of rope, the halves, and one that only raises."""
    suspects = (Suspect("broken", "never this one", lambda x, cos, sin: x.reshape(-1, 999)),
                Suspect("halves", "pairs are halves apart", halves, "someone/something#1"))  # fmt: skip
    monkeypatch.setitem(conformance.OPS, "rope", dataclasses.replace(conformance.OPS["rope"], suspects=suspects))


def test_the_suspect_that_gives_their_numbers_is_the_cause(model, one_suspect):
    found = divergences(rows_of(model, "text", Theirs(buggy(model, half_split_rope, "text"))))
    assert found[0].cause == "pairs are halves apart (someone/something#1)"
    found = divergences(rows_of(model, "text", Theirs(buggy(model, inflated_rope, "text"))))
    assert "1.261" in found[0].cause


def test_a_suspect_of_a_missing_operation_is_tried_from_the_taps_around_it(model, one_suspect):
    theirs = buggy(model, half_split_rope, "text")
    sparse = {name: value for name, value in theirs.items() if name.endswith((".output", "logits"))}
    found = divergences(rows_of(model, "text", Theirs(sparse)))
    assert found[0].tap == "decoder.layers.0.output"
    assert found[0].cause == "rope: pairs are halves apart (someone/something#1)"


# Statuses


def test_another_shape_is_a_divergence_and_says_what_it_looks_like(model):
    tensors = outputs(model, "text")
    tensors["decoder.layers.0.attention"] = tensors["decoder.layers.0.attention"][0]
    tensors["decoder.layers.1.q_b"] = tensors["decoder.layers.1.q_b"].transpose(1, 2)
    tensors["decoder.norm"] = tensors["decoder.norm"][:, :-1]
    wrong = divergences(rows_of(model, "text", Theirs(tensors)))
    assert [row.status for row in wrong] == ["SHAPE"] * 3
    assert wrong[0].words == "shape (40,18), expected (1,40,18)" and "the right values" in wrong[0].cause
    assert wrong[1].cause == "axes 1 and 2 are transposed"
    assert wrong[2].cause == "another number of values"


def test_a_missing_tap_is_told_and_ours_stands_in(model):
    tensors = outputs(model, "text")
    del tensors["decoder.layers.1.q_norm"], tensors["decoder.mask"]
    rows = rows_of(model, "text", Theirs(tensors, missing={"decoder.mask": "fused into the kernel"}))
    assert {row.tap: row.note for row in rows if row.status == "MISSING"} == {
        "decoder.layers.1.q_norm": "", "decoder.mask": "fused into the kernel"}  # fmt: skip
    assert not divergences(rows)


def test_a_wrong_connection_shows_in_the_inputs_they_tell(model):
    tensors = outputs(model, "text")
    name = "decoder.layers.1.post_norm"
    wrong = tensors["decoder.layers.1.input_norm"]
    right = {name: {"x": tensors["decoder.layers.1.residual"]}}
    assert not divergences(rows_of(model, "text", Theirs(tensors, inputs=right)))
    weight = model.language_model.model.layers[1].post_attention_layernorm.weight.detach()
    normed = wrong * torch.rsqrt(wrong.square().mean(dim=-1, keepdim=True) + model.config.rms_norm_eps) * weight
    rows = divergences(rows_of(model, "text", Theirs(tensors | {name: normed}, inputs={name: {"x": wrong}})))
    assert [row.tap for row in rows][:2] == [f"{name}.in.x", "decoder.layers.1.router.index"]  # the norm itself is right


def test_errors_that_grow_past_the_tolerance_are_inherited(model):
    """Their first embedding differs; everything after it is right on its inputs."""
    tensors = outputs(model, "text", pinned={"decoder.embedded": outputs(model, "text")["decoder.embedded"] * 1.01})
    tensors["decoder.embedded"] = tensors["decoder.embedded"] * 1.01
    rows = rows_of(model, "text", Theirs(tensors))
    assert [row.tap for row in divergences(rows)] == ["decoder.embedded"]
    assert "every value is 1.01 times" in divergences(rows)[0].cause
    inherited = [row for row in rows if row.status == "DIFF" and not row.diverges]
    assert len(inherited) > 20 and {row.note.partition(":")[0] for row in inherited} == {"inherited"}
    assert rows[-1].error > 1e-3 and rows[-1].own < 1e-5


# Routing


def test_a_near_tie_that_falls_the_other_way_is_told_and_blamed_on_nobody():
    model = built(dtype=torch.float32, n_group=1, topk_group=1)
    router = model.routers()[0]
    with torch.no_grad():  # experts 0 and 1 are twins, and the lower number wins
        router.weight[1], router.e_score_correction_bias[1] = router.weight[0], router.e_score_correction_bias[0]
    index = "decoder.layers.1.router.index"
    other = outputs(model, "text")[index]
    tied = (other == 0).any(dim=1) & (other != 1).all(dim=1)
    assert 1 < tied.sum() < 40
    other = torch.where((other == 0) & tied[:, None], 1, other)
    theirs = outputs(model, "text", pinned={index: other}) | {index: other}
    rows = {row.tap: row for row in rows_of(model, "text", Theirs(theirs))}
    assert not divergences(rows.values())
    assert rows[index].status == "DIFF"
    assert rows[index].note.startswith(f"near-tie: {int(tied.sum())} of 40 tokens flipped by a margin of ")
    assert rows["decoder.layers.1.experts"].note == "inherited"


def test_a_tie_of_groups_is_a_near_tie_although_their_experts_differ():
    model, other = built(dtype=torch.float32), built(dtype=torch.float32)
    for one, nudge in ((model, 1e-6), (other, -1e-6)):
        router = one.routers()[0]
        with torch.no_grad():  # groups (0,1) and (2,3) have the same sum; the third is always kept, for its expert 4
            router.weight[2:4] = router.weight[0:2]
            router.e_score_correction_bias[:] = torch.tensor([0.25 + nudge, -0.25, 0.0, 0.0, 9.0, -5.0])
    index = "decoder.layers.1.router.index"
    swapped = outputs(other, "text")[index]
    rows = {row.tap: row for row in rows_of(model, "text", Theirs(outputs(model, "text", pinned={index: swapped}) | {index: swapped}))}
    assert not divergences(rows.values())
    assert rows[index].note.startswith("near-tie: 40 of 40 tokens")


def flipped(model):
    """Their taps, in which three tokens of layer 1 go to other experts than ours, and everything after follows them."""
    index = "decoder.layers.1.router.index"
    ours = outputs(model, "text")[index]
    other = ours.clone()
    other[5:8] = (ours[5:8] + 1) % model.config.n_routed_experts
    return index, outputs(model, "text", pinned={index: other}) | {index: other}


def test_a_flip_that_is_no_tie_diverges_with_its_margin(model):
    index, theirs = flipped(model)
    (row,) = divergences(rows_of(model, "text", Theirs(theirs)))
    assert row.tap == index and row.words.startswith("3 of 40 tokens go to other experts, by margins of the score up to")


def test_pinned_routing_keeps_flips_from_drowning_the_arithmetic(model):
    index, theirs = flipped(model)
    free, pinned = ({row.tap: row for row in rows_of(model, "text", Theirs(theirs), pin_routing=pin)} for pin in (False, True))
    after = ("decoder.layers.1.experts", "decoder.layers.2.output", "decoder.logits")
    assert all(free[name].error > 1e-2 and free[name].note == "inherited" for name in after)
    assert all(pinned[name].status == "OK" and pinned[name].error < 1e-6 for name in after)
    assert free[index].diverges and pinned[index].diverges
    assert free["decoder.layers.1.router.weights"].status == "OK"  # of the tokens that did not flip


def test_an_index_outside_of_the_experts_diverges_and_is_not_used(model):
    index, theirs = flipped(model)
    theirs[index] = theirs[index] + 100
    assert divergences(rows_of(model, "text", Theirs(theirs)))[0].cause == "no indices of experts"


# Weights and numbers


def saved_with(directory, target, change, **config):
    """A copy of a checkpoint with a change made to its model."""
    other = load(directory)
    with torch.no_grad():
        change(other)
    other.config = dataclasses.replace(other.config, **config)
    save(other, target)
    return target


def test_the_first_weight_that_differs_is_named(directory, tmp_path, capsys):
    def change(other):
        other.language_model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight[3, 2] += 0.25

    other = saved_with(directory, tmp_path / "other", change)
    code, report = run(directory, other, tmp_path / "out", "--prompts", "text")
    (wrong,) = [row for row in report["prompts"]["text"] if row["diverges"]]
    assert code == 1 and wrong["tap"] == "decoder.layers.1.kv_a"
    key = "language_model.model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert wrong["cause"] == f"weight {key} differs, max-abs 2.500e-01; with their weights our operation gives their output"
    assert f"weights: 1 of {len(load(directory).state_dict())} tensors differ: {key}" in report["notes"][0]
    printed = capsys.readouterr().out
    assert "[DIFF]" in printed and "decoder.norm " not in printed  # it stops there


def test_weights_that_differ_do_not_hide_a_mistake_beside_them(model):
    name = "decoder.layers.1.latent"
    tensors, weight = outputs(model, "text"), model.language_model.model.layers[1].self_attn.kv_a_layernorm.weight
    theirs = Theirs(tensors | {name: tensors[name] * 3}, weights={name: {"weight": weight + 1e-3}})
    cause = divergences(rows_of(model, "text", theirs))[0].cause
    assert "kv_a_layernorm.weight differs" in cause and cause.endswith("and their weights alone do not explain it")


def test_a_weight_may_differ_in_the_experts_and_in_the_vision_tower(directory, tmp_path):
    def change(other):
        other.language_model.model.layers[2].mlp.experts.up_proj[4] *= 1.5
        other.vision_tower.encoder["blocks"][1].norm1.bias += 0.1

    code, report = run(directory, saved_with(directory, tmp_path / "other", change), tmp_path / "out", "--all")
    wrong = {name: [row["tap"] for row in rows if row["diverges"]] for name, rows in report["prompts"].items()}
    assert wrong["text"] == ["decoder.layers.2.experts"]
    assert wrong["image"] == wrong["clip"] == ["vision.blocks.1.norm1", "decoder.layers.2.experts"]


def test_another_config_is_named_by_the_number_that_differs(directory, tmp_path):
    other = saved_with(directory, tmp_path / "other", lambda other: None, yarn=Yarn(4.0, 64))
    code, report = run(directory, other, tmp_path / "out", "--prompts", "text")
    first = next(row for row in report["prompts"]["text"] if row["diverges"])
    assert code == 1 and first["tap"].startswith("decoder.rope") and first["cause"] == "factor is 4.0 there and 8.0 here"
    assert report["notes"][0].startswith("config: yarn is ")


# Taps directories


def test_a_taps_directory_brings_its_own_prompts(model, directory, tmp_path):
    prompts = standard_prompts(model.config, seed=5)
    write_taps(tmp_path / "taps", {"hello": (prompts["clip"], capture(model, prompts["clip"]))}, with_inputs=True)
    code, report = run(directory, tmp_path / "taps", tmp_path / "out")
    assert code == 0 and tuple(report["prompts"]) == ("hello",)
    assert {row["status"] for row in report["prompts"]["hello"]} == {"OK"}


def test_a_taps_directory_with_a_bug_in_it_is_told_from_its_files_alone(model, directory, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        half_split_rope(patch, model)
        taps = captured(model, ("text", "image"))
    write_taps(tmp_path / "taps", taps)
    code, report = run(directory, tmp_path / "taps", tmp_path / "out")
    assert code == 1
    lines = capsys.readouterr().out.splitlines()
    last = next(i for i, line in enumerate(lines) if line.startswith("[DIFF]"))
    assert lines[last].split()[1:3] == ["decoder.layers.0.q_rope", "rope"]
    assert lines[last + 1].strip().startswith("its inputs agree and its output does not: output: max-abs")
    assert lines[last + 2].strip().startswith("probable cause: ")
    assert lines[last + 3] == "" and lines[last + 4].startswith("prompt image")
    assert [line for line in lines if line.startswith("text: first divergence at decoder.layers.0.q_rope (rope): ")]
    assert Image.open(tmp_path / "out" / "trace.png").size[0] > 600
    assert tmp_path.joinpath("out", "trace.json").read_text().count("NaN") == 0


def test_a_prompt_without_ids_is_the_standard_one_of_that_name(model, directory, tmp_path):
    tmp_path.joinpath("taps").mkdir()
    save_file({name: value.contiguous() for name, value in outputs(model, "text").items()}, tmp_path / "taps" / "text.safetensors")
    assert read_taps(tmp_path / "taps")["text"].prompt is None
    assert run(directory, tmp_path / "taps", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("tensors, flags, message", [
    ({"text": {"model.norm": torch.zeros(2)}}, (), "none of their tensors is a tap: model.norm"),
    ({"mine": {"decoder.norm": torch.zeros(2)}}, (), "mine.safetensors holds no prompt.ids"),
    ({"text": {"decoder.norm": torch.zeros(2)}}, ("--prompts", "clip"), "no prompt named 'clip': choose among text"),
    ({}, (), "is no checkpoint .*, no taps directory"),
    ({"text": {"prompt.ids": torch.zeros(1, 2, dtype=torch.int64)}}, (), "nothing could be compared"),
    ({"text": {"decoder.norm": torch.zeros(2)}}, ("--device", "quantum"), "device 'quantum' cannot be used"),
])  # fmt: skip
def test_misuse_is_told_in_one_line(directory, tmp_path, tensors, flags, message):
    tmp_path.joinpath("taps").mkdir()
    for name, values in tensors.items():
        save_file(values, tmp_path / "taps" / f"{name}.safetensors")
    with pytest.raises(DivergenceError, match=message) as refused:
        run(directory, tmp_path / "taps", tmp_path / "out", *flags)
    assert "\n" not in str(refused.value)


# transformers


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.kimi_k25", reason="this transformers has no Kimi K2.5")
    return library


@pytest.fixture(scope="module")
def aligned(transformers, tmp_path_factory):
    """A checkpoint whose expert width is a multiple of 16 bytes, as transformers wants it."""
    path = tmp_path_factory.mktemp("peer") / "checkpoint"
    save(built(dtype=torch.float32, moe_intermediate_size=16), path)
    return path


@pytest.mark.parametrize("flags", [(), ("--dtype", "bfloat16")])
def test_transformers_with_the_same_weights_diverges_nowhere(aligned, tmp_path, flags):
    code, report = run(aligned, f"transformers:{aligned}", tmp_path, "--prompts", ",".join(PROMPTS), *flags)
    wrong = [(name, row["tap"], row["words"]) for name, rows in report["prompts"].items() for row in rows if row["diverges"]]
    assert code == 0 and not wrong
    for name in ("text", "image"):
        assert {row["tap"] for row in report["prompts"][name] if row["status"] == "MISSING"} <= {"decoder.mask"}
        assert flags or {row["status"] for row in report["prompts"][name]} <= {"OK", "MISSING"}
    assert "ignores the released vt_* names" in report["notes"][0]


def test_what_transformers_cannot_run_is_missing_with_its_reason(aligned, tmp_path, transformers):
    if transformers.__version__ != "5.23.0":
        pytest.skip(f"documents a defect of transformers 5.23.0, this is {transformers.__version__}")
    _, report = run(aligned, f"transformers:{aligned}", tmp_path, "--prompts", "clip")
    notes = {row["tap"]: row["note"] for row in report["prompts"]["clip"] if row["status"] == "MISSING"}
    assert "transformers 5.23.0 cannot run this prompt (" in notes["decoder.spliced"]
    assert "item by item" in notes["decoder.spliced"] and notes.keys() <= {"decoder.spliced", "decoder.mask"}


def test_where_transformers_breaks_down_the_rest_is_missing(aligned, tmp_path, monkeypatch, transformers, capsys):
    def broken(self, x):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter.forward", broken)
    code, report = run(aligned, f"transformers:{aligned}", tmp_path, "--prompts", "text,clip")
    assert code == 0
    for rows in report["prompts"].values():
        taps = {row["tap"]: row for row in rows}
        assert taps["decoder.layers.1.post_norm"]["status"] == "OK"
        assert taps["decoder.logits"]["status"] == "MISSING" and "(no such kernel)" in taps["decoder.logits"]["note"]


def test_what_transformers_gave_for_the_first_of_two_items_is_not_compared(aligned, tmp_path, monkeypatch, transformers, capsys):
    def broken(self, hidden_states, grid_thw, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("transformers.models.kimi_k25.modeling_kimi_k25.Kimi_K25VisionPositionEmbeddings.forward", broken)
    code, report = run(aligned, f"transformers:{aligned}", tmp_path, "--prompts", "text,image")
    assert code == 0 and {row["status"] for row in report["prompts"]["image"]} == {"MISSING"}
    assert "(no such kernel)" in report["prompts"]["image"][0]["note"]
    assert "image: nothing to compare" in capsys.readouterr().out


def test_a_weight_that_transformers_has_otherwise_is_named(aligned, tmp_path):
    def change(other):
        other.language_model.model.layers[2].mlp.experts.down_proj[1] += 0.5
        other.language_model.model.layers[2].input_layernorm.weight[0] += 0.5

    other = saved_with(aligned, tmp_path / "other", change)
    code, report = run(aligned, f"transformers:{other}", tmp_path / "out", "--prompts", "text", "--all")
    wrong = {row["tap"]: row["cause"] for row in report["prompts"]["text"] if row["diverges"]}
    assert code == 1 and list(wrong) == ["decoder.layers.2.input_norm", "decoder.layers.2.experts"]
    assert "layers.2.input_layernorm.weight differs, max-abs 5.000e-01" in wrong["decoder.layers.2.input_norm"]
    assert "layers.2.mlp.experts.down_proj differs" in wrong["decoder.layers.2.experts"]


def test_a_directory_that_transformers_cannot_open_is_one_line(directory, tmp_path, transformers):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        run(directory, f"transformers:{tmp_path}", tmp_path / "out")


# Patterns

X = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("theirs, words", [
    (X * -1, "every value is -1 times"),
    (X.transpose(1, 2), "axes 1 and 2 are transposed"),
    (X.roll(1, 1), "off by one position (late) along axis 1"),
    (X.roll(-1, 0), "off by one position (early) along axis 0"),
    (X[..., [0, 2, 4, 1, 3, 5]], "even slices first, then odd ones"),
    (X[..., [0, 3, 1, 4, 2, 5]], "first and second half interleaved"),
    (X[[2, 0, 1, 4, 3]], "slices in another order, [2, 0, 1, 4, 3], along axis 0"),
    (X.flatten()[torch.randperm(180, generator=torch.Generator().manual_seed(1))].view_as(X), "the right values in the wrong"),
    (X.bfloat16().float(), "right to about 8 bits"),
    (torch.cat((X[:1], X[1:] + 1)), "the first of axis 0 is right and all others are wrong"),
    (torch.cat((X[:3], X[3:] + 1)), "wrong only at [3, 4] of axis 0"),
    (X + torch.arange(36).view(6, 6), "unknown; "),
    (torch.full_like(X, torch.nan), "100% of the values are infinite or no number"),
    (torch.zeros_like(X), "all zeros"),
    (X + 2e-3 * X.roll(2, 0), "within "),
])  # fmt: skip
def test_wrong_numbers_are_described(theirs, words):
    assert pattern(theirs, X).startswith(words), pattern(theirs, X)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (3, 1), (2, 3, 4)])
def test_wrong_numbers_of_any_shape_are_described(shape):
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (torch.randn(shape, generator=generator) for _ in range(2))
    for wrong in (theirs, ours + 1, ours.abs() + theirs.abs(), ours + 1e-3 * theirs, torch.zeros(shape)):
        assert pattern(wrong, ours) and pattern((4 * wrong).long(), (4 * ours).long())
    assert "order" not in pattern(ours + 1e-3 * theirs, ours)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_number_where_none_is_expected_is_described(shape):
    assert pattern(torch.ones(shape), torch.full(shape, torch.nan)).startswith("100% of the values should be infinite or no number")
    assert shape_pattern(torch.full((1, *shape), torch.nan), torch.full(shape, torch.nan)) == "the right values in another shape"


def test_a_vector_is_described_like_a_matrix():
    vector = X.flatten()[:8]
    assert pattern(vector.roll(1), vector).startswith("off by one position (late)")
    assert pattern(vector.flip(0), vector).startswith("slices in another order, [7, 6, 5,")
    assert pattern(torch.cat((vector[:3], vector[3:] + 1)), vector) == "wrong only at [3, 4, 5, 6, 7] of axis 0"


@pytest.mark.parametrize("theirs, ours, words", [
    (X.flatten(), X, "the right values in another shape"),
    (X[:4].transpose(0, 1), X[:4], "axes 0 and 1 are transposed"),
    (X[:1], X, "another number of values"),
    (X[:0].flatten(), X[:0], "the right values in another shape"),
])  # fmt: skip
def test_wrong_shapes_are_described(theirs, ours, words):
    assert shape_pattern(theirs, ours) == words
