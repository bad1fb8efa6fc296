"""Claims about study.py: cells are kept and go on, and intervals are what they say.

Run: .venv/bin/python -m pytest tests/test_study.py
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest

from study import StudyError, bootstrap, calibration_error, intervals, read_rows, run_cells, run_study, spent


def double(folder, name, log, value):
    """A cell."""
    if value < 0:
        raise ArithmeticError("negative")
    for step in range(2):
        log(step=step, loss=value / (step + 1) if value else math.nan)
    return {"doubled": 2 * value}


def test_a_finished_cell_is_not_run_again(tmp_path):
    cells = {"a": {"value": 1}, "b": {"value": 2}}
    assert run_cells(tmp_path, cells, double, workers=0) == {"a": {"doubled": 2}, "b": {"doubled": 4}}
    assert [row["loss"] for row in read_rows(tmp_path, "b")] == [2.0, 1.0]
    path = tmp_path / "cells" / "a.json"
    path.write_text(json.dumps({"arguments": {"value": 1}, "result": "kept"}))
    (tmp_path / "cells" / "b.json").unlink()
    assert run_cells(tmp_path, cells, double, workers=0) == {"a": "kept", "b": {"doubled": 4}}


def test_cells_of_other_arguments_are_refused(tmp_path):
    run_cells(tmp_path, {"a": {"value": 1}}, double, workers=0)
    with pytest.raises(StudyError, match="a.json was made with another value"):
        run_cells(tmp_path, {"a": {"value": 3}}, double, workers=0)


@dataclass(frozen=True)
class Settings:
    """Of an experiment of one cell."""

    run: str
    value: int = 1
    workers: int = 0


def study(folder, *flags):
    """The command line of that experiment."""

    def work(folder, t):
        return [str(run_cells(folder, {"a": {"value": t.value}}, double, workers=t.workers))]

    run_study("double", "Doubles.", Settings, work, (StudyError,), ["--run", str(folder), *flags])


@pytest.mark.parametrize("flags, words", [(["--value", "3"], "another value"), (["--workers", "-1"], "workers is -1")])
def test_a_refused_run_leaves_the_settings_of_what_is_kept(flags, words, tmp_path, capsys):
    study(tmp_path)
    before = (tmp_path / "config.json").read_text()
    assert json.loads(before)["value"] == 1
    with pytest.raises(SystemExit) as ended:
        study(tmp_path, *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_that_fails_keeps_its_settings_too(tmp_path):
    with pytest.raises(ArithmeticError):
        study(tmp_path, "--value", "-1")
    assert json.loads((tmp_path / "config.json").read_text())["value"] == -1
    study(tmp_path, "--value", "2")  # nothing was kept, so nothing forbids another value
    assert json.loads((tmp_path / "config.json").read_text())["value"] == 2


def test_processes_give_the_same_and_a_failed_cell_is_named_and_the_others_kept(tmp_path):
    with pytest.raises(StudyError, match="cells, cell bad: ArithmeticError: negative"):
        run_cells(tmp_path, {"good": {"value": 5}, "bad": {"value": -1}}, double, {"good": 2}, workers=1)
    assert run_cells(tmp_path, {"good": {"value": 5}}, double, workers=0) == {"good": {"doubled": 10}}


def forever(folder, name, log):
    """A cell that never ends."""
    log(pid=os.getpid())
    time.sleep(600)


SCRIPT = """
import test_study
if __name__ == "__main__":
    test_study.run_cells({folder!r}, {{"a": {{}}}}, test_study.forever, workers=1)
"""


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs /proc")
def test_cells_end_when_the_experiment_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    here = pathlib.Path(__file__).parent
    path = {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    experiment = subprocess.Popen([sys.executable, str(script)], env=os.environ | path, stderr=subprocess.DEVNULL)
    while not (rows := read_rows(tmp_path, "a")):
        assert experiment.poll() is None
        time.sleep(0.1)
    assert alive(rows[0]["pid"])
    experiment.kill()
    experiment.wait()
    while alive(rows[0]["pid"]):  # the test's time-out is the limit
        time.sleep(0.1)


def test_missing_numbers_are_null_and_a_torn_line_is_left_out(tmp_path):
    run_cells(tmp_path, {"a": {"value": 0}}, double, workers=0)
    with open(tmp_path / "cells" / "a.jsonl", "a") as file:
        file.write('{"step": 2')
    assert [row["loss"] for row in read_rows(tmp_path, "a")] == [None, None]


def test_the_interval_covers_the_mean_of_both_populations():
    """Seeds and items both vary: of 200 experiments some 95 % cover the true mean; drawing items alone again would not."""
    rng, covered, narrow = np.random.default_rng(0), 0, 0
    for trial in range(200):
        table = rng.normal(0, 1, (8, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (8, 40))
        found = bootstrap(table, draws=400, seed=trial)
        covered += found.low <= 0 <= found.high
        by_item = table.mean(0)
        narrow += abs(by_item.mean()) <= 1.96 * by_item.std() / 40**0.5
    assert covered > 170 and narrow < 150


def test_estimates_read_as_they_are():
    found = bootstrap(np.ones((3, 4)))
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0) and str(found) == "1.000 [1.000, 1.000]"
    with pytest.raises(StudyError, match="seeds × items"):
        bootstrap(np.ones(3))


@pytest.mark.parametrize("seeds, items", [(3, 7), (5, 60), (5, 120), (5, 180)])
def test_an_interval_holds_its_mean_where_all_are_alike(seeds, items):
    found = bootstrap(np.ones((seeds, items)))
    assert found.low <= found.mean <= found.high and found.high - found.low < 1e-12


def test_a_curve_has_the_interval_of_each_of_its_tables():
    tables = np.random.default_rng(0).normal(size=(3, 5, 7))  # points, seeds, items
    xs, *parts = intervals((1, 2, 4), tables)
    found = [bootstrap(table) for table in tables]
    assert xs == (1, 2, 4) and np.array_equal(np.transpose(parts), [(one.mean, one.low, one.high) for one in found])
    _, means, lows, highs = intervals(range(3), tables[:, :, 0])  # a number per seed
    assert np.allclose(means, tables[:, :, 0].mean(1)) and (lows < means).all() and (means < highs).all()


def test_calibration_error_by_hand():
    """Two bins: confidence 0.9 with accuracy ½ (gap 0.4, half of all), 0.2 with accuracy 0 (gap 0.2)."""
    assert calibration_error([0.9, 0.9, 0.2, 0.2], [1, 0, 0, 0]) == pytest.approx(0.3)
    assert calibration_error([1.0, 0.0], [1, 0]) == 0 and calibration_error([], []) == 0


def test_minutes_are_those_of_all_cells(tmp_path):
    cells = {name: {"value": 1} for name in ("a", "b")}
    run_cells(tmp_path, cells, double, workers=0)
    kept = [json.loads((tmp_path / "cells" / f"{name}.json").read_text())["seconds"] for name in cells]
    assert min(kept) > 0 and spent(tmp_path) == pytest.approx(sum(kept) / 60)
    (tmp_path / "cells" / "a.json").write_text(json.dumps({"arguments": {}, "result": 0}))
    assert spent(tmp_path) is None and spent(tmp_path / "nowhere") is None

