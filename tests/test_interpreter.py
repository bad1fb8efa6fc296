"""Claims about interpreter.py and zygote.py: what a model's program gets, what it is told, and what it cannot do.

Run: .venv/bin/python -m pytest tests/test_interpreter.py
"""

import asyncio
import dataclasses
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
LARGE = dataclasses.replace(LIMITS, seconds=60, cpu_seconds=60, memory_mb=256, file_mb=4, output_bytes=2000, message_mb=8)

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


def reads_its_libraries(box):
    """Not where a spare user cannot get at them: a container's root with a Python below /root."""
    return not any("closed to others" in note for note in box.notes)


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
    if "email" in code and not reads_its_libraries(box):
        pytest.skip("it cannot be imported")
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
        (lambda it: it.run("#" * (9 << 20)), "over the limit of 8 MB"),
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
        ("import os\nos.makedirs('a/b')\nos.chdir('a/b')",
         "import os\nos.path.basename(os.getcwd()) not in 'ab', os.listdir()", "(True, [])"),
        ("import os\nos.environ['A'] = '1'", "import os\n'A' in os.environ", "False"),
        ("import sys\nsys.path.insert(0, '.')\nopen('mine.py', 'w')\nimport mine",
         "import sys\n'.' in sys.path, 'mine' in sys.modules", "(False, False)"),
        ("import sys\nsys.modules['math'] = None", "import math\nmath.pi > 3", "True"),
        ("import sys\nsys.stdout.close()", "print(1)", "1\n"),
        ("import sys\nsys.setrecursionlimit(50)", "import sys\nsys.getrecursionlimit()", "1000"),
        ("import atexit\natexit.register(print, 'late')", "1", "1"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",
         "import signal\nsignal.getsignal(signal.SIGTERM).name", "'SIG_DFL'"),
        ("import os\nos.umask(0o777)", "import os\nopen('a', 'w')\nopen('a').read()", "''"),
        ("import warnings\nwarnings.simplefilter('error')",
         "import warnings\nwarnings.warn('w')", "<program>:2: UserWarning: w\n  warnings.warn('w')\n"),
        ("import gc\ngc.disable()", "import gc\ngc.isenabled()", "True"),
    ],
)  # fmt: skip
def test_nothing_of_one_call_is_seen_by_the_next(box, first, then, expected):
    before = box.run(then).text
    assert box.run(first).status == "ok"
    assert box.run(then).text == before == expected


RESIDUE = """
found = 0
kept = [np.empty(size, np.uint8) for size in [520, 700, 1000, 1040, 2000, 4000, 8000, 20000, 40000, 80000, 120000] * 20]
kept += [np.asarray(Image.new("L", (size, 8), None)) for size in (70, 700, 7000)]
for array in kept:
    found += sum(bytes(array).count(word) for word in (b"\\xab" * 4, b"xyz" + b"zy"))
found
"""


