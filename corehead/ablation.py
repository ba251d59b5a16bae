"""Interventions on heads: what is done to them (`Ablation`), as a context manager (`ablate`), and families of them.

Heads are edited at the input of o_proj, exactly as if their columns of o_proj had been changed, without touching the
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch

from .attention import LAST, PHASES, Call, Hook, TokenRoles, hooks, row_weights
from .batching import Condition, run_unpadded
from .models import MLLM, device_of
from .ranking import HeadRanking, HeadSet, random_heads
from .runs import digest
from .samples import Sample
from .tagging import TaggedSample

# of a reference, that run together
TOKENS = 2**12
MODES = ("zero", "mean", "resample", "patch", "knockout", "zero_edges")


class Outputs(NamedTuple):
    """What heads put out on one sample: which tokens (n,) int64, and the outputs (n, H, D) there."""

    tokens: torch.Tensor
    values: torch.Tensor


class Reference:
    """What heads put out on other samples, for mean and resample ablation and for patching.

    Parameters
    ----------
    mllm : MLLM
        The model; what edits it while the reference is first used edits the reference as well.
    samples : iterable of Sample or TaggedSample
        At least one for the mean, two for resampling; of the layout of those that will run.
    donor_of : mapping of str to str, optional
        For patching: id of a sample that will run -> id of the one of `samples` whose outputs it gets.

    Raises
    ------
    ValueError
        There are no samples, or a donor is not one of them.
    SampleError
        One cannot be tagged.
    """

    def __init__(
        self,
        mllm: MLLM,
        samples: Iterable[Sample | TaggedSample],
        donor_of: Mapping[str, str] | None = None,
    ):
        self.mllm = mllm
        self.tagged = [s if isinstance(s, TaggedSample) else mllm.tag(s) for s in samples]
        if not self.tagged:
            raise ValueError("an empty reference: give samples")
        self.names = ["" if t.sample is None else t.sample.id for t in self.tagged]
        self.donor_of = dict(donor_of or {})
        unknown = set(self.donor_of.values()) - set(self.names)
        if unknown:
            raise ValueError(
                f"donor {min(unknown)!r} is not one of the samples: give it as well"
            )
        # by layer and phase, computed when asked for
        self._outputs: dict[tuple[int, str], list[Outputs]] = {}

    def __getstate__(self) -> dict:
        """Without the model: whoever takes the reference elsewhere gives it the model that is there."""
        return self.__dict__ | dict(mllm=None, _outputs={})

    @cached_property
    def key(self) -> str:
        return digest([[t.ids, t.sample] for t in self.tagged] + [self.donor_of])

    @cached_property
    def _batches(self) -> list[list[int]]:
        """Which samples run together: some of one length, for the outputs of padding mean nothing."""
        by_length: dict[int, list[int]] = {}
        for i, t in enumerate(self.tagged):
            by_length.setdefault(len(t.ids), []).append(i)
        batches = []
        for length, same in by_length.items():
            size = max(1, TOKENS // length)
            batches += [same[i : i + size] for i in range(0, len(same), size)]
        return batches

    def _run(self, recorders: Mapping[int, Hook]) -> None:
        """All samples under recorders by layer, batch by batch."""
        by_layer = {layer: [recorder] for layer, recorder in recorders.items()}
        for batch in self._batches:
            run_unpadded(self.mllm, [self.tagged[i] for i in batch], by_layer)

    @cached_property
    def means(self) -> torch.Tensor:
        """(L, H, D) float32, mean output of every head over all tokens of all samples."""
        # only sums are kept: outputs of all tokens in all layers might not fit
        sums = {layer: _Sum() for layer in range(self.mllm.n_layers)}
        self._run(sums)
        total = torch.stack([recorder.total for recorder in sums.values()])
        return total / sum(len(t.ids) for t in self.tagged)

    def outputs(self, layers: Iterable[int], phase: str) -> dict[int, list[Outputs]]:
        """For each layer, the outputs of every sample in the rows of a phase, on the layer's device."""
        layers = list(layers)
        missing = [layer for layer in layers if (layer, phase) not in self._outputs]
        if missing:  # the batches of one run ask for the same layers again
            # a row a sample is little to keep, and single heads of all layers are asked for one after the other
            if phase == "last":
                missing = list(range(self.mllm.n_layers))
            recorders = {layer: _Recorder(phase) for layer in missing}
            self._run(recorders)
            place = np.argsort([i for batch in self._batches for i in batch])
            for layer, recorder in recorders.items():
                outputs = recorder.outputs()
                outputs = [outputs[i] for i in place]
                for name, (tokens, _) in zip(self.names, outputs):
                    if not len(tokens):
                        raise ValueError(
                            f"reference {name!r} has no token in phase={phase!r}: give it an answer"
                        )
                self._outputs[layer, phase] = outputs
        return {layer: self._outputs[layer, phase] for layer in layers}


