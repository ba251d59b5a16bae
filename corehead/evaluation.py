"""What a model answers, under any number of ablations: one row a sample and condition."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from .ablation import Ablation, edits_of
from .acceleration import Acceleration, applied
from .attention import CACHE, Layout, edited, editing, laid_out, own_attention
from .contexts import Context, Packed, batches, embedded, pack, require_answers
from .models import MLLM
from .samples import Sample
from .scale import check_engine, in_front, on_ray, shards
from .scoring import provenance
from .stats import mean_interval, proportion_interval
from .store import Store, digest
from .tagging import PER_TOKEN, Tagged, pad_id, to_model

# tokens in one forward pass over several conditions: what stays in a CPU's cache, what keeps a GPU busy
TOKENS = {"cpu": 2**11, "cuda": 2**16}
METRICS = ("correct", "logprob", "margin")


def evaluate(
    mllm: MLLM,
    samples: Iterable[Sample | Tagged],
    conditions: Mapping[Hashable, Ablation | Acceleration | None] | None = None,
    *,
    batch_size: int = 32,
    new_tokens: int = 0,
    store: str | Path | None = None,
    resume: bool = False,
    engine: str = "local",
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare the model's greedy answer with the expected one, intact, under many ablations or accelerated.

    All conditions run over the same batches: media are read, tagged and seen by the vision tower once; questions on one
    context share its prefill, and so do all conditions that do not touch the context; ablations run side by side as
    batch rows, accelerations one after the other. Conditions with the same heads run once.

    Parameters
    ----------
    mllm : the model.
    samples : with answers. Those that follow each other on one context share it, as in `score`.
    conditions : name -> `Ablation`, `Acceleration`, or None for the intact model. Without it, the model as it is.
    batch_size : contexts that run at once, padded on the left.
    new_tokens : tokens that the model may also write freely (greedily), under every condition; each question then runs
        alone once more. What it writes is what a sample's `metric` is about: the prediction below knows the answer.
    store : a folder that keeps every finished batch; None keeps nothing. It holds any samples and conditions of one
        model, so that what another run has done is not done again.
    resume : go on with what the store has. Without it a store that is not empty is an error.
    engine, workers : as in `score`.
    progress : show a bar with the time left.

    Returns
    -------
    DataFrame, one row a condition and sample in the order given: the condition (a named tuple gives one column a
        field, any other name the column "condition"), sample, context (the first sample on the same context; its own
        where nothing stands in front of the question, however the samples were packed), the columns of its `meta`,
        answer, prediction (the likeliest token at each place of the answer, the ones before it given), correct (all of
        them right), logprob (of the whole answer, nats), margin (first token: logit of the answer less the best other
        logit); with new_tokens, written (the text) and, where a sample has a metric, its values, of which correct then
        says whether the first is at least one half.

    Raises
    ------
    SampleError : a sample cannot be tagged, or has no answer; what was finished before is in the store.
    ValueError : two samples have one id; heads of another geometry; the store belongs to another model, or is used
        inside `ablate`.
    ImportError : engine="ray", and Ray is not installed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: take at least 1")
    if new_tokens < 0:
        raise ValueError(f"new_tokens={new_tokens}: take at least 0")
    check_engine(engine, workers)
    if store is not None and edited(mllm):
        raise ValueError("a store inside ablate() would not say so: pass the ablation as one of conditions=")
    if engine == "ray" and edited(mllm):
        raise ValueError("workers know nothing of ablate(): pass the ablation as one of conditions=")
    names = {None: None} if conditions is None else dict(conditions)
    keys = {name: "" if ablation is None else ablation.key for name, ablation in names.items()}
    unique = {keys[name]: ablation for name, ablation in names.items()}
    for ablation in unique.values():
        if ablation is not None:
            ablation.check(mllm)
    writes = {"new_tokens": new_tokens} if new_tokens else {}
    keep = Store(store, provenance(mllm, table="answers", **writes), resume=resume)
    rows = {(row["sample"], row["ablation"]): row for row in keep.rows}
    marks: dict[str, str] = {}
    given: dict[str, dict] = {}  # meta of each sample, in the order given
    metrics: dict[str, Callable] = {}

    def fresh():
        for i, item in enumerate(samples):
            sample = item.sample or Sample(str(i), []) if isinstance(item, Tagged) else item
            if sample.id in given:
                raise ValueError(f"two samples have the id {sample.id!r}: ids must differ")
            given[sample.id] = sample.meta
            if sample.metric is not None:
                metrics[sample.id] = sample.metric
            marks[sample.id] = digest([item.ids, item.target] if isinstance(item, Tagged) else item)
            done = [rows[sample.id, key] for key in unique if (sample.id, key) in rows]
            if any(row["digest"] != marks[sample.id] for row in done):
                raise ValueError(f"sample {sample.id!r} is not the one in the store: it has another content")
            if len(done) < len(unique):
                yield replace(item, sample=sample) if isinstance(item, Tagged) else item
            else:
                bar.update(len(unique))
                yield None

    def lacking(ids: Iterable[str]) -> list[str]:
        ids = list(ids)
        return [key for key in unique if any((name, key) not in rows for name in ids)]

    def local():
        for batch in batches(mllm, fresh(), batch_size):
            todo = lacking(t.sample.id for context in batch for t in context.members)
            yield _answers(mllm, batch, {key: unique[key] for key in todo}, new_tokens)

    def cut():
        for shard in shards(fresh(), batch_size):
            ids = (s.sample.id if isinstance(s, Tagged) else s.id for s in shard if s is not None)
            yield lacking(ids), shard

    total = len(samples) * len(unique) if hasattr(samples, "__len__") else None
    with keep, tqdm(total=total, desc="evaluating", unit="answer", disable=not progress) as bar:
        answered = partial(_answered, conditions=unique, batch_size=batch_size, new_tokens=new_tokens)
        for found in local() if engine == "local" else on_ray(mllm, answered, cut(), workers):
            bar.update(len(found))
            new = [r | {"digest": marks[r["sample"]]} for r in found if (r["sample"], r["ablation"]) not in rows]
            keep.append(new)
            rows.update(((row["sample"], row["ablation"]), row) for row in new)
    out = []
    for name, key in keys.items():
        label = name._asdict() if hasattr(name, "_asdict") else {} if conditions is None else {"condition": name}
        for sample, meta in given.items():
            row = rows[sample, key]
            head = {"sample": sample, "context": row["context"], **meta, "answer": row["answer"]}
            values = {"prediction": row["prediction"], **{m: row[m] for m in METRICS}}
            if new_tokens:
                values["written"] = row["written"]
                if sample in metrics:
                    found = metrics[sample](row["written"])
                    values |= found | {"correct": next(v for k, v in found.items() if k != "parsed") >= 0.5}
            out.append({**label, **head, **values})
    return pd.DataFrame(out)


@torch.inference_mode()
def _write(mllm: MLLM, batch: list[Context], todo: dict[str, Ablation | None], new_tokens: int) -> dict:
    """What the model writes behind each prompt under every ablation: (sample, ablation) -> text."""
    texts = {}
    options = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad_id(mllm))
    for tagged in (t for context in batch for t in context.members):
        end = tagged.last + 1
        inputs = {k: v[:, :end] if k in PER_TOKEN else v for k, v in tagged.inputs.items()}
        prompt = replace(tagged, inputs=inputs, answer=tagged.answer[:0])
        for key, ablation in todo.items():
            fast = isinstance(ablation, Acceleration)
            edits = {} if fast or ablation is None else edits_of(mllm, [ablation])
            running = applied(mllm, ablation) if fast else own_attention(mllm)
            with running, laid_out(mllm, Layout.of([prompt])), editing(mllm, edits):
                ids = mllm.model.generate(**to_model(inputs, mllm), **options)[0, end:]
            texts[tagged.sample.id, key] = mllm.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def _answered(mllm: MLLM, shard: tuple, *, conditions: dict, batch_size: int, new_tokens: int) -> Iterator[list[dict]]:
    """What a worker does with the keys of conditions and the samples of a shard."""
    keys, samples = shard
    for key in keys:
        if isinstance(conditions[key], Ablation) and conditions[key].reference is not None:
            conditions[key].reference.mllm = mllm
    for batch in batches(mllm, samples, batch_size):
        yield _answers(mllm, batch, {key: conditions[key] for key in keys}, new_tokens)


def _answers(mllm: MLLM, batch: list[Context], todo: dict[str, Ablation | None], new_tokens: int) -> list[dict]:
    """Answers of a batch of contexts under every ablation, a row each; with new_tokens also written freely."""
    found = _run(mllm, batch, todo)
    if new_tokens:
        texts = _write(mllm, batch, todo, new_tokens)
        found = [row | {"written": texts[row["sample"], row["ablation"]]} for row in found]
    return found


@torch.inference_mode()
def _run(mllm: MLLM, batch: list[Context], todo: dict[str, Ablation | Acceleration | None]) -> list[dict]:
    """Answers of a batch of contexts under every ablation, a row each."""
    require_answers(batch)
    rows, decoded = [], {}
    kinds = {key: () if a is None else a.kind for key, a in todo.items()}
    feeds: dict[bool, _Feed] = {}
    for kind in dict.fromkeys(kinds.values()):
        alone = "resample" in kind or edited(mllm, "resample")  # must know the sample of a batch row
        if alone not in feeds:
            feeds[alone] = _Feed(mllm, pack(mllm, batch, alone))
        feed, same = feeds[alone], [key for key in todo if kinds[key] == kind]
        for i in range(0, len(same), feed.width):
            part = same[i : i + feed.width]
            for key, hidden in zip(part, feed.run([todo[key] for key in part])):
                for tagged, context, answers in feed.answers(hidden):
                    best = tuple(answers.pop("best"))
                    if best not in decoded:
                        decoded[best] = mllm.tokenizer.decode(best).strip() if mllm.processor else str(best)
                    label = dict(sample=tagged.sample.id, context=context, ablation=key)
                    rows.append(label | dict(answer=tagged.sample.answer or "", prediction=decoded[best]) | answers)
    return rows


class _Feed:
    """What the decoder is fed for a batch, kept, so that many conditions run over it.

    Attributes
    ----------
    width : conditions that run side by side.
    """

    def __init__(self, mllm: MLLM, packed: Packed):
        self.mllm, self.packed = mllm, packed
        if packed.prefix is None:
            self.prefix, self.chunk = None, embedded(mllm, packed.feed)
        else:
            self.prefix = embedded(mllm, packed.prefix)
            embeds = mllm.model.get_input_embeddings()(packed.feed["input_ids"])
            self.chunk = packed.feed | dict(inputs_embeds=embeds)
            del self.chunk["input_ids"]
        self._intact = None  # cache of the untouched prefix
        self.asked = [
            (c, k, b) for c, context in enumerate(packed.contexts) for k, b in enumerate(context.blocks) if not b.null
        ]
        named = [(b.tagged.sample, packed.contexts[c].name) for c, _, b in self.asked]
        # what a bare question shares with others is the chat template's alone
        self.labels = [sample.id if in_front(sample) == [""] else name for sample, name in named]
        spans = [b.tagged.last + np.arange(len(b.tagged.answer)) for _, _, b in self.asked]
        self.lengths = [len(span) for span in spans]
        self.at = (
            np.repeat([packed.places[c, k][0] for c, k, _ in self.asked], self.lengths),
            np.concatenate([packed.rows(c, k, span) for (c, k, _), span in zip(self.asked, spans)]),
        )
        n_rows, size = packed.feed["input_ids"].shape
        self.width = max(1, TOKENS.get(mllm.device.type, 2**14) // (n_rows * (packed.before + size)))

    def _decode(self, feed: dict, times: int, cache: DynamicCache | None):
        """Run the decoder over the batch, `times` times over."""
        wide = {}
        for name, value in feed.items():
            if torch.is_tensor(value):
                if name == "position_ids":  # (B, N) or (3, B, N)
                    value = value.repeat(*[1] * (value.dim() - 2), times, 1)
                elif value.dim():
                    value = value.repeat(times, *[1] * (value.dim() - 1))
            elif name == "deepstack_visual_embeds":
                value = [v.repeat(times, 1) for v in value]
            wide[name] = value
        return self.mllm.family.decoder(self.mllm.model)(**wide, **{CACHE: cache}, use_cache=cache is not None)

    def run(self, ablations: list[Ablation | Acceleration | None]) -> torch.Tensor:
        """Final hidden states of the rows that predict answers, (conditions, rows, hidden)."""
        mllm, times, n_rows = self.mllm, len(ablations), len(self.packed.feed["input_ids"])
        fast = isinstance(ablations[0], Acceleration)
        edits = {} if fast or ablations[0] is None else edits_of(mllm, ablations, n_rows)
        with applied(mllm, ablations[0]) if fast else own_attention(mllm):
            cache = None
            spared = ablations[0] is None or ablations[0].spares_context
            if self.prefix is not None and spared:
                cache = self._repeat(times)
            with laid_out(mllm, self.packed.layout.tile(times)), editing(mllm, edits):
                if self.prefix is not None and not spared:
                    cache = DynamicCache(config=mllm.text_config)
                    self._decode(self.prefix, times, cache)
                hidden = self._decode(self.chunk, times, cache).last_hidden_state
        return hidden.view(times, n_rows, *hidden.shape[1:])[:, self.at[0], self.at[1]]

    def _repeat(self, times: int) -> DynamicCache:
        """A cache of the intact prefix for every condition."""
        if self._intact is None:
            with laid_out(self.mllm, self.packed.layout):
                self._intact = DynamicCache(config=self.mllm.text_config)
                self._decode(self.prefix, 1, self._intact)
        cache = DynamicCache(config=self.mllm.text_config)
        for i, layer in enumerate(self._intact.layers):
            cache.update(layer.keys.repeat(times, 1, 1, 1), layer.values.repeat(times, 1, 1, 1), i)
        return cache

    def answers(self, hidden: torch.Tensor):
        """What hidden states (rows, hidden) of one condition say: (tagged, context, answer) for each sample."""
        logits = self.mllm.model.get_output_embeddings()(hidden).float().cpu()
        ids = torch.from_numpy(np.concatenate([b.answer for _, _, b in self.asked]))
        own = logits.gather(1, ids[:, None])[:, 0]
        logprob = (own - logits.logsumexp(1)).split(self.lengths)
        best = logits.argmax(1)
        rivals = logits.scatter(1, ids[:, None], -torch.inf).amax(1)
        margin = (own - rivals).split(self.lengths)
        right = (best == ids).split(self.lengths)
        found = zip(self.asked, self.labels, best.split(self.lengths), right, logprob, margin)
        for (_, _, block), label, tokens, correct, log, first in found:
            yield (
                block.tagged,
                label,
                dict(
                    best=tokens.tolist(), correct=bool(correct.all()), logprob=float(log.sum()), margin=float(first[0])
                ),
            )


def accuracy(results: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Accuracy with Wilson's 95 % interval for each group of rows: columns n, accuracy, low, high."""

    def one(group: pd.Series) -> pd.Series:
        low, high = proportion_interval(int(group.sum()), len(group))
        return pd.Series({"n": len(group), "accuracy": group.mean(), "low": low, "high": high})

    table = results.groupby(by, sort=False)["correct"].apply(one).unstack()
    return table.astype({"n": np.int64})


def summary(results: pd.DataFrame, by: str | list[str], metrics: Iterable[str] = METRICS) -> pd.DataFrame:
    """Means with 95 % bootstrap intervals, resampling contexts, for each group of rows.

    Returns
    -------
    DataFrame : a row a group; n and, for each metric, its mean and ``metric_low``, ``metric_high``.
    """
    metrics = list(metrics)

    def one(group: pd.DataFrame) -> pd.Series:
        values = group[metrics].to_numpy(float)
        low, high = mean_interval(values, groups=group["context"].to_numpy())
        row = {"n": len(group)}
        for i, metric in enumerate(metrics):
            row |= {metric: values[:, i].mean(), f"{metric}_low": low[i], f"{metric}_high": high[i]}
        return pd.Series(row)

    table = results.groupby(by, sort=False)[[*metrics, "context"]].apply(one)
    return table.astype({"n": np.int64})
