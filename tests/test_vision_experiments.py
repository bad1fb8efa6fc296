"""Claims about vision_experiments.py: both run from a model to a report at the smallest size, and figures are those of their cells.

Run: .venv/bin/python -m pytest tests/test_vision_experiments.py
"""

import json

import pytest
import torch

import train_small
import vision_experiments
from k25 import K25, save
from study import read_rows
from test_rl import CONFIG
from vision_experiments import RL_ARMS, SFT_ARMS, StudySettings, TransferSettings, transfer_report, zero_vision_report

FLAGS = ["--seeds", "1", "--traces", "12", "--sft-steps", "1", "--each", "2", "--max-new-tokens", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a model that knows nothing."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("pretrained") / "model"
    save(K25(CONFIG), where)
    return where


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(vision_experiments, "LOOKED", ("colour", "count"))


def test_zero_vision_runs_and_is_kept(model, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["zero-vision", "--model", str(model), "--run", str(run), *FLAGS]
    train_small.main(flags)
    assert all(f"| {arm} |" in capsys.readouterr().out for arm in SFT_ARMS[:1])
    assert {"report.md", "summary.json", "kinds.png", "config.json", "trajectories-zero-vision-1.png"} <= {path.name for path in run.iterdir()}
    assert len(read_rows(run, "zero-vision-1")) == 1 and not read_rows(run, "none-1")
    before = {path: path.read_bytes() for path in (run / "cells").iterdir()}
    train_small.main(flags)
    assert {path: path.read_bytes() for path in (run / "cells").iterdir()} == before


def test_transfer_runs_with_matched_tokens(model, tmp_path, capsys):
    run = tmp_path / "run"
    train_small.main(["transfer", "--model", str(model), "--run", str(run), "--zero-vision", str(tmp_path / "sft"), *FLAGS, "--iterations", "1", "--prompts", "1", "--responses", "2", "--pool", "2"])
    written = capsys.readouterr().out
    assert all(f"| {arm} |" in written for arm in ("start", *RL_ARMS)) and "joint RL less the vision expert" in written
    tokens = {arm: json.loads((run / "cells" / f"{arm}-1.json").read_text())["result"]["tokens"] for arm in RL_ARMS}
    assert all(tokens[arm] >= tokens["vision"] for arm in ("text", "joint", "shuffled")) and tokens["sft"] > 0


def test_shuffled_pictures_are_of_another_task_of_the_kind_and_the_question_stays():
    asked = vision_experiments._questions(StudySettings(each=3), "vision")
    for task, other in zip(asked, vision_experiments._shuffled(asked)):
        assert other.truth == task.truth and other.questions == task.questions and other.images != task.images
    assert {id(image) for task in asked for image in task.images} == {id(image) for task in vision_experiments._shuffled(asked) for image in task.images}


def answers(passed, tools=None):
    return {"passed": passed, "tools": tools or [1] * len(passed), "tokens": [1] * len(passed), "confidence": [1.0] * len(passed)}


def test_success_needs_a_call_of_a_tool(tmp_path):
    """By hand, two kinds with one task each: right twice, but once without a call."""
    t = StudySettings(seeds=1, each=1)
    part = {"with tools": answers([1, 1], [1, 0]), "shuffled": answers([0, 0]), "no tools": answers([1, 0])}
    zero_vision_report(tmp_path, t, {f"{arm}-1": part for arm in SFT_ARMS})
    found = json.loads((tmp_path / "summary.json").read_text())["zero-vision"]
    assert (found["success with tools"]["mean"], found["right at all"]["mean"], found["right without tools"]["mean"]) == (0.5, 1, 0.5)


def test_changes_are_paired_and_experts_are_taken_at_half(tmp_path):
    t = TransferSettings(seeds=2, each=1)

    def cell(text, vision, half=None):
        end = {"text": answers(text), "vision": answers(vision), "unrelated": {"passed": [1, 0]}}
        return {"end": end, "tokens": 10} | ({"half": {"text": answers(half), "vision": answers(half)}} if half else {})

    cells = {f"{arm}-{s}": cell([1, 1], [1, 0], [0, 0]) if arm in ("vision", "text", "joint") else cell([0, 1], [0, 0])
             for arm in ("start", *RL_ARMS) for s in (1, 2)}  # fmt: skip
    transfer_report(tmp_path, t, cells)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["vision"]["text, change"]["mean"] == 0.5 and summary["sft"]["text, change"]["mean"] == 0
    assert summary["vision RL less others, on text"]["sft"]["mean"] == 0.5
    assert summary["joint less experts"]["text"]["mean"] == 1 and summary["joint less experts"]["vision"]["mean"] == 0.5
    assert summary["vision"]["calibration error"] == [0, 0] and summary["start"]["calibration error"] == [0.5, 0.5]


@pytest.mark.parametrize("command", ["zero-vision", "transfer"])
@pytest.mark.parametrize("flags, words", [(["--model", "nowhere"], "nowhere holds no model"), (["--each", "0"], "each is 0")])
def test_bad_input_is_one_line(command, flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_small.main([command, "--run", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_unknown_experiment_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        vision_experiments.main([], "foo")
    assert ended.value.code == 2 and capsys.readouterr().err == "vision_experiments.py: no experiment 'foo': use zero-vision or transfer\n"
