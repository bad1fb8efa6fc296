"""Checkpoints of a run on many processes: written once, loaded in any other layout, never lost — K2.5 report 4.5.

    RUN/latest.json                      the last good checkpoint: its name, stage, step, global step, data position
    RUN/checkpoint-000100/state.json     the same
                          model/         shard-00001-….safetensors: rank 0's part, and so on; manifest.json: their sizes
                          optimizer/     momenta and step counters, the same way, under the names of MuonClip.state_tensors

Each tensor carries its released name, experts stacked. torch.distributed.checkpoint decides who writes what: of copies
only one is written, by the rank that has least to write; a share of the experts is written as rows of the whole tensor,
and the header of its file says which. So nothing in a checkpoint depends on the layout it came from. The files are
safetensors, not that library's own format, which is pickled.

All ranks write into a hidden directory. Only when all of them have succeeded does rank 0 rename it, point latest.json
to it, and remove the checkpoint before; whoever is killed when, latest.json points to a whole checkpoint.

When a process dies or hangs, the others' collectives fail, at once or after their patience; Watch then finds out who it
was, so that all end with one line.

Public names: RankLost, out_of_memory, Watch, Checkpoints, export.
Letters: none.     Tests: pytest tests/test_shards.py
"""

import contextlib
import datetime
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from checkpoint import CheckpointError, replace_directory, write_file
from k25 import K25, save
from parallel import ranks

PARTS = ("model", "optimizer")


class RankLost(RuntimeError):
    """A process has died or hangs, so that nothing more can be done together; the message says which, when and why."""


def out_of_memory(error):
    """Whether an exception says that there was no more memory; torch's CPU parts say it in a RuntimeError, each in its words."""
    words = ("allocate memory", "bad_alloc", "could not create a memory object")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _of_another(error):
    """Whether an exception says that another process did not answer: it is of the collectives."""
    words = r"gloo|NCCL|[Cc]onnection|[Tt]imed? ?out|[Bb]roken pipe|[Pp]eer"
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


# -------------------------------------------------------------------------------------------- who is lost


