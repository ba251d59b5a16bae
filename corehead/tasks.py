"""Samples of any task by its name: what the notebooks ask, whatever the profile."""

from __future__ import annotations

from .samples import Sample
from .testbed import generator, pretrained


def samples(
    task: str, split: str = "test", n: int = 100, seed: int = 0, *, questions: int = 1, **layout
) -> list[Sample]:
    """Samples of a task.

    Parameters
    ----------
    task : of the digit-needle testbed ("image", "document", "video", "text", "majority", "count", "text_only") or for
        the grafted SmolLM2 ("copy_text", "copy_image", "facts").
    split : "train" | "validation" | "test".
    n : number of samples; a multiple of `questions`.
    seed : the same seed gives the same samples.
    questions : questions that share one context; they follow each other.
    **layout : what the task takes besides: see `samples` in `corehead.testbed.generator` and `.pretrained`.
    """
    source = pretrained if task in pretrained.TASKS else generator
    return source.samples(task, split, n, seed, questions=questions, **layout)
