"""Claims about train_small.py: one step, the stages, interruption at any moment, flags, and what a run leaves behind.

All runs are tiny: two layers of width 32, two rows of 128 tokens, two or three steps per stage.
Run: .venv/bin/python -m pytest tests/test_train_small.py
"""

import dataclasses
import json
import math
import os
import pathlib
import random
import re
import signal
import time

import pytest
import torch
from PIL import Image

import evaluate
import train_small
from checkpoint import load_tensors
from conftest import assert_close
from data import Batch, Blend, encode_example, pack_rows
from k25 import K25, ConfigError, K25Config, load
from launcher import forkserver
from media import merged_tokens
from moe import fake_quant
from optim import MuonClip
from sources import SOURCES
from step import contrastive_loss, losses, train_step
from tokenizer import Tokenizer
from train_small import TrainConfig, TrainingError, model_config, next_model, plan, train
from vit3d import ContrastiveHead, VisionConfig, siglip_loss_reference

MODEL = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
         "n_routed_experts": 4}  # fmt: skip
VISION = {"vt_hidden_size": 16, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_intermediate_size": 16}
STEPS = ("small_lm_steps", "vit_steps", "text_steps", "align_steps", "joint_steps", "long_steps")
RUN = {"rows": 2, "length": 128, "long_length": 256, "questions": 2, "checkpoint_every": 2, **dict.fromkeys(STEPS, 3)}
CONFIG = model_config(K25Config.preset("toy"), MODEL, VISION)
TOKENIZER = Tokenizer()
STAGES = ("small-lm", "vit", "text", "align", "joint", "long")


def settings(run, **changed):
    return TrainConfig(**RUN | {"run": str(run)} | changed)


def only(**steps):
    """Step counts that leave all other stages out."""
    return dict.fromkeys(STEPS, 0) | steps


def flags(run, **changed):
    """The command line of the same tiny run."""
    pairs = (MODEL | VISION | RUN | {"run": run} | changed).items()
    named = [("--" + name.replace("_", "-"), value) for name, value in pairs]
    return [part for name, value in named for part in ([name] if value is True else [name, str(value)])]


def run_main(arguments, capsys):
    """Exit code and what was printed on the error stream, as the shell would see them."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_small.main(arguments)
    code, error = stopped.value.code, capsys.readouterr().err
    return (1, error + code) if isinstance(code, str) else (code or 0, error)


def metrics(run):
    """The rows of metrics.jsonl without the one number that depends on the machine's mood."""
    rows = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


def saved_model(checkpoint):
    """The model's tensors in a checkpoint that one process has written."""
    (shard,) = (checkpoint / "model").glob("*.safetensors")
    return load_tensors(shard)


def weights(run, stage):
    return load(pathlib.Path(run) / "models" / stage).state_dict()


def moved(before, after):
    """Names of the tensors that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same_run(one, other, stages=STAGES):
    """Bit for bit: weights after each stage, the last checkpoint with its optimizer state, metrics, place in the data."""
    one, other = pathlib.Path(one), pathlib.Path(other)
    assert metrics(one) == metrics(other)
    for stage in stages:
        assert not moved(weights(one, stage), weights(other, stage)), stage
    assert (one / "latest.json").read_text() == (other / "latest.json").read_text()
    for path in sorted(one.glob("checkpoint-*/*/*.safetensors")):  # their headers have the same entries in any order
        assert not moved(load_tensors(path), load_tensors(other / path.relative_to(one))), path.name


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The directory of a run of all six stages, taken to its report through the command line, and its exit code."""
    directory = tmp_path_factory.mktemp("reported") / "run"
    with pytest.raises(SystemExit) as stopped:
        train_small.main(flags(directory))
    return directory, stopped.value.code


@pytest.fixture(scope="module")
def whole(reported):
    """The directory of an uninterrupted run."""
    return reported[0]


# ----------------------------------------------------------------------------------------- one step


def stage_of(name, t, config=CONFIG):
    return next(stage for stage in plan(t, config) if stage.name == name)


def begin(name, config=CONFIG, precision=torch.float64, **changed):
    """A stage's model as it is built, its optimizer and its data; by default in float64, to compare exactly."""
    t = settings("unused", **{"dtype": str(precision).removeprefix("torch.")} | changed)
    stage = stage_of(name, t, config)
    model = next_model(stage, None, t, "cpu")
    optimizer = MuonClip.from_named(model.named_parameters(), t.lr, t.adamw_lr, weight_decay=t.weight_decay)
    return t, model, optimizer, train_small.blend_of(stage, t, TOKENIZER, None)


class Recorder:
    """Stands in for the optimizer: keeps the gradients and moves nothing."""

    def __init__(self, model):
        self.model, self.gradients = model, None

    def step(self):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def rows_of(batch, start, stop):
    """Rows [start, stop) of a batch, with the media that stand in them."""
    fields = {name: getattr(batch, name) for name in ("ids", "targets", "loss_mask", "positions", "segment_ids", "vision")}
    fields = {name: value[start:stop] for name, value in fields.items()}
    patches = grid = slots = None
    if batch.patches is not None:
        merged = [merged_tokens(g) for g in batch.grid_thw.tolist()]
        firsts = [sum(merged[:i]) for i in range(len(merged))]
        kept = [i for i, first in enumerate(firsts) if start <= batch.media_slots[first, 0] < stop]
        pieces = batch.patches.split(batch.grid_thw.prod(dim=1).tolist())
        if kept:
            patches, grid = torch.cat([pieces[i] for i in kept]), batch.grid_thw[kept]
            within = (batch.media_slots[:, 0] >= start) & (batch.media_slots[:, 0] < stop)
            slots = batch.media_slots[within] - torch.tensor([start, 0])
    return Batch(patches=patches, grid_thw=grid, media_slots=slots, **fields)


def biases(model):
    return [router.e_score_correction_bias.clone() for router in model.routers()]


@pytest.mark.parametrize("cuts", [(0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)])
def test_bug16_bug50_k_microbatches_are_one_batch_of_k(cuts):
    """Same loss, gradients, measurements and one router update, also with parts of unequal numbers of loss tokens."""
    t, model, _, blend = begin("joint", rows=4, vision_ratio=0.4)
    batch = next(blend).to("cpu", torch.float64)
    parts = [rows_of(batch, start, stop) for start, stop in zip(cuts, cuts[1:])]
    shares = [int(part.loss_mask.sum()) for part in parts]
    assert len(set(shares)) > 1 and batch.patches is not None
    results, gradients, after = [], [], []
    for batches in ([batch], parts):
        for router in model.routers():
            router.e_score_correction_bias.zero_()
        recorder = Recorder(model)
        results.append(train_step(model, recorder, batches, t))
        gradients.append(recorder.gradients)
        after.append(biases(model))
    for one, other in zip(*map(dataclasses.astuple, results)):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-10, name)
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*after))
    alone = [train_step(model, Recorder(model), [part], t).loss for part in parts]
    assert abs(sum(alone) / len(alone) - results[0].loss) > 1e-4, "a mean of means would be another number"


