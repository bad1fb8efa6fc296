"""Claims about report.py: the tables say what was measured, and every picture can be drawn from what little there is.

Run: .venv/bin/python -m pytest tests/test_report.py
"""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import report
from evaluate import ABILITIES, Score
from generate import Generation
from k25 import K25, K25Config
from sources import SOURCES
from tokenizer import Tokenizer
from train_small import model_config
from vit3d import load_image, load_video

SCORES = [
    Score("vision knowledge", 150, 200, 0.25, 60), Score("vision reasoning", 120, 200, 0.25, 50), Score("OCR", 180, 200, 0.25, 52),
    Score("text knowledge", 190, 200, 0.25), Score("text reasoning", 8, 10, 0.25), Score("code", 200, 200, 0.25),
    Score("video", 30, 40, 0.5, 20),
]  # fmt: skip
BEFORE = [Score("128", 20, 20, 0.25), Score("512", 5, 20, 0.25)]
AFTER = [Score("128", 19, 20, 0.25), Score("512", 15, 20, 0.25)]


def row(step, stage="joint", **changed):
    measured = {"loss_text": 2.0 + 1 / step, "loss_vision": 1.5, "lr": 0.01, "grad_norm": 1.0, "max_logit": 5.0, "load_cv": 0.3,
                "tokens_per_s": 9000.0}  # fmt: skip
    return {"stage": stage, "global_step": step} | measured | changed


def opened(path):
    with Image.open(path) as picture:
        picture.load()
        return np.asarray(picture.convert("RGB")).astype(int)


