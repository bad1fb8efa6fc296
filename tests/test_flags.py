"""Flags of settings classes; misuse is one line.

Run: .venv/bin/python -m pytest tests/test_flags.py
"""

import argparse
from dataclasses import dataclass

import pytest

from flags import add_flags, one_line, parse_flags, take_flags


@dataclass(frozen=True)
class Settings:
    max_steps: int = 3
    rate: float = 0.5
    loud: bool = False


def parsed(*arguments, prefix=""):
    parser = argparse.ArgumentParser(prog="tool", usage="tool [--FLAG VALUE …]", allow_abbrev=False)
    add_flags(parser, Settings, prefix)
    return take_flags(parse_flags(parser, arguments), Settings, prefix)


def test_fields_are_flags_and_flags_are_fields():
    assert parsed() == Settings()
    assert parsed("--max-steps", "7", "--loud") == Settings(7, 0.5, True)
    assert parsed("--sub-rate", "2", "--no-sub-loud", prefix="sub-") == Settings(3, 2.0, False)


@pytest.mark.parametrize("arguments, said", [
    (("--max-step", "7"), "unknown argument --max-step: did you mean --max-steps?"), (("--zzzzzz",), "unknown argument --zzzzzz"),
    (("--rate", "fast"), "argument --rate: invalid float value: 'fast'"),
])  # fmt: skip
def test_a_wrong_flag_names_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"usage: tool [--FLAG VALUE …]\ntool: error: {said}\n"


def test_an_error_is_one_line_and_an_interruption_says_how_to_go_on(capsys):
    for error, code, said in ((ValueError("no such thing"), 2, "tool: no such thing\n"), (KeyboardInterrupt(), 130, "\ntool: interrupted; again\n")):
        with pytest.raises(SystemExit) as end, one_line("tool", (ValueError,), "again"):
            raise error
        assert end.value.code == code and capsys.readouterr().err == said
    with pytest.raises(KeyError), one_line("tool", (ValueError,)):
        raise KeyError
