"""Claims about rl_job.py: one command from a model to a report; it goes on where it stopped, and bad input is one line.

Run: .venv/bin/python -m pytest tests/test_rl_job.py
"""

import dataclasses
import json
import math

import pytest
import torch

import rl_job
import tasks
import train_small
from k25 import K25, save
from rl_job import JobConfig, JobError, draw_pool, last_answer
from rollout import Rollout
from test_rl import CONFIG

FLAGS = ["--tasks", "colour,menu", "--traces", "12", "--iterations", "2", "--pool", "4", "--questions", "4", "--prompts", "2", "--responses", "2",
         "--max-new-tokens", "8", "--capacity", "400", "--slots", "4", "--checkpoint-every", "1", "--sft-steps", "2", "--sft-rows", "2",
         "--sft-length", "640", "--sft-dtype", "float32", "--rft-steps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a model that knows nothing."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("pretrained") / "model"
    save(K25(CONFIG), where)
    return where


def test_the_job_writes_everything_and_goes_on_where_it_stopped(model, tmp_path, capsys, monkeypatch):
    flags = ["rl", "--model", str(model), "--run", str(tmp_path / "run"), *FLAGS]
    original = rl_job.Learner.iterate

    def interrupted(self):
        if self.iteration == 1:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(rl_job.Learner, "iterate", interrupted)
    with pytest.raises(SystemExit) as ended:
        train_small.main(flags)
    assert ended.value.code == 130 and "--resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:  # the run is there
        train_small.main(flags)
    assert ended.value.code == 2 and "continue it with --resume" in capsys.readouterr().err
    train_small.main([*flags, "--resume"])
    written = capsys.readouterr().out
    assert "| all | vision | 4 |" in written and "report.md" in written
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["stage"] == "rl"] == [0, 1] and sum(row["stage"] == "sft" for row in rows) == 2
    assert {"config.json", "curves.png", "trajectories.png", "report.md", "scores.json"} <= {path.name for path in run.iterdir()}
    scores = json.loads((run / "scores.json").read_text())
    assert {"base", "sft", "rl"} <= set(scores) and len(scores["rl"]["passed"]) == 8
    assert all(0 <= c <= 1 for c in scores["rl"]["confidence"])


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere"], "nowhere holds no model"), (["--tasks", "juggling"], "no task 'juggling'"), (["--iterations", "0"], "iterations is 0"),
    (["--control", "short"], "control 'short'"), (["--sft-rows", "0"], "rows is 0"), (["--modality", "smell"], "modality 'smell'"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_small.main(["rl", "--run", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_pool_has_different_contents_names_in_turn_and_twins():
    pool = draw_pool(24, 1, ["colour", "count"])
    assert [task.name for task in pool[:4]] == ["colour", "count", "colour", "count"]
    assert {task.modality for task in pool} == set(tasks.MODALITIES) and all(task.split == "train" for task in pool)
    seen, read = (draw_pool(12, 1, ["colour", "count"], kind, "heldout") for kind in tasks.MODALITIES)
    assert [task.key for task in seen] == [task.key for task in read] and len({task.key for task in seen}) == 12
    with pytest.raises(JobError):
        dataclasses.replace(JobConfig(), pool=0)


def test_confidence_is_that_of_the_last_answer():
    rollout = Rollout((1, 2, 3, 4, 5), (False, True, False, True, True), (-3.0, -0.25, -0.5), (0, 0, 0))
    assert math.isclose(last_answer(rollout), -0.75)
    assert last_answer(Rollout((1,), (False,), (), ())) == 0
