"""When should vision come into pre-training? Early fusion against mid and late — K2.5 report table 1 and figure 9.

    tower, once per seed   a small dense LM learns text; then MoonViT-3D and projector learn to caption through it, frozen

    arm      vision comes after    vision : text from then on
    early      0 % of training      10 : 90
    mid       50 %                  20 : 80
    late      80 %                  50 : 50

Every arm is a decoder from scratch behind that tower and projector. Decoder and projector train; the tower does not, for next to a
decoder that knows nothing yet Muon, whose steps are as large whatever the gradient, unlearns it. Every arm takes as many steps, sees as
many tokens of text and of vision, and follows one schedule of rates that does not begin again at the injection. Measured: six abilities
on held-out questions, paired across arms; and on the way, at the same steps in every arm, the loss on held-out text, closely after each
injection.

Rules, fixed beforehand. Rise: the highest of the points behind an injection less the last one before it. A dip is a rise beyond
what early shows at the same steps, or beyond none where early falls. Roughness: the most that a curve ever stands above
its lowest so far. No worse: by less than MARGIN.

Public names: ARMS, AFTER, MARGIN, phases, batches, tokens_of, points, rise, roughness, tower, arm, fusion.
Tests: pytest tests/test_fusion.py
"""

import dataclasses
import time
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import torch

from data import questions
from evaluate import ABILITIES, answer
from k25 import K25Config, load, save
from lab import Claim, blend, decoder, judge, loss_on, pretrain
from rl_report import plot_arms, save_figure
from sft import SFTConfig, train_on
from sources import SOURCES, TEXT_WEIGHTS, VISION_WEIGHTS, weighted
from study import bootstrap, intervals
from tokenizer import Tokenizer

ARMS = {"early": (0.0, 0.1), "mid": (0.5, 0.2), "late": (0.8, 0.5)}  # (share of training before vision, share of vision tokens from then on)
REPORTED = {  # early / mid / late
    "vision knowledge": "25.8 / 25.0 / 24.2", "vision reasoning": "43.8 / 40.7 / 39.0", "OCR": "65.7 / 64.1 / 61.5",
    "text knowledge": "45.5 / 43.9 / 43.1", "text reasoning": "58.5 / 58.6 / 57.8", "code": "24.8 / 24.0 / 24.0",
}  # fmt: skip
GRID = 12  # points of the curve, evenly over training
AFTER = (1, 2, 4, 6, 9, 13, 18, 24)  # and so many steps after each injection
MARGIN = 0.05  # nats per token
TEACHER = {"num_hidden_layers": 2, "first_k_dense_replace": 2}  # the small dense LM
SMALLEST = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2, "n_routed_experts": 4}
CAPTIONS = {"lr": 9.6e-3, "adamw_lr": 1e-3}  # of the tower, as in train_small.py's stage vit
RATES = {"lr": 6e-3, "adamw_lr": 4e-3}  # of a language model from scratch, as there


def _model(seed, shape):
    """shape: fields of the decoder; without any it is the toy, with the toy's tower."""
    return decoder(seed, **(shape if "hidden_size" in shape else {"vision": K25Config.preset("toy").vision} | shape))


# ----------------------------------------------------------------------------------------------- data


def phases(name, steps):
    """An arm's two stretches, ((share of vision tokens, steps), …)."""
    start, ratio = ARMS[name]
    before = round(start * steps)
    return (0.0, before), (ratio, steps - before)


def batches(name, t, seed):
    """The t.steps Batches of an arm, one stretch after the other. t: SFTConfig."""
    sources = weighted(TEXT_WEIGHTS) + weighted(VISION_WEIGHTS)
    for number, (ratio, steps) in enumerate(phases(name, t.steps)):
        yield from islice(blend(sources, ratio, t, seed, stage=f"fusion {number}"), steps)


def tokens_of(batch):
    """(text, vision) tokens of a Batch, padding left out."""
    vision = int(batch.vision.sum())
    return int((batch.segment_ids >= 0).sum()) - vision, vision


def points(steps):
    """After how many steps text skill is measured, in every arm: on a grid, just before each injection, and closely behind it."""
    starts = [round(start * steps) for start, _ in ARMS.values() if start]
    found = {round(steps * n / GRID) for n in range(1, GRID + 1)} | {start + after for start in starts for after in (0, *AFTER)}
    return sorted(point for point in found if 0 < point <= steps)


# ----------------------------------------------------------------------------------------------- cells


def tower(folder, name, log, seed, text_steps, steps, rows, length, shape):
    """The vision tower of a seed, trained by captions through a frozen small LM; kept in models. Returns the loss on held-out pictures."""
    model = _model(seed, shape | TEACHER)
    t = SFTConfig(text_steps, rows, length, **RATES)
    pretrain(model, blend(weighted(TEXT_WEIGHTS), 0.0, t, seed, stage="teacher"), t, log, stage="teacher")
    model.language_model.requires_grad_(False)
    t, visions = SFTConfig(steps, rows, length, **CAPTIONS), weighted(VISION_WEIGHTS)
    pretrain(model, blend(visions, 1.0, t, seed, stage="captions"), t, log, stage="captions")
    save(model, folder / "models" / name)
    return {"loss": loss_on(model, islice(blend(visions, 1.0, t, 0, "heldout"), 4))}


