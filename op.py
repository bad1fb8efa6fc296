"""What an operation is to the oracle: its reference, how to draw inputs for it, and the mistakes that people make in it.

An implementation is compared with the reference run in the same dtype (shapes, dtypes) and in float64 (values):

    |got − truth| ≤ tolerance(dtype) · scale + 8 · max|reference − truth|
    scale = max(largest |truth| in the same last-dimension row, a tenth of the largest in the whole tensor, floor)

so that one wrong token cannot hide in a large tensor, and rounding that the reference itself suffers is forgiven. The
floor lets gradients that cancel to nearly nothing miss by rounding; outputs have none.

A Suspect is a known-wrong implementation with the mistake in words. When somebody's implementation fails, the suspect
that gives the same wrong numbers names the probable cause; the same suspects, run as implementations, show that the
oracle catches them.

Public names: Op, Suspect, Difference, TOLERANCE, compare, cast, normal, dyadic, describe.
Tests: pytest tests/test_op.py
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

# Largest allowed error relative to the scale, by the dtype of the result. The one table of the project.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
NUMBER_TOLERANCE = 1e-6  # of results that are plain Python numbers


@dataclass(frozen=True)
class Suspect:
    """A known-wrong implementation: the mistake, in words, and code that makes it."""

    name: str  # unique within its op
    cause: str  # what is wrong, one sentence without its full stop
    wrong: Callable  # same arguments and results as the op
    seen: str = ""  # where it happened: owner/repo#number


@dataclass(frozen=True)
class Op:
    """One operation: a pure function of plain values, and all that is needed to test somebody's version of it.

    The arguments of `reference` are the arguments of the op, in order.
    """

    name: str
    formula: str  # one line
    source: str  # section of a report
    reference: Callable
    cases: st.SearchStrategy  # draws dicts argument → value, valid by construction; floats as float32
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...] = ()  # arguments whose gradients are compared
    fixed: tuple[str, ...] = ()  # float arguments that keep their dtype whatever dtype is tested
    exact: tuple[str, ...] = ()  # float outputs compared bitwise
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # in which it is tested
    loose: float = 1.0  # factor on the tolerance, where an op amplifies rounding
    twins: dict[str, Callable] = field(default_factory=dict)  # same function, other ways to compute it
    variants: dict[str, Callable] = field(default_factory=dict)  # right in another way: must never be called wrong
    suspects: tuple[Suspect, ...] = ()

    @property
    def arguments(self):
        """Names of the arguments, in order."""
        return tuple(inspect.signature(self.reference).parameters)


@dataclass(frozen=True)
class Difference:
    """How a result differs from what it should be; `words` says it in one line."""

    what: str  # "output y", "gradient of x", or the contract that was broken
    kind: str  # contract, missing, type, shape, dtype, nan, value, gradient
    words: str
    max_abs: float = float("nan")
    relative: float = float("nan")
    index: tuple[int, ...] = ()

    def as_json(self):
        """The fields as JSON has them: no NaN, no infinity."""
        values = dataclasses.asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def cast(op, arguments, dtype):
    """The arguments with their floating tensors in `dtype`; those that the op keeps fixed stay, except in float64.

    The release stores some tensors in bfloat16 (int4 scales); float64 takes those along too, exactly. The order becomes
    that of the op: callers pass the values by position, and Hypothesis draws dicts in any order.
    """
    moves = lambda name: dtype == torch.float64 or name not in op.fixed  # noqa: E731
    values = {name: arguments[name] for name in op.arguments}
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() and moves(name) else value
        for name, value in values.items()
    }


def compare(what, actual, expected, truth, loose=1.0, exact=False, floor=0.0):
    """One result against the reference in the same dtype and in float64. Returns Difference, or None when they agree.

    what: names the result; actual: plain value; expected, truth: what the reference gave; loose: factor on the
    tolerance; exact: bitwise; floor: smallest scale. Integers of any width are equal when their values are; floats must
    have the dtype asked.
    """
    if not isinstance(expected, torch.Tensor):
        return _compare_plain(what, actual, expected)
    if not isinstance(actual, torch.Tensor):
        array = _as_array(actual, expected)
        if array is None:
            return Difference(what, "type", f"{what}: got {_short(actual)}, expected an array {_form(expected)}")
        actual = array
    if actual.shape != expected.shape:
        return Difference(what, "shape", f"{what}: shape {_shape(actual)}, expected {_shape(expected)}")
    integers = not any(x.is_floating_point() or x.is_complex() for x in (actual, expected))
    boolean = torch.bool in (actual.dtype, expected.dtype)
    if actual.dtype != expected.dtype and (not integers or boolean):
        return Difference(what, "dtype", f"{what}: dtype {_dtype(actual)}, expected {_dtype(expected)}")
    if actual.numel() == 0:
        return None
    return _compare_numbers(what, actual, expected, truth, loose, exact, floor)


def _as_array(value, expected):
    """Plain numbers, or nested lists of them, as a tensor of expected's dtype; None if they are no array of its rank."""
    if not isinstance(value, bool | int | float | list) or expected.ndim != len(_nesting(value)):
        return None
    try:
        return torch.tensor(value, dtype=expected.dtype)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # ragged, or not of numbers
        return None


