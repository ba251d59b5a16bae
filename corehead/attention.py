"""The one attention function that corehead registers with transformers: SDPA that can be read and edited.

Rows are read where the queries and the keys are at hand, after norm and rotary embedding: for the chosen query rows
alone, in float32, grouped over the KV heads, and reduced at once to sums over token groups. Nothing of size N x N
exists at any time; reading |Q| rows of H heads over N keys takes O(H |Q| N) memory, a block of rows at a time.

Heads are edited at the same place: in their queries, in the edges of single rows, or in their outputs, which is the
input of o_proj. Every row of a batch can have its own set of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from .models import MLLM
from .tagging import Tagged

NAME = "corehead"
HYBRID = "corehead_hybrid"  # the same function; masks stay (B, N), for N x N of them would not fit where it is needed
# what decoders call their cache: "cache" from transformers 5.24 on
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"
_UNKNOWN = "pass tagged=, or run corehead's evaluate or score inside"
# attention weights (float32) held at once while rows are read: what stays in a CPU's cache, what keeps a GPU busy
BLOCK = {"cpu": 2**18, "cuda": 2**26}
MASK = 2**26  # elements of a mask that is held at once


@dataclass
class Layout:
    """What the tokens of a batch are, by their position among the keys (padding and cached tokens included).

    Attributes
    ----------
    targets : (B, G, N) bool, sets of evidence tokens V*, one for each question of a batch row.
    asks : (B, N) int64, which of the G sets a token looks for; -1 for none. Tokens from N on, which a model writes
        itself, look for the first set.
    decoded : (B, N) bool, the tokens of an answer, which a model would write itself; those from N on are decoded too.
    names : B names of what the rows are about.
    places : (B, N) int64, position of a token in its own sequence; -1 for padding.
    last : (B,) int64, position of the last token of the prompt; None where a row holds several questions.
    """

    targets: torch.Tensor
    asks: torch.Tensor
    decoded: torch.Tensor
    names: list[str]
    places: torch.Tensor
    last: torch.Tensor | None = None

    @classmethod
    def of(cls, tagged: list[Tagged]) -> Layout:
        """Of samples as a batch padded on the left to the longest."""
        n = max(len(t.ids) for t in tagged)
        targets = torch.zeros(len(tagged), 1, n, dtype=torch.bool)
        asks, decoded = torch.full((len(tagged), n), -1), torch.zeros(len(tagged), n, dtype=torch.bool)
        places = torch.full((len(tagged), n), -1)
        for b, t in enumerate(tagged):
            pad = n - len(t.ids)
            targets[b, 0, pad + t.target] = True
            asks[b, pad + t.asking()] = 0
            decoded[b, pad + t.answer] = True
            places[b, pad:] = torch.arange(len(t.ids))
        last = torch.tensor([n - len(t.ids) + t.last for t in tagged])
        return cls(targets, asks, decoded, ["" if t.sample is None else t.sample.id for t in tagged], places, last)

    def tile(self, times: int) -> Layout:
        """The batch, `times` times over."""
        last = None if self.last is None else self.last.repeat(times)
        wide = self.targets.repeat(times, 1, 1), self.asks.repeat(times, 1), self.decoded.repeat(times, 1)
        return Layout(*wide, self.names * times, self.places.repeat(times, 1), last)

    def fit(self, batch: int) -> Layout:
        """The layout of `batch` rows: as it is, or each row several times in a row (beams, returned sequences)."""
        if batch == len(self.names):
            return self
        if batch % len(self.names):
            raise ValueError(f"{len(self.names)} samples are laid out, but {batch} rows run: give the samples that run")
        rows = torch.arange(len(self.names)).repeat_interleave(batch // len(self.names))
        last = None if self.last is None else self.last[rows]
        names = [self.names[i] for i in rows]
        return Layout(self.targets[rows], self.asks[rows], self.decoded[rows], names, self.places[rows], last)

    def seek(self, positions: torch.Tensor) -> torch.Tensor:
        """(B, R) int64, `asks` of the tokens at R positions, those beyond the layout included."""
        inside = self.asks[:, positions.clamp(max=self.asks.shape[1] - 1)]
        return torch.where(positions < self.asks.shape[1], inside, 0)

    def is_decoded(self, positions: torch.Tensor) -> torch.Tensor:
        """(B, R) bool."""
        inside = self.decoded[:, positions.clamp(max=self.decoded.shape[1] - 1)]
        return inside | (positions >= self.decoded.shape[1])

    def edges(self, seek: torch.Tensor, n: int) -> torch.Tensor:
        """(B, R, n) bool, edges from rows to the keys of the set that they look for."""
        found = self.targets.gather(1, seek.clamp(min=0)[..., None].expand(-1, -1, self.targets.shape[2]))
        return torch.nn.functional.pad(found & (seek >= 0)[..., None], (0, max(0, n - found.shape[-1])))[..., :n]


@dataclass
class Call:
    """One call of the attention function.

    Attributes
    ----------
    first : position of the first query row among the keys; n : keys; rows : query rows; batch : batch rows.
    mask : as transformers hands it over, (B or 1, 1, R, N), (B, N) or None.
    pattern : the layer's hybrid pattern, if it is accelerated.
    """

    batch: int
    first: int
    rows: int
    n: int
    mask: torch.Tensor | None
    device: torch.device
    layout: Layout | None
    pattern: Any = None

    def positions(self) -> torch.Tensor:
        return torch.arange(self.first, self.n)

    def in_phase(self, phase: str) -> torch.Tensor:
        """(B or 1, R) bool. Without a layout, a single row behind a cache is decoding and all else is prefill."""
        if phase in ("context", "question"):
            if self.layout is None:
                raise ValueError(f"phase={phase!r} must know the question: {_UNKNOWN}")
            asks = self.layout.seek(self.positions()) >= 0
            return asks if phase == "question" else ~asks
        if self.layout is None:
            decoded = torch.full((1, self.rows), self.rows == 1 and self.n > 1)
        else:
            decoded = self.layout.is_decoded(self.positions())
        return decoded if phase == "decode" else ~decoded

    def allowed(self, rows: torch.Tensor) -> torch.Tensor:
        """(B or 1, R, N) bool, where rows of this call may attend, the pattern left out."""
        if self.mask is None or self.mask.dim() == 2:
            causal = (torch.arange(self.n, device=self.device) <= (self.first + rows)[:, None])[None]
            return causal if self.mask is None else causal & self.mask.bool()[:, None, : self.n]
        mask = self.mask[:, 0, rows, : self.n]
        return mask if mask.dtype == torch.bool else mask == 0


@dataclass
class Edit:
    """What is done to some heads of one layer.

    Attributes
    ----------
    mode : "zero", "mean" and "resample" replace the heads' outputs; "scale" multiplies them; "uniform" takes away
        their queries; "knockout" takes away the edges from rows that ask to what they ask for.
    heads : (B or 1, H) bool.
    phase : "both", "prefill", "decode", "context" or "question": which rows.
    values : mean: (H, D). resample: called with a `Call`, gives (B, R, H, D). scale: (B or 1, H) factors.
    """

    mode: str
    heads: torch.Tensor
    phase: str = "both"
    values: torch.Tensor | Callable[[Call], torch.Tensor] | None = None

    def where(self, call: Call) -> torch.Tensor:
        """(B or 1, R or 1, H) bool: which rows of which heads."""
        if self.phase == "both":
            return self.heads[:, None]
        return self.heads[:, None] & call.in_phase(self.phase).to(self.heads.device)[..., None]

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        """Edit the outputs (B, R, H, D)."""
        if self.mode == "scale":
            return out * self.values[:, None, :, None]
        where = self.where(call)[..., None]
        if self.mode == "zero":
            return out.masked_fill(where, 0)
        values = self.values if self.mode == "mean" else self.values(call)
        return torch.where(where, values.to(out.dtype), out)

    def cut(self, call: Call, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges (B, R, N) bool that are cut for the given rows of the call, and (B, R, H) bool, of which heads."""
        if call.layout is None:
            raise ValueError(f"knockout must know V*: {_UNKNOWN}")
        seek = call.layout.seek(call.first + rows.cpu())
        where = self.where(call)
        where = where if where.shape[1] == 1 else where[:, rows]
        return call.layout.edges(seek, call.n).to(call.device), where & (seek >= 0).to(call.device)[..., None]


