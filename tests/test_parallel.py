"""Claims about parallel.py: however the step is split over processes, it is the step of one process.

Each case runs two MuonClip steps in float64 on 1, 2 or 4 processes (gloo) and is compared with step.train_step on
the same global batch of four microbatches: loss, every gradient, parameters, router biases, load counts.
Run: .venv/bin/python -m pytest tests/test_parallel.py
"""

import dataclasses
import datetime
import functools
import json
import math
import random
import re
import time
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import train_small
from checkpoint import load_tensors, save_tensors
from conftest import assert_close, gather
from data import encode_example, pack_rows
from example import Example
from k25 import K25, K25Config, load
from launcher import PATIENCE, Launched, forkserver, free_port
from optim import MuonClip
from parallel import Layout, ParallelError, Place, Trainer, keep_units, split_units
from step import losses, train_step
from tokenizer import Tokenizer
from train_small import TrainConfig, model_config

MODEL = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
         "n_routed_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.2, "aux_loss_alpha": 0.05}  # fmt: skip
VISION = {"vt_hidden_size": 8, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_intermediate_size": 8}
CONFIG = model_config(K25Config.preset("toy"), MODEL, VISION)
TOKENIZER = Tokenizer()
SETTINGS = TrainConfig(dtype="float64", clip_norm=0.7, qk_clip=0.2, lr=0.02, adamw_lr=0.01)
STEPS, ROWS, LENGTH = 2, 2, 48
EVERYTHING = ("",)
pytestmark = pytest.mark.xdist_group("parallel")  # the processes are started once

# Blocks of 28 pixels (rows, columns) of the pictures in each of the four microbatches; on 4 ranks W ± 1 items and less.
PICTURES = {"none": ((), (), (), ()), "one": ((), ((2, 3),), (), ()), "three": (((1, 2), (3, 1)), (), (), ((2, 2),)),
            "five": (((1, 1),), ((1, 2), (3, 2)), ((2, 2), (1, 4)), ())}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A layout, and what else is special."""

    layout: Layout
    pictures: str = "five"
    config: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)  # of TrainConfig: recompute, offload
    trains: tuple = EVERYTHING
    unchosen: tuple = ()  # experts that nobody chooses

    @property
    def world(self):
        return self.layout.pp * self.layout.dp

    @property
    def name(self):
        extra = [f"{key}={value}" for key, value in (self.config | self.memory).items()] + [f"trains={t}" for t in self.trains if t]
        marks = ["zero1"] * self.layout.zero1 + ["overlap"] * self.layout.overlap + [self.layout.encoder, f"items={self.pictures}"] + extra
        marks += [f"unchosen={self.unchosen}"] if self.unchosen else []
        return "-".join(["{}.{}.{}.{}x{}".format(*self.layout.numbers()), *marks]).replace(" ", "")

    @property
    def same(self):
        """Cases with the same of this have the same reference."""
        kept = {key: value for key, value in self.config.items() if key != "impl"}
        return json.dumps([self.pictures, kept, self.trains, self.unchosen])


def layout(pp, virtual, ep, dp, zero1=False, encoder="dep", overlap=False):
    return Layout(pp, virtual, ep, dp, 4 // dp, zero1, encoder, overlap)


SELECTIVE, BLOCK, OFFLOAD = {"recompute": "selective"}, {"recompute": "block"}, {"recompute": "selective", "offload": True}
CASES = [
    Case(layout(1, 1, 1, 1)),
    Case(layout(1, 1, 2, 2, zero1=True)),
    Case(layout(1, 1, 1, 2, encoder="stage0"), "three"),
    Case(layout(2, 2, 1, 1), "one", memory=SELECTIVE),
    *(Case(layout(2, 2, 2, 2), pictures) for pictures in PICTURES),
    *(Case(layout(2, 2, 2, 2, encoder="stage0"), pictures) for pictures in ("none", "five")),
    Case(layout(2, 2, 2, 2, zero1=True), "five", memory=BLOCK),
    Case(layout(2, 2, 2, 2, zero1=True, encoder="stage0"), "one", memory=OFFLOAD),
    Case(layout(4, 1, 1, 1)),
    Case(layout(4, 1, 1, 1, zero1=True, encoder="stage0"), "three", memory=SELECTIVE),
    Case(layout(1, 1, 4, 4, zero1=True), "one", memory=BLOCK, unchosen=(0, 1, 5)),
    Case(layout(2, 1, 1, 2, zero1=True), "three"),
    Case(layout(1, 1, 2, 4, zero1=True), "five", {"impl": "reference"}, unchosen=(0, 1, 5)),
    Case(layout(1, 1, 2, 4, overlap=True), "three", memory=SELECTIVE),
    Case(layout(2, 2, 2, 2, overlap=True), "five"),
    Case(layout(1, 1, 4, 4, overlap=True), "one", unchosen=(0, 1, 5)),
    Case(layout(2, 1, 2, 2), "five", {"qat": True, "hidden_size": 32, "moe_intermediate_size": 32}),
    Case(layout(1, 1, 4, 4), "one", trains=("mm_projector.",)),
    Case(layout(2, 2, 2, 2, encoder="stage0"), "one", trains=("vision_tower.", "mm_projector.")),
    Case(layout(2, 2, 2, 2, zero1=True), "three", trains=("language_model.",)),
    Case(layout(2, 2, 2, 2), "five", {"num_hidden_layers": 2, "first_k_dense_replace": 2}),
]  # fmt: skip


def documents(number, pictures):
    """A text of its own length, and one document per picture."""
    rng = random.Random(f"{number}/{pictures}")
    yield Example("".join(rng.choices("abcdef ", k=20 + 11 * number)))
    for rows, columns in pictures:
        image = Image.frombytes("RGB", (28 * columns, 28 * rows), rng.randbytes(28 * 28 * 3 * rows * columns))
        yield Example(f"<image>{rows} by {columns}", (image,), modality="vision")


def global_batch(pictures):
    encoded = ([encode_example(example, TOKENIZER, CONFIG.media) for example in documents(number, blocks)]
               for number, blocks in enumerate(PICTURES[pictures]))  # fmt: skip
    return [pack_rows(each, ROWS, LENGTH, TOKENIZER).to("cpu", torch.float64) for each in encoded]


def turned(batches, step):
    """Other replicas get other microbatches at each step."""
    return batches[step:] + batches[:step]


@functools.cache
def changed(changes):
    """CONFIG with the changes of a JSON object."""
    values = json.loads(changes)
    runtime = {key: values.pop(key) for key in ("impl",) if key in values}
    return dataclasses.replace(model_config(CONFIG, values, {}), **runtime)


def build(case, config_changes, place=None):
    torch.manual_seed(0)
    model = K25(changed(json.dumps(config_changes)))
    for router in model.routers():
        router.e_score_correction_bias[list(case.unchosen)] = -100.0
    if place:
        keep_units(model, place)
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(case.trains))
    return model


def muon_clip(named):
    return MuonClip.from_named(named, SETTINGS.lr, SETTINGS.adamw_lr, weight_decay=SETTINGS.weight_decay)


def measured(result):
    return {key: value if value == value else None for key, value in dataclasses.asdict(result).items()}


class Recorder:
    """Stands in for an optimizer and keeps the gradients as they come to it."""

    def __init__(self, model):
        self.model, self.gradients = model, {}

    def step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


@dataclass
class Outcome:
    """What two steps came to."""

    gradients: dict  # of the first step, not clipped
    state: dict  # after the last
    optimizer: dict
    counts: torch.Tensor  # (MoE layers,E) of the first step
    results: list  # StepResults


def reference(case):
    """The outcome of one process, by step.train_step."""
    model = build(case, {key: value for key, value in case.config.items() if key != "impl"})
    batches, recorder = global_batch(case.pictures), Recorder(model)
    biases = [router.e_score_correction_bias.clone() for router in model.routers()]
    with torch.no_grad():
        counts = [losses(model, batch)[1].counts for batch in batches]
    attention = {name: p.clone() for name, p in model.state_dict().items() if "_b_proj" in name}
    train_step(model, recorder, batches, dataclasses.replace(SETTINGS, clip_norm=1e9))
    model.load_state_dict(attention, strict=False)  # the recorder moved nothing, but the clip and the biases did
    for router, bias in zip(model.routers(), biases):
        router.e_score_correction_bias.copy_(bias)
    optimizer = muon_clip(model.named_parameters())
    results = [measured(train_step(model, optimizer, turned(batches, step), SETTINGS)) for step in range(STEPS)]
    loads = [torch.stack(layer).sum(0) for layer in zip(*counts)]
    counts = torch.stack(loads) if loads else torch.empty(0, 8, dtype=torch.int64)
    return Outcome(recorder.gradients, model.state_dict(), optimizer.state_tensors(), counts, results)


def run_case(case, folder):
    """One process's part of a case; rank 0 writes the outcome."""
    place = Place(case.layout)
    model = build(case, case.config, place)
    trainer = Trainer(model, muon_clip, dataclasses.replace(SETTINGS, **case.memory), place)
    forwards = []
    for stage in trainer.modules.values():
        stage.register_forward_pre_hook(lambda *_: forwards.append(1))
    batches = global_batch(case.pictures)
    results = []
    for step in range(STEPS):
        trainer.backward(turned(batches, step))
        if step == 0:
            gradients = gather(trainer, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            counts = trainer._measure()[1]
        results.append(measured(trainer.update(turned(batches, step))))
    once = STEPS * case.layout.microbatches * len(trainer.modules)
    assert len(forwards) == once, f"bug 45: {len(forwards)} forward passes of stages, {once} expected"
    state, optimizer = gather(trainer, model.state_dict()), gather(trainer, trainer.state_tensors())
    everyone = [None] * case.world
    dist.all_gather_object(everyone, results)
    if place.rank == 0:
        assert everyone == [results] * case.world, "the processes report different steps"
        save_tensors(gradients, folder / f"{case.name}.gradients")
        save_tensors(state, folder / f"{case.name}.state")
        save_tensors(optimizer, folder / f"{case.name}.optimizer")
        save_tensors({"counts": counts}, folder / f"{case.name}.counts")
        (folder / f"{case.name}.results").write_text(json.dumps(results))


def work(rank, ports, folder):
    """All cases of 4 processes, then those of 2, then those of 1: whoever is left over goes home."""
    torch.set_num_threads(1)
    for world, port in ports.items():
        if rank < world:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=PATIENCE), world, rank)
            for case in CASES:
                if case.world == world:
                    run_case(case, folder)
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder in which 1, 2 and 4 processes have left the outcomes of all cases."""
    folder = tmp_path_factory.mktemp("outcomes")
    ports = {world: free_port() for world in (4, 2, 1)}
    processes = [forkserver().Process(target=work, args=(rank, ports, folder)) for rank in range(4)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(deadline - time.monotonic())
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * 4, "a case failed, or hangs"
    return folder


@functools.cache
def want(same):
    """The outcome of one process, once for all cases that share it."""
    return reference(next(case for case in CASES if case.same == same))


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_bug36_bug37_bug46_bug48_every_gradient_is_that_of_one_process(case, outcomes):
    """Of the tower too, wherever the pictures are; what gets none in one process gets none in many."""
    gradients, expected = load_tensors(outcomes / f"{case.name}.gradients"), want(case.same).gradients
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, 1e-10, f"gradient of {name}")
    sees = case.pictures != "none" and case.trains == EVERYTHING
    assert not sees or any(gradient.any() for name, gradient in gradients.items() if name.startswith("vision_tower."))


@each_case
def test_bug14_bug45_every_choice_of_an_expert_is_counted_once(case, outcomes):
    counts, expected = load_tensors(outcomes / f"{case.name}.counts")["counts"], want(case.same).counts
    moe_layers = counts[len(counts) - len(expected) :]
    assert torch.equal(moe_layers, expected)
    assert not moe_layers[:, list(case.unchosen)].any() and len(moe_layers.unique()) != 1  # uneven, or no MoE layers


@each_case
def test_every_process_reports_the_loss_and_all_else_of_one_process(case, outcomes):
    reported = json.loads((outcomes / f"{case.name}.results").read_text())
    for ours, one in zip(reported, want(case.same).results, strict=True):
        assert ours.keys() == one.keys()
        for key, value in one.items():
            value = list(value) if isinstance(value, tuple) else value
            assert ours[key] == (None if value is None else pytest.approx(value, rel=1e-7, abs=1e-9)), key


@each_case
def test_bug16_bug17_bug43_after_two_steps_parameters_router_biases_and_optimizer_state_are_those_of_one_process(case, outcomes):
    """Router biases to the last bit: they move once per step, by the signs of the global counts."""
    for part, expected in (("state", want(case.same).state), ("optimizer", want(case.same).optimizer)):
        found = load_tensors(outcomes / f"{case.name}.{part}")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if name.endswith("e_score_correction_bias") or tensor.dtype == torch.int64:
                assert torch.equal(found[name], tensor), name
            else:
                assert_close(found[name], tensor, 1e-7, f"{part}: {name}")


def test_the_cases_clip_heads_and_move_biases():
    """Else the claims above would be empty."""
    everything = want(CASES[0].same)
    assert all(result["clipped"] and result["grad_norm"] > SETTINGS.clip_norm for result in everything.results)
    assert any(bias.any() for name, bias in everything.state.items() if name.endswith("e_score_correction_bias"))


@pytest.fixture
def alone():
    """This process as a process group of one."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", datetime.timedelta(seconds=PATIENCE), 1, 0)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("zero1", [False, True])