def test_the_loss_is_the_mean_over_all_loss_tokens_by_modality():
    t, model, _, blend = begin("joint", rows=4, vision_ratio=0.4)
    batch = next(blend).to("cpu", torch.float64)
    with torch.no_grad():
        logits = model(batch.ids, batch.patches, batch.grid_thw, batch.positions, batch.segment_ids)
    chosen = logits.log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
    result = train_step(model, Recorder(model), [batch], t)
    for measured, mask in ((result.loss, batch.loss_mask), (result.loss_text, batch.loss_mask & ~batch.vision),
                           (result.loss_vision, batch.loss_mask & batch.vision)):  # fmt: skip
        assert measured == pytest.approx(-float(chosen[mask].mean()), rel=1e-9)


def test_the_gradient_is_that_of_the_loss_and_a_share_of_the_balance_loss():
    config = dataclasses.replace(CONFIG, aux_loss_alpha=0.5)
    t, model, _, blend = begin("joint", config, rows=4, clip_norm=1e9)
    batch, recorder = next(blend).to("cpu", torch.float64), Recorder(model)
    per_token, stats, _ = losses(model, batch)
    (per_token.sum() / batch.loss_mask.sum() + 0.5 * stats.balance_loss).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    result = train_step(model, recorder, [batch], t)
    assert result.balance == pytest.approx(stats.balance_loss.item(), rel=1e-9) and result.balance > 0.5
    assert wanted.keys() == recorder.gradients.keys()
    for name, gradient in wanted.items():
        assert_close(recorder.gradients[name], gradient, 1e-10, name)


def test_gradients_are_clipped_to_the_norm():
    for clip_norm in (1e-3, 1e9):
        t, model, _, blend = begin("joint", clip_norm=clip_norm)
        recorder = Recorder(model)
        result = train_step(model, recorder, [next(blend).to("cpu", torch.float64)], t)
        norm = math.sqrt(sum(float(g.square().sum()) for g in recorder.gradients.values()))
        assert norm == pytest.approx(min(result.grad_norm, clip_norm), rel=1e-4)


@pytest.mark.parametrize("layers, dense", [(3, 0), (3, 1), (3, 2), (3, 3)])
def test_bug13_bug17_after_n_steps_each_bias_is_gamma_times_the_sum_of_signs(layers, dense):
    """In stacks of dense and MoE layers alike, bfloat16 autocast included, to the last bit: γ is a power of two."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=layers, first_k_dense_replace=dense)
    t, model, optimizer, blend = begin("text", config, torch.float32, balance_gamma=2.0**-9, dtype="bfloat16", rows=1)
    signs = torch.zeros(layers - dense, 4)
    for _ in range(4):
        batches = [next(blend), next(blend)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            counts = [losses(model, batch)[1].counts for batch in batches]
        for layer, loads in enumerate(zip(*counts)):
            load = sum(loads).double()
            signs[layer] += torch.sign(load.mean() - load)
        result = train_step(model, optimizer, batches, t)
        assert len(result.load_layers) == layers - dense and math.isfinite(result.loss)
    assert len(model.routers()) == layers - dense
    for router, sign in zip(model.routers(), signs):
        assert router.e_score_correction_bias.dtype == torch.float32 and sign.any()
        assert torch.equal(router.e_score_correction_bias, sign * 2.0**-9)


def test_bug14_recompute_counts_no_load_twice():
    """With recompute on, the weights after two steps are the same to the last bit, router biases included."""
    states = {}
    for recompute in ("none", "selective", "block"):
        t, model, optimizer, blend = begin("joint", precision=torch.float32, recompute=recompute)
        for _ in range(2):
            train_step(model, optimizer, [next(blend)], t)
        states[recompute] = model.state_dict()
    assert not moved(states["none"], states["selective"]) and not moved(states["none"], states["block"])


def test_qk_clip_brings_the_heads_above_tau_to_tau_and_leaves_the_others_their_bits():
    """The learning rate is 0, so that nothing but the clip moves; τ lies between the two heads of the layer."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=1)
    t, model, optimizer, blend = begin("text", config)
    batch = next(blend)
    with torch.no_grad():
        model.language_model.model.layers[0].self_attn.q_b_proj.weight.mul_(50)
        largest = losses(model, batch)[1].max_logits[0]
    tau = float(largest.mean())
    assert (largest > tau).sum() == 1
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train_step(model, optimizer, [batch], dataclasses.replace(t, qk_clip=tau))
    assert result.clipped == 1 and result.max_logit == pytest.approx(float(largest.max()))
    with torch.no_grad():
        clipped = losses(model, batch)[1].max_logits[0]
    assert_close(clipped, largest.clamp(max=tau), 1e-9)
    attention = "language_model.model.layers.0.self_attn."
    assert moved(before, model.state_dict()) == {attention + "q_b_proj.weight", attention + "kv_b_proj.weight"}


