"""Claims about toggle_experiment.py: it runs from nothing to a report at the smallest size, and its figures are those of its cells.

Run: .venv/bin/python -m pytest tests/test_toggle_experiment.py
"""

import json

import numpy as np
import pytest

import toggle_experiment
import train_small
from toggle_experiment import ARMS, ToggleConfig, report
from study import read_rows

FLAGS = ["--seeds", "1", "--traces", "8", "--sft-steps", "1", "--pool", "4", "--base-iterations", "1", "--iterations", "1", "--prompts", "1",
         "--responses", "2", "--questions", "1", "--workers", "0"]  # fmt: skip


def test_the_whole_experiment_runs_and_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toggle_experiment, "LONGEST", 4)
    run = tmp_path / "toggle"
    train_small.main(["toggle", "--run", str(run), *FLAGS])
    written = capsys.readouterr().out
    assert all(f"| {name} |" in written for name in ("base", *ARMS))
    assert {"report.md", "summary.json", "arms.png", "caps.png", "config.json"} <= {path.name for path in run.iterdir()}
    assert len(read_rows(run, "base-1")) == 2 and read_rows(run, "toggle-1")[0]["phase"] == 0
    before = {path: path.read_bytes() for path in (run / "cells").iterdir()}
    train_small.main(["toggle", "--run", str(run), *FLAGS])  # nothing is run again
    assert {path: path.read_bytes() for path in (run / "cells").iterdir()} == before
    with pytest.raises(SystemExit) as ended:
        train_small.main(["toggle", "--run", str(run), *FLAGS, "--lam", "0.5"])
    assert ended.value.code == 2 and "was made with another lam" in capsys.readouterr().err


def cell(passed, tokens, capped):
    return {"trained": {"trained": {"passed": passed, "tokens": tokens}}, "capped": capped}


def test_figures_are_those_of_the_cells(tmp_path, monkeypatch):
    """By hand: Toggle has 30 % fewer tokens than plain, and is right once less of eight."""
    monkeypatch.setattr(toggle_experiment, "_plots", lambda *_: None)
    t, caps = ToggleConfig(seeds=2, questions=1), {"1": [0], "2": [1], "4": [1]}
    plain, short = cell([1, 1, 1, 1], [10, 20, 30, 40], caps), cell([1, 1, 1, 0], [7, 14, 21, 28], caps)
    arms = {f"{name}-{s}": short if name == "toggle" and s == 1 else cell([1] * 4, [7, 14, 21, 28], caps) if name == "toggle" else plain
            for name in ARMS for s in (1, 2)}  # fmt: skip
    bases = {f"base-{s}": {"base": plain["trained"], "sft": plain["trained"], "capped": caps, "cap": 9} for s in (1, 2)}
    rows = report(tmp_path, t, bases, arms)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["toggle"]["tokens against plain's"]["mean"] == pytest.approx(-0.3)
    assert summary["toggle"]["accuracy less plain's"]["mean"] == pytest.approx(-1 / 8)
    assert summary["plain"]["tokens"]["mean"] == 25 and "-0.300" in rows[2]
    assert np.isclose(summary["rigid"]["capped"]["1"]["mean"], 0)


@pytest.mark.parametrize("flags, words", [(["--seeds", "0"], "seeds is 0"), (["--pool", "5"], "the 4 levels share it")])
def test_bad_input_is_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_small.main(["toggle", "--run", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1