def test_a_step_without_a_finite_loss_moves_nothing(alone, zero1):
    case = Case(layout(1, 1, 1, 1, zero1))
    place = Place(case.layout)
    trainer = Trainer(build(case, {}, place), muon_clip, SETTINGS, place)
    batches = global_batch("one")
    batches[1].patches[3, 5] = math.nan
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert not math.isfinite(trainer.step(batches).loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not any("momentum" in name for name in trainer.state_tensors())
    assert math.isfinite(trainer.step(global_batch("one")).loss)


# Layouts


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9),
       st.integers(1, 12), st.sampled_from([4, 6, 8, 384]), st.integers(1, 16))  # fmt: skip
@settings(deadline=None)
def test_an_impossible_layout_is_refused_with_a_possible_one(pp, virtual, ep, dp, microbatches, layers, experts, world):
    asked = Layout(pp, virtual, ep, dp, microbatches)
    if asked.problem(layers, experts, world) is None:
        asked.check(layers, experts, world)
        assert asked.nearest(layers, experts, world) == asked
        return
    with pytest.raises(ParallelError) as refused:
        asked.check(layers, experts, world)
    message = str(refused.value)
    numbers = map(int, re.findall(r"\d+", message.partition("nearest: ")[2].replace("--zero1", "")))
    assert "\n" not in message and Layout(*numbers).problem(layers, experts, world) is None


