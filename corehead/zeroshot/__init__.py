"""Tasks in plain English that a pretrained MLLM can do without training, drawn by code: no benchmark to download.

A document, a picture, a video or a text says what is asked for in one place. "colour_majority" and "colour_count" need
all of a picture. No number, word, name or place of one split is in another; of pictures and videos the pairs of colour
and shape are split, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..samples import Sample
from ..testbed.scenes import check_split, scene_name, with_foils
from .clips import Clips
from .pages import Letters, RenderedPages
from .pictures import Count, Labels, Majority
from .words import INSTRUCTION, Question, Scene

RETRIEVAL = {"pages": RenderedPages, "pictures": Labels, "clips": Clips, "letters": Letters}
TASKS = RETRIEVAL | {"colour_majority": Majority, "colour_count": Count}


def samples(
    task: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    questions: int = 1,
    **layout,
) -> list[Sample]:
    """Samples of a zero-shot task.

    Parameters
    ----------
    task : {"pages", "pictures", "clips", "letters", "colour_majority", "colour_count"}
    split : {"train", "validation", "test"}
    n : int
        Number of samples, a multiple of `questions`.
    seed : int
        The same seed gives the same samples.
    questions : int
        Questions that share one context; they follow each other.
    **layout
        What the task takes: see `pages.Document` (of letters), `pages.RenderedPages`, `pictures.Picture` and
        `clips.Clips`.

    Returns
    -------
    list of Sample
        Their evidence is where the answer stands, or the whole picture. Their meta: domain; item, which is the answer,
        as other samples may share it, but of a whole picture the sample's own id; line_height, how many pixels of the
        picture as given the answer's line is high, 0 where it is not drawn.

    Raises
    ------
    ValueError
        An unknown task or split; sizes that do not fit.
    TypeError
        A size that the task does not take.
    """
    found = []
    for name, scene, order in _scenes(task, split, n, seed, questions, layout):
        context = scene.show([question.value for question in scene.questions])
        found += [
            _sample(f"{name}-{i}", task, context, which, scene.questions[which])
            for i, which in enumerate(order)
        ]
    return found


def counterfactuals(
    task: str, split: str = "test", n: int = 100, seed: int = 0, **layout
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples that differ in nothing but the value that is asked for.

    Parameters
    ----------
    task : {"pages", "pictures", "clips", "letters"}
    split, n, seed, **layout
        As in `samples`, with one question a context.

    Returns
    -------
    list of (Sample, Sample)
        Each has the other's answer as its foil; the two begin with different letters or digits.

    Raises
    ------
    ValueError, TypeError
        As in `samples`; a task that looks nothing up.
    """
    if task not in RETRIEVAL:
        raise ValueError(
            f"task={task!r} looks nothing up: take one of {', '.join(RETRIEVAL)}"
        )
    pairs = []
    for name, scene, [which] in _scenes(f"{task}-pair", split, n, seed, 1, layout):
        question = scene.questions[which]
        values = [question.value for question in scene.questions]
        base = _sample(name, task, scene.show(values), which, question)
        values[which] = question.other
        told = replace(question, value=question.other)
        donor = _sample(f"{name}-foil", task, scene.show(values), which, told)
        pairs.append((base, donor))
    return with_foils(pairs)


def _scenes(
    what: str, split: str, n: int, seed: int, questions: int, layout: dict
) -> Iterator[tuple[str, Scene, list[int]]]:
    """Names, contexts and which questions are asked of each."""
    task = what.removesuffix("-pair")
    if task not in TASKS:
        raise ValueError(f"task={task!r}: take one of {', '.join(map(repr, TASKS))}")
    check_split(split)
    if questions < 1 or n % questions:
        raise ValueError(f"n={n}, questions={questions}: take n a multiple of questions")
    name = scene_name(what, split, seed, layout)
    for number in range(n // questions):
        # a context does not depend on how many there are, or on what is asked of them
        rng = np.random.default_rng([seed, number, *name.encode()])
        scene = TASKS[task](rng, split, **layout)
        known = len(scene.questions)
        if questions > known:
            raise ValueError(f"questions={questions}: {task} has {known} a context here")
        yield f"{name}-{number}", scene, rng.permutation(known)[:questions].tolist()


def _sample(name: str, task: str, context: tuple, which: int, question: Question) -> Sample:
    parts, evidence, heights = context
    text = f"{question.text} {INSTRUCTION.format(question.kind)}"
    meta = {
        "domain": task,
        # what an answer is read from comes back with the value, but not where all of a picture is looked at
        "item": question.value if question.other else name,
        "line_height": heights[which],
    }
    return Sample(
        id=name,
        messages=[{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        evidence=evidence[which],
        answer=question.value,
        question=question.text,
        meta=meta,
    )
