"""Hybrid attention: a few full heads; sinks and a sliding window for all others, in prefill, cache and decode.

A full head at position i attends to all keys j <= i, a streaming head to those in [i - window, i], as in the paper, and
to the sinks, j < sinks (StreamingLLM, arXiv 2309.17453). The pattern is exact at every position. Positions count a
sequence's own tokens, so that padding changes nothing.

Streaming heads have a kernel of their own, and KV groups that stream as a whole a small cache too. Everything else
(capped logits, padding, masks of the caller's, a row that decodes over a whole cache) is exact under explicit masks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention import CACHE, Call, Hook, active, full_attention, hooks, hooks_in_force
from .batching import Condition
from .models import MLLM, device_of
from .ranking import HeadSet
from .runs import digest

TILE = 128  # rows and keys of a block of FlexAttention


@dataclass(frozen=True)
class HybridAttention(Condition):
    """Which heads stay full, and what the others still see: a condition of `evaluate`.

    Parameters
    ----------
    full : HeadSet
        The full heads; an empty set is StreamingLLM. Small in memory, and fast in decoding, are sets of whole KV
        groups, as ``ranking.top(share, group=query heads per KV head)`` gives them: a layer with a group that is full
        in part keeps all keys.
    window : int
        How far back a streaming head sees: the query at i sees [i - window, i], so that 0 leaves it its own position.
    sinks : int
        First tokens that every streaming head sees as well; 0 or more.

    Raises
    ------
    ValueError
        Window or sinks out of range.
    """

    full: HeadSet
    window: int
    sinks: int = 4

    leaves_context_intact = False

    def __post_init__(self):
        if self.window < 0:
            raise ValueError(
                f"window={self.window}: a head sees at least its own position, so take 0 or more"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: take 0 or more")

    @property
    def key(self) -> str:
        """What tells this condition from others in a store."""
        return digest([list(self.full), self.window, self.sinks])

    @property
    def group(self) -> Hashable:
        """Conditions of one group run side by side: this one runs alone."""
        return "hybrid", self.key

    def check(self, mllm: MLLM) -> None:
        """Raise ValueError where heads are another model's, or would stream in a layer with a pattern of its own."""
        streaming = ~self.full
        (self.full or streaming).check(mllm.shape)  # either may be empty
        config = mllm.text_config
        kept = self.full.mask.all(1)  # (L,)
        windowed = [i for i, window in enumerate(mllm.windows) if window and not kept[i]]
        if windowed:
            raise ValueError(
                f"layers {windowed} have a window of their own, and cannot have this one: give all their heads as full"
            )
        kinds = set(getattr(config, "layer_types", None) or ())
        others = kinds - {"full_attention", "sliding_attention"}
        crosses = config.is_encoder_decoder or getattr(config, "add_cross_attention", False)
        if others or crosses:
            raise ValueError(
                "the model has other attention than full, windowed and causal: hybrid attention does not fit it"
            )
        # the kernels of one pattern would not know the other
        if any(isinstance(hook, StreamingHeads) for hook in hooks_in_force(mllm)):
            raise ValueError(
                "hybrid attention is in force already: leave that context first"
            )

    def hooks(
        self, mllm: MLLM, beside: Sequence[Any] = (), rows: int = 1
    ) -> dict[int, list[Hook]]:
        """A hook for each layer with streaming heads."""
        # a layer whose heads are all full runs as it always does
        layers = np.flatnonzero(~self.full.mask.all(1)).tolist()
        return {layer: [StreamingHeads(mllm, layer, self)] for layer in layers}


@contextmanager
def hybrid_attention(
    mllm: MLLM, full: HeadSet | Iterable[tuple[int, int]], window: int, sinks: int = 4
) -> Iterator[HybridAttention]:
    """Run hybrid attention in whatever the model does inside: forward passes, ``generate()``, `evaluate`, `score`.

    Prefill of streaming heads takes O(N window) instead of O(N^2), and their cache is a ring buffer of sinks and
    window; what falls out of it is freed. A padded batch, and whatever must know all keys (`evaluate`, `score`,
    knockout), gets the same pattern over a whole cache. On exit, also by an exception, the model is what it was.

    Parameters
    ----------
    mllm : MLLM
        The cache is one that grows (transformers' default).
    full : HeadSet or iterable of (layer, head)
    window, sinks : int
        See `HybridAttention`.

    Raises
    ------
    ValueError
        A bad window or number of sinks; heads of another geometry; streaming heads in a layer that has a window of its
        own (`MLLM.windows`); cross attention; inside: a cache that was filled outside, an attention mask of four
        dimensions.

    Examples
    --------
    >>> full = ranking.top(0.10, group=mllm.n_heads // mllm.n_kv_heads)
    >>> with ch.hybrid_attention(mllm, full, window=512, sinks=16):
    ...     mllm.model.generate(**inputs)
    """
    full = full if isinstance(full, HeadSet) else HeadSet.of(full, mllm.shape)
    condition = HybridAttention(full, window, sinks)
    condition.check(mllm)
    by_layer = condition.hooks(mllm)
    caches = _Caches(mllm, by_layer)
    handle = mllm.decoder.register_forward_pre_hook(caches.prepare, with_kwargs=True)
    try:
        with hooks(mllm, by_layer):
            yield condition
    finally:
        handle.remove()
        # a cache that lives on lacks keys, and without the hooks nothing would say so
        caches.open = False


