"""Golden cases of operations: drawn, written as safetensors and JSON, and compared with what another program wrote.

A float result is right when, number by number,

    |got − expected| ≤ tolerance · max(row, largest / 10, floor)

with row and largest the largest |expected| of its last-dimension row and of the whole tensor. Tolerance and floor stand
in the manifest for each result: the floor covers ROUNDING times what the reference itself misses float64 by, so that
whatever passes `oracle.py check` passes here.

Public names: GoldenError, draw, choose, form, make_rule, differs, Verdict, judged, to_json, read_json, write_op,
compare_op.     Tests: pytest tests/test_goldens.py
"""

import json
import math
import random
import re
from dataclasses import dataclass, replace

import hypothesis
import torch

from adapter import Outcome
from checkpoint import CheckpointError, load_tensors, save_tensors, write_file
from conformance import OPS, Record, diagnose, judge, question, twin
from op import NUMBER_TOLERANCE, TOLERANCE, Difference
from op import compare as compare_values

DRAWN = 100  # inputs drawn for an op, of which its cases are chosen
ROUNDING = 10  # times the reference's own error: what rounding may make of another program's result
WEIGHTS = {"weight", "bias", "q_b", "kv_b", "gate", "up", "down", "packed", "scale", "head", "table"}  # arguments


class GoldenError(ValueError):
    """A directory that cannot be written, read or compared, or options that make no sense."""


# Drawing inputs


def draw(cases, seed, count):
    """Up to `count` values of a Hypothesis strategy, a function of the seed alone.

    Hypothesis's own search also tries constants of whatever modules are loaded; its reading of random bytes does not.
    cases: strategy; seed: number or text. Returns a list.
    """
    found = []

    @hypothesis.settings(database=None, deadline=None)
    @hypothesis.given(cases)
    def keep(value):
        found.append(value)

    source = random.Random(seed)
    for _ in range(count):
        keep.hypothesis.fuzz_one_input(source.randbytes(2**14))
    return found


def choose(op, examples, count):
    """The examples that become cases: `count` that show much, and as many more as it takes to expose every suspect.

    op: Op; examples: list of dicts argument → value. Each of the first shows most of what none before it shows, so that
    corners come first. Returns a list.
    """
    shown, chosen, left = set(), [], [(example, set(_features("", example))) for example in examples]
    while left and len(chosen) < count:
        best = max(range(len(left)), key=lambda i: len(left[i][1] - shown))
        example, features = left.pop(best)
        chosen.append(example)
        shown |= features
    rest = [example for example, _ in left]
    for suspect in op.suspects:
        caller = twin(suspect.wrong)
        exposing = next((e for e in [*chosen, *rest] if judge(op, caller, e, op.dtypes[0])), None)
        if exposing is not None and not any(exposing is example for example in chosen):
            chosen.append(exposing)
    return chosen


def _features(name, value):
    """What is remarkable about a value, as hashable facts: sizes 0, 1, odd; zeros, signs, magnitude; numbers, marks."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _features(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        yield name, "length", min(len(value), 3)
        for item in value:
            yield from _features(f"{name}[]", item)
    elif isinstance(value, torch.Tensor):
        for axis, size in enumerate(value.shape):
            yield from [(name, axis, min(size, 2)), (name, axis, "odd", size % 2)]
        numbers = value.double()
        for fact in ("isnan", "signbit", "logical_not"):
            yield name, fact, bool(getattr(numbers, fact)().any())
        largest = numbers.nan_to_num().abs().max().item() if value.numel() else 0.0
        yield name, "magnitude", round(math.log10(largest)) if largest else None
    elif isinstance(value, str):
        for mark in re.findall(r"<[|/]?\w+\|?>|[^\w\s]", value):
            yield name, mark
    else:
        yield name, repr(value)


# Rules and verdicts


def form(tensor):
    """Shape and dtype of a tensor as the manifest has them."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def make_rule(expected, truth, loose=1.0, exact=False, floor=0.0, rounding=ROUNDING):
    """How a result is to be compared: its entry in the manifest.

    expected, truth: what the reference gives and what it gives in float64; loose: factor on the tolerance; exact: also
    floats; floor: smallest scale; rounding: times the reference's own error that are forgiven. Returns dict.
    """
    if not isinstance(expected, torch.Tensor):
        return {"rule": "number", "tolerance": NUMBER_TOLERANCE} if isinstance(expected, float) else {"rule": "equal"}
    if exact or not expected.is_floating_point():
        return form(expected) | {"rule": "exact"}
    own = torch.where(truth.isfinite(), (expected.double() - truth).abs(), 0.0).nan_to_num()
    own = own.max().item() if own.numel() else 0.0
    tolerance = 2 * TOLERANCE[expected.dtype] * loose  # the larger of two terms in place of their sum: so each counts twice
    return form(expected) | {"rule": "close", "tolerance": tolerance, "floor": max(floor, 2 * rounding * own / tolerance, 1e-6)}