@linux_only
def test_uninitialised_memory_shows_nothing_of_earlier_calls(box):
    if any("scraps" in note for note in box.notes):
        pytest.skip("not the GNU C library")
    for side in (60, 100, 150):
        grey = Image.new("RGB", (side, side), (0xAB, 0xAB, 0xAB))
        assert box.run("#" + "xyzzy" * 200 + "\nprint('xyzzy' * 300)", [grey]).status == "ok"
        assert box.run(RESIDUE).text == "0"
        assert box.run("#" + "xyzzy" * 120 + "\n'xyzzy' * 120").status == "ok"
        assert box.run(RESIDUE).text == "0"
    assert box.run(RESIDUE.replace("\nfound = 0", "\nfound = 1")).text == "1", "the program itself works"


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
    "a process pool": ("from concurrent.futures import ProcessPoolExecutor as P\nP(1).submit(print, 'ESCAPED').result()",
                       {"refused", "error"}),
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
    "a forbidden library": ("import hypothesis\nprint('ESCAPED')", {"refused"}),
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
    "signals ignored": ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
                        "    except (OSError, ValueError): pass\nwhile True: pass", {"timeout"}),
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
    "deeper recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [x].sort(key=f)\nf(1)",
                         {"died", "timeout", "memory", "error"}),
    "a deep literal": ("eval('(' * 10**5 + ')' * 10**5)", {"error", "memory"}),
    "a null byte": ("a\0b", {"error"}),
    "a long literal": ("len(eval('[' + '1,' * (5 * 10**6) + ']'))", {"ok", "timeout", "memory"}),
    "huge output": ("while True: print('x' * 10**6)", {"output"}),
    "a flood on stderr": ("import os\nwhile True: os.write(2, b'x' * 10**6)", {"output"}),
    "a huge value": ("'x' * (30 << 20)", {"ok"}),
    "one huge file": ("with open('a', 'wb') as f: f.write(bytes(5 << 20))", {"error"}),
    "filling the disk": ("for i in range(10**4):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))", {"error"}),
    "a hundred thousand files": ("for i in range(10**5): open(str(i), 'w').close()", {"error"}),
    "using up descriptors": ("kept = [open('a', 'w') for _ in range(10**4)]", {"error"}),
    "unpickling": ("import pickle\npickle.loads(b'cposix\\nsystem\\n(S\"echo ESCAPED\"\\ntR.')", {"refused"}),
    "numpy unpickling": ("open('a.npy', 'wb').write(b'cposix\\nsystem\\n(S\"echo ESCAPED\"\\ntR.')\nnp.load('a.npy', allow_pickle=True)",
                         {"refused", "error"}),
    "marshalled code": ("import marshal, types\nc = compile('import os; os.system(\"echo ESCAPED\")', '', 'exec')\n"
                        "exec(marshal.loads(marshal.dumps(c)))", {"refused"}),
    "a thread that goes on": ("import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()", {"error"}),
    "a raw thread": ("import _thread\n_thread.start_new_thread(print, ('ESCAPED',))", {"error"}),
    "an exit handler": ("import atexit\natexit.register(lambda: print('ESCAPED'))", {"ok"}),
    "a finaliser": ("class A:\n    def __del__(self):\n        while True: pass\na = A()", {"ok"}),
    "os._exit": ("import os\nos._exit(0)", {"died"}),
    "os.abort": ("import os\nos.abort()", {"died"}),
    "a segmentation fault": ("import sys\nsys.setrecursionlimit(10**6)\nx = ()\nfor _ in range(10**6): x = (x,)\nhash(x)",
                             {"died", "error"}),
    "inherited descriptors": ("import os\nfor d in range(4, 1024):\n    try: os.fstat(d); print('ESCAPED')\n    except OSError: pass",
                              {"ok"}),
    "writing into the verdict": ("import os\nos.write(3, b'{\"status\": \"ESC\" }')", {"died"}),
    "flooding the verdict": ("import os\nwhile True: os.write(3, b'x' * 10**6)", {"died"}),
    "closing everything": ("import os\nos.closerange(0, 1024)\nwhile True: pass", {"died"}),
    "a forged answer": ("import os\nos.write(3, b'{\"status\": \"lost\", \"tail\": \"\", \"refused\": [], \"finished\": 0}')\nos._exit(0)",
                        {"died"}),
    "its objects": ("import gc\nprint(gc.get_objects())\nprint('ESCAPED')", {"refused"}),
    "its callers": ("import sys\nf = sys._getframe()\nwhile f:\n"
                    "    print({k: repr(v) for k, v in f.f_locals.items()}, len(f.f_globals))\n    f = f.f_back",
                    {"ok"}),
    "a decompression bomb": ("import struct, zlib\ndef chunk(kind, data):\n    crc = zlib.crc32(kind + data)\n"
                             "    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)\n"
                             "header = struct.pack('>IIBBBBB', 9**5, 9**5, 8, 2, 0, 0, 0)\n"
                             "open('b.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', header)\n"
                             "    + chunk(b'IDAT', zlib.compress(bytes(9**6))) + chunk(b'IEND', b''))\n"
                             "Image.open('b.png').load()", {"error", "memory"}),
    "a large picture": ("Image.new('RGB', (30000, 30000)).tobytes()", {"memory", "error"}),
    "a traced exit": ("import sys\nsys.settrace(lambda *_: 1 / 0)\nsys.setprofile(lambda *_: None)\nx = 1", {"ok", "error", "died"}),
    "patching what reports": ("import os, json\nos.write = json.dumps = print", {"ok", "died"}),
    "becoming the main module": ("import sys\nsys.modules.clear()\nimport os", {"ok", "error", "died"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_is_contained_and_told(box, secret, letter, name):
    code, statuses = ESCAPES[name]
    statuses = statuses if reads_its_libraries(box) else statuses | {"error"}
    code = code.replace("LETTER", str(letter)).replace("ROOT", str(ROOT)).replace("PARENT", str(os.getpid()))
    observation = box.run(code, seconds=0.4 if "timeout" in statuses else None)
    assert observation.status in statuses, observation
    assert not re.search("ESCAPED|xyzzy-", observation.text.replace("echo ESCAPED", "")), observation
    assert len(observation.text) <= LARGE.output_bytes
    assert works(box)
    assert letter.read_text() == "xyzzy-private" and not pathlib.Path("/tmp/xyzzy").exists()


def test_there_are_enough_escapes():
    assert len({code for code, _ in ESCAPES.values()}) == len(ESCAPES) >= 30


# What holds when the audit hook is talked out of its verdicts: the kernel

DISARM = """
try:
    open("/nowhere")
except PermissionError as refusal:
    step = refusal.__traceback__
    while step.tb_frame.f_code.co_name != "hook":
        step = step.tb_next
    frame = step.tb_frame
    frame.f_globals.update(_FORBIDDEN=(), _CHANGES=(), _within=lambda *_: True)
    for cell in frame.f_locals["place"].__closure__:
        if isinstance(cell.cell_contents, dict):
            cell.cell_contents.update(dict.fromkeys(["/", *cell.cell_contents], ""))
import os
ctypes = np._core._internal.ctypes
libc = ctypes.CDLL(None)
"""
PAST = {  # each prints ESCAPED where nothing confines it; those of ROOT'S only as root
    "fork": "print('ESCAPED' if os.fork() else '')",
    "fork in C": "print('ESCAPED' if libc.fork() > 0 else '')",
    "execv": "os.execv('/bin/echo', ['echo', 'ESCAPED'])",
    "system": "libc.system(b'echo ESCAPED')",
    "subprocess": "import subprocess\nsubprocess.run(['echo', 'ESCAPED'])",
    "posix_spawn": "os.posix_spawn('/bin/echo', ['echo', 'ESCAPED'], {}), os.wait()",
    "a thread in C": "import _thread, time\n_thread.start_new_thread(print, ('ESCAPED',))\ntime.sleep(0.1)",
    "a socket": "import socket\nsocket.socket()\nprint('ESCAPED')",
    "a socket in C": "print('ESCAPED' if libc.socket(2, 1, 0) >= 0 else '')",
    "a netlink socket": "print('ESCAPED' if libc.socket(16, 3, 0) >= 0 else '')",
    "a socket pair": "print('ESCAPED' if libc.socketpair(1, 1, 0, (ctypes.c_int * 2)()) == 0 else '')",
    "killing the parent": "os.kill(os.getppid(), 0)\nprint('ESCAPED')",
    "signals by fcntl": "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())\nprint('ESCAPED')",
    "tracing": "print('ESCAPED' if libc.ptrace(0, 0, 0, 0) == 0 else '')",
    "its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nprint('ESCAPED')",
    "the parent's limits": "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU)\nprint('ESCAPED')",
    "other user id": "os.setresuid(os.getuid(), os.getuid(), os.getuid())\nprint('ESCAPED')",
    "a session": "print('ESCAPED' if libc.getsid(0) >= 0 else '')",
    "priorities": "os.nice(0)\nprint('ESCAPED')",
    "shared memory": "print('ESCAPED' if libc.shmget(0, 4096, 0o1600) >= 0 else '')",
    "memory files": "os.memfd_create('a')\nprint('ESCAPED')",
    "/etc/passwd": "open('/etc/passwd').read()\nprint('ESCAPED')",
    "a letter": "print(open('LETTER').read(), 'ESCAPED')",
    "the repository": "open('ROOT/interpreter.py').read()\nprint('ESCAPED')",
    "listing": "os.listdir('ROOT')\nprint('ESCAPED')",
    "our environment": "open('/proc/%d/environ' % os.getppid()).read()\nprint('ESCAPED')",
    "its environment": "open('/proc/self/environ').read()\nprint('ESCAPED')",
    "writing": "open('FOLDER/xyzzy', 'w')\nprint('ESCAPED')",
    "appending": "open('LETTER', 'a')\nprint('ESCAPED')",
    "truncating": "os.truncate('LETTER', 13)\nprint('ESCAPED')",
    "a folder": "os.mkdir('FOLDER/d')\nprint('ESCAPED')",
    "renaming": "os.rename('LETTER', 'LETTER')\nos.rename('LETTER', 'LETTER2')\nos.rename('LETTER2', 'LETTER')\nprint('ESCAPED')",
    "a link": "os.link('LETTER', 'LETTER3')\nos.remove('LETTER3')\nprint('ESCAPED')",
    "a library": "open(np.__file__, 'r+') if 'np' in globals() else None\nprint('ESCAPED')",
}
if os.uname().machine == "x86_64":
    PAST["the 32-bit door"] = (  # mov eax, 20 (getpid); int 0x80; ret
        "import mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\n"
        "call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
        "print('ESCAPED' if call() > 0 else '')"
    )
    PAST["x32 calls"] = "print('ESCAPED' if libc.syscall(0x40000000 + 41, 2, 1, 0) >= 0 or libc.syscall(41, 2, 1, 0) >= 0 else '')"


def program(name, letter):
    """An attempt of PAST with its places filled in."""
    return PAST[name].replace("LETTER", str(letter)).replace("ROOT", str(ROOT)).replace("FOLDER", str(letter.parent))


@linux_only
@pytest.mark.parametrize("name", PAST)
def test_the_kernel_holds_past_the_audit_hook(box, letter, name):
    if any(word in note for note in box.notes for word in ("no seccomp", "no Landlock")):
        pytest.skip("; ".join(box.notes))
    observation = box.run(DISARM + program(name, letter))
    assert observation.status in ("ok", "refused", "error", "died"), observation
    assert "ESCAPED" not in observation.text and "sandbox" not in observation.text, observation
    assert "xyzzy-" not in observation.text and "(line 3)" not in observation.text
    assert works(box) and letter.read_text() == "xyzzy-private" and len(list(letter.parent.iterdir())) == 1


@linux_only
def test_the_attempts_succeed_where_nothing_confines_them(letter, tmp_path):
    """The control: without it, a misspelt attempt would count as contained."""
    attempts = {name: program(name, letter) for name in PAST if name not in ("priorities", "signals by fcntl", "the 32-bit door")}
    said = {name: tmp_path / str(number) for number, name in enumerate(attempts)}
    script = (  # one fork each
        "import ctypes, json, os, sys\nlibc = ctypes.CDLL(None)\nfor path, code in json.load(sys.stdin):\n    if os.fork() == 0:\n"
        "        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 1)\n        exec(code)\n        sys.stdout.flush()\n        os._exit(0)\n"
        "    os.wait()\n"
    )
    given_to_it = json.dumps([(str(said[name]), code) for name, code in attempts.items()])
    subprocess.run([sys.executable, "-c", script], input=given_to_it, text=True, check=True)
    (letter.parent / "xyzzy").unlink()
    (letter.parent / "d").rmdir()
    assert not [name for name, path in said.items() if "ESCAPED" not in path.read_text()]


@linux_only
def test_the_hook_was_talked_out_of_it(box):
    """The second control: past the hook it is the kernel that says no, in its own words."""
    observation = box.run(DISARM + "os.fork()")
    assert observation.text.startswith("PermissionError: [Errno 1]") and "sandbox" not in observation.text


# The system calls' filter, run by a second reading of it


def verdict(instructions, architecture, number, argument=0):
    """What a BPF program returns for a system call: the four instructions that ours has."""
    data = {0: number, 4: architecture, 24: argument}
    at = accumulator = 0
    while True:
        code, true, false, k = instructions[at]
        if code == 0x20:
            accumulator = data[k]
        elif code == 0x06:
            return k
        else:
            assert code in (0x15, 0x35)
            at += true if (accumulator == k if code == 0x15 else accumulator >= k) else false
        at += 1


@linux_only
@pytest.mark.parametrize("machine, column, architecture", [("x86_64", 1, 0xC000003E), ("aarch64", 2, 0xC00000B7)])
def test_the_filter_does_what_its_table_says(monkeypatch, machine, column, architecture):
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine=machine))
    instructions = [(c, t, f, k) for c, t, f, k in np.frombuffer(zygote._filter().raw, "u2,u1,u1,u4").tolist()]
    allowed = {int(n) for n in zygote._ALLOWED.split()[column::3] if n != "-"}
    pretended = {int(n) for n in zygote._PRETENDED.split()[column::3] if n != "-"}
    fcntl, ioctl = int(zygote._FCNTL.split()[column]), int(zygote._IOCTL.split()[column])
    assert len(allowed | pretended | {fcntl, ioctl}) == len(allowed) + len(pretended) + 2, "a number is there twice"
    for number in [*range(600), 0x40000000, 0x40000029, 2**32 - 1]:
        expected = 0x50001  # EPERM
        if number in allowed or number == fcntl:
            expected = 0x7FFF0000
        elif number in pretended:
            expected = 0x50000
        elif number == ioctl:
            expected = 0x50019  # ENOTTY
        assert verdict(instructions, architecture, number) == expected, number
        assert verdict(instructions, architecture ^ 1, number) == 0x80000000
    assert [verdict(instructions, architecture, fcntl, command) == 0x7FFF0000 for command in (7, 8, 10, 1029, 1030, 1031)] \
        == [True, False, False, False, True, False]  # fmt: skip


