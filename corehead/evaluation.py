"""What a model answers, under any number of conditions: one row a sample and condition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from .attention import edited
from .batching import (
    Condition,
    Context,
    Feed,
    Wanted,
    batches,
    cut_off,
    pack,
)
from .models import MLLM
from .runs import Finished, provenance, run
from .samples import Sample, SampleError
from .stats import METRICS
from .tagging import TaggedSample

# tokens in one forward pass over several conditions: what stays in a CPU's cache, what keeps a GPU busy
TOKENS = {"cpu": 2**11, "cuda": 2**16}
# rows of logits at once, a quarter of a GiB of float32 at the largest vocabularies
LOGIT_ROWS = 2**8


def evaluate(
    mllm: MLLM,
    samples: Iterable[Sample | TaggedSample],
    conditions: Mapping[Hashable, Condition | None] | None = None,
    *,
    batch_size: int = 32,
    new_tokens: int = 0,
    store: str | Path | None = None,
    resume: bool = False,
    on_error: str = "raise",
    engine: str = "local",
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare the model's greedy answer with the expected one, intact and under many conditions.

    All conditions run over the same batches: media are read, tagged and seen by the vision tower once; questions on one
    context share its prefill, and so do all conditions that do not touch the context; ablations run side by side as
    batch rows. Conditions with the same heads run once.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample or TaggedSample
        With answers. Those that follow each other on one context share it, as in `score`.
    conditions : mapping, optional
        Name to `Ablation`, `HybridAttention`, or None for the intact model. Without it, the model as it is.
    batch_size : int
        Contexts that run at once, padded on the left.
    new_tokens : int
        Tokens that the model may also write freely (greedily), under every condition. What it writes is what a sample's
        `metric` is about: the prediction below knows the answer.
    store : str or Path, optional
        A folder that keeps every finished batch. It holds any samples and conditions of one model, so that what another
        run has done is not done again.
    resume : bool
        Go on with what the store has. Without it a store that is not empty is an error.
    on_error : {"raise", "record"}
        "raise" stops at the first sample that fails, "record" leaves it out under every condition and notes it.
    engine, workers
        As in `score`.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    DataFrame
        One row a condition and sample in the order given: the condition (a named tuple gives one column a field, any
        other name the column "condition"), sample, context (the first sample on the same context, of 32 at most that
        follow each other and run together; its own where nothing stands in front of the question), the columns of its
        `meta` (of which "item", what the answer is read from and other samples may share, counts in `stats` beside the
        context), answer, prediction (the likeliest token at each place of the answer, the ones before it given),
        correct (all right), logprob (of the whole answer, nats), margin (first token: logit of the answer less the best
        other logit); where a sample has a foil, contrast (logit of the answer less that of the foil, at the first token
        in which they differ) and flipped (the foil's token is the likeliest there); with new_tokens, written (the text)
        and, where a sample has a metric, its values, of which correct then says whether the first is at least one half.
        The "sample" and "reason" of those that failed are in its ``attrs["failures"]``.

    Raises
    ------
    SampleError
        A sample cannot be tagged, or has no answer; what was finished before is in the store.
    ValueError
        Two samples have one id; no sample could be evaluated; heads of another geometry; the store belongs to another
        model, or is used inside `ablate`.
    ImportError
        engine="ray", and Ray is not installed.
    """
    if new_tokens < 0:
        raise ValueError(f"new_tokens={new_tokens}: take at least 0")
    given = {None: None} if conditions is None else conditions
    named = {name: Condition() if c is None else c for name, c in given.items()}
    for condition in named.values():
        condition.check(mllm)
    # two names of one condition are run once
    by_key = {condition.key: condition for condition in named.values()}
    # part of the provenance only where something is written, so that other stores do not depend on it
    writing = {"new_tokens": new_tokens} if new_tokens else {}
    finished = run(
        mllm,
        samples,
        partial(_work, conditions=by_key, batch_size=batch_size, new_tokens=new_tokens),
        keys=tuple(by_key),
        store=store,
        resume=resume,
        provenance=provenance(mllm, table="answers", **writing),
        edited=edited(mllm),
        on_error=on_error,
        engine=engine,
        workers=workers,
        batch_size=batch_size,
        progress=progress,
        description="evaluating",
    )
    rows = []
    for name, condition in named.items():
        label = {} if conditions is None else columns_of(name, "condition")
        rows += [label | row for row in _answer_rows(finished, condition.key, new_tokens)]
    # comparisons are paired: a sample that fails under one condition is left out of all
    failed = finished.failures
    answers = pd.DataFrame([row for row in rows if row["sample"] not in failed])
    if failed and answers.empty:
        reason = next(iter(failed.values()))
        raise ValueError(f"no sample could be evaluated; the first: {reason}")
    answers.attrs["failures"] = [
        {"sample": name, "reason": reason} for name, reason in failed.items()
    ]
    return answers


