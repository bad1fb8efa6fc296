"""The picture of the whole system shows every file once, and counts its real imports.

Run: .venv/bin/python -m pytest tests/test_atlas.py
"""

import re
from collections import Counter

import pytest
from PIL import Image

import atlas


def test_every_file_stands_in_one_part():
    named = Counter(name for _, files in atlas.PARTS.values() for name in files.split())
    assert set(named) == {path.stem for path in atlas.ROOT.glob("*.py")} and set(named.values()) == {1}


def test_imports_are_those_that_a_search_finds():
    found = atlas.imports()
    assert list(found) and all(name not in others for name, others in found.items())
    for name in found:
        text = (atlas.ROOT / f"{name}.py").read_text(encoding="utf-8")
        words = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", text, re.MULTILINE))
        assert words & set(found) - {name} == found[name], name


def test_counts_by_hand(monkeypatch):
    monkeypatch.setattr(atlas, "PARTS", {"one": ("", "a b"), "two": ("", "c")})
    assert atlas.counts({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == {("one", "one"): 1, ("two", "one"): 2}


def test_the_picture_is_drawn(tmp_path):
    atlas.main(["--out", str(tmp_path / "system.png")])
    with Image.open(tmp_path / "system.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_a_place_that_is_not_there_is_told_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        atlas.main(["--out", str(tmp_path / "nowhere" / "system.png")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "nowhere" in error and error.count("\n") == 1
