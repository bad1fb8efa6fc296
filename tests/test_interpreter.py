"""Claims about interpreter.py and zygote.py: what a model's program gets, what it is told, and what it cannot do.

Run: .venv/bin/python -m pytest tests/test_interpreter.py
"""

import asyncio
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import interpreter
import zygote
from interpreter import LIMITS, Interpreter, InterpreterError, InterpreterPool, main

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINUX = sys.platform == "linux"
LARGE = dataclasses.replace(LIMITS, seconds=60, cpu_seconds=60, memory_mb=256, file_mb=4, output_bytes=2000)

linux_only = pytest.mark.skipif(not LINUX, reason="looked up in /proc")


@pytest.fixture(scope="module")
def secret():
    """Something in our environment that no program may see, put there before the interpreter starts."""
    os.environ["SECRET_TOKEN"] = "xyzzy-secret"
    yield "xyzzy-secret"
    del os.environ["SECRET_TOKEN"]


@pytest.fixture(scope="module")
def letter(tmp_path_factory):
    """A file of somebody else."""
    path = tmp_path_factory.mktemp("elsewhere") / "letter"
    path.write_text("xyzzy-private")
    for folder in path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o055)  # others could read it
    return path


@pytest.fixture(scope="module")
def box(secret):
    """One interpreter for all tests."""
    with Interpreter(LARGE) as it:
        yield it


@pytest.fixture
def plain(monkeypatch):
    """Makes interpreters as of a machine that gives neither a spare user nor mounts."""
    patch = "import zygote; zygote._spare_user = lambda: None;"
    monkeypatch.setattr(interpreter, "_SCRIPT", interpreter._SCRIPT.replace("import zygote;", patch))


