"""What the notebooks ask: samples of any task by its name, and the named task sets of the profiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import yaml

from .samples import Sample

# benchmarks that say themselves what is for choosing and what for reporting; the others are halved by context
OFFICIAL = {
    "refcocog": {"validation": "val", "test": "test"},
    "vidstg": {"validation": "val", "test": "test"},
}


def samples(
    task: str,
    split: str = "test",
    n: int = 100,
    seed: int = 0,
    *,
    questions: int = 1,
    **layout,
) -> list[Sample]:
    """Samples of a task.

    Parameters
    ----------
    task : str
        Of the digit-needle testbed ("image", "document", "video", "text", "majority", "count", "text_only", "memory"),
        in plain English ("traits", "codes"), for the grafted SmolLM2 ("copy_text", "copy_image", "facts"), or one of
        `corehead.zeroshot.TASKS` or `corehead.benchmarks.BENCHMARKS`.
    split : {"train", "validation", "test"}
        RefCOCOg and VidSTG have these splits; of the other benchmarks, every context (picture, document, video) belongs
        to "validation" or "test" by the hash of its name.
    n : int
        Number of samples; a multiple of `questions` where samples are generated.
    seed : int
        The same seed gives the same samples. Of a benchmark, seeds 0, 1, 2 ... are its first, second, third ... n
        samples, in the order of its files; no context is in two of them.
    questions : int
        Questions that share one context; they follow each other. Of a benchmark, at most as many.
    **layout
        What the task takes besides: see `samples` in `corehead.testbed.scenes`, `.prose` and `.graft` and
        in `corehead.zeroshot`, and `corehead.benchmarks.load`, whose bad rows are left out with a warning.

    Returns
    -------
    list of Sample
        ``meta["domain"]`` is the task.

    Raises
    ------
    ValueError
        No such task or split; a benchmark has fewer samples than n * (seed + 1).
    """
    # not at the top: the core imports neither testbed nor benchmarks
    from . import benchmarks, zeroshot
    from .testbed import graft, prose, scenes

    if task in benchmarks.BENCHMARKS:
        return _of_benchmark(task, split, n, seed, questions, layout)
    source = next((s for s in (graft, prose, zeroshot) if task in s.TASKS), scenes)
    return source.samples(task, split, n, seed, questions=questions, **layout)


def counterfactuals(
    task: str, split: str = "test", n: int = 100, seed: int = 0, **layout
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples of a task that differ in nothing but what is looked up, for `corehead.patching`.

    Parameters
    ----------
    task, split, n, seed, **layout
        As in `samples`.

    Returns
    -------
    list of (Sample, Sample)
        Empty where a task cannot be redrawn with another answer, as benchmarks cannot.

    Raises
    ------
    ValueError
        No such task.
    """
    from . import benchmarks, zeroshot
    from .testbed import graft, prose, scenes

    if task in prose.TASKS:
        return prose.counterfactuals(task, split, n, seed, **layout)
    if task in zeroshot.RETRIEVAL:
        return zeroshot.counterfactuals(task, split, n, seed, **layout)
    if task in scenes.WITH_NEEDLE:
        return scenes.counterfactuals(task, split, n, seed, **layout)
    if task not in {*benchmarks.BENCHMARKS, *graft.TASKS, *zeroshot.TASKS, *scenes.DOMAINS}:
        raise ValueError(f"no task {task!r}: `samples` names them all")
    return []


def _of_benchmark(
    task: str, split: str, n: int, seed: int, questions: int, layout: dict
) -> list[Sample]:
    from . import benchmarks

    known = OFFICIAL.get(task, ("validation", "test"))
    if split not in known:
        raise ValueError(f"{task} has no split {split!r}: take one of {', '.join(known)}")
    if task in OFFICIAL:
        layout = layout | {"split": OFFICIAL[task][split]}
    # samples are read one by one, never the whole benchmark: media are large
    skipped = 0
    kept = []
    for context in _contexts(benchmarks.load(task, errors="skip", **layout)):
        # from its name alone, so that a context stays in its half whatever else is read
        half = blake2b(context[0].id.encode(), digest_size=1).digest()[0] % 2
        if task not in OFFICIAL and half != known.index(split):
            continue
        kept += [
            replace(sample, meta=sample.meta | {"domain": task})
            for sample in context[:questions]
        ]
        if len(kept) >= n:
            if skipped == seed:
                return kept[:n]
            # the next seed starts with a new context; what this one had beyond n is not used
            skipped += 1
            kept = []
    found = f"there are {skipped} times {n}"
    if skipped == seed:
        found = f"{len(kept)} samples are left for seed={seed}"
    raise ValueError(
        f"{task}, split {split!r}: {found}, with {questions} a context: take a smaller n, or fewer seeds"
    )


