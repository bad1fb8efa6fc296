"""Calling somebody's function: conversion, gradients, poison, contract.

Run: .venv/bin/python -m pytest tests/test_adapter.py
"""

import ast
import inspect

import numpy as np
import pytest
import torch

import adapter
from adapter import once, poisoned, run, to_plain

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SEED = {"y": torch.tensor([[1.0, 10.0], [100.0, 1000.0]])}


def test_nothing_of_the_project_is_imported():
    imported = {getattr(node, "module", node.names[0].name) for node in ast.walk(ast.parse(inspect.getsource(adapter)))
                if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert imported <= {"contextlib", "copy", "traceback", "warnings", "collections.abc", "dataclasses", "numpy", "torch",
                        "tinygrad"}  # fmt: skip


def test_memory_is_poisoned_inside_and_clean_outside():
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(X).isnan().all() and X.new_empty(2).isnan().all()
        assert np.isnan(np.empty(3)).all() and np.isnan(np.empty_like(X.numpy())).all()
        assert (torch.empty(2, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
        assert (np.empty(2, np.int32) == np.iinfo(np.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), poisoned():
        1 / 0
    assert np.empty.__name__ == "empty" and not torch.are_deterministic_algorithms_enabled()


def squares(x):
    """Works in torch and in tinygrad."""
    return x * x


@pytest.mark.parametrize("arrays", ["torch", "tinygrad"])
def test_gradients_by_automatic_differentiation(arrays):
    outcome = run(squares, {"x": X}, ("y",), ("x",), SEED, arrays)
    assert not outcome.complaint and torch.equal(outcome.outputs["y"], X * X)
    assert torch.equal(outcome.gradients["x"], 2 * X * SEED["y"])


def test_numpy_has_gradients_only_by_a_backward_function():
    forward = run(squares, {"x": X}, ("y",), ("x",), SEED, "numpy")
    assert torch.equal(forward.outputs["y"], X * X) and forward.gradients == {}
    both = run(squares, {"x": X}, ("y",), ("x",), SEED, "numpy", lambda x, dy: 2 * x * dy)
    assert torch.equal(both.gradients["x"], 2 * X * SEED["y"])


def test_bfloat16_reaches_tinygrad_and_not_numpy():
    outcome = run(squares, {"x": X.bfloat16()}, ("y",), (), None, "tinygrad")
    assert outcome.outputs["y"].dtype == torch.bfloat16 and torch.equal(outcome.outputs["y"].float(), X * X)
    assert "no bfloat16" in run(squares, {"x": X.bfloat16()}, ("y",), (), None, "numpy").complaint


def test_arguments_come_by_position_and_settings_unconverted():
    seen = []
    once(lambda *given: seen.append(given), {"a": [1, 2], "b": "text", "c": None, "d": 0.5}, ("y",))
    assert seen == [([1, 2], "text", None, 0.5)]


def test_neither_tensors_nor_lists_can_be_spoiled():
    grids = [[1, 2, 4]]
    run(lambda grids: grids.append(1), {"grids": grids}, ("y",))
    assert grids == [[1, 2, 4]]
    outcome = run(lambda x: x.mul_(2), {"x": X.clone()}, ("y",))
    assert "changes its argument x in place" in outcome.complaint


def test_results_become_plain():
    assert to_plain(np.float32(0.5)) == 0.5 and to_plain((1, [np.int64(2)])) == [1, [2]] and to_plain(None) is None
    assert to_plain(np.arange(3)).dtype == torch.int64
    assert to_plain(np.arange(6).reshape(2, 3).T).tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(TypeError, match="returned a object"):
        to_plain(object())


def test_a_gradient_that_never_arrives_is_none():
    outcome = run(lambda x, w: x * 2, {"x": X, "w": X}, ("y",), ("x", "w"), SEED)
    assert outcome.gradients["w"] is None and outcome.gradients["x"] is not None


def test_an_exception_inside_a_library_names_the_line_that_called_it():
    complaint = run(lambda x: torch.nn.functional.layer_norm(x, [7]), {"x": X}, ("y",)).complaint
    assert "raises RuntimeError" in complaint and "test_adapter.py, line" in complaint
