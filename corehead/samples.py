"""What is asked, and where in the context the answer stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, NoReturn

# what a part of a message holds beside its text, image or video
BESIDE = {"text": (), "image": (), "video": ("fps", "frames_indices")}
# of the tables of `evaluate` and `score`, beside which a sample's meta stands
COLUMNS = {
    *("condition", "heads", "share", "draw", "sample", "context", "answer", "prediction"),
    *("correct", "logprob", "margin", "contrast", "flipped", "written", "parsed"),
    *("query", "layer", "head", "n_evidence", "n_context", "on_text", "depth", "entropy"),
    *("visual", "text", "sink", "evidence", "null_evidence", "null_context"),
}
# where transformers' templates look for an image or a video, besides under its own name
SOURCES = ("url", "path", "base64")


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


def _plain(value: Any) -> Any:
    """Python's numbers for those of numpy and torch; several as a tuple."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_plain, value))
    return value


class _Piece:
    """Evidence that is compared and printed by value: it keeps plain numbers, whatever array they came in.

    What is not a number stays as it is; tagging reports it, with the sample's name.
    """

    def __post_init__(self):
        for name, value in vars(self).items():
            value = _plain(value)
            # one page or frame stands for a list of one
            if name in ("pages", "frames") and not isinstance(value, tuple):
                value = (value,)
            object.__setattr__(self, name, value)  # `frozen` bars plain assignment


@dataclass(frozen=True)
class Region(_Piece):
    """A rectangle of one image.

    Parameters
    ----------
    image : int
        Index of the image in the order of the messages, from 0.
    box : sequence of float
        (x1, y1, x2, y2) of the upright image (see `Sample`), half-open: the box of a whole image of width w and height
        h is (0, 0, w, h) in pixels.
    unit : {"pixel", "fraction", "thousandth"}
        Of the box. Fractions and thousandths are of the image's width and height; Qwen3-VL writes thousandths.
    """

    image: int
    box: tuple[float, float, float, float]
    unit: str = "pixel"


@dataclass(frozen=True)
class Pages(_Piece):
    """Whole images, such as the pages of a document.

    Parameters
    ----------
    pages : int or sequence of int
        Indices of the images in the order of the messages, from 0.
    """

    pages: int | Sequence[int]


@dataclass(frozen=True)
class Frames(_Piece):
    """Whole frames of one video.

    Parameters
    ----------
    video : int
        Index of the video in the order of the messages, from 0.
    frames : int or sequence of int
        Indices into the frames that are handed to the processor, from 0.
    """

    video: int
    frames: int | Sequence[int]


@dataclass(frozen=True)
class Tube(_Piece):
    """A box that moves through the frames of one video.

    Parameters
    ----------
    video : int
        Index of the video in the order of the messages, from 0.
    boxes : mapping of int to sequence of float
        ``{frame: (x1, y1, x2, y2)}``, frames as in `Frames`, boxes as in `Region`.
    unit : {"pixel", "fraction", "thousandth"}
        Of the boxes.
    """

    video: int
    boxes: Mapping[int, tuple[float, float, float, float]]
    unit: str = "pixel"


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
        Chat messages as transformers' processors take them: ``{"role": ..., "content": ...}``, the content a text or a
        list of parts (`read_messages` says how they may be written).

        An image part holds a PIL image, a uint8 array or tensor (H, W, 3) or (3, H, W), a path, a URL, a data URI,
        bytes or an open file. It is turned upright where EXIF says how, and put on white where it is transparent:
        indices and boxes of evidence are of that picture, as viewers show it.

        A video part holds frames already sampled, a uint8 array or tensor (T, H, W, 3) or (T, 3, H, W) or a list of
        images, with their ``fps``; where they are not evenly spaced, with the source's ``fps`` and ``frames_indices``
        in it. Or it holds a path or URL, of which ``fps`` frames a second are taken.
    evidence : list of Region, Pages, Frames, Tube or Span
        Where the answer stands; several pieces count as their union. A single piece may stand for a list of one.
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

    def __post_init__(self):
        self.id = str(self.id)
        if isinstance(self.evidence, Evidence):
            self.evidence = [self.evidence]

    def fail(self, where: str, problem: str, fix: str) -> NoReturn:
        """Raise a `SampleError` that names this sample."""
        raise SampleError(self.id, where, problem, fix)


