"""The same work over many GPUs or machines: Ray Data hands shards of samples to actors that each hold the model.

Samples are cut where the context changes, so that no prefix is computed twice. A shard that an actor has finished comes
back to the driver, which alone writes to the store; an actor that dies is replaced, and its shard runs again.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import output_capturing

from .batching import MAX_QUESTIONS, same_context
from .models import MLLM, load
from .runs import fingerprint
from .samples import Sample, SampleError
from .tagging import TaggedSample


def shards(
    samples: Iterable[Sample | TaggedSample | None], contexts: int
) -> Iterator[list[Sample | TaggedSample | None]]:
    """Cut samples into lists of `contexts` runs on one context each; None stands where samples were left out."""
    shard: list[Sample | TaggedSample | None] = []
    runs = 0
    length = 0
    last = None
    for sample in samples:
        # the rule by which `batches` groups samples, so that a worker finds the groups that a single process would
        if same_context(sample, last) and length < MAX_QUESTIONS:
            length += 1
        elif sample is not None:
            if runs == contexts:
                yield shard
                shard = []
                runs = 0
            runs += 1
            length = 1
        if sample is not None or shard:  # nothing is left out in front of nothing
            shard.append(sample)
        last = sample
    if shard:
        yield shard


def on_ray(
    mllm: MLLM,
    work: Callable,
    samples: Iterable[Sample | TaggedSample | None],
    lacking: Callable,
    fail: Callable,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[list[dict]]:
    """Do the work of a run on Ray.

    Parameters
    ----------
    mllm : MLLM
        Each actor loads it once by its source, revision and dtype; where the source is neither a folder nor a hub id,
        the model travels through Ray's object store.
    work, lacking, fail : callable
        See `corehead.runs.run`; `work` is pickled.
    samples : iterable of Sample, TaggedSample or None
        Cut into shards, which wait in Ray's object store; it spills to disk.
    batch_size : int
        Contexts of a shard.
    workers : int or None
        Actors, a GPU each where the cluster has GPUs, otherwise a CPU; None takes as many as there are.

    Yields
    ------
    list of dict
        What `work` yields, in no order, as soon as a shard is finished.

    Raises
    ------
    ImportError
        Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'corehead[ray]'") from error
    waiting = []
    for shard in shards(samples, batch_size):
        given = [
            x.sample if isinstance(x, TaggedSample) else x for x in shard if x is not None
        ]
        # workers cannot ask the driver what a sample lacks, so that the answer travels along; the first `put` also
        # starts Ray, where it does not run
        waiting.append(ray.put((shard, lacking(sample.id for sample in given))))
    if not waiting:
        return
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    each = dict(num_gpus=1) if gpus else dict(num_cpus=1)
    size = min(workers or gpus or int(resources["CPU"]), len(waiting))
    # items are there at once, where a read would wait for a CPU that the workers have taken
    items = ray.data.from_items(
        [{"id": i} for i in range(len(waiting))], override_num_blocks=len(waiting)
    )
    # indices alone go through Ray Data's tables: shards are Python objects, which actors fetch by reference
    dataset = items.map_batches(
        _Worker,
        fn_constructor_args=(_loader(ray, mllm), fingerprint(mllm.model), work, waiting),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        **each,
    )
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        batches, errors = pickle.loads(row["finished"])
        yield from batches
        for error in errors:
            fail(error)


def _loader(ray: Any, mllm: MLLM) -> Callable[..., MLLM]:
    """What a worker calls, with its device, to have the model."""
    # the dtype that the driver's model has: on other hardware "auto" may come out as another
    options = dict(
        revision=mllm.revision, dtype=str(mllm.model.dtype).removeprefix("torch.")
    )
    folder = Path(mllm.source)
    if mllm.source and folder.is_dir():
        # absolute, since actors may have a working directory of their own
        return partial(load, str(folder.resolve()), **options)
    if mllm.source.count("/") == 1:  # OWNER/NAME on the hub
        return partial(load, mllm.source, **options)
    # A model that has once returned its attentions keeps transformers' hooks, and they a variable of that module that
    # cannot be pickled by value: it goes by its name.
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is not None:
        copyreg.pickle(type(collector), lambda _: "_active_collector")
    return partial(_received, ray.put(mllm))


def _received(reference: Any, device: str) -> MLLM:
    """A model from Ray's object store."""
    import ray

    mllm = ray.get(reference)
    mllm.model.to(device)
    return mllm


class _Worker:
    """An actor: the model, and what to do with a shard."""

    def __init__(
        self, loader: Callable[..., MLLM], weights: str, work: Callable, waiting: list
    ):
        self.mllm = loader(device="cuda" if torch.cuda.is_available() else "cpu")
        self.work = work
        self.waiting = waiting
        if fingerprint(self.mllm.model) != weights:
            raise ValueError(
                f"the weights in memory are not those of {self.mllm.source}: wrap the model that you changed, "
                "MLLM(model, processor), without a source"
            )

    def __call__(self, batch: dict) -> dict:
        import ray

        shard, keys = ray.get(self.waiting[int(batch["id"][0])])
        # the driver decides whether an error ends the run, so that all come back with what was finished
        errors: list[SampleError] = []
        batches = list(self.work(self.mllm, shard, lambda ids: keys, errors.append))
        return {"finished": [pickle.dumps((batches, errors))]}
