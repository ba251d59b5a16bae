"""Digit-needle scenes: pictures, documents, videos and texts in which exactly one place holds the answer.

A picture is a grid of 16 x 16 px cells. A cell holds a handwritten digit (scikit-learn's 8 x 8 digits) in a frame of
one of 6 styles and 8 colours; style and colour together are the *key*. With 8 px patches and a 2 x 2 merge, a cell is
exactly one visual token. The digits are split into train / validation / test by the handwritten original.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from ..samples import Pages, Region, Sample, Span, Tube

ART = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
STYLES, COLOURS, MARKS = list(ART["frames"]), ART["colours"], list(ART["marks"])
# words of one kind have ids in a row: the token of a digit, style, colour or mark is the kind's first plus its number
_WORDS = [*ART["special"], *"0123456789", *STYLES, *COLOURS, *MARKS, *ART["words"]]
VOCABULARY = {word: i for i, word in enumerate(_WORDS)}
FIRST_DIGIT, FIRST_STYLE, FIRST_COLOUR, FIRST_MARK = (
    VOCABULARY[w] for w in ("0", "solid", "red", "circle")
)
SPLITS = {"train": (0, 1400), "validation": (1400, 1598), "test": (1598, 1797)}
CELL = 16  # pixels
VIDEO_SIDE = 3  # cells
FPS = 2.0
WITH_NEEDLE = ("image", "document", "video", "text")
WITHOUT_CONTEXT = ("text_only", "memory")
RECORD, DIGIT_WORD = 4, 2  # words of a needle in text: style, colour, digit, semicolon
N_KEYS = len(STYLES) * len(COLOURS)
MARK_GLYPH = N_DIGITS = SPLITS["test"][1]
# What is blank comes behind the last key and glyph, so that it has its place in the tables of frames and ink.
# A cell: key (style * 8 + colour), glyph (a digit's index, or 1797 + a mark's), its shift, the needle it belongs to.
BLANK = np.array(
    (N_KEYS, MARK_GLYPH + len(MARKS), 0, -1),
    [(name, np.int64) for name in ("key", "glyph", "shift", "needle")],
)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits in the order of the split.

    Returns
    -------
    tuple of np.ndarray
        Ink (1797, 8, 8) uint8 from 0 to 255, and labels (1797,) int64.
    """
    data = load_digits()
    # one order for ever: the split belongs to the data, not to a run
    order = np.random.default_rng(0).permutation(N_DIGITS)
    # scikit-learn's ink goes from 0 to 16
    return np.minimum(data.images * 16, 255).astype(np.uint8)[order], data.target[order]


def data_hash() -> str:
    """SHA-256 over the digits in split order: two machines with the same hash draw the same scenes."""
    ink, labels = digits()
    return hashlib.sha256(
        ink.tobytes() + labels.astype("<i8").tobytes() + repr(SPLITS).encode()
    ).hexdigest()


def _bitmaps(kind: str) -> np.ndarray:
    """(n, rows, columns) bool."""
    drawings = [[list(row) for row in drawing.split()] for drawing in ART[kind].values()]
    return np.array(drawings) == "#"


@cache
def _frames() -> np.ndarray:
    """Every key's frame and the blank, (48 + 1, 16, 16, 3) uint8."""
    styles, colours = _bitmaps("frames"), np.array(list(COLOURS.values()), np.uint8)
    # (6, 8, 16, 16, 3)
    frames = np.where(styles[:, None, :, :, None], colours[:, None, None], np.uint8(255))
    blank = np.full((1, CELL, CELL, 3), 255, np.uint8)
    return np.concatenate([frames.reshape(-1, CELL, CELL, 3), blank])


@cache
def _glyphs() -> np.ndarray:
    """Ink of every glyph at 3 x 3 positions around the middle of a cell, (1797 + 12 + 1, 9, 16, 16) uint8."""
    marks, blank = _bitmaps("marks") * np.uint8(255), np.zeros((1, 8, 8), np.uint8)
    ink = np.concatenate([digits()[0], marks, blank])
    # in the middle or a pixel off it each way, so that a digit is no fixed pattern of pixels
    shifts = [
        np.pad(ink, ((0, 0), (top, 8 - top), (left, 8 - left)))
        for top in (3, 4, 5)
        for left in (3, 4, 5)
    ]
    return np.stack(shifts, 1)


