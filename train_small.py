"""The main job: pre-train a toy Kimi K2.5 from scratch, then measure and show what it learned — K2.5 report 2.1, 4.3.

    small-lm  a small dense LM learns text                                   (stands in for Moonlight-16B-A3B)
    vit       MoonViT-3D learns to see through that frozen LM, by the caption loss
    text      the K2 decoder learns text                                     (stands in for the K2 checkpoint)
    align     only the projector: from the ViT into the decoder
    joint     ViT + projector + decoder on a constant 10 % vision : 90 % text
    long      the same, context extended with YaRN

Run: make train            (all of it, then runs/toy/report.md; minutes: README)
     python train_small.py --seed 7 --run runs/seven        python train_small.py --resume --run runs/seven
     python train_small.py --help                           (a flag for every field of every config)
     torchrun --nproc-per-node 4 -- train_small.py --pp 2 --virtual-stages 2 --ep 2 --run runs/four

And what begins with the model that this makes, each with --help of its own:
     python train_small.py rl              zero-vision SFT, joint RL, RFT                      (rl_job.py)
     python train_small.py toggle          fewer tokens at equal accuracy?                     (toggle_experiment.py)
     python train_small.py zero-vision     does SFT on text alone make it use tools on pictures?    (vision_experiments.py)
     python train_small.py transfer        does RL on pictures help text?                      (vision_experiments.py)
     python train_small.py parl            does an orchestrator learn to work in parallel?     (parl_experiment.py)
     python train_small.py experiments     the report page: every claim, measured              (experiments.py)

Public names: TrainConfig, Stage, plan, train, COMMANDS, main.
Letters: B rows, T tokens, C hidden, U vocabulary.     Tests: pytest tests/test_train_small.py
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import evaluate
import report
from activations import ActivationError, Memory
from checkpoint import CheckpointError, write_file
from data import Blend, DataError, check_length, open_manifest
from flags import parse_flags
from k25 import K25, ConfigError, K25Config, load
from mla import Yarn, rope_frequencies
from optim import MuonClip, OptimError, lr_at
from parallel import Layout, ParallelError, Place, Trainer, join_processes, keep_units, on_first, ranks, stop
from shards import Checkpoints, RankLost, Watch, export
from sources import TEXT_WEIGHTS, VISION_WEIGHTS, Source, weighted
from step import train_step
from storage import Store, StoreSettings
from texts import pairs_in_filler
from tokenizer import Tokenizer, TokenizerError
from vit3d import ContrastiveHead, MediaError, VisionConfig


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to do."""


# --------------------------------------------------------------------------------------------- config