def columns_of(name: Hashable, column: str) -> dict:
    """What a name says in a table: a named tuple, such as a point of a curve, has one column a field."""
    return name._asdict() if hasattr(name, "_asdict") else {column: name}


def _answer_rows(finished: Finished, key: str, new_tokens: int) -> Iterator[dict]:
    """Rows of the result of one condition, in the order of the samples."""
    for sample in finished.samples.values():
        row = finished.rows.get((sample.id, key))
        if row is None:
            continue
        columns = ("prediction", *METRICS, "contrast", "flipped")
        values = {name: row[name] for name in columns if name in row}
        if new_tokens:
            values["written"] = row["written"]
            if sample.metric is not None:
                # now and not in the run: the store keeps texts, so that a metric may change without a new run
                try:
                    worth = sample.metric(row["written"])
                    first = next(value for name, value in worth.items() if name != "parsed")
                    values |= worth | {"correct": first >= 0.5}
                except Exception as error:  # of whoever wrote the metric
                    problem = (
                        f"fails on {row['written']!r} ({type(error).__name__}: {error})"
                    )
                    fix = "Let it give values by name, also for a text that it cannot read"
                    finished.fail(SampleError(sample.id, "metric", problem, fix))
        yield {
            "sample": sample.id,
            "context": row["context"],
            **sample.meta,
            "answer": row["answer"],
            **values,
        }


def _work(
    mllm: MLLM,
    samples: Iterable[Sample | TaggedSample | None],
    lacking: Callable[[Iterable[str]], list[str]],
    fail: Callable[[SampleError], None],
    *,
    conditions: dict[str, Condition],
    batch_size: int,
    new_tokens: int,
) -> Iterator[list[dict]]:
    """Answers of every sample under the conditions that it lacks, a list a batch."""
    # without the question's own tokens, blocks are as short as the answers
    late = all(condition.leaves_prompt_intact for condition in conditions.values())
    # an ablation around this run may be about those tokens
    late = late and not edited(mllm)
    for batch in batches(
        mllm, samples, batch_size, need_answer=True, to_last=late, fail=fail
    ):
        # of a store that is extended, only the new conditions run
        keys = lacking(t.sample.id for context in batch for t in context.members)
        yield _answers(mllm, batch, {key: conditions[key] for key in keys}, new_tokens)


@torch.inference_mode()
def _answers(
    mllm: MLLM,
    batch: list[Context],
    conditions: dict[str, Condition],
    new_tokens: int,
) -> list[dict]:
    """Answers of a batch of contexts under every condition, a row each; with new_tokens also written freely."""
    groups: dict[Hashable, list[Condition]] = defaultdict(list)
    for condition in conditions.values():
        groups[condition.group].append(condition)
    rows = []
    feeds: dict[tuple[bool, bool], _Answering] = {}
    for group in groups.values():
        lead = group[0]
        # a row of its own can still stand behind a shared prefix, where the prefix is what it would be anyway
        alone = lead.needs_own_row and not lead.leaves_context_intact
        layout = alone, lead.needs_own_row
        if layout not in feeds:
            feeds[layout] = _Answering(mllm, batch, *layout, new_tokens)
        rows += feeds[layout].rows(group)
    return rows