def ink(path, colour):
    """Pixels of a picture that have exactly a colour `#rrggbb`."""
    return int((opened(path) == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum())


@pytest.fixture(autouse=True)
def no_warning():
    """Matplotlib warns about missing glyphs and empty legends: a report that warns is not finished."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# -------------------------------------------------------------------------------------------- tables


def test_the_report_says_what_was_measured(tmp_path):
    samples = [("colour", "<image>Q:dot colour?A:", "red", "red")]
    ending = report.write_report(tmp_path, "A run", [("seed", 7), ("tokens", "1,234")], SCORES, BEFORE, AFTER, 256, samples)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert ending == "PASS: all six abilities above chance, vision falls when blind"
    assert lines[:3] == ["# A run", "", f"**{ending}**"]
    for expected in (
        "| seed | 7 |",
        "| tokens | 1,234 |",
        "| ability | accuracy | 95 % interval | chance | blind | questions |",
        "| vision knowledge | 0.750 | 0.686 – 0.805 | 0.250 | 0.300 | 200 |",
        "| text knowledge | 0.950 | 0.910 – 0.973 | 0.250 | – | 200 |",
        "| text reasoning | 0.800 | 0.490 – 0.943 | 0.250 | – | 10 |",
        "| code | 1.000 | 0.981 – 1.000 | 0.250 | – | 200 |",
        "| video (reported, not part of the verdict) | 0.750 | 0.598 – 0.858 | 0.500 | 0.500 | 40 |",
        "| 128 | 1.000 | 0.950 | 0.250 | 20 |",
        "| 512 | 0.250 | 0.750 | 0.250 | 20 |",
        "| `'colour'` | `'<image>Q:dot colour?A:'` | `'red'` | `'red'` |",
    ):
        assert lines.count(expected) == 1, expected
    assert "Pre-trained on 256 tokens" in text and not list(tmp_path.glob(".*"))
    for name in ("abilities", "needle", "training", "samples"):
        assert f"![{name}]({name}.png)" in lines


def test_a_failed_run_says_so_first(tmp_path):
    failed = [Score(s.name, s.asked // 4, s.asked, s.chance, s.blind) for s in SCORES]
    ending = report.write_report(tmp_path, "A run", [], failed, BEFORE, AFTER, 256, [])
    assert ending.startswith("FAIL: ") and all(name in ending for name in ABILITIES)
    assert (tmp_path / "report.md").read_text().splitlines()[2] == f"**{ending}**"


def test_nothing_that_a_model_writes_breaks_the_table(tmp_path):
    said = "a|b`c\nd\\e\x00é"
    report.write_report(tmp_path, "A run", [], SCORES, BEFORE, AFTER, 256, [("colour", "Q", said, "red")])
    (line,) = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| `'colour'`")]
    cells = line.replace("\\|", "").split("|")
    assert len(cells) == 6 and line.count("`") == 8 and cells[3].strip().isprintable()


# ---------------------------------------------------------------------------------------------- plots


def test_metrics_are_read_row_by_row(tmp_path):
    rows = [row(1), row(2, loss_vision=None)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert report.read_metrics(tmp_path / "metrics.jsonl") == rows


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, still to be looked into."""
    kept, save = [], report.save_figure

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(report, "save_figure", keep)
    return kept


@pytest.mark.parametrize(
    "rows, text, vision",
    [
        ([row(1)], 1, 1),
        ([row(s, "small-lm", loss_vision=None) for s in (1, 2, 3)], 1, 0),
        ([row(s, "vit", loss_text=None) for s in (1, 2, 3)], 0, 1),
        ([row(1, "text", loss_vision=None), row(2, "align", loss_text=None), row(3), row(4, loss_vision=None)], 2, 2),
    ],
)
def test_training_is_drawn_whatever_modality_is_missing(rows, text, vision, tmp_path, figures):
    """One curve per stage that has it, named once; nothing is drawn, and no axis bent, for what is not there."""
    report.plot_training(rows, tmp_path / "training.png")
    panel = figures[0].axes[0]
    for colour, stages in ((report.BLUE, text), (report.ORANGE, vision)):
        assert sum(line.get_color() == colour and line.get_linestyle() == "-" for line in panel.lines) == stages
    names = [label.get_text() for label in panel.get_legend().get_texts()]
    assert names == ["text"] * (text > 0) + ["vision"] * (vision > 0)
    assert opened(tmp_path / "training.png").size and not list(tmp_path.glob(".*"))


def test_a_curve_is_the_running_mean_of_its_dots_and_begins_anew_with_each_stage(tmp_path, figures):
    """0.95 of the mean so far and 0.05 of the new value: 4, 3.9, 3.755; then the next stage from its own first value."""
    losses = [("text", 4.0), ("text", 2.0), ("text", 1.0), ("joint", 7.0)]
    report.plot_training([row(s, stage, loss_text=y) for s, (stage, y) in enumerate(losses, 1)], tmp_path / "training.png")
    drawn = [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines]
    curves = [(x, y) for style, x, y in drawn if style == "-" and y != [1.5] * len(y)]
    assert curves[0] == ([1, 2, 3], [4.0, pytest.approx(3.9), pytest.approx(3.755)]) and curves[1] == ([4], [7.0])
    assert ("None", [1, 2, 3], [4.0, 2.0, 1.0]) in drawn


def test_abilities_are_drawn_with_chance_and_blind(tmp_path):
    report.plot_abilities(SCORES, tmp_path / "all.png")
    report.plot_abilities([SCORES[3]], tmp_path / "text.png")
    for colour in (report.BLUE, report.ORANGE):
        assert ink(tmp_path / "all.png", colour) > 0 < ink(tmp_path / "text.png", colour)
    assert ink(tmp_path / "all.png", report.GREY) > 1000 > ink(tmp_path / "text.png", report.GREY)


@pytest.mark.parametrize("points", [1, 2])
def test_needles_are_drawn_from_one_length_on(points, tmp_path):
    report.plot_needle(BEFORE[:points], AFTER[:points], 256, tmp_path / "needle.png")
    assert ink(tmp_path / "needle.png", report.BLUE) > 20 and ink(tmp_path / "needle.png", report.GREY) > 20


def tiny_model():
    small = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1, "n_routed_experts": 4}
    vision = {"vt_hidden_size": 16, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_intermediate_size": 16}
    torch.manual_seed(0)
    return K25(model_config(K25Config.preset("toy"), small, vision))


def test_samples_are_the_models_own_greedy_answers_to_heldout_pictures(tmp_path):
    tokenizer = Tokenizer()
    rows = report.plot_samples(tiny_model(), tokenizer, tmp_path / "samples.png", seed=4)
    assert [name for name, *_ in rows] == list(report.SHOWN) and min(opened(tmp_path / "samples.png").shape[:2]) > 300
    for name, prompt, said, right in rows:
        example = SOURCES[name].draw(random.Random(f"4/sample/{name}"), "heldout")
        assert prompt + right + "\n" == example.text and right == example.answer and "\n" not in said
    assert rows == report.plot_samples(tiny_model(), tokenizer, tmp_path / "again.png", seed=4)
    shown = {name: SOURCES[name].draw(random.Random(f"4/sample/{name}"), "heldout").media[0] for name in report.SHOWN}
    assert load_image(tmp_path / "samples" / "colour.png").tobytes() == shown["colour"].tobytes()
    clip = load_video(tmp_path / "samples" / "motion.gif")
    assert len(clip.frames) == len(shown["motion"].frames) and clip.fps == pytest.approx(shown["motion"].fps)


@pytest.mark.parametrize("said", ["$\\frac$", "a\x07b\x1f", "你\ufffd", "x" * 48])
def test_samples_draw_whatever_a_model_says(said, tmp_path, monkeypatch):
    """Unclosed mathematics, control bytes, letters the font lacks: drawn as they are or as dots, and reported as said."""
    tokenizer = Tokenizer()
    ids = (*tokenizer.encode(said, specials=False), tokenizer.eos)
    monkeypatch.setattr(report, "generate", lambda *_, **__: [Generation(ids, (0.0,) * len(ids), "stop")])
    rows = report.plot_samples(tiny_model(), tokenizer, tmp_path / "samples.png")
    assert {row[2] for row in rows} == {said} and opened(tmp_path / "samples.png").size