@dataclass
class RowReader:
    """What is read from every layer in one forward pass.

    Parameters
    ----------
    rows : (R,) int64, query rows to read, in order, counted from the first token that is fed. They may be fed in
        several chunks, one behind the other.
    groups : (B, N, G) float32, membership of each key in each of G token groups.

    Attributes
    ----------
    sums : one (B, R, H, G) float32 tensor a layer: attention mass of each row on each group.
    entropy : one (B, R, H) float32 tensor a layer: entropy of each row in nats.
    """

    rows: torch.Tensor
    groups: torch.Tensor
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    entropy: dict[int, torch.Tensor] = field(default_factory=dict)
    _first: dict[int, int] = field(default_factory=dict)  # position of the first token that is fed, a layer

    def __call__(self, layer: int, call: Call, query, key, value, out, scaling: float, edits: list[Edit]) -> None:
        past = call.first - self._first.setdefault(layer, call.first)  # tokens that were fed before
        rows = self.rows.to(call.device)
        if past or call.n < self.groups.shape[1]:
            rows = rows[(rows >= past) & (rows < past + call.rows)] - past
            if len(rows) == 0 and call.n < self.groups.shape[1]:
                return
        allowed, query = call.allowed(rows), query[:, :, rows]
        groups = self.groups[:, : call.n].to(call.device)

        def read(allowed):
            found = row_sums(query, key, groups, allowed, scaling)
            if call.pattern is None:
                return found
            near = row_sums(query, key, groups, allowed & call.pattern.seen(call, rows), scaling)
            dense = call.pattern.dense
            return torch.where(dense[:, None], found[0], near[0]), torch.where(dense, found[1], near[1])

        sums, entropy = read(allowed)
        for edit in edits:
            if edit.mode == "knockout":
                edges, where = edit.cut(call, rows)
                fewer, less = read(allowed & ~edges)
                sums, entropy = torch.where(where[..., None], fewer, sums), torch.where(where, less, entropy)
        for kept, new in (self.sums, sums), (self.entropy, entropy):
            kept[layer] = torch.cat([kept[layer], new], 1) if layer in kept else new


