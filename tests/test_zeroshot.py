"""Zero-shot tasks: a context shows what is asked for in its evidence, and nowhere else."""

import re
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from conftest import FAMILIES, tiny
from matplotlib.path import Path
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_fill_holes, label
from scipy.signal import fftconvolve

import corehead as ch
from corehead import tasks
from corehead.testbed.scenes import SPLITS
from corehead.zeroshot import RETRIEVAL, TASKS, counterfactuals, samples, words
from corehead.zeroshot.drawing import font, line_height
from corehead.zeroshot.pages import LINES, RenderedPages, Sheet

# small and large, with boxes for evidence
DRAWN = [
    ("pages", dict(pages=3, evidence="line")),
    ("pages", dict(pages=2, facts=9, side=384, evidence="line")),
    ("pages", dict(pages=2, facts=3, side=700, evidence="line")),
    ("pictures", dict(cells=4)),
    ("pictures", dict(cells=9)),
    ("pictures", dict(cells=16)),
    ("pictures", dict(cells=9, side=600)),
    ("clips", dict(frames=8, cards=4)),
    ("clips", dict(frames=12, cards=5, side=256)),
]
each_drawn = pytest.mark.parametrize(("task", "layout"), DRAWN)
each_task = pytest.mark.parametrize("task", TASKS)
each_retrieval = pytest.mark.parametrize("task", RETRIEVAL)
each_split = pytest.mark.parametrize("split", SPLITS)
SMALL = {
    "pages": dict(pages=2, facts=3, side=256),
    "pictures": dict(cells=4, side=192),
    "clips": dict(frames=4, cards=2, side=192),
    "letters": dict(pages=2, facts=3),
    "colour_majority": dict(cells=4, side=192),
    "colour_count": dict(cells=4, side=192),
}


def media(sample) -> list[np.ndarray]:
    """All pictures and frames (H, W, 3)."""
    shown = []
    for part in sample.messages[0]["content"]:
        if part["type"] == "image":
            shown.append(np.asarray(part["image"]))
        if part["type"] == "video":
            shown += list(part["video"])
    return shown


def text(sample) -> str:
    """Everything in front of the question, and the question."""
    return "".join(part.get("text", "") for part in sample.messages[0]["content"])


def boxes(sample) -> list[tuple[int, tuple[int, int, int, int]]]:
    """The evidence: pictures or frames, and boxes in them."""
    known = []
    for piece in sample.evidence:
        known += (
            [(piece.image, piece.box)]
            if isinstance(piece, ch.Region)
            else piece.boxes.items()
        )
    return known


@cache
def alone(words: str, size: int, bold: bool = False) -> np.ndarray:
    """(h, w) ink of a text that is drawn by itself."""
    page = Image.new("L", (size * len(words) + 20, 2 * size + 20))
    ImageDraw.Draw(page).text((10, 10), words, 255, font(size, bold))
    return np.asarray(page.crop(page.getbbox())).astype(float)


def distance(picture: np.ndarray, ink: np.ndarray) -> float:
    """How far the most similar place of a picture (H, W, 3) is from the ink (h, w), whatever the two colours are.

    1 - r^2 with r the correlation of pixels: 0 is the same drawing.
    """
    grey = picture.astype(float).mean(-1)
    if any(a < b for a, b in zip(grey.shape, ink.shape)):
        return 1.0
    centred = (ink - ink.mean())[::-1, ::-1]
    ones = np.ones_like(ink)
    cross = fftconvolve(grey, centred, "valid")
    total = fftconvolve(grey, ones, "valid")
    power = fftconvolve(grey**2, ones, "valid") - total**2 / ink.size
    # places of one colour have no power, and are like nothing
    return float(1 - (cross**2 / power.clip(1e3) / (centred**2).sum()).max())


def from_answer(picture: np.ndarray, sample) -> float:
    """`distance` from the answer, in any size of letters that makes lines of its height."""
    height = sample.meta["line_height"]
    sizes = [size for size in range(6, 200) if line_height(size) == height]
    return min(distance(picture, alone(sample.answer, size)) for size in sizes)


# --- what is shown


@each_drawn
def test_the_evidence_shows_the_answer_and_nothing_else_does(task, layout):
    for sample in samples(task, "test", 6, questions=3, **layout):
        pictures = media(sample)
        rest = [picture.copy() for picture in pictures]
        inside = []
        for number, (x1, y1, x2, y2) in boxes(sample):
            inside.append(from_answer(pictures[number][y1:y2, x1:x2], sample))
            rest[number][y1:y2, x1:x2] = 128
        # of a sentence that goes over a line's end one line has it, of a clip all frames
        assert (max if task == "clips" else min)(inside) < 0.01
        # frames come in pairs
        assert (
            min(from_answer(picture, sample) for picture in rest[:: 1 + (task == "clips")])
            > 0.1
        )


