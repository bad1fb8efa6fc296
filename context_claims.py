"""Long context by YaRN, and experts in int4 — K2.5 report 2.1, 4.2, 4.3; K2 report 2.4.

    yarn    prose and needles, 128 tokens long ─▶ plain RoPE or YaRN: as it is, or after a few steps at 8 times the length
    int4    facts, sums and docstrings ─▶ routed experts rounded to int4: at once, after more float steps, after as many QAT steps

Prose is docstrings, one after the other. A needle is a capital letter among words, one of each of six groups of four: its group is the
key, which of the four it is the value. Asked `?2` at the end, the answer is the letter of group 2 that stood anywhere before; chance is 1/4.

Public names: MODEL, EXPERTS, TIMES, propose_prose, propose_needles, lessons, extended, quantised, yarn, int4.
Tests: pytest tests/test_context_claims.py
"""

import random
import re
import string
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import torch

import evaluate
from data import encode_example, pack_rows, questions
from example import Draft, Source, split_of
from k25 import load, save
from lab import Claim, blend, decoder, judge, judge_alike, loss_on, pretrain
from mla import Yarn
from rl_report import save_figure
from sft import SFTConfig
from sources import SOURCES, propose_docstring, weighted
from step import losses
from study import bootstrap, intervals
from tokenizer import Tokenizer

MODEL = {
    "hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 8, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "rope_theta": 1000.0,
}  # fmt: skip
EXPERTS = MODEL | {"num_hidden_layers": 3, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 16}  # most of it is routed
KNOWLEDGE = {"fact_statement": 2.0, "fact_question": 3.0, "sum": 3.0, "largest": 2.0, "docstring": 1.0}  # what int4 learns; the questions have choices
GROUPS = tuple(string.ascii_uppercase[start : start + 4] for start in range(0, 24, 4))  # a needle is a letter, its key the group that it is of
SHORTEST = 4 * len(GROUPS) + 2  # tokens: every group asked for, no words
RATE, ADAMW_RATE = 1e-2, 6e-3  # peak learning rates
GENTLE = 1 / 16  # of these rates, for the further steps of int4: at a quarter, two float runs that start a hair apart end as far apart as rounding costs
MARGIN = 0.002  # nats per token that still count as alike: about half of what rounding costs
FACTOR = 8  # of the extension
TIMES = (1, 2, 4, 8, 16)  # the trained length, at which needles are sought and prose is read


# ------------------------------------------------------------------------------------------------- data


def propose_prose(rng, length):
    """Docstrings of files of one split, one after the other, as many tokens as asked for."""
    first = propose_docstring(rng)
    parts = [first.turns[0][1]]
    while len("\n".join(parts)) < length:
        following = propose_docstring(rng)
        if split_of(following.key) == split_of(first.key):
            parts.append(following.turns[0][1])
    return Draft((("", "\n".join(parts)[: length - 2]),), key=first.key)  # and a newline, and eos


def _words(rng, length):
    text = ""
    while len(text) < length:
        text += re.sub("[^a-z ]", "", propose_docstring(rng).turns[0][1].lower()) + " "
    start = rng.randint(0, len(text) - length)
    return text[start : start + length]


def propose_needles(rng, length, asked, depth=None):
    """A letter of each group among words, then questions: `?` and, for each, the group's digit, the letter, a newline.

    length: tokens of the document, at least 3·asked + 8; asked: groups that are asked for; depth: where the letter stands that is
    asked for first, 0 … 1; None: anywhere, as all others.
    """
    letters = dict(enumerate(map(rng.choice, GROUPS)))
    groups = rng.sample(range(len(GROUPS)), asked)
    words = _words(rng, length - len(GROUPS) - 3 * asked - 2)
    places = {group: rng.randint(0, len(words)) for group in letters}
    if depth is not None:
        places[groups[0]] = round(depth * len(words))
    for group in sorted(places, key=places.get, reverse=True):  # from the back, so that earlier places stay valid
        words = words[: places[group]] + letters[group] + words[places[group] :]
    turns = [(str(group), letters[group]) for group in groups]
    turns[0] = (f"{words}?{turns[0][0]}", turns[0][1])
    return Draft(tuple(turns), "".join(letters.values()), tuple(GROUPS[groups[-1]]))


