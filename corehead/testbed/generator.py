"""Digit-needle scenes: pictures, documents, videos and texts in which exactly one place holds the answer.

A picture is a grid of 16 x 16 px cells. A cell holds a handwritten digit (scikit-learn's 8 x 8 digits) in a frame of
one of 6 styles and 8 colours; style and colour together are the *key*. With 8 px patches and a 2 x 2 merge, a cell is
exactly one visual token. The digits are split into train / validation / test by the handwritten original.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ..samples import Pages, Region, Sample, Span, Tube

CELL = 16
STYLES = ("solid", "dashed", "dotted", "double", "thin", "corner")
COLOURS = {
    "red": (225, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 200, 20),
    "cyan": (40, 200, 215),
    "magenta": (215, 50, 200),
    "brown": (125, 75, 35),
    "grey": (135, 135, 135),
}
MARKS = (
    *("circle", "disc", "square", "block", "cross", "plus"),
    *("diamond", "triangle", "stripes", "columns", "arrow", "checker"),
)
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<unk>"),
)
WORDS = (
    *(str(d) for d in range(10)),
    *STYLES,
    *COLOURS,
    *MARKS,
    *("digit", "majority", "count", "sum", "seconds", "N", "A"),
    *(";", "<", ">", ".", "/", ",", "?", ":"),
)
VOCABULARY = {word: i for i, word in enumerate((*SPECIALS, *WORDS))}
N_KEYS = len(STYLES) * len(COLOURS)
SPLITS = {"train": (0, 1400), "validation": (1400, 1598), "test": (1598, 1797)}
FPS = 2.0

_STYLE0, _COLOUR0, _MARK0 = (VOCABULARY[w] for w in (STYLES[0], next(iter(COLOURS)), MARKS[0]))
_DIGIT0 = VOCABULARY["0"]


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits in the order of the split: pixels (1797, 8, 8) uint8 of ink 0..255 and labels (1797,)."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return np.minimum(data.images * 16, 255).astype(np.uint8)[order], data.target[order]


def data_hash() -> str:
    """SHA-256 over the digits in split order: two machines with the same hash draw the same scenes."""
    pixels, labels = digits()
    return hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes() + repr(SPLITS).encode()).hexdigest()


def _marks() -> np.ndarray:
    """The heading marks as ink (12, 8, 8) uint8, in the order of MARKS."""
    y, x = np.mgrid[:8, :8] - 3.5
    r, manhattan, chebyshev = np.hypot(x, y), abs(x) + abs(y), np.maximum(abs(x), abs(y))
    shapes = [
        (r < 4) & (r > 2.4),
        r < 4,
        chebyshev > 2,
        chebyshev < 4,
        abs(abs(x) - abs(y)) < 1.2,
        (abs(x) < 1.2) | (abs(y) < 1.2),
        (manhattan < 4.6) & (manhattan > 2),
        y > 2 * abs(x) - 4,
        (y + 3.5) % 4 < 2,
        (x + 3.5) % 4 < 2,
        (abs(y) < 1.2) | ((x > 0) & (manhattan < 4.2)),
        ((x + 3.5) // 2 + (y + 3.5) // 2) % 2 < 1,
    ]
    return np.stack(shapes).astype(np.uint8) * 255


@cache
def _frames() -> np.ndarray:
    """All frames (48 + 1, 16, 16, 3) uint8, index style * 8 + colour; the last is blank (no frame)."""
    y, x = np.mgrid[:CELL, :CELL]
    ring = np.minimum.reduce([x, y, CELL - 1 - x, CELL - 1 - y])  # distance from the border, 0 at the edge
    along = np.where(np.minimum(y, CELL - 1 - y) < np.minimum(x, CELL - 1 - x), x, y)  # runs along the side
    masks = {
        "solid": ring < 2,
        "dashed": (ring < 2) & (along % 8 >= 2) & (along % 8 < 6),
        "dotted": (ring < 2) & (along % 4 < 2),
        "double": (ring == 0) | (ring == 2),
        "thin": ring == 0,
        "corner": (ring < 2) & (np.minimum(x, CELL - 1 - x) < 5) & (np.minimum(y, CELL - 1 - y) < 5),
    }
    frames = np.full((N_KEYS + 1, CELL, CELL, 3), 255, np.uint8)
    for s, style in enumerate(STYLES):
        for c, rgb in enumerate(COLOURS.values()):
            frames[s * len(COLOURS) + c][masks[style]] = rgb
    return frames


@cache
def _glyphs() -> np.ndarray:
    """Ink (1797 digits + 12 marks + 1 blank, 3 * 3 shifts, 16, 16) uint8, each shifted by -1..1 px in y and x."""
    ink = np.concatenate([digits()[0], _marks(), np.zeros((1, 8, 8), np.uint8)])
    out = np.zeros((len(ink), 9, CELL, CELL), np.uint8)
    for s in range(9):
        dy, dx = 3 + s // 3, 3 + s % 3
        out[:, s, dy : dy + 8, dx : dx + 8] = ink
    return out


@dataclass
class Scenes:
    """A batch of scenes of one domain and layout, with their questions.

    Attributes
    ----------
    domain : the task's name.
    key, glyph, shift : (B, P, R, C) int64. What each cell of each of P pictures (or frames) shows: frame
        style * 8 + colour, or 48 for none; a digit's index, 1797 + a mark's, or 1809 for none; the shift 0..8.
        Empty (P = 0) in the text domains.
    words : (B, L) int64 token ids of the text context; L = 0 in the visual domains.
    question : (B, Q, Lq) int64 token ids.
    answer : (B, Q) int64 token ids.
    target : (B, Q, P, R, C) bool, or (B, Q, L) bool over the words: where the answer stands.
    page : (B, Q) int64, the page that the question names (documents), else 0.
    """

    domain: str
    key: np.ndarray
    glyph: np.ndarray
    shift: np.ndarray
    words: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    target: np.ndarray
    page: np.ndarray

    def pixels(self) -> np.ndarray:
        """The pictures, (B, P, R * 16, C * 16, 3) uint8: black ink on a white cell in its frame."""
        cells = np.minimum(_frames()[self.key], 255 - _glyphs()[self.glyph, self.shift][..., None])
        b, p, r, c = self.key.shape
        return cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, p, r * CELL, c * CELL, 3)

    def patches(self) -> np.ndarray:
        """What the processor makes of the pictures, (B * P' * R * C * 4, 384) float32, without PIL and resizing.

        P' counts pairs of frames for a video. A row is one 8 x 8 px patch as (channel, frame, y, x), values in
        [-1, 1]; the four patches of a merged token follow each other.
        """
        x = np.minimum(_frames()[self.key], 255 - _glyphs()[self.glyph, self.shift][..., None])
        b, p, r, c = self.key.shape
        step = 2 if self.domain == "video" else 1
        # (B, P', frame in pair, R, C, merge y, y, merge x, x, channel)
        x = x.reshape(b, p // step, step, r, c, 2, 8, 2, 8, 3)
        x = x.transpose(0, 1, 3, 4, 5, 7, 9, 2, 6, 8)  # (B, P', R, C, merge y, merge x, channel, frame, y, x)
        if step == 1:
            x = np.repeat(x, 2, axis=7)
        return (x.reshape(-1, 384).astype(np.float32) / 255 - 0.5) / 0.5


def _keys(rng, b: int, n: int, distinct_colours: bool) -> np.ndarray:
    """(B, n) keys, different from each other within a scene."""
    if distinct_colours:
        colour = rng.random((b, len(COLOURS))).argsort(1)[:, :n]
        return rng.integers(len(STYLES), size=(b, n)) * len(COLOURS) + colour
    return rng.random((b, N_KEYS)).argsort(1)[:, :n]


def _ask(rng, b: int, q: int, n: int) -> np.ndarray:
    """(B, Q) which of n needles each question is about: different ones while they last."""
    return np.concatenate([rng.random((b, n)).argsort(1) for _ in range(-(-q // n))], 1)[:, :q]


def _word(*parts) -> np.ndarray:
    """Stack token ids (arrays (B, Q) or words) into questions (B, Q, len(parts))."""
    shape = next(p.shape for p in parts if not isinstance(p, str))
    return np.stack([np.full(shape, VOCABULARY[p]) if isinstance(p, str) else p for p in parts], -1)


def draw(
    domain: str,
    rng: np.random.Generator,
    n: int,
    *,
    split: str = "train",
    questions: int = 1,
    cells: int | None = None,
    pages: int = 8,
    frames: int = 8,
    hay: int = 0,
    side: int | None = None,
) -> Scenes:
    """Draw scenes of one layout.

    Parameters
    ----------
    domain : "image" | "document" | "video" | "text" | "majority" | "count" | "text_only".
    rng : source of all randomness.
    n : number of scenes B.
    split : which handwritten digits are used.
    questions : questions per scene Q.
    cells : image, majority, count: cells in the picture, a square number (default 16). document: cells a page
        (default 4). video: different digits in the video, at most 9 (default 6). text: records (default 16).
    pages, frames : document: pages, at most 12. video: frames, an even number from 4.
    hay : document, video: that many more pages or frames, which hold no key, anywhere among the others; half of their
        cells show a digit without a frame. In a video an even number; the digits with a frame appear at any time.
    side : image, majority, count, document: pictures of side x side cells, of which those not needed stay blank
        (anywhere in a picture, at the end of a page). By default as few as hold the cells.

    Returns
    -------
    Scenes
    """
    first, last = SPLITS[split]
    labels = digits()[1]
    none = np.zeros((n, 0, 0, 0), np.int64)
    blank_key, mark0 = N_KEYS, len(labels)
    blank_glyph = mark0 + len(MARKS)
    page = np.zeros((n, questions), np.int64)
    rows = np.arange(n)[:, None]

    def digit(*shape):
        return rng.integers(first, last, size=shape)

    def strew(*shape):
        """Keys and glyphs of hay."""
        return np.full(shape, blank_key), np.where(rng.random(shape) < 0.5, digit(*shape), blank_glyph)

    def key_words(key):
        return _STYLE0 + key // len(COLOURS), _COLOUR0 + key % len(COLOURS)

    if domain == "text_only":
        a, b = rng.integers(10, size=(2, n, questions))
        return Scenes(
            domain,
            *(none,) * 3,
            words=np.zeros((n, 0), np.int64),
            question=_word("sum", _DIGIT0 + a, _DIGIT0 + b),
            answer=_DIGIT0 + (a + b) % 10,
            target=np.zeros((n, questions, 0), bool),
            page=page,
        )
    if domain == "text":
        cells = 16 if cells is None else cells
        key, value = _keys(rng, n, cells, cells <= 4), rng.integers(10, size=(n, cells))
        style, colour = key_words(key)
        words = np.stack([style, colour, _DIGIT0 + value, np.full_like(style, VOCABULARY[";"])], -1)  # (B, cells, 4)
        asked = _ask(rng, n, questions, cells)
        target = np.zeros((n, questions, cells, 4), bool)
        np.put_along_axis(target, asked[:, :, None, None], True, axis=2)
        return Scenes(
            domain,
            *(none,) * 3,
            words=words.reshape(n, -1),
            question=_word("digit", *key_words(key[rows, asked])),
            answer=_DIGIT0 + value[rows, asked],
            target=target.reshape(n, questions, -1),
            page=page,
        )
    if domain in ("image", "majority", "count"):
        cells = 16 if cells is None else cells
        least = round(cells**0.5)
        side = least if side is None else side
        if least * least != cells or cells > N_KEYS or side < least:
            raise ValueError(
                f"cells={cells}, side={side}: a picture has a square number of cells, at most {N_KEYS}, and holds them"
            )
        if domain == "image":
            key = _keys(rng, n, cells, cells <= 4)
        else:  # keys may repeat; a colour of each scene's own stands out by its weight
            weight = rng.dirichlet(np.full(len(COLOURS), 0.7), size=n).cumsum(1)
            colour = (rng.random((n, cells, 1)) > weight[:, None]).sum(-1).clip(max=len(COLOURS) - 1)
            key = rng.integers(len(STYLES), size=(n, cells)) * len(COLOURS) + colour
        glyph = digit(n, cells)
        if domain == "image":
            asked = _ask(rng, n, questions, cells)
            question = _word("digit", *key_words(key[rows, asked]))
            answer = _DIGIT0 + labels[glyph[rows, asked]]
            target = np.arange(cells) == asked[..., None]
        else:
            tally = (colour[..., None] == np.arange(len(COLOURS))).sum(1)  # (B, 8)
            target = np.ones((n, questions, cells), bool)
            if domain == "majority":  # break ties by recolouring one cell of the runner-up
                top = tally.argmax(1)
                tied = (tally == tally.max(1, keepdims=True)).sum(1) > 1
                for i in np.flatnonzero(tied):
                    j = np.flatnonzero(colour[i] != top[i])[0]
                    key[i, j] += top[i] - colour[i, j]
                question = _word("majority", np.zeros((n, questions), np.int64))[..., :1]
                answer = np.repeat(_COLOUR0 + top[:, None], questions, 1)
            else:  # colours with a one-digit count, those that are there first
                order = (rng.random(tally.shape) + 2 * (tally > 9) + 0.8 * (tally == 0)).argsort(1)
                c = np.concatenate([order] * -(-questions // 8), 1)[:, :questions]
                question = _word("count", _COLOUR0 + c)
                answer = _DIGIT0 + tally[rows, c].clip(max=9)
        if side > least:
            place = rng.random((n, side * side)).argsort(1)[:, :cells]
            held, room = (key, glyph, target), (n, side * side)
            key, glyph = np.full(room, blank_key), np.full(room, blank_glyph)
            key[rows, place], glyph[rows, place] = held[:2]
            target = np.zeros((n, questions, side * side), bool)
            np.put_along_axis(target, np.broadcast_to(place[:, None], (n, questions, cells)), held[2], axis=2)
        shape = (n, 1, side, side)
        key, glyph = key.reshape(shape), glyph.reshape(shape)
        target = target.reshape(n, questions, 1, side, side)
    elif domain == "document":
        cells = 4 if cells is None else cells
        if pages > len(MARKS):
            raise ValueError(f"pages={pages}: there are {len(MARKS)} heading marks, so at most as many pages")
        columns = side or (1 if cells == 1 else 2)
        body = side - 1 if side else -(-cells // columns)
        if cells > body * columns:
            raise ValueError(f"cells={cells}, side={side}: a page of {side} x {side} cells has one row for its heading")
        mark = rng.random((n, len(MARKS))).argsort(1)[:, :pages]
        pool = _keys(rng, n, cells, False)  # every page has the same keys, each time in another order
        order = rng.random((n, pages, cells)).argsort(2)
        key = np.full((n, pages, (1 + body) * columns), blank_key)
        glyph = np.full_like(key, blank_glyph)
        glyph[:, :, 0] = mark0 + mark
        key[:, :, columns : columns + cells] = pool[rows[..., None], order]
        glyph[:, :, columns : columns + cells] = digit(n, pages, cells)
        asked = _ask(rng, n, questions, pages * cells)
        page, place = asked // cells, columns + asked % cells
        question = _word("digit", _MARK0 + mark[rows, page], *key_words(key[rows, page, place]))
        answer = _DIGIT0 + labels[glyph[rows, page, place]]
        if hay:
            pages += hay
            at = np.sort(rng.random((n, pages)).argsort(1)[:, : key.shape[1]])  # (B, P), pages with a heading
            sheets, key, glyph = (key, glyph), *strew(n, pages, key.shape[2])
            key[rows, at], glyph[rows, at] = sheets
            page = at[rows, page]
        target = np.zeros((n, questions, *key.shape[1:]), bool)
        target[rows, np.arange(questions), page, place] = True
        shape = (n, pages, 1 + body, columns)
        key, glyph, target = key.reshape(shape), glyph.reshape(shape), target.reshape(n, questions, *shape[1:])
    elif domain == "video":
        cells, side = 6 if cells is None else cells, 3
        if cells > side * side or frames % 2 or hay % 2 or frames < 4:
            what = f"cells={cells}, frames={frames}, hay={hay}"
            raise ValueError(f"{what}: at most 9 digits, an even number of frames from 4 and of hay")
        track, value = _keys(rng, n, cells, False), digit(n, cells)
        length = rng.integers(3, min(frames, 6) + 1, size=(n, cells))
        frames += hay
        begin = (rng.random((n, cells)) * (frames - length + 1)).astype(np.int64)
        t = np.arange(frames)[None, :, None]
        visible = (t >= begin[:, None]) & (t < (begin + length)[:, None])  # (B, T, cells)
        # the camera pans by -1, 0 or 1 cells a pair of frames, around the edges, so that no two digits meet
        pan = np.repeat(rng.integers(-1, 2, size=(n, frames // 2, 2)).cumsum(1), 2, axis=1)  # (B, T, 2)
        place = rng.random((n, side * side)).argsort(1)[:, None, :cells]
        place = (place // side + pan[..., :1]) % side * side + (place % side + pan[..., 1:]) % side  # (B, T, cells)
        key = np.full((n, frames, side * side), blank_key)
        glyph = np.full_like(key, blank_glyph)
        if hay:
            bare = ~visible.any(2)
            bare &= bare.reshape(n, -1, 2).all(2).repeat(2, 1)  # (B, T), whole pairs, of which a token sees both
            glyph[bare] = strew(n, frames // 2, side * side)[1].repeat(2, 1)[bare]
        b, f, k = visible.nonzero()
        key[b, f, place[b, f, k]] = track[b, k]
        glyph[b, f, place[b, f, k]] = value[b, k]
        asked = _ask(rng, n, questions, cells)
        question = _word("digit", *key_words(track[rows, asked]))
        answer = _DIGIT0 + labels[value[rows, asked]]
        target = key[:, None] == track[rows, asked][:, :, None, None]
        shape = (n, frames, side, side)
        key, glyph, target = key.reshape(shape), glyph.reshape(shape), target.reshape(n, questions, *shape[1:])
        shift = np.zeros(shape, np.int64)  # one shift a digit, or it would tremble
        shift.reshape(n, frames, -1)[b, f, place[b, f, k]] = rng.integers(9, size=(n, cells))[b, k]
        return Scenes(domain, key, glyph, shift, np.zeros((n, 0), np.int64), question, answer, target, page)
    else:
        raise ValueError(
            f"domain={domain!r}: take one of 'image', 'document', 'video', 'text', 'majority', 'count', 'text_only'"
        )
    shift = rng.integers(9, size=key.shape)
    return Scenes(domain, key, glyph, shift, np.zeros((n, 0), np.int64), question, answer, target, page)


_NAMES = {i: w for w, i in VOCABULARY.items()}


def decode(ids) -> str:
    """Token ids to text."""
    return " ".join(_NAMES[int(i)] for i in ids)


def to_samples(scenes: Scenes, prefix: str, evidence: str = "page") -> list[Sample]:
    """Scenes to `Sample`s with PIL images or video arrays, B * Q of them, ids ``prefix-scene-question``."""
    out = []
    pixels = scenes.pixels() if scenes.key.size else None
    for b in range(len(scenes.answer)):
        if scenes.domain == "text":
            context = [{"type": "text", "text": decode(scenes.words[b]) + "\n"}]
        elif scenes.domain == "text_only":
            context = []
        elif scenes.domain == "video":
            context = [{"type": "video", "video": pixels[b], "fps": FPS}]
        else:
            context = [{"type": "image", "image": Image.fromarray(picture)} for picture in pixels[b]]
        for q in range(scenes.answer.shape[1]):
            at = np.argwhere(scenes.target[b, q])
            if scenes.domain == "text":
                where = [Span(decode(scenes.words[b][scenes.target[b, q]]))]
            elif scenes.domain == "video":
                where = [Tube(0, {int(f): _box(r, r, c, c) for f, r, c in at})]
            elif scenes.domain == "document" and evidence == "page":
                where = [Pages([scenes.page[b, q]])]
            else:
                where = [
                    Region(int(p), _box(*at[at[:, 0] == p, 1][[0, -1]], *at[at[:, 0] == p, 2][[0, -1]]))
                    for p in np.unique(at[:, 0])
                ]
            text = decode(scenes.question[b, q])
            messages = [{"role": "user", "content": [*context, {"type": "text", "text": text}]}]
            meta = {"domain": scenes.domain, "scene": b, "page": int(scenes.page[b, q])}
            answer = decode([scenes.answer[b, q]])
            out.append(Sample(f"{prefix}-{b}-{q}", messages, where, answer, text, meta))
    return out


def _box(top, bottom, left, right) -> tuple[int, int, int, int]:
    return int(left) * CELL, int(top) * CELL, (int(right) + 1) * CELL, (int(bottom) + 1) * CELL


def samples(
    domain: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    questions: int = 1,
    evidence: str = "page",
    **layout,
) -> list[Sample]:
    """Digit-needle samples for scoring and evaluation.

    Parameters
    ----------
    domain : "image" | "document" | "video" | "text" | "majority" | "count" | "text_only".
    split : "train" | "validation" | "test"; digits of one split never appear in another.
    n : number of samples; a multiple of `questions`.
    seed : the same seed gives the same samples.
    questions : questions that share one context; they follow each other.
    evidence : documents only: "page" marks the whole page (as the paper does), "cell" the cell with the answer.
    **layout : cells=, pages=, frames=, hay=, side= as in `draw`.

    Returns
    -------
    list of Sample
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: take one of {sorted(SPLITS)}")
    if evidence not in ("page", "cell"):
        raise ValueError(f"evidence={evidence!r}: take 'page' or 'cell'")
    if n % questions:
        raise ValueError(f"n={n} is no multiple of questions={questions}")
    name = "-".join([domain, split, str(seed), *(f"{k}{v}" for k, v in sorted(layout.items()))])
    rng = np.random.default_rng([seed, *name.encode()])
    scenes = draw(domain, rng, n // questions, split=split, questions=questions, **layout)
    return to_samples(scenes, name, evidence)
