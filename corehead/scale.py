"""The same work over many GPUs or machines: Ray Data hands shards of samples to actors that each hold the model.

Samples are cut where the context changes, so that no prefix is computed twice. A shard that an actor has finished comes
back to the driver, which alone writes to the store; an actor that dies is replaced, and its shard runs again.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import output_capturing

from .contexts import MOST
from .models import MLLM, fingerprint, load
from .samples import Sample, SampleError
from .tagging import Tagged, same_content

ENGINES = ("local", "ray")


def check_engine(engine: str, workers: int | None) -> None:
    """Raise ValueError where the engine is misspelt or the workers are none, or another engine's."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: take one of {', '.join(map(repr, ENGINES))}")
    if workers is not None and (engine != "ray" or workers < 1):
        raise ValueError(f"workers={workers} with engine={engine!r}: take at least 1, with engine='ray'")


def shards(samples: Iterable[Sample | Tagged | None], contexts: int) -> Iterator[list[Sample | Tagged | None]]:
    """Cut samples into lists of `contexts` runs on one context each; None stands where samples were left out."""
    shard: list[Sample | Tagged | None] = []
    runs, length, before = 0, 0, None
    for sample in samples:
        if sample is None:
            if shard and shard[-1] is not None:
                shard.append(None)
            before = None
            continue
        now = in_front(sample)
        if before is not None and _same(before, now) and length < MOST:
            length += 1
        else:
            if runs == contexts:
                yield shard
                shard, runs = [], 0
            runs, length = runs + 1, 1
        shard.append(sample)
        before = now
    if shard:
        yield shard


def in_front(sample: Sample | Tagged) -> list | None:
    """Texts and media of a sample's messages, its question cut off."""
    if isinstance(sample, Tagged):
        return None
    parts: list[Any] = []
    for message in sample.messages:
        content = message.get("content")
        for part in [{"text": content}] if isinstance(content, str) else content or ():
            parts.append(part.get("text", part.get("image", part.get("video"))))
    texts = [i for i, part in enumerate(parts) if isinstance(part, str) and (sample.question or "") in part]
    if texts:
        last = texts[-1]
        parts[last:] = [parts[last].rpartition(sample.question)[0] if sample.question else ""]
    return parts


def _same(a: list, b: list | None) -> bool:
    same = b is not None and len(a) == len(b)
    return same and all(map(same_content, a, b))


def on_ray(mllm: MLLM, work: Callable, cut: Iterable, workers: int | None = None) -> Iterator[list[dict]]:
    """Run ``work(mllm, shard)``, which yields lists of rows, over shards on Ray.

    Parameters
    ----------
    mllm : each actor loads it once by its source, revision and dtype; where the source is neither a folder nor a hub
        id, the model travels through Ray's object store.
    work : a function that can be pickled.
    cut : the shards; they wait in Ray's object store, which spills to disk.
    workers : actors, a GPU each where the cluster has GPUs, otherwise a CPU; None takes as many as there are.

    Yields
    ------
    the lists of rows of a shard as soon as it is finished, in no order

    Raises
    ------
    ImportError : Ray is not installed.
    SampleError : as `work` does.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'corehead[ray]'") from error
    waiting = [ray.put(shard) for shard in cut]  # this also starts Ray, where it does not run
    if not waiting:
        return
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    each = dict(num_gpus=1) if gpus else dict(num_cpus=1)
    # items are there at once, where a read would wait for a CPU that the workers have taken
    items = ray.data.from_items([{"id": i} for i in range(len(waiting))], override_num_blocks=len(waiting))
    dataset = items.map_batches(
        _Worker,
        fn_constructor_args=(_portable(ray, mllm), fingerprint(mllm.model), work, waiting),
        batch_size=1,
        concurrency=min(workers or gpus or int(resources["CPU"]), len(waiting)),
        **each,
    )
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        found = pickle.loads(row["found"])
        if isinstance(found, SampleError):
            raise found
        yield from found


def _portable(ray, mllm: MLLM) -> Any:
    """What `load` takes, or a reference to the model itself."""
    options = dict(revision=mllm.revision, dtype=str(mllm.model.dtype).removeprefix("torch."))
    folder = Path(mllm.source)
    if mllm.source and folder.is_dir():
        return options | dict(source=str(folder.resolve()))
    if mllm.source.count("/") == 1:
        return options | dict(source=mllm.source)
    # A model that has once returned its attentions keeps transformers' hooks, and they a variable of that module that
    # cannot be pickled by value: it goes by its name.
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is not None:
        copyreg.pickle(type(collector), lambda _: "_active_collector")
    return [ray.put(mllm)]


class _Worker:
    """An actor: the model, and what to do with a shard."""

    def __init__(self, portable: Any, weights: str, work: Callable, waiting: list):
        import ray

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(portable, dict):
            self.mllm = load(**portable, device=device)
            if fingerprint(self.mllm.model) != weights:
                raise ValueError(
                    f"the weights in memory are not those of {portable['source']}: wrap the model that you changed, "
                    "MLLM(model, processor), without a source"
                )
        else:
            self.mllm = ray.get(portable[0])
            self.mllm.model.to(device)
        self.work, self.waiting, self.get = work, waiting, ray.get

    def __call__(self, batch: dict) -> dict:
        [shard] = (self.get(self.waiting[i]) for i in batch["id"])
        try:
            found = list(self.work(self.mllm, shard))
        except SampleError as error:
            found = error
        return {"found": [pickle.dumps(found)]}