def lessons(length):
    """What is learned at a length, as (Source, weight)."""
    return ((Source("needles", "text", "", lambda rng: propose_needles(rng, rng.randint(SHORTEST, length), len(GROUPS))), 4.0),
            (Source("prose", "text", "", lambda rng: propose_prose(rng, length)), 1.0))  # fmt: skip


def _drawn(propose, number, name):
    """The same held-out examples for all seeds and arms. propose: (rng, number of the example) → Draft."""
    return [Source(name, "text", "", lambda rng: propose(rng, i)).draw(random.Random(f"{name} {i}"), "heldout") for i in range(number)]  # noqa: B023


def _questions(asked):
    """Held-out questions of int4, the same for all seeds and arms."""
    return questions([SOURCES[kind] for kind in KNOWLEDGE if SOURCES[kind].ability], asked, 0)


def _found(model, length, asked):
    """1 for each question about a needle in `length` tokens that is answered rightly, else 0; depths spread evenly."""
    examples = _drawn(lambda rng, i: propose_needles(rng, length, 1, (i + 0.5) / asked), asked, f"needles {length}")
    chosen = evaluate.answer(model, examples, Tokenizer(), rows=max(16384 // length, 4))
    return [int(example.choices[choice] == example.answer) for example, choice in zip(examples, chosen)]


@torch.no_grad()
def _read(model, length, documents):
    """Loss at every token of held-out prose, (documents,length), as lists."""
    tokenizer, found = Tokenizer(), []
    for example in _drawn(lambda rng, _: propose_prose(rng, length + 1), documents, f"prose {length}"):  # the last is only predicted
        batch = pack_rows([encode_example(example, tokenizer, model.config.media)], 1, length, tokenizer)
        found.append(losses(model, batch, want_max=False)[0][0].tolist())
    return found


# ------------------------------------------------------------------------------------------------ cells


def _settings(steps, rows, length, rate=1.0):
    return SFTConfig(steps, rows, length, lr=rate * RATE, adamw_lr=rate * ADAMW_RATE, dtype="float32")


def extended(folder, name, log, arm, seed, factor, times, steps, rows, length, asked, documents):
    """One arm of `yarn`: its needles by length and its loss by position. Plain RoPE is trained at the short length; all others start from it."""
    model, long = decoder(seed, **MODEL, yarn=Yarn(float(factor) if "yarn" in arm else 1.0, length)), factor * length
    if arm == "plain":
        t = _settings(steps, rows, length)
        pretrain(model, blend(lessons(length), 0.0, t, seed), t, log)
        save(model, folder / "models" / name)
    else:
        model.load_state_dict(load(folder / "models" / f"plain-{seed}", dtype=torch.float32).state_dict())
    if "tuned" in arm:
        t = _settings(steps, rows, long, 0.25)
        pretrain(model, blend(lessons(long), 0.0, t, seed, stage="long"), t, log)
    read = np.reshape(_read(model, max(times) * length, documents), (documents, -1, length // 2)).mean(axis=2)
    return {"needles": {str(n): _found(model, n * length, asked) for n in times}, "loss": read.round(5).tolist()}


def quantised(folder, name, log, arm, seed, steps, rows, length, asked, batches):
    """One arm of `int4`: new weights trained in float ("base"), or that after more steps, in float or with experts that are rounded in each
    forward pass ("qat"). Each is measured as it is, and with its routed experts written as int4 and read again."""
    sources, t = weighted(KNOWLEDGE), _settings(steps, rows, length, 1.0 if arm == "base" else GENTLE)
    model = decoder(seed, **EXPERTS) if arm == "base" else load(folder / "models" / f"base-{seed}", dtype=torch.float32, qat=arm == "qat")
    pretrain(model, blend(sources, 0.0, t, seed, stage="base" if arm == "base" else "more"), t, log)
    held_out = list(islice(blend(sources, 0.0, t, 0, "heldout"), batches))
    questioned, found = _questions(asked), {}
    for kind in ("float", "int4"):
        where = folder / "models" / (name if kind == "float" else f"{name}-int4")
        save(model, where, int4=kind == "int4")
        measured = load(where, dtype=torch.float32)
        chosen = evaluate.answer(measured, questioned, Tokenizer())
        found[kind] = {"loss": [loss_on(measured, [batch]) for batch in held_out],
                       "right": [int(example.choices[choice] == example.answer) for example, choice in zip(questioned, chosen)]}  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------------- claims

EXTENSIONS = ("plain", "yarn", "plain tuned", "yarn tuned")
QUANTISED = ("base", "float", "qat")


def yarn(scale):
    """The claims about the extension by YaRN, and yarn.png. scale: lab.Scale. Returns list of Claim."""
    length, factor, times = scale.pick(128, 64), scale.pick(FACTOR, 2), scale.pick(TIMES, TIMES[:2])
    measured = {"factor": factor, "times": times, "length": length, "asked": scale.pick(20, 2), "documents": scale.pick(8, 2)}
    short = {"steps": scale.pick(500, 2), "rows": scale.pick(16, 2)}
    more = {"steps": scale.pick(40, 2), "rows": scale.pick(3, 1)}
    found = {}
    for arm in EXTENSIONS:
        cells = {f"{arm.replace(' ', '-')}-{seed}": {"arm": arm, "seed": seed} | (short if arm == "plain" else more) | measured for seed in scale.seeds}
        rows = dict.fromkeys(cells, 0 if arm == "yarn" else cells[next(iter(cells))]["steps"])
        found[arm] = list(scale.run("yarn", cells, extended, rows).values())
    _plot_yarn(found, times, length, factor, scale.folder / "yarn" / "yarn.png")
    return list(_yarn_claims(found, factor, more["steps"], length))


def _needles(cells, times):
    """(S,I) of 0 and 1: seeds × questions at a length."""
    return np.array([cell["needles"][str(times)] for cell in cells], float)


def _loss(cells, start, stop):
    """(S,I) nats per token: seeds × documents, over positions from `start` to `stop` times the trained length."""
    return np.array([[np.mean(document[2 * start : 2 * stop]) for document in cell["loss"]] for cell in cells])


def _yarn_claims(arms, factor, steps, length):
    beyond = {arm: _loss(cells, 1, factor) for arm, cells in arms.items()}
    far = {arm: _needles(cells, factor) for arm, cells in arms.items()}
    over = lambda figures: ", ".join(f"{arm} {bootstrap(table)}" for arm, table in figures.items())  # noqa: E731
    gain = bootstrap(beyond["plain"] - beyond["yarn"])
    setup = (f"a decoder trained at {length} tokens, extended {factor}× by the config alone, or with {steps} steps at {factor * length} tokens")
    yield Claim("YaRN holds perplexity beyond the trained length", "K2.5 report 4.3", "context is extended with YaRN", f"{setup}; held-out prose, nats per "
                f"token at positions from {length} to {factor * length}, plain RoPE less YaRN, neither trained further",
                f"gain {gain}; {over(beyond)}; within the trained length {bootstrap(_loss(arms['plain'], 0, 1))}", judge(gain), "yarn.png")  # fmt: skip
    gain = bootstrap(far["yarn tuned"] - far["plain"])
    yield Claim("needles are found at long length after the extension", "K2.5 report 4.3", "long-context training after the extension: 32,768 → 262,144",
                f"{setup}; needles in {factor * length} tokens, all depths, chance 0.25; YaRN and steps less plain RoPE before",
                f"gain {gain}; {over(far)}; at the trained length, before {bootstrap(_needles(arms['plain'], 1))}, after "
                f"{bootstrap(_needles(arms['yarn tuned'], 1))}", judge(gain))  # fmt: skip
    gain = bootstrap(beyond["plain tuned"] - beyond["yarn tuned"])
    yield Claim("the long steps need YaRN", "K2.5 report 4.3", "context is extended with YaRN, not by longer rows alone",
                f"{setup}; the same steps with plain RoPE as control: its loss less YaRN's at positions from {length} to {factor * length}",
                f"gain {gain}; needles, YaRN less plain {bootstrap(far['yarn tuned'] - far['plain tuned'])}", judge(gain))  # fmt: skip


def _plot_yarn(arms, times, length, factor, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2))
    bins = len(arms["plain"][0]["loss"][0])
    middles = (np.arange(bins) + 0.5) * length / 2
    for number, (arm, cells) in enumerate(arms.items()):
        curves = ((left, intervals([n * length for n in times], [_needles(cells, n) for n in times])),
                  (right, intervals(middles, [np.array([[document[i] for document in cell["loss"]] for cell in cells]) for i in range(bins)])))  # fmt: skip
        for axis, (places, means, lows, highs) in curves:
            axis.plot(places, means, color=f"C{number}", marker=".", label=arm)
            axis.fill_between(places, lows, highs, color=f"C{number}", alpha=0.15, linewidth=0)
    left.axhline(0.25, color="black", linestyle=":", linewidth=1)
    left.set(title="needles found (dotted: chance)", xlabel="tokens", ylim=(0, 1.05), xscale="log", xticks=[n * length for n in times],
             xticklabels=[n * length for n in times])  # fmt: skip
    left.minorticks_off()
    right.set(title="loss on held-out prose, nats per token", xlabel="position")
    for axis in (left, right):
        axis.axvline(length, color="grey", linewidth=0.8)
        axis.axvline(factor * length, color="grey", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    left.legend(frameon=False, title="line: trained length; dashed: extended", title_fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def int4(scale):
    """The claims about int4 experts, and int4.png. scale: lab.Scale. Returns list of Claim."""
    sizes = {"rows": scale.pick(16, 2), "length": 128, "asked": scale.pick(90, 3), "batches": scale.pick(16, 2)}
    found = {}
    for arm in QUANTISED:
        steps = scale.pick(350 if arm == "base" else 150, 2)
        cells = {f"{arm}-{seed}": {"arm": arm, "seed": seed, "steps": steps} | sizes for seed in scale.seeds}
        found[arm] = list(scale.run("int4", cells, quantised, dict.fromkeys(cells, steps)).values())
    _plot_int4(found, scale.folder / "int4" / "int4.png")
    chance = float(np.mean([1 / len(example.choices) for example in _questions(sizes["asked"])]))
    return list(_int4_claims(found, steps, chance))


def _measured(cells, kind, what="loss"):
    """(S,I): seeds × batches, or × questions (what="right"), of the experts as they are ("float") or read from int4."""
    return np.array([cell[kind][what] for cell in cells], float)


def _int4_claims(arms, steps, chance):
    loss = {(arm, kind): _measured(cells, kind) for arm, cells in arms.items() for kind in ("float", "int4")}
    right = {(arm, kind): bootstrap(_measured(cells, kind, "right")) for arm, cells in arms.items() for kind in ("float", "int4")}
    gap = bootstrap(loss["qat", "int4"] - loss["float", "float"])
    setup = (f"one decoder per seed; {steps} more steps with QAT of the routed experts or as many in float; rounding in groups of 32, written in the released "
             "int4 layout and read again; held-out facts, sums and docstrings, nats per token")  # fmt: skip
    yield Claim("QAT loses nothing against float", "K2.5 report 2.1, K2 Thinking", "int4 experts by quantisation-aware training, lossless", f"{setup}; alike within "
                f"{MARGIN}", f"QAT in int4 less float steps in float {gap}; questions right {right['qat', 'int4']} and {right['float', 'float']}, "
                f"chance {chance:.3f}",
                judge_alike(gap, MARGIN), "int4.png")  # fmt: skip
    gain, cost = bootstrap(loss["float", "int4"] - loss["qat", "int4"]), bootstrap(loss["float", "int4"] - loss["float", "float"])
    yield Claim("QAT beats rounding after training", "K2.5 report 2.1, K2 Thinking", "quantisation-aware training rather than rounding of a trained model", setup,
                f"float steps, then rounded, less QAT, then rounded {gain}; rounding costs {cost} after float steps and "
                f"{bootstrap(loss['base', 'int4'] - loss['base', 'float'])} without any; questions right when rounded {right['float', 'int4']}", judge(gain))  # fmt: skip


def _plot_int4(arms, path):
    """Loss of each arm, less that of float steps in float, paired: as it is and in int4."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    reference, names = _measured(arms["float"], "float"), ("no more steps", "float steps", "QAT steps")
    for number, kind in enumerate(("float", "int4")):
        found = [bootstrap(_measured(arms[arm], kind) - reference) for arm in QUANTISED]
        ends = [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
        axis.errorbar(np.arange(len(found)) + 0.2 * number - 0.1, [f.mean for f in found], ends, fmt="o", capsize=4, label=f"experts in {kind}")
    axis.axhspan(-MARGIN, MARGIN, color="grey", alpha=0.15, linewidth=0, label="counts as alike")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="nats per token, less float steps in float", title="held-out loss")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, path)
