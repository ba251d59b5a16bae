"""Interventions on heads: what is done to them (`Ablation`), as a context manager (`ablate`), and families of them.

Heads are edited at the input of o_proj, exactly as if their columns of o_proj had been changed, without touching the
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .attention import Call, Edit, Layout, editing, laid_out, watching
from .contexts import forward
from .models import MLLM, device_of
from .ranking import HeadRanking, HeadSet, random_heads
from .samples import Sample
from .store import digest
from .tagging import Tagged, to_model

MODES = ("zero", "mean", "resample", "knockout", "uniform")
PHASES = ("both", "prefill", "decode", "context", "question")


class Reference:
    """What heads put out on other samples, for mean and resample ablation.

    Parameters
    ----------
    mllm : the model, unedited.
    samples : at least one for the mean, two for resampling; of the layout of those that will run.

    Raises
    ------
    ValueError : there are no samples.
    SampleError : one cannot be tagged.
    """

    def __init__(self, mllm: MLLM, samples: Iterable[Sample | Tagged]):
        self.mllm = mllm
        self.tagged = [s if isinstance(s, Tagged) else mllm.tag(s) for s in samples]
        if not self.tagged:
            raise ValueError("an empty reference: give samples")
        self.names = ["" if t.sample is None else t.sample.id for t in self.tagged]
        self._kept: tuple[HeadSet, dict] = HeadSet(), {}

    def __getstate__(self) -> dict:
        """Without the model: who takes the reference elsewhere gives it the model that is there."""
        return self.__dict__ | dict(mllm=None, _kept=(HeadSet(), {}))

    @cached_property
    def key(self) -> str:
        return digest([[t.ids, t.sample] for t in self.tagged])

    @torch.inference_mode()
    def _run(self, watch: Callable) -> Iterator[Tagged]:
        for t in self.tagged:
            with laid_out(self.mllm, Layout.of([t])), watching(self.mllm, watch):
                forward(self.mllm, to_model(t.inputs, self.mllm))
            yield t

    @cached_property
    def means(self) -> torch.Tensor:
        """(L, H, D) float32, mean output of every head over all tokens of all samples."""
        total = torch.zeros(self.mllm.n_layers, self.mllm.n_heads, self.mllm.head_dim)

        def watch(layer, call, query, key, value, out, scaling, edits):
            total[layer] += out[0].float().sum(0).cpu()

        tokens = sum(len(t.ids) for t in self._run(watch))
        return total / tokens

    def outputs(self, heads: HeadSet) -> dict[int, list[torch.Tensor]]:
        """For each layer with heads of the set, (N, h, D) of every sample, h running over its heads in order."""
        if heads == self._kept[0]:  # the batches of one run ask for the same again
            return self._kept[1]
        columns = _by_layer(heads)
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in columns}

        def watch(layer, call, query, key, value, out, scaling, edits):
            if layer in columns:
                found[layer].append(out[0][:, columns[layer]])

        list(self._run(watch))
        self._kept = heads, found
        return found


def _by_layer(heads: HeadSet) -> dict[int, list[int]]:
    return {layer: [h for other, h in heads if other == layer] for layer in sorted({layer for layer, _ in heads})}


@dataclass(frozen=True)
class Ablation:
    """What is done to which heads.

    Parameters
    ----------
    heads : the heads.
    mode : "zero": their output is 0. "mean": it is their mean output over the reference. "resample": it is their output
        on another sample, drawn from the reference for each sample, at the same distance from the last token of the
        prompt. "knockout": only the edges from rows that ask (the question's tokens and all behind question and
        context) to V* are cut and the rest of the row renormalised, so that retrieval alone goes. "uniform": their
        queries are 0, so that they attend to all tokens alike (older practice, for comparison; it is no removal).
    phase : "prefill": the prompt's tokens; "decode": the answer's, which a model writes itself; or "both". The first
        token of an answer is predicted by the last token of the prompt, so by prefill. Across that line: "question",
        all tokens that ask, as above, and "context", all others.
    reference : for "mean" and "resample".

    Raises
    ------
    ValueError : mode or phase misspelt; "mean" or "resample" without what they need.
    """

    heads: HeadSet
    mode: str = "zero"
    phase: str = "both"
    reference: Reference | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: take one of {', '.join(map(repr, MODES))}")
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r}: take one of {', '.join(map(repr, PHASES))}")
        least = {"mean": 1, "resample": 2}.get(self.mode, 0)
        if least and not isinstance(self.reference, Reference):
            raise ValueError(f"mode={self.mode!r} needs reference=, a Reference to take the heads' outputs from")
        if least and len(self.reference.tagged) < least:
            raise ValueError(
                f"mode='resample' needs a reference of at least 2 samples, not {len(self.reference.tagged)}"
            )

    def check(self, mllm: MLLM) -> None:
        """Raise ValueError where the heads are none, or another model's."""
        self.heads.check((mllm.n_layers, mllm.n_heads))

    @property
    def key(self) -> str:
        """What tells this ablation from others in a store."""
        return digest([list(self.heads), *self.kind[:2], self.reference.key if self.reference else ""])

    @property
    def kind(self) -> tuple:
        """Ablations of one kind can run in one batch."""
        return self.mode, self.phase, self.reference

    @property
    def spares_context(self) -> bool:
        """No token in front of the question is touched."""
        return self.mode == "knockout" or self.phase in ("decode", "question")