class _Answering:
    """A batch whose answers are wanted under many conditions: media are read once."""

    def __init__(
        self, mllm: MLLM, batch: list[Context], alone: bool, apart: bool, new_tokens: int
    ):
        self.mllm = mllm
        fed = [cut_off(context, whole_answer=False) for context in batch]
        packed = pack(mllm, fed, alone=alone, apart=apart)
        self.feed = Feed(mllm, packed)
        # a second feed for writing, because the answers in the first one would give the text away
        self.writing = None
        if new_tokens:
            prompts = [cut_off(context, whole_answer=True) for context in batch]
            asked = pack(mllm, prompts, alone=alone, apart=True)
            self.writing = Feed(mllm, asked, new_tokens)
        # of every question what stays the same under all conditions: its tagged sample, the name of its context
        self.tagged: list[TaggedSample] = []
        self.names: list[str] = []
        # of all answer tokens, one answer behind the other, the ids and where they are predicted
        answers, rows, tokens = [], [], []
        for c, k in packed.slots:
            block = batch[c].blocks[k]
            self.tagged.append(block.tagged)
            self.names.append(batch[c].name_of(block.tagged.sample))
            answers.append(block.answer)
            rows += [packed.slots[c, k].row] * len(block.answer)
            # the token at a position predicts the next one, so that the prompt's last predicts the answer's first
            predicting = block.tagged.last + np.arange(len(block.answer))
            tokens.append(packed.keys(c, k, predicting) - packed.before)
        self.lengths = [len(answer) for answer in answers]  # to split them again
        self.answer_ids = torch.from_numpy(np.concatenate(answers))
        self.foil_ids = torch.from_numpy(
            np.concatenate([_foil_ids(t) for t in self.tagged])
        )
        self.wanted = Wanted(torch.tensor(rows), torch.from_numpy(np.concatenate(tokens)))

    def rows(self, conditions: list[Condition]) -> Iterator[dict]:
        """A row of the table for each condition (all of one group) and question."""
        # so many conditions run side by side as TOKENS and memory have room for
        room = TOKENS.get(self.mllm.device.type, 2**14)
        width = room // self.feed.cost(conditions[0].leaves_context_intact)
        width = max(1, min(width, self.feed.copies()))
        # neighbours pass over the same layers, and later ones more of them
        conditions = sorted(conditions, key=lambda condition: condition.first_layer)
        for i in range(0, len(conditions), width):
            together = conditions[i : i + width]
            states = self.feed.run(together, self.wanted)
            texts = [None] * len(together)
            if self.writing is not None:
                texts = self.writing.write(together)
            for condition, read, written in zip(together, self._read(states), texts):
                yield from self._condition_rows(condition.key, read, written)

    def _read(self, states: torch.Tensor) -> list[_Read]:
        """What hidden states (conditions, n, hidden) say of the answers, for each condition."""
        times, n = states.shape[:2]
        parts = []
        # many rows at once, since every product reads the whole output embedding
        for part in torch.arange(times * n).split(LOGIT_ROWS):
            # float32, for sums over a vocabulary lose digits in 16 bits
            logits = self.mllm.logits(states.flatten(0, 1)[part]).float()
            answers = self.answer_ids[part % n, None].to(logits.device)
            foils = self.foil_ids[part % n, None].to(logits.device)
            expected = logits.gather(1, answers)[:, 0]
            best = logits.argmax(1)
            read = [
                best,
                expected,
                expected - logits.logsumexp(1),
                logits.gather(1, foils)[:, 0],
                # the logits are of no further use
                logits.scatter_(1, answers, -torch.inf).amax(1),
            ]
            parts.append([x.cpu() for x in read])
        whole = [torch.cat(x).unflatten(0, (times, n)) for x in zip(*parts)]
        return [_Read(*of_one) for of_one in zip(*whole)]

    def _condition_rows(
        self, key: str, read: _Read, written: list[list[int]] | None
    ) -> Iterator[dict]:
        """What was read under one condition, a row a question."""
        by_answer = zip(*(x.split(self.lengths) for x in read))
        answers = self.answer_ids.split(self.lengths)
        foils = self.foil_ids.split(self.lengths)
        for i, (tagged, one) in enumerate(zip(self.tagged, map(_Read._make, by_answer))):
            row = {
                "sample": tagged.sample.id,
                "key": key,
                "context": self.names[i],
                "answer": tagged.sample.answer or "",
                "prediction": self._text(one.best.tolist()),
                "correct": bool((one.best == answers[i]).all()),
                "logprob": float(one.logprob.sum()),
                "margin": float(one.expected[0] - one.rival[0]),
            }
            if tagged.foil is not None:
                row |= _against_foil(one, answers[i], foils[i], tagged.sample)
            if written is not None:
                row["written"] = self._text(written[i])
            yield row

    def _text(self, ids: list[int]) -> str:
        if self.mllm.processor is None:
            return str(ids)
        return self.mllm.tokenizer.decode(ids, skip_special_tokens=True).strip()


class _Read(NamedTuple):
    """What logits say at the places of answer tokens, (n,) each.

    Attributes
    ----------
    best : int64
        The likeliest token.
    expected, foil, rival : float32
        Logits: of the answer's token, of the foil's, the largest of all but the answer's.
    logprob : float32
        Of the answer's token, nats.
    """

    best: torch.Tensor
    expected: torch.Tensor
    logprob: torch.Tensor
    foil: torch.Tensor
    rival: torch.Tensor


def _foil_ids(tagged: TaggedSample) -> np.ndarray:
    """Tokens of the foil in the places of the answer's; the answer's own where it has none."""
    ids = tagged.ids[tagged.answer].copy()
    foil = [] if tagged.foil is None else tagged.foil[: len(ids)]
    ids[: len(foil)] = foil
    return ids


def _against_foil(
    read: _Read, answer: torch.Tensor, foil: torch.Tensor, sample: Sample
) -> dict:
    """The answer's tokens (n,) against those of the sample's foil, at the first in which the two differ."""
    differ = (answer != foil).nonzero()
    if not len(differ):
        problem = f"{sample.foil!r} begins as the answer {sample.answer!r} does, or is its beginning"
        sample.fail("foil", problem, "Give one that differs in some token of both")
    place = int(differ[0])
    contrast = float(read.expected[place] - read.foil[place])
    return {"contrast": contrast, "flipped": bool(read.best[place] == foil[place])}