def processes(box):
    """Process ids of what this interpreter started: the mark in their environment tells."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if box._mark.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def works(box):
    """Whether the next call is answered, and nothing but the zygote runs."""
    return box.run("40 + 2").text == "42" and (not LINUX or processes(box) == [box._process.pid])


# What a program gets, and what is told of it


@pytest.mark.parametrize(
    "code, text",
    [
        ("", ""),
        ("1 + 1", "2"),
        ("print('a')\n'b'", "a\n'b'"),
        ("print('a', end='')\nnp.arange(3)", "a\narray([0, 1, 2])"),
        ("x = 1", ""),
        ("None", ""),
        ("import sys\nprint('to', end=' ')\nprint('stderr', file=sys.stderr)", "to stderr\n"),
        ("if __name__ == '__main__':\n    print(__name__)", "__main__\n"),
        ("Image.new('RGB', (2, 3))", "<PIL.Image.Image image mode=RGB size=2x3>"),
        ("object()", "<object object>"),
        ("print('\\ud800')", "\\ud800\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)", "A(x=1)"),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", "True"),
        ("import statistics, json, email.message, decimal, zlib\nstatistics.mean([1, 3])", "2"),
        ("import shutil, os\nopen('a', 'w').write('x')\nshutil.copy('a', 'b')\nsorted(os.listdir())", "['a', 'b']"),
        ("import tempfile\nwith tempfile.NamedTemporaryFile() as file: file.write(b'x')\nimport os\nos.listdir()", "[]"),
    ],
)
def test_text_is_what_was_printed_and_then_the_value(box, code, text):
    observation = box.run(code)
    assert (observation.status, observation.text, observation.truncated, observation.refused) == ("ok", text, False, ())
    assert observation.valid and observation.seconds > 0


@pytest.mark.parametrize(
    "code, line",
    [
        ("x = 1\n\n1 / 0", "ZeroDivisionError: division by zero (line 3)"),
        ("def f():\n    return {}['k']\n\nf()", "KeyError: 'k' (line 2)"),
        ("x = 1\ny = = 2", "SyntaxError: invalid syntax (line 2)"),
        ("np.ones((2, 3)) @ np.ones((2, 3))", "ValueError: matmul: "),
        ("class A:\n    def __repr__(self): return 1 / 0\nA()", "ZeroDivisionError: division by zero (line 2)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1)"),
        ("import sys\nsys.exit(3)", "calls sys.exit(3) (line 2)"),
        ("input()", "EOFError: EOF when reading a line (line 1)"),
        ("a\0b", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_an_exception_is_one_line_with_its_line_number(box, code, line):
    observation = box.run("print('before')\n" * ("SyntaxError" not in line) + code)
    shift = int("SyntaxError" not in line)
    expected = re.sub(r"line (\d+)", lambda match: f"line {int(match[1]) + shift}", line)
    assert observation.status == "error"
    assert observation.text.startswith("before\n" * shift + expected) and observation.text.count("\n") == shift


def test_pictures_are_files_in_an_otherwise_empty_folder(box):
    pictures = [Image.new("RGB", (5, 4), (1, 2, 3)), Image.new("RGB", (3, 2), (7, 8, 9))]
    code = "import os\nfor name in sorted(os.listdir()): print(name, np.asarray(Image.open(name)).tolist())"
    colours = [("image.png", [[[1, 2, 3]] * 5] * 4), ("image1.png", [[[7, 8, 9]] * 3] * 2)]
    assert box.run(code, pictures).text == "".join(f"{name} {pixels}\n" for name, pixels in colours)
    assert box.run("im = Image.open('image.png')\nim.rotate(90).save('image.png')\nim.size", pictures).text == "(5, 4)"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_a_picture_crosses_without_loss(tmp_path_factory, width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path = tmp_path_factory.getbasetemp() / "picture.png"
    zygote._write_png(path, width, height, pixels.tobytes())
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)


def test_a_picture_of_many_blocks_crosses_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (211, 307, 3), np.uint8)  # 194 KB: three blocks of deflate
    zygote._write_png(tmp_path / "p.png", 307, 211, pixels.tobytes())
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p.png")), pixels)


@pytest.mark.parametrize(
    "code, begins, ends",
    [
        ("print('ab' * 10**5)", "abab", "\n…\n"),
        ("list(range(10**5))", "[0, 1", "…"),
        ("print('ab' * 10**5)\n'last'", "abab", "\n…\n'last'"),
        ("print('ab' * 10**5)\n1 / 0", "abab", "\n…\nZeroDivisionError: division by zero (line 2)"),
        ("print('ä' * 10**5)", "ää", "\n…\n"),
        ("import os\nos.write(1, b'\\xff' * 10**5)", "��", "\n…\n100000"),
    ],
)
def test_long_output_is_cut_to_its_limit_and_the_end_is_still_told(box, code, begins, ends):
    observation = box.run(code)
    assert observation.truncated and len(observation.text) <= LARGE.output_bytes
    assert len(observation.text) > LARGE.output_bytes // 4 - 2
    assert observation.text.startswith(begins) and observation.text.endswith(ends)


def test_output_that_just_fits_is_whole(box):
    observation = box.run(f"print('x' * {LARGE.output_bytes - 1})")
    assert observation.text == "x" * (LARGE.output_bytes - 1) + "\n" and not observation.truncated
    assert box.run(f"print('x' * {LARGE.output_bytes})").truncated


def test_what_was_printed_before_time_ran_out_is_told(box):
    observation = box.run("print('so far')\nwhile True: pass", seconds=0.3)
    assert (observation.status, observation.text) == ("timeout", "so far\nTimeout: not finished after 0.3 s")
    assert observation.seconds >= 0.3 and observation.valid


def test_the_same_program_gives_the_same_text_in_every_worker():
    code = "import random\nprint(random.random(), np.random.rand(), hash('a'), {str(i) for i in range(9)}, object(), print)"
    with Interpreter(LARGE) as one, Interpreter(LARGE) as other:
        texts = {it.run(code).text for it in (one, other, one)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda it: it.run(b"1"), "text, not bytes"),
        (lambda it: it.run("1", [Image.new("L", (1, 1))]), "mode L"),
        (lambda it: it.run("1", seconds=-1), "-1 seconds"),
        (lambda it: it.run("1", seconds=float("nan")), "nan seconds"),
        (lambda it: it.run("#" * (65 << 20)), "over the limit of 64 MB"),
    ],
)
def test_misuse_by_the_caller_is_an_error_of_the_caller(box, call, words):
    with pytest.raises(InterpreterError, match=words):
        call(box)
    assert works(box)


# One call and the next


@pytest.mark.parametrize(
    "first, then, expected",
    [
        ("x = 1", "'x' in globals()", "False"),
        ("import builtins\nbuiltins.len = lambda _: 7", "len('a')", "1"),
        ("np.mean = Image.open = None", "(np.mean, Image.open).count(None)", "0"),
        ("np.set_printoptions(precision=1)", "np.array([0.12345])", "array([0.12345])"),
        ("np.seterr(all='raise')", "np.geterr()['over']", "'warn'"),
        ("np.random.seed(5), np.random.rand()", "np.random.rand() == np.random.RandomState(0).rand()", "True"),
        ("import random\nrandom.seed(9)", "import random\nrandom.random() == random.Random(0).random()", "True"),
        ("open('note', 'w').write('x')", "import os\nos.listdir()", "[]"),
        ("import os\nos.makedirs('a/b')\nos.chdir('a/b')", "import os\nos.path.basename(os.getcwd()) not in 'ab', os.listdir()", "(True, [])"),
        ("import os\nos.environ['A'] = '1'", "import os\n'A' in os.environ", "False"),
        ("import sys\nsys.path.insert(0, '.')\nopen('mine.py', 'w')\nimport mine", "import sys\n'.' in sys.path, 'mine' in sys.modules", "(False, False)"),
        ("import sys\nsys.modules['math'] = None", "import math\nmath.pi > 3", "True"),
        ("import sys\nsys.stdout.close()", "print(1)", "1\n"),
        ("import sys\nsys.setrecursionlimit(50)", "import sys\nsys.getrecursionlimit()", "1000"),
        ("import atexit\natexit.register(print, 'late')", "1", "1"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)", "import signal\nsignal.getsignal(signal.SIGTERM).name", "'SIG_DFL'"),
        ("import os\nos.umask(0o777)", "import os\nopen('a', 'w')\nopen('a').read()", "''"),
        ("import warnings\nwarnings.simplefilter('error')", "import warnings\nwarnings.warn('w')", "<program>:2: UserWarning: w\n  warnings.warn('w')\n"),
        ("import gc\ngc.disable()", "import gc\ngc.isenabled()", "True"),
    ],
)  # fmt: skip
def test_nothing_of_one_call_is_seen_by_the_next(box, first, then, expected):
    before = box.run(then).text
    assert box.run(first).status == "ok"
    assert box.run(then).text == before == expected


# Escapes. Each program says ESCAPED if it gets what it wants, and the two secrets must not come back.

ESCAPES = {
    "a TCP socket": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", {"refused"}),
    "a UDP socket": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))", {"refused"}),
    "a UNIX socket": ("import socket\nsocket.socket(socket.AF_UNIX)", {"refused"}),
    "a raw socket": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", {"refused"}),
    "a socket pair": ("import socket\nsocket.socketpair()", {"refused"}),
    "a name server": ("import socket\nsocket.getaddrinfo('example.org', 80)", {"refused"}),
    "urllib": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", {"refused", "error"}),
    "http.client": ("import http.client\nhttp.client.HTTPConnection('127.0.0.1').request('GET', '/')", {"refused"}),
    "asyncio": ("import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 9))", {"refused"}),
    "os.system": ("import os\nos.system('echo ESCAPED')", {"refused"}),
    "os.popen": ("import os\nprint(os.popen('echo ESCAPED').read())", {"refused"}),
    "subprocess": ("import subprocess\nprint(subprocess.check_output(['echo', 'ESCAPED']))", {"refused"}),
    "os.execv": ("import os\nos.execv('/bin/echo', ['echo', 'ESCAPED'])", {"refused"}),
    "os.posix_spawn": ("import os\nos.posix_spawn('/bin/true', ['true'], {})\nprint('ESCAPED')", {"refused"}),
    "os.fork": ("import os\nos.fork()\nprint('ESCAPED')", {"refused"}),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork(); print('ESCAPED')\n    except OSError: pass", {"timeout"}),
    "multiprocessing": ("import multiprocessing\nmultiprocessing.Process(target=print, args=('ESCAPED',)).start()", {"refused", "error"}),
    "a process pool": ("from concurrent.futures import ProcessPoolExecutor as P\nP(1).submit(print, 'ESCAPED').result()", {"refused", "error"}),
    "a pseudo-terminal": ("import pty\npty.spawn(['echo', 'ESCAPED'])", {"refused"}),
    "ctypes": ("import ctypes\nctypes.CDLL(None).system(b'echo ESCAPED')", {"refused"}),
    "numpy's ctypes": ("np.zeros(1).ctypes.data_as(np._core._internal.ctypes.c_void_p)\n"
                       "np._core._internal.ctypes.CDLL(None).socket(2, 1, 0)\nprint('ESCAPED')", {"refused"}),
    "/etc/passwd": ("print(open('/etc/passwd').read())\nprint('ESCAPED')", {"refused"}),
    "numpy reading": ("np.fromfile('/etc/passwd', np.uint8)\nprint('ESCAPED')", {"refused"}),
    "numpy mapping": ("np.memmap('LETTER', np.uint8, 'r')\nprint('ESCAPED')", {"refused"}),
    "PIL reading": ("from PIL import ImageFont\nImageFont.truetype('LETTER')\nprint('ESCAPED')", {"refused", "error"}),
    "a letter": ("print(open('LETTER').read())", {"refused"}),
    "a letter by descriptor": ("import os\nprint(os.read(os.open('LETTER', os.O_RDONLY), 99))", {"refused"}),
    "a letter from above": ("print(open('../../../../../../..LETTER').read())", {"refused", "error"}),
    "the repository": ("print(open('ROOT/interpreter.py').read())\nprint('ESCAPED')", {"refused"}),
    "importing the repository": ("import k25\nprint('ESCAPED')", {"error", "refused"}),
    "listing the repository": ("import os\nprint(os.listdir('ROOT'))\nprint('ESCAPED')", {"refused"}),
    "a forbidden library": ("import scipy\nprint('ESCAPED')", {"refused"}),
    "the parent's environment": ("import os\nprint(open(f'/proc/{os.getppid()}/environ').read())", {"refused", "error"}),
    "our environment": ("print(open('/proc/PARENT/environ').read())", {"refused", "error"}),
    "its own environment": ("import os\nprint(os.environ, os.getenv('SECRET_TOKEN'))", {"ok"}),
    "our memory": ("open('/proc/PARENT/mem', 'rb').read(1)\nprint('ESCAPED')", {"refused", "error"}),
    "writing outside": ("open('/tmp/xyzzy', 'w').write('x')\nprint('ESCAPED')", {"refused"}),
    "writing beside": ("open('../left', 'w').write('x')\nprint('ESCAPED')", {"refused"}),
    "removing a letter": ("import os\nos.remove('LETTER')\nprint('ESCAPED')", {"refused"}),
    "a symbolic link": ("import os\nos.symlink('LETTER', 'mine')\nprint(open('mine').read())", {"refused"}),
    "a hard link": ("import os\nos.link('LETTER', 'mine')\nprint(open('mine').read())", {"refused"}),
    "moving a letter here": ("import os\nos.rename('LETTER', 'mine')\nprint(open('mine').read())", {"refused"}),
    "a device": ("import os\nos.mknod('disk', 0o600 | 0o060000, 0x800)\nprint('ESCAPED')", {"refused"}),
    "changing root": ("import os\nos.chroot('.')\nprint('ESCAPED')", {"refused"}),
    "becoming root": ("import os\nos.setuid(0)\nprint('ESCAPED')", {"refused"}),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)\nprint('ESCAPED')", {"refused"}),
    "killing its group": ("import os\nos.killpg(0, 9)\nprint('ESCAPED')", {"refused"}),
    "raising its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('ESCAPED')", {"refused"}),
    "signals ignored": ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
                        "while True: pass", {"timeout"}),
    "a list that grows": ("kept = []\nwhile True: kept.append([0] * 10**6)", {"memory"}),
    "a giant array": ("np.ones(10**11)", {"memory"}),
    "a giant bytearray": ("bytearray(10**12)", {"memory"}),
    "a giant string": ("'x' * 10**12", {"memory"}),
    "a giant integer": ("9 ** 9 ** 9", {"timeout", "memory"}),
    "an endless loop": ("while True: pass", {"timeout"}),
    "a loop that catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", {"timeout"}),
    "sleeping": ("import time\ntime.sleep(10**6)", {"timeout"}),
    "an endless generator": ("import itertools\nsum(1 for _ in itertools.count())", {"timeout"}),
    "a catastrophic pattern": ("import re\nre.match('(a*)*b', 'a' * 40)", {"timeout"}),
    "deep recursion": ("def f(): return f()\nf()", {"error"}),
    "deeper recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [x].sort(key=f)\nf(1)", {"died", "timeout", "memory", "error"}),
    "a deep literal": ("eval('(' * 10**5 + ')' * 10**5)", {"error", "memory"}),
    "a long literal": ("len(eval('[' + '1,' * (5 * 10**6) + ']'))", {"ok", "timeout", "memory"}),
    "huge output": ("while True: print('x' * 10**6)", {"output"}),
    "a flood on stderr": ("import os\nwhile True: os.write(2, b'x' * 10**6)", {"output"}),
    "a huge value": ("'x' * (30 << 20)", {"ok"}),
    "one huge file": ("with open('a', 'wb') as f: f.write(bytes(5 << 20))", {"error"}),
    "filling the disk": ("for i in range(10**4):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))", {"error"}),
    "a hundred thousand files": ("for i in range(10**5): open(str(i), 'w').close()", {"error"}),
    "using up descriptors": ("kept = [open('a', 'w') for _ in range(10**4)]", {"error"}),
    "unpickling": ("import pickle\npickle.loads(b'cposix\\nsystem\\n(S\"echo ESCAPED\"\\ntR.')", {"refused"}),
    "numpy unpickling": ("open('a.npy', 'wb').write(b'cposix\\nsystem\\n(S\"echo ESCAPED\"\\ntR.')\nnp.load('a.npy', allow_pickle=True)", {"refused", "error"}),
    "marshalled code": ("import marshal, types\nc = compile('import os; os.system(\"echo ESCAPED\")', '', 'exec')\n"
                        "exec(marshal.loads(marshal.dumps(c)))", {"refused"}),
    "a thread that goes on": ("import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()", {"error"}),
    "a raw thread": ("import _thread\n_thread.start_new_thread(print, ('ESCAPED',))", {"error"}),
    "an exit handler": ("import atexit\natexit.register(lambda: print('ESCAPED'))", {"ok"}),
    "a finaliser": ("class A:\n    def __del__(self):\n        while True: pass\na = A()", {"ok"}),
    "os._exit": ("import os\nos._exit(0)", {"died"}),
    "os.abort": ("import os\nos.abort()", {"died"}),
    "a segmentation fault": ("import sys\nsys.setrecursionlimit(10**6)\nx = ()\nfor _ in range(10**6): x = (x,)\nhash(x)", {"died", "error"}),
    "inherited descriptors": ("import os\nfor d in range(4, 1024):\n    try: os.fstat(d); print('ESCAPED')\n    except OSError: pass", {"ok"}),
    "writing into the verdict": ("import os\nos.write(3, b'{\"status\": \"ESC\" }')", {"died"}),
    "flooding the verdict": ("import os\nwhile True: os.write(3, b'x' * 10**6)", {"died"}),
    "closing everything": ("import os\nos.closerange(0, 1024)\nwhile True: pass", {"died"}),
    "a forged answer": ("import os\nos.write(3, b'{\"status\": \"lost\", \"tail\": \"\", \"refused\": [], \"finished\": 0}')\nos._exit(0)", {"died"}),
    "its objects": ("import gc\nprint(gc.get_objects())\nprint('ESCAPED')", {"refused"}),
    "its callers": ("import sys\nf = sys._getframe()\nwhile f:\n    print({k: repr(v) for k, v in f.f_locals.items()}, len(f.f_globals))\n    f = f.f_back", {"ok"}),
    "a decompression bomb": ("import struct, zlib\nd = lambda k, b: struct.pack('>I', len(b)) + k + b + struct.pack('>I', zlib.crc32(k + b))\n"
                             "open('b.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' + d(b'IHDR', struct.pack('>IIBBBBB', 9**5, 9**5, 8, 2, 0, 0, 0))"
                             " + d(b'IDAT', zlib.compress(bytes(9**6))) + d(b'IEND', b''))\nImage.open('b.png').load()", {"error", "memory"}),
    "a large picture": ("Image.new('RGB', (30000, 30000)).tobytes()", {"memory", "error"}),
    "a traced exit": ("import sys\nsys.settrace(lambda *_: 1 / 0)\nsys.setprofile(lambda *_: None)\nx = 1", {"ok", "error", "died"}),
    "patching what reports": ("import os, json\nos.write = json.dumps = print", {"ok", "died"}),
    "becoming the main module": ("import sys\nsys.modules.clear()\nimport os", {"ok", "error", "died"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_is_contained_and_told(box, secret, letter, name):
    code, statuses = ESCAPES[name]
    code = code.replace("LETTER", str(letter)).replace("ROOT", str(ROOT)).replace("PARENT", str(os.getpid()))
    observation = box.run(code, seconds=0.7 if "timeout" in statuses else None)
    assert observation.status in statuses, observation
    assert not re.search("ESCAPED|xyzzy-", observation.text.replace("echo ESCAPED", "")), observation
    assert len(observation.text) <= LARGE.output_bytes
    assert works(box)
    assert letter.read_text() == "xyzzy-private" and not pathlib.Path("/tmp/xyzzy").exists()


def test_there_are_enough_escapes():
    assert len({code for code, _ in ESCAPES.values()}) == len(ESCAPES) >= 30
