"""Real steps on a few processes: what they hold is what the planner says, and when they work is what its tables say.

Run: .venv/bin/python -m pytest tests/test_trials.py
"""

import dataclasses
import json
import os
import time

import pytest
import torch

import trials
from k25 import K25Config
from launcher import forkserver
from parallel import Layout
from schedule import Work, bubble, schedule_tables, simulate
from trials import MEMORY, Crew, Settings, TrialError, compare, compare_memory, make_batches, pipeline_trial, report

TOY = K25Config.preset("toy")


@pytest.fixture(scope="module")
def crew():
    forkserver()
    with Crew(4) as crew:
        yield crew


# Batches


@pytest.mark.parametrize("rows, length, pictures", [(1, 64, 0), (2, 64, 3), (3, 48, 1), (1, 128, 4)])
def test_every_row_is_full_and_has_its_share_of_pictures(rows, length, pictures):
    for batch in make_batches(TOY, 2, rows, length, pictures, blocks=2):
        assert batch.ids.shape == (rows, length) and (batch.segment_ids >= 0).all()
        assert pictures == (0 if batch.grid_thw is None else len(batch.grid_thw))
        if pictures:
            assert batch.grid_thw.tolist() == [[1, 4, 4]] * pictures  # 2 × 2 embeddings of 2 × 2 patches
            assert torch.bincount(batch.media_slots[:, 0], minlength=rows).tolist() == [4 * len(range(row, pictures, rows)) for row in range(rows)]


def test_microbatches_differ_and_repeat_with_their_seed():
    one, two = make_batches(TOY, 2, 1, 32)
    assert not torch.equal(one.ids, two.ids)
    assert torch.equal(one.ids, make_batches(TOY, 1, 1, 32)[0].ids) and not torch.equal(one.ids, make_batches(TOY, 1, 1, 32, seed=1)[0].ids)


def test_too_many_pictures_are_refused():
    with pytest.raises(TrialError, match="3 pictures of 4 × 4 tokens do not fit into 1 rows of 64 tokens"):
        make_batches(TOY, 1, 1, 64, pictures=3)


# Processes


def rank_and_world(factor):
    return factor * torch.distributed.get_rank(), torch.distributed.get_world_size()


def fail(rank):
    if torch.distributed.get_rank() == rank:
        raise ValueError("no such thing\nat all")


def die(rank):
    if torch.distributed.get_rank() == rank:
        os._exit(7)


def fail_of(rank):
    """The others fail because one dies, and say so before it does."""
    if torch.distributed.get_rank() == rank:
        time.sleep(0.2)
        os._exit(7)
    raise RuntimeError("connection closed by peer")


def test_a_crew_lends_as_many_ranks_as_are_asked_for(crew):
    assert crew.run(rank_and_world, 4, 10) == [(0, 4), (10, 4), (20, 4), (30, 4)]
    assert crew.run(rank_and_world, 2, 3) == [(0, 2), (3, 2)]
    assert crew.run(os.getpid, 1) != [os.getpid()]


@pytest.mark.parametrize("function, words", [(fail, "rank 1 of 2: ValueError in fail: no such thing$"), (die, "rank 1 of 2 died with exit code 7"),
                                             (fail_of, "rank 1 of 2 died with exit code 7")])  # fmt: skip
def test_whoever_fails_or_dies_is_named(function, words):
    with Crew(2) as crew, pytest.raises(TrialError, match=words):
        crew.run(function, 2, 1)


# Memory


@pytest.mark.parametrize("name", ["toy", "toy, selective, FP8", "toy, blocks", "toy, autocast", "toy, virtual stages", "toy, ep 2, ZeRO-1"])
def test_a_whole_step_of_a_pipeline_rank_holds_what_the_model_says_within_six_percent(name, crew):
    """Ten are allowed, and `planner.py --check` allows them; less is asked here, so that a moment forgotten is noticed."""
    for _ in range(3):  # a process group may let go of what it has summed a moment late
        rows = compare_memory(crew, name, dataclasses.replace(MEMORY[name], rows=4))
        pairs = [pair for row in rows for pair in (row.resident, row.backward, row.update)]
        if all(predicted == pytest.approx(measured, rel=0.06) for measured, predicted in pairs):
            return
    raise AssertionError(rows)


def test_a_small_step_of_a_pipeline_rank_holds_what_the_model_says_within_six_percent(crew):
    config = dataclasses.replace(K25Config.preset("small"), num_hidden_layers=2, n_routed_experts=16)
    case = dataclasses.replace(MEMORY["small"], layout=Layout(pp=2, microbatches=3), rows=1, length=128, config=config)
    for row in compare_memory(crew, "small", case):
        assert abs(row.off) <= 0.06 and row.resident[0] == pytest.approx(row.resident[1], rel=0.01), row


# Pipelines


@pytest.mark.parametrize("virtual", [1, 2])
def test_ranks_work_in_the_tables_order_and_start_as_soon_as_their_needs_but_no_sooner(virtual, crew):
    """The bubble itself is compared by `planner.py --check`: other work on the machine would spoil it here."""
    layout = Layout(pp=4, virtual_stages=virtual, microbatches=4)
    config = dataclasses.replace(TOY, num_hidden_layers=layout.stages)
    forward, backward = [0.01 + 0.002 * stage for stage in range(layout.stages)], [0.03] * layout.stages
    spans = [each.span for each in sum(crew.run(pipeline_trial, 4, config, layout, Settings(), 1, 16, forward, backward), [])]
    spans, tables = trials._timeline(spans), schedule_tables(layout)
    assert trials._order(spans) == tables
    at = {span.work: span for span in spans}
    for work, span in at.items():
        assert span.end - span.start >= (forward if work.kind == "F" else backward)[work.stage]
        step = -1 if work.kind == "F" else 1
        needs = [Work("F", work.stage, work.microbatch), Work(work.kind, work.stage + step, work.microbatch)]
        assert all(span.start >= at[need].end for need in needs if need in at and need != work)
    replayed = simulate(tables, *trials._durations(layout, {work: span.end - span.start for work, span in at.items()}))
    slack = 1e-6  # of clocks
    assert all(span.start <= at[span.work].start + slack for span in replayed), "the model is later than the machine"
    assert bubble(replayed) <= bubble(spans) + slack


# The report


TINY = {"tiny": dataclasses.replace(MEMORY["toy"], rows=1, length=64)}
TWO = (Layout(pp=2, microbatches=2), [0.01] * 2, [0.02] * 2)


def test_the_report_says_what_the_json_says(crew, tmp_path, capsys):
    code = compare(crew, tmp_path, TINY, [TWO], repeats=1)
    told = json.loads((tmp_path / "plan_check.json").read_text())
    assert (tmp_path / "report.md").read_text() == report(told) and report(told) in capsys.readouterr().out
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    (row,) = told["pipelines"]
    assert row["predicted"] == pytest.approx(1 / 3) and f"| {row['predicted']:.1%} |" in report(told)
    assert row["same_order"] and code == (max(abs(row["off"]) for row in told["memory"]) > trials.BOUND)
    for row in told["memory"]:
        assert f"| tiny | {row['rank']} | {row['resident'][0] / 1e6:.1f} / {row['resident'][1] / 1e6:.1f} |" in report(told)


def test_a_memory_model_that_is_off_is_an_error(crew, tmp_path, monkeypatch):
    right = trials.fills
    monkeypatch.setattr(trials, "fills", lambda *arguments: [dataclasses.replace(f, buffers=f.buffers + 2e7) for f in right(*arguments)])
    assert compare(crew, tmp_path, TINY, [TWO], repeats=1) == 1
