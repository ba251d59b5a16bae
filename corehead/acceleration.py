"""Hybrid attention: a few dense heads, sinks and a sliding window for all others, in prefill, cache and decode.

A *streaming* query head at position i attends to the keys j <= i with i - j < window or j < sinks (StreamingLLM,
arXiv 2309.17453); a dense head to all j <= i. The pattern is exact at every position, the first chunk included.
Positions count a sequence's own tokens, so that padding on the left changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad as pad_with_zeros
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from .attention import CACHE, Call, hybrid, hybrid_in, waiting
from .models import MLLM, device_of
from .ranking import HeadSet
from .store import digest

GRANULARITIES = ("group", "head")
MASK = 2**24  # elements of a mask that is held at once
SLAB = 2**18  # elements of keys that are gathered at once: what stays in a CPU's cache
TILE = 128  # rows and keys of a block of FlexAttention


@dataclass(frozen=True)
class Acceleration:
    """Which heads stay dense, and what the others still see.

    Parameters
    ----------
    dense : the dense heads; none of them is pure streaming (StreamingLLM).
    window : keys that a streaming head sees, its own position included; at least 1.
    sinks : first tokens that every streaming head sees as well; 0 or more.
    granularity : "group" makes all query heads of a KV head dense where one is, so that the group's cache is read for
        all of them at once; "head" takes the heads as they are, and the others of their groups stream over a cache that
        must be whole all the same. Sets of whole groups come from ``ranking.top(share, group=heads per KV head)``.

    Raises
    ------
    ValueError : window, sinks or granularity out of range.
    """

    dense: HeadSet
    window: int
    sinks: int = 4
    granularity: str = "group"

    def __post_init__(self):
        if not isinstance(self.dense, HeadSet):
            object.__setattr__(self, "dense", HeadSet(self.dense))
        if self.window < 1:
            raise ValueError(f"window={self.window}: a head sees at least its own position, so take 1 or more")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: take 0 or more")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r}: take one of {', '.join(map(repr, GRANULARITIES))}")

    @property
    def key(self) -> str:
        """What tells this condition from others in a store."""
        return digest([list(self.dense), self.window, self.sinks, self.granularity])

    @property
    def kind(self) -> tuple:
        """Conditions of one kind can run in one batch: this one alone."""
        return ("accelerate", self)

    @property
    def spares_context(self) -> bool:
        return False

    def check(self, mllm: MLLM) -> None:
        """Raise ValueError where the heads are another model's, or the model has other patterns of its own."""
        if self.dense:
            self.dense.check((mllm.n_layers, mllm.n_heads))
        config = mllm.text_config
        own = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
        if own or any(getattr(module, "sliding_window", None) for module in mllm.attentions):
            kinds = ", ".join(sorted(own)) or "sliding windows"
            raise ValueError(f"the model has layers with {kinds} of their own: only full attention can be accelerated")
        if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
            raise ValueError("the model has cross attention: only decoders of self-attention can be accelerated")

    def heads(self, mllm: MLLM) -> np.ndarray:
        """(layers, heads) bool, the query heads that are dense."""
        mask = self.dense.mask((mllm.n_layers, mllm.n_heads))
        if self.granularity == "group":
            groups = mask.reshape(mllm.n_layers, mllm.n_kv_heads, -1)
            mask = groups.any(2, keepdims=True).repeat(groups.shape[2], 2).reshape(mask.shape)
        return mask


@contextmanager
def accelerate(
    mllm: MLLM,
    dense: HeadSet | Iterable[tuple[int, int]],
    window: int,
    sinks: int = 4,
    granularity: str = "group",
) -> Iterator[Acceleration]:
    """Run hybrid attention in whatever the model does inside: forward passes, ``generate()``, `evaluate`, `score`.

    Prefill of streaming heads takes O(N window) instead of O(N^2). The KV cache of a group without a dense head is a
    ring buffer of sinks and window; what falls out of it is freed. `evaluate`, `score` and whatever else must know all
    keys get the same pattern over a whole cache. On exit, also by an exception, the model is what it was.

    Parameters
    ----------
    mllm : the model; padding is expected on the left.
    dense, window, sinks, granularity : see `Acceleration`.

    Raises
    ------
    ValueError : a bad window, number of sinks or granularity; heads of another geometry; a model with sliding windows
        or cross attention; inside: a cache that was filled outside, padding that is not on the left.

    Examples
    --------
    >>> core = ranking.top(0.10, group=mllm.n_heads // mllm.n_kv_heads)
    >>> with ch.accelerate(mllm, core, window=512, sinks=16):
    ...     mllm.model.generate(**inputs)
    """
    condition = Acceleration(dense, window, sinks, granularity)
    with applied(mllm, condition):
        yield condition