@linux_only
@pytest.mark.parametrize("column, header", [(1, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (2, "/usr/include/asm-generic/unistd.h")])
def test_the_numbers_are_the_kernels(column, header):
    if not pathlib.Path(header).exists():
        pytest.skip(f"no {header}")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", pathlib.Path(header).read_text()))
    numbers["newfstatat"] = numbers.get("newfstatat", numbers.get("fstatat"))
    words = " ".join((zygote._ALLOWED, zygote._PRETENDED, zygote._FCNTL, zygote._IOCTL)).split()
    for name, number in zip(words[::3], words[column::3], strict=True):
        assert number == numbers.get(name, "-"), name


@linux_only
def test_no_call_is_allowed_that_reaches_another_process_or_machine():
    forbidden = ("socket connect bind clone clone3 fork vfork execve execveat kill tkill tgkill ptrace prctl mount unshare setns "
                 "setuid setresuid process_vm_readv pidfd_open prlimit64 setrlimit io_uring_setup bpf keyctl truncate "
                 "open_by_handle_at memfd_create shmget mknod mknodat userfaultfd perf_event_open setxattr").split()  # fmt: skip
    assert not set(forbidden) & set(zygote._ALLOWED.split())


@linux_only
def test_what_the_kernel_offers_is_used(box):
    if zygote._LIBC.syscall(zygote.LANDLOCK_CREATE_RULESET, None, 0, 1) > 0:
        assert not any("Landlock" in note for note in box.notes)
    if pathlib.Path("/proc/sys/kernel/seccomp/actions_avail").exists() and os.uname().machine in ("x86_64", "aarch64"):
        assert not any("seccomp" in note for note in box.notes)


@linux_only
@pytest.mark.skipif(os.geteuid() != 0, reason="root only")
def test_as_root_each_worker_has_a_user_and_a_network_of_its_own(box):
    with Interpreter(LARGE) as other:
        users = [it.run("import os\nos.getuid(), os.geteuid(), os.getgid(), os.getegid(), os.getgroups()").text for it in (box, other)]
        networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in (box._process.pid, other._process.pid, os.getpid())}
    if not any("no other user" in note for note in box.notes):
        numbers = [set(map(int, re.findall(r"\d+", text))) for text in users]
        assert [len(n) for n in numbers] == [1, 1] and numbers[0] != numbers[1] and 0 not in numbers[0]
    if not any("no network" in note for note in box.notes):
        assert len(networks) == 3