class _Sum(Hook):
    """Sums the outputs of one layer over tokens."""

    total: torch.Tensor | float = 0.0

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        self.total = self.total + out.float().sum((0, 1)).cpu()
        return out


class _Recorder(Hook):
    """Keeps the outputs of one layer in the rows of a phase, of every sample of one batch after the other."""

    def __init__(self, phase: str):
        self.phase = phase
        self.chunks: list[list[Outputs]] = []  # of every sample

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        if not call.first:  # a batch's first chunk
            self.chunks += [[] for _ in range(call.batch)]
        wanted = call.in_phase(self.phase).expand(call.batch, -1)
        for chunks, rows, values in zip(self.chunks[-call.batch :], wanted, out):
            rows = rows.nonzero()[:, 0]
            chunks.append(Outputs((call.first + rows).cpu(), values[rows]))
        return out

    def outputs(self) -> list[Outputs]:
        """Of every sample, in the order in which they ran."""
        return [Outputs(*map(torch.cat, zip(*chunks))) for chunks in self.chunks]


@dataclass(frozen=True)
class Ablation(Condition):
    """What is done to which heads: a condition of `evaluate`.

    Parameters
    ----------
    heads : HeadSet
    mode : {"zero", "mean", "resample", "patch", "knockout", "zero_edges"}
        "zero": their output is 0. "mean": it is their mean output over the reference. "resample": it is their output on
        another sample, drawn from the reference for each sample, at the same distance from the last token of the
        prompt, or at the nearest token that the other has in the phase. "patch": the same, but the other sample is the
        one that the reference names. "knockout": only the edges from query rows (the question's tokens and all behind
        question and context) to V* are cut and the rest of the row renormalised, so that the head reads something else.
        "zero_edges": the weights of these edges are 0 and the rest of the row is left as it is, so that the head writes
        that much less.
    phase : {"both", "prefill", "decode", "context", "question", "last"}
        "prefill": the prompt's tokens; "decode": the answer's, which a model writes itself. The first token of an
        answer is predicted by the last token of the prompt, so by prefill. Across that line: "question", all query
        rows, as above, and "context", all others. "last": the last token of the prompt alone.
    reference : Reference, optional
        For "mean", "resample" and "patch".

    Raises
    ------
    ValueError
        Mode or phase misspelt; "mean", "resample" or "patch" without what they need.
    """

    heads: HeadSet
    mode: str = "zero"
    phase: str = "both"
    reference: Reference | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(
                f"mode={self.mode!r}: take one of {', '.join(map(repr, MODES))}"
            )
        if self.phase not in PHASES:
            raise ValueError(
                f"phase={self.phase!r}: take one of {', '.join(map(repr, PHASES))}"
            )
        replaces = self.mode in ("mean", "resample", "patch")
        if replaces and not isinstance(self.reference, Reference):
            raise ValueError(
                f"mode={self.mode!r} needs reference=, a Reference to take the heads' outputs from"
            )
        # of two, one is another sample than the one that runs
        if self.mode == "resample" and len(self.reference.tagged) < 2:
            raise ValueError("mode='resample' needs a reference of at least 2 samples")
        if self.mode == "patch" and not self.reference.donor_of:
            raise ValueError(
                "mode='patch' needs a reference with donor_of=, which says whose outputs go where"
            )

    def check(self, mllm: MLLM) -> None:
        """Raise ValueError where the heads are none, or they or the reference are another model's."""
        self.heads.check(mllm.shape)
        theirs = None if self.reference is None else self.reference.mllm
        if theirs is not None and theirs.model is not mllm.model:
            raise ValueError(
                "the reference was made with another model: make one with this"
            )

    @property
    def key(self) -> str:
        """What tells this ablation from others in a store."""
        return digest(
            [
                list(self.heads),
                self.mode,
                self.phase,
                self.reference.key if self.reference else "",
            ]
        )

    @property
    def group(self) -> Hashable:
        """Ablations of one group run side by side."""
        return self.mode, self.phase, self.reference

    @property
    def first_layer(self) -> int:
        """The first layer with one of the heads."""
        return int(self.heads.mask.any(1).argmax())

    @property
    def leaves_context_intact(self) -> bool:
        """No token in front of the question is touched."""
        # then its prefill is that of the intact model, computed once for all such conditions
        only_edges = self.mode in ("knockout", "zero_edges")
        return only_edges or self.phase in ("decode", "question", "last")

    @property
    def leaves_prompt_intact(self) -> bool:
        """No token in front of the last of the prompt is touched."""
        return self.phase in ("decode", "last")

    @property
    def needs_own_row(self) -> bool:
        """A resampled or patched head must know the sample of its batch row."""
        return self.mode in ("resample", "patch")

    def hooks(
        self, mllm: MLLM, beside: Sequence[Ablation] = (), rows: int = 1
    ) -> dict[int, list[Hook]]:
        """Hooks by layer for a batch in which each ablation of `beside` (this one alone by default) has `rows` rows."""
        ablations = list(beside) or [self]
        # (B, L, H): the batch stands there once for each ablation, so that rows of one ablation are neighbours
        masks = np.repeat(np.stack([a.heads.mask for a in ablations]), rows, 0)
        # layers without an edited head need no hook
        layers = np.flatnonzero(masks.any((0, 2))).tolist()
        # a worker gets the reference without its model
        if self.reference is not None and self.reference.mllm is None:
            self.reference.mllm = mllm
        if self.needs_own_row:
            self.reference.outputs(layers, self.phase)  # of all layers in one run
        return {
            layer: [self._hook(mllm, layer, torch.from_numpy(masks[:, layer]))]
            for layer in layers
        }

    def _hook(self, mllm: MLLM, layer: int, heads: torch.Tensor) -> Hook:
        """The hook of one layer for heads (B, H)."""
        device = device_of(mllm.attentions[layer])
        heads = heads.to(device)
        if self.mode == "knockout":
            return Knockout(heads, self.phase)
        if self.mode == "zero_edges":
            return ZeroedEdges(heads, self.phase)
        if self.mode == "mean":
            mean = self.reference.means[layer].to(device)  # (H, D)
            return Replacement(heads, self.phase, lambda call: mean)
        if self.needs_own_row:
            outputs = self.reference.outputs([layer], self.phase)[layer]
            donors = _Donors(outputs, self.reference)
            return Replacement(heads, self.phase, donors, needs_own_row=True)
        return Replacement(heads, self.phase)


