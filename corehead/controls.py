"""Rankings that RAM is compared with: other things that one could call a head important for.

Each function gives scores (sample, layer, head), or (layer, head) where samples play no part; their mean over samples
is what a `HeadRanking` is made of. What is measured in a forward pass is measured at the rows that predict the answer's
tokens (teacher-forced), the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from .attention import Call, Measure
from .batching import Context, Packed, batches, pack
from .gates import GatedBatch
from .models import MLLM
from .runs import check_new
from .samples import Sample
from .scoring import HeadScores, read_rows, row_means


def visual_mass(scores: HeadScores, query: str = "last") -> xr.DataArray:
    r"""Total attention on visual tokens, wherever they stand: :math:`\sum_{j \in V} A_{qj}`; RAM without V*."""
    return scores.data.visual.sel(query=query, drop=True)


def text_entropy(scores: HeadScores, query: str = "last") -> xr.DataArray:
    r"""Sharpness of attention on input without media, :math:`\sum_j A_{qj} \log A_{qj}`: sharp heads come first.

    Parameters
    ----------
    scores : HeadScores
        Of text-only samples.
    query : str
        The query rows.

    Raises
    ------
    ValueError
        A sample has visual tokens.
    """
    if (scores.data.visual.sel(query=query) > 0).any():
        raise ValueError(
            "text_entropy is about text-only input, but a sample has visual tokens: score others"
        )
    # negative: the ranking puts high scores first, and a sharp head has little entropy
    return -scores.data.entropy.sel(query=query, drop=True)


def sink_mass(scores: HeadScores, query: str = "last") -> xr.DataArray:
    """Attention on the first token of the prompt, the attention sink (arXiv 2309.17453)."""
    return scores.data.sink.sel(query=query, drop=True)


def query_focused(scores: HeadScores) -> xr.DataArray:
    """Query-focused retrieval score (arXiv 2506.09944) with null calibration (arXiv 2605.27243).

    Mean RAM of the question's tokens, less the same under the question "N/A".
    """
    return scores.per_sample("calibrated", "question")


def layer_index(shape: tuple[int, int], first: int, seed: int = 0) -> xr.DataArray:
    """The layer alone, (layer, head): heads of layer `first`, then of its neighbours; at random within a layer."""
    distance = abs(np.arange(shape[0]) - first)[:, None]  # (layers, 1)
    # less than one layer of noise: it orders heads at one distance, and moves none to another
    noise = np.random.default_rng(seed).random(shape) / 2
    return xr.DataArray(-distance - noise, dims=("layer", "head"))


def output_norm(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    r"""Norm of what a head writes: :math:`\lVert z_h W_O^h \rVert_2`, z the head's output in front of o_proj.

    ``**options`` here and below: batch_size (contexts at once, default 32) and progress (a bar, default on).
    """

    def measure(seen: Seen) -> torch.Tensor:
        out = seen.call.out[:, seen.rows].float()
        return torch.einsum("brhd,ohd->brho", out, seen.o_proj).norm(dim=-1)

    return observe(mllm, samples, measure, **options)


def value_norm(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    r"""Attention weighted with norms of values (arXiv 2004.10102): :math:`\sum_j A_{qj} \lVert v_j W_O^h \rVert_2`."""

    def measure(seen: Seen) -> torch.Tensor:
        # |v W|^2 = v (W' W) v: (H, D, D) numbers in place of v W, which has a hidden state for each key and head
        gram = torch.einsum("ohd,ohe->hde", seen.o_proj, seen.o_proj)
        value = seen.call.head_values
        squares = torch.einsum("bhnd,hde,bhne->bhn", value, gram, value)
        norm = squares.clamp(min=0).sqrt()  # rounding may leave a small one below zero
        return torch.einsum("bhrn,bhn->brh", seen.weights, norm)

    return observe(mllm, samples, measure, **options)


def copy_score(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    """Retrieval score by copying (arXiv 2404.15574): how often a head looks most at the very token that is said next.

    A hit: of all tokens, the one with the most attention is in V* and is the answer's token itself. Visual tokens are
    no words, so that in pictures there is never a hit; the score is one for text.
    """

    def measure(seen: Seen) -> torch.Tensor:
        top = seen.weights.argmax(-1).transpose(1, 2)  # (B, r, H)
        ids = seen.ids[:, None].expand(-1, top.shape[1], -1)
        looked_at = ids.gather(2, top)
        said_next = seen.next_ids[:, seen.call.first + seen.rows, None]
        return ((looked_at == said_next) & seen.evidence.gather(2, top)).float()

    return observe(mllm, samples, measure, **options)


def evidence_hits(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    """Visual-head score in the manner of SparseMM (arXiv 2506.05344): how often the most attended token is in V*.

    Among the tokens of the evidence's modality, at the rows that predict the answer.
    """

    def measure(seen: Seen) -> torch.Tensor:
        visual = seen.visual[:, None]  # (B, 1, N)
        on_text = ~(seen.evidence & visual).any(-1, keepdim=True)  # (B, r, 1)
        # or else the sink would have the maximum of many a head that does look at V*
        modality = torch.where(on_text, ~visual, visual)  # (B, r, N)
        weights = seen.weights.masked_fill(~modality[:, None], -1)
        top = weights.argmax(-1).transpose(1, 2)  # (B, r, H)
        return seen.evidence.gather(2, top).float()

    return observe(mllm, samples, measure, **options)


def token_patterns(
    mllm: MLLM, samples: Iterable[Sample], progress: bool = True
) -> xr.Dataset:
    """How much heads look by two simple rules of text, which are no look-up, over all rows of the prompt.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        One forward pass each, all of whose rows are read.
    progress : bool
        Show a bar.

    Returns
    -------
    Dataset (sample, layer, head)
        ``previous``: attention on the token in front of each (previous-token heads); ``duplicate``: attention of each
        text token that has occurred before on its earlier occurrences, 0 where none has (duplicate-token heads, arXiv
        2211.00593).

    Raises
    ------
    ValueError
        There are no samples, or two have one id.
    """
    previous, duplicate = {}, {}
    for sample in tqdm(list(samples), desc="token patterns", disable=not progress):
        check_new(sample.id, previous)
        tagged = mllm.tag(sample)
        length = tagged.last + 1
        ids = torch.from_numpy(tagged.ids).clone()
        # visual tokens have one id, and are not the same thing for that: each gets its own
        ids[tagged.visual] = -1 - torch.arange(len(tagged.visual))
        sums = read_rows(mllm, tagged, np.arange(length), _patterns(ids)).sum(1)
        previous[sample.id] = sums[:, 0] / max(1, tagged.last)
        duplicate[sample.id] = sums[:, 1] / max(1, length - len(ids[:length].unique()))
    return xr.Dataset({"previous": _table(previous), "duplicate": _table(duplicate)})


def _patterns(ids: torch.Tensor) -> Measure:
    """Measures sums over rows of the attention on the token in front, and on the same token before, (1, 1, 2, H)."""

    def measure(call: Call, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        of_keys = ids[: call.n].to(call.device)
        keys = torch.arange(call.n, device=call.device)
        at = (call.first + rows)[:, None]
        in_front = keys == at - 1  # (r, n)
        earlier = (of_keys == of_keys[at]) & (keys < at)
        edges = torch.stack([in_front, earlier]).to(weights)
        return torch.einsum("bhrn,prn->bph", weights, edges)[:, None]

    return measure


def attribution(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    r"""Gradient x activation, :math:`\langle z_h, \partial \log p(\mathrm{answer}) / \partial z_h \rangle`, all rows.

    The first-order estimate of what the answer's log-probability loses when the head is zeroed: attribution patching
    (arXiv 2310.10348) towards zero, the head importance of arXiv 1905.10650 with its sign. A context runs in one piece,
    as the gradient goes through all of it.
    """

    def gradients(contexts: list[Context]) -> dict[str, np.ndarray]:
        batch = GatedBatch(mllm, contexts)
        # a factor 1 on each head's output: its derivative is <z, d log p / d z>, summed over all rows
        shape = mllm.n_layers, len(batch.names), mllm.n_heads
        gates = torch.ones(shape, device=mllm.device, requires_grad=True)
        # one backward pass for all: a row's gates touch that row's answer alone
        [gradient] = torch.autograd.grad(batch.logprobs(gates).sum(), gates)
        return dict(zip(batch.names, gradient.transpose(0, 1).cpu().numpy()))

    return _in_batches(mllm, samples, gradients, **options)


@dataclass
class Seen:
    """What one layer did at rows that predict answers.

    Attributes
    ----------
    call : Call
    rows : (r,) int64 tensor
        Of the call.
    weights : (B, H, r, N) float32 tensor
    o_proj : (hidden, H, D) float32 tensor
    evidence : (B, r, N) bool tensor
        What each row looks for.
    ids, next_ids : (B, N) int64 tensors
        Token ids by key, and the answer's token that the row at a key predicts; -1 elsewhere.
    visual : (B, N) bool tensor
    """

    call: Call
    rows: torch.Tensor
    weights: torch.Tensor
    o_proj: torch.Tensor
    evidence: torch.Tensor
    ids: torch.Tensor
    next_ids: torch.Tensor
    visual: torch.Tensor


def observe(
    mllm: MLLM,
    samples: Iterable[Sample],
    measure: Callable[[Seen], torch.Tensor],
    *,
    dims: tuple[str, ...] = (),
    **options,
) -> xr.DataArray:
    """Measure at the rows that predict answers, in every layer; the mean over a sample's rows.

    Parameters
    ----------
    mllm, samples, **options
        As in `output_norm`.
    measure : callable
        ``Seen -> (B, r, H, ...)`` tensor, a number or an array for each row and head.
    dims : tuple of str
        Names of the array's axes.

    Returns
    -------
    DataArray (sample, layer, head, *dims)
    """

    def means(batch: list[Context]) -> dict[str, np.ndarray]:
        return _observed(mllm, pack(mllm, batch), measure)

    return _in_batches(mllm, samples, means, dims, **options)


@torch.inference_mode()
def _observed(
    mllm: MLLM, packed: Packed, measure: Callable[[Seen], torch.Tensor]
) -> dict[str, np.ndarray]:
    """(L, H, ...) of every sample of a batch, the mean over its rows."""
    ids = torch.full(packed.roles.roles.shape, -1)
    next_ids = ids.clone()
    visual = torch.zeros_like(ids, dtype=torch.bool)
    predicting = {}
    for c, k, block in packed.blocks():
        row = packed.slots[c, k].row
        tagged = block.tagged
        all_keys = packed.keys(c, k, np.arange(len(tagged.ids)))
        ids[row, all_keys] = torch.from_numpy(tagged.ids)
        visual[row, packed.keys(c, k, tagged.visual)] = True
        # from the prompt's last token, which predicts the answer's first, to the answer's last but one
        predicting[c, k] = tagged.last + np.arange(len(block.answer))
        keys = packed.keys(c, k, predicting[c, k])
        next_ids[row, keys] = torch.from_numpy(block.answer)

    def see(call: Call, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        weight = mllm.o_proj(call.layer)
        seen = Seen(
            call=call,
            rows=rows,
            weights=weights,
            o_proj=weight.float().unflatten(1, (call.query.shape[1], -1)),
            evidence=call.evidence_of(rows),
            ids=ids[:, : call.n].to(call.device),
            next_ids=next_ids.to(call.device),
            visual=visual[:, : call.n].to(call.device),
        )
        return measure(seen)

    means = row_means(mllm, packed, predicting, see)
    return {block.tagged.sample.id: means[c, k] for c, k, block in packed.blocks()}


def _in_batches(
    mllm: MLLM,
    samples: Iterable[Sample],
    measure: Callable[[list[Context]], dict[str, np.ndarray]],
    dims: tuple[str, ...] = (),
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> xr.DataArray:
    """What is measured of the samples of each batch, (L, H, ...) by id, as one array."""
    found: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    with tqdm(desc="measuring", unit="sample", disable=not progress) as bar:
        for batch in batches(mllm, samples, batch_size, need_answer=True):
            for tagged in [tagged for context in batch for tagged in context.members]:
                check_new(tagged.sample.id, seen)
                seen.add(tagged.sample.id)
            new = measure(batch)
            found |= new
            bar.update(len(new))
    return _table(found, dims)


def _table(found: dict[str, np.ndarray], dims: tuple[str, ...] = ()) -> xr.DataArray:
    """Arrays (L, H, ...) by sample as one array."""
    if not found:
        raise ValueError("no samples: give some")
    return xr.DataArray(
        np.stack(list(found.values())),
        dims=("sample", "layer", "head", *dims),
        coords={"sample": list(found)},
    )