def arm(folder, name, log, arm, seed, steps, rows, length, asked, held_out, shape):
    """A decoder from scratch behind its seed's tower and projector. Returns its curve, right answers, and the tokens that it saw."""
    t, model = SFTConfig(steps, rows, length, **RATES), _model(seed, shape)
    seen = load(folder.parent / "stages" / "models" / f"caption-tower-{seed}", dtype=torch.float32).state_dict()
    model.load_state_dict({name: value for name, value in seen.items() if name.startswith(("vision_tower.", "mm_projector."))}, strict=False)
    model.vision_tower.requires_grad_(False)
    texts = list(islice(blend(weighted(TEXT_WEIGHTS), 0.0, t, 0, "heldout"), held_out))
    curve, counts, wanted, began = [], np.zeros(2, int), set(points(steps)), time.perf_counter()

    def counted():
        for batch in batches(arm, t, seed):
            counts[:] += tokens_of(batch)
            yield batch

    for step, result in enumerate(train_on(model, counted(), t), 1):
        log(step=step, **dataclasses.asdict(result), tokens_per_s=counts.sum() / (time.perf_counter() - began))
        if step in wanted:
            curve.append(loss_on(model, texts))
    return {"curve": curve, "text": int(counts[0]), "vision": int(counts[1])} | _answers(model, asked)


def _answers(model, asked):
    """Right (0/1) of each held-out question, and chance, by ability; the same questions for all seeds and arms."""
    right, chance = {}, {}
    for ability in ABILITIES:
        examples = questions([source for source in SOURCES.values() if source.ability == ability], asked, 0)
        chosen = answer(model, examples, Tokenizer())
        right[ability] = [int(example.choices[choice] == example.answer) for example, choice in zip(examples, chosen)]
        chance[ability] = float(np.mean([1 / len(example.choices) for example in examples]))
    return {"right": right, "chance": chance}


# --------------------------------------------------------------------------------------------- figures


def rise(curve, at, start):
    """The highest value within AFTER behind `start`, less the one at it. curve: (…,P) of the points at: (P,) steps. Returns (…)."""
    curve, at = np.asarray(curve), np.asarray(at)
    within = (at > start) & (at <= start + AFTER[-1])
    return curve[..., within].max(-1) - curve[..., at == start][..., 0]


def roughness(curve):
    """The most that a curve stands above its lowest so far. curve: (…,P). Returns (…)."""
    return (curve - np.minimum.accumulate(curve, axis=-1)).max(-1)


def fusion(scale):
    """Table 1 and figure 9. Returns list of Claim."""
    shape = scale.pick({}, SMALLEST)
    rows, length = scale.pick(4, 2), scale.pick(256, 192)
    shared = {"rows": rows, "length": length, "shape": shape}
    towers = {f"caption-tower-{s}": {"seed": s, "text_steps": scale.pick(400, 2), "steps": scale.pick(500, 2)} | shared for s in scale.seeds}
    scale.run("stages", towers, tower, {name: cell["text_steps"] + cell["steps"] for name, cell in towers.items()})
    steps = scale.pick(720, 10)
    shared |= {"steps": steps, "asked": scale.pick(150, 4), "held_out": scale.pick(6, 1)}
    cells = {f"{name}-{s}": {"arm": name, "seed": s} | shared for s in scale.seeds for name in ARMS}
    found = scale.run("fusion", cells, arm, dict.fromkeys(cells, steps))
    by_arm = {name: [found[f"{name}-{s}"] for s in scale.seeds] for name in ARMS}
    _plot_abilities(by_arm, scale.folder / "fusion" / "abilities.png")
    _plot_text_skill(by_arm, steps, scale.folder / "fusion" / "text_skill.png")
    return [*_ability_claims(by_arm, steps), *_curve_claims(by_arm, steps)]


def _right(cells, ability):
    return np.array([cell["right"][ability] for cell in cells], float)  # (S,I)


def _ability_claims(by_arm, steps):
    tokens = "; ".join(f"{name} {np.mean([c['text'] for c in cells]):,.0f} + {np.mean([c['vision'] for c in cells]):,.0f}" for name, cells in by_arm.items())
    setup = f"toy decoders from scratch, {steps} steps, text + vision tokens {tokens}; held-out questions, the same for all arms; early less late"
    for number, ability in enumerate(ABILITIES):
        right = {name: _right(cells, ability) for name, cells in by_arm.items()}
        gain = bootstrap(right["early"] - right["late"])
        shares = " / ".join(f"{bootstrap(table).mean:.3f}" for table in right.values())
        yield Claim(f"early fusion is better at {ability}", "K2.5 report table 1", f"early / mid / late {REPORTED[ability]}", setup,
                    f"{shares}, chance {by_arm['early'][0]['chance'][ability]:.3f}; early less late {gain}; early less mid "
                    f"{bootstrap(right['early'] - right['mid'])}", judge(gain), "" if number else "abilities.png")  # fmt: skip


