"""The PARL experiment end to end, with models that cannot do anything yet.

Run: .venv/bin/python -m pytest tests/test_parl_experiment.py
"""

import json

import numpy as np
import pytest

import parl
import parl_experiment
from parl_experiment import PARLConfig, _contexts, _differences, _reached, main
from study import StudyError

TINY = ["--seeds", "1", "--other-seeds", "1", "--arms", "parl,single", "--look-ups", "20", "--practice", "20", "--small-steps", "2", "--large-steps", "2", "--traces", "20", "--base-steps", "3",
        "--iterations", "2", "--prompts", "2", "--responses", "2", "--pool", "6", "--questions", "1", "--workers", "0"]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(parl, "SIZES", {name: {"hidden_size": 32, "num_hidden_layers": 2, "qk_nope_head_dim": 16, "v_head_dim": 16} for name in parl.SIZES})
    monkeypatch.setattr(parl, "SUB_STEPS", 2)
    for name, value in {"BUDGETS": (3, 5), "CONTEXTS": (320,), "WIDER": 7, "LOOKED": ("document",), "LONGEST": 8, "SINGLE": 10}.items():
        monkeypatch.setattr(parl_experiment, name, value)


def test_it_runs_reports_and_goes_on(small, tmp_path, capsys):
    arguments = [*TINY, "--run", str(tmp_path / "run")]
    main(arguments)
    printed, folder = capsys.readouterr().out, tmp_path / "run"
    assert "| parl |" in printed and "| best schedule |" in printed
    text, summary = (folder / "report.md").read_text(), json.loads((folder / "summary.json").read_text())
    for part in ("table 6", "figure 4", "figure 7", "figure 8", "By kind", "By seed", "the same before and after: yes"):
        assert part in text
    ceiling, best = (summary[bound]["wider"] for bound in ("serial ceiling", "best schedule"))
    assert 0.5 < ceiling["performance"]["mean"] < 1.0 and ceiling["given"]["mean"] == 0.0  # time is up before seven rows are read
    assert best["given"]["mean"] == 7.0 and best["performance"]["mean"] < 0.2  # by subagents that can do nothing
    for name, arm in (("parl less single", "single"), ("parl less base", "base")):
        gap = summary["parl"]["wider"]["given"]["mean"] - summary[arm]["wider"]["given"]["mean"]
        assert summary[name]["wider"]["given"]["mean"] == pytest.approx(gap) and "| parl less … |" in text
    assert (folder / "training.png").stat().st_size > 5000 and (folder / "budgets.png").stat().st_size > 3000
    pages = sorted(path.name for path in (folder / "samples").iterdir())
    assert len(pages) == 12 and "parl-1-wide.html" in pages and "item-F1" in (folder / "samples" / "single-1-deep.html").read_text()
    rows = (folder / "cells" / "parl-1.jsonl").read_text().splitlines()
    assert len(rows) == 2 and {"performance", "given", "critical", "given single"} <= json.loads(rows[0]).keys()
    before = (folder / "cells" / "parl-1.json").stat().st_mtime_ns
    main(arguments)
    assert (folder / "cells" / "parl-1.json").stat().st_mtime_ns == before


def test_misuse_is_one_line_and_exit_code_2(tmp_path, capsys):
    for flags, said in ((["--seeds", "0"], "seeds is 0"), (["--arms", "serial"], "no arm 'serial'")):
        with pytest.raises(SystemExit) as end:
            main([*flags, "--run", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert end.value.code == 2 and said in error and error.count("\n") == 1
    with pytest.raises(StudyError, match="iterations is 0"):
        PARLConfig(iterations=0)


def test_arms_are_compared_on_the_seeds_that_both_have():
    values, summary = {"parl": [[1.0, 0.0], [0.0, 0.0]], "outcome": [[0.5, 0.0]]}, {}
    base = {part: dict.fromkeys(("performance", "given", "finished"), row) for part, row in (("heldout", [0.9, 0.9]), ("wider", [0.2, 0.4]))}
    _differences("wider", base, lambda name, part, field: np.array(values[name]), ["parl", "outcome"], summary)
    assert summary["parl less outcome"]["wider"]["given"]["mean"] == 0.25  # of the first seed alone
    assert summary["parl less base"]["wider"]["given"]["mean"] == pytest.approx(0.25 - 0.3)
    assert not _differences("wider", base, None, ["single"], summary)


def test_a_swarm_is_compared_with_each_remedy_at_each_limit():
    found = lambda value: {"performance": [value, value]}  # noqa: E731
    limits = [(remedy, tokens, place + tokens / 1000) for place, remedy in enumerate(parl.REMEDIES) for tokens in parl_experiment.CONTEXTS]
    arms = {"parl-1": {"contexts": {f"none {tokens}": found(9.0) for tokens in parl_experiment.CONTEXTS}},
            "single-1": {"contexts": {f"{remedy} {tokens}": found(value) for remedy, tokens, value in limits}}}  # fmt: skip
    summary = {}
    assert "| single agent, summary | 3.256 [3.256, 3.256] |" in "\n".join(_contexts(arms, [1], summary))
    for remedy, tokens, value in limits:
        assert summary[f"context, swarm less {remedy}"][tokens]["mean"] == pytest.approx(9.0 - value)


def test_where_a_curve_reaches_a_goal_by_hand():
    assert _reached(0.5, (4, 8), (0.25, 0.75)) == pytest.approx(6.0)
    assert _reached(0.25, (4, 8), (0.25, 0.75)) == pytest.approx(4.0)
    assert _reached(0.1, (4, 8), (0.2, 0.75)) == 4.0  # at the least that was tried
    assert np.isnan(_reached(0.8, (4, 8), (0.25, 0.75)))
