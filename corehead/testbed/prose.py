"""Look-ups in plain English, for pretrained language models: a few sentences, and the beginning of one of them again.

"traits": kinds of sentences about people, each kind said of two, such as "Anna lives in Oslo." and "Bert lives in
Rome."; the answer is a word. "codes": "The secret code of Anna is 4719.", where the answer is four digits, a token each
in SmolLM2. No template and no instruction: some of the sentences come again, then the beginning of another, and the
model goes on. (Without those a small model would rather say something new.)
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import yaml

from ..samples import Sample, Span
from .scenes import SPLITS, check_split, with_foils

WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
TASKS = ("traits", "codes")
RECALLED = 3  # sentences that come again in front of the question


def values(task: str, split: str) -> dict[str, list[str]]:
    """What may be told of somebody in a split, by the beginning of the sentence; no value is in two splits."""
    found = {}
    for beginning, words in WORDS[task].items():
        # a range of numbers, or words
        of_all = words.split() if isinstance(words, str) else range(words[0], words[1] + 1)
        found[beginning] = part([str(word) for word in of_all], split)
    return found


def people(split: str) -> list[str]:
    """Who may be told of in a split; nobody is in two."""
    return part(WORDS["people"].split(), split)


def part(words: list[str], split: str) -> list[str]:
    """A third of the words for each split, the same for ever."""
    order = np.random.default_rng(0).permutation(len(words))
    return [words[i] for i in order[list(SPLITS).index(split) :: 3]]


def samples(
    task: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    questions: int = 1,
    sentences: int = 8,
    depth: float | None = None,
) -> list[Sample]:
    """Samples in plain English.

    Parameters
    ----------
    task : {"traits", "codes"}
    split : {"train", "validation", "test"}
        Names and values of one never appear in another.
    n, seed, questions : int
        As in `corehead.testbed.samples`.
    sentences : int
        In the context, each of another person and with another value. Of traits, half as many kinds.
    depth : float, optional
        Where the sentence stands that is asked for: 0 first, 1 last. None: anywhere.

    Returns
    -------
    list of Sample
        The evidence is the value in its sentence. Their meta: domain, scene, item (the value), place (of the sentence,
        from 0).

    Raises
    ------
    ValueError
        An unknown task or split; sizes that do not fit; a depth with several questions.
    """
    return [base for base, _ in _pairs(task, split, n, seed, questions, sentences, depth)]


def counterfactuals(
    task: str, split: str = "test", n: int = 100, seed: int = 0, **layout
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples that differ in nothing but the value that is asked for, from its first letter or digit on.

    Parameters
    ----------
    task, split, n, seed, **layout
        As in `samples`, with one question a context.

    Returns
    -------
    list of (Sample, Sample)
        Each has the other's answer as its foil.

    Raises
    ------
    ValueError
        As in `samples`.
    """
    return with_foils(_pairs(task, split, n, seed, **layout))


def _pairs(
    task: str,
    split: str,
    n: int,
    seed: int,
    questions: int = 1,
    sentences: int = 8,
    depth: float | None = None,
) -> list[tuple[Sample, Sample]]:
    """Samples, and the same ones with another value told."""
    _check(task, split, n, questions, sentences, depth)
    known, told = people(split), values(task, split)
    name = f"{task}-{split}-{seed}-sentences{sentences}"
    if depth is not None:
        name += f"-depth{depth:g}"
    rng = np.random.default_rng([seed, *name.encode()])

    def shuffled(items: list[str]) -> list[str]:
        return [items[i] for i in rng.permutation(len(items))]

    found = []
    for scene in range(n // questions):
        who = shuffled(known)
        # each kind of sentence twice, so that it takes the person to know which is meant; codes have one kind
        kinds = islice(cycle(shuffled(list(told))[: -(-sentences // 2)]), sentences)
        kinds = shuffled(list(kinds))
        # not a set, whose order differs from process to process
        left = {kind: shuffled(told[kind]) for kind in dict.fromkeys(kinds)}
        said = [(kind.format(who.pop()), left[kind].pop()) for kind in kinds]
        places = rng.permutation(sentences).tolist()
        if depth is not None:
            asked = round(depth * (sentences - 1))
            places = [asked, *(place for place in places if place != asked)]
        recalled = places[-RECALLED:]
        for i, place in enumerate(places[:questions]):
            other = list(said)
            beginning, value = said[place]
            # of another first letter or digit, so that the answers part at their first token
            others = [word for word in left[kinds[place]] if word[0] != value[0]]
            other[place] = beginning, others[-1]
            base, donor = (_sample(task, facts, place, recalled) for facts in (said, other))
            meta = base.meta | {"scene": scene}
            found.append(
                (
                    replace(base, id=f"{name}-{scene}-{i}", meta=meta),
                    replace(donor, id=f"{name}-{scene}-{i}-foil", meta=meta),
                )
            )
    return found


def _sample(
    task: str, facts: list[tuple[str, str]], place: int, recalled: list[int]
) -> Sample:
    """All sentences, some of them again, and the beginning of the one at a place."""
    blank = "" if facts[0][0].endswith(" ") else " "
    lines = [f"{beginning}{blank}{value}.\n" for beginning, value in facts]
    context = "".join([*lines, "\n", *(lines[i] for i in recalled)])
    question, value = facts[place]
    parts = [{"type": "text", "text": text} for text in (context, question)]
    return Sample(
        id=task,
        messages=[{"role": "user", "content": parts}],
        evidence=[Span(blank + value)],
        answer=blank + value,
        question=question,
        meta={"domain": task, "item": value, "place": place},
    )


def _check(task, split, n, questions, sentences, depth) -> None:
    if task not in TASKS:
        raise ValueError(f"task={task!r}: take one of {', '.join(map(repr, TASKS))}")
    check_split(split)
    most = 2 * len(WORDS[task]) if task == "traits" else len(people(split))
    if not RECALLED < sentences <= most:
        raise ValueError(f"sentences={sentences}: take {RECALLED + 1} to {most}")
    if not 1 <= questions <= sentences - RECALLED or n % questions:
        raise ValueError(
            f"n={n}, questions={questions}: take n a multiple of questions, at most {sentences - RECALLED} of these"
        )
    if depth is not None and (questions > 1 or not 0 <= depth <= 1):
        raise ValueError(
            f"depth={depth}, questions={questions}: take 0 to 1, and one question a context"
        )
