"""What a model answers: one row a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .attention import own_attention
from .models import MLLM
from .samples import Sample, SampleError
from .stats import proportion_interval
from .tagging import collate, pad_id, to_model


@torch.inference_mode()
def evaluate(mllm: MLLM, samples: Sequence[Sample], *, batch_size: int = 32, progress: bool = True) -> pd.DataFrame:
    """Compare the model's greedy answer with the expected one.

    Parameters
    ----------
    mllm : the model.
    samples : with answers.
    batch_size : samples that run at once, padded on the left.
    progress : show a bar with the time left.

    Returns
    -------
    DataFrame, one row a sample in the order given: sample, the columns of its `meta`, answer, prediction (the likeliest
    token at each place of the answer, the ones before it given), correct (all of them right), logprob (of the whole
    answer, nats), margin (first token: logit of the answer less the best other logit).

    Raises
    ------
    SampleError : a sample cannot be tagged, or has no answer.
    """
    rows = []
    for i in tqdm(range(0, len(samples), batch_size), desc="evaluating", unit="batch", disable=not progress):
        batch = [mllm.tag(sample) for sample in samples[i : i + batch_size]]
        for tagged in batch:
            if len(tagged.answer) == 0:
                raise SampleError(tagged.sample.id, "answer", "is missing", "Give the text that the model should say")
        inputs, _ = collate(batch, pad_id(mllm))
        keep = 1 + max(len(tagged.answer) for tagged in batch)
        with own_attention(mllm):
            logits = mllm.model(**to_model(inputs, mllm), logits_to_keep=keep).logits.float().cpu()
        for tagged, row in zip(batch, logits):
            n = len(tagged.answer)
            answer = torch.from_numpy(tagged.ids[tagged.answer])
            predicting = row[-n - 1 : -1]
            first = predicting[0].clone()
            first[answer[0]] = -torch.inf
            best = predicting.argmax(-1)
            rows.append(
                {
                    "sample": tagged.sample.id,
                    **tagged.sample.meta,
                    "answer": tagged.sample.answer,
                    "prediction": mllm.tokenizer.decode(best).strip(),
                    "correct": bool((best == answer).all()),
                    "logprob": float(predicting.log_softmax(-1)[torch.arange(n), answer].sum()),
                    "margin": float(predicting[0, answer[0]] - first.max()),
                }
            )
    return pd.DataFrame(rows)


def accuracy(results: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Accuracy with Wilson's 95 % interval for each group of rows: columns n, accuracy, low, high."""

    def one(group: pd.Series) -> pd.Series:
        low, high = proportion_interval(int(group.sum()), len(group))
        return pd.Series({"n": len(group), "accuracy": group.mean(), "low": low, "high": high})

    table = results.groupby(by, sort=False)["correct"].apply(one).unstack()
    return table.astype({"n": np.int64})
