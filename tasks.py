"""Tasks by ability, each as twins: one question over a picture and over words — K2.5 report 2.3, 4.4.2, appendix D.

    task = draw(random.Random(7), "count", modality="vision", difficulty=2)
    seen, read = twins(random.Random(7), "count")      the same question, truth, key and split
    python tasks.py list                               families, judges, chances of who does not look
    python tasks.py sheet --out sheet.png              a picture of them

Abilities, not modalities: knowledge (colour, read, emblem, lookup), reasoning (count, measure, box, point, chart, table,
sum, price, chain), coding (sketch, program, sort), agentic (menu, dial: small programs operated by clicks).

Everything is generated. What is asked and what the answer is are drawn first and kept; the rest of the content is drawn
until its key belongs to the wanted split (`example.split_of`), so the split does not skew the answers. The key
says all that the words say, and both twins have it: what is held out is held out in either form. Keys of sums, orders,
writings and one-line programs are those of sources.py, so these are held out of pre-training too.

`blind` of a level is an upper bound of the expected score of an answer from the question alone, in either split: of the
best constant answer found, such as a box in each quarter of the picture, or of the best fixed plan of clicks.

`chain` is for Toggle: the answer needs one step per number, which can be written tersely or at length; its hardest level
is only ever held out.

Public names: Task, Family, TASKS, ABILITIES, MODALITIES, JUDGES, TaskError, draw, twins, score, Menu, Dial, Page, glyphs,
screen_words, sheet, main.
Tests: pytest tests/test_tasks.py
"""

import argparse
import functools
import random
import string
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

import rewards
from example import SPLITS, split_of
from pictures import PAPER, SCREEN, SHAPES, SIDE, STRIP_HEIGHT, Scene, Screen, Strip, Thing
from pictures import box_text, font, point_text, program_scene
from scenes import COLOUR_NAMES, LABELS, chart, chart_in_words, place
from sources import SOURCES
from texts import ATTRIBUTES, EMBLEMS, FACTS, NAMES, propose_program, propose_sort

ABILITIES = ("knowledge", "reasoning", "coding", "agentic")
MODALITIES = ("text", "vision")
JUDGES = {  # by the name that a task carries
    judge.__name__: judge
    for judge in (rewards.exact_match, rewards.number_match, rewards.count_score, rewards.box_f1, rewards.point_f1,
                  rewards.ocr_score, rewards.drawing_iou)
}  # fmt: skip


class TaskError(ValueError):
    """A task that does not exist: an unknown name, ability, level or split, or a level that is only held out."""


# --------------------------------------------------------------------------------- what is asked and shown


@dataclass(frozen=True)
class Page:
    """Lines of writing of one length, black on white: a Strip each, one below the other."""

    lines: tuple

    def render(self):
        """The RGB picture, 28 pixels per line."""
        strips = [Strip(line, "mono").render() for line in self.lines]
        image = Image.new("RGB", (strips[0].width, STRIP_HEIGHT * len(strips)), PAPER)
        for row, strip in enumerate(strips):
            image.paste(strip, (0, row * STRIP_HEIGHT))
        return image


@functools.cache
def glyphs():
    """The printable ASCII characters in the writing of a Page, as one RGB picture of 95 cells of 14 × 28 pixels and an
    empty one; the interpreter has it beside a picture of writing, so that a program can read by comparing."""
    return Page(("".join(map(chr, range(32, 127))),)).render()


def screen_words(screen):
    """The buttons of a Screen in words, each with its middle: `OK (21 29), GO (71 30), …`."""
    return ", ".join(f"{label} {screen.point(index)}" for index, label in enumerate(screen.labels))


def _pressed(screen, x, y):
    """The index of the button that a click at (x, y), integers 0…99, presses, or None."""
    x, y = (place * (SCREEN - 1) / 99 for place in (x, y))  # pixels
    for index in range(4):
        x1, y1, x2, y2 = screen.button(index)
        if x1 - 0.5 <= x <= x2 + 0.5 and y1 - 0.5 <= y <= y2 + 0.5:
            return index
    return None


