"""Calls somebody else's implementation of an operation: array conversion, gradients, contract. Knows nothing of K25.

The caller hands over plain values (torch tensors, numbers, strings, lists, None) and gets plain values back, whatever
array library the implementation is written in:

    "torch"      torch tensors; gradients by autograd                                     (the default)
    "tinygrad"   tinygrad tensors; gradients by Tensor.gradient
    "numpy"      NumPy arrays; gradients when the module has an `OP_backward` function
    a callable   makes the module's own array from a NumPy array, for example jax.numpy.asarray; as "numpy"

`OP_backward(*arguments, *cotangents)` returns the gradients of the differentiable arguments, in order; where it
exists it is preferred to automatic differentiation.

This file is also loaded, from its text, into the sandboxed child that runs a student's code: it imports nothing of
the project.

Public names: Outcome, once, run, poisoned, to_plain.
Tests: pytest tests/test_adapter.py
"""

import contextlib
import copy
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Outcome:
    """What one call gave.

    outputs: name → torch tensor, number, string, list or None; gradients: argument → tensor, or None where no gradient
    arrived; empty when the implementation is forward only or was not asked; complaint: what the call did that no
    implementation may do (raised, changed its inputs, answered differently the second time), else "".
    """

    outputs: dict
    gradients: dict
    complaint: str = ""


@contextlib.contextmanager
def poisoned():
    """Fill memory that torch.empty, numpy.empty and their kind hand out with NaN (integers: the largest value).

    An implementation that reads what it never wrote is then wrong always, not sometimes.
    """
    mode = torch.get_deterministic_debug_mode()
    plain_empty, plain_like = np.empty, np.empty_like

    def poison(array):
        if array.dtype.kind in "fc":
            array.fill(np.nan)
        elif array.dtype.kind in "iu":
            array.fill(np.iinfo(array.dtype).max)
        return array

    torch.set_deterministic_debug_mode("warn")  # makes torch fill uninitialised memory
    np.empty = lambda *args, **kwargs: poison(plain_empty(*args, **kwargs))
    np.empty_like = lambda *args, **kwargs: poison(plain_like(*args, **kwargs))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        np.empty, np.empty_like = plain_empty, plain_like
        torch.set_deterministic_debug_mode(mode)


def to_plain(value):
    """Any array-like as a torch tensor, containers element by element; numbers, strings and None as they are."""
    if value is None or isinstance(value, torch.Tensor | str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)  # which is at least 1-d otherwise
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if type(value).__module__.partition(".")[0] == "tinygrad":
        return _from_tinygrad(value)
    if hasattr(value, "__array__"):
        return torch.from_numpy(np.array(value))
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value).clone()
    raise TypeError(f"returned a {type(value).__name__}, which is neither an array nor a plain value")


def _from_tinygrad(tensor):
    from tinygrad import dtypes

    if tensor.dtype == dtypes.bfloat16:  # NumPy has no bfloat16
        return torch.from_numpy(tensor.cast(dtypes.float32).numpy()).bfloat16()
    return torch.from_numpy(np.array(tensor.numpy()))


def _to_tinygrad(tensor):
    from tinygrad import Tensor, dtypes

    if tensor.dtype == torch.bfloat16:
        return Tensor(tensor.float().numpy()).cast(dtypes.bfloat16)
    return Tensor(tensor.numpy()).realize()


def _to_arrays(tensor, arrays):
    if arrays == "torch":
        return tensor
    if arrays == "tinygrad":
        return _to_tinygrad(tensor)
    if tensor.dtype == torch.bfloat16:
        raise TypeError("NumPy has no bfloat16: test this implementation in float32")
    return tensor.numpy() if arrays == "numpy" else arrays(tensor.numpy())


def _named(result, names):
    """The outputs by name, from a single value, a tuple, a mapping or an object with such attributes."""
    if len(names) == 1 and not isinstance(result, Mapping):
        return {names[0]: result[0] if isinstance(result, tuple) and len(result) == 1 else result}
    if isinstance(result, Mapping) and all(name in result for name in names):
        return {name: result[name] for name in names}
    if isinstance(result, list | tuple) and len(result) == len(names):
        return dict(zip(names, result))
    if all(hasattr(result, name) for name in names):
        return {name: getattr(result, name) for name in names}
    count = f" of {len(result)}" if isinstance(result, list | tuple) else ""
    raise TypeError(f"returned a {type(result).__name__}{count}; expected {len(names)} values: {', '.join(names)}")