def render(cells: np.ndarray) -> np.ndarray:
    """Pictures (..., R * 16, C * 16, 3) uint8 of cells (..., R, C): black ink on white, in its frame."""
    ink = _glyphs()[cells["glyph"], cells["shift"]]
    # the darker of frame and ink, (..., R, C, y, x, 3)
    pixels = np.minimum(_frames()[cells["key"]], 255 - ink[..., None])
    *before, rows, columns = cells.shape
    return pixels.swapaxes(-4, -3).reshape(*before, rows * CELL, columns * CELL, 3)


@dataclass
class Scenes:
    """A batch of B scenes of one domain and layout, with Q questions each.

    Attributes
    ----------
    domain : str
        The task's name.
    question : np.ndarray
        (B, Q, Lq) int64 token ids.
    answer : np.ndarray
        (B, Q) int64 token ids.
    asked : np.ndarray
        (B, Q) int64, the needle that each question is about.
    cells : np.ndarray or None
        (B, P, R, C) of `BLANK`'s dtype: what P pictures or frames show, and which needle is there.
    words : np.ndarray or None
        (B, L) int64 token ids of a text context, a needle being `RECORD` words.
    """

    domain: str
    question: np.ndarray
    answer: np.ndarray
    asked: np.ndarray
    cells: np.ndarray | None = None
    words: np.ndarray | None = None

    @property
    def evidence(self) -> np.ndarray:
        """Where the answer stands: (B, Q, P, R, C) bool over cells, or (B, Q, L) over words."""
        if self.cells is None:
            return np.arange(self.words.shape[1]) // RECORD == self.asked[..., None]
        return self.cells["needle"][:, None] == self.asked[..., None, None, None]