@pytest.mark.parametrize("name", ["vit", "align"])
def test_a_frozen_decoder_is_neither_clipped_nor_balanced(name):
    t, model, optimizer, blend = begin(name, precision=torch.float32, qk_clip=1e-6, balance_gamma=0.5)
    before = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    result = train_step(model, optimizer, [next(blend)], t)
    assert result.clipped == 0 and result.max_logit > 1e-6 and math.isnan(result.loss_text)
    assert not moved(before, model.language_model.state_dict())


@pytest.mark.parametrize("poison", ["weight", "patches"])
def test_a_step_without_a_finite_loss_moves_nothing(poison):
    t, model, optimizer, blend = begin("vit", precision=torch.float32)
    batch = next(blend)
    if poison == "weight":
        with torch.no_grad():
            model.mm_projector.proj[2].weight[0, 0] = math.inf
    else:
        batch.patches[3, 5] = math.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not math.isfinite(train_step(model, optimizer, [batch], t).loss)
    assert not moved(before, model.state_dict()) and not optimizer.state


def test_the_contrastive_term_pairs_each_first_picture_with_the_mean_of_its_answer():
    """Against a loop over the documents; a clip of several chunks counts once, by its first."""
    t, model, _, _ = begin("vit")
    head = model.contrastive_head = ContrastiveHead(16, 32).double()
    with torch.no_grad():
        head.bias.zero_()
    drawn = [SOURCES[name].draw(random.Random(name)) for name in ("colour", "interview", "order", "read_word")]
    clip = drawn[2].media[0]
    drawn.insert(1, dataclasses.replace(drawn[2], media=(dataclasses.replace(clip, frames=clip.frames[:3] * 3),)))
    batch = pack_rows([encode_example(example, TOKENIZER, CONFIG.media) for example in drawn], 3, 128, TOKENIZER)
    batch = batch.to("cpu", torch.float64)
    assert len(batch.grid_thw) == 7, "nine frames are three chunks"
    per_token, _, merged = losses(model, batch)
    embedding = model.language_model.model.embed_tokens.weight
    images, texts, done, first = [], [], set(), 0
    for grid in batch.grid_thw.tolist():
        row, column = batch.media_slots[first].tolist()
        document = row, int(batch.segment_ids[row, column])
        count = merged_tokens(grid)
        own = (batch.segment_ids[row] == document[1]) & batch.loss_mask[row]
        if document not in done and own.any():
            images.append(head.proj(merged[first : first + count].reshape(-1, 16).mean(dim=0)))
            texts.append(embedding[batch.targets[row][own]].mean(dim=0))
        done.add(document)
        first += count
    assert len(images) == len(done) == 5
    expected = siglip_loss_reference(torch.stack(images), torch.stack(texts), head.log_scale, head.bias)
    assert_close(contrastive_loss(model, batch, merged), expected, 1e-9)
    results = [train_step(model, Recorder(model), [batch], dataclasses.replace(t, contrastive=w)) for w in (0.0, 0.5)]
    assert results[0].loss == results[1].loss == pytest.approx(float(per_token.detach().sum() / batch.loss_mask.sum()))
    assert results[0].grad_norm != results[1].grad_norm


# ------------------------------------------------------------------------------------------ the stages


def test_each_stage_moves_exactly_what_it_says(whole):
    """By name, from the model each stage begins with to the one it saves; router biases move with their decoder."""
    t, previous = settings("unused"), None
    trained = {
        "small-lm": ("language_model.",), "vit": ("vision_tower.", "mm_projector."), "text": ("language_model.",),
        "align": ("mm_projector.",), "joint": ("",), "long": ("",),
    }  # fmt: skip
    for stage in plan(t, CONFIG):
        begun = next_model(stage, previous, t, "cpu").state_dict()
        ended = load(whole / "models" / stage.name)
        assert moved(begun, ended.state_dict()) == {name for name in begun if name.startswith(trained[stage.name])}, stage.name
        if previous is not None and stage.name != "text":
            assert not moved(previous.state_dict(), begun), f"{stage.name} takes everything over"
        if stage.name == "text":
            fresh, taken = next_model(stage, None, t, "cpu").state_dict(), previous.state_dict()
            for name, tensor in begun.items():
                assert torch.equal(tensor, (taken if name.startswith("vision_tower.") else fresh)[name]), name
        previous = ended


def test_the_plan_is_that_of_the_report():
    """Small dense teacher, frozen parts, the constant ratio, YaRN and long rows only at the end."""
    t = settings("unused", vision_ratio=0.1, yarn_factor=2.0)
    stages = {stage.name: stage for stage in plan(t, CONFIG)}
    assert tuple(stages) == STAGES
    assert [stage.ratio for stage in stages.values()] == [0.0, 1.0, 0.0, 1.0, 0.1, 0.1]
    assert [stage.length for stage in stages.values()] == [128] * 5 + [256]
    for name in ("small-lm", "vit"):
        assert stages[name].model.first_k_dense_replace == stages[name].model.num_hidden_layers == 1
    assert [stage.model.yarn.factor for stage in stages.values()] == [1.0] * 5 + [2.0]
    assert stages["long"].model.yarn.original_max_position_embeddings == 128
    assert stages["joint"].rows * 128 == stages["long"].rows * 256
    for stage in stages.values():
        modalities = {source.modality for source, _ in stage.sources}
        assert modalities == {0.0: {"text"}, 1.0: {"vision"}}.get(stage.ratio, {"text", "vision"})