def _torch_gradients(outputs, leaves, cotangents):
    roots = {name: outputs[name] for name in cotangents if getattr(outputs[name], "requires_grad", False)}
    if not roots or any(root.shape != cotangents[name].shape for name, root in roots.items()):
        return {}
    seeds = [cotangents[name].to(root.dtype) for name, root in roots.items()]
    found = torch.autograd.grad(list(roots.values()), list(leaves.values()), seeds, allow_unused=True)
    return dict(zip(leaves, found))


def _tinygrad_gradients(outputs, leaves, cotangents):
    total = sum((outputs[name].float() * _to_tinygrad(seed.float())).sum() for name, seed in cotangents.items())
    return dict(zip(leaves, total.gradient(*leaves.values())))


def once(function, arguments, names, wanted=(), cotangents=None, arrays="torch", backward=None):
    """Call an implementation one time, on copies of its arguments, in the array library it wants.

    function: called with the arguments' values by position; arguments: name → plain value; names: of its outputs;
    wanted: names of the arguments whose gradients are asked; cotangents: output name → tensor, the gradient of the
    loss by that output; arrays: see the module; backward: the module's own gradient function or None.
    Returns Outcome. An exception of the implementation passes through.
    """
    given = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            leaf = value.detach().clone()
            if arrays == "torch" and backward is None and name in wanted:
                leaf.requires_grad_()
            given[name] = _to_arrays(leaf, arrays)
        else:
            given[name] = copy.deepcopy(value)
    outputs = _named(function(*given.values()), names)
    gradients = {}
    if wanted and cotangents:
        leaves = {name: given[name] for name in wanted}
        if backward is not None:
            seeds = [_to_arrays(seed, arrays) for seed in cotangents.values()]
            gradients = _named(backward(*given.values(), *seeds), wanted)
        elif arrays == "torch":
            gradients = _torch_gradients(outputs, leaves, cotangents)
        elif arrays == "tinygrad":
            gradients = _tinygrad_gradients(outputs, leaves, cotangents)
    detach = lambda value: value.detach() if isinstance(value, torch.Tensor) else value  # noqa: E731
    outputs = {name: detach(to_plain(value)) for name, value in outputs.items()}
    changed = [n for n, v in arguments.items() if isinstance(v, torch.Tensor) and not _same(detach(to_plain(given[n])), v)]
    complaint = f"changes its argument {changed[0]} in place; an operation must leave its inputs alone" if changed else ""
    return Outcome(outputs, {name: to_plain(value) for name, value in gradients.items()}, complaint)


def run(function, arguments, names, wanted=(), cotangents=None, arrays="torch", backward=None):
    """Call an implementation twice, in poisoned memory, and complain of exceptions and of differing answers.

    Arguments and result as `once`, but an exception becomes the complaint, with the line that raised it.
    """
    options = (names, wanted, cotangents, arrays, backward)
    try:
        with poisoned():
            first, second = once(function, arguments, *options), once(function, arguments, *options)
    except (Exception, SystemExit) as error:  # whatever somebody's code raises is a finding, not our failure
        frames = traceback.extract_tb(error.__traceback__)
        home = getattr(getattr(function, "__code__", None), "co_filename", "")
        frame = ([f for f in frames if f.filename == home] or frames)[-1]  # their line, not the library's that it called
        place = f"{frame.filename.rpartition('/')[2]}, line {frame.lineno}"
        words = " ".join(str(error).split())[:300]
        does = f"calls sys.exit({words})" if isinstance(error, SystemExit) else f"raises {type(error).__name__}: {words}"
        return Outcome({}, {}, f"{does} ({place})")
    if first.complaint:
        return first
    for kind in ("outputs", "gradients"):
        for name, value in getattr(first, kind).items():
            if not _same(value, getattr(second, kind)[name]):
                return Outcome({}, {}, f"is not deterministic: {kind[:-1]} {name} differs between two equal calls")
    return first


def _same(a, b):
    """Bitwise equality, NaN equal to NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, 0.0, 0.0, equal_nan=True)
    return type(a) is type(b) and (a == b or a != a)
