"""Claims about rl_report.py: plots are written whole and the same each time, and trajectories say who wrote what.

Run: .venv/bin/python -m pytest tests/test_rl_report.py
"""

import random

from PIL import Image

import tasks
from media import image_item, merged_tokens
from rl_report import plot_arms, plot_curves, plot_trajectories, trajectory
from rollout import Conversation, Info
from engine import Completion
from test_rl import CONFIG, TOKENIZER


def answered(task, text):
    """A conversation about the pictures of a task, answered with `text`."""
    talk = Conversation(TOKENIZER, thinking=False)
    talk.user(*[image_item(image, CONFIG.media) for image in task.images], "how many?")
    talk.prompt()
    ids = tuple(TOKENIZER.encode(text, specials=False))
    talk.answer(Completion(ids, (-0.1,) * len(ids), (0,) * len(ids), "length"))
    return talk.rollout(1.0, info=Info("count"))


def test_a_trajectory_parts_what_the_model_wrote_from_what_it_was_told():
    task = tasks.draw(random.Random(1), "count", modality="vision")
    found = trajectory(answered(task, "four\x17"), TOKENIZER)
    assert [generated for _, generated in found] == [False, True] and found[1][0] == "four·"
    assert found[0][0].count("▦") == 1 and "how many?" in found[0][0]
    assert merged_tokens(image_item(task.images[0], CONFIG.media).grid) > 1  # and yet one mark


def row(iteration):
    keys = ("reward", "passed", "length", "entropy", "masked", "mismatch", "grad_norm", "cut", "cut_off", "tokens_per_s")
    return {"iteration": iteration, "phase": iteration // 2 % 2, **dict.fromkeys(keys, 0.5)}


def test_plots_are_written_whole_and_the_same_each_time(tmp_path):
    task = tasks.draw(random.Random(1), "read", modality="vision")
    samples = [(task, answered(task, "a" * 200 + "\n$x$"))] * 5
    band = {"arm": ([0, 1], [0.2, 0.3], [0.1, 0.2], [0.3, 0.4])}
    for name, draw in (("curves", lambda path: plot_curves([row(i) for i in range(4)], path)), ("arms", lambda path: plot_arms({"reward": band}, path, [row(0)])),
                       ("samples", lambda path: plot_trajectories(samples, TOKENIZER, path))):  # fmt: skip
        first, again = tmp_path / f"{name}.png", tmp_path / f"{name}-again.png"
        draw(first), draw(again)
        assert first.read_bytes() == again.read_bytes() and Image.open(first).width > 300
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
