"""The report of a run: plots from its metrics, samples with their pictures, and `report.md` that holds them together.

Public names: BLUE, ORANGE, GREY, save_figure, read_metrics, write_report, plot_training, plot_abilities, plot_needle, plot_samples.
Tests: pytest tests/test_report.py
"""

import dataclasses
import json
import os
import pathlib
import random
from itertools import accumulate

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from checkpoint import write_file
from data import encode_example
from evaluate import ABILITIES, verdict
from generate import generate
from sources import SOURCES
from vit3d import pack

BLUE, ORANGE, GREY = "#3366aa", "#dd7722", "#999999"


def save_figure(figure, path):
    """Write a PNG atomically, the same bytes for the same figure."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, bbox_inches="tight", format="png", metadata={"Software": None})
    os.replace(temporary, path)
    plt.close(figure)


def read_metrics(path):
    """The rows of a metrics.jsonl, as dicts."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def plot_training(rows, path):
    """Six panels over all steps, the stages shaded: loss by modality, lr, gradient norm, max logit, load CV, tokens/s."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), sharex=True)
    stages = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)

    def line(axis, key, colour, label=None, memory=0.95):
        for taken in stages.values():  # a stage without this modality leaves a gap
            points = [(row["global_step"], row[key]) for row in taken if row[key] is not None]
            if points:
                steps, values = zip(*points)
                axis.plot(steps, values, ".", markersize=1.5, color=colour, alpha=0.35)
                smooth = list(accumulate(values, lambda mean, value: memory * mean + (1 - memory) * value))
                axis.plot(steps, smooth, color=colour, linewidth=1.3, label=label)
                label = None  # one entry in the legend

    line(axes[0, 0], "loss_text", BLUE, "text")
    line(axes[0, 0], "loss_vision", ORANGE, "vision")
    axes[0, 0].legend()
    line(axes[0, 1], "lr", BLUE, memory=0.0)
    for axis, key in zip(axes.flat[2:], ("grad_norm", "max_logit", "load_cv", "tokens_per_s")):
        line(axis, key, BLUE)
    titles = ("loss, nats per token", "learning rate (Muon)", "gradient norm", "largest attention logit",
              "expert load CV, worst layer", "tokens per second")  # fmt: skip
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title)
        for number, (name, taken) in enumerate(stages.items()):
            first, last = taken[0]["global_step"], taken[-1]["global_step"]
            axis.axvspan(first, last, color=GREY, alpha=0.16 if number % 2 else 0.05, linewidth=0)
            if axis is axes[0, 0] or axis in axes[1]:
                axis.text((first + last) / 2, 0.98, name, transform=axis.get_xaxis_transform(), ha="center", va="top",
                          fontsize=7, rotation=90)  # fmt: skip
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    figure.tight_layout()
    save_figure(figure, path)


def plot_abilities(scores, path):
    """One bar per ability with its 95 % interval, a mark for chance, and the blind score beside it."""
    figure, axis = plt.subplots(figsize=(10, 4))
    for place, score in enumerate(scores):
        low, high = score.interval
        axis.bar(place - 0.18, score.accuracy, 0.34, color=BLUE, label="accuracy" if place == 0 else None)
        axis.errorbar(place - 0.18, score.accuracy, [[score.accuracy - low], [high - score.accuracy]], color="black", capsize=4)
        if score.blind is not None:
            axis.bar(place + 0.18, score.blind / score.asked, 0.34, color=GREY, label="blind" if place == 0 else None)
        axis.hlines(score.chance, place - 0.4, place + 0.4, color=ORANGE, label="chance" if place == 0 else None)
    axis.set_xticks(range(len(scores)), [score.name.replace(" ", "\n") for score in scores])
    axis.set_ylim(0, 1)
    axis.set_ylabel("accuracy on held-out questions")
    axis.legend(loc="upper right")
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def plot_needle(before, after, trained, path):
    """Needle accuracy by context length, before and after the long-context stage; `trained`: pre-training length."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for scores, colour, label in ((before, GREY, "before: RoPE as pre-trained"), (after, BLUE, "after: YaRN")):
        lengths = [int(score.name) for score in scores]
        axis.plot(lengths, [score.accuracy for score in scores], "o-", color=colour, label=label)
        axis.fill_between(lengths, *zip(*[score.interval for score in scores]), color=colour, alpha=0.2)
    axis.axhline(after[0].chance, color=ORANGE, label="chance")
    axis.axvline(trained, color="black", linestyle=":", label="pre-training length")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("context, bytes")
    axis.set_ylabel("needle found")
    axis.set_ylim(0, 1)
    axis.legend()
    axis.grid(alpha=0.3)
    save_figure(figure, path)


