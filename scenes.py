"""Questions and captions about drawn pictures: scenes, charts, GUI screens, films, drawing programs.

Each propose_* takes a random.Random and returns a Draft whose picture is not rendered yet. For every question
the choices are drawn first and the answer uniformly among them, so that nobody who does not see the picture
can do better than chance. K2.5 report 4.2: caption, perception, knowledge, video, agent, image and code pairs.

Public: propose_* (rng -> Draft), place, chart, chart_in_words.
Tests: .venv/bin/python -m pytest tests/test_sources.py
"""

import random

from example import Draft, pick
from pictures import (
    COLOURS, SHAPES, SIDE, Film, Scene, Screen, Thing, box_text, contour_text, point_text, program_scene,
)  # fmt: skip
from texts import ATTRIBUTES, EMBLEMS, FACTS, NAMES, fact_choices

COLOUR_NAMES = tuple(COLOURS)
PLACES = ("left", "right", "top", "bottom")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LABELS = ("OK", "NO", "GO", "UP", "ON", "BY", "ME", "IF")


def place(rng: random.Random, columns: int, cells, smallest: int, largest: int) -> list:
    """A pixel box (x1, y1, x2, y2) in each of the given cells of a columns x columns grid.

    Boxes are square with an odd side in smallest..largest and stay at least one pixel inside their cell, so
    that no two touch.
    """
    cell = SIDE // columns
    boxes = []
    for row, column in (divmod(index, columns) for index in cells):
        side = rng.randrange(smallest, largest + 1, 2)
        x = column * cell + rng.randint(1, cell - 1 - side)
        y = row * cell + rng.randint(1, cell - 1 - side)
        boxes.append((x, y, x + side - 1, y + side - 1))
    return boxes


def _one_box(rng: random.Random) -> tuple:
    return place(rng, 2, [rng.randrange(4)], 21, 25)[0]


def _two_boxes(rng: random.Random) -> list:
    return place(rng, 2, rng.sample(range(4), 2), 21, 25)


def _list_in_words(things) -> str:
    """The things from top to bottom, an order that a mirror keeps."""
    return ",".join(thing.words for thing in sorted(things, key=lambda t: (t.y1 + t.y2, t.y1)))


def propose_colour(rng: random.Random) -> Draft:
    """`Q:colour?` of the only thing, or `Q:circle colour?` beside a thing of another shape."""
    answer, choices = pick(rng, COLOUR_NAMES)
    shape, other_shape = rng.sample(SHAPES, 2)
    if rng.random() < 0.75:
        scene = Scene((Thing(shape, answer, *_one_box(rng)),))
        prompt = "<image>Q:colour?A:"
    else:
        box, other_box = _two_boxes(rng)
        other_colour = rng.choice([colour for colour in COLOUR_NAMES if colour != answer])
        scene = Scene((Thing(shape, answer, *box), Thing(other_shape, other_colour, *other_box)))
        prompt = f"<image>Q:{shape} colour?A:"
    return Draft(((prompt, answer),), scene.key(), choices, (scene,), True, _list_in_words(scene.things))


def propose_shape(rng: random.Random) -> Draft:
    """`Q:shape?` of the only thing, or `Q:red shape?` beside a thing of another colour."""
    answer, choices = pick(rng, SHAPES)
    colour, other_colour = rng.sample(COLOUR_NAMES, 2)
    if rng.random() < 0.75:
        scene = Scene((Thing(answer, colour, *_one_box(rng)),))
        prompt = "<image>Q:shape?A:"
    else:
        box, other_box = _two_boxes(rng)
        other_shape = rng.choice([shape for shape in SHAPES if shape != answer])
        scene = Scene((Thing(answer, colour, *box), Thing(other_shape, other_colour, *other_box)))
        prompt = f"<image>Q:{colour} shape?A:"
    return Draft(((prompt, answer),), scene.key(), choices, (scene,), True, _list_in_words(scene.things))