# by id of the attention module
_EDITS: dict[int, list[Edit]] = {}
_WATCHERS: dict[int, list[Callable]] = {}
_LAYOUTS: dict[int, Layout] = {}
_PATTERNS: dict[int, Any] = {}


def row_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    groups: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of query rows on groups of keys, and the rows' entropy, without a full attention matrix.

    Parameters
    ----------
    query : (B, H, R, D), after norm and rotary embedding.
    key : (B, Hkv, N, D), not repeated; H is a multiple of Hkv.
    groups : (B, N, G) float32.
    mask : (B or 1, R, N) bool, True where a row may attend.
    scaling : factor on the dot products.

    Returns
    -------
    sums : (B, R, H, G) float32, softmax weights summed over each group.
    entropy : (B, R, H) float32, nats.
    """
    b, h, r, d = query.shape
    hkv, n, g = *key.shape[1:3], groups.shape[-1]
    q = (query.float() * scaling).reshape(b, hkv, h // hkv, r, d)
    k = key.float().transpose(-1, -2)  # (B, Hkv, D, N)
    columns = torch.cat([groups, torch.ones_like(groups[..., :1])], -1)  # the last column sums the whole row
    sums = torch.empty(b, hkv, h // hkv, r, g + 1, device=query.device)
    entropy = torch.empty(b, hkv, h // hkv, r, device=query.device)
    step = max(1, BLOCK.get(query.device.type, 2**24) // (b * h * n))
    for i in range(0, r, step):
        rows = slice(i, i + step)
        logits = (q[:, :, :, rows].reshape(b, hkv, -1, d) @ k).view(b, hkv, h // hkv, -1, n)
        # finite, so that a masked key adds exactly 0 to the entropy: 0 * -1e30, where 0 * -inf is NaN
        logits.masked_fill_(~mask[:, None, None, rows], -1e30)
        logits -= logits.amax(-1, keepdim=True)
        weights = logits.exp()
        part = (weights.flatten(1, 3) @ columns).view(*weights.shape[:-1], g + 1)
        total = part[..., -1]  # partition function Z of each row
        sums[:, :, :, rows] = part / total[..., None]
        entropy[:, :, :, rows] = total.log() - weights.mul_(logits).sum(-1) / total
    return sums[..., :g].flatten(1, 2).transpose(1, 2), entropy.flatten(1, 2).transpose(1, 2)


def _knock_out(edit: Edit, call: Call, query, key, value, out, scaling: float) -> torch.Tensor:
    """Give rows that ask the output that they would have without the edges to what they ask for, renormalised."""
    rows = torch.arange(call.rows)
    rows = rows[(call.layout.seek(call.first + rows) >= 0).any(0)] if call.layout is not None else rows
    if not len(rows):
        return out
    edges, where = edit.cut(call, rows)
    heads = edit.heads.any(0).nonzero()[:, 0]  # those that any batch row edits
    group = query.shape[1] // key.shape[1]
    k, v = key[:, heads // group].float(), value[:, heads // group].float()  # (B, h, N, D)
    rows_here = rows.to(call.device)
    allowed = (call.allowed(rows_here) & ~edges)[:, None]  # (B, 1 or h, R, N)
    if call.pattern is not None:
        allowed = allowed & (call.pattern.seen(call, rows_here)[:, None] | call.pattern.dense[heads][:, None, None])
    out = out.clone()
    step = max(1, BLOCK.get(call.device.type, 2**24) // (len(query) * len(heads) * call.n))
    for i in range(0, len(rows), step):
        part = rows_here[i : i + step]
        q = query[:, heads][:, :, part].float() * scaling
        weights = (q @ k.transpose(-1, -2)).masked_fill(~allowed[:, :, i : i + step], -torch.inf).softmax(-1)
        new = (weights @ v).transpose(1, 2).to(out.dtype)  # (B, r, h, D)
        at = slice(None), part[:, None], heads[None]
        out[at] = torch.where(where[:, i : i + step][..., heads, None], new, out[at])
    return out


def _sdpa(module, call: Call, query, key, value, attention_mask, dropout, scaling, **kwargs):
    """Scaled dot-product attention; (B, R, H, D)."""
    whole, mask = call.rows == call.n, attention_mask
    if (whole or call.rows == 1) if mask is None else mask.dim() == 4 and (whole or mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    return _behind(call, query, key, value, dropout, scaling)


def _behind(call: Call, query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
    """Attention of a chunk behind a cache, or under padding, (B, R, H, D): no mask of more than MASK elements.

    The query heads of a KV head become rows, so that the cache is not repeated.
    """
    (b, h, r, _), groups, n = query.shape, key.shape[1], call.n
    options = dict(dropout_p=dropout, scale=scaling)
    if call.mask is None and query.is_cuda and query.element_size() == 2:  # flash attention
        mask = causal_lower_right(r, n)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=h > groups, **options)
        return out.transpose(1, 2).contiguous()
    out = query.new_empty(b, r, h, value.shape[-1])
    packed = query.unflatten(1, (groups, -1))  # (B, Hkv, g, R, D)
    step = max(1, MASK // (h // groups * n * (1 if call.mask is None else len(call.mask))))
    for i in range(0, r, step):
        rows = torch.arange(i, min(i + step, r), device=call.device)
        if call.mask is not None and call.mask.dim() == 4:
            mask = call.mask[:, :, rows, :n]
        else:  # padding sees itself, so that it is no NaN
            itself = torch.arange(n, device=call.device) == (call.first + rows)[:, None]
            mask = (call.allowed(rows) | itself)[:, None]
        part, mask = packed[:, :, :, i : i + step].flatten(2, 3), mask.repeat(1, 1, h // groups, 1)
        found = scaled_dot_product_attention(part, key, value, attn_mask=mask, **options)
        out[:, i : i + step] = found.unflatten(2, (h // groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA, or the module's hybrid pattern, with the edits and the readers that wait for it."""
    edits, watchers = _EDITS.get(id(module), ()), _WATCHERS.get(id(module), ())
    pattern = _PATTERNS.get(id(module))
    (b, _, r, d), n = query.shape, key.shape[2]
    if not edits and not watchers and pattern is None:
        call = Call(b, n - r, r, n, attention_mask, query.device, None)
        return _sdpa(module, call, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    if hasattr(key, "kept"):  # the layer of a split cache, which holds the keys before these
        n += key.kept.n
    scale = d**-0.5 if scaling is None else scaling
    layout = _LAYOUTS.get(id(module))
    layout = layout if layout is None else layout.fit(b)
    call = Call(b, n - r, r, n, attention_mask, query.device, layout, pattern)
    for edit in edits:
        if edit.mode == "uniform":
            query = query.masked_fill(edit.where(call).transpose(1, 2)[..., None], 0)
    if pattern is None:
        out = _sdpa(module, call, query, key, value, attention_mask, dropout, scaling, **kwargs)
    else:
        out = pattern.attend(call, query, key, value, scale)
    for edit in edits:
        if edit.mode == "knockout":
            out = _knock_out(edit, call, query, key, value, out, scale)
    for edit in edits:
        if edit.mode not in ("uniform", "knockout"):
            out = edit.output(call, out)
    for watch in watchers:
        watch(module.layer_idx, call, query, key, value, out, scale, edits)
    return out, None


for _name, _mask in (NAME, sdpa_mask), (HYBRID, flash_attention_mask):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, _mask)


