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

from .attention import Edit, editing, laid_out, own_attention, watching
from .contexts import Packed, batches, behind_prefix, forward, pack, require_answers
from .models import MLLM
from .ranking import HeadRanking
from .samples import Sample
from .scoring import HeadScores


def visual_mass(scores: HeadScores, query: str = "last") -> xr.DataArray:
    r"""Total attention on visual tokens, wherever they stand: :math:`\sum_{j \in V} A_{qj}`; RAM without V*."""
    return scores.data.visual.sel(query=query, drop=True)


def text_entropy(scores: HeadScores, query: str = "last") -> xr.DataArray:
    r"""Sharpness of attention on input without media, :math:`\sum_j A_{qj} \log A_{qj}`: sharp heads come first.

    Parameters
    ----------
    scores : of text-only samples.
    query : rows.

    Raises
    ------
    ValueError : a sample has visual tokens.
    """
    if (scores.data.visual.sel(query=query) > 0).any():
        raise ValueError("text_entropy is about text-only input, but a sample has visual tokens: score others")
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
    distance = abs(np.arange(shape[0]) - first)[:, None]
    return xr.DataArray(-distance - np.random.default_rng(seed).random(shape) / 2, dims=("layer", "head"))


def random_ranking(shape: tuple[int, int], seed: int = 0) -> HeadRanking:
    """All heads in random order. For a set that never meets another, see `corehead.random_heads`."""
    return HeadRanking(np.random.default_rng(seed).random(shape), f"random {seed}")


