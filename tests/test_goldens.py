"""Claims about goldens.py. Run: .venv/bin/python -m pytest tests/test_goldens.py"""