def test_the_last_stage_writes_its_yarn_into_the_saved_model(whole):
    assert load(whole / "models" / "joint").config.yarn.factor == 1.0
    long = load(whole / "models" / "long").config
    assert (long.yarn.factor, long.yarn.original_max_position_embeddings, long.max_position_embeddings) == (4.0, 128, 256)


def test_the_rate_warms_up_stays_and_decays_and_is_the_one_in_the_metrics(tmp_path, monkeypatch):
    """Eight steps, two of warm-up: ½, 1, 1, …, then down the cosine towards 0.05; every group in the same proportion."""
    step, used = MuonClip.step, []

    def watched(optimizer):
        used.append([(group["lr"], group["lr"] / group["peak_lr"]) for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(MuonClip, "step", watched)
    t = settings(tmp_path / "run", warmup=2, lr=0.01, **only(small_lm_steps=8))
    train(t, CONFIG)
    factors = [groups[0][1] for groups in used]
    assert factors[:6] == pytest.approx([0.5, 1, 1, 1, 1, 1]) and 1 > factors[6] > factors[7] > 0.05
    for groups, factor, row in zip(used, factors, metrics(t.run)):
        assert [share for _, share in groups] == pytest.approx([factor] * len(groups))
        assert groups[0][0] == row["lr"] == pytest.approx(0.01 * factor)


def test_only_stages_that_train_a_decoder_see_chat_turns():
    """A frozen one could not learn the template."""
    t = settings("unused", chat=0.25)
    shares = {stage.name: train_small.blend_of(stage, t, TOKENIZER, None).chat for stage in plan(t, CONFIG)}
    assert shares == dict.fromkeys(STAGES, 0.25) | {"vit": 0.0, "align": 0.0}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, tmp_path):
    train(settings(tmp_path / "same"), CONFIG)
    assert_same_run(whole, tmp_path / "same")
    train(settings(tmp_path / "other", seed=1, **only(small_lm_steps=3)), CONFIG)
    assert moved(weights(whole, "small-lm"), weights(tmp_path / "other", "small-lm"))
    for one, other in zip(metrics(whole)[:3], metrics(tmp_path / "other")):
        assert one["loss"] != other["loss"] and one["lr"] == other["lr"]


# ----------------------------------------------------------------------------------- killed and resumed


def begin_run(arguments):
    """train_small.py as a process of its own."""
    process = forkserver().Process(target=alone, args=(arguments,))
    process.start()
    return process


def alone(arguments):
    torch.set_num_threads(1)
    train_small.main(arguments)


def until(process, seen):
    """Wait until `seen()`; fail when the process ends before."""
    while not seen():
        assert process.is_alive(), f"it has ended with exit code {process.exitcode}"
        time.sleep(0.0003)


def kill_when(arguments, seen, delay=0.0, hold=True):
    """Start a run as a process of its own and SIGKILL it when `seen()` is true; with hold, it still is when it dies."""
    process = begin_run(arguments)
    try:
        until(process, seen)
        time.sleep(delay)
        while hold:  # stopped, then looked at again: what is seen now is what the kill leaves
            os.kill(process.pid, signal.SIGSTOP)
            if seen():
                break
            os.kill(process.pid, signal.SIGCONT)
            until(process, seen)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(whole, tmp_path):
    """Three real kills: at a random moment of a step, between two stages, and inside the writing of a checkpoint."""
    run = tmp_path / "run"
    rng = random.Random(time.time_ns())

    def rows():
        path = run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    kill_when(flags(run), lambda: rows() >= 2, delay=rng.uniform(0, 0.05), hold=False)
    kill_when(flags(run, resume=True), lambda: any(run.glob("models/.*.tmp")))
    assert any(run.glob("models/.*.tmp")) and not (run / "models" / "long").exists()
    kill_when(flags(run, resume=True), lambda: any(run.glob(".checkpoint-*.tmp")))
    assert any(run.glob(".checkpoint-*.tmp"))
    train(settings(run, checkpoint_every=50), CONFIG, resume=True)
    assert_same_run(whole, run)
    assert not list(run.glob(".*")) and not list((run / "models").glob(".*")), "nothing half-written is left"


class Killed(BaseException):
    """Ends a run where a SIGKILL would."""


def test_every_write_may_be_the_last_one(tmp_path, monkeypatch):
    """Runs that die at their first, second, third … change of the disk, each going on from the one before."""
    t = settings(tmp_path / "whole", checkpoint_every=1, contrastive=0.1, **only(small_lm_steps=2, vit_steps=2, text_steps=1))
    train(t, CONFIG)
    left = math.inf
    for name in ("rename", "replace"):
        def dying(*paths, change=getattr(os, name)):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            change(*paths)

        monkeypatch.setattr(os, name, dying)
    deaths = 0
    for allowed in range(100):
        left = allowed
        try:
            train(dataclasses.replace(t, run=str(tmp_path / "run")), CONFIG, resume=(tmp_path / "run" / "config.json").exists())
            break
        except Killed:
            deaths += 1
    assert deaths >= 6
    assert_same_run(tmp_path / "whole", tmp_path / "run", ("small-lm", "vit", "text"))


def test_resuming_a_finished_run_changes_nothing(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*.*") if path.is_file()}
    train(settings(whole), CONFIG, resume=True)
    assert before == {path: path.read_bytes() for path in whole.rglob("*.*") if path.is_file()}


def test_metrics_of_steps_after_the_checkpoint_are_taken_again(tmp_path):
    """Complete rows and a torn last line are dropped; the rows of the checkpoint and before stay."""
    t = settings(tmp_path / "run", **only(small_lm_steps=3))
    train(t, CONFIG)
    path = tmp_path / "run" / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept + '{"stage": "small-lm", "step": 3, "global_step": 4}\n{"stage": "sma')
    train(t, CONFIG, resume=True)
    assert path.read_text() == kept


# ------------------------------------------------------------------------------------------ divergence


def test_divergence_names_the_step_the_batch_and_the_last_good_checkpoint(whole, tmp_path, monkeypatch, capsys):
    """A poisoned picture in the second step of the ViT stage: exit code 1; without the poison the run goes on from there."""
    draw, begins = Blend.__next__, []

    def poisoned(blend):
        first = blend.state()["index"]
        batch = draw(blend)
        if blend.stage == "vit":
            begins.append(first)
            if len(begins) == 2:
                batch.patches[0] = math.nan
        return batch

    monkeypatch.setattr(Blend, "__next__", poisoned)
    run = tmp_path / "run"
    code, error = run_main(flags(run), capsys)
    assert code == 1 and not (run / "report.md").exists()
    message = error.splitlines()[-1]
    assert message.startswith("train_small.py: loss is nan and gradient norm nan in stage vit at step 1 (global step 5)")
    assert f"begins with example {begins[1]};" in message and f"last good checkpoint: {run / 'checkpoint-000003'};" in message
    assert all(tensor.isfinite().all() for tensor in saved_model(run / "checkpoint-000003").values())
    assert [row["global_step"] for row in metrics(run)] == [1, 2, 3, 4], "no row for the step that was not taken"
    monkeypatch.undo()
    train(settings(run), CONFIG, resume=True)
    assert_same_run(whole, run)


def test_divergence_before_the_first_checkpoint_says_so(tmp_path, monkeypatch):
    model = next_model(stage_of("small-lm", settings("unused")), None, settings("unused"), "cpu")
    with torch.no_grad():
        model.language_model.lm_head.weight[65] = math.inf
    monkeypatch.setattr(train_small, "next_model", lambda *_: model)
    with pytest.raises(TrainingError, match=r"in stage small-lm at step 0 \(global step 1\).*last good checkpoint: none yet"):
        train(settings(tmp_path / "run"), CONFIG)


# ----------------------------------------------------------------------------------------------- flags


def test_every_field_of_every_config_has_a_flag():
    """But those that other fields decide: widths of the projector, the one merge kernel, and the parts themselves."""
    known = {option for action in train_small.parser()._actions for option in action.option_strings}
    for kind, decided in ((TrainConfig, set()), (K25Config, {"yarn", "vision", "media"}),
                          (VisionConfig, {"merge_kernel_size", "mm_hidden_size", "text_hidden_size"})):  # fmt: skip
        names = {field.name for field in dataclasses.fields(kind)}
        missing = {name for name in names - decided if "--" + name.replace("_", "-") not in known}
        assert not missing and decided <= names, kind.__name__


def test_flags_reach_their_fields():
    t, config, resume = train_small.read_flags(flags("there", resume=True, seed=5, lr=0.5, dtype="float64", qat=True, rope_theta=7.0))
    assert t == settings("there", seed=5, lr=0.5, dtype="float64") and resume
    assert config == dataclasses.replace(CONFIG, qat=True, rope_theta=7.0)
    assert train_small.read_flags([])[:2] == (TrainConfig(), K25Config.preset("toy"))
    assert train_small.read_flags(["--no-compile", "--preset", "small"])[1] == K25Config.preset("small")


def test_fields_that_follow_from_a_flag_follow_it():
    """The projector's widths, the special ids at the end of the vocabulary, the size and number of patches."""
    given = ["--vocab-size", "600", "--hidden-size", "64", "--vt-hidden-size", "32", "--patch-size", "7", "--init-pos-emb-time", "2"]
    config = train_small.read_flags(given)[1]
    tokenizer = Tokenizer(600)
    assert (config.media_placeholder_token_id, config.bos_token_id) == (tokenizer.media_pad, tokenizer.bos)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos, tokenizer.pad)
    assert (config.vision.text_hidden_size, config.vision.mm_hidden_size) == (64, 32)
    assert (config.media.patch_size, config.media.temporal_merge_kernel_size) == (7, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--joint-step", "3"], "unknown argument --joint-step: did you mean --joint-steps?"),
        (["--vison-ratio=0.5"], "unknown argument --vison-ratio=0.5: did you mean --vision-ratio?"),
        (["--num-expert-per-tok", "3"], "did you mean --num-experts-per-tok?"),
        (["toy"], "unknown argument toy"),
        (["--seed", "seven"], "argument --seed: invalid int value: 'seven'"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--hidden-size", "1.5"], "argument --hidden-size: invalid int value: '1.5'"),
        (["--preset", "big"], "no preset named 'big': choose one of toy, small, k2.5"),
        (["--hidden-size", "0"], "hidden_size is 0: it must be at least 1"),
        (["--rope-theta", "nan"], "rope_theta is nan: it must be at least 0"),
        (["--num-experts-per-tok", "1"], "top_k = 1 with normalized weights"),
        (["--num-experts-per-tok", "17"], "num_experts_per_tok is 17 of 16 experts"),
        (["--n-group", "3"], "n_group 3 does not divide 16 experts"),
        (["--qk-rope-head-dim", "3"], "rope dimension 3 is odd"),
        (["--vt-num-attention-heads", "5"], "vt_hidden_size 96 over 5 heads"),
        (["--vt-num-attention-heads", "0"], "vt_num_attention_heads is 0: it must be at least 1"),
        (["--moe-intermediate-size", "33", "--qat"], "expert width 33 must be multiples of 32"),
        (["--pos-emb-type", "learned"], "pos_emb_type is 'learned'"),
        (["--impl", "fast"], "impl is 'fast': choose 'fused' or 'reference'"),
        (["--vocab-size", "300"], "vocab_size 300 is too small"),
        (["--media-placeholder-token-id", "3"], "media_placeholder_token_id is 3, but <|media_pad|> of a vocabulary of 512 is 277"),
        (["--tokenizer", "nowhere.model"], "nowhere.model: cannot be read"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--dtype", "float8"], "float8: choose float32, bfloat16 or float64"),
        (["--ns-dtype", "half-float"], "ns_dtype is 'half-float'"),
        (["--rows", "0"], "rows is 0: it must be at least 1"),
        (["--threads", "0"], "threads is 0: it must be at least 1"),
        (["--accumulation", "-1"], "accumulation is -1: it must be at least 1"),
        (["--pp", "2"], "--pp 2 · --dp 1 needs 2 processes and 1 process was started; nearest: --pp 1 "),
        (["--dp", "-2"], "each must be at least 1; nearest: --pp 1 "),
        (["--encoder", "none"], "--encoder none: choose dep or stage0"),
        (["--accumulation", "3", "--microbatches", "2"], "accumulation is 3, but dp 1 · microbatches 2 = 2: "),
        (["--checkpoint-every", "0"], "checkpoint_every is 0: it must be at least 1"),
        (["--questions", "0"], "questions is 0: it must be at least 1"),
        (["--vit-steps", "-3"], "none may be negative, nor all 0"),
        (["--" + name.replace("_", "-") + "=0" for name in STEPS], "none may be negative, nor all 0"),
        (["--text-steps", "0"], "text_steps is 0: the stages after it go on from its decoder"),
        (["--long-length", "300"], "the long stage's needles need 94 ≤ length ≤ long_length − 96"),
        (["--lr", "-1"], "lr of a group must be a finite number >= 0"),
        (["--vision-ratio", "1.5"], "vision_ratio is 1.5: it must lie in 0 … 1"),
        (["--chat", "-0.1"], "chat is -0.1: it must lie in 0 … 1"),
        (["--clip-norm", "-1"], "clip_norm is -1.0: it must be positive"),
        (["--qk-clip", "nan"], "qk_clip is nan: it must be positive"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
    ],
)  # fmt: skip
def test_misuse_is_one_clear_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    if "--lr" not in arguments:  # which is seen when a stage begins
        monkeypatch.setattr(train_small, "next_model", lambda *_: pytest.fail("the run has begun"))
    monkeypatch.setattr(train_small, "train_step", lambda *_: pytest.fail("training has begun"))
    code, error = run_main([*arguments, "--run", str(tmp_path / "run")], capsys)
    *_, last = error.strip().splitlines()
    assert code == 2 and message in last and "Traceback" not in error
    assert not list((tmp_path).glob("run/checkpoint*"))


def test_an_existing_run_is_continued_only_with_resume_and_the_same_flags(whole, tmp_path, capsys):
    code, error = run_main(flags(whole), capsys)
    assert code == 2 and f"{whole} already holds a run: continue it with --resume, or choose another --run" in error
    for changed, named in (({"seed": 9}, "seed = 0, not 9"), ({"joint_steps": 4}, "joint_steps = 3, not 4"),
                           ({"hidden_size": 48}, "hidden_size = 32, not 48"),
                           ({"vt_intermediate_size": 24}, "vt_intermediate_size = 16, not 24")):  # fmt: skip
        code, error = run_main(flags(whole, resume=True, **changed), capsys)
        assert code == 2 and f"{whole} was begun with {named}: resume with the same flags" in error
        assert len(error.strip().splitlines()) == 1
    code, error = run_main(flags(tmp_path / "new", resume=True), capsys)
    assert code == 2 and "holds no run to resume: leave --resume out" in error and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    code, error = run_main(flags(tmp_path / "file"), capsys)
    assert code == 2 and "is a file: choose another --run" in error and (tmp_path / "file").read_text() == "mine"


def test_what_does_not_change_the_numbers_may_change_at_a_resume(tmp_path):
    t = settings(tmp_path / "run", **only(small_lm_steps=2))
    train(t, CONFIG)
    os.rename(tmp_path / "run", tmp_path / "moved")
    train(dataclasses.replace(t, run=str(tmp_path / "moved"), checkpoint_every=1, device="cpu"), CONFIG, resume=True)


@pytest.mark.parametrize("given, processes, counted", [
    ({}, 1, (1, 1, 1)), ({"accumulation": 6}, 1, (1, 6, 6)), ({"microbatches": 3}, 1, (1, 3, 3)),
    ({"pp": 2}, 8, (4, 2, 8)), ({"pp": 2, "accumulation": 16}, 8, (4, 4, 16)), ({"microbatches": 5}, 2, (2, 5, 10)),
])  # fmt: skip
def test_microbatches_fill_the_pipeline_and_make_up_the_accumulation(given, processes, counted):
    t, layout = train_small.with_layout(settings("unused", **given), CONFIG, processes)
    assert (t.dp, t.microbatches, t.accumulation) == counted == (layout.dp, layout.microbatches, layout.dp * layout.microbatches)


def test_the_contrastive_loss_is_refused_on_many_processes():
    t = settings("unused", contrastive=0.1)
    train_small.with_layout(t, CONFIG, 1)
    with pytest.raises(ConfigError, match="contrastive compares"):
        train_small.with_layout(t, CONFIG, 2)


def test_control_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_small, "train_step", interrupted)
    code, error = run_main(flags(tmp_path / "run"), capsys)
    assert code == 130 and "interrupted; the same command with --resume goes on" in error.splitlines()[-1]


def manifest(folder, bad=()):
    """Twelve pictures with captions and twelve texts of one's own; `bad` lines at the end."""
    folder.mkdir()
    lines = []
    for number in range(12):
        Image.new("RGB", (28, 28), (20 * number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"text": f"<image>shade {number}", "images": [f"{number}.png"]}))
        lines.append(json.dumps({"text": f"the note {number} of mine"}))
    (folder / "mine.jsonl").write_text("\n".join([*lines, *bad]))
    return folder / "mine.jsonl"