def _curve_claims(by_arm, steps):
    at = np.array(points(steps))
    curves = {name: np.array([cell["curve"] for cell in cells]) for name, cells in by_arm.items()}  # (S,P)
    starts = {name: phases(name, steps)[0][1] for name in ARMS}
    rises = {name: rise(curves[name], at, starts[name]) for name in ("mid", "late")}
    controls = {name: rise(curves["early"], at, starts[name]) for name in ("mid", "late")}
    beyond = {name: bootstrap((rises[name] - controls[name].clip(min=0))[:, None]) for name in ("mid", "late")}
    column = lambda table: bootstrap(table[:, None])  # noqa: E731
    yield Claim("late injection makes text skill dip", "K2.5 report figure 9", "text skill dips when vision comes in late",
                f"loss on held-out text, nats per token, {len(AFTER)} points within {AFTER[-1]} steps of the injection: the highest less the last before it, "
                "beyond the same of early at the same steps, or beyond none where early falls",
                f"late {beyond['late']} (its rise {column(rises['late'])}, early's {column(controls['late'])}); mid {beyond['mid']} "
                f"(its rise {column(rises['mid'])}, early's {column(controls['mid'])})", judge(beyond["late"]), "text_skill.png")  # fmt: skip
    gap = curves["late"][:, -1] - curves["early"][:, -1]
    yield Claim("… and recover", "K2.5 report figure 9", "the dip is followed by recovery",
                f"loss on held-out text at the end of training: late is no worse than early by {MARGIN} nats per token",
                f"late less early {column(gap)}; early {column(curves['early'][:, -1])}, just before the injection late "
                f"{column(curves['late'][:, at == starts['late']][:, 0])}", judge(column(MARGIN - gap)))  # fmt: skip
    before = at <= starts["late"]
    rough = {name: roughness(curves[name][:, before]) for name in ("early", "late")}
    gap = rough["early"] - rough["late"]
    yield Claim("early fusion stays smooth", "K2.5 report figure 9", "text skill rises smoothly with vision from the start",
                f"the most that the loss on held-out text stands above its lowest so far, over the first {starts['late']} steps, in which late sees text alone: "
                f"early is no worse than that by {MARGIN} nats per token",
                f"early {column(rough['early'])}, text alone {column(rough['late'])}, early less text alone {column(gap)}; over all of training early "
                f"{column(roughness(curves['early']))}, mid {column(roughness(curves['mid']))}, late {column(roughness(curves['late']))}",
                judge(column(MARGIN - gap)))  # fmt: skip


# ----------------------------------------------------------------------------------------------- plots


def _plot_abilities(by_arm, path):
    """Accuracy with its interval, three bars per ability, and a line for chance."""
    figure, axis = plt.subplots(figsize=(10, 4))
    width = 0.8 / len(by_arm)
    for number, (name, cells) in enumerate(by_arm.items()):
        found = [bootstrap(_right(cells, ability)) for ability in ABILITIES]
        places = np.arange(len(ABILITIES)) + (number - (len(by_arm) - 1) / 2) * width
        means = np.array([one.mean for one in found])
        spread = [means - [one.low for one in found], [one.high for one in found] - means]
        axis.bar(places, means, 0.9 * width, yerr=spread, capsize=3, color=f"C{number}", label=name)
    for place, ability in enumerate(ABILITIES):
        axis.hlines(by_arm["early"][0]["chance"][ability], place - 0.45, place + 0.45, color="black", linestyle="--", label="" if place else "chance")
    axis.set_xticks(range(len(ABILITIES)), [ability.replace(" ", "\n") for ability in ABILITIES])
    axis.set_ylim(0, 1)
    axis.set_ylabel("right, held-out questions")
    axis.legend(frameon=False, ncols=4)
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def _plot_text_skill(by_arm, steps, path):
    """The curves of all arms, over training and close around each injection."""
    at = np.array(points(steps))
    parts = {"held-out text loss, nats per token": at > 0}
    for name, share in (("mid", "50 %"), ("late", "80 %")):
        start = phases(name, steps)[0][1]
        parts[f"around {share}, where vision comes into {name}"] = (at >= start) & (at <= start + AFTER[-1])
    panels = {title: {name: intervals(at[kept], np.array([cell["curve"] for cell in cells])[:, kept].T) for name, cells in by_arm.items()}
              for title, kept in parts.items()}  # fmt: skip
    plot_arms(panels, path)
