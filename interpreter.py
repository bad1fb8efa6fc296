"""Runs model-written Python, each call in a process of its own: the tool of zero-vision SFT and RL — report 2.2 and 4.4.

    python interpreter.py run PROGRAM.py --image PICTURE.png     what a model would be told
    python interpreter.py bench                                  calls per second, and where the time goes

    with InterpreterPool(workers=2) as pool:
        observation = await pool.run("(np.asarray(Image.open('image.png')) < 128).mean()", [picture])
        observation = pool.call("print(1)")                      the same for a caller without an event loop

A call has an empty folder with its pictures, `image.png`, `image1.png`, …; numpy is bound as `np`, PIL's Image as `Image`.
It has nothing else: no network, one process with one thread, limits of time, memory and disk, an environment without
anything of ours. The same program gives the same text: hashes, `random` and `np.random` are seeded, addresses left out.

Each worker is a warm process, the *zygote* (zygote.py), which forks a child per call. So a call costs milliseconds, and
nothing of it outlives it: variables, patched modules, files and random state end with the child, and what the zygote
held of it in memory is overwritten when freed. The zygote never runs what a model wrote; it keeps the time, kills, clears
up, and is replaced if it dies.

What confines the child:
    rlimits           CPU time, address space, file size, open files, no further process or thread
    user              as root: a random user id that owns nothing
    namespaces        as root: no network devices; as its folder, a file system of limited size
    Landlock          (Linux 5.13) files: reads Python's libraries and /usr, writes its folder, nothing else
    seccomp           (x86-64, arm64) some 90 system calls and no others: no socket, exec, fork, kill, ptrace, mount
    audit hook        of sandbox.py: says in words what is refused; where the kernel gives nothing, all that refuses
`notes` names the layers that a machine does not give.

It protects against programs that go wrong, that cheat, and that try from Python, or through native code that they talk
numpy or PIL into running, what hostile programs try. It does not protect against a fault of the kernel or the processor
(side channels, a bug behind an allowed system call); names and sizes of files outside can be asked for; and past the audit
hook, short scraps of earlier programs may be found in memory. Without seccomp and Landlock, as on macOS, it stops nobody
who means to break out. Whoever expects such programs puts the tools into a virtual machine.

Public names: LIMITS, Observation, InterpreterError, Interpreter, InterpreterPool, main.
Tests: pytest tests/test_interpreter.py
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

from PIL import Image

from sandbox import Limits, environment, framed, kill_group, kill_marked, library_path, receive, send

ROOT = pathlib.Path(__file__).resolve().parent
LIMITS = Limits(seconds=5.0, start_seconds=60.0, cpu_seconds=5, memory_mb=512, file_mb=16, output_bytes=1 << 13, message_mb=64)
# The same hashes everywhere; and memory from malloc reads 0, or an uninitialised array would show earlier calls' pixels.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "GLIBC_TUNABLES": "glibc.malloc.perturb=255:glibc.malloc.tcache_count=0"}
_SCRIPT = "import sys; sys.path[:] = sys.argv[2:]; import zygote; zygote.serve(int(sys.argv[1]))"


class InterpreterError(ValueError):
    """An interpreter that cannot start or is closed, or pictures of a wrong kind; never what a program did."""


@dataclass(frozen=True)
class Observation:
    """What became of one call.

    text: what the program printed, then the value of a last bare expression, or one line that says what went wrong
    status: "ok", "error" (it raised), "timeout", "memory", "died" (a crash, os._exit), "refused" (it raised what a
    forbidden act raises), "output" (a flood of it), "cancelled", or "lost" (the machinery failed twice)
    seconds: from the request to a clean end; truncated: whether text is only the beginning of what was printed
    refused: forbidden acts that the audit hook saw, also those whose exception was caught; at most 20
    split: seconds of each part of the call and of processor time, for the bench
    """

    text: str
    status: str
    seconds: float = field(default=0.0, compare=False)
    truncated: bool = False
    refused: tuple[str, ...] = ()
    split: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def valid(self):
        """Whether it says anything about the program; a failure of the machinery is no wrong answer (bug 62)."""
        return self.status not in ("cancelled", "lost")


# ------------------------------------------------------------------------------ the caller's side


class _Call:
    """One request; another thread may cancel it at any time."""

    def __init__(self, code, images, seconds):
        if not isinstance(code, str):
            raise InterpreterError(f"a program is text, not {type(code).__name__}")
        if not 0 < seconds < 1e6:
            raise InterpreterError(f"{seconds} seconds is no time to run in: give a positive number")
        for image in images:
            if image.mode != "RGB":
                raise InterpreterError(f"a picture has mode {image.mode}: convert it to RGB")
        header = {"code": code, "sizes": [image.size for image in images], "seconds": seconds}
        self.message = framed(json.dumps(header).encode(), b"".join(image.tobytes() for image in images))
        self.seconds = seconds
        self.cancelled = False
        self.interpreter = None  # that has it in hand


class Interpreter:
    """One worker: a zygote, started at once, and the calls that it answers one after the other.

    limits: Limits; memory_mb is beyond what Python and numpy occupy, output_bytes are characters of an Observation's
    text, cpu_seconds holds per call.  notes: layers of protection that this machine does not give, in words.
    Not for several threads at once but for `cancel`. Raises InterpreterError when it cannot start.
    """

    def __init__(self, limits=LIMITS):
        if os.name != "posix":
            raise InterpreterError("the interpreter needs process limits that only Linux and macOS have")
        self.limits = limits
        self._lock, self._current = threading.Lock(), None  # the call that the zygote has
        self._process, self._closed = None, False
        self._start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def run(self, code, images=(), seconds=None):
        """Run a program. code: str; images: PIL images in RGB; seconds: wall time instead of limits.seconds.

        Returns Observation, whatever the program does. Raises InterpreterError for wrong pictures and when closed.
        """
        return self.answer(_Call(code, images, self.limits.seconds if seconds is None else seconds))

    def answer(self, call):
        """The Observation of a prepared call; a worker that dies meanwhile is replaced, and the call made again."""
        if len(call.message) > self.limits.message_mb << 20:
            raise InterpreterError(f"a call of {len(call.message):,} bytes is over the limit of {self.limits.message_mb} MB")
        if self._closed:
            raise InterpreterError("the interpreter is closed")
        for _ in range(2):
            try:
                if self._process is None:
                    self._start()
                return self._exchange(call)
            except (OSError, EOFError, InterpreterError) as error:
                reason = str(error) or "its process ended"
                self._stop()
        return Observation(f"Lost: the interpreter failed twice: {reason}", "lost")

    def cancel(self, call):
        """Kill a call if it is the one that runs; from any thread."""
        with self._lock, contextlib.suppress(OSError):  # the worker has died
            if self._current is call:
                send(self._socket.fileno(), framed(b""))

    def close(self):
        """End the zygote and what it runs, and remove its folder."""
        self._closed = True
        self._stop()

    def _start(self):
        folder = tempfile.mkdtemp(prefix="interpreter-")
        self._mark = f"K25_SANDBOX={secrets.token_hex(16)}"
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-s", "-P", "-B", "-c", _SCRIPT, str(theirs.fileno()), str(ROOT), *library_path([ROOT])]
            self._process = subprocess.Popen(
                command, cwd="/", env=environment(folder, self._mark) | _ENVIRONMENT, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self._folder = folder
        settings = {"folder": os.path.realpath(folder), "limits": dataclasses.asdict(self.limits)}
        try:
            self._patience(self.limits.start_seconds)
            send(self._socket.fileno(), framed(json.dumps(settings).encode()))
            ready = json.loads(receive(self._socket.fileno())[0])
        except (OSError, EOFError) as error:
            ready = {"error": str(error) or "its process ended"}
        if "error" in ready:
            self._stop()
            raise InterpreterError(f"the interpreter cannot start: {ready['error']}")
        self.notes = ready["notes"]

    def _exchange(self, call):
        try:
            with self._lock:
                if call.cancelled:
                    return Observation("Cancelled: by the caller", "cancelled")
                self._current = call
                self._patience(call.seconds + self.limits.start_seconds)
                send(self._socket.fileno(), call.message)
            reply = json.loads(receive(self._socket.fileno())[0])
        finally:
            with self._lock:
                self._current = None
        return Observation(**reply | {"refused": tuple(reply["refused"])})

    def _patience(self, seconds):
        """How long to wait for the zygote, which keeps the time of a call itself."""
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds) + 1, 0))

    def _stop(self):
        if self._process is None:
            return
        self._socket.close()  # the zygote kills its child, clears up and ends
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            kill_group(self._process.pid)
            self._process.wait()
        kill_marked(self._mark)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._process = None


class InterpreterPool:
    """Several workers behind one queue, for coroutines of any event loop and for threads.

    workers: processes; limits: Limits of each call; queue: calls, with their pictures, that may wait for a worker; of
    coroutines and of threads each. Further callers wait until there is room, in order; nobody is turned away.
    notes: as of Interpreter. Raises InterpreterError when a worker cannot start.
    """

    def __init__(self, workers=1, limits=LIMITS, queue=None):
        if workers < 1 or (queue is not None and queue < 1):
            raise InterpreterError(f"{workers} workers and a queue of {queue} cannot do anything: give at least 1")
        self.workers, self._limits, self._queue = workers, limits, queue or 4 * workers
        self._threads = ThreadPoolExecutor(workers, "interpreter")  # each waits for one worker's answer
        self._door, self._doors = threading.BoundedSemaphore(self._queue), weakref.WeakKeyDictionary()
        self._calls, self._idle, self._closed = set(), SimpleQueue(), False
        failure = None
        for started in [self._threads.submit(Interpreter, limits) for _ in range(workers)]:
            try:
                self._idle.put(started.result())
                self.notes = started.result().notes
            except (InterpreterError, OSError) as error:
                failure = error
        if failure:
            self.close()
            raise failure

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    async def run(self, code, images=(), seconds=None):
        """`Interpreter.run` for a coroutine. Cancelling it, as `asyncio.wait_for` does, kills the program (bug 62)."""
        door = self._doors.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._queue))
        async with door:
            call, future = self._submit(code, images, seconds)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                self._cancel(call)
                raise

    def call(self, code, images=(), seconds=None):
        """`Interpreter.run` for a thread, which waits. Ctrl-C kills the program."""
        with self._door:
            call, future = self._submit(code, images, seconds)
            try:
                return future.result()
            except BaseException:
                self._cancel(call)
                raise

    def close(self):
        """Kill what runs, answer what waits with "cancelled", and end the workers. Further calls raise InterpreterError."""
        self._closed = True
        for call in list(self._calls):
            self._cancel(call)
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _submit(self, code, images, seconds):
        if self._closed:
            raise InterpreterError("the pool is closed")
        call = _Call(code, images, self._limits.seconds if seconds is None else seconds)
        self._calls.add(call)
        future = self._threads.submit(self._work, call)
        future.add_done_callback(lambda _: self._calls.discard(call))
        return call, future

    def _work(self, call):
        interpreter = call.interpreter = self._idle.get()
        try:
            return interpreter.answer(call)
        finally:
            self._idle.put(interpreter)

    def _cancel(self, call):
        call.cancelled = True
        if call.interpreter is not None:
            call.interpreter.cancel(call)


# ------------------------------------------------------------------------ bench and command line

BENCH = {  # name: (program, picture's side or None)
    "arithmetic": ("1 + 1", None),
    "count pixels": ("a = np.asarray(Image.open('image.png').convert('L'))\nprint((a < 128).sum())", 84),
    "find a box": (
        "a = np.asarray(Image.open('image.png')).astype(int)\nys, xs = np.where(np.abs(a - [200, 30, 30]).sum(-1) < 90)\n"
        "(xs.min(), ys.min(), xs.max(), ys.max())", 224,
    ),
    "crop and enlarge": ("Image.open('image.png').crop((20, 20, 60, 60)).resize((160, 160)).save('part.png')", 224),
    "error": ("values = [1, 2]\nvalues[5]", None),
}  # fmt: skip


def _picture(side):
    image = Image.new("RGB", (side, side), "white")
    image.paste((200, 30, 30), (side // 4, side // 4, side // 2, side // 2))
    return image


def _time(interpreter, code, images, calls):
    """Medians over calls, in seconds: by the caller's clock, of processor time, and of each part; and the last status."""
    for _ in range(20):
        interpreter.run(code, images)
    rows = []
    for _ in range(calls):
        begun, used = time.perf_counter(), time.process_time()
        observation = interpreter.run(code, images)
        seconds = time.perf_counter() - begun
        processor = time.process_time() - used + observation.split["processor"]
        rows.append(observation.split | {"caller": seconds - observation.seconds, "seconds": seconds, "processor": processor})
    return {"status": observation.status} | {part: statistics.median(row[part] for row in rows) for part in rows[0]}


