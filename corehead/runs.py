"""The loop of every run: samples go in, rows come out, and a store keeps each batch of them as soon as it is finished.

`score` and `evaluate` differ in what they do with a batch. That is their `work`; what a run is stands here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from operator import itemgetter, length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .models import MLLM
from .samples import Sample, SampleError
from .store import Store
from .tagging import TaggedSample

VERSION = "2.0.0"  # raised with whatever changes a result, which stores and rankings are marked with
ENGINES = ("local", "ray")
_place = itemgetter("sample", "key")  # of a row in a run
# what saving and loading write into a configuration: the same model, loaded again, must not count as another
VOLATILE = {"architectures", "dtype", "transformers_version", "_name_or_path"}


def digest(value: Any) -> str:
    """SHA-256 of a nested value.

    Parameters
    ----------
    value : object
        A Sample, or strings, numbers, containers, arrays and PIL images, nested in any way.

    Returns
    -------
    str
        The first 16 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    """What JSON does not know as something that it does."""
    if isinstance(value, TaggedSample):
        inputs = sorted(value.inputs.items())
        return [
            inputs,
            value.evidence,
            value.question,
            value.answer,
            value.last,
            value.foil,
        ]
    # neither meta nor metric, of which the model sees nothing
    if isinstance(value, Sample):
        return [
            value.id,
            value.messages,
            [_file(path) for path in _paths(value.messages)],
            value.evidence,
            value.answer,
            value.question,
            value.foil,
        ]
    if isinstance(value, Image.Image):
        # as it is seen, wherever it was read from: upright, and in the colours of its palette
        upright = ImageOps.exif_transpose(value)
        seen = upright.convert("RGBA") if upright.mode in ("P", "PA") else upright
        return [value.mode, np.asarray(seen)]
    if torch.is_tensor(value):
        value = value.numpy(force=True)
    if hasattr(value, "read"):  # an open file
        value.seek(0)
        value = np.frombuffer(value.read(), np.uint8)
    if isinstance(value, np.ndarray):
        return [value.shape, value.dtype.str, hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)  # evidence: dataclasses, whose repr holds all fields


def _paths(value: Any) -> Iterator[str]:
    """Paths of media among messages."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "text":
                yield from _paths(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, (str, os.PathLike)) and len(os.fspath(value)) < 4096:
        path = os.fspath(value).removeprefix("file://")
        if os.path.isfile(path):
            yield path


def _file(path: str) -> list:
    """What tells a file from another of the same name: its size, and how it begins."""
    with open(path, "rb") as file:
        return [os.path.getsize(path), hashlib.sha256(file.read(2**20)).hexdigest()]


def fingerprint(model: PreTrainedModel) -> str:
    """Digest of the first eight weights of every parameter.

    Training moves every weight, so that a few tell models apart at once; an edit of single weights may go unseen.

    Parameters
    ----------
    model : PreTrainedModel
        Parameters that are offloaded are read in host memory or on disk.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    first = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # offloaded: accelerate's hook knows where to
            module, _, attribute = name.rpartition(".")
            parameter = model.get_submodule(module)._hf_hook.weights_map[attribute]
        first[name] = parameter.detach().flatten()[:8].float().tolist()
    return digest(first)


def provenance(mllm: MLLM, **options: Any) -> dict:
    """All that determines a table: the model, its weights and preprocessing, versions (ours too), the options.

    Parameters
    ----------
    mllm : MLLM
        The model.
    **options
        Of the run, as JSON can hold them.

    Returns
    -------
    dict
        As JSON can hold it.
    """
    model = mllm.model
    processor = mllm.processor
    # object_hook reaches the nested configurations of text and vision as well
    config = json.loads(
        model.config.to_json_string(use_diff=False),
        object_hook=lambda settings: {
            k: v for k, v in settings.items() if k not in VOLATILE
        },
    )
    # tokenizers have no such method
    settings = processor.to_json_string() if hasattr(processor, "to_json_string") else "{}"
    return dict(
        model=mllm.source,
        revision=mllm.revision,
        architecture=model.config.model_type,
        dtype=str(model.dtype),
        weights=fingerprint(model),
        config=digest(config),
        processor=json.loads(settings),
        corehead=VERSION,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        options=options,
    )


