"""Pictures drawn from descriptions: shapes, bar charts, films, GUI screens, written strips, drawing programs.

Every picture is a small frozen description with `render()`; the same description always gives the same
pixels, and shapes are masks computed from a formula, so a mirrored description renders to the mirrored image.

Public: COLOURS, SHAPES, SIDE, Thing, Scene, Film, Screen, Strip, FONTS, font; scale, box_text, point_text,
contour_text; program_scene, draw_program, DrawError.
Tests: .venv/bin/python -m pytest tests/test_sources.py
"""

import functools
import pathlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from media import Clip

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 195, 0),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "plus")
PAPER = (255, 255, 255)
RULE = (205, 205, 205)
SIDE = 56  # pixels of a scene: 4x4 patches, 4 media tokens


class DrawError(ValueError):
    """A drawing program that cannot be executed."""


@functools.lru_cache(maxsize=None)
def _mask(shape: str, width: int, height: int) -> Image.Image:
    """The shape filling its box, as a 1-bit mask symmetric about the vertical axis."""
    x = np.arange(width) - (width - 1) / 2  # (width,), signed distance from the vertical axis
    y = np.arange(height)[:, None] - (height - 1) / 2  # (height, 1)
    if shape in ("square", "bar"):
        inside = np.ones((height, width), bool)
    elif shape == "circle":
        inside = (x / width) ** 2 + (y / height) ** 2 <= 0.25
    elif shape == "triangle":  # apex up: the half-width grows from 0 at the top to the box's at the bottom
        inside = np.abs(x) <= (y / (height - 1) + 0.5) * width / 2
    else:
        inside = (np.abs(x) <= width / 6) | (np.abs(y) <= height / 6)
    return Image.fromarray(np.uint8(inside) * 255)


@dataclass(frozen=True)
class Thing:
    """One shape, filling the pixel box x1..x2, y1..y2 (both ends included)."""

    shape: str  # one of SHAPES, or "bar" (a rectangle of a chart)
    colour: str  # a name of COLOURS
    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def words(self) -> str:
        """Its name: `red circle`."""
        return f"{self.colour} {self.shape}"

    def draw_on(self, image: Image.Image) -> None:
        """Paint it over what the picture shows already."""
        mask = _mask(self.shape, self.x2 - self.x1 + 1, self.y2 - self.y1 + 1)
        image.paste(COLOURS[self.colour], (self.x1, self.y1), mask)


@dataclass(frozen=True)
class Scene:
    """A square picture of things that do not overlap, perhaps ruled like chart paper."""

    things: tuple
    rules: tuple = ()  # y of horizontal grey lines, in pixels

    def mirrored(self) -> "Scene":
        """The scene whose picture is this one's, flipped left to right."""
        flip = tuple(Thing(t.shape, t.colour, SIDE - 1 - t.x2, t.y1, SIDE - 1 - t.x1, t.y2) for t in self.things)
        return Scene(flip, self.rules)

    def line(self) -> str:
        """The picture as one line of text, whatever the order of its things."""
        things = (f"{t.shape} {t.colour} {t.x1} {t.y1} {t.x2} {t.y2}" for t in self.things)
        return ";".join(sorted(things))

    def key(self) -> str:
        """One string per picture and its mirror image: a mirrored training scene is never a held-out one."""
        return min(self.line(), self.mirrored().line())

    def render(self) -> Image.Image:
        """The RGB picture."""
        image = Image.new("RGB", (SIDE, SIDE), PAPER)
        for y in self.rules:
            image.paste(RULE, (0, y, SIDE, y + 1))
        for thing in self.things:
            thing.draw_on(image)
        return image


@dataclass(frozen=True)
class Film:
    """A short video: one scene per frame, two frames per second."""

    scenes: tuple

    def key(self) -> str:
        """As Scene.key."""
        return min("/".join(s.line() for s in film) for film in (self.scenes, [s.mirrored() for s in self.scenes]))

    def render(self) -> Clip:
        """The RGB frames."""
        return Clip(tuple(scene.render() for scene in self.scenes), 2.0)


def scale(pixel: float, extent: int) -> int:
    """A pixel's place as an integer 0..99 of the extent: round(99 * pixel / (extent - 1)).

    The mirrored pixel extent - 1 - pixel has the place 99 - scale(pixel), as `example.mirror` assumes.
    """
    return int(99 * pixel / (extent - 1) + 0.5)


def _numbers(points, extent: int) -> str:
    return " ".join(str(scale(value, extent)) for point in points for value in point)


def box_text(thing: Thing) -> str:
    """`[x1 y1 x2 y2]`, the first and last pixel column and row of the thing."""
    return f"[{_numbers([(thing.x1, thing.y1), (thing.x2, thing.y2)], SIDE)}]"


def _centre(x1, y1, x2, y2) -> tuple:
    return (x1 + x2) / 2, (y1 + y2) / 2


def point_text(thing: Thing) -> str:
    """`(x y)`, the middle of the thing."""
    return f"({_numbers([_centre(thing.x1, thing.y1, thing.x2, thing.y2)], SIDE)})"


