"""MoonViT-3D at toy scale: one set of weights for images and video, four frames in the room of one — K2.5 report 4.2.

    new weights ─▶ images ─┬─▶ questions about video that it never met                                              zero-shot
                           ├─▶ images + clips, chunks of four frames with attention in space and time, then averaged   "chunks"
                           ├─▶ images + clips, each frame an image of its own, as many as take the room of the chunks  "fewer"
                           ├─▶ images + clips, each frame an image of its own, all of them                             "frames"
                           └─▶ images alone, about as many as the others see                                           "images"

Pictures have 28 × 28 pixels, one token, and show a thing in one of four cells. In a passing clip it moves to a neighbouring cell, in a
clip of flashes two things light up, each for one frame; forwards and backwards a clip shows the same pictures. All arms answer
the same held-out questions of four choices, each drawn uniformly from its choices: chance is 1/4.

Public names: Still, Reel, propose_*, ARMS, LEARNED, SCORED, shuffled, start, arm, moonvit3d.     Tests: pytest tests/test_vision_claims.py
"""

import dataclasses
import functools
import random
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import evaluate
from data import questions
from example import Draft, Source, pick, split_of
from k25 import load, save
from lab import Claim, blend, decoder, judge, judge_alike, pretrain
from media import Clip, MediaConfig, timestamp
from pictures import COLOURS, PAPER, SHAPES, Thing
from rl_report import save_figure
from sft import SFTConfig
from study import bootstrap
from tokenizer import Tokenizer
from vit3d import VisionConfig

