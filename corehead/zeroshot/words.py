"""Names and values of the zero-shot tasks, and which split may use them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from ..samples import Evidence
from ..testbed import prose
from ..testbed.scenes import SPLITS

WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
COLOURS: dict[str, list[int]] = WORDS["colours"]
# of one colour a split has two shapes that stand three apart here, and look nothing like each other
SHAPES = ("circle", "square", "triangle", "diamond", "star", "hexagon")
INSTRUCTION = "Answer with the {} alone."


@dataclass
class Question:
    """What is asked of a context, and what the context says.

    Attributes
    ----------
    text : str
        The question, without an instruction.
    kind : str
        What the answer is: "number", "name", "word" or "colour".
    value : str
        The answer.
    other : str
        Another value of its kind that begins otherwise, to stand in a counterfactual; empty where there is none.
    """

    text: str
    kind: str
    value: str
    other: str = ""


class Scene:
    """A context with questions on it, whatever values it shows.

    Attributes
    ----------
    questions : list of Question
    """

    questions: list[Question]

    def show(self, values: list[str]) -> tuple[list[dict], list[list[Evidence]], list[int]]:
        """The context with these values in place of the questions' own.

        Parameters
        ----------
        values : list of str
            One a question.

        Returns
        -------
        tuple of list
            Parts of a message, and for each question its evidence and the height of the answer's line in pixels as
            drawn (0 where it is no picture of text).
        """
        raise NotImplementedError


@cache
def numbers(split: str, digits: int) -> list[str]:
    """Numbers of so many digits."""
    return prose.part([str(i) for i in range(10 ** (digits - 1), 10**digits)], split)


def words(split: str) -> list[str]:
    """Words of four letters."""
    return prose.part(WORDS["words"].split(), split)


@cache
def people(split: str) -> list[str]:
    """First names; none stands in another or is a city, so that a span of text is found once."""
    known = [name for each in SPLITS for name in prose.people(each)]
    taken = [*known, *(city for each in SPLITS for city in cities(each))]
    return [
        name for name in prose.people(split) if sum(name in longer for longer in taken) == 1
    ]


def cities(split: str) -> list[str]:
    return prose.values("traits", split)["{} lives in"]


def looks(split: str) -> list[tuple[str, str]]:
    """Colour and shape together: every split has all colours and all shapes, but no pair of another."""
    first = list(SPLITS).index(split)
    pairs = product(enumerate(COLOURS), enumerate(SHAPES))
    return [
        (colour, shape)
        for (i, colour), (j, shape) in pairs
        if (i + j) % len(SPLITS) == first
    ]


def shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def draw(rng: np.random.Generator, items: list[str], n: int) -> list[tuple[str, str]]:
    """So many different values, each with another that none of them is and that begins otherwise."""
    order = shuffled(rng, items)
    left = order[n:]
    # two numbers or words with one beginning would differ only behind an answer's first token
    return [(v, next(other for other in left if other[0] != v[0])) for v in order[:n]]


def check(least: int, most: int, **size: int) -> None:
    """ValueError where a size is out of range."""
    [(name, value)] = size.items()
    if not least <= value <= most:
        raise ValueError(f"{name}={value}: take {least} to {most}")
