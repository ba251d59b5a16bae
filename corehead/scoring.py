"""Retrieval Attention Mass (RAM) and its variants, from one pass over each context.

For head h of layer l on sample x, with post-softmax attention A,

    RAM(x; l, h) = 1/|Q| * sum over q in Q, v in V* of A_{l,h}(q, v)

and the CoRe score of a head is its mean over samples (arXiv 2606.05843). The context in front of the question is
computed once; each question on it, and the same context with the question "N/A", is a short chunk behind the cache.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
import xarray as xr
from tqdm.auto import tqdm

from .attention import Layout, edited, laid_out, own_attention, reading
from .contexts import Context, Packed, batches, behind_prefix, forward, pack, prefill
from .models import MLLM, fingerprint
from .ranking import HeadRanking
from .samples import Sample, SampleError
from .scale import check_engine, on_ray, shards
from .store import Store, digest
from .tagging import Tagged, to_model

QUERIES = ("question", "last", "answer")
SUMS = ("target", "visual", "text", "sink")
VARIANTS = ("ram", "share", "lift", "calibrated")


@dataclass
class HeadScores:
    """What every head's chosen rows attended to, a row a sample.

    Attributes
    ----------
    data : Dataset with dimensions (sample, query, layer, head). ``target, visual, text, sink``: attention mass, mean
        over the query rows, in [0, 1] (visual + text + sink = 1; sink is the first token of the prompt, and target is
        part of visual or text); ``entropy``: mean over the rows, in nats; ``null_target``, ``null_context``: the mass
        that the same context gets when the question is "N/A". Coordinates on sample: ``n_target``, ``n_context``
        (tokens of the target's modality), ``on_text`` (the target is text), ``depth`` (where V* stands on average, from
        0, the start of the prompt, to 1, its end).
        The attribute ``provenance`` is JSON: model, revision, a digest of weights and configuration, versions,
        processor settings, options, and a digest of the samples.
    failures : DataFrame (sample, reason) of what was skipped.
    """

    data: xr.Dataset
    failures: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["sample", "reason"]))

    def per_sample(self, variant: str = "ram", query: str = "question") -> xr.DataArray:
        """Scores of every head on every sample.

        Parameters
        ----------
        variant : "ram", the mass on V* (arXiv 2606.05843); "share", that mass over the mass on all tokens of the
            target's modality (VERA, arXiv 2602.10146); "lift", the share over the share of tokens |V*| / |V|;
            "calibrated", RAM less the RAM of the question "N/A" on the same context (arXiv 2605.27243).
        query : the rows Q: "question", its tokens; "last", the prompt's last token; "answer", the answer's tokens.

        Returns
        -------
        DataArray (sample, layer, head); NaN where a sample has no evidence or no such rows.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: take one of {', '.join(map(repr, VARIANTS))}")
        if query not in QUERIES:
            raise ValueError(f"query={query!r}: take one of {', '.join(map(repr, QUERIES))}")
        d = self.data.sel(query=query)
        ram = d.target.where(d.n_target > 0)
        if variant == "ram":
            out = ram
        elif variant == "calibrated":
            out = ram - d.null_target
        else:
            out = ram / xr.where(d.on_text, d.text, d.visual)
            if variant == "lift":
                out = out / (d.n_target / d.n_context)
        return out.transpose("sample", "layer", "head").drop_vars("query").rename(variant)

    def core(self, variant: str = "ram", query: str = "question") -> xr.DataArray:
        """The CoRe score, (layer, head): mean over the samples that have one."""
        return self.per_sample(variant, query).mean("sample")

    def rank(self, variant: str = "ram", query: str = "question") -> HeadRanking:
        """Heads from highest to lowest CoRe score."""
        core = self.core(variant, query)
        if not np.isfinite(core).all():
            raise ValueError(f"no sample has a {variant!r} score for query={query!r}: give evidence (and answers)")
        return HeadRanking(core.values, name=f"{variant}/{query}")


