"""swarm_bench: the work is done as counted, figures are those of the raw samples, subagents say the same side by side and one by one.

Run: .venv/bin/python -m pytest tests/test_swarm_bench.py
"""

import asyncio
import dataclasses
import gc
import json
import math
import os
import statistics
from collections import Counter

import pytest
import torch
from test_rl import CONFIG

import swarm
import swarm_bench
from critical import critical_steps, total_steps
from k25 import K25
from swarm import rare_collections
from swarm_bench import MEASURES, BenchError, Scripted, live, plain, play, subtasks, towers
from swarm_log import Log, episode, sendable

COUNTS = (10, 100)


@pytest.fixture(scope="module")
def model():
    """A tiny K25 of random weights."""
    torch.manual_seed(0)
    return K25(CONFIG)


@pytest.fixture(scope="module")
def told(model, tmp_path_factory):
    """swarm_bench.json of a small bench, and its folder."""
    folder = tmp_path_factory.mktemp("swarm-bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swarm_bench, "DISK", 10)
        patch.setattr(swarm_bench, "FITTED", 10)
        patch.setattr(swarm_bench, "COUNTS", COUNTS)
        patch.setattr(swarm_bench, "live", lambda *given, **options: live(*given, **options | {"agents": 6, "new_tokens": 5}))
        swarm_bench.run(COUNTS[-1], 1, {"tiny": model}, folder)
    return json.loads((folder / "swarm_bench.json").read_text()), folder


# The work


@pytest.mark.parametrize("count", COUNTS)
def test_a_run_has_the_answers_calls_and_events_that_are_counted(count):
    log = Log(None)
    run, texts, most = asyncio.run(play(subtasks(count), towers(), log))
    assert most == count  # all of them at once
    assert Counter(event["kind"] for event in log.events) == Counter(
        start=1, create=1, assign=count, answer=2 * count + 2, call=2 * count + 1, result=count, end=1)  # fmt: skip
    stages = episode(log.events)
    assert (critical_steps(stages), total_steps(stages), run.calls) == (4, 2 * count + 2, 2 * count + 1)
    assert texts[7].startswith("tower07.md") and texts[7].endswith("The tower number07 is 27 metres high.")


def test_plain_calls_return_what_the_runtime_returns_with_any_number_in_a_step():
    prompts = subtasks(10)
    expected = plain(prompts, towers())
    for width, critical in ((10, 4), (3, 13), (1, 31)):
        log = Log(None)
        assert asyncio.run(play(prompts, towers(), log, width))[1] == expected
        assert critical_steps(episode(log.events)) == critical


def test_a_run_that_does_not_end_as_it_should_is_an_error():
    class Mute(Scripted):
        async def answer(self, messages, tools, agent):
            return swarm_bench.Message("", "", (), ())

    run, texts, _ = asyncio.run(play(subtasks(2), towers(), Log(None), subpolicy=Mute([])))
    assert all(text.startswith("Error: not finished after 2 steps") for text in texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swarm_bench, "Scripted", Mute)
        with pytest.raises(BenchError, match="2 subtasks: the run ended with 0 results, garbage"):
            asyncio.run(play(subtasks(2), towers(), Log(None)))


# What was made to cost no more with more agents


def test_the_characters_that_are_counted_are_those_of_the_json_that_is_sent():
    tools = swarm.DELEGATION
    agent = swarm._Agent("main", [{"role": "system", "content": 'é\n"'}, {"role": "user", "content": "𝄞"}], tools, 3, len(json.dumps(tools)))
    for new in ([], [{"role": "assistant", "content": "a", "reasoning_content": "", "sampled": {"ids": [1]}}],
                [{"role": "tool", "content": "b"}, {"role": "tool", "content": "c"}]):  # fmt: skip
        agent.messages += new
        assert agent.measure() == len(json.dumps([sendable(agent.messages), tools]))


def test_subtasks_of_a_step_are_counted_for_that_step_alone():
    prompts = subtasks(6)

    async def script(log, agents):
        limits = swarm.Limits(agents=agents)
        run = swarm.Swarm("?", Scripted(prompts, 3), towers(), log, limits, slots=swarm.Slots(8, 0.0))
        await run.run()
        return run

    assert len(asyncio.run(script(Log(None), 3)).results) == 6
    run = asyncio.run(script(log := Log(None), 2))
    assert len(run.results) == 4 and sum(event.get("text", "").startswith("Refused: 2 agents") for event in log.events) == 2
    again = Log(None)
    again.events = [event for event in log.events if event["kind"] in ("start", "create", "assign")]
    assert swarm.Swarm("?", None, towers(), again)._given == {0: 2, 1: 2}


# Figures


def test_every_figure_is_that_of_the_raw_samples(told):
    told, _ = told
    assert [point["count"] for point in told["null"]["points"]] == list(COUNTS)
    for point in told["null"]["points"]:
        count, (raw,), (memory,) = point["count"], point["raw"]["timed"], point["raw"]["traced"]
        steps = raw["rounds"] * (2 * count + 2)
        assert raw["rounds"] == 1000 // count  # which divides it
        assert point["most"] == count and memory["events"] == 6 * count + 6
        assert point["median"] == {key: statistics.median(point["samples"][key]) for key in MEASURES}
        assert point["median"]["overhead"] == pytest.approx((raw["processor"] - raw["plain"]) / steps * 1e6)
        assert point["median"]["step"] == pytest.approx(point["median"]["plain"] + point["median"]["overhead"])
        assert point["median"]["tasks/s"] == pytest.approx(raw["rounds"] * count / raw["seconds"])
        assert all(math.isfinite(point["median"][key]) for key in MEASURES)
        assert point["python"] == [pytest.approx(memory["peak"] / count / 1e3)] and 0 < point["events"][0] < point["python"][0] < 40
        assert len(point["disk"]) == (count <= 10)
    first, last = (point["median"]["overhead"] for point in told["null"]["points"])
    assert told["null"]["fit"]["exponent"] == pytest.approx(math.log10(last / first)) and told["null"]["fit"]["from"] == 10


def test_the_report_and_the_plot_show_the_json(told):
    told, folder = told
    text = (folder / "report.md").read_text()
    assert text == swarm_bench.report(told) and (folder / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"report.md", "swarm_bench.json", "scale.png"}
    for point in told["null"]["points"]:
        assert f"| {point['count']:,} | {point['median']['tasks/s']:,.0f} (" in text
    assert f"| {told['live'][0]['ratio']['seconds']:.2f}× |" in text


# Live


def test_subagents_of_a_model_say_the_same_side_by_side_and_one_after_another(told):
    (row,) = told[0]["live"]
    assert row["same"] and row["agents"] == 6 and 6 <= row["answers"] <= 12 and row["answers"] <= row["tokens"] <= 5 * row["answers"]
    assert row["steps"] == {"side by side": {"critical": 4, "all": row["answers"] + 2},
                            "one after another": {"critical": row["answers"] + 7, "all": row["answers"] + 7}}  # fmt: skip
    for clock in ("seconds", "processor"):
        assert row["ratio"][clock] == pytest.approx(row["median"][clock]["one after another"] / row["median"][clock]["side by side"])


def test_a_token_that_differs_is_an_error(model, monkeypatch):
    answer, calls = swarm_bench.Local.answer, 0

    async def wavering(self, messages, tools, agent):
        nonlocal calls
        message, calls = await answer(self, messages, tools, agent), calls + 1
        return dataclasses.replace(message, ids=(1, *message.ids[1:])) if calls == 5 else message

    monkeypatch.setattr(swarm_bench.Local, "answer", wavering)
    with pytest.raises(BenchError, match="tiny: subagents did not say the same"):
        live(model, "tiny", agents=2, new_tokens=3, repeats=1)


# Misuse


def test_misuse_is_one_line_and_exit_code_2(capsys, tmp_path):
    for words, match in ((["--largest", "0"], "at least 1"), (["--repeats", "0"], "at least 1"), (["--model", "x", "--skip-live"], "leave --skip-live"),
                         (["--model", str(tmp_path / "none")], "none")):  # fmt: skip
        assert swarm.main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr()
        assert match in told.err and told.err.startswith("swarm.py bench: ") and told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "out").exists()


def test_a_process_that_dies_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(swarm_bench.TRIALS, "traced", os._exit)
    assert swarm.main(["bench", "--skip-live", "--largest", "1", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("swarm.py bench: 1 subtasks: the process died, as it does without memory; choose a smaller --largest\n")


def test_results_that_are_not_those_of_plain_calls_are_no_measurement(monkeypatch):
    right = swarm_bench.plain
    monkeypatch.setattr(swarm_bench, "plain", lambda prompts, corpus: right(prompts, corpus)[::-1])
    with pytest.raises(BenchError, match="results are not those of plain calls"):
        swarm_bench.timed(3)


def test_collections_are_rare_within_and_as_before_behind():
    usual = gc.get_threshold()
    gc.set_threshold(600, 9, 8)
    try:
        with pytest.raises(KeyError), rare_collections():
            assert gc.get_threshold() == (600, 9, 1000)
            raise KeyError
        assert gc.get_threshold() == (600, 9, 8)
    finally:
        gc.set_threshold(*usual)
