"""Runs untrusted Python in a child process with limits. Used to grade students' files and, later, for models' tools.

    with Sandbox(Limits(seconds=5), preload=("torch",)) as sandbox:
        sandbox.load("answer", source_text, "answer.py")          → Reply("ok", names of its functions)
        sandbox.call("answer", "add", torch.ones(2), 1)           → Reply("ok", tensor([2., 2.]))

What it protects against — accidents and casual cheating: endless loops, memory, disk and fork bombs, crashes, floods
of output, reading what must stay hidden (the reference), leaving the sandbox's folder by mistake, network access by
ordinary means. The child has its own session, an empty temporary folder, a stripped environment, resource limits of
the kernel and an audit hook of the interpreter.

What it does not protect against — somebody who means to break out: an audit hook sees what Python does, not what
native code does, and the child runs as the same user. For hostile code put the whole grader into a container or a
virtual machine. As root, and on macOS, some limits do not bind: `Sandbox.notes` says which.

Messages go over a socket pair of their own, never over stdout: a JSON header and raw safetensors bytes, both with a
length limit. Nothing is ever unpickled. `interpreter.py` builds on the lower half of this module.

Public names: Limits, Reply, Function, Sandbox, SandboxError, framed, receive, send, environment, library_path, libraries,
readable, kill_group, kill_marked, Refused, audit_hook, occupied, resident_peak, set_limits, explain.
Tests: pytest tests/test_sandbox.py
"""

import dataclasses
import functools
import importlib
import json
import linecache
import os
import pathlib
import re
import secrets
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from dataclasses import dataclass


class SandboxError(ValueError):
    """A sandbox that cannot be started or a value that cannot cross its border; one line says why."""


@dataclass(frozen=True)
class Limits:
    """What one child may use. Wall time is limited per call, everything else for the life of the child."""

    seconds: float = 20.0  # wall time of one call; afterwards the child and all its children are killed
    start_seconds: float = 120.0  # wall time to start and to import the preloaded modules
    cpu_seconds: int = 900  # CPU time over all calls: ends a child whose parent has died
    memory_mb: int = 2048  # address space beyond what Python and the preloaded modules occupy
    file_mb: int = 16  # largest file
    open_files: int = 64
    output_bytes: int = 1 << 16  # of stdout and stderr together; the rest is thrown away
    message_mb: int = 256  # largest request or reply


@dataclass(frozen=True)
class Function:
    """Stands for a function of a loaded module among the arguments of `Sandbox.call`."""

    module: str
    name: str


@dataclass(frozen=True)
class Reply:
    """What became of one request.

    status: "ok", "error" (it raised; message and line say what and where), "timeout", "memory", "died" (a crash, a
    signal, os._exit) or "protocol" (the child wrote nonsense into the message pipe)
    value: what the function returned; records (dataclasses) arrive as dicts, tuples as lists
    message: one line, empty when ok; line: of the untrusted file, or None
    reference: attempts to reach what is hidden, caught or not; refused: other attempts, such as starting a process
    """

    status: str
    value: object = None
    message: str = ""
    line: int | None = None
    reference: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


# Messages: 12 bytes of lengths, a JSON header, the bytes of a safetensors file

_LENGTHS = struct.Struct(">IQ")
_HEADER_LIMIT = 16 << 20  # bytes of JSON, which takes many times that as objects


def _is_tensor(value):
    """A child that was not given torch never imports it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _pack(value, tensors):
    """A value as JSON; tensors go into the dict `tensors` and leave their key behind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    if _is_tensor(value):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Function):
        return {"function": [value.module, value.name]}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    raise SandboxError(f"a value of type {type(value).__name__} cannot cross the border of the sandbox")