def differs(what, rule, expected, actual):
    """Difference of two values by a rule of the manifest, or None."""
    if rule["rule"] != "close":
        return compare_values(what, actual, expected, expected, exact=True)
    loose = rule["tolerance"] / TOLERANCE[expected.dtype]
    return compare_values(what, actual, expected, expected.double(), loose, floor=rule["floor"])


@dataclass(frozen=True)
class Verdict:
    """What became of one case. status: OK, DIFF, SHAPE, BROKEN (a file without what it should hold) or MISSING."""

    case: str
    status: str
    words: str = ""
    difference: Difference | None = None
    cause: str = ""

    @property
    def wrong(self):
        """Whether it counts as an error; a file that was not given does not."""
        return self.difference is not None

    def text(self):
        """The report, one or two lines."""
        line = f"{f'[{self.status}]':<10}{self.case}" + (f": {self.words}" if self.words else "")
        return line + (f"\n{'':<10}probable cause: {self.cause}" if self.cause else "")


def judged(case, difference, cause=""):
    """The Verdict on a case that differs."""
    status = {"shape": "SHAPE", "missing": "BROKEN"}.get(difference.kind, "DIFF")
    return Verdict(case, status, difference.words, difference, cause)


def to_json(value):
    """JSON text that every reader understands: no NaN."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_json(path):
    """The JSON object of a file. Raises GoldenError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise GoldenError(f"{path} holds a {type(value).__name__}, should hold an object")
    return value


# Writing


def write_op(op, folder, seed, count):
    """Write the cases of one op to `folder`/ops.

    op: Op; folder: path; seed: int; count: inputs, each in every dtype of the op but float64. Returns the op's entry in
    the manifest. Raises GoldenError when its strategy gives no input.
    """
    examples = choose(op, draw(op.cases, f"{seed} {op.name}", DRAWN), count)
    if not examples:
        raise GoldenError(f"{op.name}: its strategy gave no input for seed {seed}")
    cases = {}
    for number, arguments in enumerate(examples):
        for dtype in [d for d in op.dtypes if d != torch.float64] or op.dtypes:
            asked = question(op, arguments, dtype)
            results, rules = _results(op, asked)
            given = {f"input.{name}": value for name, value in asked.arguments.items()}
            given |= {f"cotangent.{name}": value for name, value in asked.cotangents.items()}
            tensors = {n: v for n, v in (given | results).items() if isinstance(v, torch.Tensor)}
            plain = {n: v for n, v in results.items() if not isinstance(v, torch.Tensor)}
            floats = any(tensor.is_floating_point() for tensor in tensors.values())
            name = f"{op.name}.{number}" + (f".{str(dtype).removeprefix('torch.')}" if floats else "")
            files = {}
            if tensors:
                files["tensors"] = f"ops/{name}.safetensors"
                save_tensors(tensors, folder / files["tensors"])
            if plain:
                files["plain"] = f"ops/{name}.json"
                write_file(folder / files["plain"], to_json(plain))
            described = {argument: _described(argument, value) for argument, value in asked.arguments.items()}
            cases[name] = files | {"arguments": described, "results": rules}
    return {"formula": op.formula, "source": op.source, "arguments": list(op.arguments), "outputs": list(op.outputs),
            "differentiable": list(op.differentiable), "cases": cases}  # fmt: skip


