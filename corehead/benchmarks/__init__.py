"""Benchmarks of the paper as Samples, streamed from the Hugging Face hub's files or a local folder.

>>> samples = ch.benchmarks.load("refcocog", "data/cache/RefCOCOg", split="val", n=200)
>>> scores = ch.score(mllm, samples)
>>> results = ch.evaluate(mllm, ch.benchmarks.load("mlvu", n=100), new_tokens=16)
>>> ch.benchmarks.metrics.table(results)
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ..samples import Sample, SampleError
from . import metrics, mlvu, mmdocir, mmlongbench, refcocog, vidstg

__all__ = ["BENCHMARKS", "load", "metrics"]

BENCHMARKS = {
    "refcocog": refcocog.samples,
    "vidstg": vidstg.samples,
    "mmdocir": mmdocir.samples,
    "mmlongbench": mmlongbench.samples,
    "mmlongbench-doc": mmlongbench.documents,
    "mlvu": mlvu.samples,
}


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
    name : one of `BENCHMARKS`.
    source : a folder, a hub id, or None for the benchmark's own hub id.
    n : at most this many samples.
    errors : what to do with a row that is not as it should be: "raise", "skip" (with a warning), or a function that
        takes the error; the next rows go on.
    **options : split, revision and the benchmark's own: see ``BENCHMARKS[name]``.

    Raises
    ------
    ValueError : no such benchmark or option; an archive that must not be unpacked.
    FileNotFoundError : files of the split are missing; the message says how to fetch them.
    SampleError : a bad row, with ``errors="raise"``; it names the row, the field and the mend.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}: take one of {', '.join(BENCHMARKS)}")
    if errors not in ("raise", "skip") and not callable(errors):
        raise ValueError(f"errors={errors!r}: take 'raise', 'skip' or a function")
    if n is not None and n < 0:
        raise ValueError(f"n={n}: take at least 0")
    known = list(inspect.signature(BENCHMARKS[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option}=: take {', '.join(known)}")
    return islice(_good(BENCHMARKS[name](source, **options), errors), n)


def _good(found: Iterator[Sample | SampleError], errors) -> Iterator[Sample]:
    names: set[str] = set()
    for sample in found:
        if isinstance(sample, Sample) and sample.id in names:
            sample = SampleError(sample.id, "id", "stands twice in the files", "Leave one of the two rows out")
        if isinstance(sample, Sample):
            names.add(sample.id)
            yield sample
        elif errors == "raise":
            raise sample
        elif errors == "skip":
            warnings.warn(f"skipped: {sample}", stacklevel=3)
        else:
            errors(sample)