@dataclass(frozen=True)
class Menu:
    """A program of pages with four buttons. The right one opens the next page, a wrong one the first; misses do nothing.

    A state is the index of a page; it is done behind the last one.
    """

    pages: tuple  # Screens
    path: tuple  # the right button of each, an index
    clicks: int  # at most
    start: int = 0

    def click(self, state, x, y):
        """The state after a click at (x, y), integers 0…99."""
        pressed = _pressed(self.pages[state], x, y)
        return state if pressed is None else state + 1 if pressed == self.path[state] else 0

    def screen(self, state):
        """What is shown: a Screen, or None once it is over."""
        return None if self.outcome(state) != "open" else self.pages[state]

    def outcome(self, state):
        """`open`, or `done`."""
        return "done" if state == len(self.pages) else "open"


@dataclass(frozen=True)
class Dial:
    """A number, buttons +1 and −1, and OK, which ends it: done at the goal, else failed. A state is a number, or the end."""

    start: int
    goal: int
    order: tuple  # of value, +1, -1, OK on the screen: a permutation of 0…3
    shifts: tuple
    tint: int
    clicks: int

    def click(self, state, x, y):
        """The state after a click at (x, y), integers 0…99."""
        pressed = _pressed(self.screen(state), x, y)
        action = 0 if pressed is None else self.order[pressed]
        if action == 3:
            return "done" if state == self.goal else "failed"
        return min(max(state + (0, 1, -1)[action], 0), 9)

    def screen(self, state):
        """As Menu.screen."""
        if self.outcome(state) != "open":
            return None
        return Screen(tuple((str(state), "+1", "-1", "OK")[part] for part in self.order), self.shifts, self.tint)

    def outcome(self, state):
        """`open`, `done` or `failed`."""
        return state if isinstance(state, str) else "open"


@dataclass(frozen=True)
class Content:
    """What both twins share."""

    questions: tuple  # the same question in several wordings, the shortest first
    asked: tuple  # what the question names: all that a program may be written from
    truth: str
    judge: str  # a key of JUDGES
    words: str  # what the picture shows
    pictures: tuple  # objects with render()
    key: str
    app: object = None  # Menu or Dial


@dataclass(frozen=True)
class Task:
    """A question, what it is about, and how an answer is judged. Twins differ in modality, shown, images, files and tools."""

    name: str  # of its Family
    ability: str
    modality: str  # "text" | "vision"
    difficulty: int  # level of its family, from 1
    split: str
    questions: tuple  # the same question in several wordings, the shortest first
    asked: tuple  # what the question names
    words: str  # what it is about, in words; "" for vision
    images: tuple  # what it is about, as RGB pictures; () for text
    files: tuple  # what a program finds as image.png, image1.png: the images and, beside writing, `glyphs()`
    truth: str = field(repr=False)
    judge: str  # a key of JUDGES: judge(answer, truth)
    passing: float  # score from which on an answer counts as right
    blind: float  # expected score without looking, at most
    tools: tuple  # names of tools that may be used
    max_steps: int  # assistant turns
    thinking: bool  # whether to reason before the answer
    key: str  # content; decides the split, the same for both twins
    app: object = field(default=None, repr=False)  # Menu or Dial: then its outcome is judged, not an answer

    def parts(self, wording=0, named=False):
        """The prompt as content parts of OpenAI's wire format, in the order of `images`.

        wording: int — which of the questions, modulo their number; named: bool —
        say what files hold the pictures, for who can run programs. Returns list of {"type": "image"} and {"type": "text"}.
        """
        lines = [self.words] if self.words else []
        if named and self.files:
            lines.append("image.png" if len(self.files) == 1 else "image.png, glyphs image1.png")
        text = "\n".join([*lines, self.questions[wording % len(self.questions)]])
        return [{"type": "image"} for _ in self.images] + [{"type": "text", "text": text}]