@contextmanager
def applied(mllm: MLLM, condition: Acceleration) -> Iterator[list[Pattern]]:
    """`accelerate`, of a condition; gives the layers' patterns."""
    condition.check(mllm)
    if hybrid(mllm):
        raise ValueError("the model is accelerated already: leave that context first")
    decoder, run = mllm.family.decoder(mllm.model), _Run()
    heads = condition.heads(mllm)
    patterns = [
        Pattern(run, heads[i], mllm.n_kv_heads, condition.window, condition.sinks, device_of(module))
        for i, module in enumerate(mllm.attentions)
    ]

    def prepare(module, args, kwargs):
        names = {CACHE, "past_key_values"}  # newer releases take the old name too
        past = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        asked = kwargs.get("use_cache")
        run.begin(kwargs.get("attention_mask"))
        if waiting(mllm):  # it must know all keys
            if past is not None and any(isinstance(layer, HybridLayer) for layer in past.layers):
                raise ValueError("this cache was split and lacks keys that are to be read or cut: prefill again")
            return None
        if past is None and not (mllm.text_config.use_cache if asked is None else asked):
            return None
        past = _split(past, patterns, mllm)
        if kwargs.get("attention_mask") is None:
            run.pads = past.layers[0].pads
        return args, {k: v for k, v in kwargs.items() if k not in names} | {CACHE: past}

    with hybrid_in(mllm, patterns):
        handle = decoder.register_forward_pre_hook(prepare, with_kwargs=True)
        try:
            yield patterns
        finally:
            handle.remove()
            run.open = False