# What --dtype keeps the weights in; bfloat16 computes by autocast over float32 weights.
PRECISION = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a run that is not the model's shape; each field is a flag."""

    preset: str = "toy"  # the model: toy | small | k2.5; single fields by their own flags
    run: str = "runs/toy"  # directory of everything the run writes
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "bfloat16"  # float32 | bfloat16 (autocast over float32 weights) | float64
    threads: int = 1  # of torch on the CPU; the data are drawn beside it, and a second one stalls when anything else runs
    compile: bool = False  # torch.compile each decoder block
    recompute: str = "none"  # none | selective | block: what is computed again in the backward pass instead of stored
    fp8: bool = False  # store the inputs of experts' and MLPs' linear layers as FP8-E4M3
    offload: bool = False  # what is stored for the backward pass waits in the CPU's memory
    accumulation: int = 1  # microbatches per optimizer step, of all processes together
    pp: int = 1  # pipeline ranks; this and the next seven are for torchrun, see parallel.Layout
    virtual_stages: int = 1  # pipeline stages per rank, interleaved
    ep: int = 1  # ranks that share the routed experts; divides dp
    dp: int = 0  # replicas of the pipeline; 0: processes / pp
    microbatches: int = 0  # accumulation per replica; 0: accumulation / dp, or without that pp, the least that fills a pipeline
    zero1: bool = False  # split the optimizer state over the replicas
    encoder: str = "dep"  # dep | stage0: the vision tower runs evenly on all ranks, or on the first stage
    overlap: bool = False  # experts work on one half of the tokens while the other half travels
    patience: int = 600  # seconds that processes wait for each other before one of them counts as stuck
    rows: int = 8  # B: packed rows per microbatch
    length: int = 256  # T: tokens per row in all stages but the last
    long_length: int = 1024  # T of the long-context stage
    yarn_factor: float = 4.0  # context extension of the long-context stage
    small_lm_steps: int = 600
    vit_steps: int = 1100
    text_steps: int = 600
    align_steps: int = 200
    joint_steps: int = 550
    long_steps: int = 40
    vision_ratio: float = 0.10  # share of vision tokens in joint pre-training and after
    lr: float = 6e-3  # peak learning rate of Muon's matrices, before the 0.2·√max scale
    adamw_lr: float = 4e-3  # peak learning rate of everything else
    weight_decay: float = 0.02
    warmup: int = 20  # steps
    ns_dtype: str = "bfloat16"  # of the Newton-Schulz iterations, as Muon is published; float32 is the careful choice
    clip_norm: float = 1.0  # largest gradient norm
    qk_clip: float = 100.0  # τ of QK-Clip
    balance_gamma: float = 0.002  # γ of the router bias
    contrastive: float = 0.0  # weight of SigLIP's loss beside the caption loss in the vit stage
    checkpoint_every: int = 100  # steps between checkpoints
    questions: int = 200  # held-out questions per ability
    chat: float = 0.15  # share of the questions that are put as chat turns, so that the model can be talked to
    data: str = ""  # your own data: a manifest.jsonl or a folder, mixed in beside the built-in sources
    data_weight: float = 1.0  # its weight among the sources
    skip_bad: bool = False  # drop bad rows of --data instead of stopping
    cache: str = StoreSettings.cache  # folder in which objects of --data s3://… are kept, shared by the processes of a machine
    cache_memory: int = StoreSettings.memory_bytes  # bytes of them in the memory of each process
    cache_disk: int = StoreSettings.disk_bytes  # bytes of them in that folder
    requests_per_second: float = StoreSettings.requests_per_second  # to the object store, of all processes that share the folder
    tokenizer: str = ""  # a released tiktoken.model; default: bytes

    def __post_init__(self):
        for name in ("threads", "accumulation", "patience", "rows", "length", "checkpoint_every", "questions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        steps = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_steps")}
        if min(steps.values()) < 0 or not any(steps.values()):
            raise ConfigError(f"{', '.join(steps)} are {', '.join(map(str, steps.values()))}: none may be negative, nor all 0")
        if not self.text_steps and (self.small_lm_steps or self.vit_steps) and (self.align_steps or self.joint_steps or self.long_steps):
            raise ConfigError("text_steps is 0: the stages after it go on from its decoder; give it steps, or skip those before it too")
        if self.long_steps and not 94 <= self.length <= self.long_length - 96:
            raise ConfigError(f"length is {self.length} and long_length {self.long_length}: the long stage's needles need "
                              "94 ≤ length ≤ long_length − 96")  # fmt: skip
        for name in ("vision_ratio", "chat"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must lie in 0 … 1")
        for name in ("clip_norm", "qk_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.dtype not in PRECISION:
            raise ConfigError(f"--dtype {self.dtype}: choose float32, bfloat16 or float64")
        if not isinstance(getattr(torch, self.ns_dtype, None), torch.dtype):
            raise ConfigError(f"ns_dtype is {self.ns_dtype!r}: choose bfloat16 or float32")
        if Memory.of(self) != Memory() and self.compile:
            raise ConfigError("compile decides itself what is stored: choose it, or recompute, fp8 and offload")


@dataclass(frozen=True)
class Stage:
    """One stage: which model, what moves, on what data, for how long."""

    name: str
    steps: int
    model: K25Config
    inherits: tuple  # name prefixes of the tensors taken over from the stage before
    trains: tuple  # name prefixes of the parameters that move
    sources: tuple  # (Source, weight)
    ratio: float | None  # share of vision tokens
    length: int
    rows: int
    rate: float = 1.0  # factor on Muon's learning rate
    adamw_rate: float = 1.0  # factor on AdamW's: small where the patch embedding moves


def small_lm(config):
    """The config of the ViT's teacher: half the decoder's layers, all of them dense."""
    layers = (config.num_hidden_layers + 1) // 2
    return dataclasses.replace(config, num_hidden_layers=layers, first_k_dense_replace=layers)


def plan(t, config):
    """The stages of a run, in order. t: TrainConfig; config: K25Config. Returns a list of Stage."""
    everything, text = ("",), "language_model."
    longer = dataclasses.replace(
        config, max_position_embeddings=t.long_length,
        yarn=Yarn(factor=t.yarn_factor, original_max_position_embeddings=t.length))  # fmt: skip
    texts, visions = weighted(TEXT_WEIGHTS), weighted(VISION_WEIGHTS)
    far = Source("far_needle", "text", "", lambda rng: pairs_in_filler(rng, rng.randint(t.length, t.long_length - 96), rng.random(), asked=4))
    long_rows = max(t.rows * t.length // t.long_length, 1)
    return [
        Stage("small-lm", t.small_lm_steps, small_lm(config), (), (text,), texts, 0.0, t.length, t.rows),
        Stage("vit", t.vit_steps, small_lm(config), everything, ("vision_tower.", "mm_projector.", "contrastive_head."), visions, 1.0, t.length, t.rows,
              rate=1.6, adamw_rate=0.25),
        Stage("text", t.text_steps, config, ("vision_tower.",), (text,), texts, 0.0, t.length, t.rows),
        Stage("align", t.align_steps, config, everything, ("mm_projector.",), visions, 1.0, t.length, t.rows, rate=1.6, adamw_rate=0.25),
        Stage("joint", t.joint_steps, config, everything, everything, texts + visions, t.vision_ratio, t.length, t.rows,
              rate=0.5, adamw_rate=0.25),
        Stage("long", t.long_steps, longer, everything, everything, texts + visions + ((far, 4.0),), t.vision_ratio,
              t.long_length, long_rows, rate=0.2, adamw_rate=0.05),
    ]  # fmt: skip


def with_layout(t, config, world):
    """The run's layout on this many processes. Returns (TrainConfig with dp, microbatches and accumulation told apart, Layout).

    Raises ParallelError for a layout that cannot be, ConfigError for flags that contradict each other.
    """
    dp = t.dp or max(world // max(t.pp, 1), 1)
    microbatches = t.microbatches or (max(t.accumulation // dp, 1) if t.accumulation > 1 else t.pp)
    layout = Layout(t.pp, t.virtual_stages, t.ep, dp, microbatches, t.zero1, t.encoder, t.overlap)
    layout.check(min(stage.model.num_hidden_layers for stage in plan(t, config) if stage.steps), config.n_routed_experts, world)
    if t.accumulation not in (1, dp * microbatches):
        raise ConfigError(f"accumulation is {t.accumulation}, but dp {dp} · microbatches {microbatches} = {dp * microbatches}: "
                          "leave --accumulation or --microbatches out, or make them agree")  # fmt: skip
    if world > 1 and t.contrastive:
        raise ConfigError("contrastive compares pictures of one microbatch with its words, which stand on different ranks: train it on one process")
    return dataclasses.replace(t, dp=dp, microbatches=microbatches, accumulation=dp * microbatches), layout


# --------------------------------------------------------------------------------------------- the run


# What a run may be resumed with otherwise than it was begun.
FREE = ("run", "device", "checkpoint_every", "recompute", "offload", "patience", "cache", "cache_memory", "cache_disk",
        "requests_per_second", *(f.name for f in dataclasses.fields(Layout)))  # fmt: skip


class Run:
    """The directory of a run: resolved config, metrics, log, and where its last checkpoint is. Written atomically."""

    def __init__(self, path, t, config, resume):
        self.path, self.t = pathlib.Path(path), t
        resolved = {"train": dataclasses.asdict(t), "model": dataclasses.asdict(config), "versions": versions()}
        pointer = self.path / "latest.json"
        if pointer.exists() and not resume:
            raise ConfigError(f"{self.path} already holds a run: continue it with --resume, or choose another --run")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file: choose another --run")
        if resume and not (self.path / "config.json").exists():
            raise ConfigError(f"{self.path} holds no run to resume: leave --resume out")
        if resume:  # without a checkpoint yet, it begins again
            saved, now = json.loads((self.path / "config.json").read_text()), json.loads(json.dumps(resolved))
            self._refuse_other(saved | {"versions": {}}, now | {"versions": {}})
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(self.path / "config.json", json.dumps(resolved, indent=2) + "\n")
        for unfinished in self.path.glob(".checkpoint-*"):  # of a save that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        self.state = json.loads(pointer.read_text()) if resume and pointer.exists() else None
        self._rewind(self.state["global_step"] if self.state else 0)

    def _refuse_other(self, saved, now):
        for key, value in now.items():
            if isinstance(value, dict):
                self._refuse_other(saved.get(key, {}), value)
            elif saved.get(key) != value and key not in FREE:
                raise ConfigError(f"{self.path} was begun with {key} = {saved.get(key)}, not {value}: resume with the same flags")

    def _rewind(self, global_step):
        """Drop the metrics of steps after the checkpoint: they will be taken again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["global_step"] <= global_step]
            write_file(path, "".join(kept))

    def log(self, row):
        """Append one step's metrics."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, checkpoints, model, optimizer, blend, stage, step, global_step):
        """Write a checkpoint, together with all other processes, and point to it; the one before is dropped."""
        checkpoints.save(model, optimizer, {"stage": stage, "step": step, "global_step": global_step, "data": blend.state()})
        self.state = checkpoints.latest()

    def last_checkpoint(self):
        """Path of the last good checkpoint, in words."""
        return str(self.path / self.state["checkpoint"]) if self.state else "none yet"


def versions():
    """Versions of what the numbers depend on."""
    packages = ("torch", "numpy", "pillow", "safetensors")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def device_of(t):
    """The device of a run, by name. Raises ConfigError when it cannot be used here."""
    device = t.device if t.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def next_model(stage, previous, t, device, place=None):
    """The model of a stage: built from the seed, then given what it inherits from the model of the stage before.

    With a Place it is one process's part of it, as `previous` must be.
    """
    torch.manual_seed(t.seed)
    model = K25(stage.model)
    if place:
        keep_units(model, place)
    if previous is not None:
        taken = {k: v for k, v in previous.state_dict().items() if k.startswith(stage.inherits)} if stage.inherits else {}
        model.load_state_dict(taken, strict=False)
    if t.contrastive and stage.name == "vit":
        model.contrastive_head = ContrastiveHead(stage.model.vision.vt_hidden_size, stage.model.hidden_size)
    model.to(device, PRECISION[t.dtype])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(stage.trains))
    if t.compile:
        for block in model.language_model.model.layers.children():
            block.compile(dynamic=True)
    return model


def blend_of(stage, t, tokenizer, own):
    """The stage's endless data. own: ManifestSource or None."""
    sources = list(stage.sources) + ([(own, t.data_weight)] if own else [])
    talks = any("language_model.".startswith(prefix) for prefix in stage.trains)  # a frozen LM cannot learn the template
    return Blend(sources, stage.ratio, t.seed, stage.rows, stage.length, tokenizer, stage.model.media, stage=stage.name,
                 prefetch=2, chat=t.chat if talks else 0.0)  # fmt: skip


def run_stage(run, checkpoints, watch, number, stage, model, optimizer, blend, device, first, done, bar):
    """Take the steps first … stage.steps − 1 of one stage, logging each and writing checkpoints.

    checkpoints: Checkpoints; watch: Watch; optimizer: MuonClip, or with many processes a Trainer; number: the stage's place
    in the plan; done: optimizer steps of the whole run before these; bar: tqdm. Rank 0 logs and speaks for all.
    Raises TrainingError when the loss is no longer finite, naming the step, the batch and the last good checkpoint.
    """
    t, (rank, world) = run.t, ranks()
    alone = world == 1
    for step in range(first, stage.steps):
        began = time.perf_counter()
        factor = lr_at(step, min(t.warmup, stage.steps // 4), stage.steps, 1.0, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        index, global_step = blend.state()["index"], done + step - first + 1
        with watch.during(f"stage {stage.name}, step {step} (global step {global_step})"):
            batches = [next(blend) for _ in range(t.accumulation)]
            if alone:
                result = train_step(model, optimizer, [batch.to(device, PRECISION[t.dtype]) for batch in batches], t)
            else:
                result = optimizer.step(batches)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise TrainingError(f"loss is {result.loss} and gradient norm {result.grad_norm} in stage {stage.name} at step "
                                f"{step} (global step {global_step}), in the batch that begins with example {index}; "
                                f"last good checkpoint: {run.last_checkpoint()}; try a smaller --lr")  # fmt: skip
        if rank == 0:
            report_step(run, stage, step, global_step, t.lr * stage.rate * factor, result, time.perf_counter() - began, bar)
        if (step + 1) % t.checkpoint_every == 0 or step + 1 == stage.steps:
            with watch.during(f"saving after stage {stage.name}, step {step} (global step {global_step})"):
                run.save(checkpoints, model, optimizer, blend, number, step + 1, global_step)


def report_step(run, stage, step, global_step, lr, result, seconds, bar):
    """Log a step, print its line, move the bar."""
    rate = result.tokens / seconds
    row = {"stage": stage.name, "step": step, "global_step": global_step, "lr": lr, "tokens_per_s": rate}
    run.log(row | {k: None if v != v else v for k, v in dataclasses.asdict(result).items()})
    tqdm.write(f"{stage.name:8s} {step:4d}  loss {result.loss:.3f}  text {result.loss_text:.3f}  vision {result.loss_vision:.3f}  "
               f"lr {lr:.4f}  |g| {result.grad_norm:6.2f}  max logit {result.max_logit:6.2f}  "
               f"load cv {result.load_cv:.2f}  {rate:,.0f} tok/s")  # fmt: skip
    bar.set_postfix_str(f"{stage.name} loss {result.loss:.3f} {rate:,.0f} tok/s")
    bar.update()


def train(t, config, resume=False):
    """Run (or go on with) all stages. t: TrainConfig; config: K25Config. Returns the Run and the final model.

    Raises TrainingError as `run_stage`, and the ValueErrors of everything it builds. On many processes (torchrun) every
    one of them runs this and gets its part of the model; when one of them is lost, the others end here with exit code 1.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat its bits
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(t.threads)
    device, (rank, world) = device_of(t), ranks()
    if resume:
        t = same_batches(t)
    t, layout = with_layout(t, config, world)
    place = Place(layout, device, t.patience) if world > 1 else None
    stages = [stage for stage in plan(t, config) if stage.steps]
    tokenizer = Tokenizer(config.vocab_size, t.tokenizer or None)
    if tokenizer.media_pad != config.media_placeholder_token_id:
        raise ConfigError(f"media_placeholder_token_id is {config.media_placeholder_token_id}, but <|media_pad|> of a vocabulary "
                          f"of {config.vocab_size} is {tokenizer.media_pad}")  # fmt: skip
    own = own_data(t, min(stage.length for stage in stages), tokenizer, config) if t.data else None
    run = on_first(lambda: Run(t.run, t, config, resume))
    if rank == 0:
        print(f"{run.path}: preset {t.preset}, seed {t.seed}, {device}, {t.dtype}; "
              f"{', '.join(f'{name} {version}' for name, version in versions().items())}; everything set: {run.path / 'config.json'}")  # fmt: skip
    checkpoints, watch = Checkpoints(run.path, t.patience), Watch()
    try:
        model = run_stages(run, checkpoints, watch, stages, place, tokenizer, own, device)
    except RankLost as error:
        cause = 2 if isinstance(error.__cause__, ValueError) else 1
        watch.leave(f"train_small.py: {error}; last good checkpoint: {run.last_checkpoint()}; --resume goes on", cause)
    finally:
        watch.close()
    return run, model


def same_batches(t):
    """The settings of a run that goes on, with as many microbatches per step as it was begun with unless they are given."""
    path = pathlib.Path(t.run) / "config.json"
    if t.accumulation > 1 or t.microbatches or not path.exists():
        return t
    return dataclasses.replace(t, accumulation=json.loads(path.read_text())["train"]["accumulation"])


def own_data(t, shortest, tokenizer, config):
    """The user's manifest or folder, on this machine or far away. shortest: tokens that every document must fit into."""
    settings = StoreSettings(cache=t.cache, memory_bytes=t.cache_memory, disk_bytes=t.cache_disk,
                             requests_per_second=t.requests_per_second, seed=ranks()[0])  # fmt: skip
    fits = functools.partial(check_length, length=shortest, tokenizer=tokenizer, media_config=config.media)
    return open_manifest(t.data, t.skip_bad, fits, lambda: Store(settings))


def run_stages(run, checkpoints, watch, stages, place, tokenizer, own, device):
    """All stages from the last checkpoint on. own: ManifestSource or None; the rest as `run_stage`. Returns the last model."""
    t, rank = run.t, ranks()[0]
    at, first = (run.state["stage"], run.state["step"]) if run.state else (0, 0)
    done, checkpoint = sum(stage.steps for stage in stages[:at]) + first, run.state and run.state["checkpoint"]
    model = None
    with tqdm(total=sum(stage.steps for stage in stages), initial=done, unit="step", dynamic_ncols=True, disable=rank > 0) as bar:
        for number, stage in list(enumerate(stages))[at:]:
            model = next_model(stage, model, t, device, place)
            muon_clip = functools.partial(
                MuonClip.from_named, lr=t.lr * stage.rate, adamw_lr=t.adamw_lr * stage.adamw_rate,
                weight_decay=t.weight_decay, ns_dtype=getattr(torch, t.ns_dtype))  # fmt: skip
            optimizer = Trainer(model, muon_clip, t, place) if place else muon_clip(model.named_parameters())
            blend = blend_of(stage, t, tokenizer, own)
            if checkpoint:
                with watch.during(f"loading {checkpoint}"):
                    checkpoints.load(checkpoint, model, optimizer)
                blend.load_state(run.state["data"])
            run_stage(run, checkpoints, watch, number, stage, model, optimizer, blend, device, first, done, bar)
            done, first, checkpoint = done + stage.steps - first, 0, None
            if hasattr(model, "contrastive_head"):
                del model.contrastive_head  # it served this stage only
            with watch.during(f"writing models/{stage.name}"):
                on_first(lambda: export(run.path / run.state["checkpoint"], stage.model, run.path / "models" / stage.name))  # noqa: B023
    return model


# ------------------------------------------------------------------------------------------ afterwards


def measure(run, t, config):
    """Evaluate the final model, draw the plots, write report.md. Returns the verdict line and the list of Score."""
    tokenizer = Tokenizer(config.vocab_size, t.tokenizer or None)
    device = device_of(t)
    began = time.perf_counter()
    running = {"device": device, "impl": config.impl, "qat": config.qat}  # measured as it was trained
    final = load(run.path / "model", **running)
    scores = evaluate.abilities(final, tokenizer, t.questions, t.seed)
    lengths = [length for length in (128, 256, 512, 1024, 2048, 4096) if length <= t.long_length] or [128]
    asked = max(t.questions // 5, 1)
    joint = run.path / "models" / "joint"
    after = evaluate.needles(final, tokenizer, lengths, asked, t.seed)
    before = evaluate.needles(load(joint, **running), tokenizer, lengths, asked, t.seed) if joint.exists() else after
    rows = report.read_metrics(run.path / "metrics.jsonl")
    report.plot_training(rows, run.path / "training.png")
    report.plot_abilities(scores, run.path / "abilities.png")
    report.plot_needle(before, after, t.length, run.path / "needle.png")
    samples = report.plot_samples(final, tokenizer, run.path / "samples.png", t.seed)
    parameters = sum(p.numel() for p in final.parameters())
    facts = [("preset", t.preset), ("seed", t.seed), ("parameters", f"{parameters:,}"), ("optimizer steps", f"{len(rows):,}"),
             ("tokens", f"{sum(row['tokens'] for row in rows):,}"),
             ("minutes training", f"{sum(row['tokens'] / row['tokens_per_s'] for row in rows) / 60:.1f}"),
             ("minutes measuring", f"{(time.perf_counter() - began) / 60:.1f}"), ("device", device),
             *(versions().items())]  # fmt: skip
    return report.write_report(run.path, f"A toy Kimi K2.5, seed {t.seed}", facts, scores, before, after, t.length, samples), scores


def parser():
    """The command line: a flag for every field of TrainConfig, K25Config and VisionConfig that no other field decides."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="train_small.py [--resume] [--FLAG VALUE …]", allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    cli.add_argument("--resume", action="store_true", help="go on with the run in --run")
    for kind, group in ((TrainConfig, "run"), (K25Config, "model (default: the preset's)"),
                        (VisionConfig, "vision (default: the preset's)")):  # fmt: skip
        section = cli.add_argument_group(group)
        for f in dataclasses.fields(kind):
            if f.type not in (int, float, str, bool) or (kind is VisionConfig and f.name == "text_hidden_size"):
                continue
            default = f.default if kind is TrainConfig else None
            action = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            section.add_argument("--" + f.name.replace("_", "-"), default=default, help=f"({f.type.__name__})", **action)
    return cli


_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace", "media_placeholder_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


def model_config(base, model, vision):
    """A preset with some fields replaced. base: K25Config; model, vision: {field: value}. Returns K25Config.

    The fields that follow from others do so: the projector's widths, the special ids (the last 256 of the vocabulary),
    the patches and frames that the preprocessing makes. Raises ConfigError for a model that cannot be built.
    """
    for name, value in (vision | model).items():
        least = 1 if type(value) is int and name not in _MAY_BE_ZERO else 0
        if type(value) in (int, float) and not value >= least:
            raise ConfigError(f"{name} is {value}: it must be at least {least}")
    shift = model.get("vocab_size", base.vocab_size) - base.vocab_size
    ids = {name: getattr(base, name) + shift for name in _MAY_BE_ZERO if name.endswith("_id")}
    widths = {"text_hidden_size": model.get("hidden_size", base.hidden_size), "mm_hidden_size": None}  # None: vt_hidden_size
    try:
        seen = dataclasses.replace(base.vision, **widths, **vision)
        media = dataclasses.replace(base.media, patch_size=seen.patch_size, temporal_merge_kernel_size=seen.init_pos_emb_time)
        config = dataclasses.replace(base, vision=seen, media=media, **(ids | model))
        rope_frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        with torch.device("meta"):
            K25(config)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"no such model can be built: {str(error).splitlines()[0]}") from None
    return config


def read_flags(arguments):
    """Arguments to (TrainConfig, K25Config, resume). Unknown flags exit with code 2 and the nearest name."""
    flags = parse_flags(parser(), arguments)
    values = vars(flags)
    t = TrainConfig(**{f.name: values[f.name] for f in dataclasses.fields(TrainConfig)})
    base = K25Config.preset(t.preset)
    vision = {f.name: values[f.name] for f in dataclasses.fields(VisionConfig) if values.get(f.name) is not None}
    model = {f.name: values[f.name] for f in dataclasses.fields(K25Config) if values.get(f.name) is not None}
    return t, model_config(base, model, vision), flags.resume


COMMANDS = {  # first argument to (module, what its main is told)
    "rl": ("rl_job", {}), "toggle": ("toggle_experiment", {}),
    "zero-vision": ("vision_experiments", {"command": "zero-vision"}), "transfer": ("vision_experiments", {"command": "transfer"}),
    "parl": ("parl_experiment", {}), "experiments": ("experiments", {}),
}  # fmt: skip


def main(arguments=None):
    """Train, measure, report; or what the first argument names. Exit code 0 after PASS, 1 after FAIL or divergence, 2 on misuse."""
    began, arguments = time.perf_counter(), sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        module, told = COMMANDS[arguments[0]]
        return importlib.import_module(module).main(arguments[1:], **told)
    try:
        rank, _ = join_processes()
        t, config, resume = read_flags(arguments)
        run, model = train(t, config, resume)
        if rank:
            sys.exit(0)  # rank 0 measures
        export(run.path / run.state["checkpoint"], model.config, run.path / "model", int4=config.qat)
        ending, scores = measure(run, t, config)
    except TrainingError as error:
        stop(1, f"train_small.py: {error}")
    except (ActivationError, ConfigError, CheckpointError, DataError, MediaError, OptimError, ParallelError, TokenizerError) as error:
        stop(2, f"train_small.py: {error}")
    except KeyboardInterrupt:
        if ranks()[0] == 0:
            print("\ntrain_small.py: interrupted; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)
    for score in scores:
        blind = "" if score.blind is None else f"   blind {score.blind / score.asked:.3f}"
        low, high = score.interval
        print(f"{score.name:18s} {score.accuracy:.3f}  [{low:.3f}, {high:.3f}]  chance {score.chance:.3f}{blind}")
    print(f"{ending}\n{run.path / 'report.md'}   {(time.perf_counter() - began) / 60:.1f} minutes")
    sys.exit(0 if ending.startswith("PASS") else 1)


if __name__ == "__main__":
    main()