def test_own_data_joins_the_training(tmp_path, capsys):
    path = manifest(tmp_path / "data")
    t = settings(tmp_path / "run", data=str(path), data_weight=500.0, **only(joint_steps=2), vision_ratio=0.5)
    run, _ = train(t, CONFIG)
    assert run.state["data"]["documents"]["mine.text"] > 2 and run.state["data"]["documents"]["mine.vision"] > 2
    bad = manifest(tmp_path / "worse", ["no json", '{"text": "<image>x", "images": ["none.png"]}', '{"text": ""}'])
    code, error = run_main(flags(tmp_path / "other", data=bad, **only(text_steps=1)), capsys)
    assert code == 2 and re.search(r"3 bad rows \(--skip-bad drops them\):\n  line 25: .*\n  line 26: .*none.png\n  line 27: ", error)
    t = settings(tmp_path / "skipping", data=str(bad), data_weight=500.0, skip_bad=True, **only(text_steps=1))
    assert train(t, CONFIG)[0].state["data"]["documents"]["mine.text"] > 2


def test_own_pictures_longer_than_a_row_are_bad_rows(tmp_path, capsys):
    path = manifest(tmp_path / "data", ['{"text": "<image>%s", "images": ["0.png"]}' % ("x" * 150)])
    code, error = run_main(flags(tmp_path / "run", data=path), capsys)
    assert code == 2 and "line 25: " in error and "does not fit into a row of 128" in error