def contour_text(thing: Thing) -> str:
    """`{x y x y ...}`, the corners of the thing's outline, clockwise from the top; a circle has eight.

    Raises DrawError for a shape without a short outline.
    """
    x1, y1, x2, y2 = thing.x1, thing.y1, thing.x2, thing.y2
    middle_x, middle_y = _centre(x1, y1, x2, y2)
    if thing.shape == "triangle":
        corners = [(middle_x, y1), (x2, y2), (x1, y2)]
    elif thing.shape == "square":
        corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    elif thing.shape == "circle":
        angles = (np.arange(8) + 0.5) * np.pi / 4
        corners = [(middle_x + np.sin(a) * (x2 - x1) / 2, middle_y - np.cos(a) * (y2 - y1) / 2) for a in angles]
    else:
        raise DrawError(f"no contour for a {thing.shape}: use a circle, square or triangle")
    return "{" + _numbers(corners, SIDE) + "}"


CELLS = 4  # a drawing program's grid: one 14-pixel patch per cell


def program_scene(program: str) -> Scene:
    """Execute a drawing program: lines (or parts between `;`) `shape colour column row`, columns and rows 0..3.

    Raises DrawError naming the line that cannot be executed and why.
    """
    cell, things = SIDE // CELLS, []
    for number, line in enumerate(program.replace(";", "\n").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 4:
            raise DrawError(f"line {number} {line!r}: write four words, `shape colour column row`")
        shape, colour, *place = words
        if shape not in SHAPES:
            raise DrawError(f"line {number}: unknown shape {shape!r}, use one of {', '.join(SHAPES)}")
        if colour not in COLOURS:
            raise DrawError(f"line {number}: unknown colour {colour!r}, use one of {', '.join(COLOURS)}")
        if not all(word in ("0", "1", "2", "3") for word in place):
            raise DrawError(f"line {number}: column and row {' '.join(place)!r} must be numbers 0..{CELLS - 1}")
        x, y = (cell * int(word) for word in place)
        things.append(Thing(shape, colour, x, y, x + cell - 2, y + cell - 2))
    return Scene(tuple(things))


def draw_program(program: str) -> Image.Image:
    """The 56 x 56 picture that a drawing program draws; later lines cover earlier ones."""
    return program_scene(program).render()


FONTS = {  # files of matplotlib's own font folder
    "mono": "DejaVuSansMono.ttf",
    "sans": "DejaVuSans.ttf",
    "serif": "DejaVuSerif.ttf",
    "stix": "STIXGeneral.ttf",
    "monobold": "DejaVuSansMono-Bold.ttf",
}


@functools.lru_cache(maxsize=None)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of FONTS at a size in pixels; the same layout engine everywhere, so the same pixels everywhere."""
    import matplotlib  # its fonts alone are wanted, and only where something is written

    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", FONTS[name])
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


STRIP_HEIGHT = 28
BASELINE = 20
CHARACTER = 14  # pixels a character of the mono font advances at size 23: one patch


@dataclass(frozen=True)
class Strip:
    """A line of writing, black on white, as large as fits a strip of 28 pixels in height."""

    text: str
    typeface: str  # a name of FONTS
    dx: int = 0  # jitter of the writing, in pixels
    dy: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels: 14 per character, rounded up to whole 28-pixel tokens."""
        return -(-CHARACTER * len(self.text) // 28) * 28, STRIP_HEIGHT

    def render(self) -> Image.Image:
        """The RGB picture."""
        width, height = self.size
        image = Image.new("RGB", self.size, PAPER)
        for points in range(23, 5, -1):
            face = font(self.typeface, points)
            left, top, right, bottom = face.getbbox(self.text, anchor="ls")
            if right - left <= width and bottom - top <= height:
                break
        # Jitter, but never past the border of the strip.
        x = min(max(self.dx, -left), width - right)
        y = min(max(BASELINE + self.dy, -top), height - bottom)
        ImageDraw.Draw(image).text((x, y), self.text, COLOURS["black"], face, anchor="ls")
        return image


SCREEN = 84  # pixels of a GUI screen: 6x6 patches, 9 media tokens
TINTS = ((225, 225, 230), (205, 225, 250), (250, 230, 200))  # of buttons


@dataclass(frozen=True)
class Screen:
    """A window with a title bar and four labelled buttons in two rows.

    labels: four short texts, in reading order; shifts: (dx, dy) in 0..4 of each button; tint: index of TINTS.
    """

    labels: tuple
    shifts: tuple
    tint: int

    def button(self, index: int) -> tuple[int, int, int, int]:
        """The pixel box (x1, y1, x2, y2) of a button, both ends included."""
        (row, column), (dx, dy) = divmod(index, 2), self.shifts[index]
        x, y = 42 * column + 1 + dx, 12 + 36 * row + dy
        return x, y, x + 36, y + 28

    def point(self, index: int) -> str:
        """`(x y)`, the middle of a button."""
        return f"({_numbers([_centre(*self.button(index))], SCREEN)})"

    def key(self) -> str:
        """One string per screen."""
        return repr(self)

    def render(self) -> Image.Image:
        """The RGB picture."""
        image = Image.new("RGB", (SCREEN, SCREEN), PAPER)
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, SCREEN - 1, 9), COLOURS["blue"])
        for index, label in enumerate(self.labels):
            box = self.button(index)
            draw.rectangle(box, TINTS[self.tint], COLOURS["black"])
            draw.text(_centre(*box), label, COLOURS["black"], font("monobold", 20), anchor="mm")
        return image
