"""The course is true: its commands run, its names exist, its bugs are named, its answers are what the commands print.

A command marked `# long` is not run, only its --help. Grading takes fewer inputs, in one sandbox for all sittings.

Run: .venv/bin/python -m pytest tests/test_course.py
"""

import contextlib
import importlib
import math
import re
import runpy

import pytest
from PIL import Image

import classroom
import course
from exercises import EXERCISES, find_exercise
from parallel import Layout
from schedule import predict_bubble

TEXT = course.COURSE.read_text(encoding="utf-8")
SITTINGS = course.sittings()
README = (course.COURSE.parent / "README.md").read_text(encoding="utf-8")
FAILING = ("check", "grade", "trace", "defects")  # of oracle.py: exit code 1 where something is wrong, as it is in the course

pytestmark = pytest.mark.xdist_group("course")  # the sandbox is opened once
each_sitting = pytest.mark.parametrize("number", SITTINGS)


@pytest.fixture(scope="module")
def sandbox():
    with classroom.open_sandbox() as opened:
        yield opened


def blocks(text, kind):
    """The code blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """(command, whether it is long) of every line of the shell blocks and every inline command, in their order."""
    for block, inline in re.findall(r"^```sh\n(.*?)^```|`((?:python|make) [^`\n]+)`", text, re.DOTALL | re.MULTILINE):
        for line in (block or inline).splitlines():
            yield line.partition("  #")[0].strip(), "# long" in line


def test_there_are_twelve_sittings_of_60_to_90_minutes_that_hold_all_lessons():
    assert list(SITTINGS) == list(course.PICTURES) == list(range(1, 13))
    for number, text in SITTINGS.items():
        whole, *parts = map(int, re.search(r"^\*(\d+) minutes: (\d+) to read, (\d+) to write, (\d+) for the rest\.\*", text, re.MULTILINE).groups())
        assert whole == sum(parts) and 60 <= whole <= 90
        name = re.search(r"exercise (\w+) --out", text)[1]
        assert parts[1] == find_exercise(name).minutes or f"The lesson has {find_exercise(name).minutes} minutes" in text
    named = set(re.findall(r"oracle\.py exercise (\w+) --out", TEXT)) | set(re.findall(r"`(\w+)`", " ".join(re.findall(r"Further: [^\n]*", TEXT))))
    assert named == {exercise.name for exercise in EXERCISES}


@each_sitting
def test_every_sitting_has_its_six_parts(number):
    text = SITTINGS[number]
    places = [text.index(f"**{part}") for part in ("Read**", "Formula**", "Picture**", "Question.**", "Exercise.**", "Bug.**")]
    assert places == sorted(places)
    assert f"course.py picture {number}\n" in text and f"course.py bug {number}\n" in text
    assert len(blocks(text, "python")) == len(blocks(text, "diff")) == 1 and text.count("<details>") == text.count("</details>") == 2


def test_every_file_and_every_name_exists():
    root, count = course.COURSE.parent, 0
    for file in re.findall(r"(?<![\w/.-])(?:tests/)?\w+\.(?:py|md)\b", TEXT):
        assert file.startswith("my_") or file == "report.md" or (root / file).is_file(), file
    for module, names in re.findall(r"`([a-z]\w*)\.([A-Za-z_]\w*(?:\.\w+)*)`", TEXT):
        if names not in ("py", "md"):
            found, count = importlib.import_module(module), count + 1
            for name in names.split("."):
                assert hasattr(found, name), f"{module}.{names}"
                found = getattr(found, name)
    assert count > 60


@each_sitting
def test_every_command_runs_and_prints_what_the_course_says(number, tmp_path, monkeypatch, capsys, sandbox):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classroom, "open_sandbox", lambda *_: contextlib.nullcontext(sandbox))
    printed = ""
    for command, long in commands(SITTINGS[number]):
        printed += run(command, long, capsys)
    with Image.open(tmp_path / f"picture-{number}.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 30
    answer, cause = (re.findall(r"^```text\n(.*?)\n```", part, re.DOTALL | re.MULTILINE)[0] for part in SITTINGS[number].split("<details>")[1:])
    assert found(answer, printed) or answer in README, f"printed:\n{printed}"
    assert cause in printed


def test_the_commands_before_the_first_sitting(capsys):
    install, activate, listing = [command for command, _ in commands(TEXT.partition("## 1.")[0])]
    assert install == "make test ARGS=tests/test_course.py" and activate == ". .venv/bin/activate"
    assert run(install, True, capsys) == "" and run(listing, False, capsys).count(" min  ") == len(EXERCISES)


def run(command, long, capsys):
    """Run one command of the course here; of make, only see that it has such a target. Returns what was printed."""
    program, *words = command.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (course.COURSE.parent / "Makefile").read_text(), re.MULTILINE), command
        return ""
    script, *arguments = words
    assert program == "python", command
    capsys.readouterr()
    if script.startswith("my_"):
        runpy.run_path(script)
        return ""
    if arguments[0] == "defects":
        pytest.importorskip("transformers")
    module = importlib.import_module(script.removesuffix(".py"))
    if long:
        subcommand = arguments[:1] if not arguments[0].startswith("-") else []
        with pytest.raises(SystemExit) as ended:
            module.main([*subcommand, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code in (0, None) and all(flag in shown for flag in arguments if flag.startswith("--")), command
        return ""
    cheaper = ["--examples", "2"] if arguments[0] == "grade" else []
    code = module.main([*arguments, *cheaper])
    shown = capsys.readouterr()
    assert (code or 0) == (script == "oracle.py" and arguments[0] in FAILING), f"{command}\n{shown.out}{shown.err}"
    if arguments[0] == "grade":
        assert "0 of 100 points\nNothing is written yet." in shown.out
    return shown.out


NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def found(line, printed):
    """Whether a line was printed; numbers with a decimal point may differ by a twentieth, or by 0.02."""
    for other in printed.splitlines():
        told, said = NUMBER.findall(line), NUMBER.findall(other.partition(": ")[2] if ".png: " in other else other)
        if len(told) == len(said) and NUMBER.sub("#", line) in NUMBER.sub("#", other):
            pairs = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in zip(told, said)]
            if all(a == b or ("." in text and math.isclose(a, b, rel_tol=0.05, abs_tol=0.02)) for (a, b), text in zip(pairs, told)):
                return True
    return False


def test_answers_are_compared_number_by_number():
    printed = "a.png: 20 batches: 9.6% vision, 0.12 left\nelse 3"
    assert found("20 batches: 9.6% vision, 0.12 left", printed) and found("20 batches: 9.7% vision, 0.13 left", printed)
    assert not found("21 batches: 9.6% vision, 0.12 left", printed) and not found("20 batches: 8.6% vision, 0.12 left", printed)
    assert not found("20 batches: 9.6% sound, 0.12 left", printed) and found("else 3", printed)


@pytest.mark.parametrize("number", [number for number in SITTINGS if number < 12])  # the last one is a converter, not an operation
def test_the_cure_of_a_bug_cures_it(number, tmp_path, monkeypatch, capsys):
    """One change makes the listing right: there is one mistake in it, and the oracle found that one."""
    lines = blocks(SITTINGS[number], "diff")[0].splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
    listing = course.listing(number)
    assert listing.count(old) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_cure.py").write_text(listing.replace(old, new))
    op = re.search(r"--ops (\w+)", SITTINGS[number])[1]
    code = importlib.import_module("oracle").main(["check", "my_cure.py", "--ops", op, "--max-examples", "10"])
    assert code == 0, capsys.readouterr().out


def test_listings_need_no_more_than_a_port_would():
    for number in SITTINGS:
        imported = set(re.findall(r"^(?:import|from) (\w+)", course.listing(number), re.MULTILINE))
        assert imported <= {"json", "re", "math", "pathlib", "shutil", "torch", "numpy", "safetensors"}


def test_misuse_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert course.main(["picture", "13"]) == 2
    assert capsys.readouterr().err == "course.py picture: there is no sitting 13: choose 1 to 12\n"
    (tmp_path / "my_bug_3.py").write_text("mine")
    assert course.main(["bug", "3"]) == 2 and (tmp_path / "my_bug_3.py").read_text() == "mine"
    assert "my_bug_3.py exists already" in capsys.readouterr().err
    assert course.main(["bug", "3", "--out", "other.py"]) == 0 and (tmp_path / "other.py").read_text() == course.listing(3)


def test_figures_of_the_pictures_by_hand():
    words = {number: course.PICTURES[number]()[1] for number in (8, 11)}
    assert "27.3%" in words[8] and "15.8%" in words[8] and round(300 / 11, 1) == 27.3 and round(300 / 19, 1) == 15.8
    assert math.isclose(predict_bubble(Layout(pp=4, microbatches=8), [1.0] * 4, [2.0] * 4), 3 / 11)
    assert words[11].endswith(f"{8 * 2 + 1} critical steps alone, {1 + 3 + 1} with subagents; everybody together takes {2 + 8 * 3} steps")
    course.plt.close("all")