@dataclass(frozen=True)
class Family:
    """Tasks of one kind, by level."""

    name: str
    ability: str
    propose: Callable  # (what, how, level) → Content: two random.Random, of the question and answer and of all else
    blind: tuple  # expected score without looking, at most; by level from 1
    passing: float = 1.0
    tools: tuple = ((), ("python",))  # of the text and of the vision twin
    steps: tuple = (1, 3)  # likewise, assistant turns
    heldout_levels: int = 0  # so many of the hardest are never in training
    one_in: int = 10  # one content in this many is held out
    thinking: bool = False
    written: bool = False  # the picture is writing

    @property
    def levels(self):
        """All levels: 1, 2, …"""
        return tuple(range(1, len(self.blind) + 1))

    def training_levels(self):
        """Those that may be trained on."""
        return self.levels[: len(self.levels) - self.heldout_levels]

    def content(self, rng, split, level):
        """Content of a split. Raises TaskError when there seems to be none."""
        for _ in range(100):
            what = rng.getrandbits(64)
            for _ in range(100):
                content = self.propose(random.Random(what), rng, level)
                if split_of(content.key, self.one_in) == split:
                    return content
        raise TaskError(f"task {self.name!r} has no {split} content of level {level}: 10000 proposals were of the other split")

    def make(self, content, split, level, modality):
        """The Task of a content in one modality."""
        seen = modality == "vision"
        images = tuple(picture.render() for picture in content.pictures) if seen else ()
        return Task(
            name=self.name, ability=self.ability, modality=modality, difficulty=level, split=split,
            questions=content.questions, asked=content.asked, words="" if seen else content.words, images=images,
            files=(*images, glyphs()) if seen and self.written else images,
            truth=content.truth, judge=content.judge, passing=self.passing, blind=self.blind[level - 1],
            tools=self.tools[seen], max_steps=content.app.clicks if content.app else self.steps[seen],
            thinking=self.thinking, key=content.key, app=content.app,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------ knowledge


def _where(things):
    """Things in words, each with its middle, from top to bottom: what the picture shows and no less."""
    return ", ".join(f"{thing.words} {point_text(thing)}" for thing in _sorted(things))


def _extents(things):
    """Things in words, each with its pixels: `red circle x 3-25 y 30-52`."""
    return ", ".join(f"{t.words} x {t.x1}-{t.x2} y {t.y1}-{t.y2}" for t in _sorted(things))


def _sorted(things):
    return sorted(things, key=lambda thing: (thing.y1 + thing.y2, thing.x1))


def _scene(how, kinds, columns=3, smallest=11, largest=15):
    """A Scene of things of the given (colour, shape)s in different cells of a grid."""
    boxes = place(how, columns, how.sample(range(columns**2), len(kinds)), smallest, largest)
    return Scene(tuple(Thing(shape, colour, *box) for (colour, shape), box in zip(kinds, boxes)))


def _others(name, names):
    return [other for other in names if other != name]


def _colour(what, how, level):
    """The colour of the only thing; of the one of a shape; of the largest."""
    answer, shape = what.choice(COLOUR_NAMES), what.choice(SHAPES)
    if level == 1:
        scene, asked = _scene(how, [(answer, how.choice(SHAPES))], 2, 21, 25), ()
        questions = ("colour?", "which colour is it?", "name the colour")
    elif level == 2:
        other = how.choice(COLOUR_NAMES), how.choice(_others(shape, SHAPES))
        scene, asked = _scene(how, [(answer, shape), other], 2, 21, 25), (shape,)
        questions = (f"{shape} colour?", f"which colour is the {shape}?", f"name the colour of the {shape}")
    else:
        small = [(colour, how.choice(SHAPES)) for colour in how.sample(_others(answer, COLOUR_NAMES), 2)]
        cells, sides = how.sample(range(4), 3), (how.choice((23, 25)), how.choice((11, 13)), how.choice((11, 13)))
        boxes = [place(how, 2, [cell], side, side)[0] for cell, side in zip(cells, sides)]
        scene = Scene(tuple(Thing(shape, colour, *box) for (colour, shape), box in zip([(answer, "square"), *small], boxes)))
        asked, questions = ("largest",), ("largest colour?", "which colour is the largest thing?", "colour of the largest?")
    words = _where(scene.things) if level < 3 else _extents(scene.things)
    return Content(questions, asked, answer, "exact_match", words, (scene,), f"colour {words}")


def _read(what, how, level):
    """A word of two or three letters; of four or five; a short line of code. Writings are those of pre-training."""
    source = SOURCES["read_word" if level < 3 else "read_line"]
    lengths = {1: (2, 3), 2: (4, 5), 3: range(4, 11)}[level]
    while True:
        draft = source.propose(how)
        if len(draft.turns[0][1]) in lengths:
            break
    writing = draft.turns[0][1]
    questions = ("read?", "what is written?", "copy the writing")
    return Content(questions, (), writing, "ocr_score", f"letters {' '.join(writing)}", (Page((writing,)),), draft.key)


def _emblem(what, how, level):
    """Whose emblem it is; what is known of its owner."""
    if level == 1:
        name = what.choice(NAMES)
        answer, asked = name, ()
        questions = ("who?", "whose emblem is it?", "name the owner")
    else:
        attribute = what.choice(list(ATTRIBUTES))
        answer, asked = what.choice(ATTRIBUTES[attribute]), (attribute,)
        name = how.choice([name for name in NAMES if FACTS[name, attribute] == answer])
        questions = (f"{attribute}?", f"{attribute} of the owner?", f"which {attribute} has the owner?")
    scene = _scene(how, [EMBLEMS[name]], 2, 21, 25)
    words = _where(scene.things)
    return Content(questions, asked, answer, "exact_match", words, (scene,), f"emblem {asked} {words}")


def _lookup(what, how, level):
    """What is known of somebody whose name is written. The key is the fact: held-out ones are never asked in training."""
    attribute = what.choice(list(ATTRIBUTES))
    answer = what.choice(ATTRIBUTES[attribute])
    name = how.choice([name for name in NAMES if FACTS[name, attribute] == answer])
    questions = (f"{attribute}?", f"which {attribute}?", f"name the {attribute}")
    return Content(questions, (attribute,), answer, "exact_match", name, (Page((name,)),), f"knows {name} {attribute}")


# ------------------------------------------------------------------------------------------ reasoning


def _count(what, how, level):
    """One to four things; of a colour among others; of a colour and a shape."""
    number, colour, shape = what.randint(1, 4), what.choice(COLOUR_NAMES), what.choice(SHAPES)
    asked = ((), (colour,), (colour, shape))[level - 1]
    kinds = [(how.choice(COLOUR_NAMES) if level < 2 else colour, how.choice(SHAPES) if level < 3 else shape) for _ in range(number)]
    for _ in range(how.randint(1, 3) if level > 1 else 0):
        other = how.choice(_others(colour, COLOUR_NAMES)), how.choice(SHAPES)
        kinds.append((colour, how.choice(_others(shape, SHAPES))) if level == 3 and how.random() < 0.5 else other)
    scene = _scene(how, kinds)
    named, words = " ".join(asked), _where(scene.things)
    questions = (f"how many {named}".strip() + "?", f"count {named or 'things'}", f"number of {named or 'things'}?")
    return Content(questions, asked, str(number), "count_score", words, (scene,), f"count {words}")


def _measure(what, how, level):
    """Width or height of the only thing in pixels, or how many of them a bar covers."""
    side, asked = what.randrange(11, 42, 2), (("width",), ("height",), ("area",))[level - 1]
    other = how.randrange(11, 42, 2)
    width, height = (side, other) if level == 1 else (other, side)
    if level == 3:
        width, height = what.randint(5, 12), what.randint(5, 12)
    x, y = how.randint(0, SIDE - width), how.randint(0, SIDE - height)
    shape = "bar" if level == 3 else how.choice(SHAPES)
    thing = Thing(shape, how.choice(COLOUR_NAMES), x, y, x + width - 1, y + height - 1)
    truth, words = (width, height, width * height)[level - 1], _extents([thing])
    questions = (f"{asked[0]}?", f"{asked[0]} in pixels?", f"measure the {asked[0]}")
    return Content(questions, asked, str(truth), "count_score", words, (Scene((thing,)),), f"measure {words}")


def _places(what, how, level):
    """Scene and asked colour of `box` and `point`: the only thing; one of two colours; two things of a colour."""
    colour = what.choice(COLOUR_NAMES)
    kinds = [(colour, how.choice(SHAPES)) for _ in range(2 if level == 3 else 1)]
    if level > 1:
        kinds.append((how.choice(_others(colour, COLOUR_NAMES)), how.choice(SHAPES)))
    scene = _scene(how, kinds, 2, 15, 25)
    return scene, () if level == 1 else (colour,), [thing for thing in scene.things if thing.colour == colour]


def _box(what, how, level):
    """Boxes of things."""
    scene, asked, things = _places(what, how, level)
    named, words = " ".join(asked), ", ".join(f"{thing.words} {box_text(thing)}" for thing in _sorted(scene.things))
    questions = (f"{named} box?".strip(), f"box of {named or 'it'}?", f"where is {named or 'it'}? give the box")
    truth = " ".join(box_text(thing) for thing in _sorted(things))
    return Content(questions, asked, truth, "box_f1", words, (scene,), f"box {words}")


def _point(what, how, level):
    """Middles of things."""
    scene, asked, things = _places(what, how, level)
    named, words = " ".join(asked), ", ".join(f"{thing.words} {box_text(thing)}" for thing in _sorted(scene.things))
    questions = (f"{named} point?".strip(), f"middle of {named or 'it'}?", f"where is {named or 'it'}? give the middle")
    truth = " ".join(point_text(thing) for thing in _sorted(things))
    return Content(questions, asked, truth, "point_f1", words, (scene,), f"point {words}")


def _chart(what, how, level):
    """The value of a bar; the highest or lowest; the sum of two."""
    colours, values = how.sample(COLOUR_NAMES, 4), [how.randint(1, 5) for _ in range(4)]
    judge = "number_match"
    if level == 1:
        answer, asked = what.randint(1, 5), (what.choice(COLOUR_NAMES),)
        colours = [*asked, *how.sample(_others(asked[0], COLOUR_NAMES), 3)]
        values[0] = answer
        questions = (f"{asked[0]} value?", f"how high is {asked[0]}?", f"value of {asked[0]}?")
    elif level == 2:
        answer, word, judge = what.choice(COLOUR_NAMES), what.choice(("highest", "lowest")), "exact_match"
        colours = [answer, *how.sample(_others(answer, COLOUR_NAMES), 3)]
        values = sorted(how.sample(range(1, 6), 4), reverse=word == "highest")
        asked, questions = (word,), (f"{word}?", f"which is {word}?", f"colour of the {word} bar?")
    else:
        answer, asked = what.randint(2, 10), tuple(what.sample(COLOUR_NAMES, 2))
        colours = [*asked, *how.sample([colour for colour in COLOUR_NAMES if colour not in asked], 2)]
        values[0] = how.randint(max(1, answer - 5), min(5, answer - 1))
        values[1] = answer - values[0]
        first, second = asked
        questions = (f"{first}+{second}?", f"{first} plus {second}?", f"sum of {first} and {second}?")
    bars = list(zip(colours, values))
    how.shuffle(bars)
    words = chart_in_words(*zip(*bars))
    return Content(questions, asked, str(answer), judge, words, (chart(*zip(*bars)),), f"chart {words}")


def _terms(how, total, count, largest):
    """That many numbers 0…largest with that sum, in any order."""
    terms = []
    for rest in reversed(range(count)):  # terms still to come
        left = total - sum(terms)
        terms.append(how.randint(max(0, left - rest * largest), min(largest, left)))
    how.shuffle(terms)
    return terms


def _table(what, how, level):
    """One cell of two rows of three digits; the sum of two cells; the sum of a row."""
    rows = {name: [how.randint(0, 9) for _ in range(3)] for name in "xy"}
    if level == 1:
        row, column, answer = what.choice("xy"), what.choice("abc"), what.randint(0, 9)
        rows[row]["abc".index(column)] = answer
        asked, questions = (row, column), (f"{row}{column}?", f"row {row} column {column}?", f"cell {row}{column}?")
    elif level == 2:
        first, second = what.choice("abc"), what.choice("abc")
        answer, asked = what.randint(0, 18), (f"x{first}", f"y{second}")
        rows["x"]["abc".index(first)], rows["y"]["abc".index(second)] = _terms(how, answer, 2, 9)
        questions = ("{}+{}?".format(*asked), "{} plus {}?".format(*asked), "sum of {} and {}?".format(*asked))
    else:
        row, answer = what.choice("xy"), what.randint(0, 27)
        rows[row] = _terms(how, answer, 3, 9)
        asked, questions = (row,), (f"{row} sum?", f"sum of row {row}?", f"total of {row}?")
    words = "; ".join(f"{name}: " + " ".join(f"{c}{n}" for c, n in zip("abc", row)) for name, row in rows.items())
    page = Page((" abc", *(name + "".join(map(str, row)) for name, row in rows.items())))
    return Content(questions, asked, str(answer), "number_match", words, (page,), f"table {words}")


def _sum(what, how, level):
    """Two terms up to 19; two up to 99; three up to 19."""
    largest, count = ((19, 2), (99, 2), (19, 3))[level - 1]
    total = what.randint(0, largest * count)
    terms = _terms(how, total, count, largest)
    written = "+".join(map(str, terms))
    key = f"sum {' '.join(map(str, sorted(terms)))}"
    return Content(("sum?", "how much is it?", "work it out"), (), str(total), "number_match", written, (Page((written,)),), key)


def _price(what, how, level):
    """Things of a colour at a price each; of two colours; the same among others."""
    colours, prices = what.sample(COLOUR_NAMES, min(level, 2)), sorted(what.sample(range(2, 7), 2))[: min(level, 2)]
    counts = [what.randint(1, 4 if level == 1 else 3) for _ in colours]
    kinds = [(colour, how.choice(SHAPES)) for colour, count in zip(colours, counts) for _ in range(count)]
    others = [colour for colour in COLOUR_NAMES if colour not in colours]
    kinds += [(how.choice(others), how.choice(SHAPES)) for _ in range(how.randint(1, 3) if level == 3 else 0)]
    scene, asked = _scene(how, kinds), tuple(zip(colours, prices))
    prices_text, words = ", ".join(f"{colour} {price}" for colour, price in asked), _where(scene.things)
    questions = (f"{prices_text}: total?", f"at {prices_text}, total?", f"prices: {prices_text}. total?")
    total = sum(price * count for price, count in zip(prices, counts))
    return Content(questions, asked, str(total), "number_match", words, (scene,), f"price {words}")


CHAIN = (2, 3, 4, 5, 6, 7)  # additions by level


def _chain(what, how, level):
    """The last digit of a sum of digits in order of their labels, `k3 l8 m5`: one addition per level and one more."""
    count, answer = CHAIN[level - 1] + 1, what.randint(0, 9)
    first, digits = how.randint(0, 26 - count), [how.randint(0, 9) for _ in range(count - 1)]
    digits.append((answer - sum(digits)) % 10)
    pairs = [f"{label}{digit}" for label, digit in zip(string.ascii_lowercase[first:], digits)]
    words, questions = " ".join(pairs), ("chain?", "last digit of the sum?", "sum modulo 10?")
    return Content(questions, (), str(answer), "exact_match", words, (Page(("".join(pairs),)),), f"chain {words}")


# --------------------------------------------------------------------------------------------- coding


def _sketch(what, how, level):
    """A drawing program of one, two or three lines."""
    cells = sorted(how.sample(range(16), level))
    program = ";".join(f"{how.choice(SHAPES)} {how.choice(COLOUR_NAMES)} {cell % 4} {cell // 4}" for cell in cells)
    scene = program_scene(program)
    said = (f"a {thing.words} in column {cell % 4} row {cell // 4}" for thing, cell in zip(scene.things, cells))
    questions = ("code?", "write the drawing program", "which program draws it?")
    return Content(questions, (), program, "drawing_iou", ", ".join(said), (scene,), f"sketch {program}")


def _program(what, how, level):
    """What a program prints: one of pre-training's one-liners; assignments to x, one or two before the last."""
    if level == 1:
        draft = propose_program(how)
        ((prompt, answer),) = draft.turns
        program, key = prompt.removesuffix("#"), draft.key
    else:
        program, value = f"x={(first := how.randint(0, 9))}", first
        for _ in range(level - 1):
            sign, term = what.choice("+-*"), how.randint(1, 9) if level < 3 else how.randint(1, 4)
            program += f";x{sign}={term}"
            value = {"+": value + term, "-": value - term, "*": value * term}[sign]
        program, answer = f"{program};print(x)", str(value)
        key = program
    questions = ("prints?", "what does it print?", "output?")
    return Content(questions, (), answer, "exact_match", program, (Page((program,)),), key)


def _sort(what, how, level):
    """Three, four or five digits in ascending order."""
    if level == 1:
        draft = propose_sort(how)
        ((prompt, answer),) = draft.turns
        digits, key = prompt.removeprefix("Q:sort ").removesuffix("?A:").split(), draft.key
    else:
        digits = how.sample("0123456789", level + 2)
        answer = "".join(sorted(digits))
        key = f"order {list(map(int, answer))}"
    questions = ("sort?", "sort the digits", "digits in ascending order?")
    return Content(questions, (), answer, "exact_match", " ".join(digits), (Page(("".join(digits),)),), key)


# -------------------------------------------------------------------------------------------- agentic


def _shifts(how):
    return tuple((how.randint(0, 4), how.randint(0, 4)) for _ in range(4))


def _app(questions, asked, app):
    screen = app.screen(app.start)
    return Content(questions, asked, "done", "exact_match", screen_words(screen), (screen,), f"app {app}", app)


def _menu(what, how, level):
    """One, two or three buttons to click, a page each; one click more may be used."""
    path, labels = tuple(what.randrange(4) for _ in range(level)), tuple(what.choice(LABELS) for _ in range(level))
    pages = []
    for index, label in zip(path, labels):
        others = how.sample(_others(label, LABELS), 3)
        pages.append(Screen((*others[:index], label, *others[index:]), _shifts(how), how.randrange(3)))
    listed = ", ".join(labels)
    questions = (f"click {listed}", f"press {listed}", f"go to {listed}")
    return _app(questions, labels, Menu(tuple(pages), path, level + 1))


def _dial(what, how, level):
    """A number to be changed by one, two or three and confirmed; one click more may be used."""
    start, change = what.randint(level, 9 - level), what.choice((-level, level))
    dial = Dial(start, start + change, tuple(how.sample(range(4), 4)), _shifts(how), how.randrange(3), level + 2)
    goal = dial.goal
    return _app((f"set {goal}, OK", f"set it to {goal}, then OK", f"{goal}, then OK"), (str(goal), "OK"), dial)


_CLICK = {"tools": (("click",), ("click",)), "steps": (0, 0)}  # the app says how many
_ALL = (
    Family("colour", "knowledge", _colour, (0.2, 0.2, 0.2)),
    Family("read", "knowledge", _read, (0.2, 0.2, 0.25), written=True),
    Family("emblem", "knowledge", _emblem, (1 / 12, 0.25)),
    Family("lookup", "knowledge", _lookup, (0.35,), one_in=4, written=True),
    Family("count", "reasoning", _count, (0.59, 0.59, 0.59)),
    Family("measure", "reasoning", _measure, (0.21, 0.21, 0.15)),
    Family("box", "reasoning", _box, (0.27, 0.27, 0.45), passing=0.75),
    Family("point", "reasoning", _point, (0.26, 0.26, 0.45), passing=0.75),
    Family("chart", "reasoning", _chart, (0.2, 0.2, 1 / 9)),
    Family("table", "reasoning", _table, (0.1, 1 / 19, 1 / 28), written=True),
    Family("sum", "reasoning", _sum, (0.06, 0.04, 0.04), written=True),
    Family("price", "reasoning", _price, (0.25, 0.22, 0.22)),
    Family("chain", "reasoning", _chain, (0.1,) * len(CHAIN), heldout_levels=1, thinking=True, written=True),
    Family("sketch", "coding", _sketch, (0.05, 0.03, 0.03), passing=0.99),
    Family("program", "coding", _program, (0.15, 0.11, 0.1), written=True),
    Family("sort", "coding", _sort, (0.15, 0.05, 0.05), written=True),
    Family("menu", "agentic", _menu, (1 / 2, 1 / 8, 1 / 32), **_CLICK),
    Family("dial", "agentic", _dial, (1 / 6, 1 / 8, 1 / 8), **_CLICK),
)
TASKS = {family.name: family for family in _ALL}


# -------------------------------------------------------------------------------------------- drawing


def _choose(rng, name, ability, split, difficulty):
    """(Family, level): by name, or uniformly of an ability, or of all; uniformly of the levels of the split."""
    if split not in SPLITS:
        raise TaskError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    if name is not None and name not in TASKS:
        raise TaskError(f"no task {name!r}: use one of {', '.join(TASKS)}")
    if ability is not None and ability not in ABILITIES:
        raise TaskError(f"no ability {ability!r}: use one of {', '.join(ABILITIES)}")
    families = [family for family in _ALL if name in (None, family.name) and ability in (None, family.ability)]
    if not families:
        raise TaskError(f"task {name!r} is of ability {TASKS[name].ability!r}, not {ability!r}")
    family = rng.choice(families)
    level = rng.choice(family.training_levels())
    if difficulty is not None:
        allowed = family.levels if split == "heldout" else family.training_levels()
        if difficulty not in allowed:
            raise TaskError(f"task {family.name!r} has no {split} level {difficulty!r}: use one of {', '.join(map(str, allowed))}")
        level = difficulty
    return family, level


def draw(rng, name=None, ability=None, modality=None, split="train", difficulty=None):
    """A Task; all randomness comes from `rng`, and asking for one modality or the other gives twins.

    name: of TASKS, None is any; ability: of ABILITIES; modality: of MODALITIES, None is either; split: "train" or
    "heldout"; difficulty: int — a level of the family, None is any that may be trained on. Raises TaskError.
    """
    if modality not in (None, *MODALITIES):
        raise TaskError(f"no modality {modality!r}: use one of {', '.join(MODALITIES)}")
    family, level = _choose(rng, name, ability, split, difficulty)
    either = rng.choice(MODALITIES)
    return family.make(family.content(rng, split, level), split, level, modality or either)


def twins(rng, name=None, ability=None, split="train", difficulty=None):
    """(vision Task, text Task) of one content; arguments as of `draw`."""
    family, level = _choose(rng, name, ability, split, difficulty)
    content = family.content(rng, split, level)
    return family.make(content, split, level, "vision"), family.make(content, split, level, "text")


def score(task, answer):
    """What an answer to a task is worth; for one with an app, the answer is the app's outcome. Returns rewards.Score."""
    return JUDGES[task.judge](answer, task.truth)


# --------------------------------------------------------------------------------------- command line


def sheet(path, seed=0, names=None):
    """Write a PNG: a row per family, a column per level; the picture, its question and truth, and the twin in words."""
    families = [TASKS[name] for name in names or TASKS]
    width, height, margin = 300, 190, 84
    columns = max(len(family.levels) for family in families)
    image = Image.new("RGB", (margin + columns * width, len(families) * height), (235, 235, 235))
    pen, face = ImageDraw.Draw(image), font("mono", 11)
    for row, family in enumerate(families):
        top = row * height + 4
        pen.multiline_text((4, top), f"{family.name}\n\n{family.ability}", "black", face)
        for column, level in enumerate(family.levels):
            seen, read = twins(random.Random(f"{seed} {family.name} {level}"), family.name, None, "heldout", level)
            left = margin + column * width
            for picture in seen.images:
                image.paste(picture, (left, top))
            lines = [f"{' | '.join(seen.questions)}", f"= {seen.truth}", f"blind {seen.blind:.3f}", f"twin: {read.words}"]
            wrapped = [line for text in lines for line in textwrap.wrap(text, 42, break_on_hyphens=False)]
            pen.multiline_text((left, top + 88), "\n".join(wrapped[:8]), "black", face, spacing=1)
    image.save(path)


def main(arguments=None):
    """`list` and `sheet`. Exit code 2 with one line on misuse."""
    parser = argparse.ArgumentParser(prog="tasks.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="families, abilities, chances of who does not look")
    command = commands.add_parser("sheet", help="a picture of every family and level, with its twin in words")
    command.add_argument("--out", required=True, metavar="PNG")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--task", action="append", metavar="NAME", help="only this family; may be repeated")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            for family in TASKS.values():
                blind = " ".join(f"{chance:.3f}" for chance in family.blind)
                print(f"{family.name:9} {family.ability:10} pass {family.passing:<5g} blind {blind}")
            return
        for name in options.task or ():
            _choose(random.Random(0), name, None, "train", None)
        sheet(options.out, options.seed, options.task)
        print(f"wrote {options.out}")
    except (ValueError, OSError) as error:
        print(f"tasks.py {options.command}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
