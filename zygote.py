"""The warm process behind interpreter.py: it forks, confines and watches one child per call — report 2.2 and 4.4.

The zygote has numpy and PIL loaded, never runs what a model wrote, keeps the time, kills, and clears up. Each child is
confined, in this order, by a process group of its own, a spare user, rlimits, Landlock, seccomp and the audit hook; as root the
zygote has a network and mounts of its own. What they are for stands in interpreter.py.

The parent sends a request as JSON and pixels, or an empty message to cancel; it gets the fields of an Observation. At
the end of its socket the zygote ends, and with it its child.

Public names: LINUX, FOLDER, FILES, FLOOD, Zygote, serve.
Tests: pytest tests/test_interpreter.py
"""

import ast
import contextlib
import ctypes
import errno
import gc
import importlib
import io
import json
import linecache
import math
import mmap
import os
import pathlib
import pkgutil
import random
import re
import resource
import secrets
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import types
import zlib

import numpy
from PIL import Image

from sandbox import audit_hook, explain, framed, kill_group, occupied, readable, receive, send, set_limits

LINUX = sys.platform == "linux"
FOLDER, FILES = 4, 1000  # size of a call's folder, in largest files; how many files it may hold
FLOOD = 16 << 20  # bytes of output at which a call is ended
ROOT = pathlib.Path(__file__).resolve().parent

# --------------------------------------------------------------------------------- zygote and child

PRELOAD = (
    "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "math", "operator", "statistics", "string", "textwrap", "typing", "numpy.fft", "numpy.linalg", "numpy.random",
    "PIL.ImageChops", "PIL.ImageColor", "PIL.ImageDraw", "PIL.ImageEnhance", "PIL.ImageFilter", "PIL.ImageFont",
    "PIL.ImageMath", "PIL.ImageOps", "PIL.ImageStat", "PIL.PngImagePlugin",
)  # fmt: skip
PROGRAM = "<program>"  # its file name in tracebacks
REHEARSAL = """
import io
file = io.BytesIO()
Image.new("RGB", (8, 8)).save(file, "PNG")
a = np.asarray(Image.open(file).convert("L"))
print((a < 128).sum(), float(a.mean()), np.argwhere(a > 0), np.unique(a))
a
"""  # makes everything load that is loaded late


def serve(descriptor):
    """A zygote's life: prepare, then answer one request after the other until the parent hangs up."""
    os.set_inheritable(descriptor, False)
    settings, zygote = json.loads(receive(descriptor)[0]), None
    try:
        zygote = Zygote(descriptor, **settings)
        ready = {"notes": zygote.notes}
    except Exception as error:
        ready = {"error": f"{type(error).__name__}: {error}"}
    try:
        send(descriptor, framed(json.dumps(ready).encode()))
        while "notes" in ready:
            header, pixels = receive(descriptor)
            if header:  # else a cancellation that came too late
                send(descriptor, framed(json.dumps(zygote.call(json.loads(header), pixels)).encode()))
    except (EOFError, BrokenPipeError):
        pass
    finally:
        if zygote:
            zygote.close()