# ------------------------------------------------------------------------------- ways to run the numbers


def joint_weights(path, config=CONFIG, steps=2, **changed):
    """Metrics and weights after joint steps with many pictures."""
    train(settings(path, **only(joint_steps=steps), vision_ratio=0.5, **changed), config)
    return metrics(path), weights(path, "joint")


def test_the_reference_twins_train_to_the_same_weights(tmp_path):
    exact = {"dtype": "float64", "ns_dtype": "float64"}
    fused, expected = joint_weights(tmp_path / "fused", **exact)
    reference, actual = joint_weights(tmp_path / "reference", dataclasses.replace(CONFIG, impl="reference"), **exact)
    assert next(iter(expected.values())).dtype == torch.float64
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, 1e-7, name)
    for one, other in zip(fused, reference):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["max_logit"] == pytest.approx(other["max_logit"], rel=1e-9)


@pytest.mark.parametrize("flags", [{"recompute": "selective"}, {"recompute": "block"}, {"offload": True}], ids=str)
def test_recompute_and_offload_change_no_bit(flags, tmp_path):
    plain, expected = joint_weights(tmp_path / "plain")
    saving, actual = joint_weights(tmp_path / "saving", **flags)
    assert plain == saving and not moved(expected, actual)


def test_the_fp8_flag_changes_gradients_and_not_the_first_loss(tmp_path):
    plain, expected = joint_weights(tmp_path / "plain")
    rounded, actual = joint_weights(tmp_path / "rounded", fp8=True)
    assert plain[0]["loss"] == rounded[0]["loss"] and plain[0]["grad_norm"] != rounded[0]["grad_norm"]
    assert rounded[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.05) and moved(expected, actual)