def _compare_numbers(what, actual, expected, truth, loose, exact, floor):
    a, t = actual.double(), (expected if exact or not expected.is_floating_point() else truth).double()
    gap = (a - t).abs()
    gap = torch.where((a == t) | (a.isnan() & t.isnan()), 0.0, gap.nan_to_num(nan=torch.inf))
    finite = torch.where(t.isfinite(), t.abs(), 0.0)
    largest = finite.max()
    row = finite.amax(dim=-1, keepdim=True) if finite.ndim else finite
    allowed = torch.zeros_like(gap)
    if expected.is_floating_point() and not exact:
        own = torch.where(t.isfinite(), (expected.double() - t).abs(), 0.0).nan_to_num().max()
        scale = torch.maximum(row, 0.1 * largest).clamp(min=floor)
        allowed = TOLERANCE[expected.dtype] * loose * scale + 8 * own
        allowed = allowed + TOLERANCE[expected.dtype] * 1e-6  # zeros may be missed by this much
    excess = gap - allowed
    worst = int(excess.nan_to_num(posinf=torch.inf).argmax())
    if excess.flatten()[worst] <= 0:
        return None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape)) if gap.ndim else ()
    max_abs, relative = gap.max().item(), (gap.max() / largest.clamp(min=1e-30)).item()
    limit = "exactly" if exact or not expected.is_floating_point() else f"tolerance {TOLERANCE[expected.dtype] * loose:.0e}"
    words = (
        f"{what}: max-abs {max_abs:.3e}, relative {relative:.3e} ({limit}); worst at {index}: "
        f"got {actual[index].item():.9g}, expected {t[index].item():.9g}"
    )
    return Difference(what, "nan" if a[index].isnan() else "value", words, max_abs, relative, index)


def _compare_plain(what, actual, expected):
    """Numbers, strings, lists, None: equal, numbers within NUMBER_TOLERANCE."""
    if isinstance(actual, torch.Tensor):
        actual = actual.tolist()
    if isinstance(expected, float) and isinstance(actual, int | float):
        near = math.isfinite(expected) and abs(actual - expected) <= NUMBER_TOLERANCE * max(abs(expected), 1e-30)
        if near or actual == expected or math.isnan(actual) and math.isnan(expected):
            return None
        gap = abs(actual - expected)
        relative = gap / max(abs(expected), 1e-30)
        words = f"{what}: got {actual!r}, expected {expected!r}; max-abs {gap:.3e}, relative {relative:.3e}"
        return Difference(what, "value", words, gap, relative)
    if type(actual) is type(expected) and actual == expected:
        return None
    if isinstance(actual, str) and isinstance(expected, str):
        at = next((i for i, (a, b) in enumerate(zip(actual, expected)) if a != b), min(len(actual), len(expected)))
        begin = max(at - 20, 0)
        words = f"{what}: differs from character {at}: got {actual[begin:at + 40]!r}, expected {expected[begin:at + 40]!r}"
        return Difference(what, "value", words, index=(at,))
    return Difference(what, "value", f"{what}: got {_short(actual)}, expected {_short(expected)}")


def _nesting(value):
    """The shape of nested lists: [[1,2,3]] → (1,3)."""
    return (len(value), *(_nesting(value[0]) if value else ())) if isinstance(value, list) else ()


def _short(value, limit=160):
    text = _form(value) if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= limit else text[:limit] + " …"


def _shape(tensor):
    return "(" + ",".join(map(str, tensor.shape)) + ")"


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _form(tensor):
    return f"{_shape(tensor)} {_dtype(tensor)}"


def describe(arguments, most=12):
    """The arguments as lines of text, tensors with their values where they hold at most `most` numbers."""
    lines = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            shown = [round(v, 6) if isinstance(v, float) else v for v in value.flatten().tolist()[:most]]
            dots = " …" if value.numel() > most else ""
            lines.append(f"{name:<14} {_form(value):<18} {shown}{dots}")
        else:
            lines.append(f"{name:<14} {_short(value)}")
    return lines


# How strategies make tensors: shapes are drawn number by number, values from one drawn seed, so that shrinking is quick.


def normal(draw, *shape, scale=1.0):
    """A float32 tensor of standard normal values times `scale`, from a seed that `draw` draws."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16 - 1)))
    return torch.randn(shape, generator=generator) * scale


def dyadic(draw, *shape, denominator=8, limit=16):
    """A float32 tensor of small multiples of 1/denominator: sums of products are exact, whatever their order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16 - 1)))
    return torch.randint(-limit, limit + 1, shape, generator=generator) / denominator