class _HeadHook(Hook):
    """A hook on some heads (B or 1, H) of one layer, in the rows of a phase."""

    def __init__(self, heads: torch.Tensor, phase: str):
        self.heads = heads
        self.phase = phase

    def where(self, call: Call) -> torch.Tensor:
        """(B or 1, R, H) bool: which rows of which heads."""
        return self.heads[:, None] & call.in_phase(self.phase)[..., None]


class Replacement(_HeadHook):
    """Other outputs for some heads: zero, or what a function of the call gives, (H, D) or (B, R, H, D)."""

    replaces = True

    def __init__(
        self,
        heads: torch.Tensor,
        phase: str,
        values: Callable[[Call], torch.Tensor] | None = None,
        needs_own_row: bool = False,
    ):
        super().__init__(heads, phase)
        self.values = values
        self.needs_own_row = needs_own_row

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        where = self.where(call)[..., None]  # (B or 1, R, H, 1)
        if self.values is None:
            return out.masked_fill(where, 0)
        return torch.where(where, self.values(call).to(out.dtype), out)


def _looking_rows(call: Call) -> np.ndarray:
    """Rows of the call in which any sequence of the batch looks for evidence."""
    return np.flatnonzero((call.query_of(call.all_rows()) >= 0).any(0).numpy())