def from_duo_attention(
    path: str | Path, mllm: MLLM, threshold: float = 0.5
) -> HybridAttention:
    """Read a pattern folder of DuoAttention (arXiv 2410.10819).

    Parameters
    ----------
    path : str or Path
        Folder with full_attention_heads.tsv, (layers, KV heads) gates in [0, 1], and config.json.
    mllm : MLLM
        The model that it is for.
    threshold : float
        Groups with gates from here on are full.

    Returns
    -------
    HybridAttention
        Of whole KV groups.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        The table is another model's.
    """
    folder = Path(path)
    shape = mllm.n_layers, mllm.n_kv_heads
    gates = np.loadtxt(folder / "full_attention_heads.tsv", delimiter="\t", ndmin=2)
    if gates.shape != shape:
        raise ValueError(
            f"{folder}: {gates.shape[0]} x {gates.shape[1]} KV heads, but the model has {shape[0]} x {shape[1]}"
        )
    config = json.loads((folder / "config.json").read_text())
    full = (gates >= threshold).repeat(mllm.n_heads // mllm.n_kv_heads, axis=1)
    # its recent tokens include the position itself, our window does not
    return HybridAttention(HeadSet(full), config["recent_size"] - 1, config["sink_size"])


class StreamingHeads(Hook):
    """Hybrid attention of one layer: full and streaming heads by a kernel each, what has none by masks.

    Parameters
    ----------
    mllm : MLLM
    layer : int
    condition : HybridAttention

    Attributes
    ----------
    kinds : dict
        "full" and "streaming", where there are any: indices of the query heads, and of the KV groups that they read; in
        a layer that has a group of both kinds, one of these for each query head.
    capped : bool
        No kernel fits the layer, whose logits are capped (Gemma 2).
    splits : bool
        The layer's cache can be split: no group has heads of both kinds.
    pending : HybridLayer or None
        The split cache that gave this layer its new keys alone; it takes them in when the layer attends.
    """

    def __init__(self, mllm: MLLM, layer: int, condition: HybridAttention):
        self.module = mllm.attentions[layer]
        # how many of the last keys a streaming head sees, its own included
        self.recent = condition.window + 1
        self.sinks = condition.sinks
        device = device_of(self.module)
        full = condition.full.mask[layer]  # (H,)
        self.full = torch.tensor(full, device=device)
        # keys of a group can be let go only if none of its query heads is full
        by_group = full.reshape(mllm.n_kv_heads, -1)  # (Hkv, query heads of each)
        groups = by_group.any(1)
        whole = np.array_equal(groups, by_group.all(1))
        self.capped = getattr(mllm.text_config, "attn_logit_softcapping", None) is not None
        self.splits = whole and not self.capped
        group_of = torch.arange(mllm.n_heads, device=device) // by_group.shape[1]
        self.kinds = {}
        for kind, heads, of_kind in ("full", full, groups), ("streaming", ~full, ~groups):
            if heads.any():
                index = _index(heads, device)
                read = _index(of_kind, device) if whole else group_of[index]
                self.kinds[kind] = index, read
        self.pending: HybridLayer | None = None

    def hidden_keys(self) -> int:
        # a split cache hands over the new keys alone, but rows count their positions from the sequence's start
        return 0 if self.pending is None else self.pending.get_seq_length()

    def _masks(self, call: Call) -> bool:
        """Whether this call has no fast path: to decode over a whole cache, all keys are read anyway."""
        decodes_over_all = call.rows == 1 and call.key.shape[2] > 1
        return self.capped or call.attention_mask is not None or decodes_over_all

    def masked_rows(self, call: Call) -> np.ndarray:
        # all rows, which makes masked_attention the whole call's path
        return np.arange(call.rows) if self._masks(call) else super().masked_rows(call)

    def mask(self, call: Call, rows: torch.Tensor) -> torch.Tensor:
        mask = call.attention_mask
        if call.roles is None and mask is not None and mask.dim() == 4:
            raise ValueError(
                "a four-dimensional attention_mask hides which token is where: pass a mask of (B, N)"
            )
        positions = call.positions
        # a row of padding is at its own key's position, so that it keeps that key and has no NaN
        row = positions[:, call.first + rows, None]
        key = positions[:, None]
        hidden = (row - key >= self.recent) & (key >= self.sinks)  # (B or 1, R, N)
        # (B or 1, H, R, N): full heads see all
        return hidden[:, None] & ~self.full[:, None, None]

    def attend(self, call: Call) -> torch.Tensor | None:
        if self._masks(call):  # never over a split cache: see _Caches.prepare
            return None
        cache, self.pending = self.pending, None
        out = call.query.new_empty(
            call.batch, call.rows, len(self.full), call.value.shape[-1]
        )
        for kind, (heads, groups) in self.kinds.items():
            key = call.key[:, groups]
            value = call.value[:, groups]
            if cache is not None:
                key, value = cache.buffers[kind].append(key, value)
            part = replace(call, query=call.query[:, heads], key=key, value=value)
            # a row that decodes sees just what the buffer holds
            if call.rows == 1:
                out[:, :, heads] = _attend_to_all(part)
            elif kind == "full":
                out[:, :, heads] = full_attention(part, self.module)
            else:
                out[:, :, heads] = self._attend_streaming(part)
        return out

    def _attend_streaming(self, call: Call) -> torch.Tensor:
        """Of streaming heads over their sinks, what they still see of the past, and the new keys."""
        # nothing is out of sight of the first rows of a sequence
        early = min(max(self.sinks + self.recent - call.first, 0), call.rows)
        parts = []
        if early:
            n = call.first + early
            start = replace(
                call,
                query=call.query[:, :, :early],
                key=call.key[:, :, :n],
                value=call.value[:, :, :n],
            )
            parts.append(full_attention(start, self.module))
        if early < call.rows:
            later = replace(call, query=call.query[:, :, early:], first=call.first + early)
            # the fused kernel must be compiled, which pays on a GPU
            stream = stream_flex if call.query.is_cuda else stream_chunked
            parts.append(stream(later, self.sinks, self.recent))
        return torch.cat(parts, 1)


def _attend_to_all(call: Call) -> torch.Tensor:
    """(B, 1, H, D) of one row, which sees all keys that are kept."""
    # the query heads of a KV group become rows, so that its keys are read once
    query = call.query[:, :, 0].unflatten(1, (call.key.shape[1], -1))
    out = scaled_dot_product_attention(query, call.key, call.value, scale=call.scaling)
    return out.flatten(1, 2)[:, None]


def _index(mask: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """What selects the true ones, without a copy where all are."""
    return slice(None) if mask.all() else torch.from_numpy(np.flatnonzero(mask)).to(device)


# --- the split KV cache


class _Caches:
    """Gives the decoder a cache that hybrid attention can split, as long as its context is open."""

    def __init__(self, mllm: MLLM, by_layer: dict[int, list[Hook]]):
        self.mllm = mllm
        self.open = True
        self.hooks = {layer: hook for layer, [hook] in by_layer.items() if hook.splits}

    def prepare(
        self, decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        """The decoder's pre-hook."""
        for hook in self.hooks.values():
            hook.pending = None  # of a forward pass that was stopped
        past = kwargs.get(CACHE)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # by kind of layer; those with a window run as ever
            mask = mask["full_attention"]
        read = self._keys_are_read()
        # rows of a padded batch would write different slots of a ring: such a batch keeps all keys
        padded = mask is not None and (mask.dim() == 4 or not mask.all())
        if (read or padded) and _is_split(past):
            raise ValueError(
                "this cache was split and lacks keys that are to be read or masked: prefill again"
            )
        if read or (past is None and kwargs.get("use_cache") is False):
            return None
        # where there is none the decoder would make one, which is not split
        past = DynamicCache(config=self.mllm.text_config) if past is None else past
        if not past.layers or getattr(past.layers[0], "owner", None) is not self:
            self._adopt(past, {} if padded else self.hooks)
        return args, kwargs | {CACHE: past}

    def _keys_are_read(self) -> bool:
        """Whether anything else must know all keys."""
        # roles speak of positions among all keys
        if active(self.mllm.attentions[0]).roles is not None:
            return True
        # hooks that only change outputs do not care which keys there are
        return any(
            hook.rows is not None or type(hook).mask is not Hook.mask
            for hook in hooks_in_force(self.mllm)
            if not isinstance(hook, StreamingHeads)
        )

    def _adopt(self, past: Cache, by_layer: dict[int, StreamingHeads]) -> None:
        """Make an empty cache one of these, split in layers that have a hook."""
        if not isinstance(past, DynamicCache) or past.offloading:
            raise ValueError(
                f"hybrid_attention() keeps a cache of its own, not a {type(past).__name__}: pass none, or a new one"
            )
        if past.get_seq_length():
            raise ValueError(
                "the cache was filled outside this hybrid_attention(): prefill again inside it"
            )
        past.layers = [
            HybridLayer(self, by_layer.get(layer)) for layer in range(self.mllm.n_layers)
        ]


def _is_split(past: Cache | None) -> bool:
    """Whether some layer of a cache has let go of keys."""
    return past is not None and any(getattr(layer, "hook", None) for layer in past.layers)


class HybridLayer(DynamicLayer):
    """The KV cache of one layer: full groups keep every token, streaming groups sinks and window.

    Parameters
    ----------
    owner : object
        With ``open``: whether its context still runs.
    hook : StreamingHeads or None
        Of the layer; None keeps every token of all groups.

    Attributes
    ----------
    buffers : dict of Buffer
        By kind, "full" and "streaming".
    """

    is_croppable = False

    def __init__(self, owner: _Caches, hook: StreamingHeads | None):
        super().__init__()
        self.owner = owner
        self.hook = hook
        self.reset()

    def reset(self) -> None:
        self.buffers = {"full": Buffer(0, sys.maxsize)}  # which never comes round
        if self.hook is not None:
            self.buffers["streaming"] = Buffer(self.hook.sinks, self.hook.recent)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> Sequence[torch.Tensor]:
        """All keys and values of a layer that keeps them; of a split one the new ones, which its hook takes in."""
        if not self.owner.open:
            raise ValueError(
                "this cache belongs to a hybrid_attention() that is over: prefill again"
            )
        if self.hook is None:
            return self.buffers["full"].append(key_states, value_states)
        # one tensor for all groups goes back, but the two kinds hold different numbers of keys
        self.hook.pending = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        # a kind without groups counts nothing
        return max(buffer.length for buffer in self.buffers.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(x.nbytes for buffer in self.buffers.values() for x in buffer.tensors)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for buffer in self.buffers.values():
            buffer.tensors = [change(x) for x in buffer.tensors]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda x: x[beam_idx.to(x.device)])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *args) -> None:
        raise ValueError(
            "a split cache cannot be cropped: tokens outside the window are gone"
        )


class Buffer:
    """Keys and values of a sequence's first `sinks` positions and of its last `recent` ones.

    They stand in order as long as there is room; then the slots behind the sinks are a ring.

    Attributes
    ----------
    length : int
        Positions seen.
    oldest : int
        Slot of the oldest position behind the sinks, which is overwritten next.
    tensors : list of tensor
        Keys and values (B, G, slots, D); empty before the first token.
    """

    def __init__(self, sinks: int, recent: int):
        # the sinks come first and stay there, out of the ring's way; a row that decodes does not mind the ring's
        # order, as keys carry their positions (rotary embedding)
        self.sinks = sinks
        self.recent = recent
        self.slots = sinks + recent
        self.length = 0
        self.oldest = sinks
        self.tensors: list[torch.Tensor] = []

    def append(self, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """Take in new positions (B, G, R, D); all keys and values that they see, in order unless R is 1."""
        new = key, value
        begin = self.length
        self.length = end = begin + key.shape[2]
        if end <= self.slots:
            self._make_room(new, end)
            self._write(new, begin)
            return [x[:, :, :end] for x in self.tensors]
        if (
            end == begin + 1
        ):  # the new key takes the place of the one that falls out of sight
            self._write(new, self.oldest)
            # behind the last slot comes the first one behind the sinks
            self.oldest = max((self.oldest + 1) % self.slots, self.sinks)
            return self.tensors
        # the first of the new rows still see what the last ones push out
        seen = []
        for x, more in zip(self.tensors, new):
            seen.append(torch.cat([self._in_order(x, begin), more], 2))
        seen = seen or new  # the first rows of all
        self.tensors = []
        for x in seen:
            sinks = x[:, :, : self.sinks]
            self.tensors.append(torch.cat([sinks, x[:, :, -self.recent :]], 2))
        self.oldest = self.sinks  # the ring is in order again
        return seen

    def _make_room(self, new: Sequence[torch.Tensor], end: int) -> None:
        """Slots for `end` positions, and an eighth more, so that not every token copies those before it."""
        held = self.tensors or [x[:, :, :0] for x in new]
        if held[0].shape[2] < end:
            slots = min(end + end // 8, self.slots)
            held = [pad(x, (0, 0, 0, slots - x.shape[2])) for x in held]
        self.tensors = held

    def _write(self, new: Sequence[torch.Tensor], slot: int) -> None:
        for buffer, x in zip(self.tensors, new):
            buffer[:, :, slot : slot + x.shape[2]] = x

    def _in_order(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """What a tensor holds of `length` positions, the oldest first."""
        sinks, ring = x[:, :, :length].tensor_split([self.sinks], 2)
        return torch.cat([sinks, ring.roll(self.sinks - self.oldest, 2)], 2)


# --- kernels of streaming heads


def stream_chunked(call: Call, sinks: int, recent: int) -> torch.Tensor:
    """Streaming attention by SDPA: blocks of rows, each against the sinks and the stretch that its windows cover.

    Time and memory are proportional to the window.

    Parameters
    ----------
    call : Call
        Its rows have no sink in their windows. Its keys are the sinks, and then, in a row, the positions up to the last
        row's, at least recent - 1 + R of them.
    sinks, recent : int
        Keys that each row sees: the first, and the last up to its own.

    Returns
    -------
    (B, R, H, D) tensor
    """
    # small beside the window: what is outside a row's own window is computed and masked
    block = min(call.rows, max(64, recent // 4))
    row = torch.arange(block, device=call.device)[:, None]
    column = torch.arange(block + recent - 1, device=call.device)
    window = (column >= row) & (column < row + recent)  # the same for every block
    seen = torch.cat([window.new_ones(block, sinks), window], 1)
    before = (
        call.key.shape[2] - call.rows - (recent - 1)
    )  # keys in front of the first row's window
    parts = []
    for query in call.query.split(block, 2):
        rows = query.shape[2]
        near = slice(before, before + rows + recent - 1)
        key = torch.cat([call.key[:, :, :sinks], call.key[:, :, near]], 2)
        value = torch.cat([call.value[:, :, :sinks], call.value[:, :, near]], 2)
        mask = seen[:rows, : key.shape[2]]  # the last block may be shorter
        parts.append(
            scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=call.scaling, enable_gqa=True
            )
        )
        before += rows
    return torch.cat(parts, 2).transpose(1, 2)


def stream_flex(call: Call, sinks: int, recent: int) -> torch.Tensor:
    """`stream_chunked` by FlexAttention (arXiv 2412.05496), one kernel over the blocks that any row sees."""
    table = blocks(call.rows, call.key.shape[2], sinks, recent, call.device)
    # a kernel of our own, which is compiled where nothing else must be (see `hooks`)
    with torch.compiler.set_stance("default"):
        out = _compiled()(
            call.query,
            call.key.contiguous(),
            call.value.contiguous(),
            block_mask=table,
            scale=call.scaling,
            enable_gqa=call.query.shape[1] > call.key.shape[1],
        )
    return out.transpose(1, 2)


@cache  # not at import: torch.compile loads the compiler, which takes a while
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def blocks(
    rows: int, keys: int, sinks: int, recent: int, device: torch.device
) -> BlockMask:
    """Which blocks of TILE keys the streaming rows see, from their positions alone; all layers share a table.

    Rows are the last ones of the keys; the first `sinks` keys are in no row's window.
    """
    before = keys - rows

    def seen(b, h, row, column):
        distance = row + before - column
        return (column < sinks) | ((distance >= 0) & (distance < recent))

    # first and last key of each block, first and last row of each (a row counts as its own key)
    low = torch.arange(0, keys, TILE, device=device)
    top = torch.arange(before, keys, TILE, device=device)[:, None]
    high = low + TILE - 1
    bottom = top + TILE - 1
    some = (low < sinks) | ((low <= bottom) & (top - high < recent))
    every = (high < sinks) | ((high <= top) & (bottom - low < recent))
    tables = []
    # blocks that every row sees need no mask
    for block in (some & ~every, every):
        order = block.int().argsort(dim=1, descending=True, stable=True)
        tables += [block.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]]
    return BlockMask.from_kv_blocks(
        *tables, BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=(rows, keys)
    )
