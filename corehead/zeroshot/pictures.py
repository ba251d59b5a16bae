"""Pictures of shapes on photographs: one of them is looked up, or all are looked at."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from ..samples import Region
from .drawing import draw_shape, photograph, shape_box
from .words import COLOURS, Question, Scene, check, draw, looks, numbers, shuffled, words

# Width by height: near a square, twice as wide, twice as high. Of these InternVL makes three tiles at most.
ASPECTS = (1.0, 1.0, 1.1, 0.9, 2.0, 0.5)
COUNTED = 4  # colours in a picture whose shapes are counted
MOST = 9  # shapes of one colour: a digit says how many


class Picture(Scene):
    """Shapes that are scattered over a photograph.

    Parameters
    ----------
    rng : np.random.Generator
    split : str
    cells : int
        Shapes, at most 16.
    side : int
        Pixels of the shorter edge, at least 192; pictures may be up to a sixth smaller.
    """

    def __init__(
        self, rng: np.random.Generator, split: str, cells: int = 9, side: int = 384
    ):
        check(1, 16, cells=cells)
        check(192, 4096, side=side)
        self.cells = cells
        edge = side - side // 12 * int(rng.integers(3))
        aspect = ASPECTS[rng.integers(len(ASPECTS))]
        self.width, self.height = round(edge * max(aspect, 1)), round(edge / min(aspect, 1))
        self.photo = photograph(rng, self.width, self.height)
        self.places = self._scatter(rng)
        self.looks = shuffled(rng, looks(split))[:cells]

    def _scatter(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """(x, y, radius) of shapes that do not touch: each in a cell of its own, of any size and off its middle."""
        columns = max(1, round(math.sqrt(self.cells * self.width / self.height)))
        rows = -(-self.cells // columns)
        wide, high = self.width / columns, self.height / rows
        places = []
        for cell in rng.permutation(rows * columns)[: self.cells]:
            row, column = divmod(int(cell), columns)
            radius = int(min(wide, high) / 2 * rng.uniform(0.8, 0.95)) - 3
            free = np.array([wide, high]) / 2 - radius - 3
            x, y = (column + 0.5) * wide, (row + 0.5) * high
            off = rng.uniform(-free, free)
            places.append((int(x + off[0]), int(y + off[1]), radius))
        return places

    def render(self, texts: list[str]) -> tuple[Image.Image, list[int]]:
        """The picture with a text in each shape, and the heights of their lines in pixels."""
        picture = self.photo.copy()
        heights = [
            draw_shape(picture, look, *place, text)
            for look, place, text in zip(self.looks, self.places, texts)
        ]
        return picture, heights


class Labels(Picture):
    """No two shapes look alike, and in each stands a number or a word."""

    def __init__(self, rng, split, **sizes):
        super().__init__(rng, split, **sizes)
        named = draw(rng, words(split), self.cells)
        counted = draw(rng, numbers(split, 3), self.cells)
        self.questions = []
        for look, word, number in zip(self.looks, named, counted):
            kind, pair = "number", number
            # words need more room than numbers
            if look[1] not in ("triangle", "star") and rng.random() < 0.6:
                kind, pair = "word", word
            text = f"Which {kind} is in the {' '.join(look)}?"
            self.questions.append(Question(text, kind, *pair))

    def show(self, values):
        picture, heights = self.render(values)
        evidence = [[Region(0, shape_box(*place))] for place in self.places]
        return [{"type": "image", "image": picture}], evidence, heights


class _Coloured(Picture):
    """Shapes of four colours, of which one is there more often than any other."""

    def __init__(self, rng, split, **sizes):
        super().__init__(rng, split, **sizes)
        check(4, 16, cells=self.cells)
        colours = shuffled(rng, list(COLOURS))[:COUNTED]
        tally = np.zeros(COUNTED, int)
        while sorted(tally)[-1] == sorted(tally)[-2] or tally.max() > MOST:
            tally = rng.multinomial(self.cells, rng.dirichlet(np.ones(COUNTED)))
        self.tally = dict(zip(colours, tally.tolist()))
        pool = looks(split)
        self.looks = [
            pool[rng.choice([i for i, look in enumerate(pool) if look[0] == colour])]
            for colour, count in self.tally.items()
            for _ in range(count)
        ]
        self.questions = self.ask()

    def ask(self) -> list[Question]:
        raise NotImplementedError

    def show(self, values):
        picture, _ = self.render([""] * self.cells)
        whole = [Region(0, (0, 0, *picture.size))]
        n = len(values)
        return [{"type": "image", "image": picture}], [whole] * n, [0] * n


class Majority(_Coloured):
    """Which colour is there most often?"""

    def ask(self):
        most = max(self.tally, key=self.tally.get)
        return [Question("Which colour do most of the shapes have?", "colour", most)]


class Count(_Coloured):
    """How often is a colour there? Four questions; a colour may be missing."""

    def ask(self):
        return [
            Question(f"How many {colour} shapes are there?", "number", str(count))
            for colour, count in self.tally.items()
        ]
