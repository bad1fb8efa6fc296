"""Claims about shards.py: what four processes save, any layout loads and goes on from, and nothing is ever lost.

One run of four processes (gloo) takes three steps and saves; then it meets a full disk and a kill in the middle of a
save; two processes, and then one, go on from what is there. All in float64, against five steps of a single process.
Run: .venv/bin/python -m pytest tests/test_shards.py
"""

import datetime
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import k25
import shards
from checkpoint import CheckpointError, load_tensors, save_tensors
from conftest import assert_close, gather
from data import encode_example, pack_rows
from example import Example
from k25 import K25, K25Config
from launcher import PATIENCE, forkserver, free_port
from optim import MuonClip
from parallel import Layout, Place, Trainer, keep_units
from shards import Checkpoints, RankLost, Watch, export
from step import train_step
from tokenizer import Tokenizer
from train_small import TrainConfig, model_config

MODEL = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
         "n_routed_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.2, "aux_loss_alpha": 0.05}  # fmt: skip
VISION = {"vt_hidden_size": 8, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_intermediate_size": 8}
CONFIG = model_config(K25Config.preset("toy"), MODEL, VISION)
TOKENIZER = Tokenizer()
SETTINGS = TrainConfig(dtype="float64", clip_norm=0.7, qk_clip=0.2, lr=0.02, adamw_lr=0.01)
pytestmark = pytest.mark.xdist_group("shards")  # the processes are started once

FOUR = Layout(pp=2, ep=2, dp=2, microbatches=2, zero1=True)
TWO = {"pipeline": Layout(pp=2, virtual_stages=2, microbatches=4), "experts": Layout(ep=2, dp=2, microbatches=2, zero1=True)}

def global_batch():
    texts = ("".join(chr(97 + (i * i + number) % 26) for i in range(25 + 9 * number)) for number in range(4))
    return [pack_rows([encode_example(Example(text), TOKENIZER, CONFIG.media)], 2, 48, TOKENIZER).to("cpu", torch.float64) for text in texts]


def batches_of(step):
    """Each step its own order, so that a wrong data position changes the loss."""
    whole = global_batch()
    return whole[step % 4 :] + whole[: step % 4]


def build(seed, place=None, config=CONFIG):
    """A model of its own seed: what is loaded must replace all of it."""
    torch.manual_seed(seed)
    model = K25(config)
    if place:
        keep_units(model, place)
    return model.double()


def muon_clip(named):
    return MuonClip.from_named(named, SETTINGS.lr, SETTINGS.adamw_lr, weight_decay=SETTINGS.weight_decay)


def state_of(step):
    return {"global_step": step, "stage": 0, "step": step, "data": {"index": 7 * step}}


# What the processes do


def four(rank, folder, store_port):
    """Three steps, a save, and then all that can go wrong."""
    place = Place(FOUR)
    trainer = Trainer(build(0, place), muon_clip, SETTINGS, place)
    checkpoints = Checkpoints(folder / "run", patience=20)
    losses = [trainer.step(batches_of(step)).loss for step in range(3)]
    checkpoints.save(trainer.model, trainer, state_of(3))
    trainer.step(batches_of(3))
    with full_disk(rank == 1):
        tell(folder, f"full-{rank}", lambda: checkpoints.save(trainer.model, trainer, state_of(4)))
    assert not (folder / "run" / ".checkpoint-000004.tmp").exists() or rank
    store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
    groups = [dist.new_group(timeout=datetime.timedelta(seconds=1)) for _ in range(2)]
    watches = [Watch(dist.PrefixStore(what, store), silence=2.0) for what in ("memory", "stuck", "kill")]
    tell(folder, f"memory-{rank}", lambda: run_out_of_memory(watches[0], rank == 3, groups[0]))
    tell(folder, f"stuck-{rank}", lambda: get_stuck(watches[1], rank == 1, groups[1]))
    tell(folder, f"kill-{rank}", lambda: save_watched(watches[2], rank == 2, checkpoints, trainer))
    for watch in watches:
        watch.close()
    return {"losses": losses}


def run_out_of_memory(watch, here, group):
    with watch.during("step 17"):
        if here:
            raise MemoryError("cannot allocate")
        dist.barrier(group)


def get_stuck(watch, here, group):
    with watch.during("step 18"):
        if here:
            os.kill(os.getpid(), signal.SIGSTOP)  # until the test goes on with it
        else:
            dist.barrier(group)


def save_watched(watch, here, checkpoints, trainer):
    if here:
        shards.HuggingFaceStorageWriter = Killed
    with watch.during("step 4"):
        checkpoints.save(trainer.model, trainer, state_of(4))


def two(rank, folder, _):
    """Two steps in each layout; a checkpoint between those of the last."""
    losses = {}
    for name, layout in TWO.items():
        place = Place(layout)
        trainer = Trainer(build(1, place), muon_clip, SETTINGS, place)
        losses[name] = go_on(Checkpoints(folder / "run"), trainer.model, trainer, trainer.step, 4)
        if name == "experts":
            Checkpoints(folder / "chain").save(trainer.model, trainer, state_of(4))
        losses[name].append(trainer.step(batches_of(4)).loss)
        tensors = gather(trainer, trainer.model.state_dict()) | gather(trainer, trainer.state_tensors())
        if rank == 0:
            save_tensors(tensors, folder / f"{name}.safetensors")
    return losses


def one(rank, folder, _):
    """A Trainer of one process."""
    place = Place(Layout(microbatches=4))
    trainer = Trainer(build(3, place), muon_clip, SETTINGS, place)
    losses = go_on(Checkpoints(folder / "run"), trainer.model, trainer, trainer.step, 5)
    save_tensors(trainer.model.state_dict() | trainer.state_tensors(), folder / "one.safetensors")
    return {"one": losses}


def go_on(checkpoints, model, optimizer, take, until):
    state = checkpoints.latest()
    checkpoints.load(state["checkpoint"], model, optimizer)
    assert state["data"] == {"index": 7 * state["step"]}
    return [take(batches_of(step)).loss for step in range(state["step"], until)]


class full_disk:
    """No file of this process may grow beyond a kilobyte."""

    def __init__(self, here):
        self.here, self.limits = here, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self):
        if self.here:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, self.limits[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


class Killed(HuggingFaceStorageWriter):
    """Dies with half a file written."""

    def write_data(self, plan, planner):
        self.fs.mkdir(self.path)
        (self.path / "shard-00003-model-00001-of-00001.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def tell(folder, name, action):
    """Leave the error in a file, for the test to read."""
    try:
        action()
    except (CheckpointError, RankLost) as error:
        (folder / name).write_text(f"{type(error).__name__}: {error}")


def told(folder, what):
    return {path.name[-1]: path.read_text() for path in folder.glob(f"{what}-?")}


def work(rank, ports, folder, store_port):
    """Four processes, of which one dies; then two, then one. Whoever is left over goes home."""
    torch.set_num_threads(1)
    for part, world, port in zip((four, two, one), (4, 2, 1), ports):
        if rank >= world:
            sys.exit(0)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=PATIENCE), world, rank)
        (folder / f"{part.__name__}-{rank}.json").write_text(json.dumps(part(rank, folder, store_port)))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder in which the processes have left what they did, and their exit codes."""
    folder = tmp_path_factory.mktemp("shards")
    for run in ("run", "chain"):
        (folder / run).mkdir()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them all, as torchrun's does
    ports = [free_port() for _ in range(3)]
    processes = [forkserver().Process(target=work, args=(rank, ports, folder, store.port)) for rank in range(4)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if len(told(folder, "stuck")) == 3 and processes[1].is_alive():
            os.kill(processes[1].pid, signal.SIGCONT)
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return folder, codes


# Layouts


@dataclass
class Uninterrupted:
    """Five steps of a single process."""

    losses: list
    saved: dict  # tensors after three steps
    final: dict  # after five


@pytest.fixture(scope="module")
def uninterrupted():
    model = build(0)
    optimizer = muon_clip(model.named_parameters())
    losses = [train_step(model, optimizer, batches_of(step), SETTINGS).loss for step in range(3)]
    saved = {name: tensor.clone() for name, tensor in (model.state_dict() | optimizer.state_tensors()).items()}
    losses += [train_step(model, optimizer, batches_of(step), SETTINGS).loss for step in (3, 4)]
    return Uninterrupted(losses, saved, model.state_dict() | optimizer.state_tensors())


def assert_same(found, wanted, tolerance=1e-9):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert_close(found[name], tensor, tolerance, name)


def test_four_processes_write_every_tensor_once(outcome, uninterrupted):
    """Copies once, shares of the experts as rows of the whole; momenta and counters too."""
    folder, _ = outcome
    rows, writers = {}, {}
    for path in sorted((folder / "run" / "checkpoint-000003").glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():
                tensor, start = file.get_tensor(name), (offsets[name]["saved_offsets"] or [0])[0]
                rows.setdefault(name, []).append((start, tensor))
                writers.setdefault(path.parent.name, set()).add(path.name[6:11])
    assert rows.keys() == uninterrupted.saved.keys()
    assert {name.partition(".mlp.")[2] for name, parts in rows.items() if len(parts) > 1} == {
        f"experts.{matrix}{slot}" for matrix in ("gate_proj", "up_proj", "down_proj") for slot in ("", ".momentum")}  # fmt: skip
    for name, parts in rows.items():
        parts = [tensor for _, tensor in sorted(parts, key=lambda part: part[0])]
        assert_close(torch.cat(parts) if len(parts) > 1 else parts[0], uninterrupted.saved[name], 1e-9, name)
    assert writers == {"model": {"00001", "00002", "00003", "00004"}, "optimizer": {"00001", "00002", "00003", "00004"}}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_go_on_in_any_layout(name, outcome, uninterrupted):
    folder, _ = outcome
    for rank in range(2):
        assert json.loads((folder / f"two-{rank}.json").read_text())[name] == pytest.approx(uninterrupted.losses[3:], rel=1e-9)
    assert_same(load_tensors(folder / f"{name}.safetensors"), uninterrupted.final)


def test_a_trainer_of_one_process_goes_on(outcome, uninterrupted):
    folder, _ = outcome
    assert json.loads((folder / "one-0.json").read_text())["one"] == pytest.approx(uninterrupted.losses[3:], rel=1e-9)
    assert_same(load_tensors(folder / "one.safetensors"), uninterrupted.final)


@pytest.mark.parametrize("run", ["run", "chain"])
def test_a_process_without_torch_distributed_goes_on(run, outcome, uninterrupted):
    """From what four processes saved, and from what two saved that had loaded it."""
    folder, _ = outcome
    model = build(4)
    optimizer = muon_clip(model.named_parameters())
    losses = go_on(Checkpoints(folder / run), model, optimizer, lambda batches: train_step(model, optimizer, batches, SETTINGS), 5)
    assert losses == pytest.approx(uninterrupted.losses[-len(losses) :], rel=1e-9)
    assert_same(model.state_dict() | optimizer.state_tensors(), uninterrupted.final)


def test_what_one_process_saved_comes_back_bit_for_bit(tmp_path):
    model = build(0)
    optimizer = muon_clip(model.named_parameters())
    batches = batches_of(0)
    model.vision_tower.requires_grad_(False)
    train_step(model, optimizer, batches, SETTINGS)
    Checkpoints(tmp_path).save(model, optimizer, state_of(1))
    other = build(1)
    others = muon_clip(other.named_parameters())
    Checkpoints(tmp_path).load("checkpoint-000001", other, others)
    found, wanted = other.state_dict() | others.state_tensors(), model.state_dict() | optimizer.state_tensors()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_export_is_what_save_writes(outcome, tmp_path):
    folder, _ = outcome
    checkpoint = folder / "run" / "checkpoint-000003"
    model = build(1)
    Checkpoints(folder / "run").load(checkpoint.name, model, muon_clip(model.named_parameters()))
    k25.save(model, tmp_path / "saved", shard_bytes=100_000)
    export(checkpoint, CONFIG, tmp_path / "exported", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == files and len(files) > 5
    for file in files:
        assert (tmp_path / "exported" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_an_export_reads_each_tensor_once_and_keeps_none(outcome, tmp_path, monkeypatch):
    read, alive = [], []
    original = shards._Stored._read

    def counted(self, name):
        read.append(name)
        tensor = original(self, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    most = []
    monkeypatch.setattr(shards._Stored, "_read", counted)
    export(outcome[0] / "run" / "checkpoint-000003", CONFIG, tmp_path / "exported", shard_bytes=1)
    assert sorted(read) == sorted(build(0).state_dict()) and max(most) <= 3


# Faults


def test_a_full_disk_is_one_line_on_every_process_and_nothing_is_lost(outcome):
    folder, _ = outcome
    line = "CheckpointError: checkpoint-000004 was not written: rank 1: [Errno 27] File too large; last good checkpoint: "
    assert told(folder, "full") == dict.fromkeys("0123", f"{line}{folder}/run/checkpoint-000003")


def test_a_kill_in_the_middle_of_a_save_is_named_by_all_others_and_loses_nothing(outcome):
    folder, codes = outcome
    assert codes == [0, 0, -signal.SIGKILL, 0]
    line = "RankLost: step 4: rank 2: no sign of life: killed, or stopped"
    assert told(folder, "kill") == dict.fromkeys("013", line)
    assert sorted(path.name for path in (folder / "run").glob("[!.]*")) == ["checkpoint-000003", "latest.json"]


def test_a_process_that_is_stuck_is_named_by_all_others(outcome):
    assert told(outcome[0], "stuck") == dict.fromkeys("023", "RankLost: step 18: rank 1: no sign of life: killed, or stopped")


def test_a_process_that_runs_out_of_memory_is_named_by_all(outcome):
    assert told(outcome[0], "memory") == dict.fromkeys("0123", "RankLost: step 17: rank 3: out of memory: cannot allocate")


class Small:
    """A model and optimizer of one tensor each."""

    def __init__(self, value):
        self.weight, self.step = torch.full((3,), float(value)), torch.tensor(value)

    def state_dict(self):
        return {"weight": self.weight}

    def state_tensors(self):
        return {"weight.step": self.step}

    def load_state_tensors(self, tensors):
        self.step = tensors["weight.step"]


STEPS_OF_A_SAVE = [(os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")]


def killed_at(number, action):
    """Run an action in a child that dies at the number-th call to the file system. Returns whether it died."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    calls = itertools.count()

    def mortal(original):
        def call(*arguments, **settings):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **settings)

        return call

    for module, name in STEPS_OF_A_SAVE:
        setattr(module, name, mortal(getattr(module, name)))
    action()
    os._exit(0)