def _unpack(value, tensors, modules):
    if isinstance(value, list):
        return [_unpack(item, tensors, modules) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "function":
        return getattr(modules[content[0]], content[1])
    return {_unpack(key, tensors, modules): _unpack(item, tensors, modules) for key, item in content}


def _to_bytes(value, limit):
    tensors = {}
    header, body = json.dumps(_pack(value, tensors)).encode(), b""
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    if size > limit or len(header) > _HEADER_LIMIT:
        raise SandboxError(f"a message of {size:,} bytes is over the limit of {limit:,} ({_HEADER_LIMIT:,} of text)")
    if tensors:
        from safetensors.torch import save

        body = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    return framed(header, body)


def framed(header, body=b""):
    """The bytes of one message: lengths, JSON header, anything."""
    return _LENGTHS.pack(len(header), len(body)) + header + body


def _from_bytes(header, body, modules):
    """The value of a message. modules: where a Function is looked up; the parent, which trusts no reply, gives none."""
    tensors = {}
    if body:
        from safetensors.torch import load

        tensors = load(bytes(body))
    return _unpack(json.loads(bytes(header)), tensors, modules)


# The parent's side


class _Stopped(Exception):
    """The child is of no more use: why, as a Reply."""


class Sandbox:
    """One child process that answers calls, started when first needed and again after it had to be killed.

    limits: Limits
    preload: names of installed modules that the child imports before anything is forbidden
    trusted: module name → source text, defined in the child before anything is forbidden
    hidden: folders whose files may not be read; Python's own libraries inside them may
    banned: top-level names of modules that may not be imported

    Not for several threads at once; several sandboxes may run side by side.
    """

    def __init__(self, limits=Limits(), preload=(), trusted=None, hidden=(), banned=()):
        if os.name != "posix":
            raise SandboxError("the sandbox needs process limits that only Linux and macOS have")
        self.limits = limits
        self.notes = []  # limits that do not bind on this machine, in words; filled when the child starts
        self._settings = {
            "path": library_path(hidden),
            "preload": list(preload),
            "trusted": dict(trusted or {}),
            "hidden": [os.path.realpath(folder) for folder in hidden],
            "banned": list(banned),
            "limits": limits,
        }
        self._loaded = {}  # name → (text, filename): untrusted modules, loaded again into every new child
        self._process = None
        self._printed = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def load(self, name, text, filename, seconds=None):
        """Define an untrusted module. Returns Reply; value: the names of its public functions and classes."""
        self._loaded.pop(name, None)
        reply = self._ask({"do": "load", "name": name, "text": text, "filename": filename}, seconds)
        if reply.status == "ok":
            self._loaded[name] = text, filename
        return reply

    def call(self, module, function, *arguments, seconds=None):
        """Call a function of a loaded or trusted module. Returns Reply.

        arguments: tensors, numbers, strings, None, lists, tuples (arrive as lists), dicts, dataclasses (arrive as
        dicts), Function; seconds: wall time instead of limits.seconds. Raises SandboxError for other arguments.
        """
        return self._ask({"do": "call", "module": module, "function": function, "arguments": arguments}, seconds)

    def output(self):
        """What the child has printed since the last time, at most limits.output_bytes of it."""
        self._drain()
        text, self._printed = self._printed.decode(errors="replace"), bytearray()
        return text

    def close(self):
        """Kill the child and all its children and remove its folder. Returns its exit status; None if none ran."""
        if self._process is None:
            return None
        kill_group(self._process.pid)
        status = self._process.wait()
        kill_marked(self._mark)
        self._drain()
        self._socket.close()
        self._process.stdout.close()
        self._process = None
        shutil.rmtree(self._home, ignore_errors=True)
        return status

    def _ask(self, request, seconds):
        request = _to_bytes(request, self.limits.message_mb << 20)
        try:
            if self._process is None:
                self._start()
            return self._exchange(request, seconds or self.limits.seconds)
        except _Stopped as stopped:
            return stopped.args[0]
        except BaseException:  # Ctrl-C: no child is left behind
            self.close()
            raise

    def _start(self):
        self._home = tempfile.mkdtemp(prefix="sandbox-")
        self._mark = f"K25_SANDBOX={secrets.token_hex(16)}"
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-B", "-u", os.path.abspath(__file__), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, cwd=self._home, env=environment(self._home, self._mark), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, pass_fds=[theirs.fileno()],
                start_new_session=True,
            )  # fmt: skip
        ours.setblocking(False)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._socket = ours
        settings = self._settings | {"home": os.path.realpath(self._home)}
        reply = self._exchange(_to_bytes(settings, self.limits.message_mb << 20), self.limits.start_seconds)
        if reply.status != "ok":
            self.close()
            raise SandboxError(f"the sandbox cannot start: {reply.message}")
        self.notes = reply.value
        for name, (text, filename) in self._loaded.items():
            again = _to_bytes({"do": "load", "name": name, "text": text, "filename": filename}, sys.maxsize)
            reply = self._exchange(again, self.limits.seconds)
            if reply.status != "ok":
                raise _Stopped(reply)

    def _exchange(self, request, seconds):
        """Send one message and wait for the answer, reading along what the child prints."""
        deadline = time.monotonic() + seconds
        outgoing, incoming, needed = memoryview(request), bytearray(), _LENGTHS.size
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(incoming) < needed:
                left = deadline - time.monotonic()
                if left <= 0:
                    self.close()
                    raise _Stopped(Reply("timeout", message=f"is not finished after {seconds:g} s"))
                for key, events in selector.select(left):
                    if key.fileobj is not self._socket:
                        if self._drain():
                            selector.unregister(self._process.stdout)
                        continue
                    try:
                        if events & selectors.EVENT_WRITE:
                            outgoing = outgoing[self._socket.send(outgoing[: 1 << 20]) :]
                            if not outgoing:
                                selector.modify(self._socket, selectors.EVENT_READ)
                        if events & selectors.EVENT_READ:
                            chunk = self._socket.recv(1 << 20)
                            incoming += chunk
                            if not chunk:
                                raise ConnectionError
                    except ConnectionError:
                        raise _Stopped(self._obituary()) from None
                    if needed == _LENGTHS.size <= len(incoming):
                        header, body = _LENGTHS.unpack_from(incoming)
                        needed += header + body
                        if header > _HEADER_LIMIT or body > (self.limits.message_mb << 20) + _HEADER_LIMIT:
                            self.close()
                            raise _Stopped(Reply("protocol", message="wrote a message that is too long"))
        return self._read(memoryview(incoming)[:needed])

    def _read(self, message):
        """The child's answer as a Reply. The child is not trusted: anything may be wrong with it."""
        header, _ = _LENGTHS.unpack_from(message)
        start = _LENGTHS.size
        try:
            fields = _from_bytes(message[start : start + header], message[start + header :], {})
            line = fields["line"]
            return Reply(
                str(fields["status"]), fields["value"], str(fields["message"])[:500], line and int(line),
                tuple(map(str, fields["reference"])), tuple(map(str, fields["refused"])),
            )  # fmt: skip
        except Exception as error:  # JSON, safetensors, unknown keys: all the child's doing
            self.close()
            raise _Stopped(Reply("protocol", message=f"wrote nonsense into the message pipe ({error})")) from None

    def _obituary(self):
        """Reply for a child that ended by itself."""
        status = self.close()
        if status == -signal.SIGXCPU:
            return Reply("timeout", message=f"used more than {self.limits.cpu_seconds} s of CPU time")
        if status < 0:
            name = signal.Signals(-status).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            return Reply("died", message=f"ended the process by signal {name}{hint}")
        return Reply("died", message=f"ended the process with exit code {status}")

    def _drain(self):
        """Read what was printed; returns whether the pipe is at its end."""
        while self._process is not None:
            chunk = self._process.stdout.read(1 << 16)
            if not chunk:
                return chunk is not None  # None: nothing now; b"": closed
            self._printed += chunk[: self.limits.output_bytes - len(self._printed)]
        return True


