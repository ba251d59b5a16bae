"""Benchmarks of the paper as Samples, streamed from the Hugging Face hub's files or a local folder.

>>> samples = ch.benchmarks.load("refcocog", "data/cache/RefCOCOg", split="val", n=200)
>>> scores = ch.score(mllm, samples)
>>> results = ch.evaluate(mllm, ch.benchmarks.load("mlvu", n=100), new_tokens=16)
>>> ch.benchmarks.metrics.table(results)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

from ..samples import Sample, SampleError
from . import metrics
from .mlvu import MLVU
from .mmdocir import MMDocIR
from .mmlongbench import MMLongBench
from .mmlongbench_doc import MMLongBenchDoc
from .refcocog import RefCOCOg
from .vidstg import VidSTG

__all__ = ["BENCHMARKS", "load", "metrics"]

LOADERS = (RefCOCOg, VidSTG, MMDocIR, MMLongBench, MMLongBenchDoc, MLVU)
BENCHMARKS = {loader.name: loader for loader in LOADERS}


def load(
    name: str,
    source: str | Path | None = None,
    *,
    n: int | None = None,
    errors: str | Callable[[SampleError], None] = "raise",
    **options,
) -> Iterator[Sample]:
    """Samples of a benchmark, one after the other; media are decoded when a sample is asked for.

    Questions on one picture, document or video follow each other and share its objects, so that `score` and `evaluate`
    compute their context once.

    Parameters
    ----------
    name : str
        One of `BENCHMARKS`.
    source : str or Path, optional
        A folder, a hub id, or None for the benchmark's own hub id.
    n : int, optional
        At most this many samples.
    errors : str or callable
        What to do with a row that is not as it should be: "raise", "skip" (with a warning), or a function that takes
        the error; the next rows go on.
    **options
        split, revision and the benchmark's own: see ``BENCHMARKS[name]``.

    Raises
    ------
    ValueError
        No such benchmark or option; an archive that must not be unpacked.
    FileNotFoundError
        Files of the split are missing; the message says how to fetch them.
    SampleError
        A bad row, with ``errors="raise"``; it names the row, the field and the fix.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}: take one of {', '.join(BENCHMARKS)}")
    if errors not in ("raise", "skip") and not callable(errors):
        raise ValueError(f"errors={errors!r}: take 'raise', 'skip' or a function")
    if n is not None and n < 0:
        raise ValueError(f"n={n}: take at least 0")
    known = [field.name for field in fields(BENCHMARKS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option}=: take {', '.join(known)}")
    # checked by now, though no row is read before the first sample is asked for
    return islice(_good(BENCHMARKS[name](source=source, **options), errors), n)


def _good(found: Iterable[Sample | SampleError], errors) -> Iterator[Sample]:
    names: set[str] = set()
    for sample in found:
        # results go by id, so that `score` and `evaluate` refuse two samples with one
        if isinstance(sample, Sample) and sample.id in names:
            problem = "stands twice in the files"
            sample = SampleError(sample.id, "id", problem, "Leave one of the two rows out")
        if isinstance(sample, Sample):
            names.add(sample.id)
            yield sample
        elif errors == "raise":
            raise sample
        elif errors == "skip":
            # one broken file among thousands must not cost the rest of the benchmark
            warnings.warn(f"skipped: {sample}", stacklevel=3)
        else:
            errors(sample)