def _contexts(found: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples that follow each other with the same media objects."""

    def media(sample: Sample):
        parts = [part for message in sample.messages for part in message["content"]]
        # by identity, as comparing pixels is expensive; a sample without media stands alone
        return [
            id(part[part["type"]]) for part in parts if part["type"] != "text"
        ] or sample.id

    for _, context in groupby(found, media):
        yield list(context)


# --- task sets


@dataclass(frozen=True)
class TaskSet:
    """The tasks of a profile.

    Attributes
    ----------
    retrieval, others : dict of str to dict
        Layouts, as `samples` takes them, of tasks that look something up and of tasks that do not.
    groups : dict of str to str
        What the others do instead: "context" reads all of a context, "text only" has none.
    plain : str
        The task among the others for scores without media.
    sizes : dict of str to [str, list of int]
        What of a task's layout makes its context larger, and values for it.
    questions : dict of str to int
        How many questions may share a context; one where nothing is said.
    drawn : list of str
        Tasks whose pictures are small enough to be drawn.
    query : str
        The query rows of RAM.
    shares : list of float
        Of the heads, to ablate.
    chance_level : float
        Accuracy of a guess in retrieval.
    min_accuracy : float
        Below it, a model cannot do a task, and its scores mean nothing.
    new_tokens : int
        What the model writes freely, for a benchmark's own metric.
    evidence : dict of str to [str, dict]
        Task and layout for kinds of evidence: "region", "pages", "finer", "tube" and "span", as far as there are any.
    long : dict of str to dict
        Layouts of long contexts.
    sweep : dict
        Of hybrid attention: ``window`` and ``sinks``, and other ``windows`` and ``sink_counts`` to try.
    """

    retrieval: dict[str, dict]
    others: dict[str, dict]
    groups: dict[str, str]
    plain: str
    sizes: dict[str, list]
    questions: dict[str, int]
    drawn: list[str]
    query: str
    shares: list[float]
    chance_level: float
    min_accuracy: float
    new_tokens: int = 0
    evidence: dict[str, list] = field(default_factory=dict)
    long: dict[str, dict] = field(default_factory=dict)
    sweep: dict[str, int | list[int]] = field(default_factory=dict)

    @property
    def layouts(self) -> dict[str, dict]:
        """Those of all tasks, retrieval first."""
        return self.retrieval | self.others

    def samples(
        self,
        split: str,
        n: int,
        seed: int = 0,
        *,
        tasks: Iterable[str] | Mapping[str, dict] = (),
        questions: int = 1,
    ) -> list[Sample]:
        """Samples of several tasks, one task after the other.

        Parameters
        ----------
        split, n, seed
            As in the function `samples`, for each task.
        tasks : iterable of str, or mapping of str to dict
            By default those of retrieval; a mapping gives layouts of its own.
        questions : int
            On one context, as far as a task allows and so that all contexts have as many.

        Returns
        -------
        list of Sample
        """
        found = []
        for task in tasks or self.retrieval:
            layout = tasks[task] if isinstance(tasks, Mapping) else self.layouts[task]
            # no more than a context of this task has to offer, and none left over: 6 of 16 would leave 4
            most = min(questions, self.questions.get(task, 1))
            together = max(k for k in range(1, most + 1) if n % k == 0)
            found += samples(task, split, n, seed, questions=together, **layout)
        return found

    def pairs(self, split: str, n: int, seed: int = 0) -> list[tuple[Sample, Sample]]:
        """Counterfactual pairs of the retrieval tasks, n of each that has them."""
        found = []
        for task, layout in self.retrieval.items():
            found += counterfactuals(task, split, n, seed, **layout)
        return found

    def growing(self, task: str) -> dict[int, dict]:
        """Layouts of a task by the size of its context, from small to large; its own, as size 0, if it has no sizes."""
        layout = self.layouts[task]
        if task not in self.sizes:
            return {0: layout}
        # one entry of the layout grows, the rest stays
        name, values = self.sizes[task]
        return {value: layout | {name: value} for value in values}


def task_set(name: str, **changes) -> TaskSet:
    """A task set by its name.

    Parameters
    ----------
    name : {"digits", "english", "benchmarks", "zeroshot"}
        Of tasks.yaml: the digit-needle testbed, plain English and copying for SmolLM2, the paper's benchmarks, or tasks
        for released checkpoints that need none.
    **changes
        Fields of `TaskSet` that a profile has otherwise, such as layouts of fewer pages.

    Returns
    -------
    TaskSet

    Raises
    ------
    ValueError
        No such set.
    """
    sets = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text())
    if name not in sets:
        raise ValueError(f"task set {name!r}: take one of {', '.join(map(repr, sets))}")
    # a field is replaced as a whole: a profile's layouts are all there is
    return TaskSet(**sets[name] | changes)
