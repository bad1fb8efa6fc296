"""Plots of reinforcement learning: curves of a run, and sampled trajectories with their pictures.

Public names: plot_curves, plot_trajectories, plot_arms, shade_phases, trajectory.     Tests: pytest tests/test_rl_report.py
"""

import re
import textwrap
from itertools import groupby

from report import BLUE, GREY, ORANGE, plt, save_figure

CURVES = {  # title to what is drawn in it, of a row of rl.Learner
    "reward": ("reward", "passed"), "generated tokens per response": ("length",), "entropy, nats per token": ("entropy",),
    "share of tokens whose policy gradient is masked": ("masked",), "trainer − engine, mean |Δ log-prob|": ("mismatch",),
    "gradient norm": ("grad_norm",), "reward removed or ran out of room": ("cut", "cut_off"), "tokens per second": ("tokens_per_s",),
}  # fmt: skip


def plot_curves(rows, path):
    """Eight panels over the iterations; where Toggle's budget binds, the ground is shaded. rows: of Learner.iterate."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 7), sharex=True)
    steps = [row["iteration"] for row in rows]
    for axis, (title, keys) in zip(axes.flat, CURVES.items()):
        for key, colour in zip(keys, (BLUE, ORANGE)):
            axis.plot(steps, [row[key] for row in rows], color=colour, label=key.replace("_", " "), linewidth=1.3)
        if len(keys) > 1:
            axis.legend(frameon=False)
        shade_phases(axis, rows)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.tight_layout()
    save_figure(figure, path)


def shade_phases(axis, rows):
    """Shade the iterations in which Toggle's budget binds (phase 0)."""
    for row in rows:
        if row.get("phase") == 0:
            axis.axvspan(row["iteration"] - 0.5, row["iteration"] + 0.5, color=ORANGE, alpha=0.12, linewidth=0)


def trajectory(rollout, tokenizer):
    """A rollout as [(text, whether the model wrote it)], pictures shortened to one mark."""
    found, start = [], 0
    for generated, run in groupby(rollout.generated):
        end = start + len(list(run))
        text = tokenizer.decode(rollout.ids[start:end])
        text = "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text)
        found.append((re.sub(r"(<\|media_pad\|>)+", "▦", text), generated))
        start = end
    return found


def plot_trajectories(samples, tokenizer, path, columns=4, width=56):
    """One column per sample: its pictures, the conversation (what the model wrote in blue), the reward.

    samples: list of (task, Rollout).
    """
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 4.4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (task, rollout) in zip(axes.flat, samples):
        axis.set(xlim=(0, 1), ylim=(0, 1))
        right = 0.0
        for image in task.images:
            share = min(0.22 * image.width / image.height, 0.9)
            inset = axis.inset_axes((right, 0.78, share, 0.22))
            inset.imshow(image, interpolation="nearest")
            inset.set(xticks=[], yticks=[])
            right += share + 0.03
        axis.text(1.0, 0.98, f"{task.name}, truth {task.truth}\nreward {rollout.reward:.2f}", fontsize=7, ha="right", va="top")
        line = 0.74 if task.images else 0.92
        for text, generated in trajectory(rollout, tokenizer):
            for piece in text.split("\n"):
                for part in textwrap.wrap(piece, width, drop_whitespace=False, replace_whitespace=False) or [""]:
                    if line > 0.0:
                        axis.text(0, line, part.replace("$", r"\$"), fontsize=6.2, family="monospace", va="top",
                                  color=BLUE if generated else GREY)  # fmt: skip
                    line -= 0.03
    save_figure(figure, path)


def plot_arms(panels, path, shaded=None):
    """Curves of arms with bands. panels: {title: {arm: (xs, means, lows, highs)}}; shaded: rows with phases for all panels."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (title, arms) in zip(axes.flat, panels.items()):
        for number, (arm, (xs, means, lows, highs)) in enumerate(arms.items()):
            axis.plot(xs, means, label=arm, color=f"C{number}", linewidth=1.4, marker="." if len(xs) < 12 else None)
            axis.fill_between(xs, lows, highs, color=f"C{number}", alpha=0.15, linewidth=0)
        if shaded:
            shade_phases(axis, shaded)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