@contextmanager
def own_attention(mllm: MLLM, name: str = NAME) -> Iterator[None]:
    """Run the decoder of a model by corehead's attention function; the vision tower keeps its own.

    On exit, also by an exception, the model has the implementation that it had.
    """
    config = mllm.text_config
    before = config._attn_implementation
    if before in (name, HYBRID):  # nested
        yield
        return
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def hybrid_in(mllm: MLLM, patterns: list) -> Iterator[None]:
    """Attend by a pattern in each decoder layer: ``pattern.attend(call, query, key, value, scaling)``."""
    mine = {id(module): pattern for module, pattern in zip(mllm.attentions, patterns, strict=True)}
    with own_attention(mllm, HYBRID):
        _PATTERNS.update(mine)
        try:
            yield
        finally:
            for module in mine:
                del _PATTERNS[module]


def hybrid(mllm: MLLM) -> bool:
    """Whether patterns are in force."""
    return id(mllm.attentions[0]) in _PATTERNS


def waiting(mllm: MLLM) -> bool:
    """Whether somebody reads rows, or must know what the tokens are."""
    first = id(mllm.attentions[0])
    return bool(_WATCHERS.get(first)) or first in _LAYOUTS


@contextmanager
def _installed(mllm: MLLM, table: dict[int, list], items: Mapping[int, object]) -> Iterator[None]:
    """Append items, by layer, to a table of what waits for the attention modules; take them out again on exit."""
    with own_attention(mllm):
        modules = mllm.attentions
        mine = [(table.setdefault(id(modules[layer]), []), item) for layer, item in items.items()]
        for queue, item in mine:
            queue.append(item)
        try:
            yield
        finally:
            for queue, item in mine:
                del queue[next(i for i, other in enumerate(queue) if other is item)]