async def _together(pool, calls):
    """Calls per second of a pool that many coroutines use at once."""
    begun = time.perf_counter()
    await asyncio.gather(*(pool.run("1 + 1") for _ in range(calls)))
    return calls / (time.perf_counter() - begun)


def bench(options):
    """Time small programs on one worker, and one of them on as many as there are cores. Returns the exit code.

    calls/s: by the caller's clock, one call after the other; calls/s per core: from the processor time of caller,
    zygote and child, which leaves out the time that other people's work took.
    """
    if options.calls < 1:
        raise InterpreterError(f"{options.calls} calls give no median: ask for at least 1")
    figures = {"calls": options.calls, "programs": {}}
    print(f"{'program':18} {'ms':>6} {'calls/s':>8} {'CPU ms':>7} {'calls/s per core':>17}    of which, ms")
    with Interpreter() as interpreter:
        for name, (code, side) in BENCH.items():
            row = figures["programs"][name] = _time(interpreter, code, [_picture(side)] if side else [], options.calls)
            seconds, processor = row["seconds"], row["processor"]
            parts = "  ".join(f"{part} {1e3 * row[part]:.2f}" for part in ("folder", "fork", "confine", "run", "end", "caller"))
            print(f"{name:18} {1e3 * seconds:6.2f} {1 / seconds:8.0f} {1e3 * processor:7.2f} {1 / processor:17.0f}    {parts}")
        figures["notes"] = interpreter.notes
    workers = figures["workers"] = os.cpu_count() or 1
    with InterpreterPool(workers) as pool:
        asyncio.run(_together(pool, 10 * workers))
        rate = figures["pool_calls_per_second"] = asyncio.run(_together(pool, options.calls * workers))
    load = figures["load"] = os.getloadavg()[0]
    print(f"arithmetic, {workers} workers on as many cores, from coroutines: {rate:.0f} calls/s; load of the machine {load:.1f}")
    for note in figures["notes"]:
        print(f"note: {note}")
    if options.out:
        from checkpoint import write_file  # here: it loads torch

        write_file(options.out, json.dumps(figures, indent=1) + "\n")
    return 0