@dataclass
class Sampler:
    """What scenes are drawn with: a source of randomness, numbers of scenes and questions, a split of the digits."""

    rng: np.random.Generator
    n: int
    questions: int
    split: str

    def permutations(self, items: int) -> np.ndarray:
        """(B, items)."""
        return self.rng.random((self.n, items)).argsort(1)  # all scenes' in one call

    def digits(self, *shape: int) -> np.ndarray:
        """Glyphs of handwritten digits."""
        return self.rng.integers(*SPLITS[self.split], size=shape)

    def clutter(self, *shape: int) -> np.ndarray:
        """Glyphs of distractors: half of the cells show a digit."""
        return np.where(self.rng.random(shape) < 0.5, self.digits(*shape), BLANK["glyph"])

    def keys(self, count: int, distinct_colours: bool = False) -> np.ndarray:
        """(B, count) keys, different from each other within a scene."""
        if count > N_KEYS:
            raise ValueError(
                f"cells={count}: there are {N_KEYS} keys, so at most as many cells that differ"
            )
        if not distinct_colours:
            return self.permutations(N_KEYS)[:, :count]
        # then the colour alone finds the needle: an easier task to begin with
        colour = self.permutations(len(COLOURS))[:, :count]
        return self.rng.integers(len(STYLES), size=colour.shape) * len(COLOURS) + colour

    def needles(self, key: np.ndarray) -> np.ndarray:
        """Cells (B, count) that show digits in the frames of `key`."""
        cells = np.full(key.shape, BLANK)
        cells["key"], cells["glyph"] = key, self.digits(*key.shape)
        cells["needle"] = np.arange(key.shape[1])
        return cells

    def asked(self, needles: int) -> np.ndarray:
        """(B, Q) which needle each question is about: different ones while they last."""
        rounds = -(-self.questions // needles)
        order = np.concatenate([self.permutations(needles) for _ in range(rounds)], 1)
        return order[:, : self.questions]

    def shifts(self, *shape: int) -> np.ndarray:
        return self.rng.integers(9, size=shape)


def _pick(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, index, 1)


def _key_words(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return FIRST_STYLE + key // len(COLOURS), FIRST_COLOUR + key % len(COLOURS)


def _ask(what: str, *words: np.ndarray) -> np.ndarray:
    """Questions (B, Q, 1 + words) from token ids (B, Q)."""
    return np.stack(np.broadcast_arrays(VOCABULARY[what], *words), -1)


def _about(needle: np.ndarray, *heading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Question and answer about needles (B, Q): which digit stands in the frame of that style and colour?"""
    question = _ask("digit", *heading, *_key_words(needle["key"]))
    return question, FIRST_DIGIT + digits()[1][needle["glyph"]]


def _text_only(sampler: Sampler) -> Scenes:
    """Sums without a context."""
    a, b = sampler.rng.integers(10, size=(2, sampler.n, sampler.questions))
    question = _ask("sum", FIRST_DIGIT + a, FIRST_DIGIT + b)
    answer = FIRST_DIGIT + (a + b) % 10  # one token, like every answer
    no_words = np.zeros((sampler.n, 0), np.int64)
    return Scenes("text_only", question, answer, a, words=no_words)


@cache
def facts() -> np.ndarray:
    """Digits (marks * keys,) of the facts that `memory` asks for: one table for ever, and without rhyme or reason."""
    return np.random.default_rng(0).integers(10, size=len(MARKS) * N_KEYS)


def _memory(sampler: Sampler) -> Scenes:
    """Facts that a model was taught by heart: three words, and a digit that nothing in the prompt says."""
    known = np.arange(len(facts()))
    # training must teach every fact; what is chosen by some facts is reported of the others
    if sampler.split != "train":
        half = ("validation", "test").index(sampler.split)
        known = np.random.default_rng(1).permutation(known)[half::2]
    fact = sampler.rng.choice(known, (sampler.n, sampler.questions))
    mark, key = np.divmod(fact, N_KEYS)
    question = _ask("sum", FIRST_MARK + mark, *_key_words(key))
    no_words = np.zeros((sampler.n, 0), np.int64)
    answer = FIRST_DIGIT + facts()[fact]
    return Scenes("memory", question, answer, fact, words=no_words)


def _text(sampler: Sampler, cells: int = 16) -> Scenes:
    """Records of a key and a digit, as words."""
    key = sampler.keys(cells, distinct_colours=cells <= 4)
    value = FIRST_DIGIT + sampler.rng.integers(10, size=key.shape)
    asked = sampler.asked(cells)
    question = _ask("digit", *_key_words(_pick(key, asked)))
    # (B, cells, RECORD)
    records = np.stack(np.broadcast_arrays(*_key_words(key), value, VOCABULARY[";"]), -1)
    words = records.reshape(sampler.n, -1)
    return Scenes("text", question, _pick(value, asked), asked, words=words)


def _picture(sampler: Sampler, cells: np.ndarray, side: int | None) -> np.ndarray:
    """One picture (B, 1, side, side) of cells (B, count): in their order, or scattered where there is room to spare."""
    n, count = cells.shape
    least = round(count**0.5)
    side = side or least
    if least**2 != count or side < least:
        raise ValueError(
            f"cells={count}, side={side}: a picture has a square number of cells, and holds them"
        )
    if side > least:
        position = sampler.permutations(side**2)[:, :count]
        scattered = np.full((n, side**2), BLANK)
        np.put_along_axis(scattered, position, cells, 1)
        cells = scattered
    cells["shift"] = sampler.shifts(*cells.shape)
    return cells.reshape(n, 1, side, side)


def _image(sampler: Sampler, cells: int = 16, side: int | None = None) -> Scenes:
    """A picture of digits with different keys."""
    needles = sampler.needles(sampler.keys(cells, distinct_colours=cells <= 4))
    asked = sampler.asked(cells)
    question, answer = _about(_pick(needles, asked))
    return Scenes("image", question, answer, asked, _picture(sampler, needles, side))


def _coloured(sampler: Sampler, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """One needle of many cells (B, cells), whose keys may repeat, and how often each colour is there (B, 8)."""
    # each scene has weights of its own, so that one colour stands out
    weight = sampler.rng.dirichlet(np.full(len(COLOURS), 0.7), size=sampler.n).cumsum(1)
    # drawn by the cumulated weights, the last of which may round to less than 1
    number = sampler.rng.random((sampler.n, cells, 1))
    colour = (number > weight[:, None]).sum(-1).clip(max=len(COLOURS) - 1)
    style = sampler.rng.integers(len(STYLES), size=colour.shape)
    needles = sampler.needles(style * len(COLOURS) + colour)
    needles["needle"] = 0  # all cells count, so that all are evidence
    return needles, (colour[..., None] == np.arange(len(COLOURS))).sum(1)


def _majority(sampler: Sampler, cells: int = 16, side: int | None = None) -> Scenes:
    """Which colour is there most often?"""
    needles, tally = _coloured(sampler, cells)
    top = tally.argmax(1)
    tied = (tally == tally.max(1, keepdims=True)).sum(1) > 1
    for scene in np.flatnonzero(
        tied
    ):  # the first of the colours gets a cell of another one
        colour = needles["key"][scene] % len(COLOURS)
        other = (colour != top[scene]).argmax()
        needles["key"][scene, other] += top[scene] - colour[other]
    answer = (FIRST_COLOUR + top)[:, None].repeat(sampler.questions, 1)
    question = np.full_like(answer, VOCABULARY["majority"])[..., None]
    return Scenes(
        "majority",
        question,
        answer,
        np.zeros_like(answer),
        _picture(sampler, needles, side),
    )


def _count(sampler: Sampler, cells: int = 16, side: int | None = None) -> Scenes:
    """How often is a colour there? Those that are there come first, those with more than nine cells last."""
    needles, tally = _coloured(sampler, cells)
    order = (
        sampler.rng.random(tally.shape) + 2 * (tally > 9) + 0.8 * (tally == 0)
    ).argsort(1)
    # more questions than colours begin again
    colour = np.tile(order, -(-sampler.questions // len(COLOURS)))[:, : sampler.questions]
    answer = FIRST_DIGIT + _pick(tally, colour).clip(max=9)
    question = _ask("count", FIRST_COLOUR + colour)
    return Scenes(
        "count", question, answer, np.zeros_like(answer), _picture(sampler, needles, side)
    )


def _document(
    sampler: Sampler,
    cells: int = 4,
    pages: int = 8,
    distractors: int = 0,
    side: int | None = None,
) -> Scenes:
    """Pages with a mark as heading; the same keys stand on every page, each time in another order."""
    if pages > len(MARKS):
        raise ValueError(
            f"pages={pages}: there are {len(MARKS)} heading marks, so at most as many pages"
        )
    columns = side or (1 if cells == 1 else 2)
    rows = side or 1 + -(-cells // columns)
    if cells > (rows - 1) * columns:
        raise ValueError(
            f"cells={cells}, side={side}: a page of {side} x {side} cells has one row for its heading"
        )
    mark = sampler.permutations(len(MARKS))[:, :pages]
    # one pool for all pages: a key alone does not tell which page is meant, the heading must be read too
    pool = sampler.keys(cells)
    order = sampler.rng.random((sampler.n, pages, cells)).argsort(2)
    needles = sampler.needles(
        np.take_along_axis(pool[:, None], order, 2).reshape(sampler.n, -1)
    )
    asked = sampler.asked(pages * cells)
    question, answer = _about(
        _pick(needles, asked), FIRST_MARK + _pick(mark, asked // cells)
    )

    sheets = np.full((sampler.n, pages, rows * columns), BLANK)
    sheets["glyph"][:, :, 0] = MARK_GLYPH + mark
    sheets[:, :, columns : columns + cells] = needles.reshape(order.shape)
    if distractors:
        sheets = _among_distractors(sampler, sheets, distractors)
    sheets["shift"] = sampler.shifts(*sheets.shape)
    return Scenes(
        "document", question, answer, asked, sheets.reshape(sampler.n, -1, rows, columns)
    )


def _among_distractors(
    sampler: Sampler, sheets: np.ndarray, distractors: int
) -> np.ndarray:
    """Pages (B, P, cells) in their order among others without heading and keys."""
    n, pages, cells = sheets.shape
    # sorted: the pages with keys keep their order
    kept = np.sort(sampler.permutations(pages + distractors)[:, :pages])
    among = np.full((n, pages + distractors, cells), BLANK)
    among["glyph"] = sampler.clutter(*among.shape)
    np.put_along_axis(among, kept[..., None], sheets, 1)
    return among


def _video(
    sampler: Sampler, cells: int = 6, frames: int = 8, distractors: int = 0
) -> Scenes:
    """Digits that come and go while the camera pans over a grid of 3 x 3 cells, around its edges."""
    side, total = VIDEO_SIDE, frames + distractors
    if cells > side**2 or frames % 2 or distractors % 2 or frames < 4:
        what = f"cells={cells}, frames={frames}, distractors={distractors}"
        raise ValueError(
            f"{what}: at most {side**2} digits, an even number of frames from 4 and of distractors"
        )
    needles = sampler.needles(sampler.keys(cells))
    length = sampler.rng.integers(3, min(frames, 6) + 1, size=needles.shape)
    begin = (sampler.rng.random(needles.shape) * (total - length + 1)).astype(np.int64)
    time = np.arange(total)[:, None]
    visible = (time >= begin[:, None]) & (time < (begin + length)[:, None])  # (B, T, cells)
    # the camera rests for a pair of frames, which a token sees at once: it must not see two digits
    steps = sampler.rng.integers(-1, 2, size=(sampler.n, total // 2, 2))
    pan = steps.cumsum(1).repeat(2, 1)  # (B, T, 2)
    row, column = np.divmod(sampler.permutations(side**2)[:, None, :cells], side)
    position = (row + pan[..., :1]) % side * side + (
        column + pan[..., 1:]
    ) % side  # (B, T, cells)

    film = np.full((sampler.n, total, side**2), BLANK)
    if distractors:
        # digits without a frame, where none with a key is seen in the pair of frames
        empty = ~visible.reshape(sampler.n, total // 2, -1).any(2).repeat(2, 1)
        film["glyph"][empty] = sampler.clutter(sampler.n, total // 2, side**2).repeat(2, 1)[
            empty
        ]
    asked = sampler.asked(cells)
    needles["shift"] = sampler.shifts(*needles.shape)  # one a digit, or it would tremble
    scene, frame, needle = visible.nonzero()
    film[scene, frame, position[visible]] = needles[scene, needle]
    question, answer = _about(_pick(needles, asked))
    return Scenes(
        "video", question, answer, asked, film.reshape(sampler.n, total, side, side)
    )


DOMAINS = {
    "image": _image,
    "document": _document,
    "video": _video,
    "text": _text,
    "majority": _majority,
    "count": _count,
    "text_only": _text_only,
    "memory": _memory,
}
# words that one domain has to itself: as many ids for each as there are words
OWN_WORDS = {
    f"<{domain} {word}>": (1 + i) * len(VOCABULARY) + id_of
    for i, domain in enumerate(DOMAINS)
    for word, id_of in VOCABULARY.items()
}
WORDS = [*VOCABULARY, *OWN_WORDS]  # by id


def draw(
    domain: str,
    rng: np.random.Generator,
    n: int,
    *,
    split: str = "train",
    questions: int = 1,
    own_words: bool = False,
    **layout: int,
) -> Scenes:
    """Draw scenes of one layout.

    Parameters
    ----------
    domain : str
        "image", "document", "video", "text", "majority", "count", "text_only" or "memory" (which one model was taught).
    rng : np.random.Generator
        Source of all randomness.
    n : int
        Number of scenes.
    split : str
        Which handwritten digits are used: "train", "validation" or "test".
    questions : int
        Questions a scene.
    own_words : bool
        In words that no other domain has; a tokenizer must know them (`untrained`).
    **layout : int
        What the domain knows of:

        - cells: image, majority, count: cells in the picture, a square number (default 16). document: cells a page
          (default 4). video: different digits, at most 9 (default 6). text: records (default 16).
        - pages, frames: document: pages with a heading, at most 12. video: frames, an even number from 4.
        - distractors: document, video: that many more pages or frames, which hold no key, anywhere among the others;
          half of their cells show a digit without a frame. In a video an even number.
        - side: image, majority, count, document: pictures of side x side cells, of which those not needed stay blank
          (anywhere in a picture, at the end of a page). By default as few as hold the cells.

    Returns
    -------
    Scenes

    Raises
    ------
    ValueError
        No such domain, or sizes that do not fit.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r}: take one of {', '.join(map(repr, DOMAINS))}")
    scenes = DOMAINS[domain](Sampler(rng, n, questions, split), **layout)
    return in_own_words(scenes) if own_words else scenes


def in_own_words(scenes: Scenes) -> Scenes:
    """The same scenes in words that no other domain has: a model of these learns no word in two domains."""
    first = (1 + list(DOMAINS).index(scenes.domain)) * len(VOCABULARY)
    words = None if scenes.words is None else first + scenes.words
    return replace(
        scenes, question=first + scenes.question, answer=first + scenes.answer, words=words
    )


def decode(ids: np.ndarray) -> str:
    """Token ids to text."""
    return " ".join(WORDS[i] for i in ids)


def cell_box(row: int, column: int) -> tuple[int, int, int, int]:
    """A cell's (x1, y1, x2, y2) in pixels."""
    left, top = int(column) * CELL, int(row) * CELL
    return left, top, left + CELL, top + CELL


def _evidence(domain: str, where: np.ndarray, words: np.ndarray | None, kind: str) -> list:
    """Evidence of one question from a mask over words (L,) or cells (P, R, C)."""
    if domain in WITHOUT_CONTEXT:
        return []
    if domain == "text":
        return [Span(decode(words[where]))]
    at = np.argwhere(where)
    if domain == "document" and kind == "page":
        return [Pages([at[0, 0]])]
    if domain == "video":
        return [Tube(0, {int(frame): cell_box(row, column) for frame, row, column in at})]
    # a picture that is evidence as a whole is one region
    if where.all():
        return [Region(0, (0, 0, where.shape[2] * CELL, where.shape[1] * CELL))]
    return [Region(int(page), cell_box(row, column)) for page, row, column in at]


def _context(scenes: Scenes, scene: int) -> list[dict]:
    """The parts of a message in front of the question."""
    if scenes.domain in WITHOUT_CONTEXT:
        return []
    if scenes.domain == "text":
        return [{"type": "text", "text": decode(scenes.words[scene]) + "\n"}]
    pictures = render(scenes.cells[scene])
    if scenes.domain == "video":
        return [{"type": "video", "video": pictures, "fps": FPS}]
    return [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures]


def _item(scenes: Scenes, scene: int, i: int, where: np.ndarray) -> str | None:
    """What the answer of question i is read from and other samples may share, None where they do not.

    Handwritten digits are few (199 in the test split) and come back in many pictures, and a model that misreads one
    does so again and again. Records of a text (480 of key and digit), sums (100) and facts (288 a split) come back as
    well. Of majority and count it is the picture as a whole, which comes once.
    """
    if scenes.domain in WITHOUT_CONTEXT:
        return decode(scenes.question[scene, i])
    if scenes.domain == "text":
        return decode(scenes.words[scene][where])
    if scenes.domain in ("majority", "count"):
        return None
    # one needle, in all frames that show it
    return f"glyph {scenes.cells[scene]['glyph'][where][0]}"


def to_samples(scenes: Scenes, prefix: str, evidence: str = "page") -> list[Sample]:
    """Scenes to samples with PIL images or video arrays.

    Parameters
    ----------
    scenes : Scenes
    prefix : str
        Of the ids ``prefix-scene-question``.
    evidence : str
        As in `samples`.

    Returns
    -------
    list of Sample
        B * Q of them. Their meta: domain, scene, and item, what the answer is read from (a handwritten digit, the words
        of a record, a sum), which samples of other scenes may share; where they do not, the sample's own id.
    """
    samples = []
    for scene, masks in enumerate(scenes.evidence):
        # rendered once: its questions share the objects
        context = _context(scenes, scene)
        words = None if scenes.words is None else scenes.words[scene]
        for i, where in enumerate(masks):
            question, answer = (
                decode(scenes.question[scene, i]),
                decode(scenes.answer[scene, [i]]),
            )
            messages = [
                {"role": "user", "content": [*context, {"type": "text", "text": question}]}
            ]
            pieces = _evidence(scenes.domain, where, words, evidence)
            name = f"{prefix}-{scene}-{i}"
            item = _item(scenes, scene, i, where) or name
            meta = {"domain": scenes.domain, "scene": scene, "item": item}
            samples.append(Sample(name, messages, pieces, answer, question, meta))
    return samples


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: take one of {sorted(SPLITS)}")


def with_foils(pairs: Iterable[tuple[Sample, Sample]]) -> list[tuple[Sample, Sample]]:
    """Counterfactual pairs, each with the other's answer as its foil."""
    return [(replace(a, foil=b.answer), replace(b, foil=a.answer)) for a, b in pairs]


def _check(split: str, evidence: str) -> None:
    check_split(split)
    if evidence not in ("page", "cell"):
        raise ValueError(f"evidence={evidence!r}: take 'page' or 'cell'")


def scene_name(what: str, split: str, seed: int, layout: dict[str, int]) -> str:
    """What begins the ids, and seeds the drawing: another split or layout has other scenes."""
    return "-".join(
        [what, split, str(seed), *(f"{k}{v}" for k, v in sorted(layout.items()))]
    )


def samples(
    domain: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    questions: int = 1,
    evidence: str = "page",
    **layout: int,
) -> list[Sample]:
    """Digit-needle samples for scoring and evaluation.

    Parameters
    ----------
    domain : str
        "image", "document", "video", "text", "majority", "count", "text_only" or "memory" (which one model was taught).
    split : str
        "train", "validation" or "test"; digits of one split never appear in another.
    n : int
        Number of samples, a multiple of `questions`.
    seed : int
        The same seed gives the same samples.
    questions : int
        Questions that share one context; they follow each other.
    evidence : str
        Documents only: "page" marks the whole page (as the paper does), "cell" the cell with the answer.
    **layout : int
        cells=, pages=, frames=, distractors=, side=, own_words= as in `draw`.

    Returns
    -------
    list of Sample

    Raises
    ------
    ValueError
        An unknown domain, split or kind of evidence, or sizes that do not fit.
    """
    _check(split, evidence)
    if n % questions:
        raise ValueError(f"n={n} is no multiple of questions={questions}")
    name = scene_name(domain, split, seed, layout)
    rng = np.random.default_rng([seed, *name.encode()])
    scenes = draw(domain, rng, n // questions, split=split, questions=questions, **layout)
    return to_samples(scenes, name, evidence)


def counterfactuals(
    domain: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    evidence: str = "page",
    **layout: int,
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples that differ in nothing but the digit that is asked for.

    Parameters
    ----------
    domain : {"image", "document", "video", "text"}
    split, n, seed, evidence, **layout
        As in `samples`, with one question a context.

    Returns
    -------
    list of (Sample, Sample)
        Each has the other's answer as its foil.

    Raises
    ------
    ValueError
        As in `samples`; a domain without a needle.
    """
    if domain not in WITH_NEEDLE:
        raise ValueError(
            f"domain={domain!r} has no needle: take 'image', 'document', 'video' or 'text'"
        )
    _check(split, evidence)
    name = scene_name(f"{domain}-pair", split, seed, layout)
    rng = np.random.default_rng([seed, *name.encode()])
    scenes = draw(domain, rng, n, split=split, **layout)
    other = _with_other_digits(scenes, rng, split)
    pairs = zip(
        to_samples(scenes, name, evidence), to_samples(other, f"{name}-foil", evidence)
    )
    return with_foils(pairs)


def _with_other_digits(scenes: Scenes, rng: np.random.Generator, split: str) -> Scenes:
    """The same scenes, but the needle of the one question of each is another digit of the split."""
    zero = scenes.answer[:, 0] - scenes.answer[:, 0] % len(VOCABULARY) + FIRST_DIGIT
    shown = scenes.answer[:, 0] - zero
    other = (shown + rng.integers(1, 10, size=shown.shape)) % 10
    answer = (zero + other)[:, None]
    if scenes.cells is None:
        words = scenes.words.reshape(len(shown), -1, RECORD).copy()
        words[np.arange(len(shown)), scenes.asked[:, 0], DIGIT_WORD] = answer[:, 0]
        return replace(scenes, answer=answer, words=words.reshape(scenes.words.shape))
    first, end = SPLITS[split]
    labels = digits()[1][first:end]
    glyph = np.array(
        [first + rng.choice(np.flatnonzero(labels == digit)) for digit in other]
    )
    cells = scenes.cells.copy()
    needle = cells["needle"] == scenes.asked[:, 0, None, None, None]
    cells["glyph"] = np.where(needle, glyph[:, None, None, None], cells["glyph"])
    return replace(scenes, answer=answer, cells=cells)


def with_other_word(sample: Sample, place: int, rng: np.random.Generator) -> Sample:
    """The same context, asked with one word of the key (a style, a colour, a heading) changed into another of its kind.

    Parameters
    ----------
    sample : Sample
        As `samples` gives it, of a domain with a needle.
    place : int
        Of the word in the question; -1 is the last, the colour.
    rng : np.random.Generator

    Returns
    -------
    Sample
        With the evidence and answer of the original, which the changed question does not ask for.
    """
    words = sample.question.split()
    kind = next(kind for kind in (STYLES, list(COLOURS), MARKS) if words[place] in kind)
    words[place] = str(rng.choice([word for word in kind if word != words[place]]))
    question = " ".join(words)
    [message] = sample.messages
    content = [*message["content"][:-1], {"type": "text", "text": question}]
    messages = [message | {"content": content}]
    return replace(
        sample, id=f"{sample.id}-word{place}", messages=messages, question=question
    )