def propose_emblem(rng: random.Random) -> Draft:
    """Whose emblem is shown, or what the table of facts says about its owner."""
    if rng.random() < 0.75:
        name, choices = pick(rng, NAMES)
        prompt, answer = "<image>Q:who?A:", name
    else:
        attribute = rng.choice(list(ATTRIBUTES))
        answer, choices = pick(rng, ATTRIBUTES[attribute])
        name = rng.choice([name for name in NAMES if FACTS[name, attribute] == answer])
        prompt = f"<image>Q:{attribute}?A:"
    colour, shape = EMBLEMS[name]
    scene = Scene((Thing(shape, colour, *_one_box(rng)),))
    return Draft(((prompt, answer),), scene.key(), choices, (scene,), True)


def propose_count(rng: random.Random) -> Draft:
    """`Q:how many?` of one to four things, or `Q:how many red?` among others."""
    answer, choices = pick(rng, "1234")
    counted = int(answer)
    if rng.random() < 0.7:
        colours = rng.choices(COLOUR_NAMES, k=counted)
        prompt = "<image>Q:how many?A:"
    else:
        colour = rng.choice(COLOUR_NAMES)
        others = [name for name in COLOUR_NAMES if name != colour]
        colours = [colour] * counted + rng.choices(others, k=rng.randint(1, 3))
        prompt = f"<image>Q:how many {colour}?A:"
    boxes = place(rng, 3, rng.sample(range(9), len(colours)), 11, 15)
    scene = Scene(tuple(Thing(rng.choice(SHAPES), colour, *box) for colour, box in zip(colours, boxes)))
    return Draft(((prompt, answer),), scene.key(), choices, (scene,), True, _list_in_words(scene.things))


def _thing_at(rng: random.Random, where: str) -> Thing:
    """A thing near the middle of one edge of the picture."""
    side = rng.randrange(15, 26, 2)
    along = rng.randint(1, 5)  # gap to the edge it is near
    if where in ("right", "bottom"):
        along = SIDE - side - along
    across = (SIDE - side) // 2 + rng.randint(-6, 6)
    x, y = (along, across) if where in ("left", "right") else (across, along)
    return Thing(rng.choice(SHAPES), rng.choice(COLOUR_NAMES), x, y, x + side - 1, y + side - 1)


def propose_where(rng: random.Random) -> Draft:
    """`Q:where?`: near which edge the only thing is."""
    answer, choices = pick(rng, PLACES)
    thing = _thing_at(rng, answer)
    scene = Scene((thing,))
    words = f"{thing.words} at {answer}"
    return Draft((("<image>Q:where?A:", answer),), scene.key(), choices, (scene,), True, words)


def _neighbours(rng: random.Random, colours) -> tuple[Scene, bool]:
    """Two things side by side (first the left one) or one above the other (first the upper one)."""
    beside = rng.random() < 0.5
    cells = rng.choice(((0, 1), (2, 3)) if beside else ((0, 2), (1, 3)))
    boxes = place(rng, 2, cells, 21, 25)
    things = (Thing(rng.choice(SHAPES), colour, *box) for colour, box in zip(colours, boxes))
    return Scene(tuple(things)), beside


def _neighbours_in_words(scene: Scene, beside: bool) -> str:
    first, second = scene.things
    return f"{first.words} {'left of' if beside else 'above'} {second.words}"


def propose_side(rng: random.Random) -> Draft:
    """`Q:left?`: the colour of the left one of two things; right, top and bottom as well."""
    answer, choices = pick(rng, COLOUR_NAMES)
    other = rng.choice([colour for colour in choices if colour != answer])
    asked = rng.randrange(2)  # the first or the second of the two
    scene, beside = _neighbours(rng, (other, answer) if asked else (answer, other))
    word = (("top", "bottom"), ("left", "right"))[beside][asked]
    words = _neighbours_in_words(scene, beside)
    return Draft(((f"<image>Q:{word}?A:", answer),), scene.key(), choices, (scene,), True, words)


UNIT = 10  # pixels of a chart per unit of value


def chart(colours, values) -> Scene:
    """Four bars standing on the ruled line of zero."""
    floor = SIDE - 3
    bars = []
    for index, (colour, value) in enumerate(zip(colours, values)):
        x = 14 * index + 2
        bars.append(Thing("bar", colour, x, floor - UNIT * value, x + 9, floor - 1))
    return Scene(tuple(bars), rules=tuple(floor - UNIT * value for value in range(6)))


def chart_in_words(colours, values) -> str:
    """`red 3,blue 5,yellow 1,black 2`, from left to right."""
    return ",".join(f"{colour} {value}" for colour, value in zip(colours, values))


