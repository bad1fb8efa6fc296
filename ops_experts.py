"""Operations: experts. Being written.

Public names: OPS.
Tests: pytest tests/test_ops_experts.py
"""

OPS = ()
