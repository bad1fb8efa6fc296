"""Operations: training. Being written.

Public names: OPS.
Tests: pytest tests/test_ops_training.py
"""

OPS = ()
