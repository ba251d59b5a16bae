"""Documents that tell the same things of many places: as rendered pages, and as letters, which are text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..samples import Evidence, Pages, Region, Span
from .drawing import BLACK, font, line_height
from .words import (
    WORDS,
    Question,
    Scene,
    check,
    cities,
    draw,
    numbers,
    people,
    shuffled,
)

LINES = 22  # a page is so many lines high
MARGIN = 0.04  # in widths of the page
COLUMNS = (MARGIN, 0.5, 0.76)  # of the table
HEADER = ("Entry", "Value", "Checked")
FILLER = 2  # sentences of a page that tell nothing


class Piece(NamedTuple):
    """A sentence, an entry of the list, or a row of the table, column by column; {} is the value of a question."""

    cells: tuple[str, ...]
    question: int = -1  # none

    def told(self, values: list[str]) -> list[str]:
        if self.question < 0:
            return list(self.cells)
        return [cell.format(values[self.question]) for cell in self.cells]


class Page(NamedTuple):
    heading: str
    sections: dict[str, list[Piece]]  # "prose", "entries" and "table", in their order


class Document(Scene):
    """Pages, each about a place and headed by it.

    Parameters
    ----------
    rng : np.random.Generator
    split : str
    pages : int
        At most 64.
    facts : int
        A page, 3 to 9: one is a name, the others are numbers of four digits.
    distractors : int, optional
        Other pages that tell the same of other places as the page that is asked about; the rest tell other things.
        None: all of them.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        split: str,
        pages: int = 8,
        facts: int = 6,
        distractors: int | None = None,
    ):
        check(1, 64, pages=pages)
        check(3, 9, facts=facts)
        if distractors is None:
            distractors = pages - 1
        check(0, pages - 1, distractors=distractors)
        places = [f"{city} {kind}" for city in cities(split) for kind in WORDS["places"]]
        keys, roles = shuffled(rng, list(WORDS["numbers"])), shuffled(rng, WORDS["people"])
        told = draw(rng, numbers(split, 4), pages * (facts - 1))
        named = draw(rng, people(split), pages)
        alike = rng.permutation(pages)[: distractors + 1]
        self.pages: list[Page] = []
        self.questions: list[Question] = []
        self.page_of: list[int] = []  # of each question
        for number, place in enumerate(shuffled(rng, places)[:pages]):
            asked = number in alike
            # pages that are not asked about have the next keys
            first = 0 if asked else facts - 1
            lines = []
            for key in [*keys[first : first + facts - 1], roles[not asked]]:
                question = _question(key, place, named if key in roles else told)
                lines.append((key, question.value, -1))
                if asked:
                    lines[-1] = key, "{}", len(self.questions)
                    self.questions.append(question)
                    self.page_of.append(number)
            self.pages.append(Page(place, _sections(rng, lines)))


def _question(key: str, place: str, values: list[tuple[str, str]]) -> Question:
    what, kind = ("Who", "name") if key in WORDS["people"] else ("What", "number")
    return Question(f"{what} is the {key} of the {place}?", kind, *values.pop())


def _sections(
    rng: np.random.Generator, lines: list[tuple[str, str, int]]
) -> dict[str, list[Piece]]:
    """Keys with their values and questions, on three sections in any order."""
    # a name is in no paragraph: another one, wider, would break its lines elsewhere
    *counted, named = lines
    counted = shuffled(rng, counted)
    third = (len(counted) + 1) // 3
    sentences = [
        Piece((WORDS["numbers"][key].format(value),), i)
        for key, value, i in counted[:third]
    ]
    filler = [Piece((text,)) for text in shuffled(rng, WORDS["filler"])[:FILLER]]
    rest = shuffled(rng, [*counted[third:], named])
    half = len(rest) // 2
    months = shuffled(rng, WORDS["months"])
    sections = {
        "prose": shuffled(rng, sentences + filler),
        "entries": [
            Piece((f"{key.capitalize()}: {value}",), i) for key, value, i in rest[:half]
        ],
        "table": [
            Piece((key.capitalize(), value, month), i)
            for (key, value, i), month in zip(rest[half:], months)
        ],
    }
    return {name: sections[name] for name in shuffled(rng, list(sections))}


