r"""What heads write when they look at the evidence: the OV circuit (transformer-circuits.pub/2021/framework).

Attention says from where a head reads, :math:`v W_O^h` what it writes. Here a head is given the evidence alone: its
attention on V* is scaled to 1, so that heads that hardly look can be asked what they would write.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import xarray as xr

from .controls import Seen, observe
from .models import MLLM
from .samples import Sample


def written(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    r"""What every head writes from the evidence: :math:`\sum_{v \in V^*} A_{qv} x_v W_V W_O / \sum_{v \in V^*} A_{qv}`.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        With answers and evidence.
    **options
        batch_size and progress, as in `corehead.controls`.

    Returns
    -------
    DataArray (sample, layer, head, hidden)
        float32, the mean over the rows that predict the answer; all of it is held in memory.

    Raises
    ------
    ValueError
        There are no samples.
    SampleError
        A sample cannot be tagged, or has no answer or no evidence.
    """
    return observe(
        mllm, _with_evidence(samples), _from_evidence, dims=("hidden",), **options
    )


def answer_written(
    mllm: MLLM, samples: Iterable[Sample], candidates: Iterable[str], **options
) -> xr.DataArray:
    """Whether what a head writes from the evidence is, to the output embedding, the answer: the direct logits.

    Parameters
    ----------
    mllm, samples, **options
        As in `written`.
    candidates : iterable of str
        Texts whose tokens the answer's are set against, as they would be written: with the blank in front.

    Returns
    -------
    DataArray (sample, layer, head)
        The share of the answer's tokens that get a higher logit than all other tokens of the candidates. Layers in
        between could read what is written in another way: a head can matter and score at the chance level here.

    Raises
    ------
    ValueError, SampleError
        As in `written`.
    """
    texts = list(candidates)
    ids = mllm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(sorted({token for text in ids for token in text}))
    decoder = mllm.decoder
    norm = decoder.norm
    head = mllm.model.get_output_embeddings()
    # (candidates, hidden)
    unembedding = head.weight[tokens.to(head.weight.device)].float()

    def measure(seen: Seen) -> torch.Tensor:
        out = _from_evidence(seen)  # (B, r, H, hidden)
        layer = decoder.layers[seen.call.layer]
        # Gemma 2 and 3 and GLM-4.1V norm what a layer's heads write before they add it
        if hasattr(layer, "pre_feedforward_layernorm"):
            out = layer.post_attention_layernorm(out.to(norm.weight))
        elif hasattr(layer, "post_self_attn_layernorm"):
            out = layer.post_self_attn_layernorm(out.to(norm.weight))
        # the norms' scale is common to all logits, and does not change which is the highest
        logits = norm(out.to(norm.weight)).to(unembedding) @ unembedding.T
        best = tokens.to(logits.device)[logits.argmax(-1)]  # (B, r, H)
        said_next = seen.next_ids[:, seen.call.first + seen.rows, None]
        return (best == said_next).float()

    return observe(mllm, _with_evidence(samples), measure, **options)


def nearest_mean(train: xr.DataArray, labels, test: xr.DataArray) -> xr.DataArray:
    """Which label each head's vector on a test sample is nearest to: does what it writes tell answers apart at all?

    Parameters
    ----------
    train, test : DataArray (sample, layer, head, hidden)
        As `written` gives them.
    labels : sequence
        Of the train samples.

    Returns
    -------
    DataArray (sample, layer, head)
        Labels: of the mean over the train samples of a label that is nearest by cosine, once the mean over all of them
        is taken off both.

    Raises
    ------
    ValueError
        Labels that do not fit, or fewer than two different ones.
    """
    labels = np.asarray(labels)
    names = np.unique(labels)
    if len(labels) != train.sizes["sample"] or len(names) < 2:
        raise ValueError(
            f"{len(labels)} labels of {len(names)} kinds for {train.sizes['sample']} samples: "
            "give one for each, and at least two different ones"
        )
    centre = train.mean("sample")
    by_label = train.assign_coords(label=("sample", labels)).groupby("label")
    means = by_label.mean("sample") - centre
    # a test vector's norm scales all its products alike, so that there is no need to divide by it
    product = xr.dot(test - centre, means, dim="hidden")
    likeness = product / np.sqrt((means**2).sum("hidden"))
    nearest = likeness.argmax("label")
    return nearest.copy(data=names[nearest.values])


def _with_evidence(samples: Iterable[Sample]) -> list[Sample]:
    samples = list(samples)
    for sample in samples:
        if not sample.evidence:
            sample.fail("evidence", "is missing", "Say where the answer stands")
    return samples


def _from_evidence(seen: Seen) -> torch.Tensor:
    """(B, r, H, hidden), what each head would write if it looked at V* alone, in the proportions in which it does."""
    on_evidence = seen.weights * seen.evidence[:, None]  # (B, H, r, N)
    on_evidence = on_evidence / on_evidence.sum(-1, keepdim=True).clamp(min=1e-30)
    read = torch.einsum("bhrn,bhnd->brhd", on_evidence, seen.call.head_values)
    return torch.einsum("brhd,ohd->brho", read, seen.o_proj)