def test_a_page_has_the_heading_and_the_line_the_key_that_are_asked_for():
    layout = dict(pages=3, side=384, evidence="line")
    for sample in samples("pages", "test", 8, questions=4, **layout):
        key, place = sample.question[:-1].split(" is the ")[1].split(" of the ")
        pictures, size = media(sample), 384 // LINES * 4 // 5
        page = boxes(sample)[0][0]
        heading = alone(place, size * 3 // 2, bold=True)
        assert [distance(p[:80], heading) < 0.01 for p in pictures] == [
            i == page for i in range(3)
        ]
        # as it stands in a list or table, or word by word, since a line may end between two
        lines = [pictures[i][y1:y2, x1:x2] for i, (x1, y1, x2, y2) in boxes(sample)]
        in_one = distance(lines[0], alone(key.capitalize(), size)) < 0.01
        by_word = all(
            min(distance(line, alone(w, size)) for line in lines) < 0.01
            for w in key.split()
        )
        assert in_one or by_word


@pytest.mark.parametrize("distractors", [0, 2, 7])
def test_as_many_other_letters_tell_the_same_as_there_are_distractors(distractors):
    for sample in samples("letters", n=12, questions=3, distractors=distractors, facts=8):
        key = sample.question.split(" is the ")[1].split(" of the ")[0]
        *_, context, _ = [part["text"] for part in sample.messages[0]["content"]]
        assert context.lower().count(key) == 1 + distractors


def star(u, v):
    angle = np.arange(10) / 10 * 2 * np.pi - np.pi / 2
    radius = np.where(np.arange(10) % 2, 0.55, 1)
    outline = Path(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))
    return outline.contains_points(np.stack([u.ravel(), v.ravel()], 1)).reshape(u.shape)


# u to the right, v down, in radii
INSIDE = {
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.5**0.5,
    "diamond": lambda u, v: abs(u) + abs(v) < 1,
    "triangle": lambda u, v: (v < 0.5) & (3**0.5 * abs(u) - 1 < v),
    "hexagon": lambda u, v: (abs(v) < 0.75**0.5) & (abs(u) + abs(v) / 3**0.5 < 1),
    "star": star,
}


@pytest.mark.parametrize("cells", [4, 9, 16])
def test_the_shape_that_is_asked_for_is_in_the_evidence(cells):
    for sample in samples("pictures", "test", 12, questions=4, cells=cells):
        colour, shape = sample.question[:-1].split()[-2:]
        [(_, (x1, y1, x2, y2))] = boxes(sample)
        [picture] = media(sample)
        # with its text, and with its rim
        filled = binary_fill_holes((picture == words.COLOURS[colour]).all(-1))
        filled = binary_dilation(filled)
        radius = (x2 - x1 - 5) / 2
        v, u = (
            np.mgrid[y1:y2, x1:x2] - np.array([y1 + y2 - 1, x1 + x2 - 1])[:, None, None] / 2
        ) / radius
        like = {
            name: (filled[y1:y2, x1:x2] == inside(u, v)).mean()
            for name, inside in INSIDE.items()
        }
        assert max(like, key=like.get) == shape and like[shape] > 0.9


@pytest.mark.parametrize("task", ["colour_majority", "colour_count"])
@pytest.mark.parametrize("cells", [4, 9, 16])
def test_colours_are_as_often_there_as_the_answer_says(task, cells):
    for sample in samples(task, "test", 12, cells=cells):
        [picture] = media(sample)
        count = {}
        for colour, rgb in words.COLOURS.items():
            pieces, _ = label((picture == rgb).all(-1))
            # a photograph has single pixels of any colour
            count[colour] = int((np.bincount(pieces.ravel())[1:] > 100).sum())
        assert sum(count.values()) == cells
        if task == "colour_count":
            assert sample.answer == str(count[sample.question.split()[2]])
        else:
            most = [colour for colour in count if count[colour] == max(count.values())]
            assert most == [sample.answer]
        assert boxes(sample) == [(0, (0, 0, *picture.shape[1::-1]))]


@each_split
def test_a_span_stands_once_in_all_that_is_read(split):
    for layout in (dict(pages=1), dict(pages=8, facts=9), dict(pages=64, facts=3)):
        for sample in samples("letters", split, 30, questions=3, **layout):
            [span] = sample.evidence
            assert span.text == sample.answer and text(sample).count(span.text) == 1
            # under its place's heading, in a line with its key
            key, place = sample.question[:-1].split(" is the ")[1].split(" of the ")
            [letter] = [t for t in text(sample).split("\n\n") if t.startswith(place + "\n")]
            [line] = [line for line in letter.split("\n") if span.text in line]
            [sentence] = [s for s in line.split(". ") if span.text in s]
            assert key in sentence.lower()