@pytest.mark.parametrize("asked, world, words", [
    (Layout(3, 1, 1, 1, 3), 4, "--pp 3 · --dp 1 needs 3 processes and 4 processes were started; nearest: --pp 4 "),
    (Layout(2, 1, 4, 2, 2), 4, "--ep 4 does not divide --dp 2; nearest: --pp 2 --virtual-stages 1 --ep 2 --dp 2 --microbatches 2"),
    (Layout(1, 1, 3, 3, 1), 3, "--ep 3 does not divide 16 experts; nearest: --pp 1 --virtual-stages 1 --ep 1 --dp 3 "),
    (Layout(2, 3, 1, 1, 2), 2, "6 stages, but embedding, 3 layers and head are 5; nearest: --pp 2 --virtual-stages 2 "),
    (Layout(4, 1, 1, 1, 2), 4, "--microbatches 2 leaves ranks of --pp 4 without work; nearest: --pp 4 --virtual-stages 1 --ep 1 --dp 1 --microbatches 4"),
    (Layout(2, 2, 1, 1, 5), 2, "even rounds of about --pp 2, not --microbatches 5; nearest: --pp 2 --virtual-stages 2 --ep 1 --dp 1 --microbatches 6"),
    (Layout(0, 1, 1, 1, 1), 1, "each must be at least 1; nearest: --pp 1 "),
])  # fmt: skip
def test_a_refusal_says_why_and_what_is_nearest(asked, world, words):
    with pytest.raises(ParallelError, match=re.escape(words)):
        asked.check(3, 16, world)


