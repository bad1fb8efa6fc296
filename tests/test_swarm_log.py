"""Claims about swarm_log.py: what was written is there after a crash, and an episode can be read off it.

Run: .venv/bin/python -m pytest tests/test_swarm_log.py
"""

import dataclasses
import errno
import os
import random

import pytest

from critical import Stage, Subtask, critical_steps, longest_path
from swarm_log import Log, LogError, Sampled, episode, plain, read_calls, read_log, read_message, step_graph
from template import Message, ToolCall


def test_events_are_read_back_and_a_torn_last_line_was_never_written(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    with Log(path) as log:
        log.add("start", question="wie hoch? ü")
        log.add("end", status="done", text="31")
    assert [event["kind"] for event in read_log(path)] == ["start", "end"]
    whole = path.read_bytes()
    for cut in range(len(whole)):  # a crash at any byte
        path.write_bytes(whole[:cut])
        assert len(read_log(path)) == whole[:cut].count(b"\n")
    with Log(path) as log:  # at the last cut the second line lacks its end
        assert len(log.events) == 1 and path.read_bytes() == whole[: whole.index(b"\n") + 1]
        log.add("resume")
    assert [event["kind"] for event in read_log(path)] == ["start", "resume"]


def test_a_changed_line_is_named(tmp_path):
    path = tmp_path / "events.jsonl"
    with Log(path) as log:
        for kind in ("start", "resume", "end"):
            log.add(kind)
    lines = path.read_text().splitlines(keepends=True)
    for spoiled in (["{\n"], ["[1]\n"], [], lines[:1]):
        path.write_text("".join([lines[0], *spoiled, lines[2]]))
        with pytest.raises(LogError, match="line 2: not event 1 of a swarm"):
            Log(path)


def test_two_runs_cannot_write_to_one_log_nor_one_to_a_folder(tmp_path):
    with Log(tmp_path / "events.jsonl"), pytest.raises(LogError, match="another run writes there"):
        Log(tmp_path / "events.jsonl")
    with pytest.raises(LogError, match="cannot be written"):
        Log(tmp_path)
    assert os.stat(tmp_path / "events.jsonl").st_mode & 0o077 == 0


def test_a_full_disk_leaves_no_part_of_an_event(tmp_path, monkeypatch):
    with Log(tmp_path / "events.jsonl") as log:
        log.add("start")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left")))
        with pytest.raises(LogError, match="an event cannot be written .no space left"):
            log.add("end")
        monkeypatch.undo()
        assert len(log.events) == len(read_log(tmp_path / "events.jsonl")) == 1
        log.add("end")
    assert len(read_log(tmp_path / "events.jsonl")) == 2


def test_the_episode_and_the_graph_of_a_log_agree_however_its_events_are_interleaved():
    rng = random.Random(0)
    for _ in range(50):
        log, task, stages, answers = Log(None), 0, [], {}
        for step in range(rng.randint(1, 4)):
            log.add("answer", agent="main", step=step, message={})
            queues, subtasks = [], []
            for place in range(rng.randint(0, 3)):
                task += 1
                count, status, text = rng.randint(0, 4), rng.choice(["done", "failed", "steps"]), rng.choice([f"p{task}", "unknown"])
                log.add("assign", task=task, agent="reader", prompt=f"p{task}", step=step, place=place)
                answered = [("answer", {"agent": task, "step": number, "message": {}}) for number in range(count)]
                queues.append([*answered, ("result", {"task": task, "status": status, "steps": count, "text": text})])
                subtasks.append(Subtask(count, f"p{task}", status == "done"))
                answers[f"p{task}"] = text
            while queues:
                queue = rng.choice(queues)
                kind, fields = queue.pop(0)
                log.add(kind, **fields)
                queues = [queue for queue in queues if queue]
            stages.append(Stage(1, tuple(subtasks)))
        assert episode(log.events) == tuple(stages)
        for stage, told in zip(stages, episode(log.events, lambda prompt, text: text == prompt), strict=True):
            for one, other in zip(stage.subtasks, told.subtasks, strict=True):
                assert other == dataclasses.replace(one, finished=one.finished and answers[one.prompt] == one.prompt)
        assert len(longest_path(step_graph(log.events))) == critical_steps(stages)


def test_messages_come_back_as_they_were_with_their_tokens():
    functions = [{"name": "search", "arguments": '{"query": "ü"}'}, {"name": "a b"}, {"name": "browse", "arguments": "[1]"},
                 {"name": "browse", "arguments": None}, 7]  # fmt: skip
    calls, errors = read_calls([{"id": "x", "function": function} for function in functions], 4)
    assert [call.id for call in calls] == ["functions.search:4", "functions.browse:5"] and len(errors) == 3
    assert read_calls("nonsense", 0) == ([], []) and calls[1].arguments == {}
    for message in (Message("why", "so", tuple(calls), ("wrong",)), Sampled("", "so", (), (), (1, 2), (-0.5, -0.25), (0, 0), "stop")):
        again = read_message(message.as_dict() | {"errors": list(message.errors)}, 4)
        assert type(again) is type(message) and again.as_dict() == message.as_dict() and again.errors == message.errors
    assert isinstance(calls[0], ToolCall) and calls[0].arguments == {"query": "ü"}


def test_a_models_words_do_nothing_to_a_terminal():
    assert plain("a\x1b[2Jb\rc\n") == "a [2Jb c " and plain("a\nb", "\n") == "a\nb" and plain("ü漢") == "ü漢"