class _Donors:
    """Outputs of another sample for every batch row, for resample ablation of one layer."""

    def __init__(self, outputs: list[torch.Tensor], heads: list[int], n_heads: int, reference: Reference):
        self.outputs, self.heads, self.n_heads, self.reference = outputs, heads, n_heads, reference
        self.end = 0  # last token of the prompt, where no layout says it

    def __call__(self, call: Call) -> torch.Tensor:
        layout, tagged = call.layout, self.reference.tagged
        if layout is None:
            if call.first and call.rows > 1:
                raise ValueError("resample needs the prompt in one piece: it cannot run with chunked prefill")
            if not call.first:
                self.end = call.n - 1
        out = torch.zeros(call.batch, call.rows, self.n_heads, self.outputs[0].shape[-1], device=call.device)
        for b in range(call.batch):
            name = layout.names[b] if layout is not None else ""
            others = [i for i, other in enumerate(self.reference.names) if not name or other != name]
            donor = others[int(digest(name or b), 16) % len(others)]  # the same in every layer and batch
            end = int(layout.last[b]) if layout is not None else self.end
            rows = (call.positions() - end + tagged[donor].last).clamp(0, len(self.outputs[donor]) - 1)
            out[b][:, self.heads] = self.outputs[donor][rows.to(call.device)].to(out.dtype)
        return out


def edits_of(mllm: MLLM, ablations: Sequence[Ablation], rows: int = 1) -> dict[int, Edit]:
    """Edits for a batch in which each ablation has `rows` batch rows; all ablations of one kind.

    Raises
    ------
    ValueError : no heads, or heads of a model of another geometry.
    """
    shape = (mllm.n_layers, mllm.n_heads)
    mode, phase, reference = ablations[0].kind
    for ablation in ablations:
        ablation.check(mllm)
    masks = torch.from_numpy(np.stack([a.heads.mask(shape) for a in ablations])).repeat_interleave(rows, 0)
    every = HeadSet(head for a in ablations for head in a.heads)
    outputs = reference.outputs(every) if mode == "resample" else {}
    found, modules = {}, mllm.attentions
    for layer, columns in _by_layer(every).items():
        device = device_of(modules[layer])
        values = None
        if mode == "mean":
            values = reference.means[layer].to(device)
        elif mode == "resample":
            values = _Donors(outputs[layer], columns, mllm.n_heads, reference)
        found[layer] = Edit(mode, masks[:, layer].to(device), phase, values)
    return found


@contextmanager
def ablate(
    mllm: MLLM,
    heads: HeadSet | Iterable[tuple[int, int]],
    mode: str = "zero",
    phase: str = "both",
    *,
    reference: Reference | Iterable[Sample | Tagged] | None = None,
    tagged: Tagged | Sequence[Tagged] | None = None,
) -> Iterator[None]:
    """Ablate heads in whatever the model runs inside: `evaluate`, `score`, a forward pass, ``generate()``.

    On exit, also by an exception, the model is what it was; contexts can be nested, and act together.

    Parameters
    ----------
    mllm : the model; padding is expected on the left, the cache is one that grows (transformers' default).
    heads, mode, phase : see `Ablation`.
    reference : samples for "mean" and "resample"; a `Reference` is computed once for many ablations.
    tagged : what will run, for "knockout" outside `evaluate` and `score`: the samples of the batch in its order,
        tagged as they are fed (for ``generate()``: without an answer). It also tells the phases apart: "context" and
        "question" need it, "prefill" and "decode" where an answer is fed along.

    Raises
    ------
    ValueError : no heads, or heads of another geometry; mode or phase misspelt; no reference; knockout without V*.

    Examples
    --------
    >>> with ch.ablate(mllm, ranking.top(0.05)):
    ...     result = ch.evaluate(mllm, samples)
    """
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(mllm, reference)
    heads = heads if isinstance(heads, HeadSet) else HeadSet(heads)
    edits = edits_of(mllm, [Ablation(heads, mode, phase, reference)])
    known = [tagged] if isinstance(tagged, Tagged) else tagged
    with editing(mllm, edits), laid_out(mllm, Layout.of(list(known))) if known else nullcontext():
        yield


class Condition(NamedTuple):
    """A point of an ablation curve: which heads, what share of all, which random draw."""

    heads: str
    share: float
    draw: int = 0


def curve(
    ranking: HeadRanking,
    shares: Iterable[float],
    order: str = "top",
    *,
    name: str | None = None,
    draws: Iterable[int] = (0,),
    mode: str = "zero",
    phase: str = "both",
) -> dict[Condition, Ablation]:
    """Ablations of growing sets of heads.

    Parameters
    ----------
    ranking : heads from best to worst.
    shares : of all heads, in (0, 1]; at most 0.5 for the random orders.
    order : "top", "bottom", "random" (drawn from the heads outside the top of the same share) or "layer" (the same,
        from the same layers as the top as far as they go: see `random_heads`).
    name : of the curve; None takes the order.
    draws : seeds of the random orders.
    mode, phase : see `Ablation`.

    Raises
    ------
    ValueError : a share outside its range; order misspelt.
    """
    if order not in ("top", "bottom", "random", "layer"):
        raise ValueError(f"order={order!r}: take 'top', 'bottom', 'random' or 'layer'")
    out = {}
    for share in shares:
        for draw in draws if order in ("random", "layer") else (0,):
            if order in ("top", "bottom"):
                heads = getattr(ranking, order)(share)
            else:
                match = "layer" if order == "layer" else None
                heads = random_heads(ranking, ranking.top(share), seed=draw, match=match)
            out[Condition(name or order, share, draw)] = Ablation(heads, mode, phase)
    return out
