"""Flags for the fields of settings classes, and misuse as one line.

    add_flags(parser, SFTConfig, "sft-")         --sft-steps, --sft-lr, …
    t = take_flags(parse_flags(parser), SFTConfig, "sft-")
    with one_line("train_small.py rl", (RLError, OSError)): …

Public names: add_flags, parse_flags, take_flags, one_line.     Tests: pytest tests/test_flags.py
"""

import argparse
import contextlib
import dataclasses
import difflib
import sys


def add_flags(parser, kind, prefix=""):
    """A flag for each field of a settings class."""
    for field in dataclasses.fields(kind):
        name = f"--{prefix}{field.name}".replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(name, type=field.type, default=field.default, help=f"({field.type.__name__})")


def parse_flags(parser, arguments=None):
    """Parsed arguments; an unknown one ends the process with exit code 2 and the nearest name."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
    return options


def take_flags(options, kind, prefix=""):
    """The settings of parsed flags."""
    return kind(**{field.name: getattr(options, f"{prefix}{field.name}".replace("-", "_")) for field in dataclasses.fields(kind)})


@contextlib.contextmanager
def one_line(program, errors, goes_on="the same command goes on"):
    """End the process with one line: exit code 2 for `errors`, a tuple of exceptions, 130 when it is interrupted."""
    try:
        yield
    except errors as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; {goes_on}", file=sys.stderr)
        sys.exit(130)