class Knockout(_HeadHook):
    """Cuts the edges from query rows to the evidence that they look for; the rest of the row is renormalised."""

    def masked_rows(self, call: Call) -> np.ndarray:
        # `mask` cuts nothing in the sequences that look for nothing there
        return _looking_rows(call)

    def mask(self, call: Call, rows: torch.Tensor) -> torch.Tensor:
        where = self.where(call)[:, rows].transpose(1, 2)  # (B or 1, H, R)
        return call.evidence_of(rows)[:, None] & where[..., None]


class ZeroedEdges(_HeadHook):
    """Takes what query rows read from the evidence out of the output; the other weights of the row stay as they are."""

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        rows = _looking_rows(call)
        if not len(rows):
            return out
        value = call.head_values  # (B, H, N, D)
        where = self.where(call)
        for hook in takewhile(lambda hook: hook is not self, call.hooks):
            if isinstance(hook, ZeroedEdges):  # has taken it out already
                where = where & ~hook.where(call)
        out = out.clone()
        rows = torch.from_numpy(rows).to(call.device)
        # under all masks: what another hook has cut was not read, and cannot be taken out
        for part, weights in row_weights(call, rows):
            weights = weights * call.evidence_of(part)[:, None]  # (B, H, r, N)
            read = torch.einsum("bhrn,bhnd->brhd", weights, value)
            out[:, part] -= (read * where[:, part, :, None]).to(out.dtype)
        return out


class _Donors:
    """Outputs of another sample for every batch row, for resampling or patching one layer."""

    def __init__(self, outputs: list[Outputs], reference: Reference):
        self.outputs, self.reference = outputs, reference
        self.prompt_end = 0  # where no roles say it

    def __call__(self, call: Call) -> torch.Tensor:
        roles = call.roles
        # a later chunk may be the prompt's or a long answer's: nothing would say where the prompt ends
        if roles is None and call.first and call.rows > 1:
            raise ValueError(
                "resample needs the prompt in one piece: it cannot run with chunked prefill"
            )
        if not call.first:  # the call with the whole prompt; those behind it decode
            self.prompt_end = call.n - 1
        rows = []
        for b in range(call.batch):
            name = "" if roles is None else roles.samples[b]
            donor = self._donor(name, b)
            end = self.prompt_end
            if roles is not None:
                end = int((roles.roles[b] == LAST).nonzero())
            shift = self.reference.tagged[donor].last - end
            tokens = torch.arange(call.first, call.n) + shift
            # rows that are not in the phase, or beyond the donor's ends, get what stands nearest
            kept, values = self.outputs[donor]
            places = torch.searchsorted(kept, tokens).clamp(max=len(kept) - 1)
            rows.append(values[places.to(values.device)])
        return torch.stack(rows).to(call.device)

    def _donor(self, name: str, row: int) -> int:
        """The sample that the reference names, or else another than `name`, the same in every layer and batch."""
        if self.reference.donor_of:
            if name not in self.reference.donor_of:
                raise ValueError(
                    f"sample {name!r} has no donor: name one in the reference's donor_of"
                )
            return self.reference.names.index(self.reference.donor_of[name])
        others = [
            i for i, other in enumerate(self.reference.names) if not name or other != name
        ]
        # from the name and not from a generator: a worker, a resumed run and every layer find the same one
        return others[int(digest(name or row), 16) % len(others)]


