"""Experiments of many cells, such as an arm with a seed: run side by side, kept as JSON, summed up with intervals.

    results = run_cells(folder, {"plain-0": {"arm": "plain", "seed": 0}, …}, work, rows={"plain-0": 40, …}, workers=2)

    run_study("toggle", __doc__, ToggleConfig, work, (StudyError,), arguments)       the command line: a flag for each field

`work(folder, name, log, **arguments)` of the cells is a function of a module; it returns JSON and may write models below the folder. Each
cell runs in a process with one thread. A finished cell is not run again, so an experiment that was interrupted goes on; one
that was begun with other arguments is refused. `log` writes a row of metrics per step into `cells/NAME.jsonl`.

Intervals are bootstraps over seeds and items at once: both are drawn again, and all seeds answer the same items.

Public names: StudyError, Log, read_rows, run_cells, spent, bootstrap, intervals, calibration_error, Estimate, run_study.
Tests: pytest tests/test_study.py
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import write_file
from flags import add_flags, one_line, parse_flags, take_flags


BINS = 10  # of calibration_error


class StudyError(ValueError):
    """Cells that cannot be run or do not fit what is there; one line says which."""


class _RefusedError(StudyError):
    """Nothing was run: what is kept stays as it is, config.json too."""


# ------------------------------------------------------------------------------------------------ cells


class Log:
    """The metrics of a cell, a JSON line per step; a cell that is begun again begins them again."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def __call__(self, **row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({key: None if value != value else value for key, value in row.items()}) + "\n")


