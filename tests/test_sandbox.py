"""Claims about sandbox.py: what untrusted code may do, what it may not, and what its caller is told.

Run: .venv/bin/python -m pytest tests/test_sandbox.py
"""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import assert_close

from sandbox import _LENGTHS, Function, Limits, Sandbox, SandboxError

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMITS = Limits(seconds=30, memory_mb=600, file_mb=1, output_bytes=1000, message_mb=8)
LINUX = sys.platform == "linux"

CODE = textwrap.dedent('''
    import os, sys, torch

    def echo(value): return value
    def apply(function, *values): return function(*values)
    def double(x): return 2 * x
    def loop():
        while True: pass
    def fail(): raise KeyError("left")
    def leave(): sys.exit("bye")
    def vanish(): os._exit(7)
    def crash(): os.abort()
    def hog(): return torch.zeros(10**10)
    def hog_lists():
        kept = []
        while True: kept.append([0] * 10**6)
    def huge(): return torch.zeros(10**7)
    def odd(): return object()
    def shout(): print("loud" * 10**6)
    def fill():
        with open("big", "w") as file: file.write("x" * (1 << 22))
    def keep(): open("note", "w").write("kept"); return open("note").read(), sorted(os.listdir("."))
    def environment(): return dict(os.environ)
    def stdin(): return sys.stdin.read()
    def import_it(name): __import__(name)
    def try_import(name):
        try: __import__(name)
        except Exception: return "caught"
    def read(path): return open(path).read()
    def read_low(path): return os.read(os.open(path, os.O_RDONLY), 10)
    def link(path): os.symlink(path, "link"); return open("link").read()
    def write(path): open(path, "w")
    def append(path): open(path, "a")
    def remove(path): os.remove(path)
    def rename(path): os.rename(path, "mine")
    def fork(): os.fork()
    def bomb():
        while True: os.fork()
    def start(): __import__("subprocess").run(["true"])
    def system(): os.system("true")
    def spawn():
        import multiprocessing
        multiprocessing.get_context("spawn").Process(target=print).start()
    def connect(): __import__("socket").create_connection(("localhost", 9))
    def ctypes_(): __import__("ctypes").CDLL(None).abort()
    def native(): return torch.from_file("/etc/passwd", size=8, dtype=torch.uint8)
    def storage(): return torch.UntypedStorage.from_file("/etc/passwd", False, 8)
    def tensors(): return __import__("safetensors").safe_open("/etc/passwd", "pt")
    def kill(): os.kill(os.getppid(), 0)
    def referrers(): return len(__import__("gc").get_objects())
    def nonsense():
        for descriptor in range(3, 1024):  # wherever the pipe of the protocol may be
            try: os.write(descriptor, b"\\xff" * 100)
            except OSError: pass
    def recompute():
        from torch.utils.checkpoint import checkpoint
        x = torch.ones(3, requires_grad=True)
        checkpoint(lambda a: a * a, x, use_reentrant=False).sum().backward()
        return torch.func.vmap(lambda a: 2 * a)(x.grad)
''')


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """One child for all tests, with the project hidden from it."""
    with Sandbox(LIMITS, preload=("torch",), hidden=(ROOT,), banned=("mla", "transformers")) as box:
        assert box.load("code", CODE, "code.py").status == "ok"
        yield box


# What passes the border