def run(options):
    """Run a file as a model's program. Returns the exit code: 0 when it is ok, else 1."""
    code = pathlib.Path(options.file).read_text(encoding="utf-8")
    images = [Image.open(path).convert("RGB") for path in options.image]
    with Interpreter() as interpreter:
        observation = interpreter.run(code, images, options.seconds)
    print(observation.text)
    print(f"{observation.status}, {observation.seconds:.3f} s", *interpreter.notes, sep="\nnote: ", file=sys.stderr)
    return 0 if observation.status == "ok" else 1


def main(arguments=None):
    """The command line. Returns the exit code: 0, 1 when the program is not ok, 2 for misuse."""
    parser = argparse.ArgumentParser(prog="interpreter.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("run", help="run a file as a model's program")
    command.add_argument("file", help="Python text")
    command.add_argument("--image", action="append", default=[], metavar="PNG", help="becomes image.png, the next one image1.png, …")
    command.add_argument("--seconds", type=float, default=LIMITS.seconds, help="wall time")
    command.set_defaults(do=run)
    command = commands.add_parser("bench", help="calls per second, and where the time goes")
    command.add_argument("--calls", type=int, default=200, help="calls of each program")
    command.add_argument("--out", help="write the figures to this JSON file")
    command.set_defaults(do=bench)
    options = parser.parse_args(arguments)
    try:
        return options.do(options)
    except (ValueError, OSError) as error:  # an OSError names the file
        print(f"interpreter.py {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
