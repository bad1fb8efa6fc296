"""Claims about ops_toggle.py: every mistake is caught and named, every right way passes, NumPy agrees.

Run: .venv/bin/python -m pytest tests/test_ops_toggle.py
"""

import pytest
from conftest import assert_named, assert_right_ones_pass

from ops_toggle import OPS

EACH = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
SUSPECTS = [pytest.param(op, suspect, id=f"{op.name}-{suspect.name}") for op in OPS for suspect in op.suspects]


@EACH
def test_right_implementations_pass_in_every_dtype(op):
    assert_right_ones_pass(op)


@pytest.mark.parametrize("op, suspect", SUSPECTS)
def test_a_mistake_is_caught_and_named(op, suspect):
    assert_named(op, suspect)