def check_new(name: str, seen: Container[str]) -> None:
    """Raise ValueError where an id has been seen before: results of the two samples could not be told apart."""
    if name in seen:
        raise ValueError(f"two samples have the id {name!r}: ids must differ")


def named(provenance: Mapping[str, Any]) -> str:
    """The model that results are of, with its revision."""
    model = provenance.get("model") or "an unnamed model"
    revision = provenance.get("revision")
    return f"{model}@{revision}" if revision else model


def check_model(made_by: Mapping[str, Any], mllm: MLLM) -> None:
    """Check that results are of this model.

    Parameters
    ----------
    made_by : mapping
        Their `provenance`; without a digest of weights nothing is known, and nothing is refused.
    mllm : MLLM

    Raises
    ------
    ValueError
        The weights differ. If they were read in another dtype or by another transformers, either of which changes the
        digest, a model of the same name and commit on the hub is the same.
    """
    if "weights" not in made_by:
        return
    now = provenance(mllm)
    same = {key for key in now if made_by.get(key) == now[key]}
    one_commit = now["revision"] and same >= {"model", "revision"}
    if "weights" in same or (one_commit and not same >= {"dtype", "transformers"}):
        return
    theirs, ours = (
        f"{named(p)} ({p.get('dtype')}, {p['weights']})" for p in (made_by, now)
    )
    raise ValueError(
        f"these heads are of {theirs}, but this model is {ours}, with other weights: "
        "rank its own, or load without mllm= what shall be used on another"
    )


@dataclass
class Finished:
    """What a run has produced.

    Attributes
    ----------
    keys : sequence of str
        Of the rows that each sample gets.
    rows : dict of (str, str) to dict
        By id and key, those that the store held included.
    samples : dict of str to Sample
        By id, in the order given; without messages and evidence, whose media would fill the memory.
    digests : dict of str to str
        Of each sample's whole content.
    failures : dict of str to str
        The reason, by the id of each sample that failed.
    on_error : {"raise", "record"}
        What to do with a sample that fails.
    """

    keys: Sequence[str]
    rows: dict[tuple[str, str], dict]
    on_error: str = "raise"
    samples: dict[str, Sample] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def lacking(self, ids: Iterable[str]) -> list[str]:
        """Keys for which any of these samples has no row yet."""
        ids = list(ids)
        return [
            key for key in self.keys if any((name, key) not in self.rows for name in ids)
        ]

    def fail(self, error: SampleError) -> None:
        """Raise or record the error of a sample."""
        if self.on_error == "raise":
            raise error
        # the first reason, under however many conditions it fails
        self.failures.setdefault(error.sample_id, str(error))

    def draw(
        self, samples: Iterable[Sample | TaggedSample], bar: tqdm
    ) -> Iterator[Sample | TaggedSample | None]:
        """The samples that lack rows, None in place of the others."""
        for index, item in enumerate(samples):
            if isinstance(item, TaggedSample) and item.sample is None:
                item = replace(item, sample=Sample(str(index), []))
            sample = item.sample if isinstance(item, TaggedSample) else item
            if not isinstance(sample, Sample):
                raise TypeError(
                    f"samples[{index}] is a {type(item).__name__}: give Samples"
                )
            name = sample.id
            check_new(name, self.samples)
            self.samples[name] = replace(sample, messages=[], evidence=[])
            # a picture that cannot be read: the work finds that out as well, and says so
            try:
                self.digests[name] = digest(item)
            except Exception:
                self.digests[name] = ""
            stored = [self.rows[name, key] for key in self.keys if (name, key) in self.rows]
            # an id that was given to other content must not pass for what the store has
            if any(row["digest"] != self.digests[name] for row in stored):
                problem = f"sample {name!r} is not the one in the store"
                raise ValueError(f"{problem}: it has another content")
            bar.update(len(stored))
            yield item if len(stored) < len(self.keys) else None

    def enter(self, batch: list[dict], store: Store) -> int:
        """Keep the rows of a batch that are new, and count them."""
        rows = {_place(row): row | {"digest": self.digests[row["sample"]]} for row in batch}
        # a batch is computed as a whole, even where some of its samples have rows already
        new = {place: row for place, row in rows.items() if place not in self.rows}
        store.append(list(new.values()))
        self.rows |= new
        return len(new)


