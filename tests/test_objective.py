"""Claims about objective.py.

Run: .venv/bin/python -m pytest tests/test_objective.py
"""

from objective import toggle_phase


def test_phases_alternate():
    assert [toggle_phase(t, 2) for t in range(6)] == [0, 0, 1, 1, 0, 0]
