"""Tests somebody else's implementation of K25's operations and says what is probably wrong with it.

    python oracle.py check my_kernels.py          whatever op names the module defines are tested, the rest is missing
    pytest tests/test_conformance.py --impl my_kernels

The module may say, at its top level, ARRAYS = "torch" | "numpy" | "tinygrad" | a function from NumPy arrays to its own
(jax.numpy.asarray), and DTYPES = ("float32", "bfloat16"), the dtypes it supports. `OP_backward` may give gradients.

Public names: OPS, ConformanceError, Implementation, load_implementation, twin, Record, evaluate, Question, question,
judge, Finding, Unresponsive, check_op, dtype_name, diagnose, Row, read_xfails, check, select, add_arguments, main.
Tests: pytest tests/test_conformance.py
"""

import importlib
import importlib.util
import json
import pathlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

import ops_attention
import ops_experts
import ops_int4
import ops_media
import ops_rewards
import ops_rl
import ops_rope
import ops_swarm
import ops_text
import ops_toggle
import ops_training
import ops_vision
from adapter import Outcome, once, run
from op import Difference, Op, cast, compare, describe
from patterns import pattern, shape_pattern

_MODULES = (ops_attention, ops_rope, ops_experts, ops_int4, ops_training, ops_media, ops_vision, ops_text, ops_rl, ops_toggle,
            ops_rewards, ops_swarm)  # fmt: skip
OPS: dict[str, Op] = {op.name: op for module in _MODULES for op in module.OPS}

MOST_EXAMPLES = 25
KEPT_FAILURES = 8  # failing inputs that the diagnosis looks at
GRADIENT_FLOOR = 0.1  # of a gradient's natural size: below it may lie what cancellation left


class ConformanceError(ValueError):
    """An implementation that cannot be tested, or options that make no sense; one line says which and why."""


# Implementations


@dataclass(frozen=True)
class Implementation:
    """Somebody's functions by op name, with what the module says of itself."""

    name: str
    functions: dict[str, Callable]
    backwards: dict[str, Callable]
    arrays: str | Callable = "torch"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    forward_only: set[str] = field(default_factory=set)  # ops that have gradients, of which none ever came back

    def __call__(self, op, arguments, cotangents=None, wanted=()):
        """Call op's function under the contract of adapter.run. Returns Outcome."""
        backward = self.backwards.get(op.name)
        outcome = run(self.functions[op.name], arguments, op.outputs, wanted, cotangents, self.arrays, backward)
        if wanted and not outcome.complaint and not outcome.gradients:
            self.forward_only.add(op.name)
        return outcome


def load_implementation(source):
    """Import a module by path or by name and collect the functions that are named as ops.

    source: str — "my_kernels", "my_kernels.py" or a path. Returns Implementation.
    Raises ConformanceError, in one line, if it cannot be found or fails while it is imported.
    """
    path = pathlib.Path(source)
    try:
        if path.suffix == ".py" or path.is_file():
            if not path.is_file():
                raise ConformanceError(f"no file {source}: give the path of a Python module or the name of one")
            spec = importlib.util.spec_from_file_location(f"given_{path.stem}", path)  # a name that hides no module of ours
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up there
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(source)
    except ConformanceError:
        raise
    except BaseException as error:  # SystemExit too: whatever a module does when imported is told, not suffered
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename).stem == path.stem]
        line = f" (line {frames[-1].lineno})" if frames else ""
        reason = " ".join(str(error).split())[:300]
        raise ConformanceError(f"{source} cannot be imported: {type(error).__name__}: {reason}{line}") from None
    functions = {name: getattr(module, name) for name in OPS if callable(getattr(module, name, None))}
    backwards = {n: getattr(module, f"{n}_backward") for n in functions if callable(getattr(module, f"{n}_backward", None))}
    arrays = getattr(module, "ARRAYS", "torch")
    if not callable(arrays) and arrays not in ("torch", "numpy", "tinygrad"):
        raise ConformanceError(f"{source}: ARRAYS is {arrays!r}: write 'torch', 'numpy', 'tinygrad' or a function")
    default = ("float32", "bfloat16") if arrays == "torch" else ("float32",)
    dtypes = tuple(_dtype(name) for name in getattr(module, "DTYPES", default))
    return Implementation(path.stem, functions, backwards, arrays, dtypes)