def read_rows(folder, name):
    """The metrics of a cell, a list of dicts; an unfinished last line is left out."""
    path = pathlib.Path(folder) / "cells" / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _begin():
    """In each process: one thread, and an end when the experiment has ended, however it did."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _cell(work, folder, name, arguments):
    """(result, processor-seconds) of a cell."""
    began = time.process_time()
    return work(folder, name, Log(folder / "cells" / f"{name}.jsonl"), **arguments), time.process_time() - began


def run_cells(folder, cells, work, rows=None, workers=2, what="cells"):
    """Run what is missing. Returns {name: result} in the order of the cells.

    folder: of the experiment; cells: {name: JSON arguments}; work: see the module; rows: {name: int} rows that each will log,
    for the progress bar; workers: processes, 0 runs them in this one. Raises StudyError when a cell fails, naming it,
    after the cells that run have ended; what is finished is kept.
    """
    if workers < 0:
        raise _RefusedError(f"workers is {workers}: it must be at least 0, which runs all in this process")
    folder, rows = pathlib.Path(folder), rows or {}
    path = lambda name: folder / "cells" / f"{name}.json"  # noqa: E731
    results, missing = {}, []
    for name, arguments in cells.items():
        kept = json.loads(path(name).read_text()) if path(name).exists() else None
        if kept and kept["arguments"] != json.loads(json.dumps(arguments)):
            changed = [key for key in arguments if kept["arguments"].get(key) != json.loads(json.dumps(arguments[key]))]
            raise _RefusedError(f"{path(name)} was made with another {', '.join(changed) or 'set of arguments'}: choose another folder or remove it")
        if kept:
            results[name] = kept["result"]
        else:
            missing.append(name)
    (folder / "cells").mkdir(parents=True, exist_ok=True)

    def keep(name, result, seconds):
        write_file(path(name), json.dumps({"arguments": cells[name], "result": result, "seconds": seconds}) + "\n")
        results[name] = json.loads(json.dumps(result))

    if workers == 0:
        for name in missing:
            keep(name, *_cell(work, folder, name, cells[name]))
    elif missing:
        _side_by_side(folder, {name: cells[name] for name in missing}, work, rows, workers, what, keep)
    return {name: results[name] for name in cells}


def spent(folder):
    """Processor-minutes that all finished cells of a folder took; None where that was not kept."""
    kept = [json.loads(path.read_text()).get("seconds") for path in (pathlib.Path(folder) / "cells").glob("*.json")]
    return None if not kept or None in kept else sum(kept) / 60


def _side_by_side(folder, cells, work, rows, workers, what, keep):
    for name in cells:  # of an earlier attempt
        (folder / "cells" / f"{name}.jsonl").unlink(missing_ok=True)
    total = sum(rows.get(name, 0) for name in cells)
    with (ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool,
          tqdm(total=total, unit="step", desc=what, dynamic_ncols=True) as bar):  # fmt: skip
        running = {pool.submit(_cell, work, folder, name, arguments): name for name, arguments in cells.items()}
        failed = None
        while running:
            done, _ = wait(running, 1.0, FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                if future.cancelled():
                    continue
                if error := future.exception():
                    failed = failed or StudyError(f"{what}, cell {name}: {type(error).__name__}: {error}")
                    for other in running:
                        other.cancel()
                else:
                    keep(name, *future.result())
            _show(bar, folder, cells)
        if failed:
            raise failed


def _show(bar, folder, cells):
    """Move the bar to the rows that all cells have logged, and tell the last of each that runs."""
    logged = {name: read_rows(folder, name) for name in cells}
    bar.n = sum(map(len, logged.values()))
    lasts = [(name, found[-1]) for name, found in logged.items() if found and not (folder / "cells" / f"{name}.json").exists()]
    show = lambda row: " ".join(f"{key} {row[key]:.3g}" for key in ("loss", "reward", "tokens_per_s") if row.get(key) is not None)  # noqa: E731
    bar.set_postfix_str("; ".join(f"{name} {show(row)}" for name, row in lasts[:3]))
    bar.refresh()


# -------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(table, draws=4000, seed=0):
    """Mean of a table with its 95 % percentile interval, seeds and items drawn again together.

    table: (S,I) floats — S seeds, I items that are the same for all seeds; for a paired comparison, their differences.
    """
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise StudyError(f"a table of shape {table.shape}: expected seeds × items, at least one of each")
    rng, (seeds, items) = np.random.default_rng(seed), table.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws,S) weights
    by_item = rng.multinomial(items, np.full(items, 1 / items), size=draws) / items  # (draws,I)
    means = np.einsum("ds,si,di->d", by_seed, table, by_item, optimize=True)
    mean, (low, high) = table.mean(), np.percentile(means, (2.5, 97.5))
    return Estimate(float(mean), float(min(low, mean)), float(max(high, mean)))  # where all are alike, rounding puts the mean outside


def intervals(xs, tables):
    """A curve with its intervals, as rl_report.plot_arms takes it: (xs, means, lows, highs).

    tables: for each x one table for `bootstrap`, or one number per seed."""
    found = [bootstrap(table if np.ndim(table) == 2 else np.reshape(table, (-1, 1))) for table in tables]
    return xs, *np.array([(one.mean, one.low, one.high) for one in found]).reshape(-1, 3).T


def calibration_error(confidence, correct):
    """Expected calibration error: Σ share of bin · |mean confidence − accuracy|, over BINS of equal width.

    confidence: (I,) in 0…1; correct: (I,) bool or 0/1. Returns float in 0…1; 0 for no items.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[place == b].sum() - correct[place == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / max(len(confidence), 1))


# ---------------------------------------------------------------------------------------- command line


def run_study(command, about, kind, work, errors, arguments=None, ready=lambda t: None):
    """The command line `train_small.py COMMAND` of an experiment that goes on where it was interrupted.

    about: its first line is the description; kind: class of the settings, which has a field `run`; work: function (folder, settings) →
    lines to print, which writes report.md; ready: function of the settings, raises before anything is written; errors: exceptions
    that are one line and exit code 2. The settings are kept in config.json; a run that is refused leaves those that were there.
    """
    parser = argparse.ArgumentParser(prog=f"train_small.py {command}", usage=f"train_small.py {command} [--FLAG VALUE …]", allow_abbrev=False,
                                     description=about.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add_flags(parser, kind)
    options = parse_flags(parser, arguments)
    with one_line(parser.prog, errors):
        began, t = time.perf_counter(), take_flags(options, kind)
        ready(t)
        folder = pathlib.Path(t.run)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.json"
        before = config.read_text() if config.exists() else None
        write_file(config, json.dumps(dataclasses.asdict(t) | {"torch": torch.__version__}, indent=2) + "\n")
        try:
            lines = work(folder, t)
        except _RefusedError:
            if before is not None:
                write_file(config, before)
            raise
        print("\n".join(lines))
        print(f"{folder / 'report.md'}   {(time.perf_counter() - began) / 60:.1f} minutes")