def test_every_page_holds_all_that_is_written_on_it():
    for seed in range(30):
        document = RenderedPages(np.random.default_rng(seed), "test", pages=2, facts=9)
        for page in document.pages:
            sheet = Sheet(512, page, [question.value for question in document.questions])
            ink = np.asarray(sheet.image).min(-1) < 128
            assert (
                sheet.y + sheet.pitch <= 512
                and not ink[:, :8].any()
                and not ink[:, -8:].any()
            )


# --- what is split


def test_no_name_and_no_value_is_in_two_splits():
    kinds = {
        "cities": words.cities,
        "people": words.people,
        "words": words.words,
        "numbers of three digits": lambda split: words.numbers(split, 3),
        "numbers of four digits": lambda split: words.numbers(split, 4),
        "looks": words.looks,
    }
    for kind, of in kinds.items():
        sets = [set(of(split)) for split in SPLITS]
        assert all(sets) and not any(a & b for a, b in combinations(sets, 2)), kind


@each_split
def test_a_context_shows_names_and_values_of_its_split_alone(split):
    for sample in samples("letters", split, 6, pages=16):
        shown = text(sample)
        assert set(re.findall(r"\d{4}", shown)) <= set(words.numbers(split, 4))
        others = [s for s in SPLITS if s != split]
        for of in (words.cities, words.people):
            assert not any(
                re.search(rf"\b{name}\b", shown) for s in others for name in of(s)
            )
    for task in ("pictures", "clips"):
        for sample in samples(task, split, 24, questions=4):
            look = tuple(sample.question[:-1].split()[-2:])
            assert look in words.looks(split)
            assert sample.answer in words.words(split) + words.numbers(split, 3)


# --- what is asked


def same(a, b) -> bool:
    """Whether two samples show the same pictures and texts, the question included."""
    pictures = zip(media(a), media(b), strict=True)
    return text(a) == text(b) and all(np.array_equal(x, y) for x, y in pictures)


@each_task
def test_the_same_seed_gives_the_same_samples(task):
    first, again, other = (
        samples(task, n=2, seed=seed, **SMALL[task]) for seed in (0, 0, 1)
    )
    assert all(
        same(a, b) and a.id == b.id and a.answer == b.answer for a, b in zip(first, again)
    )
    assert not any(same(a, b) for a, b in zip(first, other))
    # more contexts, or more questions on each, leave the contexts as they are
    more = samples(task, n=3, **SMALL[task])
    assert all(same(a, b) for a, b in zip(first, more))
    assert len({s.id for s in [*more, *other]}) == 5


@pytest.mark.parametrize("task", [task for task in TASKS if task != "colour_majority"])
def test_questions_on_a_context_differ_and_share_its_objects(task):
    asked = samples(task, n=6, questions=2, **SMALL[task])
    for a, b in zip(asked[::2], asked[1::2]):
        *context, question = a.messages[0]["content"]
        *shared, other = b.messages[0]["content"]
        assert question != other and all(
            x[x["type"]] is y[y["type"]] for x, y in zip(context, shared)
        )
    mllm = tiny("qwen3_vl")
    answers = ch.evaluate(mllm, asked, progress=False)
    assert answers.context.nunique() == 3


@each_task
def test_the_question_is_quoted_and_says_what_kind_of_answer_is_wanted(task):
    kinds = {
        "number": "[0-9]+",
        "name": "[A-Z][a-z]+",
        "word": "[a-z]{4}",
        "colour": "|".join(words.COLOURS),
    }
    for sample in samples(task, n=20):
        last = sample.messages[0]["content"][-1]["text"]
        begin, kind = re.fullmatch(r"(.*\? )Answer with the (\w+) alone\.", last).groups()
        assert begin == sample.question + " " and re.fullmatch(kinds[kind], sample.answer)
        assert sample.meta["domain"] == task


# --- counterfactuals


@each_retrieval
def test_counterfactuals_differ_in_the_evidence_alone(task):
    layout = SMALL[task] | ({"evidence": "line"} if task == "pages" else {})
    for base, donor in counterfactuals(task, "validation", 12, **layout):
        assert base.question == donor.question
        assert (base.foil, donor.foil) == (donor.answer, base.answer)
        # the first token tells the two apart
        assert base.answer[0] != donor.answer[0]
        if task == "letters":
            assert text(base).replace(base.answer, donor.answer) == text(donor)
            continue
        assert text(base) == text(donor) and base.evidence == donor.evidence
        changed = np.stack(media(base)) != np.stack(media(donor))
        for number, (x1, y1, x2, y2) in boxes(base):
            assert changed[number, y1:y2, x1:x2].any() or task == "pages"
            changed[number, y1:y2, x1:x2] = False
        assert not changed.any()
        assert from_answer(np.concatenate(media(donor)), donor) < 0.01