def environment(home, mark):
    """The child's whole environment: nothing of ours but where shared libraries are."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    name, _, value = mark.partition("=")
    return kept | {
        "PATH": os.defpath, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "USER": "sandbox", "LOGNAME": "sandbox",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        name: value,
    }  # fmt: skip


def library_path(hidden):
    """A new child's sys.path: ours without the hidden folders and without the current directory."""
    path = [os.path.realpath(entry) for entry in sys.path if entry]
    return [p for p in path if _within(p, libraries()) or not _within(p, [os.path.realpath(h) for h in hidden])]


@functools.cache
def libraries():
    """Folders of this Python: where reading is always allowed."""
    folders = set(sysconfig.get_paths().values()) - {sysconfig.get_path("scripts")}
    return sorted({os.path.realpath(folder) for folder in folders})


def readable():
    """Everything that a child may read beside its own folder."""
    return [*_SYSTEM, *sys.path, *libraries()]


def _within(path, folders):
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def kill_group(pid):
    """Kill a process group, if there is one."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS says "not permitted" for a group of zombies
        pass


def kill_marked(mark):
    """Kill what left the process group: on Linux every descendant still carries the mark in its environment."""
    for _ in range(50):
        found = []
        for entry in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark.encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:  # ended meanwhile, or another user's
                continue
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not found:
            return


# The child's side


class Refused(PermissionError):
    """Raised inside the child at something that is not allowed."""


# Audit events that are refused, by how they begin
_FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.", "os.kill",
    "signal.pthread_kill", "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib.", "ctypes.",
    "gc.get_", "resource.", "sqlite3.", "webbrowser.", "syslog.", "os.chroot",
)  # fmt: skip
# Audit events whose paths must lie in the sandbox's own folder
_CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.lchmod", "os.lchown", "os.chflags", "os.lchflags", "os.utime", "os.setxattr", "os.removexattr", "os.chdir",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SYSTEM = ("/usr", "/lib", "/lib64", "/System", "/Library", os.devnull, "/dev/urandom")


def audit_hook(home, hidden, banned, attempts):
    """What `sys.addaudithook` takes: raises Refused at what is not allowed.

    home: the only folder that may be written; hidden, banned: as Sandbox has them; attempts: dict of two lists,
    "reference" and "refused", that it fills.
    """
    verdicts = dict.fromkeys(hidden, "reference") | dict.fromkeys(readable(), "") | {home: ""}
    banned = frozenset(banned)

    def refuse(kind, what):
        attempts[kind].append(what[:200])
        raise Refused(f"{what} is refused in the sandbox")

    def place(path):
        """What may be read there: "" (anything), "reference" or "refused"; the innermost known folder decides."""
        while path not in verdicts and path != "/":
            path = os.path.dirname(path)
        return verdicts.get(path, "refused")

    def hook(event, arguments):
        if event == "import":
            if arguments[0].partition(".")[0] in banned:
                refuse("reference", f"import {arguments[0]}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or path is None:
                return
            path = os.path.realpath(os.fsdecode(path))
            if flags & _WRITING and path != os.devnull and not _within(path, [home]):
                refuse("refused", f"writing {path}")
            if verdict := place(path):
                refuse(verdict, f"reading {path}")
        elif event in _CHANGES:
            for path in arguments:
                if isinstance(path, str | bytes | os.PathLike):
                    path = os.path.realpath(os.fsdecode(path))
                    if not _within(path, [home]):
                        refuse("refused", f"{event} {path}")
        elif event.startswith(_FORBIDDEN):
            refuse("refused", event)

    return hook


def _refuse_the_unheard(attempts):
    """Replace what starts processes or reads files without an audit event."""

    def refusing(what):
        def refuse(*_, **__):
            attempts["refused"].append(what)
            raise Refused(f"{what} is refused in the sandbox")

        return refuse

    import _posixsubprocess

    import safetensors.torch
    import torch

    _posixsubprocess.fork_exec = refusing("multiprocessing")
    torch.from_file = torch.UntypedStorage.from_file = refusing("from_file")
    safetensors.safe_open = safetensors.torch.safe_open = refusing("safe_open")


@functools.cache
def occupied():
    """Bytes of address space that this process had when first asked, and that children forked since began with."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def resident_peak():
    """The largest resident memory of this process so far, in bytes."""
    if (status := pathlib.Path("/proc/self/status")).exists():  # Linux: ru_maxrss begins with the parent's
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def set_limits(limits):
    """Apply the kernel's limits to this process. Returns notes about those that do not bind."""
    import resource

    notes = []
    bounds = {
        "RLIMIT_CPU": limits["cpu_seconds"], "RLIMIT_FSIZE": limits["file_mb"] << 20,
        "RLIMIT_NOFILE": limits["open_files"], "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0,
    }  # fmt: skip
    try:
        bounds["RLIMIT_AS"] = occupied() + (limits["memory_mb"] << 20)
    except OSError:
        notes.append("memory is not limited: only Linux can")
    if os.geteuid() == 0:
        notes.append("the number of processes is not limited by the kernel: the sandbox runs as root")
    for name, bound in bounds.items():
        try:
            hard = bound + 5 if name == "RLIMIT_CPU" else bound  # the soft one says SIGXCPU, the hard one SIGKILL
            resource.setrlimit(getattr(resource, name), (bound, hard))
        except (AttributeError, ValueError, OSError) as error:
            notes.append(f"{name} is not limited ({error})")
    return notes