def output_norm(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    r"""Norm of what a head writes: :math:`\lVert z_h W_O^h \rVert_2`, z the head's output in front of o_proj.

    ``**options`` here and below: batch_size (contexts at once, default 32) and progress (a bar, default on).
    """

    def measure(seen: _Seen) -> torch.Tensor:
        return torch.einsum("rhd,ohd->rho", seen.out, seen.o_proj).norm(dim=-1)

    return _observe(mllm, samples, measure, **options)


def value_norm(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    r"""Attention weighted with norms of values (arXiv 2004.10102): :math:`\sum_j A_{qj} \lVert v_j W_O^h \rVert_2`."""

    def measure(seen: _Seen) -> torch.Tensor:
        gram = torch.einsum("ohd,ohe->hde", seen.o_proj, seen.o_proj)  # |v W|^2 = v (W' W) v, without v W in full
        value = seen.value.repeat_interleave(len(gram) // len(seen.value), 0)  # (H, N, D)
        norm = torch.einsum("hnd,hde,hne->hn", value, gram, value).clamp(min=0).sqrt()
        return torch.einsum("rhn,hn->rh", seen.weights, norm)

    return _observe(mllm, samples, measure, **options)


def copy_score(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    """Retrieval score by copying (arXiv 2404.15574): how often a head looks most at the very token that is said next.

    A hit: of all tokens, the one with the most attention is in V* and is the answer's token itself. Visual tokens are
    no words, so that in pictures there is never a hit; the score is one for text.
    """

    def measure(seen: _Seen) -> torch.Tensor:
        top = seen.weights.argmax(-1)  # (R, H)
        same = seen.ids[top] == seen.answer[:, None]
        return (same & seen.target.gather(1, top)).float()

    return _observe(mllm, samples, measure, **options)


def target_hits(mllm: MLLM, samples: Iterable[Sample], **options) -> xr.DataArray:
    """Visual-head score in the manner of SparseMM (arXiv 2506.05344): how often the most attended token is in V*.

    Among the tokens of the target's modality, at the rows that predict the answer.
    """

    def measure(seen: _Seen) -> torch.Tensor:
        on_text = ~(seen.target & seen.visual).any(1)
        among = torch.where(on_text[:, None], ~seen.visual, seen.visual)  # (R, N)
        top = seen.weights.masked_fill(~among[:, None], -1).argmax(-1)
        return seen.target.gather(1, top).float()

    return _observe(mllm, samples, measure, **options)


def attribution(mllm: MLLM, samples: Iterable[Sample], *, batch_size: int = 32, progress: bool = True) -> xr.DataArray:
    r"""Gradient x activation, :math:`\langle z_h, \partial \log p(\mathrm{answer}) / \partial z_h \rangle`, all rows.

    The first-order estimate of what the answer's log-probability loses when the head is zeroed: attribution patching
    (arXiv 2310.10348) towards zero, the head importance of arXiv 1905.10650 with its sign.
    """
    names, found = [], []
    shape = mllm.n_layers, mllm.n_heads
    with tqdm(desc="attribution", unit="sample", disable=not progress) as bar:
        for batch in batches(mllm, samples, batch_size):
            require_answers(batch)
            packed = pack(mllm, batch, alone=True)
            n = len(packed.places)
            with torch.enable_grad():
                gates = torch.ones(shape[0], n, shape[1], device=mllm.device, requires_grad=True)
                every = torch.ones(1, shape[1], dtype=torch.bool)
                edits = {layer: Edit("scale", every, values=gates[layer]) for layer in range(shape[0])}
                with editing(mllm, edits), laid_out(mllm, packed.layout):
                    feed = packed.feed
                    most = max(len(b.answer) for c in packed.contexts for b in c.blocks)
                    logits = mllm.model(**feed, use_cache=False, logits_to_keep=most + 1).logits.float()
                total = 0.0
                for c, k in packed.places:
                    answer = packed.contexts[c].blocks[k].answer
                    row = logits[packed.places[c, k][0], -len(answer) - 1 : -1].log_softmax(-1)
                    total = total + row[torch.arange(len(answer)), torch.from_numpy(answer)].sum()
                [gradient] = torch.autograd.grad(total, gates)
            for c, k in packed.places:
                names.append(packed.contexts[c].blocks[k].tagged.sample.id)
                found.append(gradient[:, packed.places[c, k][0]].cpu().numpy())
            bar.update(n)
    return _table(names, found)


@dataclass
class _Seen:
    """What one layer did at the R rows that predict the answers of one batch row.

    weights (R, H, N) float32; value (Hkv, N, D); out (R, H, D); o_proj (hidden, H, D); target (R, N) bool; visual (N,)
    bool; ids (N,); answer (R,) the tokens that are predicted.
    """

    weights: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    o_proj: torch.Tensor
    target: torch.Tensor
    visual: torch.Tensor
    ids: torch.Tensor
    answer: torch.Tensor


class _Watch:
    """Measures every layer of one batch, at the rows that predict answers."""

    def __init__(self, mllm: MLLM, packed: Packed, measure: Callable[[_Seen], torch.Tensor]):
        self.mllm, self.measure = mllm, measure
        n, width = packed.layout.asks.shape
        self.ids = torch.full((n, width), -1)
        self.visual = torch.zeros(n, width, dtype=torch.bool)
        self.jobs: dict[int, list] = {}  # batch row -> (sample, rows of feed, target, tokens to predict)
        for (c, k), (b, _, _) in packed.places.items():
            tagged = packed.contexts[c].blocks[k].tagged
            answer = tagged.ids[tagged.answer]
            self.ids[b, packed.keys(c, k, np.arange(len(tagged.ids)))] = torch.from_numpy(tagged.ids)
            self.visual[b, packed.keys(c, k, tagged.visual)] = True
            target = torch.zeros(len(answer), width, dtype=torch.bool)
            target[:, packed.keys(c, k, tagged.target)] = True
            rows = packed.rows(c, k, tagged.last + np.arange(len(answer)))
            self.jobs.setdefault(b, []).append((tagged.sample.id, rows, target, answer))
        self.found: dict[str, list[np.ndarray]] = {name: [] for jobs in self.jobs.values() for name, *_ in jobs}

    def __call__(self, layer, call, query, key, value, out, scaling, edits):
        weight = self.mllm.attentions[layer].o_proj.weight
        o_proj = weight.float().view(len(weight), query.shape[1], -1)
        for b, jobs in self.jobs.items():
            names, rows, targets, answers = zip(*jobs)
            at = torch.from_numpy(np.concatenate(rows)).to(call.device)
            k = key[b].float().repeat_interleave(query.shape[1] // key.shape[1], 0)  # (H, N, D)
            logits = torch.einsum("hrd,hnd->rhn", query[b, :, at].float() * scaling, k)
            allowed = call.allowed(at)[b if call.mask is not None and len(call.mask) > 1 else 0]
            seen = _Seen(
                weights=logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1),
                value=value[b].float(),
                out=out[b, at].float(),
                o_proj=o_proj,
                target=torch.cat(targets).to(call.device),
                visual=self.visual[b].to(call.device),
                ids=self.ids[b].to(call.device),
                answer=torch.from_numpy(np.concatenate(answers)).to(call.device),
            )
            for name, part in zip(names, self.measure(seen).cpu().split([len(r) for r in rows])):
                self.found[name].append(part.mean(0).numpy())


@torch.inference_mode()
def _observe(
    mllm: MLLM,
    samples: Iterable[Sample],
    measure: Callable[[_Seen], torch.Tensor],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> xr.DataArray:
    """Measure (R, H) at the rows that predict answers, in every layer; the mean over a sample's rows."""
    found: dict[str, list[np.ndarray]] = {}
    with tqdm(desc="observing", unit="sample", disable=not progress) as bar:
        for batch in batches(mllm, samples, batch_size):
            require_answers(batch)
            packed = pack(mllm, batch)
            watch = _Watch(mllm, packed, measure)
            with own_attention(mllm), laid_out(mllm, packed.layout):
                feed = behind_prefix(mllm, packed)
                with watching(mllm, watch):
                    forward(mllm, feed)
            found |= watch.found
            bar.update(len(watch.found))
    return _table(list(found), [np.stack(layers) for layers in found.values()])


def _table(names: list[str], found: list[np.ndarray]) -> xr.DataArray:
    if not found:
        raise ValueError("no samples: give some")
    return xr.DataArray(np.stack(found), dims=("sample", "layer", "head"), coords={"sample": names})