def _dtype(name):
    if name not in ("float32", "float64", "bfloat16"):
        raise ConformanceError(f"unknown dtype {name!r}: choose among float32, float64, bfloat16")
    return getattr(torch, name)


def twin(function, name="twin"):
    """An implementation that answers for every op with one function: for twins, variants and suspects."""

    def call(op, arguments, cotangents=None, wanted=()):
        return run(function, arguments, op.outputs, wanted, cotangents)

    call.__name__ = name
    return call


# Judging one call


@dataclass(frozen=True)
class Record:
    """One call that went wrong: the arguments as they were given, what came back, and how it differs."""

    arguments: dict
    outcome: Outcome
    difference: Difference
    truth: Outcome  # what float64 gives


def _cotangents(op, outputs):
    """A fixed random gradient for every floating output of an op that has gradients."""
    if not op.differentiable:
        return {}
    generator = torch.Generator().manual_seed(0)
    floats = {n: v for n, v in outputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {n: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for n, v in floats.items()}


def evaluate(op, function, arguments, cotangents=None):
    """Outcome of one of our own functions on these arguments; cotangents: by output, None to ask no gradients."""
    return once(function, arguments, op.outputs, op.differentiable if cotangents else (), cotangents)


@dataclass(frozen=True)
class Question:
    """One call that an implementation is asked for, and the answer to it."""

    arguments: dict  # in the dtype under test
    cotangents: dict  # output → gradient of the loss by it; empty where the op has no gradients
    expected: Outcome  # what the reference gives
    truth: Outcome  # what it gives in float64
    floors: dict  # argument → smallest scale on which its gradient is judged


def question(op, arguments, dtype):
    """The Question that arguments, as drawn, make in one dtype."""
    given = cast(op, arguments, dtype)
    cotangents = _cotangents(op, evaluate(op, op.reference, given).outputs)
    expected = evaluate(op, op.reference, given, cotangents)
    widened = {name: cotangent.double() for name, cotangent in cotangents.items()}
    truth = evaluate(op, op.reference, cast(op, given, torch.float64), widened)
    floors = {name: _natural_size(given[name], truth.outputs, cotangents) * GRADIENT_FLOOR for name in op.differentiable}
    return Question(given, cotangents, expected, truth, floors)


def judge(op, caller, arguments, dtype):
    """Compare one call of an implementation with the reference.

    op: Op; caller: (op, arguments, cotangents, wanted) → Outcome; arguments: as drawn; dtype: the one under test.
    Returns Record, or None when the implementation is right (or gives no gradients and its values are right).
    """
    asked = question(op, arguments, dtype)
    outcome = caller(op, asked.arguments, asked.cotangents, op.differentiable)
    difference = _first_difference(op, outcome, asked.expected, asked.truth, asked.floors)
    return difference and Record(asked.arguments, outcome, difference, asked.truth)


def _floats(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _natural_size(argument, outputs, cotangents):
    """What a gradient measures by its units: largest cotangent times output, over the argument; NaN marks what is missing."""
    known = lambda tensor: tensor.nan_to_num(0.0, torch.inf, -torch.inf).abs()  # noqa: E731
    largest = lambda tensor: known(tensor).max().item() if tensor.numel() else 0.0  # noqa: E731
    return max((largest(c) * largest(outputs[n]) for n, c in cotangents.items()), default=0.0) / (largest(argument) or 1.0)


def _first_difference(op, outcome, expected, truth, floors):
    if outcome.complaint:
        return Difference("contract", "contract", outcome.complaint)
    for name in op.outputs:
        exact = name in op.exact
        found = compare(f"output {name}", outcome.outputs[name], expected.outputs[name], truth.outputs[name], op.loose, exact)
        if found:
            return found
    for name in op.differentiable if outcome.gradients else ():
        what = f"gradient of {name}"
        if outcome.gradients[name] is None:
            if expected.gradients[name] is not None and truth.gradients[name].any():
                return Difference(what, "gradient", f"{what}: none arrives; the graph is cut (detach? .data? no_grad?)")
            continue
        if expected.gradients[name] is None:
            continue
        both = expected.gradients[name], truth.gradients[name]
        found = compare(what, outcome.gradients[name], *both, 4 * op.loose, floor=floors[name])
        if found:
            return found
    return None


# Searching for a failing input


@dataclass(frozen=True)
class Finding:
    """A failure of one op: where, on which smallest input, how large, and what is probably wrong."""

    op: str
    dtype: str
    tried: int  # examples until the failure
    record: Record  # the smallest failing input found
    suspect: str  # name of the suspect that gives the same numbers, "" if none does
    cause: str  # in words

    def text(self):
        """The report, several lines."""
        lines = [f"{self.op}: wrong in {self.dtype} (example {self.tried})", f"  {self.record.difference.words}"]
        lines += ["  smallest input found:"] + [f"    {line}" for line in describe(self.record.arguments)]
        return "\n".join([*lines, f"  probable cause: {self.cause}"])


class _Wrong(Exception):
    pass


class Unresponsive(BaseException):
    """Raised by a caller whose implementation hung or died: no further input is tried, none is shrunk."""

    def __init__(self, outcome):
        super().__init__(outcome.complaint)
        self.outcome = outcome


def check_op(op, caller, dtypes=(torch.float32,), max_examples=MOST_EXAMPLES, seed=0):
    """Draw inputs until one is answered wrongly, shrink it, and name the probable cause.

    caller: (op, arguments, cotangents, wanted) → Outcome; dtypes: those of them that the op is tested in are used;
    max_examples: inputs for each dtype; seed: int. Returns Finding, or None if every answer was right.
    """
    for dtype in [d for d in op.dtypes if d in dtypes] or op.dtypes[:1]:
        records, tried, stopped = _survey(op, caller, dtype, max_examples, seed)
        if stopped:
            difference = Difference("contract", "contract", stopped.complaint)
            return Finding(op.name, dtype_name(dtype), tried, Record({}, stopped, difference, stopped), "", stopped.complaint)
        if records:
            smallest = _smallest(op, caller, dtype, max_examples, seed) or records[0]
            suspect, cause = diagnose(op, [*records, smallest])
            return Finding(op.name, dtype_name(dtype), tried, smallest, suspect, cause)
    return None


def _settings(max_examples, *phases):
    """Reproducible, silent, no examples kept on disk."""
    return hypothesis.settings(max_examples=max_examples, phases=phases, database=None, deadline=None, derandomize=False,
                               suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False)  # fmt: skip


def _survey(op, caller, dtype, max_examples, seed):
    """Ask until KEPT_FAILURES answers were wrong. Returns Records, examples up to the first, and Outcome if it hung."""
    records, calls, first = [], 0, 0

    @hypothesis.seed(seed)
    @_settings(max_examples, Phase.generate)
    @hypothesis.given(op.cases)
    def ask(arguments):
        nonlocal calls, first
        if len(records) < KEPT_FAILURES:
            calls += 1
            record = judge(op, caller, arguments, dtype)
            if record:
                first = first or calls
                records.append(record)

    try:
        ask()
    except Unresponsive as stopped:
        return records, calls, stopped.outcome
    return records, first, None


def _smallest(op, caller, dtype, max_examples, seed):
    """The Record of the smallest input that is answered wrongly; None if the failure does not come again."""
    records = []

    @hypothesis.seed(seed)
    @_settings(max_examples, Phase.generate, Phase.shrink)
    @hypothesis.given(op.cases)
    def ask(arguments):
        record = judge(op, caller, arguments, dtype)
        if record:
            records.append(record)
            raise _Wrong

    try:
        ask()
    except (_Wrong, Unresponsive, hypothesis.errors.Flaky):
        return records[-1]
    return None


def dtype_name(dtype):
    """A torch dtype without torch, such as "float32"."""
    return str(dtype).removeprefix("torch.")


# Diagnosis


def diagnose(op, records):
    """The suspect whose wrong numbers are these wrong numbers, else a pattern of the numbers themselves.

    records: failing calls, the last one the smallest. Returns (name of the suspect or "", cause in words).
    """
    hits = []
    for suspect in op.suspects:
        share = sum(_explains(op, suspect, record) for record in records) / len(records)
        hits.append((share, suspect))
    best = max((share for share, _ in hits), default=0.0)
    if best >= 0.5:
        found = [suspect for share, suspect in hits if share == best]
        words = [s.cause + (f" ({s.seen})" if s.seen else "") for s in found]
        return found[0].name, " — or: ".join(words)
    smallest = records[-1]
    for suspect in op.suspects:  # several mistakes at once: one of them may explain the smallest input
        if len(records) > 2 and _explains(op, suspect, smallest):
            return suspect.name, f"at least this, which explains the input above though not all others: {suspect.cause}"
    alike = [r for r in records if (r.difference.what, r.difference.kind) == (smallest.difference.what, smallest.difference.kind)]
    largest = max(alike, key=_numbers)  # shows more of a pattern
    if smallest.difference.kind not in ("value", "shape") or _numbers(largest) == _numbers(smallest):
        return "", _pattern(smallest)
    return "", f"{_pattern(largest)} (as seen on a larger input)"


def _numbers(record):
    return sum(value.numel() for value in record.arguments.values() if isinstance(value, torch.Tensor))


def _explains(op, suspect, record):
    """Whether a suspect gives the wrong answer that was recorded. Its gradients are only asked where its values agree."""
    theirs = record.outcome
    if not theirs.complaint:
        try:
            outputs = evaluate(op, suspect.wrong, record.arguments).outputs
        except Exception:  # a known mistake may be one that raises; they did not
            return False
        if not all(_alike(theirs.outputs[name], outputs[name], op.loose, name in op.exact) for name in op.outputs):
            return False
        if not theirs.gradients:
            return True
    cotangents = _cotangents(op, record.truth.outputs)
    cotangents = {n: c.to(theirs.outputs[n].dtype) for n, c in cotangents.items() if _floats(theirs.outputs.get(n))}
    ours = run(suspect.wrong, record.arguments, op.outputs, op.differentiable if theirs.gradients else (), cotangents)
    if ours.complaint or theirs.complaint:
        return _kind_of_complaint(ours.complaint) == _kind_of_complaint(theirs.complaint)
    names = op.differentiable if ours.gradients else ()
    return all(_alike(theirs.gradients[name], ours.gradients[name], op.loose, False) for name in names)


def _alike(a, b, loose, exact):
    if a is None or b is None:  # no gradient and a gradient of zeros are one
        other = b if a is None else a
        return other is None or (isinstance(other, torch.Tensor) and not other.any())
    truth = b.double() if _floats(b) else b
    return compare("", a, b, truth, 4 * loose, exact, floor=GRADIENT_FLOOR) is None


def _kind_of_complaint(complaint):
    return complaint.partition(":")[0]


def _pattern(record):
    """What the numbers look like when no suspect fits."""
    difference = record.difference
    if difference.kind == "contract":
        return difference.words
    if difference.kind == "nan":
        return "reads memory that it never wrote, or divides 0 by 0 (NaN)"
    kind, _, name = difference.what.rpartition(" ")
    group = "gradients" if kind.startswith("gradient") else "outputs"
    got, want = getattr(record.outcome, group)[name], getattr(record.truth, group)[name]
    if difference.kind == "shape" and isinstance(got, torch.Tensor):
        return shape_pattern(got, want)
    if difference.kind == "value" and isinstance(got, torch.Tensor) and got.shape == want.shape:
        return pattern(got, want)
    return f"the {difference.kind} alone"


# A whole implementation


@dataclass(frozen=True)
class Row:
    """The result of one op: status is pass, FAIL, missing, xfail (failed as said) or XPASS (should have failed)."""

    op: str
    status: str
    finding: Finding | None = None


def read_xfails(path):
    """Op names expected to fail, one a line, `#` begins a comment. Raises ConformanceError for unknown names."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConformanceError(f"cannot read {path}: {error.strerror}") from None
    names = {}
    for number, line in enumerate(lines, 1):
        name = line.partition("#")[0].strip()
        if name and name not in OPS:
            raise ConformanceError(f"{path}, line {number}: no op named {name!r}; see python oracle.py list")
        if name:
            names[name] = number
    return set(names)


def check(implementation, ops=None, dtypes=None, max_examples=MOST_EXAMPLES, seed=0, xfails=frozenset(), progress=None):
    """Check all ops (or those named) of an implementation. progress: called with each Row. Returns the Rows."""
    rows = []
    for name in ops or OPS:
        if name not in implementation.functions:
            row = Row(name, "missing")
        else:
            finding = check_op(OPS[name], implementation, dtypes or implementation.dtypes, max_examples, seed)
            expected = name in xfails
            status = ("xfail" if expected else "FAIL") if finding else ("XPASS" if expected else "pass")
            row = Row(name, status, finding)
        rows.append(row)
        if progress:
            progress(row)
    return rows


def add_arguments(parser):
    """The arguments of `oracle.py check`."""
    parser.add_argument("module", help="path or name of a Python module that defines functions named as ops")
    parser.add_argument("--ops", help="comma-separated names; default: all")
    parser.add_argument("--dtypes", help="comma-separated: float32, bfloat16, float64; default: what the module says")
    parser.add_argument("--xfails-file", help="op names that are expected to fail, one a line")
    parser.add_argument("--max-examples", type=int, default=MOST_EXAMPLES, help="inputs per op and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the result to this file")


def select(names):
    """Ops named in a comma-separated list, None for all. Raises ConformanceError with the nearest name."""
    import difflib

    chosen = [name.strip() for name in names.split(",")] if names else list(OPS)
    for name in chosen:
        if name not in OPS:
            near = difflib.get_close_matches(name, OPS, 1)
            raise ConformanceError(f"no op named {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return chosen


def main(options):
    """`oracle.py check`: print a line per op and a report per failure. Returns 0, or 1 when an op failed
    or passed against the xfails file. Raises ConformanceError also when there was nothing to test."""
    from checkpoint import write_file

    if options.max_examples < 1:
        raise ConformanceError(f"--max-examples is {options.max_examples}: give at least 1")
    ops = select(options.ops)
    xfails = read_xfails(options.xfails_file) if options.xfails_file else frozenset()
    dtypes = tuple(_dtype(name) for name in options.dtypes.split(",")) if options.dtypes else None
    implementation = load_implementation(options.module)
    rows = check(implementation, ops, dtypes, options.max_examples, options.seed, xfails,
                 lambda row: print(_line(row, implementation), flush=True))  # fmt: skip
    failed = [row for row in rows if row.status in ("FAIL", "XPASS")]
    for row in failed:
        print("\n" + row.finding.text() if row.finding else f"\n{row.op}: passes; take it out of {options.xfails_file}")
    counts = {status: sum(row.status == status for row in rows) for status in ("pass", "FAIL", "xfail", "XPASS", "missing")}
    print("\n" + ", ".join(f"{number} {status}" for status, number in counts.items() if number))
    if options.json:
        report = {"implementation": implementation.name, "seed": options.seed, "counts": counts,
                  "ops": [_as_json(row) for row in rows]}  # fmt: skip
        write_file(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if all(row.status == "missing" for row in rows):
        raise ConformanceError(f"nothing was tested: {options.module} defines no function named as an operation asked for")
    return 1 if failed else 0


def _line(row, implementation):
    silent = row.status == "pass" and row.op in implementation.forward_only
    return f"{row.op:<20} {row.status}" + (" (forward only: its results carry no gradient)" if silent else "")


def _as_json(row):
    found = {"op": row.op, "status": row.status}
    if finding := row.finding:
        found |= finding.record.difference.as_json()
        found |= {"dtype": finding.dtype, "cause": finding.cause, "suspect": finding.suspect,
                  "input": describe(finding.record.arguments)}  # fmt: skip
    return found