def test_bfloat16_computes_coarsely_and_keeps_float32_weights(tmp_path):
    plain, expected = joint_weights(tmp_path / "float32", dtype="float32")
    coarse, actual = joint_weights(tmp_path / "bfloat16", dtype="bfloat16")
    assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
    assert plain[0]["loss"] != coarse[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-2)
    assert moved(expected, actual)


def test_qat_trains_through_int4_experts(tmp_path):
    """The forward is that of the rounded experts, the gradient moves the float ones."""
    config = dataclasses.replace(CONFIG, qat=True)
    rows, quantised = joint_weights(tmp_path / "run", config, dtype="float32")
    begun = next_model(stage_of("joint", settings("unused")), None, settings("unused"), "cpu")
    experts = {name for name in quantised if ".mlp.experts." in name}
    assert experts and experts <= moved(begun.state_dict(), quantised)
    t, model, _, blend = begin("joint", config, torch.float32, vision_ratio=0.5)
    batch = next(blend)
    plain = K25(CONFIG)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        float_loss = losses(plain, batch)[0].sum()
        for name, parameter in plain.named_parameters():
            if name in experts:
                parameter.copy_(fake_quant(parameter))
        rounded_loss, loss = losses(plain, batch)[0].sum(), losses(model, batch)[0].sum()
    assert torch.equal(loss, rounded_loss) and loss != float_loss
    assert rows[0]["loss"] == pytest.approx(float(loss / batch.loss_mask.sum()), rel=1e-6)


