"""Processes for tests that need several. They are forked from one that has loaded the project: who starts pays nothing.

Public names: free_port, forkserver, Launched
"""

import gc
import multiprocessing.forkserver
import os
import socket
import sys
import time
from unittest import mock

import torch
import torch.distributed as dist

PATIENCE = 300  # seconds after which a hang is a failure
gc.freeze()  # what is loaded by now no collection looks through any more, in the server's forks neither


def free_port():
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forkserver():
    """The context of processes that are forked from a server of this test run, which has never computed anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_small", "trials", "dep_bench", "scale_bench", "launcher", "test_parallel", "test_shards", "test_faults"])
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "9"}
    with mock.patch.dict(os.environ, settings):
        multiprocessing.forkserver.ensure_running()
    return context


class Launched:
    """A function on some processes that find each other as under torchrun, and end so: all, as soon as one has failed.

    folder: pathlib.Path, for what they print; world: how many; function: of a module; arguments: its own. `processes` are
    there to be killed, stopped and limited.
    """

    def __init__(self, folder, world, function, *arguments):
        folder.mkdir()
        self.folder, self.terminated = folder, False
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them all
        common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        context = forkserver()
        self.processes = [context.Process(target=_rank, args=(folder, common | {"RANK": rank, "LOCAL_RANK": rank}, function, arguments))
                          for rank in range(world)]  # fmt: skip
        for process in self.processes:
            process.start()

    def until(self, seen):
        """Until something has happened, at the latest to the last process."""
        deadline = time.monotonic() + PATIENCE
        while not (happened := seen()) and any(process.is_alive() for process in self.processes):
            if not self.terminated and any(process.exitcode for process in self.processes):
                self.terminated = True
                for process in self.processes:
                    process.terminate()
            assert time.monotonic() < deadline, self.said("err")
            time.sleep(0.02)
        assert happened or seen(), self.said("err")

    def ended(self):
        """Wait for all. Returns their exit codes."""
        self.until(lambda: not any(process.is_alive() for process in self.processes))
        return [process.exitcode for process in self.processes]

    def said(self, stream):
        """What all have printed. stream: "out" or "err"."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*.{stream}")))


def _rank(folder, environment, function, arguments):
    os.environ |= {name: str(value) for name, value in environment.items()}
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{environment['RANK']}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    function(*arguments)
