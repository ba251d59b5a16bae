"""The one attention function that corehead registers with transformers: SDPA that hooks can read and change.

Rows are read where queries and keys are at hand, after norm and rotary embedding: for the chosen query rows alone, in
float32, a block of rows at a time. Nothing of size N x N exists at any time. Heads are changed in the same place, in
the edges of single rows or in their outputs, which are the input of o_proj.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

if TYPE_CHECKING:
    from .models import MLLM
    from .tagging import TaggedSample

NAME = "corehead"
# what decoders call their cache: "cache" from transformers 5.24 on
CACHE = (
    "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"
)
# attention weights (float32) held at once while rows are read: what stays in a CPU's cache, what keeps a GPU busy
WEIGHTS_BLOCK = {"cpu": 2**18, "cuda": 2**26}
# elements of masks that are held at once; SDPA makes floats of them, 64 MiB in float32
MASK_BLOCK = 2**24

PADDING, CONTEXT, QUESTION, LAST, ANSWER = range(5)
# "prefill" and "decode" split a sequence where the model begins to write, "context" and "question" where it is asked
PHASES = {
    "both": (CONTEXT, QUESTION, LAST, ANSWER),
    "prefill": (CONTEXT, QUESTION, LAST),
    "decode": (ANSWER,),
    "context": (CONTEXT,),
    "question": (QUESTION, LAST, ANSWER),
    "last": (LAST,),
}


@dataclass
class TokenRoles:
    """What the tokens of a batch are, by their position among the keys (padding and cached tokens included).

    Attributes
    ----------
    roles : (B, N) int8 tensor
        PADDING, CONTEXT, QUESTION (all prompt tokens that may look for the evidence), LAST (the one of them that
        predicts the answer's first token) or ANSWER.
    evidence : (B, G, N) bool tensor
        Sets of evidence tokens V*, one for each question of a batch row.
    query_of : (B, N) int64 tensor
        Which of the G sets a token looks for; -1 for none.
    positions : (B, N) int64 tensor
        Position of a token in its own sequence; -1 for padding.
    samples : list of str
        Id of the sample that each batch row is about; "" where it is unknown.
    """

    roles: torch.Tensor
    evidence: torch.Tensor
    query_of: torch.Tensor
    positions: torch.Tensor
    samples: list[str]

    @classmethod
    def empty(cls, batch: int, sets: int, length: int) -> TokenRoles:
        """A batch of padding alone, to be filled in."""
        return cls(
            roles=torch.full((batch, length), PADDING, dtype=torch.int8),
            evidence=torch.zeros(batch, sets, length, dtype=torch.bool),
            query_of=torch.full((batch, length), -1),
            positions=torch.full((batch, length), -1),
            samples=[""] * batch,
        )

    @classmethod
    def of(cls, tagged: Sequence[TaggedSample]) -> TokenRoles:
        """Of samples as a batch padded on the left to the longest."""
        length = max(len(t.ids) for t in tagged)
        out = cls.empty(len(tagged), 1, length)
        for row, t in enumerate(tagged):
            out.mark(row, t, torch.arange(length - len(t.ids), length), evidence_set=0)
        return out

    def mark(
        self,
        row: int,
        tagged: TaggedSample,
        keys: torch.Tensor,
        evidence_set: int | None,
        shared: int = 0,
    ) -> None:
        """Enter one sample into a batch row.

        Parameters
        ----------
        row : int
        tagged : TaggedSample
        keys : (L,) int64 tensor
            Position among the keys of each of its tokens.
        evidence_set : int or None
            Which set its evidence goes into; None for a question that looks for nothing (the null question).
        shared : int
            So many of its first tokens are other questions' as well: they are context.
        """
        query = tagged.query_tokens()
        query = keys[torch.from_numpy(query[query >= shared])]
        answer = keys[torch.from_numpy(tagged.answer)]
        # in this order, since each set is part of the one before: the answer's tokens are query tokens as well
        self.roles[row, keys] = CONTEXT
        self.roles[row, query] = QUESTION
        self.roles[row, keys[tagged.last]] = LAST
        self.roles[row, answer] = ANSWER
        self.positions[row, keys] = torch.arange(len(keys))
        self.samples[row] = tagged.sample.id if tagged.sample else ""
        if evidence_set is not None:
            self.evidence[row, evidence_set, keys[torch.from_numpy(tagged.evidence)]] = True
            self.query_of[row, query] = evidence_set

    def select(self, rows: torch.Tensor) -> TokenRoles:
        """Batch rows by index; a row may be taken several times."""
        return TokenRoles(
            roles=self.roles[rows],
            evidence=self.evidence[rows],
            query_of=self.query_of[rows],
            positions=self.positions[rows],
            samples=[self.samples[row] for row in rows.tolist()],
        )

    def repeat(self, times: int) -> TokenRoles:
        """The batch, `times` times over."""
        return self.select(torch.arange(len(self.samples)).repeat(times))

    def covering(self, batch: int, length: int) -> TokenRoles:
        """The same for `batch` rows (beams: each row several times in a row) and at least `length` keys.

        Tokens beyond those that are known are what the model writes: answers that look for the first set.
        """
        rows, known = self.roles.shape
        if batch % rows:
            raise ValueError(
                f"the roles of {rows} samples are known, but {batch} rows run: give the samples that run"
            )
        fitted = self
        if batch > rows:
            # generate() puts the beams of a sample next to each other: s0 s0 s1 s1, not s0 s1 s0 s1
            fitted = self.select(torch.arange(rows).repeat_interleave(batch // rows))
        more = length - known
        if more <= 0:
            return fitted
        # padding is on the left, so that the last column holds a real token in every row
        written = fitted.positions[:, -1:] + torch.arange(1, more + 1)
        return replace(
            fitted,
            roles=pad(fitted.roles, (0, more), value=ANSWER),
            evidence=pad(fitted.evidence, (0, more)),
            query_of=pad(fitted.query_of, (0, more), value=0),
            positions=torch.cat([fitted.positions, written], 1),
        )


@dataclass
class Call:
    """One call of the attention function, as hooks see it.

    Attributes
    ----------
    layer : int
    query : (B, H, R, D) tensor
        After norm and rotary embedding.
    key, value : (B, Hkv, N, D) tensors
        Not repeated, cached tokens included.
    scaling : float
        Factor on the dot products.
    first : int
        Position of the first query row among the keys.
    attention_mask : tensor, optional
        As transformers hands it over: (B or 1, 1, R, N), (B, N) or None.
    window : int, optional
        How many of the last keys a row of this layer sees, its own included; None is all.
    softcap : float, optional
        What bounds the logits: they are softcap * tanh(logit / softcap) (Gemma 2, arXiv 2408.00118).
    roles : TokenRoles, optional
        What the tokens are, where that is known.
    out : (B, R, H, D) tensor
        The output so far; hooks that read find it here.
    hooks : sequence of Hook
        All that are in force in this layer; those with masks cut edges.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    first: int
    attention_mask: torch.Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    roles: TokenRoles | None = None
    out: torch.Tensor | None = None
    hooks: Sequence[Hook] = ()

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def rows(self) -> int:
        return self.query.shape[2]

    @property
    def n(self) -> int:
        """Keys up to the last query row, those that a split cache does not hand over included."""
        return self.first + self.rows

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def head_values(self) -> torch.Tensor:
        """(B, H, N, D) float32, the values of every query head."""
        value = self.value.float()
        return value.repeat_interleave(self.query.shape[1] // value.shape[1], 1)

    def all_rows(self) -> torch.Tensor:
        return torch.arange(self.rows, device=self.device)

    def known_roles(self, purpose: str) -> TokenRoles:
        """The roles of the tokens, or a ValueError that says what must know them."""
        if self.roles is None:
            raise ValueError(
                f"{purpose}: pass tagged=, or run corehead's evaluate or score inside"
            )
        return self.roles

    def in_phase(self, phase: str) -> torch.Tensor:
        """(B or 1, R) bool. Without roles, a single row behind a cache is decoding and all else is prefill."""
        if phase == "both":  # padding as well, which nobody reads
            return torch.ones(1, self.rows, dtype=torch.bool, device=self.device)
        if self.roles is None and phase in ("prefill", "decode"):
            # good enough for generate(), which feeds the prompt and then one token at a time
            decoding = self.rows == 1 and self.n > 1
            return torch.full(
                (1, self.rows), decoding == (phase == "decode"), device=self.device
            )
        known = self.known_roles(f"phase={phase!r} must know the question")
        roles = known.roles[:, self.first : self.n]  # (B, R)
        of_phase = torch.tensor(PHASES[phase], dtype=roles.dtype)
        return torch.isin(roles, of_phase).to(self.device)

    def query_of(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, R) int64, the evidence set that each of some rows looks for, -1 for none; on the CPU."""
        return self.known_roles("knockout must know V*").query_of[
            :, self.first + rows.cpu()
        ]

    def evidence_of(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, R, N) bool, the evidence that each of some rows looks for; nothing for rows that look for none."""
        query_of = self.query_of(rows)[..., None]  # (B, R, 1)
        evidence = self.roles.evidence[..., : self.n]  # (B, G, N)
        # gather takes no -1: rows that look for nothing get set 0, and lose it again
        sets = query_of.clamp(min=0).expand(-1, -1, self.n)
        looked_for = evidence.gather(1, sets)  # (B, R, N)
        return (looked_for & (query_of >= 0)).to(self.device)

    def allowed(self, rows: torch.Tensor) -> torch.Tensor:
        """(B or 1, 1, R, N) bool, where some rows of this call may attend, hooks left out."""
        seen = self._unmasked(rows)
        if not self.has_window:
            return seen
        # in tokens of its own sequence, of which a row may hold several, with padding in between
        positions = self.positions
        row = positions[:, self.first + rows, None]
        behind = row - positions[:, None]  # (B or 1, R, N)
        return seen & (behind < self.window)[:, None]

    @property
    def positions(self) -> torch.Tensor:
        """(B or 1, N) position of every key in its own sequence; below 0 for padding."""
        if self.roles is not None:
            return self.roles.positions[:, : self.n].to(self.device)
        mask = self.attention_mask
        if mask is not None and mask.dim() == 2:
            return mask[:, : self.n].cumsum(1) - 1
        return torch.arange(self.n, device=self.device)[None]

    @property
    def has_window(self) -> bool:
        """Whether some row does not see all keys up to its own."""
        return self.window is not None and self.n > self.window

    def _unmasked(self, rows: torch.Tensor) -> torch.Tensor:
        """The same by the attention mask alone."""
        mask = self.attention_mask
        if mask is not None and mask.dim() == 4:
            mask = mask[:, :1, rows, : self.n]
            # a float mask is added to the logits: 0 where a row may attend, the type's minimum where not
            return mask if mask.dtype == torch.bool else mask == 0
        keys = torch.arange(self.n, device=self.device)
        positions = (self.first + rows)[:, None]
        causal = (keys <= positions)[None, None]  # (1, 1, R, N)
        if mask is None:
            return causal
        # A row of padding may have nothing but padding in front of it. It sees itself, because a softmax over no key at
        # all is NaN, and in the next layer that NaN would reach the rows of real tokens: a weight of 0 times NaN.
        return causal & (mask.bool()[:, None, None, : self.n] | (keys == positions))


class Hook:
    """What can be done inside the attention function; a hook overrides the methods that it needs.

    Attributes
    ----------
    needs_own_row : bool
        Every sequence must stand in a batch row of its own, with nothing shared.
    replaces : bool
        Its outputs take the place of those that were there; such hooks act behind all others.
    rows : (R,) int64 array, optional
        Positions among the keys of the query rows that `read` is to see.
    """

    needs_own_row = False
    replaces = False
    rows: np.ndarray | None = None

    def everywhere(self, mllm: MLLM) -> dict[int, list[Hook]]:
        """This hook in every layer."""
        return {layer: [self] for layer in range(mllm.n_layers)}

    def attend(self, call: Call) -> torch.Tensor | None:
        """The output (B, R, H, D) in another way than by SDPA; None leaves it to SDPA."""
        return None

    def mask(self, call: Call, rows: torch.Tensor) -> torch.Tensor | None:
        """(B or 1, H or 1, R, N) bool, edges from the given rows that are cut."""
        return None

    def masked_rows(self, call: Call) -> np.ndarray:
        """Rows of the call (int64) from which `mask` may cut edges."""
        return np.empty(0, np.int64)

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        """The outputs (B, R, H, D) as they should be."""
        return out

    def read(self, call: Call, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """See attention weights (B, H, R, N) float32 of some of `rows`, with every cut edge at zero."""

    def hidden_keys(self) -> int:
        """How many cached keys the cache does not hand over (a cache that is split)."""
        return 0


Measure = Callable[[Call, torch.Tensor, torch.Tensor], torch.Tensor]


class Reader(Hook):
    """Measures something at chosen rows in every layer where it hooks.

    Parameters
    ----------
    rows : (R,) int64 array or tensor
        Positions among the keys, ascending.
    measure : callable
        ``(call, rows, weights) -> (B, r, ...)`` tensor, of what `Hook.read` is given; a block of rows may also be one
        row of sums.
    """

    def __init__(self, rows: np.ndarray | torch.Tensor, measure: Measure):
        self.rows = np.asarray(rows)
        self.measure = measure
        self.measured: dict[int, list[torch.Tensor]] = defaultdict(list)

    def read(self, call: Call, rows: torch.Tensor, weights: torch.Tensor) -> None:
        # rows come in ascending blocks, chunk after chunk; their weights (N numbers a row) are gone after this
        self.measured[call.layer].append(self.measure(call, rows, weights).cpu())

    def result(self) -> np.ndarray:
        """(L, B, R, ...) of all rows, or of all blocks."""
        layers = [torch.cat(self.measured[layer], 1) for layer in sorted(self.measured)]
        return torch.stack(layers).numpy()


@dataclass
class Active:
    """What is in force at one attention module."""

    hooks: tuple[Hook, ...] = ()
    roles: TokenRoles | None = None


@contextmanager
def hooks(
    mllm: MLLM,
    by_layer: Mapping[int, Sequence[Hook]] | None = None,
    roles: TokenRoles | None = None,
) -> Iterator[None]:
    """Run the decoder by corehead's attention function, with hooks; the vision tower keeps its own.

    Contexts nest: outer hooks act first, and the innermost roles count. On exit, also by an exception, the model is
    what it was.

    Parameters
    ----------
    mllm : MLLM
    by_layer : mapping of int to sequence of Hook, optional
        The hooks of each layer.
    roles : TokenRoles, optional
        What the tokens are of what runs inside.
    """
    config = mllm.text_config
    modules = mllm.attentions
    implementation = config._attn_implementation
    before = [active(module) for module in modules]
    config._attn_implementation = NAME
    decoder = mllm.decoder
    prepare = _keep_all_keys if roles is not None and any(mllm.windows) else _check_cache
    handle = decoder.register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        for layer, (module, outer) in enumerate(zip(modules, before)):
            mine = tuple((by_layer or {}).get(layer, ()))
            module.corehead = Active(
                outer.hooks + mine, outer.roles if roles is None else roles
            )
        # a graph that was compiled without hooks knows nothing of them
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        config._attn_implementation = implementation
        handle.remove()
        for module, outer in zip(modules, before):
            if implementation == NAME:
                module.corehead = outer
            else:  # the outermost context leaves no trace
                del module.corehead


def _check_cache(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Raise ValueError for a static cache, whose empty slots would count as keys."""
    cache = kwargs.get(CACHE)
    if cache is not None and any(
        getattr(layer, "is_compileable", False) for layer in cache.layers
    ):
        raise ValueError(
            "a static cache has slots that hold no key yet: take a DynamicCache()"
        )


def _keep_all_keys(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Let an empty cache keep what falls out of a layer's window, since roles count positions among all keys."""
    _check_cache(decoder, args, kwargs)
    cache = kwargs.get(CACHE)
    for i, layer in enumerate(cache.layers if cache is not None else ()):
        if layer.is_sliding:
            if layer.get_seq_length():
                raise ValueError(
                    "this cache lets go of keys outside a window: begin with an empty DynamicCache()"
                )
            cache.layers[i] = DynamicLayer()


def active(module: torch.nn.Module) -> Active:
    """What is in force at an attention module."""
    return getattr(module, "corehead", Active())


def hooks_in_force(mllm: MLLM) -> list[Hook]:
    """The hooks of all layers."""
    return [hook for module in mllm.attentions for hook in active(module).hooks]


def edited(mllm: MLLM) -> bool:
    """Whether what the model computes may differ under the hooks in force."""
    kinds = [type(hook) for hook in hooks_in_force(mllm)]
    return any(k.output is not Hook.output or k.mask is not Hook.mask for k in kinds)


def row_weights(
    call: Call, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Softmax rows of attention, a block of rows at a time; no full attention matrix exists.

    Parameters
    ----------
    call : Call
        Its hooks' masks cut edges; the rest of a row is renormalised.
    rows : (R,) int64 tensor
        Query rows of the call.

    Yields
    ------
    rows : (r,) int64 tensor
    weights : (B, H, r, N) float32 tensor
    """
    batch, heads, _, dim = call.query.shape
    kv_heads = call.key.shape[1]
    # float32 whatever the model runs in: bfloat16 has 8 significant bits, and a mass that is summed over thousands of
    # small weights would drown in rounding errors
    keys = call.key.float().transpose(-1, -2)  # (B, Hkv, D, N)
    room = WEIGHTS_BLOCK.get(call.device.type, 2**24)
    block = max(1, room // (batch * heads * call.n))
    for part in rows.split(block):
        query = call.query[:, :, part].float() * call.scaling
        # the query heads of a KV head become rows, so that its keys are not repeated
        query = query.reshape(batch, kv_heads, -1, dim)
        logits = (query @ keys).view(batch, heads, len(part), call.n)
        logits = capped(logits, call.softcap)
        # the least float, not -inf: a row that sees no key at all must not become NaN
        logits.masked_fill_(~visible(call, part), torch.finfo(torch.float32).min)
        yield part, logits.softmax(-1)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits within -softcap and softcap, as Gemma 2 has them (arXiv 2408.00118); as they are with None."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def visible(call: Call, rows: torch.Tensor) -> torch.Tensor:
    """(B or 1, H or 1, R, N) bool, where rows of the call attend under the masks of its hooks."""
    seen = call.allowed(rows)
    for hook in call.hooks:
        cut = hook.mask(call, rows)
        if cut is not None:
            seen = seen & ~cut
    return seen


def full_attention(call: Call, module: torch.nn.Module, **options) -> torch.Tensor:
    """Attention of all heads to all keys that the attention mask allows, (B, R, H, D), by the fastest way there is.

    Edges that hooks cut are left in.
    """
    call = replace(call, hooks=())
    mask = call.attention_mask
    whole = call.first == 0
    states = call.query, call.key, call.value
    if call.has_window or call.softcap is not None:  # for these there is no kernel
        return masked_attention(call, call.all_rows())
    # nothing cached, or one row that sees every key: what transformers does is right and fast
    if mask is None:
        native = whole or call.rows == 1
    else:
        native = whole and mask.dim() == 4
    if native:
        options["scaling"] = call.scaling
        return sdpa_attention_forward(module, *states, mask, **options)[0]
    # Flash attention of a chunk behind a cache, which exists for 16-bit types on GPUs alone. The causal triangle stands
    # at the lower right of the R x N rectangle, since row 0 sees all `first` cached keys; SDPA's own is_causal puts it
    # at the upper left, where row 0 sees key 0 alone.
    if mask is None and call.query.is_cuda and call.query.element_size() == 2:
        bias = causal_lower_right(call.rows, call.n)
        grouped = call.query.shape[1] > call.key.shape[1]
        out = scaled_dot_product_attention(
            *states, attn_mask=bias, scale=call.scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous()
    return masked_attention(call, call.all_rows())


def masked_attention(call: Call, rows: torch.Tensor) -> torch.Tensor:
    """Exact attention of some rows under explicit masks, (B, R, H, D).

    No more than MASK_BLOCK elements of masks are held at once.
    This is the one path for chunks behind a cache, padding, cut edges and whatever hybrid attention has no kernel for.
    """
    if call.softcap is not None:
        return _capped_attention(call, rows)
    batch, heads = call.query.shape[:2]
    kv_heads = call.key.shape[1]
    group = heads // kv_heads
    out = call.query.new_empty(batch, len(rows), heads, call.value.shape[-1])
    # one mask for all KV heads, or one for each where a hook tells heads apart
    own_masks = visible(call, rows[:1]).shape[1] > 1
    masks = heads if own_masks else group
    block = max(1, MASK_BLOCK // (batch * masks * call.n))
    for i, part in enumerate(rows.split(block)):
        # the g query heads of a KV head become rows, so that the cache is not repeated g times
        seen = visible(call, part)  # (B or 1, H or 1, r, N)
        seen = seen.expand(-1, masks, -1, -1)
        seen = seen.unflatten(1, (-1, group)).flatten(2, 3)  # (B or 1, Hkv or 1, g r, N)
        query = call.query[:, :, part].unflatten(1, (kv_heads, group)).flatten(2, 3)
        attended = scaled_dot_product_attention(
            query, call.key, call.value, attn_mask=seen, scale=call.scaling
        )
        # (B, r, Hkv, g, D), and heads behind each other: (B, r, H, D)
        attended = attended.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4)
        out[:, i * block : i * block + len(part)] = attended.flatten(2, 3)
    return out


def _capped_attention(call: Call, rows: torch.Tensor) -> torch.Tensor:
    """The same with capped logits, which SDPA has no way to take: by rows of weights."""
    value = call.value.float()[:, :, None]  # (B, Hkv, 1, N, D)
    out = []
    for _, weights in row_weights(call, rows):
        by_group = weights.unflatten(1, (value.shape[1], -1))  # (B, Hkv, g, r, N)
        out.append((by_group @ value).flatten(1, 2).transpose(1, 2))  # (B, r, H, D)
    return torch.cat(out, 1).to(call.value.dtype)


def attention_forward(module, query, key, value, attention_mask, scaling=None, **options):
    """SDPA, with what hooks change and read; transformers calls it in every decoder layer."""
    now = active(module)
    hidden = sum(hook.hidden_keys() for hook in now.hooks)
    first = key.shape[2] - query.shape[2] + hidden
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    call = Call(
        layer=module.layer_idx,
        query=query,
        key=key,
        value=value,
        scaling=scaling,
        first=first,
        attention_mask=attention_mask,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        hooks=now.hooks,
    )
    if now.roles is not None:
        call.roles = now.roles.covering(call.batch, call.n)
        _check_padding(call, known=now.roles.roles.shape[1])
    call.out = _attend(call, module, options)
    for hook in sorted(now.hooks, key=lambda hook: hook.replaces):
        call.out = hook.output(call, call.out)
    # only now, so that readers find the output as all hooks left it
    for hook in now.hooks:
        if hook.rows is not None:
            # a hook's rows count from the start of the sequence; of a chunk it sees those that fall into it
            rows = hook.rows - call.first
            rows = rows[(rows >= 0) & (rows < call.rows)]
            if len(rows):
                rows = torch.from_numpy(rows).to(call.device)
                for part, weights in row_weights(call, rows):
                    hook.read(call, part, weights)
    return call.out, None


def _check_padding(call: Call, known: int) -> None:
    """Raise ValueError where what runs is padded otherwise than the samples whose first `known` tokens have roles."""
    mask = call.attention_mask
    # once, where the sequences begin
    if call.layer or call.first or mask is None or mask.dim() != 2:
        return
    real = call.roles.roles[:, : min(known, call.n)] != PADDING
    if not torch.equal(mask[:, : real.shape[1]].bool().cpu(), real):
        raise ValueError(
            "the input is padded otherwise than its tagged samples: pad on the left to the longest of them"
        )


def _attend(call: Call, module: torch.nn.Module, options: dict) -> torch.Tensor:
    """The output under all masks, in front of what `Hook.output` changes."""
    out = None
    for hook in call.hooks:
        attended = hook.attend(call)
        if attended is not None:
            out = attended
    masked = [hook.masked_rows(call) for hook in call.hooks]
    rows = np.unique(np.concatenate([*masked, np.empty(0, np.int64)]))
    if len(rows) == call.rows:
        return masked_attention(call, call.all_rows())
    if out is None:
        out = full_attention(call, module, **options)
    if len(rows):
        # Few rows have cut edges (a question's, in a long context). The fast path computes all, and these are done
        # again under the mask, which costs less than a mask for all.
        rows = torch.from_numpy(rows).to(call.device)
        out[:, rows] = masked_attention(call, rows)
    return out


def _mask(*args, mask_function=causal_mask_function, local_size=None, **options):
    """Causal masks stay (B, N), for N x N of them would not fit where it matters; what else a model asks for is built.

    Blocks that attend both ways come as a `mask_function` of their own. A sliding window, which has a `local_size`, is
    left to `Call.allowed`: it counts a sequence's own tokens, where padding may stand behind a prefix.
    """
    stays = mask_function is causal_mask_function or local_size is not None
    # the builder of flash attention hands the (B, N) mask on, or None where there is no padding
    build = flash_attention_mask if stays else sdpa_mask
    return build(*args, mask_function=mask_function, **options)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, _mask)