class Watch:
    """Knows which process is to blame when a step fails.

    Each process shows again and again, in the store of torchrun or in one that is given, that it is alive and which line
    of Python it is at. Nobody is ended for being silent: only when something has failed is it asked who is, or who has
    not moved and has not failed either; the first to know leaves word.
    store: torch.distributed.Store that outlives the processes; silence: seconds without a sign that mean dead or stuck.
    """

    def __init__(self, store=None, silence=4.0):
        self.rank, self.world = ranks()
        self.silence, self.busy, self.ended, self.over = silence, False, False, threading.Event()
        if self.world == 1:
            return
        store = store or dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        signal.signal(signal.SIGTERM, self._terminated)
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _terminated(self, *_):
        """torchrun terminates all others as soon as one process has died. They have still to say which: what they do
        together will fail for the same reason, or come to its end."""
        self.ended = True
        if not self.busy:
            sys.exit(128 + signal.SIGTERM)

    def _beat(self):
        main = threading.main_thread().ident
        for count in itertools.count():
            frame = sys._current_frames()[main]
            place = f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
            with contextlib.suppress(RuntimeError):  # without the store there is nobody to show it to
                self.store.set(f"beat/{self.rank}", json.dumps([count, place]))
            if self.over.wait(self.silence / 8):
                return

    def close(self):
        """No more signs: this process is done. A thread still at the store when Python ends would abort the process."""
        self.over.set()
        if self.world > 1:
            self.thread.join(self.silence)

    @contextlib.contextmanager
    def during(self, what):
        """Around what all processes do together: whatever goes wrong on any of them becomes a RankLost on all.

        what: "step 17". A CheckpointError passes: all have met it and are well.
        """
        self.busy = True
        try:
            yield
            if self.ended:
                sys.exit(128 + signal.SIGTERM)
        except CheckpointError:
            raise
        except Exception as error:
            if self.world == 1 and not out_of_memory(error):
                raise
            raise RankLost(f"{what}: {self._verdict(error)}") from error
        finally:
            self.busy = False

    def _verdict(self, error):
        """Who failed, and of what: whom another process has found out, else who is silent, else this one."""
        while error.__cause__:  # torch's pipeline wraps what it meets
            error = error.__cause__
        full = out_of_memory(error)
        verdict = f"rank {self.rank}: {'out of memory: ' if full else ''}{_one_line(error)}"
        if self.world == 1:
            return verdict
        try:
            if not full and _of_another(error):
                verdict = self._found_out() or verdict
            self.store.set(f"word/{self.rank}", verdict)
        except RuntimeError:
            return f"{verdict}; the store of all processes has gone with one of them"
        return verdict

    def _found_out(self):
        self.store.set(f"failed/{self.rank}", "")
        before, began = self._read("beat"), time.monotonic()
        while time.monotonic() < began + self.silence:
            if words := self._read("word"):
                return next(iter(words.values()))
            time.sleep(self.silence / 20)
        after, failed = self._read("beat"), self._read("failed")
        silent = [str(rank) for rank, beat in after.items() if before.get(rank) == beat]
        if silent:
            return f"rank {', '.join(silent)}: no sign of life: killed, or stopped"
        places = {rank: (json.loads(before[rank])[1], json.loads(beat)[1]) for rank, beat in after.items() if rank in before}
        still = [f"rank {rank}: stuck at {place}" for rank, (place, now) in places.items() if place == now and rank not in failed]
        return "; ".join(still)

    def _read(self, kind):
        others = {rank: f"{kind}/{rank}" for rank in range(self.world) if rank != self.rank}
        return {rank: self.store.get(key).decode() for rank, key in others.items() if self.store.check([key])}

    def leave(self, message, code=1):
        """End this process without waiting for any other; the first to leave says why."""
        try:
            first = self.world == 1 or self.store.add("left", 1) == 1
        except RuntimeError:
            first = True
        if first:
            print(f"\n{message}", file=sys.stderr, flush=True)  # on a line of its own, below anybody's progress bar
        os._exit(code)  # destructors would wait for the lost


