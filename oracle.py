"""The correctness oracle: whose numbers are wrong, from which operation on, and probably why.

    python oracle.py list                            the operations, their formulas and tolerances
    python oracle.py check my_kernels.py             test somebody's implementation of them
    python oracle.py golden --out DIR                write inputs and outputs for stacks that are not Python
    python oracle.py compare DIR THEIRS              check what such a stack wrote
    python oracle.py trace --checkpoint DIR --against THEIRS      find the first operation that differs in a whole model
    python oracle.py mutants                         show that known mistakes are caught and right versions pass
    python oracle.py exercise --list                 lessons; `exercise moe --out my_moe.py` writes one to fill in
    python oracle.py grade my_moe.py                 points and hints for a filled-in lesson
    python oracle.py bench                           how fast, against transformers and against the machine
    python oracle.py defects                         what the installed transformers gets wrong, each shown

Every command has --help. Exit codes: 0 all agrees, 1 something differs, 2 misuse.

Public names: main.
Tests: pytest tests/test_oracle.py
"""

import argparse
import importlib
import os
import sys
import tempfile

from hypothesis.configuration import set_hypothesis_home_dir

from op import TOLERANCE

# command → (module, function that adds its arguments, function that runs it, help); imported when asked for
COMMANDS = {
    "check": ("conformance", "add_arguments", "main", "test an implementation of the operations"),
    "golden": ("goldens", "add_golden_arguments", "golden", "write inputs and outputs for other programs"),
    "compare": ("goldens", "add_compare_arguments", "compare", "check what another program wrote"),
    "trace": ("divergence", "add_arguments", "main", "find the first operation in which two models differ"),
    "mutants": ("mutants", "add_arguments", "main", "known mistakes are caught, right versions pass"),
    "exercise": ("classroom", "add_exercise_arguments", "exercise", "list lessons or write one to fill in"),
    "grade": ("classroom", "add_grade_arguments", "grade", "points and hints for a filled-in lesson"),
    "bench": ("bench", "add_arguments", "main", "speed against transformers and the machine's ceilings"),
    "defects": ("defects", "add_arguments", "main", "what the installed transformers gets wrong"),
}


def _list(options):
    from conformance import OPS

    for op in OPS.values():
        mistakes = f"{len(op.suspects)} known mistakes"
        print(f"{op.name}({', '.join(op.arguments)}) → {', '.join(op.outputs)}\n    {op.formula}\n    {op.source}; {mistakes}")
    limits = ", ".join(f"{str(dtype).removeprefix('torch.')} {limit:.0e}" for dtype, limit in TOLERANCE.items())
    print(f"\n{len(OPS)} operations; tolerances relative to the row's largest value: {limits}")
    return 0


def main(arguments=None):
    """The command line. Returns the exit code: 0 all agrees, 1 something differs, 2 misuse."""
    arguments = sys.argv[1:] if arguments is None else arguments
    set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "hypothesis"))  # not into the caller's folder
    parser = argparse.ArgumentParser(prog="oracle.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the operations").set_defaults(run=_list)
    for name, (module, add, run, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words)
        if name in arguments[:1]:
            home = importlib.import_module(module)
            getattr(home, add)(command)
            command.set_defaults(run=getattr(home, run))
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # an OSError names the file that cannot be read or written
        print(f"oracle.py {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `oracle.py list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