def _results(op, asked):
    """What is expected, and how it is compared: two dicts by name."""
    results, rules = {}, {}
    for name, value in asked.expected.outputs.items():
        results[f"output.{name}"] = value
        rules[f"output.{name}"] = make_rule(value, asked.truth.outputs[name], op.loose, name in op.exact)
    for name, value in asked.expected.gradients.items():
        if value is not None:
            results[f"gradient.{name}"] = value
            rules[f"gradient.{name}"] = make_rule(value, asked.truth.gradients[name], 4 * op.loose, floor=asked.floors[name])
    return results, rules


def _described(name, value):
    """An argument in the manifest: tensors by kind, shape and dtype, all else with its value."""
    if not isinstance(value, torch.Tensor):
        return {"kind": "setting", "value": value}
    return {"kind": "weight" if name in WEIGHTS or name.endswith(("_weight", "_bias")) else "input"} | form(value)


# Comparing


def compare_op(name, entry, golden, theirs):
    """Verdicts on one op's cases; the probable cause is that of all its failures together.

    name, entry: of the manifest; golden, theirs: paths of the two directories. Returns a list of Verdict, or one alone
    when none of the files is there.
    """
    verdicts, records = [], {}
    for case_name, case in entry["cases"].items():
        try:
            yours = _read(theirs, case)
        except (CheckpointError, GoldenError) as error:
            verdicts.append(judged(case_name, Difference(case_name, "missing", str(error))))
            continue
        if yours is None:
            verdicts.append(Verdict(case_name, "MISSING", "no such file"))
            continue
        ours = _read(golden, case)
        difference = _first_difference(case, ours, yours)
        verdicts.append(judged(case_name, difference) if difference else Verdict(case_name, "OK"))
        if difference and all(f"output.{output}" in yours for output in entry["outputs"]):
            records[len(verdicts) - 1] = _record(entry, case, ours, yours, difference)
    if all(verdict.status == "MISSING" and not verdict.wrong for verdict in verdicts):
        return [Verdict(name, "MISSING", f"none of its {len(verdicts)} cases is there")]
    if records and name in OPS:
        _, cause = diagnose(OPS[name], list(records.values()))
        for place in records:
            verdicts[place] = replace(verdicts[place], cause=cause)
    return verdicts


def _read(directory, case):
    """{result name: value} of a case's files that exist, or None if there is none of them."""
    paths = {kind: directory / case[kind] for kind in ("tensors", "plain") if kind in case}
    found = {kind: path for kind, path in paths.items() if path.is_file()}
    if not found:
        return None
    tensors = load_tensors(found["tensors"]) if "tensors" in found else {}
    return tensors | (read_json(found["plain"]) if "plain" in found else {})


def _first_difference(case, ours, yours):
    """The first Difference of an op's case. A program without gradients gives none of them."""
    forward_only = not any(name.startswith("gradient.") for name in yours)
    for name, rule in case["results"].items():
        kind, _, result = name.partition(".")
        what = f"output {result}" if kind == "output" else f"gradient of {result}"
        if name in yours:
            if found := differs(what, rule, ours[name], yours[name]):
                return found
        elif kind == "output" or not forward_only:
            strange = ", ".join(sorted(yours.keys() - ours.keys())[:3])
            return Difference(what, "missing", f"{name} is not in the file" + (f", but {strange}" if strange else ""))
    return None


def _record(entry, case, ours, yours, difference):
    """The wrong answer as `diagnose` wants it."""
    arguments = {name: ours[f"input.{name}"] if f"input.{name}" in ours else _setting(told["value"])
                 for name, told in case["arguments"].items()}  # fmt: skip
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in ours.items()}
    return Record(arguments, _outcome(entry, yours), difference, _outcome(entry, wide))


def _setting(value):
    """A plain argument as it was before JSON, which has no tuples: the grids of media are (t,h,w)."""
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


def _outcome(entry, values):
    gradients = {name: values.get(f"gradient.{name}") for name in entry["differentiable"]}
    given = any(gradient is not None for gradient in gradients.values())
    return Outcome({name: values[f"output.{name}"] for name in entry["outputs"]}, gradients if given else {})
