"""Claims about rewards.py.

Run: .venv/bin/python -m pytest tests/test_rewards.py
"""

from rewards import box_f1


def test_the_true_box_scores_1():
    assert box_f1("[1 2 3 4]", "[1 2 3 4]").value == 1
