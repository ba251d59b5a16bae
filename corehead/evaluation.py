"""What a model answers, under any number of conditions: one row a sample and condition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .attention import edited
from .batching import (
    Block,
    Condition,
    Context,
    Feed,
    Wanted,
    batches,
    pack,
    without_answers,
)
from .models import MLLM
from .runs import Finished, provenance, run
from .samples import Sample, SampleError
from .stats import METRICS
from .tagging import TaggedSample

# tokens in one forward pass over several conditions: what stays in a CPU's cache, what keeps a GPU busy
TOKENS = {"cpu": 2**11, "cuda": 2**16}


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
    # without the question's own tokens, blocks are a token or two
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
        packed = pack(mllm, batch, alone=alone, apart=apart)
        self.feed = Feed(mllm, packed)
        # a second feed for writing, because the answers in the first one would give the text away
        self.writing = None
        if new_tokens:
            prompts = [without_answers(context) for context in batch]
            asked = pack(mllm, prompts, alone=alone, apart=True)
            self.writing = Feed(mllm, asked, new_tokens)
        self.blocks = list(packed.blocks())
        # of every question the sample, and the name of its context, which are the same under all conditions
        self.samples = [block.tagged.sample for _, _, block in self.blocks]
        contexts = [packed.contexts[c] for c, _, _ in self.blocks]
        self.names = [x.name_of(sample) for x, sample in zip(contexts, self.samples)]
        # the answers of all questions one behind the other, (n,), and their lengths to split them again
        answers = [block.answer for _, _, block in self.blocks]
        self.answer_ids = torch.from_numpy(np.concatenate(answers))
        self.lengths = [len(answer) for answer in answers]
        rows = [packed.slots[c, k].row for c, k, _ in self.blocks]
        tokens = []
        for c, k, block in self.blocks:
            # the token at a position predicts the next one, so that the prompt's last predicts the answer's first
            predicting = block.tagged.last + np.arange(len(block.answer))
            tokens.append(packed.keys(c, k, predicting) - packed.before)
        self.wanted = Wanted(
            rows=torch.from_numpy(np.repeat(rows, self.lengths)),
            tokens=torch.from_numpy(np.concatenate(tokens)),
        )

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
            for condition, hidden, written in zip(together, states, texts):
                yield from self._condition_rows(condition.key, hidden, written)

    def _condition_rows(
        self, key: str, hidden: torch.Tensor, written: list[list[int]] | None
    ) -> Iterator[dict]:
        """What hidden states (n, hidden) of one condition say, a row a question."""
        # (n, vocabulary), only of rows that predict answers; float32, for sums over a vocabulary lose digits in 16 bits
        logits = self.mllm.logits(hidden).float().cpu()
        expected = logits.gather(1, self.answer_ids[:, None])[:, 0]
        best = logits.argmax(1)
        rivals = logits.scatter(1, self.answer_ids[:, None], -torch.inf).amax(1)
        logprobs = (expected - logits.logsumexp(1)).split(self.lengths)
        margins = (expected - rivals).split(self.lengths)
        correct = (best == self.answer_ids).split(self.lengths)
        # (n of the answer, vocabulary) each
        by_answer = zip(self.samples, best.split(self.lengths), logits.split(self.lengths))
        for i, (sample, tokens, rows) in enumerate(by_answer):
            row = {
                "sample": sample.id,
                "key": key,
                "context": self.names[i],
                "answer": sample.answer or "",
                "prediction": self._text(tokens.tolist()),
                "correct": bool(correct[i].all()),
                "logprob": float(logprobs[i].sum()),
                "margin": float(margins[i][0]),
            }
            if self.blocks[i][2].tagged.foil is not None:
                row |= self._against_foil(rows, self.blocks[i][2])
            if written is not None:
                row["written"] = self._text(written[i])
            yield row

    def _against_foil(self, logits: torch.Tensor, block: Block) -> dict:
        """The answer against the sample's foil, at the first token in which the two differ."""
        foil = block.tagged.foil.tolist()
        for place, (own, other) in enumerate(zip(block.answer.tolist(), foil)):
            if own != other:
                contrast = logits[place, own] - logits[place, other]
                flipped = int(logits[place].argmax()) == other
                return {"contrast": float(contrast), "flipped": flipped}
        sample = block.tagged.sample
        problem = f"{sample.foil!r} begins as the answer {sample.answer!r} does, or is its beginning"
        sample.fail("foil", problem, "Give one that differs in some token of both")

    def _text(self, ids: list[int]) -> str:
        if self.mllm.processor is None:
            return str(ids)
        return self.mllm.tokenizer.decode(ids, skip_special_tokens=True).strip()