@contextmanager
def ablate(
    mllm: MLLM,
    heads: HeadSet | Iterable[tuple[int, int]],
    mode: str = "zero",
    phase: str = "both",
    *,
    reference: Reference | Iterable[Sample | TaggedSample] | None = None,
    tagged: TaggedSample | Sequence[TaggedSample] | None = None,
) -> Iterator[None]:
    """Ablate heads in whatever the model runs inside: `evaluate`, `score`, a forward pass, ``generate()``.

    On exit, also by an exception, the model is what it was; contexts can be nested, and act together.

    Parameters
    ----------
    mllm : MLLM
        Padding is expected on the left, the cache is one that grows (transformers' default).
    heads : HeadSet or iterable of (layer, head)
    mode, phase : str
        See `Ablation`.
    reference : Reference or samples, optional
        For "mean", "resample" and "patch"; a `Reference` is computed once for many ablations.
    tagged : TaggedSample or sequence of them, optional
        What will run, for "knockout", "zero_edges" and "patch" outside `evaluate` and `score`: the samples of the batch
        in its order, tagged as they are fed (for ``generate()``: without an answer). It also tells the phases apart:
        "context" and "question" need it, "prefill" and "decode" where an answer is fed along.

    Raises
    ------
    ValueError
        No heads, or heads of another geometry; mode or phase misspelt; no reference; knockout without V*.

    Examples
    --------
    >>> with ch.ablate(mllm, ranking.top(0.05)):
    ...     result = ch.evaluate(mllm, samples)
    """
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(mllm, reference)
    heads = heads if isinstance(heads, HeadSet) else HeadSet.of(heads, mllm.shape)
    ablation = Ablation(heads, mode, phase, reference)
    ablation.check(mllm)
    known = [tagged] if isinstance(tagged, TaggedSample) else tagged
    # without tagged=, roles are those of an outer context or of `evaluate` and `score` inside
    with hooks(mllm, ablation.hooks(mllm), TokenRoles.of(list(known)) if known else None):
        yield


class Point(NamedTuple):
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
) -> dict[Point, Ablation]:
    """Ablations of growing sets of heads.

    Parameters
    ----------
    ranking : HeadRanking
    shares : iterable of float
        Of all heads, in (0, 1]; at most 0.5 for the random orders.
    order : {"top", "bottom", "random", "layer"}
        "random" draws from the heads outside the top of the same share; "layer" does the same, from the same layers as
        the top as far as they go: see `random_heads`.
    name : str, optional
        Of the curve; None takes the order.
    draws : iterable of int
        Seeds of the random orders.
    mode, phase : str
        See `Ablation`.

    Returns
    -------
    dict of Point to Ablation

    Raises
    ------
    ValueError
        A share outside its range; order misspelt.
    """
    if order not in ("top", "bottom", "random", "layer"):
        raise ValueError(f"order={order!r}: take 'top', 'bottom', 'random' or 'layer'")
    match = "layer" if order == "layer" else None
    points = {}
    for share in shares:
        top = ranking.top(share)
        sets = {0: top if order == "top" else ranking.bottom(share)}
        if order in ("random", "layer"):
            # disjoint from the top of this share, the set that they are the control of; a single draw may hit
            # heads that matter for other reasons, hence several
            sets = {draw: random_heads(ranking, top, draw, match) for draw in draws}
        for draw, heads in sets.items():
            points[Point(name or order, share, draw)] = Ablation(heads, mode, phase)
    return points