SHOWN = ("caption", "colour", "shape", "emblem", "count", "side", "chart_value", "read_word", "read_line", "sketch", "motion", "order")


def plot_samples(model, tokenizer, path, seed=0):
    """Held-out pictures with the question, the model's own greedy answer and the right one. Returns the rows shown.

    The pictures and clips themselves go into a directory beside the plot, `samples/`, to chat about.
    """
    rows = []
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    figure, axes = plt.subplots(3, 4, figsize=(14, 8.5))
    for axis, name in zip(axes.flat, SHOWN):
        example = SOURCES[name].draw(random.Random(f"{seed}/sample/{name}"), "heldout")
        start, stop = example.loss_spans[-1]
        prompt = encode_example(_cut(example, start), tokenizer, model.config.media)
        patches, grid = pack(prompt.items)
        newline = tokenizer.encode("\n", specials=False)
        given = generate(model, [list(prompt.ids[:-1])], patches, grid, max_new_tokens=48,
                         stop_ids=(*newline, *tokenizer.stop_ids))[0]  # fmt: skip
        said = tokenizer.decode([i for i in given.ids if i not in newline], skip_specials=True)
        rows.append((name, example.text[:start], said, example.answer))
        frames = [frame for medium in example.media for frame in getattr(medium, "frames", (medium,))]
        if len(frames) == 1:
            frames[0].save(folder / f"{name}.png")
        else:
            pause = round(1000 / example.media[0].fps)  # milliseconds
            frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:], duration=pause, loop=0)
        width = sum(frame.width + 2 for frame in frames) - 2
        canvas = frames[0].resize((width, frames[0].height))
        canvas.paste((190, 190, 190), (0, 0, *canvas.size))  # the gaps between frames
        left = 0
        for frame in frames:
            canvas.paste(frame, (left, 0))
            left += frame.width + 2
        axis.imshow(canvas)
        question = example.text[:start].split("\n")[-1].replace("<image>", "").replace("<video>", "")
        drawn = "".join(letter if letter.isascii() and letter.isprintable() else "·" for letter in said)
        axis.set_title(f"{name}: {question or '(describe)'}\nsays: {drawn}\nright: {example.answer}", fontsize=9, loc="left",
                       color="#116611" if said == example.answer else "#aa2222", parse_math=False)  # fmt: skip
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    save_figure(figure, path)
    return rows


def _cut(example, stop):
    return dataclasses.replace(example, text=example.text[:stop], loss_spans=((0, 0),))


def _cell(text):
    """A text as code in a markdown table, whatever a model may have written."""
    return "`" + repr(text).replace("`", "'").replace("|", "\\|") + "`"


def write_report(directory, title, facts, scores, before, after, trained, samples):
    """Write report.md beside the plots. facts: list of (name, value). Returns the verdict line."""
    ending = verdict(scores)
    lines = [f"# {title}", "", f"**{ending}**", "", "| fact | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines += ["", "## Held-out abilities", "",
              "Each question has a few choices, the model takes the likeliest; intervals are 95 % (Wilson). "
              "*Blind*: every picture blanked to mid-grey.", "",
              "| ability | accuracy | 95 % interval | chance | blind | questions |", "|---|---|---|---|---|---|"]  # fmt: skip
    for s in scores:
        blind = "–" if s.blind is None else f"{s.blind / s.asked:.3f}"
        extra = "" if s.name in ABILITIES else " (reported, not part of the verdict)"
        lines.append(f"| {s.name}{extra} | {s.accuracy:.3f} | {s.interval[0]:.3f} – {s.interval[1]:.3f} | {s.chance:.3f} | {blind} | {s.asked} |")
    lines += ["", "![abilities](abilities.png)", "", "## Needle in a haystack", "",
              f"Pre-trained on {trained} tokens; the long-context stage extends the context with YaRN.", "",
              "| context, bytes | before | after | chance | questions |", "|---|---|---|---|---|"]  # fmt: skip
    for b, a in zip(before, after):
        lines.append(f"| {a.name} | {b.accuracy:.3f} | {a.accuracy:.3f} | {a.chance:.3f} | {a.asked} |")
    lines += ["", "![needle](needle.png)", "", "## Training", "", "![training](training.png)", "", "## Samples", "",
              "Held-out pictures, greedy answers.", "", "![samples](samples.png)", "", "| source | prompt | says | right |",
              "|---|---|---|---|"]  # fmt: skip
    lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in samples]
    write_file(pathlib.Path(directory) / "report.md", "\n".join(lines) + "\n")
    return ending