def test_the_contrastive_head_trains_and_is_not_saved(tmp_path):
    """It is in the checkpoint, so that the stage can be resumed, and in no model."""
    t = settings(tmp_path / "run", contrastive=0.5, **only(vit_steps=2, text_steps=1))
    train(dataclasses.replace(t, text_steps=0, run=str(tmp_path / "vit")), CONFIG)
    saved = saved_model(tmp_path / "vit" / "checkpoint-000002")
    begun = next_model(stage_of("vit", t), None, t, "cpu").state_dict()
    heads = {name for name in saved if name.startswith("contrastive_head.")}
    assert heads == {"contrastive_head." + part for part in ("proj.weight", "proj.bias", "log_scale", "bias")}
    assert heads <= moved(begun, saved)
    assert not any(name.startswith("contrastive_head.") for name in weights(tmp_path / "vit", "vit"))
    train(t, CONFIG)
    assert not moved(weights(tmp_path / "vit", "vit"), weights(tmp_path / "run", "vit"))


def compiled_like_eager(tmp_path, **options):
    plain, expected = joint_weights(tmp_path / "eager", ns_dtype="float32", **options)
    compiled, actual = joint_weights(tmp_path / "compiled", ns_dtype="float32", compile=True, **options)
    assert expected.keys() == actual.keys(), "compiled blocks keep their names"
    for one, other in zip(plain, compiled):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_compile_flag_traces_the_blocks(tmp_path, monkeypatch):
    """Without code generation, which takes a minute on a CPU: the traced graph runs as it is."""
    compile_block, seen = torch.nn.Module.compile, []

    def traced(block, **options):
        seen.append((type(block).__name__, options))
        compile_block(block, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compiled_like_eager(tmp_path, steps=1)
    assert seen == [("Block", {"dynamic": True})] * 2


@pytest.mark.cuda
def test_the_compile_flag_on_a_device(tmp_path):
    compiled_like_eager(tmp_path, device="cuda")


@pytest.mark.cuda
def test_a_run_on_a_device_ends_in_a_report_and_resumes(tmp_path, capsys):
    run = tmp_path / "run"
    assert run_main(flags(run, device="cuda"), capsys)[0] in (0, 1)
    assert "| device | cuda |" in (run / "report.md").read_text()
    train(settings(run, device="cuda"), CONFIG, resume=True)


# --------------------------------------------------------------------------------------- what is left


def test_the_resolved_config_seed_and_versions_are_printed_and_saved(reported, tmp_path, capsys):
    train(settings(tmp_path / "run", seed=7, **only(small_lm_steps=1)), CONFIG)
    first = capsys.readouterr().out.splitlines()[0]
    assert "seed 7" in first and f"torch {torch.__version__}" in first and str(tmp_path / "run" / "config.json") in first
    saved = json.loads((reported[0] / "config.json").read_text())
    t = settings(reported[0], dp=1, microbatches=1)
    assert saved["train"] == dataclasses.asdict(t) and saved["train"]["seed"] == 0
    assert saved["model"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert saved["versions"]["torch"] == torch.__version__ and set(saved["versions"]) >= {"python", "numpy", "pillow"}


def test_metrics_have_one_row_per_step_with_everything_measured(reported):
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (reported[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows] == list(range(1, 19))
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in STAGES for step in range(3)]
    for row in rows:
        measured = {"loss", "loss_text", "loss_vision", "lr", "grad_norm", "max_logit", "load_cv", "tokens_per_s", "tokens", "balance"}
        assert measured <= row.keys()
        assert (row["loss_vision"] is None) >= (row["stage"] in ("small-lm", "text"))
        assert (row["loss_text"] is None) == (row["stage"] in ("vit", "align"))
        assert row["tokens"] == 256 and len(row["load_layers"]) == (0 if row["stage"] in ("small-lm", "vit") else 1)
        assert row["max_logit"] == max(row["logit_layers"])


def test_every_stage_leaves_a_model_that_loads_and_the_last_is_the_final_one(reported):
    run = reported[0]
    assert {path.name for path in (run / "models").iterdir()} == set(STAGES)
    for stage in STAGES:
        model = load(run / "models" / stage)
        assert model.config.num_hidden_layers == (1 if stage in ("small-lm", "vit") else 2)
    assert not moved(load(run / "model").state_dict(), weights(run, "long"))
    state = json.loads((run / "latest.json").read_text())
    assert [path.name for path in run.glob("checkpoint-*")] == [state["checkpoint"]] == ["checkpoint-000018"]


def test_the_report_holds_the_verdict_the_tables_and_pictures_that_open(reported):
    run, code = reported
    text = (run / "report.md").read_text()
    verdict = text.splitlines()[2].strip("*")
    assert verdict.startswith(("PASS: ", "FAIL: ")) and code == (0 if verdict.startswith("PASS") else 1)
    for name in evaluate.ABILITIES:
        assert re.search(rf"^\| {name} \| [01]\.\d+ \| .* – .* \| 0\.250 \| .* \| 2 \|$", text, re.MULTILINE), name
    assert re.search(r"^\| video \(reported, not part of the verdict\) \|", text, re.MULTILINE)
    assert re.search(r"^\| 128 \| .*\n\| 256 \|", text, re.MULTILINE), "needle, within and beyond pre-training"
    for name in ("training", "abilities", "needle", "samples"):
        assert f"]({name}.png)" in text
        with Image.open(run / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors(256)) > 10
    assert "| optimizer steps | 18 |" in text and "| tokens | 4,608 |" in text


@pytest.mark.parametrize("first", ["small_lm_steps", "vit_steps"])
def test_a_run_of_one_stage_ends_in_a_report_too(first, tmp_path, capsys):
    code, _ = run_main(flags(tmp_path / "run", **only(**{first: 1})), capsys)
    assert code in (0, 1) and (tmp_path / "run" / "report.md").exists()