class Zygote:
    """Makes a folder, forks a child into it, watches it, and clears up."""

    def __init__(self, descriptor, folder, limits):
        self.descriptor, self.folder, self.limits = descriptor, folder, limits
        self.notes, self.gaps, self.calls = [], None, 0
        if not hasattr(_LIBC, "gnu_get_libc_version"):
            self.notes.append("not the GNU C library: uninitialised arrays may show scraps of earlier calls")
        sys.path.remove(str(ROOT))
        self.user = _spare_user()
        self.mounted = self.user is not None and self._separate()
        if self.user is None:
            self.notes.append("no other user: programs run as the one who started the interpreter")
        if not self.mounted:
            os.chmod(folder, 0o711)
            self.notes.append("no network and no mounts of its own: they need root and CAP_SYS_ADMIN")
            if self.user is not None and _closed(sys.path):
                self.notes.append(f"closed to others, so that only what is loaded can be imported: {', '.join(_closed(sys.path))}")
        for name in PRELOAD:
            importlib.import_module(name)
        with contextlib.redirect_stdout(io.StringIO()):
            _evaluate(REHEARSAL, limits)
        random.seed(0)
        numpy.random.seed(0)
        self.filter, self.strangers, self.attempts = _filter(), _strangers(), {"reference": [], "refused": []}
        self.walls = self._walls(folder) if self.mounted else None  # all homes are the same place
        for name in ("zygote", "sandbox", "ctypes", "_ctypes"):
            sys.modules.pop(name, None)
        occupied()  # noted here, for all children
        gc.collect()
        gc.freeze()  # no child's collector touches, and thereby copies, these pages
        reply = self.call({"code": "np.zeros(1)", "sizes": [[1, 1]], "seconds": limits["start_seconds"]}, bytes(3))
        if reply["status"] != "ok":
            raise RuntimeError(reply["text"])
        self.notes += self.gaps

    def _separate(self):
        """Network and mounts of our own. Returns whether the kernel permits them."""
        try:
            _native("unshare", NEWNS | NEWIPC | NEWNET)
            _native("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        except OSError:
            return False
        # The user must get at the libraries, which may lie below a folder closed to others, such as /root: cover that.
        behind = {path: os.open(path, os.O_PATH) for path in _closed([*readable(), self.folder])}
        for cover in {_gate(path) for path in behind}:
            self._mount(cover, "mode=755")
        for path, descriptor in sorted(behind.items()):
            os.makedirs(path, exist_ok=True)
            _native("mount", b"/proc/self/fd/%d" % descriptor, os.fsencode(path), None, MS_BIND | MS_REC, None)
            os.close(descriptor)
        self._mount(self.folder, "mode=711,size=64k")
        os.mkdir(os.path.join(self.folder, "home"))
        return True

    def _mount(self, path, options):
        _native("mount", b"tmpfs", os.fsencode(path), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())

    def _walls(self, home):
        """The Landlock ruleset and the audit hook that keep a child in its home."""
        hook = audit_hook(home, [str(ROOT)], self.strangers, self.attempts)
        return _ruleset(home, readable()), hook

    def call(self, request, pixels):
        """Run one program in a child. Returns the fields of an Observation. Raises EOFError when the parent has gone."""
        began, used = time.perf_counter(), _processor_seconds()
        home = self._make_home(request["sizes"], pixels)
        output, their_output = os.pipe()
        verdict, their_verdict = os.pipe()
        walls = self.walls or self._walls(home)
        ready = time.perf_counter()
        child = _fork()
        if child == 0:
            self._be_the_child(request["code"], home, their_output, their_verdict, *walls)
        watch = _Watch(output, verdict, self.limits)
        try:
            os.close(their_output)
            os.close(their_verdict)
            if walls is not self.walls and walls[0] is not None:
                os.close(walls[0])
            ended = watch.wait(self.descriptor, request["seconds"], None if self.mounted else home)
        finally:
            os.kill(child, signal.SIGKILL)
            kill_group(child)
            _, status = os.waitpid(child, 0)
            watch.close()
            self._remove(home)
        starts, verdict = self._hear(watch, ended, os.waitstatus_to_exitcode(status))
        end = time.perf_counter()
        started, confined = starts or (ready, ready)
        finished = min(verdict.pop("finished"), end)
        text, truncated = watch.text(verdict.pop("tail"))
        split = {"folder": ready - began, "fork": started - ready, "confine": confined - started, "run": finished - confined,
                 "end": end - finished, "processor": _processor_seconds() - used}  # fmt: skip
        return verdict | {"text": text, "truncated": truncated, "seconds": end - began, "split": split}

    def _make_home(self, sizes, pixels):
        """An empty folder but for the pictures. Of limited size where we may mount, else in the common file system."""
        if self.mounted:
            home = os.path.join(self.folder, "home")
            self._mount(home, f"mode=700,size={FOLDER * self.limits['file_mb']}m,nr_inodes={FILES}")
        else:
            self.calls += 1
            home = os.path.join(self.folder, str(self.calls))
            os.mkdir(home, 0o700)
        os.environ["HOME"] = os.environ["TMPDIR"] = home
        paths, offset = [home], 0
        for index, (width, height) in enumerate(sizes):
            paths.append(os.path.join(home, f"image{index or ''}.png"))
            _write_png(paths[-1], width, height, pixels[offset : offset + 3 * width * height])
            offset += 3 * width * height
        if self.user is not None:
            for path in paths:
                os.chown(path, self.user, self.user)
        return home

    def _remove(self, home):
        if self.mounted:
            return _native("umount2", os.fsencode(home), MNT_DETACH)
        try:
            shutil.rmtree(home)
        except (OSError, RecursionError):  # closed or very deep folders
            subprocess.run(["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', home], stderr=subprocess.DEVNULL)

    def close(self):
        """Remove the folder, which may be out of the parent's sight, or the parent gone."""
        with contextlib.suppress(OSError):
            if self.mounted:
                _native("umount2", os.fsencode(self.folder), MNT_DETACH)
            os.rmdir(self.folder)

    def _be_the_child(self, code, home, output, verdict, ruleset, hook):
        """From the fork to the end. The verdict pipe gets a line before and a line after the program."""
        try:
            started = time.perf_counter()
            os.chdir(home)
            gaps = self._confine(output, verdict, ruleset, hook)
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = console = open(
                1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
            )
            write, dumps, clock = os.write, json.dumps, time.perf_counter
            write(3, dumps([started, clock(), gaps]).encode() + b"\n")
            status, tail = _evaluate(code, self.limits)
            with contextlib.suppress(ValueError):  # closed by the program
                console.flush()
            refused = [*self.attempts["reference"], *self.attempts["refused"]][:20]
            write(3, dumps({"status": status, "tail": tail, "refused": refused, "finished": clock()}).encode())
        except MemoryError:
            os.write(3, b'{"status": "memory", "tail": "MemoryError", "refused": [], "finished": 1e99}')
        finally:
            os._exit(0)

    def _confine(self, output, verdict, ruleset, hook):
        """Give up everything that a program does not need. Returns what could not be given up, in words."""
        os.setpgid(0, 0)
        if self.user is not None:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        gaps = set_limits(self.limits)
        if LINUX:
            _native("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _native("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if ruleset is None:
            gaps.append("no Landlock: native code may read and write what this user may")
        else:
            _native("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
        for descriptor, target in ((output, 1), (output, 2), (verdict, 3)):
            os.dup2(descriptor, target)
        os.closerange(4, 1024)
        try:
            if self.filter is None:
                raise OSError("no list of system calls for this machine")
            program = struct.pack("HP", len(self.filter) // 8, ctypes.addressof(self.filter))
            _native("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)
        except OSError as error:
            gaps.append(f"no seccomp: native code may make any system call ({error})")
        sys.addaudithook(hook)
        return gaps

    def _hear(self, watch, ended, code):
        """What the child said: ((started, confined), fields of the verdict); ended: (status, words) of a call cut short.

        Raises RuntimeError when the child failed before the program began, or is confined less than at the rehearsal.
        """
        first, _, last = watch.message.partition(b"\n")
        starts = None
        if b"\n" in watch.message:
            *starts, gaps = json.loads(first)
            self.gaps = gaps if self.gaps is None else self.gaps
        if ended is None and starts is None or starts and gaps != self.gaps:
            raise RuntimeError("a child could not be confined")
        try:
            if ended is None:
                said = json.loads(last)
                fields = {"status": str(said["status"]), "tail": str(said["tail"]), "refused": [str(w) for w in said["refused"]],
                          "finished": float(said["finished"])}  # fmt: skip
                if fields["status"] in ("ok", "error", "memory", "refused"):
                    return starts, fields
        except (ValueError, TypeError, KeyError, RecursionError):  # the program wrote into the pipe, or ended the process
            pass
        status, words = ended or _obituary(code, bool(last), self.limits["cpu_seconds"])
        return starts, {"status": status, "tail": f"{status.capitalize()}: {words}", "refused": [], "finished": time.perf_counter()}


class _Watch:
    """The zygote's ends of a child's two pipes, and what came out of them."""

    def __init__(self, output, verdict, limits):
        self.output, self.verdict, self.limits, self.room = output, verdict, limits, limits["output_bytes"]
        self.kept, self.printed, self.message = bytearray(), 0, b""
        os.set_blocking(output, False)

    def wait(self, parent, seconds, folder):
        """Until the verdict is in; returns None, or (status, words) if the call must be cut short.

        parent: descriptor whose being readable means cancellation, or EOFError at its end; seconds: from the program's
        first line on; folder: to be measured ten times a second, or None. Raises TimeoutError when no program begins.
        """
        now = time.monotonic()
        deadline, look, begun = now + self.limits["start_seconds"], now, False
        listening, largest = [parent, self.verdict, self.output], FOLDER * self.limits["file_mb"] << 20
        while now < deadline:
            readable, _, _ = select.select(listening, [], [], deadline - now if folder is None else min(deadline - now, 0.1))
            now = time.monotonic()
            if parent in readable:
                receive(parent)
                return "cancelled", "by the caller"
            if self.output in readable and not self.read():
                listening.remove(self.output)
            if self.printed > FLOOD:
                return "output", f"printed more than {FLOOD >> 20} MB"
            if self.verdict in readable:
                chunk = os.read(self.verdict, 1 << 16)
                self.message += chunk
                if not chunk or len(self.message) > 1 << 20:
                    return None
                if not begun and b"\n" in chunk:
                    deadline, begun = now + seconds, True
            if folder is not None and now > look:
                look = now + 0.1
                if _size(folder) > largest:
                    return "error", f"its files are more than {FILES}, or larger than {largest >> 20} MB together"
        if not begun:
            raise TimeoutError("no program begins")
        return "timeout", f"not finished after {seconds:g} s"

    def read(self):
        """Take what was printed; returns whether there may be more."""
        try:
            chunk = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        self.printed += len(chunk)
        self.kept += chunk[: self.room - len(self.kept)]
        return bool(chunk)

    def close(self):
        """Take what is left, after the child's end."""
        while self.read():
            pass
        os.close(self.output)
        os.close(self.verdict)

    def text(self, tail):
        """(text, truncated): what was printed and `tail` after it, at most `room` characters; the tail has a quarter for sure."""
        printed = re.sub(" at 0x[0-9a-fA-F]+>", ">", self.kept.decode(errors="replace"))
        tail = re.sub(" at 0x[0-9a-fA-F]+>", ">", tail).encode(errors="backslashreplace").decode()
        if tail and printed and not printed.endswith("\n"):
            printed += "\n"
        if self.printed <= len(self.kept) and len(printed) + len(tail) <= self.room:
            return printed + tail, False
        dots = "\n…\n"
        tail = tail if len(tail) <= self.room // 4 else tail[: max(self.room // 4, self.room - len(printed)) - 1] + "…"
        if len(printed) + len(tail) > self.room or self.printed > len(self.kept):
            printed = printed[: max(0, self.room - len(tail) - len(dots))] + dots
        return printed + tail, True


def _evaluate(code, limits):
    """Run a program's text in a fresh __main__. Returns (status, tail): the last bare expression's value or what went wrong."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__dict__.update(np=numpy, Image=Image)
    linecache.cache[PROGRAM] = len(code), None, code.splitlines(keepends=True), PROGRAM
    reserve = mmap.mmap(-1, 4 << 20)  # address space to say that there is none left
    try:
        tree, value = ast.parse(code, PROGRAM), None
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, PROGRAM, "exec"), module.__dict__)
        if last:
            value = eval(compile(ast.Expression(last.value), PROGRAM, "eval"), module.__dict__)
        return "ok", "" if value is None else repr(value)[: limits["output_bytes"] + 1]
    except BaseException as error:
        reserve.close()
        status, words, line = explain(error, {PROGRAM})
        if status == "memory":
            words = f"MemoryError: {words}: {limits['memory_mb']} MB"
        elif isinstance(error, PermissionError):
            status = "refused"
        return status, words + (f" (line {line})" if line else "")


def _obituary(code, wrote, cpu_seconds):
    """(status, words) of a child that ended by itself. code: its exit code; wrote: whether it put something for a verdict."""
    if code == -signal.SIGXCPU:
        return "timeout", f"used more than {cpu_seconds} s of CPU time"
    if code < 0:
        return "died", f"ended the process by signal {signal.Signals(-code).name}"
    return "died", "wrote into a descriptor that it did not open" if wrote else f"ended the process with exit code {code}"


def _strangers():
    """Modules that may not be imported: all but the standard library, numpy and PIL; and ctypes, which calls anything."""
    found = {module.name for module in pkgutil.iter_modules(sys.path)}
    return found - sys.stdlib_module_names - {"numpy", "PIL"} | {"ctypes", "_ctypes"}


def _processor_seconds():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _size(folder):
    """Bytes of a folder's files; endless when they are more than FILES."""
    sizes, folders = [], [folder]
    while folders and len(sizes) <= FILES:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                sizes.append(entry.stat(follow_symlinks=False).st_size)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return sum(sizes) if len(sizes) <= FILES else math.inf


def _write_png(path, width, height, pixels):
    """Pixels (height·width·3 bytes) as an RGB PNG, quickly: a filter byte 0 before each row, and nothing compressed."""
    rows = b"".join(b"\0" + pixels[start : start + 3 * width] for start in range(0, len(pixels), 3 * width))
    stored = [b"\x78\x01"]  # a zlib stream of stored blocks; zlib itself would first clear 256 KB for its state
    for start in range(0, len(rows), 65535):
        block = rows[start : start + 65535]
        stored += [struct.pack("<BHH", start + 65535 >= len(rows), len(block), len(block) ^ 65535), block]
    stored.append(struct.pack(">I", zlib.adler32(rows)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", b"".join(stored)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


# --------------------------------------------------------------------------------- the kernel's part

_LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWIPC, NEWNET = 0x20000, 0x8000000, 0x40000000  # linux/sched.h
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2  # linux/mount.h
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2  # linux/prctl.h, seccomp.h
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same number on every machine


def _fork():
    """C's own fork. What os.fork does beside it takes 0.7 ms and is for processes with threads; the zygote has none."""
    child = ctypes.PyDLL(None).fork()  # PyDLL: with the interpreter's lock held, so that the child holds it too
    if child < 0:
        raise OSError("no process for the program")
    return child


def _native(function, *arguments):
    """Call a function of the C library that returns −1 and sets errno. Raises OSError."""
    result = getattr(_LIBC, function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def _spare_user():
    """A user id that owns nothing, or None without the capabilities to change to it, to chown and to kill."""
    try:
        held = int(re.search(r"CapEff:\s*(\w+)", pathlib.Path("/proc/self/status").read_text())[1], 16)
        first, _, count = map(int, pathlib.Path("/proc/self/uid_map").read_text().splitlines()[0].split())
    except (OSError, TypeError):
        return None
    needed = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 7  # CHOWN, KILL, SETGID, SETUID
    count = min(count, 1 << 31)
    return first + count - 2 - secrets.randbelow(count // 8) if held & needed == needed and count > 1000 else None


def _gate(path):
    """The outermost folder on the way to a path that others may not enter, or None."""
    return next((str(f) for f in reversed(pathlib.PurePath(path).parents) if not os.stat(f).st_mode & stat.S_IXOTH), None)


def _closed(paths):
    """Those folders that others do not reach."""
    return sorted({path for path in paths if os.path.isdir(path) and _gate(path)})


def _ruleset(home, paths):
    """A Landlock ruleset: all of `home`, and reading `paths`. Returns its descriptor, or None without Landlock."""
    if not LINUX:
        return None
    version = _LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return None
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # all that this kernel can withhold
    write, read_file, read_folder, unwanted = 1 << 1, 1 << 2, 1 << 3, 1 << 0 | 1 << 6 | 1 << 9 | 1 << 11  # exec, devices, sockets
    ruleset = _native("syscall", LANDLOCK_CREATE_RULESET, struct.pack("Q", rights), 8, 0)
    allowed = {home: rights & ~unwanted}
    for path in paths:
        allowed[path] = read_file | (read_folder if os.path.isdir(path) else write * (path == os.devnull))
    for path in filter(os.path.exists, allowed):
        descriptor = os.open(path, os.O_PATH)
        _native("syscall", LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed[path], descriptor), 0)
        os.close(descriptor)
    return ruleset


# What Python, numpy and PIL need of the kernel: name, number on x86-64, number on arm64. No process, signal, socket,
# device control, other process's memory, limit, mount, key, and nothing that a later kernel adds.
_ALLOWED = """
read 0 63  write 1 64  open 2 -  close 3 57  stat 4 -  fstat 5 80  lstat 6 -  poll 7 -  lseek 8 62  mmap 9 222
mprotect 10 226  munmap 11 215  brk 12 214  rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139
pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66  access 21 -  select 23 -  sched_yield 24 124  mremap 25 216
madvise 28 233  dup 32 23  dup2 33 -  nanosleep 35 101  getitimer 36 102  alarm 37 -  setitimer 38 103  getpid 39 172
sendfile 40 71  exit 60 93  uname 63 160  fsync 74 82  fdatasync 75 83  ftruncate 77 46  getcwd 79 17  chdir 80 49
fchdir 81 50  rename 82 -  mkdir 83 -  rmdir 84 -  link 86 -  unlink 87 -  symlink 88 -  readlink 89 -  umask 95 166
gettimeofday 96 169  getrusage 98 165  sysinfo 99 179  times 100 153  getuid 102 174  getgid 104 176  geteuid 107 175
getegid 108 177  getppid 110 173  getgroups 115 158  sigaltstack 131 132  statfs 137 43  fstatfs 138 44  gettid 186 178
time 201 -  futex 202 98  sched_getaffinity 204 123  getdents64 217 61  restart_syscall 219 128  fadvise64 221 223
clock_gettime 228 113  clock_getres 229 114  clock_nanosleep 230 115  exit_group 231 94  openat 257 56  mkdirat 258 34
newfstatat 262 79  unlinkat 263 35  renameat 264 38  linkat 265 37  symlinkat 266 36  readlinkat 267 78  faccessat 269 48
pselect6 270 72  ppoll 271 73  dup3 292 24  renameat2 316 276  getrandom 318 278  membarrier 324 283
copy_file_range 326 285  statx 332 291  rseq 334 293  close_range 436 436  faccessat2 439 439"""
# These do nothing and say that they did: Landlock does not watch them, and copying a file ends with one of them.
_PRETENDED = """
chmod 90 -  fchmod 91 52  chown 92 -  fchown 93 55  lchown 94 -  utime 132 -  utimes 235 -  fchownat 260 54  fchmodat 268 53
utimensat 280 88"""
_FCNTL = "fcntl 72 25"  # but for F_SETOWN and F_SETSIG (8, 10), which send signals
_IOCTL = "ioctl 16 29"  # says that nothing is a terminal; Python then goes another way
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: ld [k], jeq, jge, ret


def _filter():
    """A seccomp program, 8 bytes an instruction, or None for a machine without a list: a binary search over call numbers."""
    machine = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}.get(os.uname().machine)
    if not LINUX or machine is None or sys.maxsize < 2**32:
        return None
    column, architecture = machine
    allow = [(_RETURN, 0, 0, 0x7FFF0000)]
    deny, pretend, no_terminal = ([(_RETURN, 0, 0, 0x50000 | code)] for code in (errno.EPERM, 0, errno.ENOTTY))
    fcntl = [(_LOAD, 0, 0, 24), (_EQUAL, 1, 0, 1030), (_AT_LEAST, 1, 0, 8), *allow, *deny]  # 1030: F_DUPFD_CLOEXEC
    verdicts = {}
    for text, verdict in ((_ALLOWED, allow), (_PRETENDED, pretend), (_FCNTL, fcntl), (_IOCTL, no_terminal)):
        words = text.split()
        verdicts |= {int(number): verdict for number in words[column::3] if number != "-"}
    pieces = [(0, verdicts.get(0, deny))]  # (first number, what is done from there on)
    for number in sorted({edge for n in verdicts for edge in (n, n + 1)} - {0}):
        if (verdict := verdicts.get(number, deny)) is not pieces[-1][1]:
            pieces.append((number, verdict))

    def search(pieces):
        if len(pieces) == 1:
            return pieces[0][1]
        middle = len(pieces) // 2
        low, high = search(pieces[:middle]), search(pieces[middle:])
        return [(_AT_LEAST, len(low), 0, pieces[middle][0]), *low, *high]

    head = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, 0x80000000), (_LOAD, 0, 0, 0)]
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in head + search(pieces))
    return ctypes.create_string_buffer(program, len(program))