CELL = 14  # pixels: one patch; a picture has 2 × 2 of them, which merge into one token
SIDES = (9, 11, 13)  # pixels of a thing
FRAMES = 8  # of a clip: two chunks
CHUNK = 4  # frames
APART = MediaConfig(temporal_merge_kernel_size=1)  # each frame is an item of its own
ARMS = {  # how each arm reads a clip
    "chunks": MediaConfig(temporal_merge_kernel_size=CHUNK), "fewer": dataclasses.replace(APART, max_num_frames_each_video=FRAMES // CHUNK),
    "frames": APART, "images": MediaConfig(),
}  # fmt: skip
MODEL = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 4, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
TOWER = VisionConfig(init_pos_emb_height=2, init_pos_emb_width=2, vt_hidden_size=48, vt_num_attention_heads=4, vt_num_hidden_layers=2,
                     vt_intermediate_size=96, text_hidden_size=MODEL["hidden_size"])  # fmt: skip
ROOMS = {  # rows × tokens of a step, so that all arms see about as many documents; "images" as many images
    "chunks": (16, 192), "fewer": (15, 192), "frames": (26, 224), "images": (8, 128),
}  # fmt: skip
SAME = 0.05  # accuracies that differ by less count as alike


# --------------------------------------------------------------------------------------------- pictures


@functools.lru_cache(maxsize=4096)
def _draw(things):
    image = Image.new("RGB", (2 * CELL, 2 * CELL), PAPER)
    for thing in things:
        thing.draw_on(image)
    return image


@dataclass(frozen=True)
class Still:
    """A picture of 28 × 28 pixels."""

    things: tuple  # of Thing

    def key(self):
        """What decides the split: a thing where it is."""
        return repr(self.things[0])

    def render(self):
        """The RGB picture."""
        return _draw(self.things)


@dataclass(frozen=True)
class Reel:
    """A clip of such pictures, two a second."""

    frames: tuple  # of tuples of Thing

    def key(self):
        """That of the first frame that shows anything; all others are of its split."""
        return Still(next(filter(None, self.frames))).key()

    def render(self):
        """The RGB frames."""
        return Clip(tuple(map(_draw, self.frames)), 2.0)


CORNERS = ("top left", "top right", "bottom left", "bottom right")  # of cells 0 … 3
MOVES = {  # the cells that a thing can start in, and the way to the next, in pixels
    "left": ((1, 3), (-CELL, 0)), "right": ((0, 2), (CELL, 0)), "up": ((2, 3), (0, -CELL)), "down": ((0, 1), (0, CELL)),
}  # fmt: skip


def _thing(rng, cell, colour=None, shape=None):
    """A thing somewhere in a cell; what is not given is drawn."""
    side = rng.choice(SIDES)
    x, y = (CELL * place + rng.randint(0, CELL - side) for place in (cell % 2, cell // 2))
    return Thing(shape or rng.choice(SHAPES), colour or rng.choice(tuple(COLOURS)), x, y, x + side - 1, y + side - 1)


def _kin(thing, propose):
    """The first proposal of a thing's split: who learns from one never meets a held-out thing beside it, nor the other way round."""
    return next(other for other in iter(propose, None) if split_of(repr(other)) == split_of(repr(thing)))


def _passing(rng, move, **given):
    """Frames in which a thing rests, and from one frame to the next is in the neighbouring cell."""
    starts, (dx, dy) = MOVES[move]
    before = _thing(rng, rng.choice(starts), **given)
    after = _moved(before, dx, dy)
    while split_of(repr(before)) != split_of(repr(after)):
        before = _thing(rng, rng.choice(starts), **given)
        after = _moved(before, dx, dy)
    at = rng.randrange(1, FRAMES)
    return ((before,),) * at + ((after,),) * (FRAMES - at)


def _moved(thing, dx, dy):
    return dataclasses.replace(thing, x1=thing.x1 + dx, x2=thing.x2 + dx, y1=thing.y1 + dy, y2=thing.y2 + dy)


def _flashes(rng, early, late):
    """Frames without anything, but for two things that show in one frame each, in different cells."""
    cells, (first, second) = rng.sample(range(4), 2), sorted(rng.sample(range(FRAMES), 2))
    before = _thing(rng, cells[0], early)
    shown = {first: (before,), second: (_kin(before, lambda: _thing(rng, cells[1], late)),)}
    return tuple(shown.get(frame, ()) for frame in range(FRAMES))


# ------------------------------------------------------------------------------- what is learned, and asked


def _question(word, values, show, marker="<video>", name=None):
    """A source of one question. show: (rng, answer, choices) → Still or Reel."""

    def propose(rng):
        answer, choices = pick(rng, tuple(values))
        shown = show(rng, answer, choices)
        return Draft(((f"{marker}Q:{word}?A:", answer),), shown.key(), choices, (shown,))

    return Source(name or word, "vision", "", propose)


def _any(rng):
    return rng.randrange(4)


def _other(rng, colour, colours):
    return rng.choice([other for other in colours if other != colour])


IMAGES = (
    _question("colour", COLOURS, lambda rng, answer, _: Still((_thing(rng, _any(rng), colour=answer),)), "<image>"),
    _question("shape", SHAPES, lambda rng, answer, _: Still((_thing(rng, _any(rng), shape=answer),)), "<image>"),
    _question("where", CORNERS, lambda rng, answer, _: Still((_thing(rng, CORNERS.index(answer)),)), "<image>"),
)
SEEN = (  # what images taught, asked of a clip
    _question("colour", COLOURS, lambda rng, answer, _: Reel(_passing(rng, rng.choice(tuple(MOVES)), colour=answer)), name="clip colour"),
    _question("shape", SHAPES, lambda rng, answer, _: Reel(_passing(rng, rng.choice(tuple(MOVES)), shape=answer)), name="clip shape"),
)
ORDERED = (  # what only the order of frames tells
    _question("moves", MOVES, lambda rng, answer, _: Reel(_passing(rng, answer))),
    _question("first", COLOURS, lambda rng, answer, choices: Reel(_flashes(rng, answer, _other(rng, answer, choices)))),
    _question("last", COLOURS, lambda rng, answer, choices: Reel(_flashes(rng, _other(rng, answer, choices), answer))),
)
SCORED = (*IMAGES, *SEEN, *ORDERED)


def _interview(marker, shown, answers, rng):
    """Several questions about one picture or clip, in any order: more to learn from the same pixels."""
    turns = [(f"Q:{word}?A:", answer) for word, answer in rng.sample(sorted(answers.items()), len(answers))]
    turns[0] = (marker + turns[0][0], turns[0][1])
    return Draft(tuple(turns), shown.key(), (), (shown,))


def propose_still(rng):
    """All questions about a picture."""
    cell = _any(rng)
    thing = _thing(rng, cell)
    return _interview("<image>", Still((thing,)), {"colour": thing.colour, "shape": thing.shape, "where": CORNERS[cell]}, rng)


def propose_album(rng):
    """A thing in two pictures, written with times as a clip is: images, but so many and so put that a clip's words are nothing new."""
    thing = _thing(rng, _any(rng))
    again = _kin(thing, lambda: _thing(rng, _any(rng), thing.colour, thing.shape))
    word = rng.choice(("colour", "shape"))
    prompt = "".join(f"{timestamp(second)}<image>" for second in (0, rng.randint(1, 4)))
    return Draft(((f"{prompt}Q:{word}?A:", getattr(thing, word)),), repr(thing), (), (Still((thing,)), Still((again,))))


def propose_passing(rng):
    """All questions about a thing that moves."""
    move = rng.choice(tuple(MOVES))
    reel = Reel(_passing(rng, move))
    ((thing,), *_) = reel.frames
    return _interview("<video>", reel, {"colour": thing.colour, "shape": thing.shape, "moves": move}, rng)


def propose_flashes(rng):
    """Both questions about two flashes."""
    early, late = rng.sample(tuple(COLOURS), 2)
    return _interview("<video>", Reel(_flashes(rng, early, late)), {"first": early, "last": late}, rng)


LEARNED = {name: Source(name, "vision", "", propose) for name, propose in
           (("still", propose_still), ("album", propose_album), ("passing", propose_passing), ("flashes", propose_flashes))}  # fmt: skip


# ------------------------------------------------------------------------------------------------ cells


def _right(model, sources, asked, change=lambda example, rng: example, blind=False):
    """{source: [1 where a held-out question is answered rightly, else 0]}; the questions are the same for all seeds and arms."""
    found = {}
    for source in sources:
        examples = questions(source, asked, 0)
        changed = [change(example, random.Random(f"{source.name} {number}")) for number, example in enumerate(examples)]
        chosen = evaluate.answer(model, changed, Tokenizer(), blind, rows=256)
        found[source.name] = [int(example.choices[choice] == example.answer) for example, choice in zip(examples, chosen)]
    return found


def shuffled(example, rng):
    """The same question about the same frames in another order."""
    (clip,) = example.media
    return dataclasses.replace(example, media=(dataclasses.replace(clip, frames=tuple(rng.sample(clip.frames, len(clip.frames)))),))


def _train(model, names, log, arm, seed, steps, rows, length):
    """Train on some of LEARNED, drawn equally often. Returns {name: documents seen}."""
    t = SFTConfig(steps, rows, length, lr=1e-2, adamw_lr=1e-3, dtype="float32")
    source = blend([(LEARNED[name], 1.0) for name in names], 1.0, t, seed, stage=arm, media=ARMS[arm])
    pretrain(model, source, t, log)
    return {name: documents for name, (documents, _) in source.counts().items()}


def start(folder, name, log, seed, steps, rows, length, asked):
    """Images alone, from new weights; then questions about clips, which it never met, against grey frames and new weights."""
    model = decoder(seed, **MODEL, vision=TOWER)
    untrained = _right(model, (*SEEN, ORDERED[0]), asked)
    _train(model, ["still", "album"], log, "images", seed, steps, rows, length)
    save(model, folder / "models" / name)
    return {"right": _right(model, (*IMAGES, *SEEN, ORDERED[0]), asked), "blind": _right(model, SEEN, asked, blind=True), "untrained": untrained}


def arm(folder, name, log, arm, seed, steps, rows, length, asked):
    """One arm, from its seed's stage of images, on held-out questions of every kind."""
    model = load(folder / "models" / f"start-{seed}", dtype=torch.float32)
    model.config = dataclasses.replace(model.config, media=ARMS[arm])
    documents = _train(model, ["still"] if arm == "images" else ["still", "passing", "flashes"], log, arm, seed, steps, rows, length)
    found = {"right": _right(model, IMAGES if arm == "images" else SCORED, asked), "documents": documents}
    if arm == "chunks":
        found["shuffled"] = _right(model, ORDERED, asked, shuffled)
    return found


# ----------------------------------------------------------------------------------------------- report


def moonvit3d(scale):
    """The claims about MoonViT-3D, and moonvit3d.png. scale: lab.Scale. Returns list of Claim."""
    asked = scale.pick(60, 2)
    first = {"steps": scale.pick(250, 2), "rows": scale.pick(16, 1), "length": 128, "asked": asked}
    then = {"steps": scale.pick(280, 2), "asked": asked}
    rooms = {name: {"rows": scale.pick(rows, 1), "length": length} for name, (rows, length) in ROOMS.items()}
    cells = {f"start-{seed}": {"seed": seed} | first for seed in scale.seeds}
    starts = scale.run("moonvit3d", cells, start, dict.fromkeys(cells, first["steps"]))
    cells = {f"{name}-{seed}": {"arm": name, "seed": seed} | rooms[name] | then for seed in scale.seeds for name in ARMS}
    arms = scale.run("moonvit3d", cells, arm, dict.fromkeys(cells, then["steps"]))
    read = {"zero-shot": [starts[f"start-{seed}"] for seed in scale.seeds]} | {name: [arms[f"{name}-{seed}"] for seed in scale.seeds] for name in ARMS}
    _plot(read, scale.folder / "moonvit3d" / "moonvit3d.png")
    return list(_claims(read))


def _table(cells, sources, part="right"):
    """(S,I) of 0 and 1: seeds × questions of some sources, those of all sources side by side."""
    return np.array([[right for source in sources for right in cell[part][source.name]] for cell in cells], float)


def _claims(read):
    between = lambda one, other, sources: bootstrap(_table(read[one], sources) - _table(read[other], sources))  # noqa: E731
    score = lambda name, sources, part="right": bootstrap(_table(read[name], sources, part))  # noqa: E731
    documents = {name: {kind: round(np.mean([cell["documents"][kind] for cell in read[name]])) for kind in read[name][0]["documents"]} for name in ARMS}
    clips = sum(documents["chunks"][kind] for kind in ("passing", "flashes"))
    alike = between("chunks", "images", IMAGES)
    yield Claim("the same weights serve images and video", "K2.5 report 4.2", "one set of weights for images and video: an image is a clip of one frame",
                f"after a stage of images, {documents['chunks']['still']} images and {clips} clips through one tower, against {documents['images']['still']} "
                f"images alone; held-out questions about images (colour, shape, where), alike within {SAME}, chance 0.25",
                f"both {score('chunks', IMAGES)}, images alone {score('images', IMAGES)}: difference {alike}; and the same weights on clips "
                f"{score('chunks', SEEN + ORDERED)}", judge_alike(alike, SAME), "moonvit3d.png")  # fmt: skip
    longer, moves, flashes = (between("chunks", "fewer", sources) for sources in (ORDERED, ORDERED[:1], ORDERED[1:]))
    yield Claim("four times the frames in the same context", "K2.5 report 4.2", "chunks of 4 frames, averaged: 4× fewer tokens, so 4× longer videos fit",
                f"{FRAMES // CHUNK} vision tokens of context: {FRAMES} frames in chunks of {CHUNK}, against {FRAMES // CHUNK} frames that are images of their own, "
                f"from the same images, with as many documents ({clips} and {documents['fewer']['passing'] + documents['fewer']['flashes']} clips); held-out "
                "questions that only the order of frames tells, chance 0.25",
                f"chunks {score('chunks', ORDERED)}, fewer frames {score('fewer', ORDERED)}: gain {longer}; of it a thing that moves and then stays "
                f"{moves}, flashes of one frame {flashes}; chunks with frames shuffled {score('chunks', ORDERED, 'shuffled')}", judge(longer))  # fmt: skip
    cost = between("chunks", "frames", ORDERED)
    yield Claim("averaging four frames keeps their order", "K2.5 report 4.2", "attention in space and time within a chunk, then a mean over its frames",
                f"all {FRAMES} frames in both: {FRAMES // CHUNK} averaged chunks against {FRAMES} images of their own, {CHUNK} times the vision tokens, as many documents; "
                f"the same questions, alike within {SAME}",
                f"chunks {score('chunks', ORDERED)}, all frames apart {score('frames', ORDERED)}: difference {cost}", judge_alike(cost, SAME))  # fmt: skip
    gain = bootstrap(_table(read["zero-shot"], SEEN) - _table(read["zero-shot"], SEEN, "blind"))
    yield Claim("image training helps video, zero-shot", "K2.5 report 4.2", "what images teach carries over to video through the shared weights",
                "trained on images alone, asked for the colour and the shape of a thing that moves in a clip, against the same weights on grey frames, chance 0.25",
                f"clips {score('zero-shot', SEEN)}, grey {score('zero-shot', SEEN, 'blind')}: gain {gain}; untrained {score('zero-shot', SEEN, 'untrained')}; images "
                f"{score('zero-shot', IMAGES[:2])}; where it moves, which no image shows {score('zero-shot', ORDERED[:1])}", judge(gain))  # fmt: skip


def _plot(read, path):
    """Bars with intervals: questions about clips by how they are read, about images, zero-shot."""
    panels = {
        "clips": (SEEN + ORDERED, {"4 frames averaged": ("chunks", "right"), "fewer frames, same tokens": ("fewer", "right"),
                                   "all frames apart, 4× tokens": ("frames", "right")}),
        "images": (IMAGES, {"images and clips": ("chunks", "right"), "images alone": ("images", "right")}),
        "clips after images alone (zero-shot)": (SEEN, {"clips": ("zero-shot", "right"), "grey frames": ("zero-shot", "blind"),
                                                        "untrained": ("zero-shot", "untrained")}),
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4), width_ratios=(5, 3, 2), sharey=True)
    for axis, (title, (sources, bars)) in zip(axes, panels.items()):
        for number, (label, (name, part)) in enumerate(bars.items()):
            found = [bootstrap(_table(read[name], [source], part)) for source in sources]
            means, ends = [f.mean for f in found], [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
            places = np.arange(len(sources)) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars)
            axis.bar(places, means, 0.8 / len(bars), yerr=ends, label=label, color=f"C{number}", error_kw={"linewidth": 1})
        axis.axhline(0.25, color="black", linestyle=":", linewidth=1)
        axis.set(title=title, ylim=(0, 1.35), yticks=np.arange(0, 1.1, 0.25))
        axis.set_xticks(range(len(sources)), [source.name for source in sources])
        axis.legend(frameon=False, fontsize=8, loc="upper left", ncol=2)
    axes[0].set_ylabel("share right (dotted: chance)")
    figure.tight_layout()
    save_figure(figure, path)