def watching(mllm: MLLM, watcher: Callable):
    """Call ``watcher(layer, call, query, key, value, out, scaling, edits)`` in every decoder layer.

    query (B, H, R, D), key and value (B, Hkv, N, D), out (B, R, H, D), all as edited.
    """
    return _installed(mllm, _WATCHERS, dict.fromkeys(range(mllm.n_layers), watcher))


def editing(mllm: MLLM, edits: Mapping[int, Edit]):
    """Apply edits, one a layer, behind those that are there already."""
    return _installed(mllm, _EDITS, edits)


def edited(mllm: MLLM, mode: str | None = None) -> bool:
    """Whether edits (of a mode), or without a mode also hybrid patterns, are in force."""
    found = any(mode in (None, e.mode) for module in mllm.attentions for e in _EDITS.get(id(module), ()))
    return found or (mode is None and hybrid(mllm))


@contextmanager
def laid_out(mllm: MLLM, layout: Layout) -> Iterator[None]:
    """Tell edits what the tokens are of what runs inside; the innermost layout counts."""
    before = {id(module): _LAYOUTS.get(id(module)) for module in mllm.attentions}
    _LAYOUTS.update(dict.fromkeys(before, layout))
    try:
        yield
    finally:
        for module, old in before.items():
            if old is None:
                del _LAYOUTS[module]
            else:
                _LAYOUTS[module] = old


@contextmanager
def reading(mllm: MLLM, rows: torch.Tensor, groups: torch.Tensor) -> Iterator[RowReader]:
    """Read rows in every decoder layer during the forward pass inside.

    Parameters
    ----------
    mllm : the model that will run.
    rows : (R,) int64, rows of the chunk that is fed, counted from its first token.
    groups : (B, N, G) float32 over all keys, the cached ones first.

    Yields
    ------
    RowReader, filled once the model has run
    """
    reader = RowReader(rows, groups)
    with watching(mllm, reader):
        yield reader
