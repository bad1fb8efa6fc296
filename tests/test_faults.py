"""Claims about train_small.py under torchrun: whatever happens to a process, all end with one line, and --resume goes on.

One run is begun on four processes and goes on, after one fault after the other, in another layout each time; what it
logged is compared with one process that was never disturbed. The faults are real: kill, stop, the kernel's limits on
memory and on the size of files.
Run: .venv/bin/python -m pytest tests/test_faults.py
"""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import parallel
import train_small
from launcher import PATIENCE, Launched, free_port
from test_parallel import flags, rows

ROOT = pathlib.Path(train_small.__file__).parent
STEPS = ("--vit-steps", "0", "--text-steps", "4", "--joint-steps", "26", "--long-steps", "0", "--accumulation", "4")
LAYOUTS = {4: ("--pp", "2", "--virtual-stages", "2", "--ep", "2", "--zero1"), 2: ("--ep", "2", "--overlap"), 1: ()}
pytestmark = pytest.mark.xdist_group("faults")


def arguments(run, processes, *more):
    return [*flags(run), *STEPS, *LAYOUTS[processes], *more]


def start(run, processes, *more):
    return Launched(run.with_name(f"{time.monotonic_ns()}"), processes, train_small.main, arguments(run, processes, *more))


def lines(text):
    """Those that are ours."""
    return [line for line in text.splitlines() if line.startswith("train_small.py: ")]


def wait_for(started, run, steps):
    """Until so many steps have been logged."""
    started.until(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) >= steps)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One process, never stopped."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    t, config, _ = train_small.read_flags([*flags(run), *STEPS])
    train_small.train(t, config)
    return rows(run)


def assert_whole(run):
    """latest.json points to a checkpoint that has all its files."""
    checkpoint = run / json.loads((run / "latest.json").read_text())["checkpoint"]
    for part in ("model", "optimizer"):
        sizes = json.loads((checkpoint / part / "manifest.json").read_text())["sizes"]
        assert sizes == {path.name: path.stat().st_size for path in (checkpoint / part).glob("*.safetensors")}


class Torchrun:
    """The real one, with train_small.py on some processes."""

    def __init__(self, run, processes, *more):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port()), "--",
                   "train_small.py", *arguments(run, processes, *more)]  # fmt: skip
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip

    def worker(self, rank):
        """Process id of one rank."""
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                    return int(path.name)
            except OSError:  # it has ended meanwhile
                continue
        raise AssertionError(f"rank {rank} does not run")

    def ended(self):
        """The processes' exit codes other than 0, and what they said."""
        said = self.process.communicate(timeout=PATIENCE)[1]
        return re.findall(r"exitcode *: (-?\d+) \(pid", said), said


def test_a_run_survives_every_fault_and_ends_as_if_nothing_had_happened(tmp_path, undisturbed):
    """Under torchrun, one of 2 ranks killed → 4, one stopped → 2, a full disk → 2, a truncated shard → 1."""
    run = tmp_path / "run"

    started, deadline = Torchrun(run, 2), time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 3:
        assert time.monotonic() < deadline and started.process.poll() is None, started.ended()
        time.sleep(0.02)
    os.kill(started.worker(1), signal.SIGKILL)
    codes, said = started.ended()
    (line,) = lines(said)
    assert "0" not in codes and len(codes) == 2, said
    assert re.search(r"stage \w+, step \d+ \(global step \d+\): rank 1: no sign of life: killed, or stopped; last good checkpoint: "
                     r"\S+/checkpoint-\d+; --resume goes on$", line), line  # fmt: skip
    assert_whole(run)

    started, done = start(run, 4, "--resume", "--patience", "5"), len(rows(run))
    wait_for(started, run, done + 2)
    os.kill(started.processes[2].pid, signal.SIGSTOP)
    started.until(lambda: lines(started.said("err")))
    started.processes[2].kill()
    codes, (line,) = started.ended(), lines(started.said("err"))
    assert 0 not in codes and "rank 2: no sign of life: killed, or stopped" in line, (codes, line)
    assert_whole(run)

    started, done = start(run, 2, "--resume"), len(rows(run))
    wait_for(started, run, done + 2)
    resource.prlimit(started.processes[1].pid, resource.RLIMIT_FSIZE, (1024, -1))
    codes, (line,) = started.ended(), lines(started.said("err"))
    assert codes == [2] * 2 and re.search(r"checkpoint-\d+ was not written: rank 1: .*File too large; last good checkpoint: ", line), (codes, line)
    assert_whole(run)

    checkpoint = run / json.loads((run / "latest.json").read_text())["checkpoint"]
    shard = checkpoint / "optimizer" / "shard-00002-model-00001-of-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    started = start(run, 2, "--resume")
    codes, (line,) = started.ended(), lines(started.said("err"))
    assert codes == [2] * 2 and f"{shard}, which rank 1 wrote, has {len(content) - 100} bytes" in line, (codes, line)
    shard.write_bytes(content)

    assert len(rows(run)) < len(undisturbed), "nothing was left to do on one process"
    t, config, _ = train_small.read_flags([*flags(run), *STEPS, "--resume"])
    train_small.train(t, config, resume=True)
    for ours, theirs in zip(rows(run), undisturbed, strict=True):
        for key in ("stage", "step", "global_step", "loss", "grad_norm", "max_logit", "load_layers"):
            assert ours[key] == (pytest.approx(theirs[key], rel=1e-8) if isinstance(theirs[key], float | list) else theirs[key]), key
    assert len([path for path in run.glob("checkpoint-*")]) == 1 and not list(run.glob(".checkpoint*"))


def hang(folder):
    open(folder / "pipe").read()  # nobody writes to it: the process lives, and does not move


def fill_memory(_):
    torch.empty(1 << 50)


def train_with(fault, folder, arguments):
    """train_small.py on a process of which rank 1 has a fault in its first step."""

    def faulty(trainer, batches):
        if os.environ["RANK"] == "1":
            fault(folder)
        return take(trainer, batches)

    take, parallel.Trainer.step = parallel.Trainer.step, faulty
    train_small.main(arguments)


@pytest.mark.parametrize("fault, verdict", [
    (hang, r"rank 1: stuck at test_faults\.py:\d+ \(hang\)"),
    (fill_memory, r"rank 1: out of memory: .*can't allocate memory"),
])  # fmt: skip
def test_a_process_that_fails_in_a_step_is_named_with_the_cause(fault, verdict, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    started = Launched(tmp_path / "ranks", 2, train_with, fault, tmp_path, arguments(tmp_path / "run", 2, "--patience", "3"))
    started.until(lambda: lines(started.said("err")))
    started.processes[1].kill()
    codes, (line,) = started.ended(), lines(started.said("err"))
    assert 0 not in codes, codes
    assert re.match(rf"train_small.py: stage text, step 0 \(global step 1\): {verdict}", line), line
    assert line.endswith("; last good checkpoint: none yet; --resume goes on")


def test_an_impossible_layout_is_one_line_and_exit_code_2_on_every_rank(tmp_path):
    started = Launched(tmp_path / "ranks", 2, train_small.main, flags(tmp_path / "run", "--ep", "4"))
    assert started.ended() == [2] * 2
    assert lines(started.said("err")) == [
        "train_small.py: --ep 4 does not divide --dp 2; nearest: --pp 1 --virtual-stages 1 --ep 2 --dp 2 --microbatches 1"]  # fmt: skip
    assert not (tmp_path / "run").exists()