class Letters(Document):
    """The pages as text; the evidence is the value."""

    def show(self, values):
        text = "\n".join(self._text(page, values) for page in self.pages)
        evidence = [[Span(value)] for value in values]
        return [{"type": "text", "text": text + "\n"}], evidence, [0] * len(values)

    def _text(self, page: Page, values: list[str]) -> str:
        lines = [page.heading]
        for name, pieces in page.sections.items():
            told = [" | ".join(piece.told(values)) for piece in pieces]
            if name == "table":
                told.insert(0, " | ".join(HEADER))
            lines += [" ".join(told)] if name == "prose" else told
        return "\n".join(lines) + "\n"


class RenderedPages(Document):
    """The pages as pictures.

    Parameters
    ----------
    rng, split, pages, facts, distractors
        As in `Document`.
    side : int
        Pixels of a page's height and width, at least 256: text grows with it.
    evidence : {"page", "line"}
        What is evidence: the page, as in the paper, or the line with the answer.
    """

    def __init__(self, rng, split, side: int = 512, evidence: str = "page", **sizes):
        super().__init__(rng, split, **sizes)
        check(256, 4096, side=side)
        if evidence not in ("page", "line"):
            raise ValueError(f"evidence={evidence!r}: take 'page' or 'line'")
        self.side = side
        self.evidence = evidence

    def show(self, values):
        sheets = [Sheet(self.side, page, values) for page in self.pages]
        parts = [{"type": "image", "image": sheet.image} for sheet in sheets]
        evidence: list[list[Evidence]] = []
        for question, page in enumerate(self.page_of):
            boxes = sheets[page].boxes[question]
            lines = [Region(page, box) for box in boxes]
            evidence.append([Pages([page])] if self.evidence == "page" else lines)
        return parts, evidence, [line_height(sheets[0].size)] * len(values)


class Sheet:
    """A page as it is written, line by line.

    Attributes
    ----------
    image : PIL.Image.Image
    boxes : dict of int to list
        For every question the lines, or parts of lines, that its piece takes; -1 is of no question.
    size : int
        Of the text.
    """

    def __init__(self, side: int, page: Page, values: list[str]):
        self.side = side
        self.pitch = side // LINES
        self.size = self.pitch * 4 // 5
        self.left, self.right = round(MARGIN * side), side - round(MARGIN * side)
        self.image = Image.new("RGB", (side, side), "white")
        self.pencil = ImageDraw.Draw(self.image)
        self.boxes: dict[int, list[tuple[int, int, int, int]]] = {}
        self.y = self.pitch
        heading = font(self.size * 3 // 2, bold=True)
        self.pencil.text((self.left, self.y), page.heading, BLACK, heading)
        self.y += 2 * self.pitch
        for name, pieces in page.sections.items():
            self.y += self.pitch // 2
            getattr(self, f"_{name}")(pieces, values)

    def _write(self, x: int, text: str, bold: bool = False) -> int:
        """Put a text into the line, and return where it ends."""
        letters = font(self.size, bold)
        self.pencil.text((x, self.y), text, BLACK, letters)
        return x + int(np.ceil(letters.getlength(text)))

    def _cover(self, question: int, x: int, end: int) -> None:
        """Count a piece of the line as a question's evidence."""
        boxes = self.boxes.setdefault(question, [])
        # what a line has of a sentence is one box
        if boxes and boxes[-1][1] == self.y:
            x = boxes.pop()[0]
        boxes.append((x, self.y, end, self.y + self.pitch))

    def _prose(self, pieces: list[Piece], values: list[str]) -> None:
        x, space = self.left, round(font(self.size).getlength(" "))
        for piece in pieces:
            for word in piece.told(values)[0].split():
                if x + font(self.size).getlength(word) > self.right:
                    x, self.y = self.left, self.y + self.pitch
                end = self._write(x, word)
                self._cover(piece.question, x, end)
                x = end + space
        self.y += self.pitch

    def _entries(self, pieces: list[Piece], values: list[str]) -> None:
        for piece in pieces:
            self._write(self.left, piece.told(values)[0])
            self._cover(piece.question, self.left, self.right)
            self.y += self.pitch

    def _table(self, pieces: list[Piece], values: list[str]) -> None:
        for piece in [Piece(HEADER), *pieces]:
            for column, cell in zip(COLUMNS, piece.told(values)):
                self._write(round(column * self.side), cell, bold=piece.cells is HEADER)
            self._cover(piece.question, self.left, self.right)
            self.y += self.pitch
            rule = self.y - 1
            self.pencil.line([(self.left, rule), (self.right, rule)], "silver")