def from_duo_attention(path: str | Path, mllm: MLLM, threshold: float = 0.5) -> Acceleration:
    """Read a pattern folder of DuoAttention (arXiv 2410.10819).

    Parameters
    ----------
    path : a folder with full_attention_heads.tsv, (layers, KV heads) gates in [0, 1], and config.json.
    mllm : the model that it is for.
    threshold : gates from here on are dense.

    Returns
    -------
    Acceleration, of whole KV groups

    Raises
    ------
    FileNotFoundError : a file is missing.
    ValueError : the table is another model's.
    """
    folder, shape = Path(path), (mllm.n_layers, mllm.n_kv_heads)
    gates = np.loadtxt(folder / "full_attention_heads.tsv", delimiter="\t", ndmin=2)
    if gates.shape != shape:
        raise ValueError(
            f"{folder}: {gates.shape[0]} x {gates.shape[1]} KV heads, but the model has {shape[0]} x {shape[1]}"
        )
    config = json.loads((folder / "config.json").read_text())
    heads = HeadSet(np.argwhere(gates >= threshold), shape).query_heads(mllm.n_heads // mllm.n_kv_heads)
    return Acceleration(heads, config["recent_size"], config["sink_size"], "group")


def _split(past: Cache | None, patterns: list[Pattern], mllm: MLLM) -> Cache:
    """The cache itself, its layers made hybrid if it is new."""
    past = DynamicCache(config=mllm.text_config) if past is None else past
    if past.layers and all(isinstance(layer, HybridLayer) and layer.pattern in patterns for layer in past.layers):
        return past
    if not isinstance(past, DynamicCache) or getattr(past, "offloading", False):
        raise ValueError(f"accelerate() keeps a cache of its own, not a {type(past).__name__}: pass none, or a new one")
    if past.get_seq_length():
        raise ValueError("the cache was filled outside this accelerate(): prefill again inside it")
    past.layers, past.layer_class_to_replicate = [HybridLayer(p) for p in patterns], None
    return past


class _Run:
    """What all layers know of the forward pass that runs: `pads`, padding in front of each batch row, None if none."""

    def __init__(self):
        self.open, self.pads = True, None

    def begin(self, mask: torch.Tensor | None) -> None:
        self.pads = None
        if mask is None or mask.dim() != 2 or bool(mask.all()):
            return
        real = mask.bool()
        pads = (real.cumsum(1) == 0).sum(1)
        if not bool((real.sum(1) + pads == real.shape[1]).all()):
            raise ValueError("attention_mask has padding behind a token: pad on the left (padding_side='left')")
        self.pads = pads.tolist()


def _alike(pads: list[int] | None) -> list[tuple[slice, int]]:
    """Batch rows that can be computed together, with the padding in front of them."""
    return [(slice(None), 0)] if pads is None else [(slice(i, i + 1), pad) for i, pad in enumerate(pads)]


def _pick(x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Some heads (sorted) of x (B, H, ...), without a copy if they are all."""
    return x if len(heads) == x.shape[1] else x[:, heads]


class Pattern:
    """Hybrid attention of one layer.

    Parameters
    ----------
    run : what is shared by the layers.
    dense : (H,) bool, query heads.
    kv_heads : KV groups; query head h reads group h // (H / kv_heads).
    window, sinks : of the streaming heads.
    device : of the layer.

    Attributes
    ----------
    whole, short : KV groups with and without a dense head.
    """

    def __init__(self, run: _Run, dense: np.ndarray, kv_heads: int, window: int, sinks: int, device):
        self.run, self.window, self.sinks, self.size = run, window, sinks, len(dense) // kv_heads
        self.dense = torch.from_numpy(dense).to(device)
        per_group = dense.reshape(kv_heads, self.size)

        def indices(mask):
            return torch.from_numpy(np.flatnonzero(mask)).to(device)

        kept = per_group.any(1)
        self.whole, self.short = indices(kept), indices(~kept)
        self.dense_heads = indices(dense)
        self.mixed_heads = indices((kept[:, None] & ~per_group).reshape(-1))  # they stream, but their group is whole
        self.whole_heads, self.short_heads = (indices(k.repeat(self.size)) for k in (kept, ~kept))
        # place of a head's group among the whole ones
        place = np.cumsum(kept) - 1
        self.dense_place, self.mixed_place = (
            torch.from_numpy(place[np.flatnonzero(h) // self.size]).to(device)
            for h in (dense, kept.repeat(self.size) & ~dense)
        )

    def near(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Where a streaming head looks, causality left out: (..., R, N) bool for positions (..., R) and (..., N)."""
        keys = keys[..., None, :]
        return (rows[..., None] - keys < self.window) | (keys < self.sinks)

    def attend(self, call: Call, query, key, value, scaling: float) -> torch.Tensor:
        """(B, R, H, D) of query (B, H, R, D) over all keys (B, Hkv, N, D), or over the new ones of a split cache."""
        kept: HybridLayer | None = getattr(key, "kept", None)
        if kept is None and (call.rows < call.n or (call.mask is not None and call.mask.dim() == 4)):
            return self._masked(call, query, key, value, scaling)
        pads = self.run.pads
        if kept is not None and call.rows == 1:
            return kept.step(query, key, value, scaling).transpose(1, 2)
        if pads is None:
            out = self.chunk(query, key, value, scaling, None if kept is None else kept.past(slice(None)))
        else:
            out = torch.zeros_like(query)
            for rows, pad in _alike(pads):
                skip = max(0, pad - call.first)  # padding among these rows
                if skip < call.rows:
                    part = (x[rows, :, skip:] for x in (query, key, value))
                    out[rows, :, skip:] = self.chunk(*part, scaling, None if kept is None else kept.past(rows))
        if kept is not None:
            kept.append(key, value, pads)
        return out.transpose(1, 2)

    def chunk(self, query, key, value, scaling: float, past: Past | None = None) -> torch.Tensor:
        """(B, H, R, D): rows that follow each other, behind a past."""
        start = 0 if past is None else past.length
        out = torch.empty_like(query)
        if len(self.whole):
            k, v = (_pick(x, self.whole) for x in (key, value))
            if start:
                k, v = (torch.cat(x, 2) for x in zip(past.whole, (k, v)))
            if len(self.dense_heads):
                places = (k[:, self.dense_place], v[:, self.dense_place]) if len(self.mixed_heads) else (k, v)
                out[:, self.dense_heads] = causal(_pick(query, self.dense_heads), *places, scaling)
            if len(self.mixed_heads):
                places = k[:, self.mixed_place], v[:, self.mixed_place]
                one = query[:, self.mixed_heads, None]
                found = stream(one, *places, *(x[:, :, : self.sinks] for x in places), 0, start, self.window, scaling)
                out[:, self.mixed_heads] = found[:, :, 0]
        if len(self.short):
            k, v, first = _pick(key, self.short), _pick(value, self.short), 0
            sinks = k[:, :, : self.sinks], v[:, :, : self.sinks]
            if start:
                more = self.sinks - past.sinks[0].shape[2]
                sinks = tuple(torch.cat([old, new[:, :, :more]], 2) for old, new in zip(past.sinks, (k, v)))
                k, v = (torch.cat(x, 2) for x in zip(past.tail, (k, v)))
                first = past.first
            q = _pick(query, self.short_heads).unflatten(1, (len(self.short), self.size))
            out[:, self.short_heads] = stream(q, k, v, *sinks, first, start, self.window, scaling).flatten(1, 2)
        return out

    def _masked(self, call: Call, query, key, value, scaling: float) -> torch.Tensor:
        """Over a whole cache, or under a mask of the caller's: explicit masks."""
        allowed = call.allowed(torch.arange(call.rows, device=call.device))[:, None]  # (B or 1, 1, R, N)
        out = torch.empty_like(query)
        streaming = (~self.dense).nonzero()[:, 0]
        for heads, mask in (self.dense_heads, allowed), (streaming, allowed & self.seen(call)[:, None]):
            if len(heads):
                k, v = (x[:, heads // self.size] for x in (key, value))
                out[:, heads] = scaled_dot_product_attention(query[:, heads], k, v, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2)

    def seen(self, call: Call, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(B or 1, R, N) bool: `near`, for rows of a call over all keys."""
        if call.layout is not None:
            places = call.layout.places.to(call.device)[:, : call.n]
            if places.shape[1] < call.n:  # tokens that a model writes itself
                more = torch.arange(1, call.n - places.shape[1] + 1, device=call.device)
                places = torch.cat([places, places[:, -1:] + more], 1)
        elif call.mask is not None and call.mask.dim() == 4:
            raise ValueError("a four-dimensional attention_mask hides which token is where: pass a mask of (B, N)")
        else:
            pads = torch.tensor(self.run.pads or [0], device=call.device)
            places = torch.arange(call.n, device=call.device) - pads[:, None]
        asked = places[:, call.first :]
        return self.near(asked if rows is None else asked[:, rows], places)


@dataclass
class Past:
    """What a chunk of one batch row, or of all alike, finds in a split cache.

    Attributes
    ----------
    length : tokens before the chunk.
    whole : keys and values (B, F, length, D) of the groups that keep everything.
    sinks : keys and values (B, S, up to sinks, D) of the others.
    tail : their last ones in order, from position `first` on.
    """

    length: int
    whole: tuple[torch.Tensor, torch.Tensor]
    sinks: tuple[torch.Tensor, torch.Tensor]
    tail: tuple[torch.Tensor, torch.Tensor]
    first: int


class HybridLayer(CacheLayerMixin):
    """The KV cache of one layer under a `Pattern`.

    Groups with a dense head keep every token, in a buffer that grows by an eighth. The others keep a ring: position p
    of a sequence stands in slot p while p < sinks, then in slot sinks + (p - sinks) % window.

    Attributes
    ----------
    n : tokens seen, padding included.
    pads : padding in front of each batch row, None if there is none.
    whole : keys and values (B, F, capacity, D); ring : keys and values (B, S, up to sinks + window, D).
    """

    is_sliding = False

    def __init__(self, pattern: Pattern):
        super().__init__()
        self.pattern = pattern
        self.reset()

    def reset(self) -> None:
        self.n, self.pads = 0, None
        self.whole = self.ring = None

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to make before the first tokens come."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Hand the new tokens on; the attention function takes them in and finds the old ones here."""
        if not self.pattern.run.open:
            raise ValueError("this cache was split by an accelerate() that is over: prefill again")
        key = key_states.view_as(key_states)
        key.kept = self
        return key, value_states

    def get_seq_length(self) -> int:
        return self.n

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _tensors(self) -> list[torch.Tensor]:
        return [x for pair in (self.whole, self.ring) if pair is not None for x in pair]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(x.nbytes for x in self._tensors())

    def _take(self, rows: torch.Tensor) -> None:
        pick = [None if p is None else tuple(x[rows.to(x.device)] for x in p) for p in (self.whole, self.ring)]
        self.whole, self.ring = pick
        self.pads = None if self.pads is None else [self.pads[i] for i in rows.tolist()]

    def reorder_cache(self, beam_idx) -> None:
        self._take(beam_idx)

    def batch_select_indices(self, indices) -> None:
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.n:
            self._take(torch.arange(len(self._tensors()[0])).repeat_interleave(repeats))

    def crop(self, *args) -> None:
        raise ValueError("a split cache cannot be cropped: tokens outside the window are gone")

    def _slots(self, places: torch.Tensor) -> torch.Tensor:
        sinks, window = self.pattern.sinks, self.pattern.window
        return torch.where(places < sinks, places, sinks + (places - sinks) % window)

    def append(self, key, value, pads: list[int] | None) -> None:
        """Take in new keys and values (B, Hkv, R, D)."""
        pattern, (b, _, r, d) = self.pattern, key.shape
        n = self.n + r
        if len(pattern.whole):
            if self.whole is None or self.whole[0].shape[2] < n:
                room = (b, len(pattern.whole), n + n // 8 + 1, d)
                grown = key.new_empty(room), value.new_empty(room)
                for new, old in zip(grown, self.whole or ()):
                    new[:, :, : self.n] = old[:, :, : self.n]
                self.whole = grown
            for buffer, x in zip(self.whole, (key, value)):
                buffer[:, :, self.n : n] = x[:, pattern.whole]
        if len(pattern.short):
            keep = pattern.sinks + pattern.window
            slots = min(keep, n - min(pads or [0]))  # tokens of the longest row
            if self.ring is None or self.ring[0].shape[2] < slots:
                room = (b, len(pattern.short), min(keep, slots + slots // 8 + 1), d)
                grown = key.new_zeros(room), value.new_zeros(room)
                for new, old in zip(grown, self.ring or ()):
                    new[:, :, : old.shape[2]] = old
                self.ring = grown
            if r == 1:
                self._write_one(key, value, pads)
            else:
                for rows, pad in _alike(pads):
                    places = torch.arange(max(self.n - pad, 0), n - pad, device=key.device)
                    places = places[(places < pattern.sinks) | (places >= n - pad - pattern.window)]
                    at, slot = places + pad - self.n, self._slots(places)
                    for ring, x in zip(self.ring, (key, value)):
                        ring[rows, :, slot] = x[rows][:, pattern.short][:, :, at]
        self.n, self.pads = n, pads

    def _write_one(self, key, value, pads: list[int] | None) -> None:
        if pads is None:
            sinks, window = self.pattern.sinks, self.pattern.window
            rows, slot = slice(None), self.n if self.n < sinks else sinks + (self.n - sinks) % window
        else:
            rows, place = torch.arange(len(pads), device=key.device), self.n - torch.tensor(pads, device=key.device)
            slot = self._slots(place.clamp(min=0))  # a row that is padding so far is written over
        for ring, x in zip(self.ring, (key, value)):
            ring[rows, :, slot] = x[:, self.pattern.short, 0]

    def past(self, rows: slice) -> Past | None:
        """What stands in front of a chunk of these batch rows."""
        pattern, pad = self.pattern, 0 if self.pads is None else self.pads[rows][0]
        length = self.n - pad
        if length <= 0:
            return None
        whole = sinks = tail = None
        if len(pattern.whole):
            whole = tuple(x[rows, :, pad : self.n] for x in self.whole)
        first = min(max(pattern.sinks, length - pattern.window + 1), length)
        if len(pattern.short):
            slots = self._slots(torch.arange(first, length, device=self.ring[0].device))
            sinks = tuple(x[rows, :, : min(pattern.sinks, length)] for x in self.ring)
            tail = tuple(x[rows][:, :, slots] for x in self.ring)
        return Past(length, whole, sinks, tail, first)

    def step(self, query, key, value, scaling: float) -> torch.Tensor:
        """(B, H, 1, D): one token of every row, which is taken in first."""
        pattern, pads = self.pattern, self.pattern.run.pads
        self.append(key, value, pads)
        device, n, size = query.device, self.n, pattern.size
        lengths = n
        if pads is not None:  # (B, 1); a row that is padding so far sees itself, so that it has no NaN
            lengths = torch.tensor([max(1, n - pad) for pad in pads], device=device)[:, None]
        out = torch.empty_like(query)
        if len(pattern.whole):
            k, v = (x[:, :, :n] for x in self.whole)
            mask = None if pads is None else (torch.arange(n, device=device) >= n - lengths)[:, None, None]
            # the query heads of a group become rows, so that its cache is read once
            q = query[:, pattern.whole_heads, 0].unflatten(1, (-1, size))
            found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            out[:, pattern.whole_heads, 0] = found.flatten(1, 2)
            if len(pattern.mixed_heads):
                near = torch.arange(-min(pattern.window, n), 0, device=device)
                first = torch.arange(pattern.sinks, device=device).expand(1 if pads is None else len(pads), -1)
                places = torch.cat([first, lengths + near.expand(len(first), -1)], 1)
                valid = (places >= 0) & (places < lengths)
                valid[:, pattern.sinks :] &= places[:, pattern.sinks :] >= pattern.sinks
                at = (places + n - lengths).clamp(0, n - 1)[:, None, :, None]  # (B or 1, 1, M, 1)
                k, v = (x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))[:, pattern.mixed_place] for x in (k, v))
                q, mask = query[:, pattern.mixed_heads], valid[:, None, None]
                out[:, pattern.mixed_heads] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        if len(pattern.short):
            k, v = self.ring
            mask = None
            if n - max(pads or [0]) < k.shape[2]:
                mask = (torch.arange(k.shape[2], device=device)[None] < lengths)[:, None, None]
            q = query[:, pattern.short_heads, 0].unflatten(1, (-1, size))
            found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            out[:, pattern.short_heads, 0] = found.flatten(1, 2)
        return out


def causal(query, key, value, scaling: float) -> torch.Tensor:
    """Dense causal attention (B, h, R, D) of the last R positions over keys (B, h or a part of it, N, D)."""
    r, n, shared = query.shape[2], key.shape[2], query.shape[1] > key.shape[1]
    if r == n:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared)
    if shared:  # CUDA's kernels that take a mask know no groups
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out, step = torch.empty_like(query), max(1, MASK // n)
    for i in range(0, r, step):
        q = query[:, :, i : i + step]
        end = n - r + i + q.shape[2]
        mask = torch.ones(q.shape[2], end, dtype=torch.bool, device=q.device).tril(end - q.shape[2])
        k, v = key[:, :, :end], value[:, :, :end]
        out[:, :, i : i + step] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out


def stream(query, key, value, sink_keys, sink_values, first: int, start: int, window: int, scaling: float):
    """Attention of streaming heads, in time and memory proportional to their window.

    Parameters
    ----------
    query : (B, G, g, R, D), rows at positions start, start + 1, ...
    key, value : (B, G, M, D) at positions first ... start + R - 1; first is at most start, and is 0, or nothing between
        the sinks and the first row's window is lacking.
    sink_keys, sink_values : (B, G, s, D), the positions 0 ... s - 1.

    Returns
    -------
    (B, G, g, R, D)
    """
    run = stream_flex if query.is_cuda else stream_chunked
    window = min(window, start + query.shape[3])
    return run(query, key, value, sink_keys, sink_values, first, start, window, scaling)


def stream_chunked(query, key, value, sink_keys, sink_values, first, start, window, scaling) -> torch.Tensor:
    """`stream` by SDPA: blocks of rows, each against the sinks and the stretch of keys that its windows cover."""
    b, groups, size, r, d = query.shape
    s = sink_keys.shape[2]
    block = min(r, max(64, window // 4))
    n_blocks, span = -(-r // block), window - 1 + block
    row, column = torch.arange(block, device=query.device), torch.arange(span, device=query.device)
    band = (column >= row[:, None]) & (column < row[:, None] + window)  # (block, span)
    steady = torch.cat([band.new_ones(block, s), band], 1).repeat(size, 1)
    # block 0 begins at position start - window + 1; those whose stretch meets the sinks, or what is no key, come first
    early = min(n_blocks, max(0, -(-(s - (start - window + 1)) // block)))
    step = max(1, SLAB // (b * groups * (s + span) * d))
    cuts = [*range(0, early, step), *range(early, n_blocks, step), n_blocks]
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    for i, j in pairwise(cuts):
        n, end = j - i, min(j * block, r)
        lack = j * block - end  # rows of the last block that are not there
        q = pad_with_zeros(query[:, :, :, i * block : end], (0, 0, 0, lack)).unflatten(3, (n, block))
        q = q.permute(0, 3, 1, 2, 4, 5).reshape(b * n, groups, size * block, d)
        begin = start + i * block - window + 1 - first
        k, v = (
            torch.cat(
                [sink[:, None].expand(-1, n, -1, -1, -1), _stretches(x, begin, start + end - first, lack, span, block)],
                3,
            ).flatten(0, 1)
            for sink, x in ((sink_keys, key), (sink_values, value))
        )
        mask = steady
        if i < early:
            places = start + torch.arange(i, j, device=q.device) * block  # of the blocks' first rows
            sees = torch.arange(s, device=q.device) <= (places[:, None] + row)[..., None]  # (n, block, s)
            inside = (places[:, None] - window + 1 + column >= s)[:, None]
            mask = torch.cat([sees, band & inside], 2).repeat(b, size, 1)[:, None]
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        found = found.view(b, n, groups, size, block, -1).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
        out[:, :, :, i * block : end] = found[:, :, :, : end - i * block]
    return out


def _stretches(x, begin: int, end: int, lack: int, span: int, block: int) -> torch.Tensor:
    """Overlapping stretches (B, n, G, span, D), `block` apart, of rows begin ... end + lack of x (B, G, M, D)."""
    rows = pad_with_zeros(x[:, :, max(begin, 0) : end], (0, 0, max(-begin, 0), lack))
    return rows.unfold(2, span, block).permute(0, 2, 1, 4, 3)


def stream_flex(query, key, value, sink_keys, sink_values, first, start, window, scaling, flex=None) -> torch.Tensor:
    """`stream` by FlexAttention (arXiv 2412.05496), one kernel over the blocks that any row sees."""
    groups, size, r = query.shape[1:4]
    s, n = sink_keys.shape[2], key.shape[2]
    if first or start:
        both = max(0, s - first)  # keys that are sinks as well
        key, value = torch.cat([sink_keys, key[:, :, both:]], 2), torch.cat([sink_values, value[:, :, both:]], 2)
        first, n = first + both, key.shape[2]
    else:  # the sinks are the first keys
        first = s
    table = blocks(r, n, s, first, start, window, str(query.device))
    out = (flex or _compiled())(
        query.flatten(1, 2), key.contiguous(), value.contiguous(), block_mask=table, scale=scaling, enable_gqa=size > 1
    )
    return out.unflatten(1, (groups, size))


@cache
def _compiled():
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def blocks(r: int, n: int, s: int, first: int, start: int, window: int, device: str) -> BlockMask:
    """Which blocks of TILE keys the streaming rows start ... start + r - 1 see, from their positions alone.

    The keys are the positions 0 ... s - 1, then first, first + 1, ...; n in all. All layers share one table.
    """

    def near(b, h, row, column):
        place = torch.where(column < s, column, column - s + first)
        distance = row + start - place
        return (distance >= 0) & ((distance < window) | (place < s))

    places = torch.arange(n, device=device)
    places[s:] += first - s
    low, high = places[::TILE], torch.cat([places[TILE - 1 :: TILE], places[-1:]])[: -(-n // TILE)]
    top = torch.arange(start, start + r, TILE, device=device)[:, None]  # first and last row of each block
    bottom = (top + TILE - 1).clamp(max=start + r - 1)
    some = (low <= bottom) & ((top - high < window) | (low < s))
    every = (high <= top) & ((bottom - low < window) | (high < s))
    tables = []
    for seen in (some & ~every, every):
        order = seen.int().argsort(dim=1, descending=True, stable=True)
        tables += [seen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=TILE, mask_mod=near, seq_lengths=(r, n))