def run(
    mllm: MLLM,
    samples: Iterable[Sample | TaggedSample],
    work: Callable,
    *,
    provenance: dict,
    keys: Sequence[str] = ("",),
    store: str | Path | None = None,
    resume: bool = False,
    on_error: str = "raise",
    engine: str = "local",
    workers: int | None = None,
    batch_size: int = 16,
    edited: bool = False,
    progress: bool = True,
    description: str = "",
) -> Finished:
    """Do some work on samples, a row for each sample and key, and never twice what the store has.

    Parameters
    ----------
    mllm : MLLM
        The model.
    samples : iterable of Sample or TaggedSample
        Drawn one at a time. A `TaggedSample` without a sample is named by its index.
    work : callable
        ``work(mllm, samples, lacking, fail)`` yields the rows of each batch that it has finished, in any order: a list
        of dictionaries with "sample" and "key". It gives ``fail`` a SampleError for each sample that it cannot do.
        Among the samples is None where finished ones are left out: what stands on either side must not be batched as
        neighbours, so that a resumed run has the batches of one that was never stopped. ``lacking(ids)`` says which
        keys any of these samples still needs. With engine="ray" it must be possible to pickle `work`.
    provenance : dict
        All that determines the rows: see `provenance`.
    keys : sequence of str
        Of the rows that each sample gets.
    store : str, Path or None
        Folder that keeps every finished batch: see `Store`.
    resume : bool
        Go on with what the store has.
    on_error : {"raise", "record"}
        "raise" stops at the first sample that fails, "record" notes it and goes on.
    engine : {"local", "ray"}
        Where the work is done.
    workers : int or None
        For "ray"; None takes as many as there are GPUs, or else CPUs.
    batch_size : int
        Contexts that a worker gets at a time.
    edited : bool
        Whether the model is edited from outside, of which neither a store nor a worker would know.
    progress : bool
        Show a bar with the time left.
    description : str
        In front of the bar.

    Returns
    -------
    Finished
        Samples in the order given, their rows and failures.

    Raises
    ------
    ValueError
        An option is misspelt or cannot be; two samples have one id; a sample or the whole store is of another content.
    TypeError
        What is not a sample, or a single sample in place of several.
    SampleError
        With on_error="raise", what is wrong with a sample. What was finished before is in the store.
    ImportError
        engine="ray", and Ray is not installed.
    OSError
        The store cannot be written to.
    """
    if on_error not in ("record", "raise"):
        raise ValueError(f"on_error={on_error!r}: take 'record' or 'raise'")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: take at least 1")
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: take one of {', '.join(map(repr, ENGINES))}")
    if workers is not None and (engine != "ray" or workers < 1):
        raise ValueError(
            f"workers={workers} with engine={engine!r}: take at least 1, with engine='ray'"
        )
    if edited and (store is not None or engine == "ray"):
        raise ValueError(
            "inside ablate() there is neither a store nor engine='ray': they would know nothing of it"
        )
    if isinstance(samples, (Sample, TaggedSample, str)):
        raise TypeError(f"samples is a {type(samples).__name__}: give a list of Samples")
    # None, for an iterator of unknown length, makes a bar without an end
    total = length_hint(samples) * len(keys) or None
    with (
        Store(store, provenance, resume) as keep,
        tqdm(total=total, desc=description, unit="row", disable=not progress) as bar,
    ):
        finished = Finished(keys, {_place(row): row for row in keep.rows}, on_error)

        def fail(error: SampleError) -> None:
            finished.fail(error)
            # so that the bar arrives at its end all the same
            bar.update(len(finished.lacking([error.sample_id])))

        given = finished.draw(samples, bar), finished.lacking, fail
        if engine == "ray":
            from .distributed import on_ray  # here alone, so that nobody else needs Ray

            batches = on_ray(mllm, work, *given, batch_size, workers)
        else:
            batches = work(mllm, *given)
        # generators all the way, so that a batch is stored before the next one is computed here
        with closing(batches):  # an error on this side ends the work as well
            for batch in batches:
                bar.update(finished.enter(batch, keep))
    return finished
