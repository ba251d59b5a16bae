"""Samples of any task by its name: what the notebooks ask, whatever the profile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby

from . import benchmarks
from .samples import Sample
from .testbed import generator, pretrained

# benchmarks that say themselves what is for choosing and what for reporting; the others are halved by context
OFFICIAL = {"refcocog": {"validation": "val", "test": "test"}, "vidstg": {"validation": "val", "test": "test"}}


def samples(
    task: str, split: str = "test", n: int = 100, seed: int = 0, *, questions: int = 1, **layout
) -> list[Sample]:
    """Samples of a task.

    Parameters
    ----------
    task : of the digit-needle testbed ("image", "document", "video", "text", "majority", "count", "text_only"), for the
        grafted SmolLM2 ("copy_text", "copy_image", "facts"), or one of `corehead.benchmarks.BENCHMARKS`.
    split : "train" | "validation" | "test". RefCOCOg and VidSTG have these splits; of the other benchmarks, every
        context (picture, document, video) belongs to "validation" or "test" by the hash of its name.
    n : number of samples; a multiple of `questions` where samples are generated.
    seed : the same seed gives the same samples. Of a benchmark, seeds 0, 1, 2 ... are its first, second, third ... n
        samples, in the order of its files; no context is in two of them.
    questions : questions that share one context; they follow each other. Of a benchmark, at most as many.
    **layout : what the task takes besides: see `samples` in `corehead.testbed.generator` and `.pretrained`, and
        `corehead.benchmarks.load`, whose bad rows are left out with a warning.

    Returns
    -------
    list of Sample; ``meta["domain"]`` is the task

    Raises
    ------
    ValueError : no such task or split; a benchmark has fewer samples than n * (seed + 1).
    """
    if task in benchmarks.BENCHMARKS:
        return _of_benchmark(task, split, n, seed, questions, layout)
    source = pretrained if task in pretrained.TASKS else generator
    return source.samples(task, split, n, seed, questions=questions, **layout)


def _of_benchmark(task: str, split: str, n: int, seed: int, questions: int, layout: dict) -> list[Sample]:
    known = OFFICIAL.get(task, ("validation", "test"))
    if split not in known:
        raise ValueError(f"{task} has no split {split!r}: take one of {', '.join(known)}")
    if task in OFFICIAL:
        layout = layout | {"split": OFFICIAL[task][split]}
    skipped, kept = 0, []
    for context in _contexts(benchmarks.load(task, errors="skip", **layout)):
        half = blake2b(context[0].id.encode(), digest_size=1).digest()[0] % 2
        if task not in OFFICIAL and half != known.index(split):
            continue
        kept += [replace(sample, meta=sample.meta | {"domain": task}) for sample in context[:questions]]
        if len(kept) >= n:
            if skipped == seed:
                return kept[:n]
            skipped, kept = skipped + 1, []
    found = f"{len(kept)} samples are left for seed={seed}" if skipped == seed else f"there are {skipped} times {n}"
    raise ValueError(f"{task}, split {split!r}: {found}, with {questions} a context: take a smaller n, or fewer seeds")


def _contexts(found: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples that follow each other with the same media objects."""

    def media(sample: Sample):
        parts = [part for message in sample.messages for part in message["content"] if part["type"] != "text"]
        return [id(part[part["type"]]) for part in parts] or sample.id

    for _, context in groupby(found, media):
        yield list(context)