@given(st.integers(1, 70), st.data())
def test_stages_are_contiguous_and_as_equal_as_can_be(layers, data):
    stages = data.draw(st.integers(1, layers + 2))
    parts = split_units(layers, stages)
    assert [unit for part in parts for unit in part] == ["embed", *range(layers), "head"]
    assert len(parts) == stages and max(map(len, parts)) - min(map(len, parts)) <= 1 and all(parts)


# The command line


def flags(run, *more):
    numbers = MODEL | VISION | {"rows": 1, "length": 128, "questions": 2, "dtype": "float64", "ns_dtype": "float64",
                                "checkpoint_every": 1, "small_lm_steps": 0, "vit_steps": 1, "text_steps": 1, "align_steps": 0,
                                "joint_steps": 1, "long_steps": 1, "long_length": 256, "vision_ratio": 0.5, "run": run}  # fmt: skip
    return [part for name, value in numbers.items() for part in ("--" + name.replace("_", "-"), str(value))] + list(more)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_bug37_bug47_the_stages_run_on_four_processes_as_on_one(tmp_path):
    """From the first stage to the report; every number logged is that of one process, and so is the checkpoint."""
    layout = ("--pp", "2", "--virtual-stages", "2", "--ep", "2", "--zero1")
    started = Launched(tmp_path / "ranks", 4, train_small.main, flags(tmp_path / "four", *layout))
    codes = started.ended()
    assert codes in ([0] * 4, [1, 0, 0, 0]) and (tmp_path / "four" / "report.md").exists(), started.said("err")  # 1: a toy that has learned nothing
    assert len(started.said("out").splitlines()) < 25, "more than one process prints"
    t, config, _ = train_small.read_flags(flags(tmp_path / "one", "--accumulation", "4"))
    train_small.train(t, config)
    assert len(rows(tmp_path / "four")) == 4
    for ours, one in zip(rows(tmp_path / "four"), rows(tmp_path / "one"), strict=True):
        assert ours.keys() == one.keys()
        for key in one.keys() - {"tokens_per_s"}:
            number = not isinstance(one[key], str | None)
            assert ours[key] == (pytest.approx(one[key], rel=1e-9, abs=1e-12) if number else one[key]), key
    want, found = (load(tmp_path / run / "models" / "long").state_dict() for run in ("one", "four"))
    for name, tensor in want.items():
        assert_close(found[name], tensor, 1e-9, name)