def test_whenever_a_save_is_killed_a_whole_checkpoint_remains(tmp_path):
    remaining = []
    for number in range(100):
        run = tmp_path / str(number)
        run.mkdir()
        Checkpoints(run).save(Small(1), Small(1), state_of(1))
        died = killed_at(number, lambda: Checkpoints(run).save(Small(2), Small(2), state_of(2)))
        latest, found = Checkpoints(run).latest(), Small(0)
        Checkpoints(run).load(latest["checkpoint"], found, found)
        assert found.weight.tolist() == [latest["step"]] * 3 and int(found.step) == latest["step"]
        remaining.append(latest["step"])
        Checkpoints(run).save(Small(2), Small(2), state_of(2))  # as if resumed
        assert Checkpoints(run).latest()["step"] == 2
        if not died:
            break
    assert number >= 10 and remaining == sorted(remaining) and set(remaining) == {1, 2}


@pytest.mark.parametrize("damage, words", [
    (lambda shard: shard.write_bytes(shard.read_bytes()[:-5]), "which rank 2 wrote, has "),
    (lambda shard: shard.unlink(), "which rank 2 wrote, has 0 bytes instead of "),
    (lambda shard: shard.write_bytes(b"\xff" * shard.stat().st_size), "which rank 2 wrote, is broken"),
    (lambda shard: (shard.parent / "manifest.json").write_text("{"), "manifest.json cannot be read"),
])  # fmt: skip
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_broken_shard_is_one_line_with_its_file(part, damage, words, outcome, tmp_path):
    shutil.copytree(outcome[0] / "run", tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-000003" / part / "shard-00003-model-00001-of-00001.safetensors")
    model = build(1)
    with pytest.raises(CheckpointError, match=re.escape(words)) as refused:
        Checkpoints(tmp_path / "run").load("checkpoint-000003", model, muon_clip(model.named_parameters()))
    message = str(refused.value)
    assert "\n" not in message and f"checkpoint-000003/{part}" in message and "rank 0" in message


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 2}, "unexpected language_model.model.layers.2"),
    ({"num_hidden_layers": 4}, "missing language_model.model.layers.3"),
    ({"n_routed_experts": 4}, "this model's is (4,"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(change, words, outcome):
    model = build(1, config=replace(CONFIG, **change))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Checkpoints(outcome[0] / "run").load("checkpoint-000003", model, muon_clip(model.named_parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_precision_is_refused(outcome):
    model = build(1).float()
    with pytest.raises(CheckpointError, match=r"torch.float64, this model's is .* torch.float32"):
        Checkpoints(outcome[0] / "run").load("checkpoint-000003", model, muon_clip(model.named_parameters()))


def test_a_checkpoint_is_json_and_safetensors(outcome):
    files = [path for path in (outcome[0] / "run" / "checkpoint-000003").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