def score(
    mllm: MLLM,
    samples: Iterable[Sample | Tagged],
    *,
    batch_size: int = 16,
    null: bool = True,
    store: str | Path | None = None,
    resume: bool = False,
    on_error: str = "record",
    engine: str = "local",
    workers: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every head on samples.

    Parameters
    ----------
    mllm : the model.
    samples : any iterable. Samples that follow each other with the same media (or the same text) in front of the
        question share one prefill.
    batch_size : contexts that run at once, padded on the left.
    null : also run the question "N/A", which the "calibrated" variant needs. Not for `Tagged` input.
    store : a folder that keeps every finished batch; None keeps nothing.
    resume : go on with what the store has. Without it a store that is not empty is an error.
    on_error : "record" notes a sample that fails in `HeadScores.failures` and goes on; "raise" stops.
    engine : "local", or "ray": over many GPUs or machines. A worker takes `batch_size` contexts at a time, so that the
        batches are not those of "local", and the scores equal to rounding (1e-6); with batch_size=1, to the bit on one
        kind of device with as many threads (on a CPU, Ray gives a worker one).
    workers : for "ray"; None takes one a GPU, or one a CPU where there is no GPU.
    progress : show a bar with the time left.

    Returns
    -------
    HeadScores, samples in the order given

    Raises
    ------
    ValueError : two samples have one id; no sample could be scored; the store belongs to another configuration.
    ImportError : engine="ray", and Ray is not installed.
    SampleError : with on_error="raise", what is wrong with a sample, or the layer whose attention is not finite.
    """
    if on_error not in ("record", "raise"):
        raise ValueError(f"on_error={on_error!r}: take 'record' or 'raise'")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: take at least 1")
    check_engine(engine, workers)
    if store is not None and edited(mllm):
        raise ValueError("a store inside ablate() would not say so: score without one")
    if engine == "ray" and edited(mllm):
        raise ValueError("workers know nothing of ablate(): score with engine='local' inside it")
    keep = Store(store, provenance(mllm, null=null), resume=resume)
    rows: dict[str, dict] = {row["sample"]: row for row in keep.rows}
    order: list[str] = []
    marks: dict[str, str] = {}  # digests of the samples that run
    failures: list[dict] = []

    def fresh():
        seen = set()
        for sample in samples:
            name = _id(sample, len(order))
            if name in seen:
                raise ValueError(f"two samples have the id {name!r}: ids must differ")
            seen.add(name)
            order.append(name)
            mark = digest(sample if isinstance(sample, Sample) else [sample.ids, sample.target])
            if name in rows:
                if rows[name]["digest"] != mark:
                    raise ValueError(f"sample {name!r} is not the one in the store: it has another content")
                bar.update()
                yield None
                continue
            marks[name] = mark
            unnamed = isinstance(sample, Tagged) and sample.sample is None
            yield replace(sample, sample=Sample(name, [])) if unnamed else sample

    total = len(samples) if hasattr(samples, "__len__") else None
    with keep, tqdm(total=total, desc="scoring", unit="sample", disable=not progress) as bar:
        run = partial(_finished, batch_size=batch_size, null=null, on_error=on_error)
        local = engine == "local"
        for finished in run(mllm, fresh()) if local else on_ray(mllm, run, shards(fresh(), batch_size), workers):
            done = [r | {"digest": marks[r["sample"]]} for r in finished if not isinstance(r, SampleError)]
            keep.append(done)
            rows.update((row["sample"], row) for row in done)
            bar.update(len(finished))
            for error in finished:
                if isinstance(error, SampleError):
                    if on_error == "raise":
                        raise error
                    failures.append({"sample": error.sample_id, "reason": str(error)})
    found = [rows[name] for name in order if name in rows]
    if not found:
        reason = failures[0]["reason"] if failures else "there are no samples"
        raise ValueError(f"no sample could be scored; the first: {reason}")
    table = pd.DataFrame(failures, columns=["sample", "reason"])
    data = digest([[row["sample"], row["digest"]] for row in found])
    return HeadScores(_dataset(found, keep.provenance | {"data": data}), table)


@torch.inference_mode()
def attention_map(mllm: MLLM, tagged: Tagged, query: str = "last") -> np.ndarray:
    """Where every head's rows look, for pictures of a few heads on one sample.

    Parameters
    ----------
    mllm, tagged : the model and one tagged sample.
    query : "question", "last" or "answer": the mean over these rows.

    Returns
    -------
    (L, H, N) float32, attention weights over all tokens
    """
    rows = _query_sets(tagged)[query]
    groups = torch.eye(len(tagged.ids))[None]
    own = laid_out(mllm, Layout.of([tagged]))
    with own, reading(mllm, torch.from_numpy(rows).to(mllm.device), groups.to(mllm.device)) as reader:
        forward(mllm, to_model(tagged.inputs, mllm))
    return torch.stack([reader.sums[i][0].mean(0).cpu() for i in range(mllm.n_layers)]).numpy()


def provenance(mllm: MLLM, **options) -> dict:
    """What determines a table of scores: the model, its weights and preprocessing, the versions, the options."""
    settings = mllm.processor.to_json_string() if hasattr(mllm.processor, "to_json_string") else "{}"
    return dict(
        model=mllm.source,
        revision=mllm.revision,
        architecture=mllm.model.config.model_type,
        dtype=str(mllm.model.dtype),
        weights=fingerprint(mllm.model),
        config=digest(json.dumps(_settings(mllm.model.config.to_dict()), sort_keys=True, default=str)),
        processor=json.loads(settings),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        options=options,
    )


def _settings(config):
    """A configuration without what saving and loading write into it."""
    if isinstance(config, dict):
        volatile = {"architectures", "dtype", "transformers_version", "_name_or_path"}
        return {str(k): _settings(v) for k, v in config.items() if k not in volatile}
    return config


def _id(sample: Sample | Tagged, index: int) -> str:
    if isinstance(sample, Tagged):
        return sample.sample.id if sample.sample is not None else str(index)
    return sample.id


def _finished(
    mllm: MLLM, samples: Iterable[Sample | Tagged | None], *, batch_size: int, null: bool, on_error: str
) -> Iterator[list[dict | SampleError]]:
    """A table row or an error for each sample, a list a batch."""
    failed: list[SampleError] = []
    fail = None if on_error == "raise" else failed.append
    for batch in batches(mllm, samples, batch_size, null=null, fail=fail):
        yield [*failed, *_run(mllm, batch)]
        failed.clear()
    yield failed


@torch.inference_mode()
def _run(mllm: MLLM, batch: list[Context]) -> Iterator[dict | SampleError]:
    """Run a batch of contexts and yield a table row a sample."""
    packed = pack(mllm, batch, alone=edited(mllm, "resample"))
    with own_attention(mllm), laid_out(mllm, packed.layout):
        found = _read(mllm, behind_prefix(mllm, packed), packed)
    for c, context in enumerate(packed.contexts):
        for owner, tagged in enumerate(context.members):
            blank = context.null_of(owner)
            null = None if blank is None else found[c, blank]
            yield _table_row(tagged, owner, found[c, context.block_of(owner)], null)


def _query_sets(tagged: Tagged) -> dict[str, np.ndarray]:
    """Tokens of every query set Q, in the order of QUERIES."""
    return {"question": tagged.question, "last": np.array([tagged.last]), "answer": tagged.answer}


def _read(mllm: MLLM, feed: dict, packed: Packed) -> dict:
    """Feed the model, reading rows; per block and query set the mean over its rows: (L, H, G) sums, (L, H) entropy.

    Groups of keys: visual, text, sink (the first token, which is neither), then the targets.
    """
    groups = torch.cat([torch.zeros(*packed.layout.asks.shape, 3), packed.layout.targets.transpose(1, 2)], 2)
    wanted = {}
    for (c, k), (row, pad, start) in packed.places.items():
        tagged = packed.contexts[c].blocks[k].tagged
        first = pad if packed.before else start
        groups[row, packed.keys(c, k, tagged.visual), 0] = 1
        groups[row, first:, 1] = 1 - groups[row, first:, 0]
        groups[row, first, :3] = torch.tensor([0.0, 0.0, 1.0])
        wanted[c, k] = {query: packed.rows(c, k, tokens) for query, tokens in _query_sets(tagged).items()}
    rows = np.unique(np.concatenate([r for sets in wanted.values() for r in sets.values()]))
    with reading(mllm, torch.from_numpy(rows).to(mllm.device), groups.to(mllm.device)) as reader:
        prefill(mllm, feed)
    sums = torch.stack([reader.sums[i].cpu() for i in range(mllm.n_layers)]).numpy()  # (L, B, R, H, G)
    entropy = torch.stack([reader.entropy[i].cpu() for i in range(mllm.n_layers)]).numpy()
    out = {}
    for job, sets in wanted.items():
        out[job], b = {}, packed.places[job][0]
        for query, r in sets.items():
            if len(r):
                at = np.searchsorted(rows, r)
                out[job][query] = sums[:, b, at].mean(1), entropy[:, b, at].mean(1)
    return out


def _table_row(tagged: Tagged, column: int, own: dict, blank: dict | None) -> dict | SampleError:
    """One sample's row of the table: arrays (query, layer, head) by name."""
    shape = next(iter(own.values()))[1].shape
    on_text = len(tagged.target) > 0 and not np.isin(tagged.target, tagged.visual).any()
    names = (*SUMS, "entropy", "null_target", "null_context")
    out = {name: np.full((len(QUERIES), *shape), np.nan, np.float32) for name in names}
    for q, query in enumerate(QUERIES):
        if query in own:
            sums, entropy = own[query]
            bad = ~np.isfinite(sums).all((1, 2)) | ~np.isfinite(entropy).all(1)
            if bad.any():
                layer = int(np.flatnonzero(bad)[0])
                problem = f"the attention of layer {layer} is not finite (NaN or Inf)"
                mend = "Load the model in float32 or bfloat16, or look at its weights"
                return SampleError(tagged.sample.id, "attention", problem, mend)
            out["visual"][q], out["text"][q], out["sink"][q] = np.moveaxis(sums[..., :3], -1, 0)
            out["target"][q], out["entropy"][q] = sums[..., 3 + column], entropy
        if blank is not None and query in blank:
            sums = blank[query][0]
            out["null_target"][q], out["null_context"][q] = sums[..., 3 + column], sums[..., 1 if on_text else 0]
    context = len(tagged.visual)
    if on_text:
        context = tagged.last + 1 - context
    return {
        "sample": tagged.sample.id,
        "n_target": len(tagged.target),
        "n_context": context,
        "on_text": bool(on_text),
        "depth": float(tagged.target.mean() / tagged.last) if len(tagged.target) else float("nan"),
        "meta": tagged.sample.meta,
        **out,
    }


def _dataset(rows: list[dict], attributes: dict) -> xr.Dataset:
    arrays = (*SUMS, "entropy", "null_target", "null_context")
    data = {name: (("sample", "query", "layer", "head"), np.stack([r[name] for r in rows])) for name in arrays}
    meta = dict.fromkeys(k for r in rows for k in r["meta"])
    coords = {
        "query": list(QUERIES),
        "sample": [r["sample"] for r in rows],
        **{k: ("sample", [r[k] for r in rows]) for k in ("n_target", "n_context", "on_text", "depth")},
        **{k: ("sample", [r["meta"].get(k) for r in rows]) for k in meta},
    }
    return xr.Dataset(data, coords, {"provenance": json.dumps(attributes)})