# Without help of the kernel


@linux_only
def test_as_the_same_user_a_program_still_keeps_to_its_folder(plain, letter):
    with Interpreter(LARGE) as it:
        assert any("no other user" in note for note in it.notes) and any("no mounts" in note for note in it.notes)
        assert it.run("a = np.asarray(Image.open('image.png'))\na.shape", [Image.new("RGB", (3, 2))]).text == "(2, 3, 3)"
        assert it.run("open('../left', 'w')").status == "refused"
        assert it.run(f"open({str(letter)!r})").status == "refused"
        assert it.run(DISARM + "open('../left', 'w')").text.startswith("PermissionError: [Errno 13]")
        assert it.run("import os\nos.listdir(), os.environ['HOME'] == os.getcwd()").text == "([], True)"
        assert works(it)


@linux_only
@pytest.mark.parametrize(
    "code, status",
    [
        ("import os\nfor i in range(998):\n    os.mkdir('d')\n    os.chdir('d')\nprint('deep')", "ok"),
        ("import os\nos.mkdir('a')\nopen('a/b', 'w')\nos.umask(0o777)\nos.mkdir('a/c')\nprint('closed')", "ok"),
        ("import time\nfor i in range(10**6):\n    with open(str(i % 900), 'wb') as f: f.write(bytes(1 << 20))", "error"),
        ("for i in range(10**6): open(str(i), 'w').close()", "error"),
    ],
)
def test_in_the_common_file_system_a_folder_is_measured_and_removed(plain, code, status):
    with Interpreter(LARGE) as it:
        observation = it.run(code)
        assert observation.status == status and ("larger than 16 MB" in observation.text) == (status == "error")
        assert list(pathlib.Path(it._folder).iterdir()) == [] and works(it)
    assert not pathlib.Path(it._folder).exists()


