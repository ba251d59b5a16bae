"""What is asked, and where in the context the answer stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class SampleError(ValueError):
    """A sample that cannot be used as it is: the message names the sample, the field and the fix.

    Parameters
    ----------
    sample_id, where, problem, fix : str
        Whose fault it is, in which field ("evidence[0]"), what is wrong, and what to do about it.
    """

    def __init__(self, sample_id: str, where: str, problem: str, fix: str):
        # beside the message, so that a run can record which sample failed
        self.sample_id = sample_id
        self.where = where
        self.problem = problem
        self.fix = fix
        super().__init__(f"sample {sample_id!r}, {where}: {problem}. {fix}.")

    # an exception is pickled by its `args`, here the message alone; workers send theirs back whole
    def __reduce__(self):
        return type(self), (self.sample_id, self.where, self.problem, self.fix)


@dataclass(frozen=True)
class Region:
    """A rectangle of one image.

    Parameters
    ----------
    image : int
        Index of the image in the order of the messages, from 0.
    box : tuple of float
        (x1, y1, x2, y2) in pixels of the image as given, half-open: the box of a whole image of width w and height h is
        (0, 0, w, h).
    """

    image: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Pages:
    """Whole images, such as the pages of a document.

    Parameters
    ----------
    pages : sequence of int
        Indices of the images in the order of the messages, from 0.
    """

    pages: tuple[int, ...]

    def __init__(self, pages: Sequence[int]):
        # `frozen` bars plain assignment; a tuple of ints is compared by value, whatever sequence was given
        object.__setattr__(self, "pages", tuple(int(p) for p in pages))


@dataclass(frozen=True)
class Frames:
    """Whole frames of one video.

    Parameters
    ----------
    video : int
        Index of the video in the order of the messages, from 0.
    frames : sequence of int
        Indices into the frames that are handed to the processor, from 0.
    """

    video: int
    frames: tuple[int, ...]

    def __init__(self, video: int, frames: Sequence[int]):
        object.__setattr__(self, "video", int(video))
        object.__setattr__(self, "frames", tuple(int(f) for f in frames))


@dataclass(frozen=True)
class Tube:
    """A box that moves through the frames of one video.

    Parameters
    ----------
    video : int
        Index of the video in the order of the messages, from 0.
    boxes : mapping of int to tuple of float
        ``{frame: (x1, y1, x2, y2)}``, frames as in `Frames`, pixels as in `Region`.
    """

    video: int
    boxes: Mapping[int, tuple[float, float, float, float]]


@dataclass(frozen=True)
class Span:
    """A piece of the prompt's text.

    Parameters
    ----------
    text : str
        Quoted exactly; it must stand in the prompt once.
    """

    text: str


# all name media by a count over the messages, not by message and part: text between them can change
Evidence = Region | Pages | Frames | Tube | Span


@dataclass
class Sample:
    """One question with its context, its evidence and its answer.

    Parameters
    ----------
    id : str
        A name that is unique in a run; stores and error messages use it.
    messages : list of dict
        Chat messages as transformers' processors take them. An image part holds a PIL image, an array (H, W, 3) uint8
        or a path; a video part holds an array (T, H, W, 3) uint8 of frames already sampled, with ``fps`` beside it (and
        ``frames_indices`` where the frames are not evenly 0, 1, 2 ...).
    evidence : list of Region, Pages, Frames, Tube or Span
        Where the answer stands; several pieces count as their union.
    answer : str, optional
        The text that the model should say; None where there is none.
    foil : str, optional
        A wrong answer to set the answer against, such as that of a counterfactual context.
    question : str, optional
        The text of the question. None takes the last text part of the user's messages.
    meta : dict
        Anything that should travel along into tables (strings and numbers).
    metric : callable, optional
        What a text that the model wrote is worth, ``text -> {name: value}``, "parsed" first: see
        `corehead.benchmarks.metrics`. None where the answer is compared as it is.
    """

    id: str
    messages: list[dict[str, Any]]
    evidence: list[Evidence] = field(default_factory=list)
    answer: str | None = None
    question: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    metric: Callable[[str], dict[str, float]] | None = None
    foil: str | None = None
