"""Operations: text. Being written.

Public names: OPS.
Tests: pytest tests/test_ops_text.py
"""

OPS = ()