def propose_chart_highest(rng: random.Random) -> Draft:
    """`Q:highest?` or `Q:lowest?`: the colour of the bar, all bars being different."""
    answer, choices = pick(rng, COLOUR_NAMES)
    values = sorted(rng.sample(range(1, 6), 4))
    word = rng.choice(("highest", "lowest"))
    extreme = values.pop() if word == "highest" else values.pop(0)
    others = rng.sample([colour for colour in choices if colour != answer], 3)
    bars = [(answer, extreme), *zip(others, values)]
    rng.shuffle(bars)
    colours, values = zip(*bars)
    scene, words = chart(colours, values), chart_in_words(colours, values)
    return Draft(((f"<image>Q:{word}?A:", answer),), scene.key(), choices, (scene,), True, words)


def propose_chart_value(rng: random.Random) -> Draft:
    """`Q:red value?`: how many units high the bar is."""
    answer, choices = pick(rng, "12345")
    colours = rng.sample(COLOUR_NAMES, 4)
    asked = rng.randrange(4)
    values = [rng.randint(1, 5) for _ in colours]
    values[asked] = int(answer)
    scene, words = chart(colours, values), chart_in_words(colours, values)
    prompt = f"<image>Q:{colours[asked]} value?A:"
    return Draft(((prompt, answer),), scene.key(), choices, (scene,), True, words)


def propose_ground(rng: random.Random) -> Draft:
    """`Q:box?` / `Q:point?` / `Q:contour?` of the only thing, or `Q:red box?` beside another.

    The choices are the same shape at the four places of a 2 x 2 grid.
    """
    word, write = rng.choice((("box", box_text), ("point", point_text), ("contour", contour_text)))
    shape = rng.choice(("circle", "square", "triangle"))
    colour, other_colour = rng.sample(COLOUR_NAMES, 2)
    candidates = [Thing(shape, colour, *box) for box in place(rng, 2, range(4), 21, 25)]
    thing, choices = pick(rng, candidates)
    things, prompt = (thing,), f"<image>Q:{word}?A:"
    if rng.random() < 0.3:
        elsewhere = rng.choice([t for t in candidates if t != thing])
        box = (elsewhere.x1, elsewhere.y1, elsewhere.x2, elsewhere.y2)
        things += (Thing(rng.choice(SHAPES), other_colour, *box),)
        prompt = f"<image>Q:{colour} {word}?A:"
    scene = Scene(things)
    return Draft(((prompt, write(thing)),), scene.key(), tuple(map(write, choices)), (scene,), True)


def propose_click(rng: random.Random) -> Draft:
    """`Q:click OK?`: the centre of the button so labelled, on a screen of four buttons."""
    labels = rng.sample(LABELS, 4)
    screen = Screen(tuple(labels), tuple((rng.randint(0, 4), rng.randint(0, 4)) for _ in labels), rng.randrange(3))
    index, chosen = pick(rng, range(4))
    choices = tuple(screen.point(i) for i in chosen)
    prompt = f"<image>Q:click {labels[index]}?A:"
    return Draft(((prompt, screen.point(index)),), screen.key(), choices, (screen,))


def _program(rng: random.Random, lines: int) -> str:
    """A drawing program of that many shapes in different cells, in reading order."""
    cells = sorted(rng.sample(range(16), lines))
    return ";".join(f"{rng.choice(SHAPES)} {rng.choice(COLOUR_NAMES)} {cell % 4} {cell // 4}" for cell in cells)


def propose_sketch(rng: random.Random) -> Draft:
    """`Q:code?`: the drawing program of the picture, of one or two lines."""
    lines = 1 if rng.random() < 0.75 else 2
    programs = set()
    while len(programs) < 4:
        programs.add(_program(rng, lines))
    answer, choices = pick(rng, sorted(programs))
    scene = program_scene(answer)
    return Draft((("<image>Q:code?A:", answer),), scene.key(), choices, (scene,))


