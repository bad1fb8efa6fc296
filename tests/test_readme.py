"""The front page says what is so: files, commands and their flags exist, and each measured figure stands in a report.

Run: .venv/bin/python -m pytest tests/test_readme.py
"""

import importlib
import pathlib
import re

import pytest

from train_small import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_only_files_that_exist():
    named = set(re.findall(r"(?<![\w/.-])(?:[\w.-]+/)*[\w-]+\.(?:py|toml)\b|(?<![\w/])tests/[\w/]*|\.ci/\w+", TEXT))
    links = {target for target in re.findall(r"\]\(([^)#]+)", TEXT) if "://" not in target}
    written = ("runs/", "my_")  # by the reader's commands, or by the reader
    missing = [name for name in sorted(named | links) if not name.startswith(written) and not (ROOT / name).exists()]
    assert not missing


WITH_COMMANDS = ("k25.py", "oracle.py", "parallel.py", "storage.py", "interpreter.py", "gateway.py", "rollout.py", "environment.py", "grm.py", "traces.py",
                 "tasks.py", "engine.py", "swarm.py")  # each with its own flags


def commands(text):
    """Every line of a README's code blocks and every inline code, without its comment: (program, words)."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in [line for block in blocks for line in block.splitlines()] + inline:
        words = re.sub(r"\s#.*|\s{3,}.*", "", line.strip().removeprefix("$ ")).split()
        while words and re.fullmatch(r"\w+=\S*", words[0]):  # VARIABLE=value before the command
            words = words[1:]
        if words:
            yield words[0], words[1:]


def test_the_makefile_has_every_target_that_the_readme_names():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = [words[0] for program, words in commands(TEXT) if program == "make" and words]
    assert "train" in asked and "test" in asked
    assert set(asked) <= targets


def test_every_flag_of_the_readmes_commands_is_accepted(capsys):
    helps = {}
    for program, words in commands(TEXT):
        line = " ".join([program, *words])
        if program == "make" and (given := re.search(r'ARGS="([^"]*)', line)) and words[0] == "train":
            call = ("train_small",)
            flags = given[1]
        elif re.search(r"python[\d.]*$", program) and words and words[0].endswith(".py"):
            commanded = words[0] in WITH_COMMANDS or words[1:2] and words[1] in COMMANDS
            call = (words[0].removesuffix(".py"), *words[1:2]) if commanded else (words[0][:-3],)
            flags = line
        else:
            continue
        if call not in helps:
            with pytest.raises(SystemExit) as ended:
                importlib.import_module(call[0]).main([*call[1:], "--help"])
            assert ended.value.code in (0, None), line
            helps[call] = capsys.readouterr().out
        for flag in re.findall(r"(?<![\w-])--[\w-]+", flags):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[call]), f"{line}: {call[0]} has no {flag}"


# Figures


def rows():
    """(fact, figure, command) of the table of what is measured; "the same" is the command of the row before."""
    command, found = None, []
    for line in TEXT.partition("## What is measured")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| ") and not line.startswith("| fact"):
            fact, figure, last = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            command = command if last == "the same" else last
            found.append((fact, figure, command))
    return found


def numbers(text):
    """The numbers of a text without their signs, as written; not those of names such as k1.5."""
    return [number.replace(",", "") for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", text)]


def stands_in(number, report):
    """Whether a report has a number that reads so, or so in percent, thousands, millions or minutes, when rounded."""
    digits = len(number.partition(".")[2])
    return any(abs(round(float(other) * times, digits) - float(number)) < 1e-9
               for other in report for times in (1, 100, 1e-3, 1e-6, 1e3, 1e6, 1 / 60))  # fmt: skip


def test_numbers_are_found_as_they_are_rounded():
    report = numbers("-0.0284 [−0.1056, 2.04e-2], 1,234.6 seconds; k1.5")
    assert report == ["0.0284", "0.1056", "2.04e-2", "1234.6"]
    assert all(stands_in(number, report) for number in ("2.8", "10.6", "0.02", "20.6", "1235", "1.2"))
    assert not any(stands_in(number, report) for number in ("2.9", "0.05", "1233", "1.5"))


UNREPORTED = ("make train", "storage.py", "make test`")  # commands whose figures are printed, and have not been kept yet


@pytest.mark.parametrize("fact,figure,command", rows(), ids=[fact[:40] for fact, *_ in rows()])
def test_a_figure_has_an_origin(fact, figure, command):
    """A row's command is tests that exist, or it links the reports that the command wrote, and they hold each of its numbers."""
    reports = re.findall(r"\]\((docs/reports/[\w-]+\.\w+)\)", command)
    if reports:
        known = numbers(" ".join((ROOT / report).read_text(encoding="utf-8") for report in reports))
        missing = [number for number in numbers(figure) if not stands_in(number, known)]
        assert not missing, f"not in {', '.join(reports)}"
    elif not any(word in command for word in UNREPORTED):
        tests = re.findall(r"tests/\w+\.py", command)
        assert tests and all((ROOT / test).exists() for test in tests), "neither a report nor tests"


def verdicts():
    """(claim, here, verdict) of the table of claims."""
    lines = TEXT.partition("## What is said of Kimi K2.5")[2].partition("\n## ")[0].splitlines()
    return [tuple(line.strip("| ").split(" | ")) for line in lines if line.startswith("| ") and not line.startswith("| claim")]


def test_no_claim_of_the_report_is_left_out():
    report = (ROOT / "docs/reports/experiments.md").read_text(encoding="utf-8").partition("\n## ")[0]
    titles = re.findall(r"^\| (.+?) \|.*\*\* \|$", report, re.MULTILINE)
    assert len(titles) > 20 and sorted(titles) == sorted(claim for claim, *_ in verdicts())


@pytest.mark.parametrize("claim,here,verdict", verdicts(), ids=[claim[:40] for claim, *_ in verdicts()])
def test_a_claim_has_the_verdict_and_the_figures_of_its_report(claim, here, verdict):
    report = (ROOT / "docs/reports/experiments.md").read_text(encoding="utf-8")
    ((_, found, told),) = [line[2:-2].split(" | ")[1:] for line in report.splitlines() if line.startswith(f"| {claim} | ")]
    said = numbers(found + report.partition(f"**{claim}**")[2].partition("\n**")[0])
    assert told == f"**{verdict}**" and not [number for number in numbers(here) if not stands_in(number, said)]