@linux_only
def test_layers_that_are_missing_are_said(monkeypatch):
    patch = "import zygote; zygote._filter = lambda: None; zygote._ruleset = lambda *_: None; zygote._separate = None;"
    monkeypatch.setattr(interpreter, "_SCRIPT", interpreter._SCRIPT.replace("import zygote;", patch))
    with Interpreter(LARGE) as it:
        assert any("no seccomp" in note for note in it.notes) and any("no Landlock" in note for note in it.notes)
        assert it.run("1 + 1").text == "2"
        assert it.run("import os\nos.fork()").status == "refused", "the hook still refuses"


@linux_only
def test_a_child_that_is_confined_less_than_the_first_runs_nothing(monkeypatch):
    patch = ("import zygote; make = zygote._filter; zygote.Zygote.filter = property(lambda self: make() if self.gaps is None else None, "
             "lambda *_: None);")  # fmt: skip
    monkeypatch.setattr(interpreter, "_SCRIPT", interpreter._SCRIPT.replace("import zygote;", patch))
    with Interpreter(LARGE) as it:
        observation = it.run("print('ran')")
        assert (observation.status, observation.valid) == ("lost", False) and "ran" not in observation.text


# Workers that fail


@linux_only
def test_a_dead_worker_is_replaced_and_the_call_made_again():
    with Interpreter(LARGE) as it:
        first = it._process.pid
        os.kill(first, signal.SIGKILL)
        assert it.run("1 + 1").text == "2"
        assert it._process.pid != first and works(it)