# ---------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The checkpoints of one run. Every process builds one, and calls save and load together with all others.

    run: the run's directory, on a file system that all see; patience: seconds to wait for the slowest process.
    """

    def __init__(self, run, patience=300):
        self.run, self.rank = pathlib.Path(run), ranks()[0]
        several = ranks()[1] > 1
        # A group of its own, on the CPU: its waits are bounded by their own patience, whatever the training's are.
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=patience)) if several else None
        self.settings = {"process_group": self.group, "no_dist": not several}

    def latest(self):
        """What latest.json says, or None before the first checkpoint."""
        path = self.run / "latest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, model, optimizer, state):
        """Write a checkpoint, point to it, drop the one before.

        model: K25, or a process's part of it; optimizer: its MuonClip or Trainer; state: dict with "global_step" and all
        that is to come back in latest.json, JSON, the same on every process. A checkpoint of this step that is already
        the last good one stays. Raises CheckpointError on every process when one could not write, and RankLost.
        """
        name = f"checkpoint-{state['global_step']:06d}"
        with self._in_one_line(f"{self.run / 'latest.json'} cannot be read"):
            latest = self._first(self.latest)
        if latest and latest["checkpoint"] == name:
            return
        good = self.run / latest["checkpoint"] if latest else "none yet"
        unfinished = self.run / f".{name}.tmp"
        try:
            with self._in_one_line(f"{name} was not written", f"; last good checkpoint: {good}"):
                self._first(lambda: _empty_directory(unfinished))
                for part, tensors in zip(PARTS, (model.state_dict(), optimizer.state_tensors())):
                    writer = HuggingFaceStorageWriter(unfinished / part, save_distributed=True)
                    dcp.save(_placed(tensors, optimizer), storage_writer=writer, **self.settings)
                self._first(lambda: self._publish(unfinished, name, state))
        except CheckpointError:  # all have stopped writing: give the room on the disk back
            if self.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _publish(self, unfinished, name, state):
        for part in PARTS:
            sizes = {file.name: file.stat().st_size for file in sorted((unfinished / part).iterdir())}
            write_file(unfinished / part / "manifest.json", json.dumps({"sizes": sizes}, indent=2) + "\n")
        content = json.dumps({"checkpoint": name} | state, indent=2) + "\n"
        write_file(unfinished / "state.json", content)
        replace_directory(unfinished, self.run / name)
        write_file(self.run / "latest.json", content)
        for old in self.run.glob("checkpoint-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, name, model, optimizer):
        """Fill a model and its optimizer from a checkpoint that any layout has written.

        name: its directory's; model, optimizer: as for `save`. Raises CheckpointError on every process when a file is
        missing, truncated or of another model, naming the process that wrote it, and RankLost.
        """
        path = self.run / name
        with self._in_one_line(f"{path} cannot be loaded"):
            stored = self._everyone(lambda: [_metadata(path / part) for part in PARTS])
            whole = _whole_state(model, optimizer)
            mine = [_placed(model.state_dict(), optimizer), _placed(_empty_state(stored[1], optimizer), optimizer)]
            self._everyone(lambda: _check_fit(path, stored, whole, mine[0]))
            for part, tensors in zip(PARTS, mine):
                dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path / part), **self.settings)
        optimizer.load_state_tensors({key: t.to_local() if isinstance(t, DTensor) else t for key, t in mine[1].items()})

    # Acting together

    def _first(self, action):
        """Do something on rank 0; when it fails, everybody fails. Returns rank 0's result."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        if self.group:
            dist.broadcast_object_list(outcome, group=self.group)
        if outcome[1]:
            raise CheckpointException("", {0: (outcome[1], None)})
        return outcome[0]

    def _everyone(self, action):
        """Do something on each rank; when one fails, everybody fails. Returns this rank's result."""
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        failures = [failure]
        if self.group:
            failures = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(failures, failure, group=self.group)
        if any(failures):
            raise CheckpointException("", {rank: (error, None) for rank, error in enumerate(failures) if error})
        return result

    @contextlib.contextmanager
    def _in_one_line(self, what, after=""):
        """Turn what the collectives raise into one line that names the rank and the cause."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: that is meant
                yield
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise CheckpointError(f"{what}: rank {rank}: {_one_line(cause)}{after}") from None
        except RuntimeError as error:  # of the collectives themselves: what ranks do between them comes as above
            raise RankLost(f"{what}: rank {self.rank} has lost contact with another: {_one_line(error)}{after}") from None


def _one_line(error):
    line = (str(error).splitlines() or [""])[0].partition(". This is typically")[0]  # gloo goes on with advice
    return re.sub(r"^\[\S*\.cc:\d+\] ", "", line) or f"{type(error).__name__} at {_innermost(error)}"


def _innermost(error):
    """File, line and function in which an exception was raised."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    return f"{pathlib.Path(frame.f_code.co_filename).name}:{line} ({frame.f_code.co_name})"