def test_tasks_of_the_package_find_them_by_name():
    assert [s.id for s in tasks.samples("pictures", n=2)] == [
        s.id for s in samples("pictures", n=2)
    ]
    [(base, donor)] = tasks.counterfactuals("letters", "validation", 1)
    assert base.foil == donor.answer
    assert tasks.counterfactuals("colour_count", n=1) == []


# --- in the families

UNIT = {
    "qwen3_vl": 32,
    "internvl": 28,
    "llava_onevision": 14,
}  # pixels along a token, after resizing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("task", "layout"),
    [
        ("pages", dict(pages=2, evidence="line")),
        ("pictures", {}),
        ("pictures", dict(cells=16)),
        ("clips", dict(frames=12)),
    ],
)
def test_lines_are_12_pixels_high_in_what_a_released_processor_makes_of_them(
    family, task, layout
):
    mllm = tiny(family, real_tiles=True)
    for sample in samples(task, n=6, **layout):
        tagged = mllm.tag(sample)
        where = tagged.media[boxes(sample)[0][0] if task == "pages" else 0]
        heights = where.boxes[:, 3] - where.boxes[:, 1]
        # the finest view; LLaVA's frames are halved after the vision tower has seen them, a token there is two units
        unit = UNIT[family] * (2 if family == "llava_onevision" and task == "clips" else 1)
        scale = unit / np.nanmedian(heights[np.isfinite(heights)])
        assert sample.meta["line_height"] * scale >= 12
        assert len(tagged.evidence) and set(tagged.evidence) <= set(tagged.visual)


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_model_of_every_family_scores_and_answers(family):
    mllm = tiny(family)
    asked = ["letters"] if family == "llama" else TASKS
    every = [s for task in asked for s in samples(task, n=2, **SMALL[task])]
    scores = ch.score(mllm, every, progress=False)
    assert list(scores.by("domain")) == list(asked)
    # all of a picture is evidence where all of it is asked about
    whole = [s for s in every if s.meta["domain"].startswith("colour")]
    assert all(
        np.array_equal(t.evidence, t.visual) or np.isnan(t.media[0].boxes).any()
        for t in map(mllm.tag, whole)
    )
    pairs = [
        pair
        for task in asked
        if task in RETRIEVAL
        for pair in counterfactuals(task, n=1, **SMALL[task])
    ]
    answers = ch.evaluate(
        mllm, [sample for pair in pairs for sample in pair], progress=False
    )
    assert np.isfinite(answers.contrast).all()


def test_constructions_agree_on_pages_and_frames():
    [document] = samples("pages", n=1, **SMALL["pages"])
    [clip] = samples("clips", n=1, evidence="frames", **SMALL["clips"])
    for family in FAMILIES:
        for sample in (document, clip):
            by_geometry = tiny(family).tag(sample).evidence
            assert np.array_equal(
                by_geometry, tiny(family).tag(sample, "counting").evidence
            )


# --- what is refused


@pytest.mark.parametrize(
    ("task", "wrong", "said"),
    [
        ("scenes", {}, "task='scenes'"),
        ("pages", dict(split="dev"), "split='dev'"),
        ("pages", dict(pages=65), "pages=65: take 1 to 64"),
        ("letters", dict(facts=10), "facts=10: take 3 to 9"),
        ("pages", dict(pages=2, distractors=2), "distractors=2: take 0 to 1"),
        ("pages", dict(side=100), "side=100"),
        ("pages", dict(evidence="cell"), "evidence='cell'"),
        ("pages", dict(questions=3), "n=4, questions=3"),
        (
            "pages",
            dict(questions=4, pages=1, facts=3),
            "questions=4: pages has 3 a context",
        ),
        ("pictures", dict(cells=17), "cells=17: take 1 to 16"),
        ("colour_majority", dict(questions=2), "questions=2: colour_majority has 1"),
        ("colour_count", dict(cells=3), "cells=3: take 4 to 16"),
        ("clips", dict(frames=13), "frames=13: take an even number"),
        ("clips", dict(frames=10), "frames=10: take 12 to"),
        ("clips", dict(evidence="box"), "evidence='box'"),
    ],
)
def test_what_does_not_fit_is_refused(task, wrong, said):
    with pytest.raises(ValueError, match=said):
        samples(task, **dict(n=4) | wrong)


def test_what_a_task_does_not_know_is_refused():
    with pytest.raises(TypeError, match="frames"):
        samples("pages", n=1, frames=8)
    with pytest.raises(ValueError, match="'colour_count' looks nothing up"):
        counterfactuals("colour_count", n=1)
