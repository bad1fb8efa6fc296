"""A picture of the whole system: every file in its part, and which part builds on which — read off the real imports.

Run: python atlas.py --out docs/system.png

Public names: PARTS, imports, counts, draw, main.     Tests: pytest tests/test_atlas.py
"""

import argparse
import ast
import pathlib
import textwrap
from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from flags import one_line
from rl_report import save_figure

ROOT = pathlib.Path(__file__).resolve().parent
PARTS = {  # title: (what it is for, files), in the order in which one builds on the other
    "data": ("words, pictures and clips to packed batches",
             "flags tokenizer template pictures example texts scenes sources manifest storage media data"),
    "model": ("MoonViT-3D, MLA, experts; the released layout", "vit3d mla moe k25 generate checkpoint"),
    "training": ("joint pre-training with MuonClip, measured", "optim step sft evaluate report activations train_small"),
    "many processes": ("pipeline, experts, replicas, DEP; the planner",
                       "dep expert_parallel parallel shards schedule footprint trials planner dep_bench dep_report scale_bench"),
    "rollouts": ("one batched engine, tools in a sandbox, tasks",
                 "slots engine rollout tasks environment sandbox zygote interpreter traces wire records gateway"),
    "reinforcement learning": ("the policy objective, Toggle, rewards, judges", "objective rewards grm rl rl_report rl_job"),
    "Agent Swarm": ("an orchestrator, subagents side by side, PARL",
                    "corpus critical swarm_log policies swarm swarm_trace swarm_bench lookups parl"),
    "oracle": ("your port against the references; lessons",
               "op ops_rope ops_attention ops_experts ops_int4 ops_training ops_media ops_vision ops_text ops_rl ops_toggle ops_rewards ops_swarm "
               "conformance adapter patterns taps divergence peer goldens golden_cases golden_models mutants defects tinygrad_twins classroom "
               "exercises bench bench_cases roofline oracle"),
    "claims": ("every headline, measured at toy scale; the course",
               "study lab toggle_experiment vision_experiments parl_experiment fusion vision_claims training_claims context_claims beside "
               "experiments course atlas"),
}  # fmt: skip
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#5aa5a0", "#b279a2", "#d9679a", "#9d755d", "#777777")
ACROSS = 92  # letters of file names in a line
LEFT, CELL = 13.6, 1.05  # of the matrix: where it begins, its columns


def imports(root=ROOT):
    """{module: modules of the repository that it imports anywhere}, both by name."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in root.glob("*.py")}
    found = {}
    for name, tree in trees.items():
        froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        found[name] = {other for other in (*froms, *plain) if other in trees and other != name}
    return found


def counts(imported):
    """Counter of (part that builds on another, that other): how many imports lead from one to the other, or within one."""
    part = {name: title for title, (_, files) in PARTS.items() for name in files.split()}
    return Counter((part[name], part[other]) for name, others in imported.items() for other in others)


def draw(path, imported):
    """Write the picture, a PNG: a row for each part with its files, and how often it imports from each. imported: of `imports`."""
    number, titles = counts(imported), list(PARTS)
    lines = {title: textwrap.wrap("   ".join(f"{name}.py" for name in files.split() if name in imported), ACROSS) for title, (_, files) in PARTS.items()}
    heights = [1.1 + 0.34 * len(lines[title]) for title in titles]
    tops = [-sum(heights[:place]) for place in range(len(titles) + 1)]
    figure, axis = plt.subplots(figsize=(14.5, 0.58 * -tops[-1] + 1.2))
    for place, (title, (purpose, _)) in enumerate(PARTS.items()):
        top, middle = tops[place], (tops[place] + tops[place + 1]) / 2
        axis.axhspan(tops[place + 1], top, color=COLOURS[place], alpha=0.07, linewidth=0)
        axis.text(0.1, top - 0.2, title, fontsize=13, fontweight="bold", va="top", color=COLOURS[place])
        axis.text(5.4, top - 0.24, purpose, fontsize=10, va="top", color="#444444")
        axis.text(0.1, top - 0.72, "\n".join(lines[title]), fontsize=8, va="top", family="monospace", linespacing=1.5)
        axis.text(LEFT + CELL * place, 0.25, title, fontsize=10, rotation=38, ha="left", va="bottom", color=COLOURS[place])
        for other, below in enumerate(titles):
            if found := number[title, below]:
                axis.scatter(LEFT + CELL * other, middle, s=26 * found, color=COLOURS[other], alpha=0.35 if place == other else 0.8, linewidth=0)
                axis.text(LEFT + CELL * other, middle, str(found), fontsize=8.5, ha="center", va="center")
    axis.set(xlim=(0, LEFT + CELL * len(titles)), ylim=(tops[-1] - 0.7, 3.0))
    axis.text(0.1, 2.5, "K25", fontsize=24, fontweight="bold", va="top")
    axis.text(0.1, 1.3, f"{len(imported)} files, {sum(map(len, imported.values()))} imports", fontsize=11, va="top", color="#444444")
    axis.text(LEFT - 0.9, 0.35, "imports from …", fontsize=11, va="bottom", ha="right", color="#444444")
    axis.axis("off")
    save_figure(figure, path)


def main(arguments=None):
    """Write the picture. Exit code 2 with one line where that is not possible."""
    parser = argparse.ArgumentParser(prog="atlas.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/system.png")
    path = parser.parse_args(arguments).out
    with one_line(parser.prog, (OSError,)):
        draw(path, imports())
    print(path)


if __name__ == "__main__":
    main()