def read_messages(sample: Sample) -> list[dict[str, Any]]:
    """A sample's messages in the one form that corehead reads, whichever convention they were written in.

    A content may be a text, or a list of texts and parts. What a part holds may stand under the name of its type
    ("image"), under "url", "path" or "base64" (transformers), or under "image_url", as a text or as ``{"url": ...}``
    (OpenAI). The type may be left out (Qwen), and what is None counts as left out (tables of parts).

    Parameters
    ----------
    sample : Sample
        It is not changed.

    Returns
    -------
    list of dict
        Every "content" is a list of ``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}`` and
        ``{"type": "video", "video": ..., "fps": ..., "frames_indices": ...}``, the last two where they were given. A
        message that calls tools may have no part.

    Raises
    ------
    SampleError
        A message or part that is none, or one with a setting that no processor would see; a field of the sample that is
        of another type than `Sample` says.
    """
    _check_fields(sample)
    messages = []
    for m, message in enumerate(sample.messages):
        where = f"messages[{m}]"
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            content = [content]
        # the call itself is the template's to render
        if content is None and isinstance(message, Mapping) and message.get("tool_calls"):
            content = []
        if not isinstance(content, (list, tuple)):
            sample.fail(where, "has no content", "Give a text, or a list of parts")
        parts = [
            _read_part(sample, p, f"{where}.content[{i}]") for i, p in enumerate(content)
        ]
        messages.append({**message, "content": parts})
    return messages


def _check_fields(sample: Sample) -> None:
    """Fields are of the types that `Sample` says."""
    for name in ("messages", "evidence"):
        value = getattr(sample, name)
        if not isinstance(value, (list, tuple)):
            sample.fail(name, f"{type(value).__name__} is no list", "Give a list of them")
    for name in ("question", "answer", "foil"):
        value = getattr(sample, name)
        if not isinstance(value, (str, type(None))):
            sample.fail(
                name, f"{value!r} is no text", "Give it as it is written, in quotes"
            )
    meta = sample.meta if isinstance(sample.meta, Mapping) else {"meta": sample.meta}
    if taken := meta.keys() & COLUMNS:
        problem = f"{', '.join(sorted(taken))} would hide what a table has under the name"
        sample.fail("meta", problem, "Take other names")
    for name, value in meta.items():
        # columns of tables, at the end of a run
        if not isinstance(value, (str, Number, type(None))) or meta is not sample.meta:
            sample.fail(
                "meta", f"{name!r} is {value!r}", "Give a dictionary of strings and numbers"
            )


def _read_part(sample: Sample, given: Any, where: str) -> dict[str, Any]:
    """One part of a message; see `read_messages`."""
    if isinstance(given, str):
        given = {"type": "text", "text": given}
    if not isinstance(given, Mapping):
        fix = "Give a text, or a dictionary as Sample describes it"
        sample.fail(where, f"{type(given).__name__} is no part of a message", fix)
    part = {name: value for name, value in given.items() if value is not None}
    names = [*BESIDE, "image_url", "video_url"]
    kind = part.pop("type", None) or next((n for n in names if n in part), None)
    kind = str(kind).removesuffix("_url")
    sources = [n for n in (kind, f"{kind}_url", *SOURCES) if n in part]
    if kind not in BESIDE or len(sources) != 1:
        problem = f"its type {kind!r} is unknown, or there is no {kind!r} in it"
        fix = "Give a part as Sample describes it, one text, image or video each"
        sample.fail(where, problem, fix)
    [source] = sources
    value = part.pop(source)
    # OpenAI's {"url": ...}, or an undecoded row of a data set
    if isinstance(value, Mapping):
        value = next((value[n] for n in ("url", "bytes", "path") if value.get(n)), None)
    if source == "base64":
        value = f"data:;base64,{value}"
    if kind == "text":
        return _text_part(sample, value, part.keys() & set(names), where)
    # such as Qwen's "max_pixels": another picture than the one that was asked for, in silence
    if unread := part.keys() - set(BESIDE[kind]):
        problem = f"{', '.join(sorted(unread))} would not be heeded"
        fix = f"Leave it out: the processor sets sizes. Read is {', '.join([kind, *BESIDE[kind]])}"
        sample.fail(where, problem, fix)
    return {"type": kind, kind: value, **part}


def _text_part(sample: Sample, text: Any, beside: set[str], where: str) -> dict[str, str]:
    """A part that is a text, with no media `beside` it."""
    if not isinstance(text, str):
        sample.fail(where, f"its text is {text!r}", "Give a string")
    if beside:
        problem = f"a text with {', '.join(sorted(beside))} in it"
        sample.fail(where, problem, "Give each a part of its own")
    return {"type": "text", "text": text}
