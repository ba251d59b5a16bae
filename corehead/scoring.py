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
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
import xarray as xr
from tqdm.auto import tqdm

from .attention import own_attention, reading
from .models import MLLM
from .ranking import HeadRanking
from .samples import Sample, SampleError
from .store import Store, digest
from .tagging import PER_TOKEN, Prompt, Tagged, collate, pad_id, to_model

QUERIES = ("question", "last", "answer")
SUMS = ("target", "visual", "text", "sink")
VARIANTS = ("ram", "share", "lift", "calibrated")
NULL = "N/A"
MOST = 32  # questions behind one context in one chunk


@dataclass
class HeadScores:
    """What every head's chosen rows attended to, a row a sample.

    Attributes
    ----------
    data : Dataset with dimensions (sample, query, layer, head). ``target, visual, text, sink``: attention mass, mean
        over the query rows, in [0, 1] (visual + text + sink = 1; sink is the first token of the prompt, and target is
        part of visual or text); ``entropy``: mean over the rows, in nats; ``null_target``, ``null_context``: the mass
        that the same context gets when the question is "N/A". Coordinates on sample: ``n_target``, ``n_context``
        (tokens of the target's modality), ``on_text`` (the target is text).
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


@dataclass
class _Block:
    """One question behind a context: token ids, positions, rows to read and what they are for."""

    ids: np.ndarray
    rows: dict[str, np.ndarray]  # query set -> rows within the block
    owner: int  # which sample of the context; of a null block, one of those that it serves
    null: bool
    tagged: Tagged  # the full sequence

    @property
    def answer(self) -> np.ndarray:
        return self.tagged.ids[self.tagged.answer]


@dataclass
class _Context:
    """A prefix and the blocks behind it; without a prefix, one sample, and each block is a whole sequence."""

    prefix: Tagged | None  # inputs cut to the prefix
    blocks: list[_Block]
    members: list[Tagged]

    def block_of(self, owner: int) -> int:
        """The block that asks a sample's question."""
        return next(k for k, b in enumerate(self.blocks) if b.owner == owner and not b.null)

    def null_of(self, owner: int) -> int | None:
        """The block with the null question and the sample's answer, if there is one."""
        answer = self.blocks[self.block_of(owner)].answer
        same = (k for k, b in enumerate(self.blocks) if b.null and np.array_equal(b.answer, answer))
        return next(same, None)


def score(
    mllm: MLLM,
    samples: Iterable[Sample | Tagged],
    *,
    batch_size: int = 16,
    null: bool = True,
    store: str | Path | None = None,
    resume: bool = False,
    on_error: str = "record",
    progress: bool = True,
) -> HeadScores:
    """Score every head on samples.

    Parameters
    ----------
    mllm : the model.
    samples : any iterable. Samples that follow each other with the same media objects (or the same text) in front of
        the question share one prefill.
    batch_size : contexts that run at once, padded on the left.
    null : also run the question "N/A", which the "calibrated" variant needs. Not for `Tagged` input.
    store : a folder that keeps every finished batch; None keeps nothing.
    resume : go on with what the store has. Without it a store that is not empty is an error.
    on_error : "record" notes a sample that fails in `HeadScores.failures` and goes on; "raise" stops.
    progress : show a bar with the time left.

    Returns
    -------
    HeadScores, samples in the order given

    Raises
    ------
    ValueError : two samples have one id; no sample could be scored; the store belongs to another configuration.
    SampleError : with on_error="raise", what is wrong with a sample, or the layer whose attention is not finite.
    """
    if on_error not in ("record", "raise"):
        raise ValueError(f"on_error={on_error!r}: take 'record' or 'raise'")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: take at least 1")
    keep = Store(store, provenance(mllm, null=null), resume=resume)
    rows: dict[str, dict] = {row["sample"]: row for row in keep.rows}
    order: list[str] = []
    failures: list[dict] = []

    def fail(error: SampleError):
        if on_error == "raise":
            raise error
        failures.append({"sample": error.sample_id, "reason": str(error)})
        bar.update()

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
                continue
            yield sample, name, mark

    total = len(samples) if hasattr(samples, "__len__") else None
    marks: dict[str, str] = {}
    with keep, tqdm(total=total, desc="scoring", unit="sample", disable=not progress) as bar:
        for batch in _batches(mllm, fresh(), batch_size, null, fail, marks):
            finished = list(_run(mllm, batch))
            done = [r | {"digest": marks[r["sample"]]} for r in finished if not isinstance(r, SampleError)]
            keep.append(done)
            rows.update((row["sample"], row) for row in done)
            bar.update(len(done))
            for error in finished:
                if isinstance(error, SampleError):
                    fail(error)
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
    rows = _rows(tagged, 0)[query]
    groups = torch.eye(len(tagged.ids))[None]
    with reading(mllm, torch.from_numpy(rows).to(mllm.device), groups.to(mllm.device)) as reader:
        _forward(mllm, to_model(tagged.inputs, mllm), use_cache=False)
    return torch.stack([reader.sums[i][0].mean(0).cpu() for i in range(mllm.n_layers)]).numpy()


