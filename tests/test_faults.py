"""Claims about train_small.py under torchrun: whatever happens to a process, all end with one line, and --resume goes on.

One run is begun on four processes and goes on, after one fault after the other, in another layout each time; what it
logged is compared with one process that was never disturbed. The faults are real: kill, stop, the kernel's limits on
memory and on the size of files.
Run: .venv/bin/python -m pytest tests/test_faults.py
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

import train_small
from test_parallel import flags, free_port, rows

ROOT = pathlib.Path(train_small.__file__).parent
STEPS = ("--vit-steps", "0", "--text-steps", "4", "--joint-steps", "26", "--long-steps", "0", "--accumulation", "4")
LAYOUTS = {4: ("--pp", "2", "--virtual-stages", "2", "--ep", "2", "--zero1"), 2: ("--ep", "2", "--overlap"), 1: ()}
pytestmark = pytest.mark.xdist_group("faults")
PATIENCE = 240  # seconds after which a hang is a failure


class Torchrun:
    """train_small.py on some processes, with its error lines as they come."""

    def __init__(self, run, processes, *more, script="train_small.py"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port()), "--",
                   str(script), *flags(run), *STEPS, *LAYOUTS[processes], *more]  # fmt: skip
        self.run, self.lines = run, []
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")), daemon=True)
        self.reader.start()

    def worker(self, rank):
        """Process id of one rank."""
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                    return int(path.name)
            except OSError:  # it has ended meanwhile
                continue
        raise AssertionError(f"rank {rank} does not run: {''.join(self.lines)}")

    def kill(self, rank):
        """End what does not end itself, as torchrun would half a minute later."""
        with contextlib.suppress(AssertionError, ProcessLookupError):  # it has ended meanwhile
            os.kill(self.worker(rank), signal.SIGKILL)

    def wait_for(self, steps):
        """Until so many steps have been logged."""
        self.until(lambda: (self.run / "metrics.jsonl").exists() and len(rows(self.run)) >= steps)

    def until(self, seen):
        """Until something has happened while the processes run."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < deadline, "".join(self.lines)
            if self.process.poll() is not None:
                self.reader.join()
                assert seen(), "".join(self.lines)
            time.sleep(0.02)

    def ended(self):
        """The processes' exit codes other than 0, and the lines that are ours."""
        self.process.wait(PATIENCE)
        self.reader.join()
        text = "".join(self.lines)
        return re.findall(r"exitcode *: (-?\d+) \(pid", text), [line for line in text.splitlines() if line.startswith("train_small.py: ")]


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


def test_a_run_survives_every_fault_and_ends_as_if_nothing_had_happened(tmp_path, undisturbed):
    """4 ranks, one killed → 2, one stopped → 2, a full disk → 2, a truncated shard → 1."""
    run = tmp_path / "run"

    started = Torchrun(run, 4)
    started.wait_for(3)
    os.kill(started.worker(2), signal.SIGKILL)
    codes, lines = started.ended()
    assert "0" not in codes and len(codes) == 4 and len(lines) == 1, (codes, lines)
    assert re.search(r"stage \w+, step \d+ \(global step \d+\): rank 2: no sign of life: killed, or stopped; last good checkpoint: "
                     r"\S+/checkpoint-\d+; --resume goes on$", lines[0]), lines  # fmt: skip
    assert_whole(run)

    started, done = Torchrun(run, 2, "--resume", "--patience", "5"), len(rows(run))
    started.wait_for(done + 2)
    os.kill(started.worker(1), signal.SIGSTOP)
    started.until(lambda: any("train_small.py: " in line for line in started.lines))
    started.kill(1)
    codes, lines = started.ended()
    assert len(codes) == 2 and len(lines) == 1 and "rank 1: no sign of life: killed, or stopped" in lines[0], (codes, lines)
    assert_whole(run)

    started, done = Torchrun(run, 2, "--resume"), len(rows(run))
    started.wait_for(done + 2)
    resource.prlimit(started.worker(1), resource.RLIMIT_FSIZE, (1024, -1))
    codes, lines = started.ended()
    assert codes == ["2"] * 2 and len(lines) == 1, (codes, lines)
    assert re.search(r"checkpoint-\d+ was not written: rank 1: .*File too large; last good checkpoint: ", lines[0]), lines
    assert_whole(run)

    checkpoint = run / json.loads((run / "latest.json").read_text())["checkpoint"]
    shard = checkpoint / "optimizer" / "shard-00002-model-00001-of-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    codes, lines = Torchrun(run, 2, "--resume").ended()
    assert codes == ["2"] * 2 and len(lines) == 1 and f"{shard}, which rank 1 wrote, has {len(content) - 100} bytes" in lines[0], (codes, lines)
    shard.write_bytes(content)

    assert len(rows(run)) < len(undisturbed), "nothing was left to do on one process"
    t, config, _ = train_small.read_flags([*flags(run), *STEPS, "--resume"])
    train_small.train(t, config, resume=True)
    for ours, theirs in zip(rows(run), undisturbed, strict=True):
        for key in ("stage", "step", "global_step", "loss", "grad_norm", "max_logit", "load_layers"):
            assert ours[key] == (pytest.approx(theirs[key], rel=1e-8) if isinstance(theirs[key], float | list) else theirs[key]), key
    assert len([path for path in run.glob("checkpoint-*")]) == 1 and not list(run.glob(".checkpoint*"))


@pytest.mark.parametrize("fault, verdict", [
    ("open({pipe!r}).read()", r"rank 1: stuck at faulty\.py:4 \(faulty\)"),  # a pipe that nobody writes to: it hangs, but it lives
    ("torch.empty(1 << 50)", r"rank 1: out of memory: .*can't allocate memory"),
], ids=["hangs", "memory"])  # fmt: skip
def test_a_process_that_fails_in_a_step_is_named_with_the_cause(fault, verdict, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "faulty.py").write_text(
        "import os, torch, parallel, train_small\n"
        "def faulty(trainer, batches):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        {fault.format(pipe=str(tmp_path / 'pipe'))}\n"
        "    return take(trainer, batches)\n"
        "take, parallel.Trainer.step = parallel.Trainer.step, faulty\n"
        "train_small.main()\n")  # fmt: skip
    started = Torchrun(tmp_path / "run", 2, "--patience", "3", script=tmp_path / "faulty.py")
    started.until(lambda: any("train_small.py: " in line for line in started.lines))
    started.kill(1)
    codes, lines = started.ended()
    assert len(codes) == 2 and len(lines) == 1, (codes, lines)
    assert re.match(rf"train_small.py: stage text, step 0 \(global step 1\): {verdict}", lines[0]), lines
    assert lines[0].endswith("; last good checkpoint: none yet; --resume goes on")