@linux_only
def test_a_program_dies_with_its_worker():
    with Interpreter(LARGE) as it:
        thread = threading.Thread(target=it.run, args=("while True: pass",), kwargs={"seconds": 1})
        thread.start()
        while len(processes(it)) < 2:
            time.sleep(0.01)
        mark, children = it._mark, processes(it)
        os.kill(it._process.pid, signal.SIGKILL)
        thread.join()
        assert it._mark != mark and not any(map(alive, children)) and works(it)


def alive(pid):
    """Whether a process runs."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_bug62_a_failure_of_the_machinery_is_no_answer(monkeypatch):
    with Interpreter(LARGE) as it:
        it._process.kill()
        it._process.wait()
        monkeypatch.setattr(sys, "executable", "/bin/false")
        lost = it.run("1 + 1")
        assert (lost.status, lost.valid) == ("lost", False) and lost.text.startswith("Lost: ")
        monkeypatch.undo()
        assert it.run("1 + 1").text == "2"
        assert it.run("1 / 0").valid, "while a wrong program is an answer"


def test_an_interpreter_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(interpreter, "_SCRIPT", interpreter._SCRIPT.replace("zygote.serve", "zygote.PRELOAD = ('no_such',); zygote.serve"))
    for make in (Interpreter, lambda: InterpreterPool(2)):
        with pytest.raises(InterpreterError, match="no_such"):
            make()


@linux_only
def test_closing_leaves_nothing():
    it = Interpreter(LARGE)
    folder, pid = it._folder, it._process.pid
    it.close()
    it.close()
    assert not pathlib.Path(folder).exists() and not alive(pid) and processes(it) == []
    with pytest.raises(InterpreterError, match="closed"):
        it.run("1")


@linux_only
def test_a_worker_whose_owner_dies_ends_with_its_program():
    script = (
        f"import sys, os, threading, time; sys.path.insert(0, {str(ROOT)!r})\nfrom interpreter import Interpreter\nit = Interpreter()\n"
        "threading.Thread(target=it.run, args=('while True: pass',), kwargs={'seconds': 50}, daemon=True).start()\ntime.sleep(0.5)\n"
        "print(it._process.pid, it._folder, it._mark, flush=True)\nos._exit(1)"
    )
    pid, folder, mark = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()
    for _ in range(200):
        if not alive(int(pid)) and not processes(types.SimpleNamespace(_mark=mark)):
            assert not pathlib.Path(folder).exists()
            return
        time.sleep(0.05)
    pytest.fail("something still runs")


# The pool


@pytest.fixture(scope="module")
def pool():
    """Two workers with a short queue."""
    with InterpreterPool(2, LARGE, queue=3) as pool:
        yield pool


def test_coroutines_get_their_own_answers(pool):
    async def all_of_them():
        return await asyncio.gather(*(pool.run(f"{i} * {i}", [Image.new("RGB", (i + 1, 1))]) for i in range(20)))

    assert [o.text for o in asyncio.run(all_of_them())] == [str(i * i) for i in range(20)]
    assert [o.text for o in asyncio.run(all_of_them())] == [str(i * i) for i in range(20)], "in a second event loop"


def test_threads_get_their_own_answers(pool):
    texts = {}
    threads = [threading.Thread(target=lambda i=i: texts.update({i: pool.call(f"{i} + 1").text})) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: str(i + 1) for i in range(12)}


def test_workers_run_side_by_side(pool):
    code = "import time\ntime.sleep(0.4)\ntime.monotonic()"

    async def two():
        return await asyncio.gather(pool.run(code), pool.run(code))

    one, other = asyncio.run(two())
    assert abs(float(one.text) - float(other.text)) < 0.4, "the second ended before it could have run after the first"


def test_no_more_calls_than_the_queue_holds_are_taken_in(pool, monkeypatch):
    taken, work = [], pool._work

    def watched(call):
        taken.append(len(pool._calls))
        return work(call)

    monkeypatch.setattr(pool, "_work", watched)

    async def many():
        await asyncio.gather(*(pool.run("1") for _ in range(15)))

    asyncio.run(many())
    assert len(taken) == 15 and max(taken) <= 3


@linux_only
def test_bug62_an_asyncio_timeout_stops_a_busy_loop(pool):
    async def impatient():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.run("while True: pass", seconds=50), 0.3)
        return await asyncio.gather(pool.run("1"), pool.run("2"))

    assert [o.text for o in asyncio.run(impatient())] == ["1", "2"], "both workers are free"
    workers = list(pool._idle.queue) if hasattr(pool._idle, "queue") else [pool._idle.get() for _ in range(2)]
    for worker in workers:
        assert processes(worker) == [worker._process.pid]
        pool._idle.put(worker)


def test_cancelled_calls_that_wait_never_run(pool, tmp_path):
    async def stampede():
        tasks = [asyncio.create_task(pool.run("while True: pass", seconds=50)) for _ in range(9)]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return await pool.run("'free'")

    assert asyncio.run(stampede()).text == "'free'"
    while pool._calls:  # the last one killed may still be on its way
        time.sleep(0.01)
    assert pool.call("1").text == "1"


def test_closing_a_pool_answers_what_waits():
    async def closing():
        pool = InterpreterPool(1, LARGE)
        tasks = [asyncio.create_task(pool.run("while True: pass", seconds=50)) for _ in range(3)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(pool.close)
        results = await asyncio.gather(*tasks)
        assert [(r.status, r.valid) for r in results] == [("cancelled", False)] * 3
        with pytest.raises(InterpreterError, match="closed"):
            await pool.run("1")
        pool.close()

    asyncio.run(closing())


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": 1, "queue": 0}])
def test_a_pool_of_nothing_is_refused(arguments):
    with pytest.raises(InterpreterError, match="at least 1"):
        InterpreterPool(**arguments)


# The command line


def test_run_prints_what_a_model_would_be_told(tmp_path, capsys):
    (tmp_path / "p.py").write_text("print(Image.open('image.png').size, Image.open('image1.png').size)\n1 / 0")
    for name, size in (("a.png", (3, 4)), ("b.png", (5, 6))):
        Image.new("RGBA", size).save(tmp_path / name)
    code = main(["run", str(tmp_path / "p.py"), "--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "(3, 4) (5, 6)\nZeroDivisionError: division by zero (line 2)\n") and err.startswith("error, ")
    (tmp_path / "p.py").write_text("6 * 7")
    assert main(["run", str(tmp_path / "p.py")]) == 0 and capsys.readouterr().out == "42\n"


@pytest.mark.parametrize("arguments", [["run", "absent.py"], ["run", "P", "--image", "absent.png"], ["run", "P", "--image", "P"],
                                       ["run", "P", "--seconds", "0"], ["bench", "--calls", "0"]])  # fmt: skip
def test_misuse_is_one_line_and_exit_code_2(tmp_path, capsys, arguments):
    (tmp_path / "p.py").write_text("1")
    assert main([str(tmp_path / "p.py") if a == "P" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"interpreter.py {arguments[0]}: ")


def test_bench_times_every_program_and_writes_only_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interpreter, "BENCH", dict(list(interpreter.BENCH.items())[:2]))
    assert main(["bench", "--calls", "1"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "--calls", "1", "--out", "b.json"]) == 0
    assert "count pixels" in capsys.readouterr().out
    figures = json.loads((tmp_path / "b.json").read_text())
    assert list(figures["programs"]) == list(interpreter.BENCH) and figures["pool_calls_per_second"] > 0
    for row in figures["programs"].values():
        assert row.pop("status") == "ok" and min(row.values()) > 0
        parts = [row[part] for part in ("folder", "fork", "confine", "run", "end", "caller")]
        assert sum(parts) == pytest.approx(row["seconds"]), "of one call, the parts make up the whole"