def _empty_directory(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


# ------------------------------------------------------------------------------- parts of whole tensors


def _placed(tensors, optimizer):
    """Tensors of this process, each share of the experts marked as rows of the whole. optimizer: Trainer or MuonClip."""
    place = getattr(optimizer, "place", None)
    if place is None or place.layout.ep == 1:
        return tensors
    dp, ep = place.layout.dp, place.layout.ep
    replicas = torch.arange(place.pp_rank * dp, (place.pp_rank + 1) * dp).view(dp // ep, ep)  # (dp/ep,ep) ranks of this pipeline rank
    mesh = DeviceMesh.from_group([place.copies, place.ep], place.device.type, replicas, mesh_dim_names=("copies", "ep"))
    return {name: DTensor.from_local(tensor.detach(), mesh, [Replicate(), Shard(0)], run_check=False)
            if ".mlp.experts." in name and tensor.ndim else tensor for name, tensor in tensors.items()}  # fmt: skip


def _whole_state(model, optimizer):
    """The state dict of the whole model of which `model` may be a part, without its values."""
    if not hasattr(optimizer, "place"):
        return model.state_dict()
    with torch.device("meta"):
        return K25(model.config).state_dict()


def _empty_state(stored, optimizer):
    """Room for this process's part of an optimizer's state. stored: Metadata of the whole. Returns {name: tensor}."""
    whole = {key: torch.empty(found.size, dtype=found.properties.dtype, device="meta")
             for key, found in stored.state_dict_metadata.items()}  # fmt: skip
    own = optimizer.own_state(whole) if hasattr(optimizer, "place") else whole
    return {key: torch.empty_like(tensor, device="cpu") for key, tensor in own.items()}


# --------------------------------------------------------------------------------------------- reading


def _metadata(directory):
    """What the shards in a directory hold, from their headers. Raises CheckpointError when one is not whole."""
    try:
        sizes = json.loads((directory / "manifest.json").read_text())["sizes"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{directory / 'manifest.json'} cannot be read: {error}") from None
    for file, size in sizes.items():
        path, writer = directory / file, int(file.split("-")[1]) - 1
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise CheckpointError(f"{path}, which rank {writer} wrote, has {found} bytes instead of {size}: fetch the file again")
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}, which rank {writer} wrote, is broken: {error}") from None
    return HuggingFaceStorageReader(directory).read_metadata()


def _check_fit(path, stored, whole, mine):
    """Refuse a checkpoint of another model. stored: Metadata of model and optimizer; whole: {name: tensor} of the whole
    model; mine: of this process's part, global shapes."""
    model, optimizer = (part.state_dict_metadata for part in stored)
    strangers = [name for name in model if name not in whole] + [key for key in optimizer if key.rpartition(".")[0] not in whole]
    if strangers:
        raise CheckpointError(f"{path}: unexpected {strangers[0]}: it is of another model")
    for name, tensor in mine.items():
        if name not in model:
            raise CheckpointError(f"{path}: missing {name}: it is of another model")
        shape, dtype = tuple(model[name].size), model[name].properties.dtype
        if (shape, dtype) != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(f"{path}: {name} is {shape} {dtype}, this model's is {tuple(tensor.shape)} {tensor.dtype}")


class _Stored(dict):
    """A whole model's state dict of which each tensor is read when it is asked for, and not kept.

    Its values are meta tensors for whoever walks over them; directory: of the shards; config: K25Config.
    """

    def __init__(self, directory, config):
        with torch.device("meta"):
            expected = K25(config).state_dict()
        self.found = _metadata(directory)
        stored = self.found.state_dict_metadata
        if missing := [name for name in expected if name not in stored]:
            raise CheckpointError(f"{directory}: missing {missing[0]}: it is of another model")
        super().__init__({name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype, device="meta") for name in expected})
        self.read = functools.lru_cache(maxsize=1)(self._read)  # one stack of experts is asked for once per expert

    def __getitem__(self, name):
        return self.read(name)

    def _read(self, name):
        whole = torch.empty_like(super().__getitem__(name), device="cpu")
        for index, stored in self.found.storage_data.items():
            if index.fqn == name:
                with safe_open(stored.relative_path, "pt") as file:
                    whole[tuple(slice(at, at + size) for at, size in zip(index.offset, stored.shape))] = file.get_tensor(name)
        return whole


def export(checkpoint, config, directory, **settings):
    """Write the model of a checkpoint in the released layout, as k25.save would from the model put together.

    Tensors are read as they are written, so that memory holds one shard of the release and not the model.
    checkpoint: directory of the checkpoint; config: K25Config; directory: to write; settings: int4, shard_bytes.
    """
    stored = _Stored(pathlib.Path(checkpoint) / "model", config)
    save(SimpleNamespace(config=config, state_dict=lambda: stored), directory, **settings)