def _define(name, text, filename):
    """Make a module from its text. linecache learns the text, so that a traceback opens no file."""
    linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename
    module = types.ModuleType(name)
    module.__file__ = filename
    sys.modules[name] = module
    try:
        exec(compile(text, filename, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def explain(error, filenames):
    """status, message and line of an exception; the line is the innermost one in an untrusted file."""
    line, step = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename in filenames:
            line = step.tb_lineno
        step = step.tb_next
    words = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:300]
    memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in words)
    if memory:
        return "memory", "needs more memory than allowed", line
    if isinstance(error, SystemExit):
        return "error", f"calls sys.exit({words})", line
    return "error", f"{type(error).__name__}: {words}" if words else type(error).__name__, line


def receive(descriptor):
    """One message of the parent. Raises EOFError when the parent has gone."""

    def exactly(count):
        data = bytearray()
        while len(data) < count:
            chunk = os.read(descriptor, min(count - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    header, body = _LENGTHS.unpack(exactly(_LENGTHS.size))
    return exactly(header), exactly(body)


def send(descriptor, message):
    """Write the bytes of one message."""
    message = memoryview(message)
    while message:
        message = message[os.write(descriptor, message[: 1 << 20]) :]


def _answer(request, filenames):
    """Do what a request asks; returns the fields of a Reply but for the attempts."""
    fields = {"status": "ok", "value": None, "message": "", "line": None}
    try:
        request = _from_bytes(*request, sys.modules)
        if request["do"] == "load":
            filenames.add(request["filename"])
            module = _define(request["name"], request["text"], request["filename"])
            public = {name for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
            fields["value"] = sorted(public)
        else:
            function = getattr(sys.modules[request["module"]], request["function"])
            fields["value"] = function(*request["arguments"])
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the child goes on
        fields["status"], fields["message"], fields["line"] = explain(error, filenames)
    return fields


def _serve(descriptor):
    """The child: prepare, then answer requests until the parent hangs up."""
    os.set_inheritable(descriptor, False)
    settings = _from_bytes(*receive(descriptor), {})
    limit = settings["limits"]["message_mb"] << 20
    attempts, filenames = {"reference": [], "refused": []}, set()
    ready = {"status": "ok", "value": None, "message": "", "line": None, "reference": [], "refused": []}
    try:
        sys.path[:] = settings["path"]
        for name in settings["preload"]:
            importlib.import_module(name)
        if "torch" in sys.modules:
            importlib.import_module("safetensors.torch")
        for name, text in settings["trusted"].items():
            _define(name, text, f"<{name}>")
        linecache.getlines(__file__)
        linecache.cache[__file__] = linecache.cache[__file__][0], None, *linecache.cache[__file__][2:]
        ready["value"] = set_limits(settings["limits"])
    except BaseException as error:
        ready["status"], ready["message"], _ = explain(error, filenames)
    _refuse_the_unheard(attempts)
    sys.addaudithook(audit_hook(settings["home"], settings["hidden"], settings["banned"], attempts))
    send(descriptor, _to_bytes(ready, limit))
    while True:
        try:
            request = receive(descriptor)
        except EOFError:  # the parent was killed and could not clear up
            shutil.rmtree(settings["home"], ignore_errors=True)
            os._exit(0)
        fields = _answer(request, filenames)
        fields |= {kind: list(found[:20]) for kind, found in attempts.items()}
        for found in attempts.values():
            found.clear()
        try:
            message = _to_bytes(fields, limit)
        except Exception as error:  # a value that JSON or safetensors cannot hold
            message = _to_bytes(fields | {"value": None, "status": "error", "message": str(error)[:300]}, limit)
        send(descriptor, message)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
