"""Operations: vision. Being written.

Public names: OPS.
Tests: pytest tests/test_ops_vision.py
"""

OPS = ()
