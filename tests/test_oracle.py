"""The command line as a user meets it: every command is there, helps, answers misuse with one line and code 2.

Run: .venv/bin/python -m pytest tests/test_oracle.py
"""

import os
import pathlib
import subprocess
import sys

import pytest

import oracle
from conformance import OPS

ROOT = pathlib.Path(__file__).resolve().parent.parent


def program(*arguments, **options):
    """Run oracle.py as its own process, on one thread."""
    return subprocess.run([sys.executable, "oracle.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120, **options)  # fmt: skip


def test_list_names_every_operation(capsys):
    assert oracle.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}(" in out for name in OPS) and f"{len(OPS)} operations" in out and "bfloat16 3e-02" in out


@pytest.mark.parametrize("command", oracle.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        oracle.main([command, "--help"])
    assert stopped.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "no_such_file.py"],
        ["golden", "--out", "{tmp}/golden", "--ops", "rms_morm"],
        ["compare", "{tmp}/nothing", "{tmp}"],
        ["trace", "--checkpoint", "{tmp}/nothing", "--against", "{tmp}"],
        ["mutants", "--ops", "rms_morm"],
        ["exercise", "mo"],
        ["grade", "{tmp}/nothing.py"],
        ["bench", "--peer", "nobody"],
        ["defects", "nothing"],
        ["golden", "--out", "README.md/golden", "--ops", "rms_norm"],
        ["mutants", "--ops", "timestamp", "--json", "{tmp}/no/such/folder.json"],
    ],
)
def test_misuse_is_told_in_one_line_and_exits_with_2(arguments, tmp_path, capsys):
    try:
        code = oracle.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    except SystemExit as stopped:  # argparse's own complaint ends so
        code = stopped.code
    told = capsys.readouterr()
    assert code == 2 and len(told.err.strip().splitlines()[-1]) > 10 and "Traceback" not in told.err
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_closed_pipe_ends_quietly():
    reader = subprocess.Popen([sys.executable, "oracle.py", "list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.close()
    assert reader.wait(60) == 0 and b"Traceback" not in reader.stderr.read()


def test_the_whole_way_of_a_port(tmp_path, capsys):
    """A port is checked, its goldens are compared, its bug is found by the same words."""
    port = tmp_path / "port.py"
    port.write_text("import torch\n\ndef softmax_scale(n, p, factor, mscale, mscale_all_dim):\n    return (n + p) ** -0.5\n")
    checked = program("check", str(port), "--ops", "softmax_scale")
    assert checked.returncode == 1 and "YaRN" in checked.stdout
    golden = str(tmp_path / "golden")
    assert oracle.main(["golden", "--out", golden, "--ops", "softmax_scale,rms_norm", "--cases", "2"]) == 0
    assert oracle.main(["compare", golden, golden]) == 0, capsys.readouterr().out


def test_the_whole_way_of_a_student(tmp_path, capsys):
    lesson = tmp_path / "my_rms_norm.py"
    assert oracle.main(["exercise", "rms_norm", "--out", str(lesson)]) == 0
    assert oracle.main(["grade", str(lesson)]) == 1 and " 0" in capsys.readouterr().out
    lesson.write_text(lesson.read_text().partition("def rms_norm")[0] + (
        "def rms_norm(x, weight, eps):\n    wide = x.to(torch.promote_types(x.dtype, torch.float32))\n"
        "    return weight * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)\n"))  # fmt: skip
    solved = program("grade", str(lesson))
    assert solved.returncode == 0 and "100" in solved.stdout, solved.stdout + solved.stderr


def test_the_readmes_transcript_is_what_is_printed(tmp_path, capsys, monkeypatch):
    """The module between `cat` and the command gives the lines below it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    source, _, rest = text.partition("$ cat my_kernels.py\n")[2].partition("\n$ python oracle.py ")
    command, _, printed = rest.partition("```")[0].partition("\n")
    (tmp_path / "my_kernels.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert oracle.main(command.split()) == 1
    assert capsys.readouterr().out.strip() == printed.strip()