def test_values_come_back_as_they_were_sent(sandbox):
    value = {"a": [1, 2.5, None, True, "ü"], 3: {"tensor": "not one", "dict": []}, "inf": float("inf")}
    reply = sandbox.call("code", "echo", value)
    assert (reply.status, reply.value, reply.refused, reply.reference) == ("ok", value, (), ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_keep_their_dtype_and_shape(sandbox, dtype, shape):
    tensor = (torch.arange(6.0)[: torch.Size(shape).numel()].reshape(shape) - 2).to(dtype)
    back = sandbox.call("code", "echo", [tensor, tensor]).value
    assert all(x.dtype == dtype and torch.equal(x, tensor) for x in back)


def test_views_cross_as_what_they_show(sandbox):
    tensor = torch.arange(12.0).reshape(3, 4)
    assert_close(sandbox.call("code", "echo", tensor.T[1:]).value, tensor.T[1:])


def test_a_function_of_a_loaded_module_is_an_argument(sandbox):
    assert_close(sandbox.call("code", "apply", Function("code", "double"), torch.ones(2)).value, torch.tensor([2.0, 2.0]))


def test_what_cannot_cross_is_one_line_on_either_side(sandbox):
    with pytest.raises(SandboxError, match="object cannot cross"):
        sandbox.call("code", "echo", object())
    reply = sandbox.call("code", "odd")
    assert reply.status == "error" and "object cannot cross" in reply.message


def test_messages_have_a_largest_length(sandbox):
    with pytest.raises(SandboxError, match="limit"):
        sandbox.call("code", "echo", torch.zeros(10**7))
    reply = sandbox.call("code", "huge")
    assert reply.status == "error" and "over the limit of 8,388,608" in reply.message


# What code may do to itself


def test_an_exception_is_told_with_its_line(sandbox):
    reply = sandbox.call("code", "fail")
    assert (reply.status, reply.message) == ("error", "KeyError: 'left'")
    assert CODE.splitlines()[reply.line - 1].startswith("def fail")


def test_sys_exit_ends_the_call_and_not_the_child(sandbox):
    reply = sandbox.call("code", "leave")
    assert (reply.status, reply.message) == ("error", "calls sys.exit(bye)")


@pytest.mark.skipif(not LINUX, reason="memory is limited on Linux only")
@pytest.mark.parametrize("name", ["hog", "hog_lists"])
def test_a_memory_hog_is_told_so(sandbox, name):
    assert sandbox.call("code", name).status == "memory"


def test_a_large_file_is_refused_by_the_kernel(sandbox):
    assert "File too large" in sandbox.call("code", "fill").message


def test_files_in_its_own_folder_are_allowed(sandbox):
    kept, listed = sandbox.call("code", "keep").value
    assert kept == "kept" and "note" in listed


def test_output_is_collected_up_to_its_limit_and_never_mixes_with_answers(sandbox):
    sandbox.output()
    assert sandbox.call("code", "shout").status == "ok"
    assert sandbox.output() == "loud" * 250
    assert sandbox.output() == ""


def test_the_environment_and_stdin_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    with Sandbox(LIMITS) as fresh:
        fresh.load("code", CODE.replace(", torch", ""), "code.py")
        environment = fresh.call("code", "environment").value
        assert "SECRET_TOKEN" not in environment and environment["HOME"] == environment["TMPDIR"]
        assert fresh.call("code", "stdin").value == ""
        assert fresh.call("code", "import_it", "fractions").status == "ok", "the standard library is there"


def test_torch_still_works_behind_the_hook(sandbox):
    reply = sandbox.call("code", "recompute")
    assert (reply.status, reply.refused) == ("ok", ()), reply.message
    assert_close(reply.value, torch.full((3,), 4.0))


# What is refused


@pytest.mark.parametrize("name", ["mla", "transformers"])
def test_importing_what_is_banned_is_noticed_even_when_caught(sandbox, name):
    assert sandbox.call("code", "import_it", name).reference == (f"import {name}",)
    reply = sandbox.call("code", "try_import", name)
    assert (reply.value, reply.reference) == ("caught", (f"import {name}",))


@pytest.mark.parametrize("name", ["read", "read_low"])
def test_hidden_files_are_not_read(sandbox, name):
    path = str(ROOT / "mla.py")
    assert sandbox.call("code", name, path).reference == (f"reading {path}",)


def test_a_link_does_not_unhide(sandbox):
    reply = sandbox.call("code", "link", str(ROOT / "mla.py"))
    assert reply.status == "error" and (reply.reference or reply.refused)


def test_other_files_are_not_read_either(sandbox, tmp_path):
    (tmp_path / "letter").write_text("private")
    reply = sandbox.call("code", "read", str(tmp_path / "letter"))
    assert reply.value is None and len(reply.refused) == 1 and reply.reference == ()


@pytest.mark.parametrize("name", ["write", "append", "remove", "rename"])
def test_nothing_outside_is_changed(sandbox, tmp_path, name):
    (tmp_path / "letter").write_text("private")
    reply = sandbox.call("code", name, str(tmp_path / "letter"))
    assert reply.status == "error" and len(reply.refused) == 1
    assert (tmp_path / "letter").read_text() == "private"


def test_a_folder_whose_name_begins_like_its_own_is_outside(sandbox):
    sandbox.call("code", "double", 1)
    reply = sandbox.call("code", "write", sandbox._home + "2")
    assert reply.status == "error" and len(reply.refused) == 1 and not pathlib.Path(sandbox._home + "2").exists()


@pytest.mark.parametrize("name", ["fork", "bomb", "start", "system", "spawn", "connect", "ctypes_", "kill", "referrers",
                                  "native", "storage", "tensors"])  # fmt: skip
def test_processes_sockets_and_native_code_are_refused(sandbox, name):
    reply = sandbox.call("code", name)
    assert reply.status == "error" and len(reply.refused) == 1 and "refused" in reply.message


# How it ends


def _runs(pid):
    """Whether a process exists and is no zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
        return not LINUX or pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_an_endless_loop_is_ended_and_the_next_call_works(sandbox):
    began = time.monotonic()
    reply = sandbox.call("code", "loop", seconds=0.5)
    assert (reply.status, reply.message) == ("timeout", "is not finished after 0.5 s")
    assert 0.5 <= time.monotonic() - began
    assert sandbox.call("code", "double", 2).value == 4, "a new child has the module again"


@pytest.mark.parametrize("name, word", [("vanish", "exit code 7"), ("crash", "SIGABRT")])
def test_a_crash_is_told_and_the_next_call_works(sandbox, name, word):
    reply = sandbox.call("code", name)
    assert reply.status == "died" and word in reply.message
    assert sandbox.call("code", "double", 2).value == 4


@pytest.mark.parametrize(
    "header, body",
    [
        (b"[", b""),
        (b"{}", b""),
        (b'{"dict": [["status", "ok"]]}', b""),
        (b'{"dict": [[["a"], 1]]}', b""),
        (b'{"function": ["os", "system"]}', b""),
        (b"[" * 100_000, b""),
        (b'{"tensor": "0"}', b"\xff" * 40),
    ],
)
def test_nonsense_in_the_message_pipe_is_told(header, body):
    box = Sandbox(LIMITS)
    message = memoryview(_LENGTHS.pack(len(header), len(body)) + header + body)
    with pytest.raises(Exception) as stopped:
        box._read(message)
    assert stopped.value.args[0].status == "protocol"


def test_a_child_that_writes_into_every_pipe_is_ended():
    with Sandbox(LIMITS) as box:
        box.load("code", CODE.replace(", torch", ""), "code.py")
        reply = box.call("code", "nonsense")
        assert (reply.status, reply.message) == ("protocol", "wrote a message that is too long")


def test_a_module_that_does_not_load_is_told_with_its_line(sandbox):
    reply = sandbox.load("bad", "x = 1\ny = = 2\n", "bad.py")
    assert (reply.status, reply.line) == ("error", 2) and reply.message.startswith("SyntaxError")
    reply = sandbox.load("bad", "x = 1\n\nraise RuntimeError('no')\n", "bad.py")
    assert (reply.status, reply.line, reply.message) == ("error", 3, "RuntimeError: no")
    reply = sandbox.load("bad", "import code\nwhile True: pass\n", "bad.py", seconds=0.5)
    assert reply.status == "timeout"
    assert sandbox.call("code", "double", 2).value == 4


def test_a_trusted_module_is_defined_before_the_hook_closes():
    with Sandbox(LIMITS, trusted={"helper": "import subprocess\nversion = subprocess.run(['true']).returncode"}) as box:
        assert box.load("code", "import helper\ndef f(): return helper.version", "code.py").value == ["f"]
        assert box.call("code", "f").value == 0


def test_a_sandbox_that_cannot_start_says_why():
    with Sandbox(LIMITS, preload=("no_such_module",)) as box, pytest.raises(SandboxError, match="no_such_module"):
        box.call("code", "f")


def test_limits_that_do_not_bind_are_said(sandbox):
    sandbox.call("code", "double", 1)
    assert any("root" in note for note in sandbox.notes) == (os.geteuid() == 0)
    assert any("memory" in note for note in sandbox.notes) == (not LINUX)


def test_closing_removes_the_folder_and_ends_the_child():
    with Sandbox(LIMITS) as box:
        box.load("code", "import os\ndef where(): return os.getcwd(), os.getpid()", "code.py")
        folder, child = box.call("code", "where").value
        assert pathlib.Path(folder).is_dir()
    assert not pathlib.Path(folder).exists()
    assert not _runs(child)


@pytest.mark.skipif(not LINUX, reason="the mark is looked up in /proc")
def test_a_descendant_that_left_the_group_is_killed_too():
    start = "import subprocess\npid = subprocess.Popen(['sleep', '600'], start_new_session=True).pid"
    with Sandbox(LIMITS, trusted={"daemon": start}) as box:
        box.load("code", "import daemon\ndef pid(): return daemon.pid", "code.py")
        pid = box.call("code", "pid").value
        assert _runs(pid)
    deadline = time.monotonic() + 10  # the kill has been sent; a busy machine takes its time to end the process
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def test_a_child_whose_parent_dies_clears_up_and_ends():
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom sandbox import Sandbox\nbox = Sandbox()\n"
        "box.load('code', 'import os\\ndef who(): return os.getpid(), os.getcwd()', 'code.py')\n"
        "print(*box.call('code', 'who').value, flush=True)\nos._exit(1)"
    )
    pid, folder = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()
    for _ in range(100):
        if not _runs(int(pid)):
            assert not pathlib.Path(folder).exists()
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")