def provenance(mllm: MLLM, **options) -> dict:
    """What determines a table of scores: the model, its weights and preprocessing, the versions, the options."""
    weights = {name: p.detach().flatten()[:8].float().tolist() for name, p in mllm.model.named_parameters()}
    settings = mllm.processor.to_json_string() if hasattr(mllm.processor, "to_json_string") else "{}"
    return dict(
        model=mllm.source,
        revision=mllm.revision,
        architecture=mllm.model.config.model_type,
        dtype=str(mllm.model.dtype),
        weights=digest(json.dumps(weights)),
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


def null_sample(sample: Sample, question: str) -> Sample:
    """The same sample with its question replaced by "N/A"."""
    messages = list(sample.messages)
    for m in reversed(range(len(messages))):
        content = messages[m]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        for p in reversed(range(len(parts))):
            if question in parts[p].get("text", ""):
                head, _, tail = parts[p]["text"].rpartition(question)
                parts[p] = {**parts[p], "text": head + NULL + tail}
                messages[m] = {**messages[m], "content": parts}
                return replace(sample, messages=messages, question=NULL)
    raise SampleError(sample.id, "question", f"{question!r} is in no message", "Quote it as it stands there")


def _batches(mllm, stream, batch_size, null, fail, marks) -> Iterator[list[_Context]]:
    """Contexts in batches, those with a prefix apart from those without."""
    waiting: dict[bool, list[_Context]] = {True: [], False: []}
    for group in _groups(mllm, stream, null, fail, marks):
        for context in _contexts(mllm, group):
            queue = waiting[context.prefix is not None]
            queue.append(context)
            if len(queue) == batch_size:
                yield queue
                waiting[context.prefix is not None] = []
    yield from (queue for queue in waiting.values() if queue)


def _groups(mllm, stream, null, fail, marks) -> Iterator[list[tuple[Tagged, Tagged | None]]]:
    """Runs of samples on one context: (tagged, tagged with the null question) pairs."""
    group: list[tuple[Tagged, Tagged | None]] = []
    like: Prompt | None = None  # the last sample's
    before = ""  # its text in front of the question
    for sample, name, mark in stream:
        marks[name] = mark
        if isinstance(sample, Tagged):
            pair, joins, like = (sample if sample.sample is not None else _named(sample, name), None), False, None
        else:
            try:
                prompt = Prompt(mllm, sample, like=like)
                begin, end = prompt.find_question()
                tagged, blank = prompt.tag(), None
                if null:
                    empty = null_sample(sample, prompt.text[begin:end])
                    blank = Prompt(mllm, empty, like=prompt).tag()
            except SampleError as error:
                fail(error)
                continue
            same_media = like is not None and (prompt.shares or not (prompt.raw or like.raw))
            joins = same_media and prompt.text[:begin] == before
            pair, like, before = (tagged, blank), prompt, prompt.text[:begin]
        if not joins or len(group) == MOST:
            if group:
                yield group
            group = []
        group.append(pair)
    if group:
        yield group


def _named(tagged: Tagged, name: str) -> Tagged:
    return replace(tagged, sample=Sample(name, []))


def _contexts(mllm, group) -> list[_Context]:
    """Cut a group into the prefix that all its sequences share and a block for each; without a prefix, one each."""
    every = [t for pair in group for t in pair if t is not None]
    shared = min(int(t.question[0]) if len(t.question) else t.last for t in every)
    for t in every[1:]:
        n = min(shared, len(t.ids))
        differ = np.flatnonzero(every[0].ids[:n] != t.ids[:n])
        shared = int(differ[0]) if len(differ) else n
    if any(len(t.visual) and t.visual[-1] >= shared for t in every):
        shared = 0
    blocks: dict[tuple, _Block] = {}
    for owner, pair in enumerate(group):
        for t in pair:
            if t is None:
                continue
            ids, blank = t.ids[shared:], t is pair[1]
            # null blocks that are the same token for token run once
            block = _Block(ids, _rows(t, shared), owner, blank, t)
            blocks[("null", *ids) if blank and shared else (blank, owner)] = block
    if shared:
        inputs = {k: v[:, :shared] if k in PER_TOKEN else v for k, v in every[0].inputs.items() if torch.is_tensor(v)}
        prefix = Tagged(inputs, every[0].visual, np.empty(0), np.empty(0), np.empty(0), shared - 1)
        return [_Context(prefix, list(blocks.values()), [t for t, _ in group])]
    out = []
    for owner, (tagged, _) in enumerate(group):  # each sequence runs alone: its block is the whole of it
        own = [b for b in blocks.values() if b.owner == owner]
        for block in own:
            block.owner = 0
        out.append(_Context(None, own, [tagged]))
    return out


def _rows(tagged: Tagged, shared: int) -> dict[str, np.ndarray]:
    return {
        "question": tagged.question - shared,
        "last": np.array([tagged.last - shared]),
        "answer": tagged.answer - shared,
    }


@torch.inference_mode()
def _run(mllm: MLLM, batch: list[_Context]) -> Iterator[dict | SampleError]:
    """Run a batch of contexts and yield a table row a sample."""
    with own_attention(mllm):
        found = _run_shared(mllm, batch) if batch[0].prefix is not None else _run_alone(mllm, batch)
    for context in batch:
        for owner, tagged in enumerate(context.members):
            own, blank = context.block_of(owner), context.null_of(owner)
            null = None if blank is None else found[id(context), blank]
            yield _table_row(tagged, owner, found[id(context), own], null)


def _run_shared(mllm: MLLM, batch: list[_Context]) -> dict:
    """Prefill the prefixes once, then run all blocks behind them as one chunk in which they do not see each other."""
    device = mllm.device
    inputs, prefixes = collate([c.prefix for c in batch], pad_id(mllm))
    before, width = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    places = [mllm.family.positions(mllm, c.blocks[0].tagged.inputs)[..., 0, :].cpu() for c in batch]
    positions = _pad_left([p[..., : len(c.prefix.ids)] for c, p in zip(batch, places)], width)
    prefill = _forward(mllm, to_model(inputs, mllm) | dict(position_ids=positions.to(device)), use_cache=True)

    size = max(sum(len(b.ids) for b in c.blocks) for c in batch)
    ids = torch.full((len(batch), size), pad_id(mllm))
    chunk = torch.zeros(*positions.shape[:-1], size, dtype=torch.long)
    block_of = torch.full((len(batch), size), -1)
    starts: dict[tuple[int, int], int] = {}
    for c, (context, place) in enumerate(zip(batch, places)):
        at = 0
        for k, block in enumerate(context.blocks):
            end = at + len(block.ids)
            ids[c, at:end] = torch.from_numpy(block.ids)
            # behind the prefix there is text alone, so that positions go on one by one
            chunk[..., c, at:end] = place[..., len(context.prefix.ids)][..., None] + torch.arange(end - at)
            block_of[c, at:end] = k
            starts[c, k] = at
            at = end
    inside = (block_of[:, :, None] == block_of[:, None, :]).tril()
    mask = torch.cat([before[:, None].expand(-1, size, -1), inside], 2)[:, None]

    n_targets = max(len(c.members) for c in batch)
    groups = torch.zeros(len(batch), width + size, 3 + n_targets)
    for c, (context, prefix) in enumerate(zip(batch, prefixes)):
        pad = width - len(context.prefix.ids)
        _mark_kinds(groups[c], prefix.visual, pad)
        for j, tagged in enumerate(context.members):
            own = context.block_of(j)
            inner = tagged.target >= len(context.prefix.ids)
            groups[c, pad + tagged.target[~inner], 3 + j] = 1
            groups[c, width + starts[c, own] + tagged.target[inner] - len(context.prefix.ids), 3 + j] = 1
    wanted = {
        (c, k): {q: starts[c, k] + r for q, r in block.rows.items()}
        for c, context in enumerate(batch)
        for k, block in enumerate(context.blocks)
    }
    feed = dict(input_ids=ids, position_ids=chunk, attention_mask=mask)
    feed = {k: v.to(device) for k, v in feed.items()} | dict(past_key_values=prefill.past_key_values)
    read = _read(mllm, feed, groups, wanted)
    return {(id(batch[c]), k): value for (c, k), value in read.items()}


def _run_alone(mllm: MLLM, batch: list[_Context]) -> dict:
    """Run sequences that share nothing, each with its own media, as one batch padded on the left."""
    jobs = [(context, k) for context in batch for k in range(len(context.blocks))]
    sequences = [context.blocks[k].tagged for context, k in jobs]
    inputs, moved = collate(sequences, pad_id(mllm))
    width = inputs["input_ids"].shape[1]
    places = [mllm.family.positions(mllm, t.inputs)[..., 0, :].cpu() for t in sequences]
    positions = _pad_left(places, width)
    groups = torch.zeros(len(jobs), width, 4)
    wanted = {}
    for j, ((context, k), t) in enumerate(zip(jobs, moved)):
        pad = width - len(t.ids)
        _mark_kinds(groups[j], t.visual, pad)
        groups[j, t.target, 3] = 1
        wanted[j, 0] = {q: pad + r for q, r in context.blocks[k].rows.items()}
    feed = to_model(inputs, mllm) | dict(position_ids=positions.to(mllm.device))
    read = _read(mllm, feed, groups, wanted)
    return {(id(jobs[j][0]), jobs[j][1]): value for (j, _), value in read.items()}


def _pad_left(places: list[torch.Tensor], width: int) -> torch.Tensor:
    """Position ids (L,) or (3, L) each to one batch (B, width) or (3, B, width)."""
    return torch.stack([torch.nn.functional.pad(p, (width - p.shape[-1], 0)) for p in places], -2)


def _mark_kinds(groups: torch.Tensor, visual: np.ndarray, pad: int) -> None:
    """Fill the first columns of (N, G): visual, text and sink (the first token, which is neither)."""
    groups[visual, 0] = 1
    groups[pad:, 1] = 1 - groups[pad:, 0]
    groups[pad, :3] = torch.tensor([0.0, 0.0, 1.0])


def _read(mllm: MLLM, feed: dict, groups: torch.Tensor, wanted: dict) -> dict:
    """Feed the model, reading rows; per block and query set the mean over its rows: (L, H, G) sums, (L, H) entropy."""
    rows = np.unique(np.concatenate([r for sets in wanted.values() for r in sets.values()]))
    with reading(mllm, torch.from_numpy(rows).to(mllm.device), groups.to(mllm.device)) as reader:
        _forward(mllm, feed, use_cache="past_key_values" in feed)
    sums = torch.stack([reader.sums[i].cpu() for i in range(mllm.n_layers)]).numpy()  # (L, B, R, H, G)
    entropy = torch.stack([reader.entropy[i].cpu() for i in range(mllm.n_layers)]).numpy()
    out = {}
    for (b, k), sets in wanted.items():
        out[b, k] = {}
        for query, r in sets.items():
            if len(r):
                at = np.searchsorted(rows, r)
                out[b, k][query] = sums[:, b, at].mean(1), entropy[:, b, at].mean(1)
    return out


def _forward(mllm: MLLM, feed: dict, use_cache: bool):
    return mllm.model(**feed, use_cache=use_cache, logits_to_keep=1)


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
        **{k: ("sample", [r[k] for r in rows]) for k in ("n_target", "n_context", "on_text")},
        **{k: ("sample", [r["meta"].get(k) for r in rows]) for k in meta},
    }
    return xr.Dataset(data, coords, {"provenance": json.dumps(attributes)})
