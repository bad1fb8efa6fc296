"""Shows that the oracle catches: every known-wrong implementation fails for its own reason, every right one passes.

    python oracle.py mutants [--ops a,b] [--seed N] [--max-examples N] [--json FILE]

The mutants are the suspects of the registry: mistakes that real stacks made, each in a few lines. A mutant is *killed*
when the conformance check fails it, and *named* when the message gives its own cause. The right ones are the project's
twins and the variants: other layouts with permuted weights, other summation orders, each in every dtype of its op;
one that fails is a false alarm.

Public names: Trial, try_op, add_arguments, main.
Tests: pytest tests/test_mutants.py
"""

import json
import pathlib
from dataclasses import dataclass

from checkpoint import write_file
from conformance import MOST_EXAMPLES, OPS, ConformanceError, Finding, check_op, select, twin


@dataclass(frozen=True)
class Trial:
    """One implementation under the check: a mutant, which must be named, or a right one, which must pass."""

    op: str
    name: str
    mutant: bool
    cause: str  # of the mutant
    finding: Finding | None

    @property
    def verdict(self):
        """named, killed (for another reason), survived; passed, false alarm."""
        if not self.mutant:
            return "false alarm" if self.finding else "passed"
        if self.finding is None:
            return "survived"
        return "named" if self.cause in self.finding.cause else "killed"


def try_op(op, max_examples=MOST_EXAMPLES, seed=0):
    """Every mutant and every right implementation of one op. Returns Trials."""
    found = []
    for suspect in op.suspects:
        finding = check_op(op, twin(suspect.wrong), op.dtypes, max_examples, seed)
        found.append(Trial(op.name, suspect.name, True, suspect.cause, finding))
    for name, function in {**op.twins, **op.variants}.items():
        found.append(Trial(op.name, name, False, "", check_op(op, twin(function), op.dtypes, max_examples, seed)))
    return found


def add_arguments(parser):
    """The arguments of `oracle.py mutants`."""
    parser.add_argument("--ops", help="comma-separated names; default: all")
    parser.add_argument("--max-examples", type=int, default=MOST_EXAMPLES, help="inputs per op and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the result to this file")


def main(options):
    """`oracle.py mutants`: a line per op, then whatever went wrong. Returns 0 when all were named and none misjudged."""
    if options.max_examples < 1:
        raise ConformanceError(f"--max-examples is {options.max_examples}: give at least 1")
    print(f"{'operation':<20} {'mutants':>8} {'killed':>7} {'named':>6} {'right':>7} {'false alarms':>13}")
    every = []
    for name in select(options.ops):
        found = try_op(OPS[name], options.max_examples, options.seed)
        every += found
        print(_line(name, found), flush=True)
    print(_line("all", every))
    bad = [trial for trial in every if trial.verdict not in ("named", "passed")]
    for trial in bad:
        said = f"; the check said: {trial.finding.cause}" if trial.finding else ""
        print(f"\n{trial.op}.{trial.name}: {trial.verdict}{said}")
    if options.json:
        rows = [{"op": t.op, "name": t.name, "mutant": t.mutant, "verdict": t.verdict, "cause": t.cause} for t in every]
        write_file(pathlib.Path(options.json), json.dumps(rows, indent=1))
    return 1 if bad else 0


def _line(name, found):
    mutants = [trial.verdict for trial in found if trial.mutant]
    right = [trial.verdict for trial in found if not trial.mutant]
    killed = len(mutants) - mutants.count("survived")
    return (f"{name:<20} {len(mutants):>8} {killed:>7} {mutants.count('named'):>6} {len(right):>7} "
            f"{right.count('false alarm'):>13}")  # fmt: skip
