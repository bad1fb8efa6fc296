"""The correctness oracle: whose numbers are wrong, from which operation on, and probably why.

    python oracle.py list                         the operations, their formulas and tolerances
    python oracle.py check my_kernels.py          test somebody's implementation of them
    python oracle.py mutants                      show that it catches known mistakes and lets right versions pass    python oracle.py defects                      what the installed transformers gets wrong, each shown

Public names: main.
Tests: pytest tests/test_oracle.py
"""

import argparse
import sys

import conformance
import defects
import mutants


def _list(options):
    for op in conformance.OPS.values():
        print(f"{op.name:<20} {', '.join(op.arguments)} → {', '.join(op.outputs)}\n{'':<20} {op.formula}")
    return 0


def main(arguments=None):
    """The command line. Exit codes: 0 all agrees, 1 something differs, 2 misuse."""
    parser = argparse.ArgumentParser(prog="oracle.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the operations").set_defaults(run=_list)
    check = commands.add_parser("check", help="test an implementation of the operations")
    conformance.add_arguments(check)
    check.set_defaults(run=conformance.main)
    mutant = commands.add_parser("mutants", help="known mistakes that must be caught, right versions that must pass")
    mutants.add_arguments(mutant)
    mutant.set_defaults(run=mutants.main)
    defect = commands.add_parser("defects", help="what the installed transformers gets wrong about Kimi K2.5")
    defects.add_arguments(defect)
    defect.set_defaults(run=defects.main)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"oracle.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