def propose_run_sketch(rng: random.Random) -> Draft:
    """What a drawing program of two lines draws, in words: the colour at the left, right, top or bottom."""
    word = rng.choice(PLACES)
    axis = 0 if word in ("left", "right") else 1
    near, far = sorted(rng.sample(range(4), 2))
    answer, choices = pick(rng, COLOUR_NAMES)
    other = rng.choice([colour for colour in choices if colour != answer])
    if word in ("right", "bottom"):
        near, far = far, near
    lines = []
    for colour, along in ((answer, near), (other, far)):
        cell = (along, rng.randrange(4)) if axis == 0 else (rng.randrange(4), along)
        lines.append(f"{rng.choice(SHAPES)} {colour} {cell[0]} {cell[1]}")
    rng.shuffle(lines)
    prompt = f"{';'.join(lines)}#{word}="
    return Draft(((prompt, answer),), prompt, choices)


def propose_motion(rng: random.Random) -> Draft:
    """`Q:moves?`: left, right, up or down. A film and its reverse show the same pictures in another order."""
    answer, choices = pick(rng, tuple(DIRECTIONS))
    dx, dy = DIRECTIONS[answer]
    side, step = rng.randrange(15, 22, 2), rng.randint(8, 10)
    along = rng.randint(1, SIDE - side - 3 * step - 1)
    across = rng.randint(1, SIDE - side - 1)
    shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
    frames = []
    for frame in range(4) if dx + dy > 0 else range(3, -1, -1):
        x, y = (along + step * frame, across) if dx else (across, along + step * frame)
        frames.append(Scene((Thing(shape, colour, x, y, x + side - 1, y + side - 1),)))
    film = Film(tuple(frames))
    return Draft((("<video>Q:moves?A:", answer),), film.key(), choices, (film,), True)


def propose_order(rng: random.Random) -> Draft:
    """`Q:first?` or `Q:last?`: the colour of the thing that appeared first or last."""
    answer, choices = pick(rng, COLOUR_NAMES)
    other = rng.choice([colour for colour in choices if colour != answer])
    word = rng.choice(("first", "last"))
    early, late = (answer, other) if word == "first" else (other, answer)
    boxes = _two_boxes(rng)
    first = Thing(rng.choice(SHAPES), early, *boxes[0])
    second = Thing(rng.choice(SHAPES), late, *boxes[1])
    starts = rng.randint(1, 3)  # the frame in which the second appears
    film = Film(tuple(Scene((first,) if frame < starts else (first, second)) for frame in range(4)))
    return Draft(((f"<video>Q:{word}?A:", answer),), film.key(), choices, (film,), True)


def propose_caption(rng: random.Random) -> Draft:
    """One to three things in words; two are related, three are listed from top to bottom."""
    chance = rng.random()
    if chance < 0.4:
        thing = Thing(rng.choice(SHAPES), rng.choice(COLOUR_NAMES), *_one_box(rng))
        scene, words = Scene((thing,)), thing.words
    elif chance < 0.6:
        where = rng.choice(PLACES)
        thing = _thing_at(rng, where)
        scene, words = Scene((thing,)), f"{thing.words} at {where}"
    elif chance < 0.85:
        scene, beside = _neighbours(rng, rng.choices(COLOUR_NAMES, k=2))
        words = _neighbours_in_words(scene, beside)
    else:
        rows = [3 * row + rng.randrange(3) for row in range(3)]
        boxes = place(rng, 3, rows, 11, 15)
        scene = Scene(tuple(Thing(rng.choice(SHAPES), rng.choice(COLOUR_NAMES), *box) for box in boxes))
        words = _list_in_words(scene.things)
    return Draft((("<image>", words),), scene.key(), (), (scene,), True)


def propose_interview(rng: random.Random) -> Draft:
    """Several questions about one picture: more to learn from the same pixels."""
    if rng.random() < 0.6:
        where = rng.choice(PLACES)
        thing = _thing_at(rng, where)
        scene = Scene((thing,))
        turns = [("Q:colour?A:", thing.colour), ("Q:shape?A:", thing.shape), ("Q:where?A:", where)]
    else:
        colours, values = rng.sample(COLOUR_NAMES, 4), [rng.randint(1, 5) for _ in range(4)]
        scene = chart(colours, values)
        turns = [(f"Q:{colour} value?A:", str(value)) for colour, value in zip(colours, values)]
    rng.shuffle(turns)
    turns[0] = ("<image>" + turns[0][0], turns[0][1])
    return Draft(tuple(turns), scene.key(), (), (scene,), True)
