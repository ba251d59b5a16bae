"""Samples on one context, packed so that the context is computed once.

Samples that follow each other with the same media (or text) in front of the question form a `Context`: one prefix and
a `Block` of tokens for each question. A batch of contexts is fed in two calls, the prefixes and then all blocks as one
chunk in which blocks do not see each other. Where nothing can be shared, each sequence runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention import CACHE, HYBRID, Layout, own_attention
from .models import MLLM, ROWS
from .samples import Sample, SampleError
from .tagging import PER_TOKEN, Prompt, Tagged, collate, pad_id, to_model

NULL = "N/A"
MOST = 32  # questions behind one context in one chunk
FULL = 2**17  # tokens of the contexts of a batch, padding included: what their keys and values may take


@dataclass
class Block:
    """One question behind a context.

    Attributes
    ----------
    ids : (n,) int64, its token ids, those behind the prefix.
    owner : which sample of the context; of a null block, one of those that it serves.
    null : it asks the null question.
    tagged : the full sequence.
    """

    ids: np.ndarray
    owner: int
    null: bool
    tagged: Tagged

    @property
    def answer(self) -> np.ndarray:
        return self.tagged.ids[self.tagged.answer]


@dataclass
class Context:
    """A prefix and the blocks behind it; without a prefix, one sample, and each block is a whole sequence."""

    prefix: Tagged | None  # inputs cut to the prefix
    blocks: list[Block]
    members: list[Tagged]
    name: str  # of the first sample on it

    @property
    def shared(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else len(self.prefix.ids)

    def block_of(self, owner: int) -> int:
        """The block that asks a sample's question."""
        return next(k for k, b in enumerate(self.blocks) if b.owner == owner and not b.null)

    def null_of(self, owner: int) -> int | None:
        """The block with the null question and the sample's answer, if there is one."""
        answer = self.blocks[self.block_of(owner)].answer
        same = (k for k, b in enumerate(self.blocks) if b.null and np.array_equal(b.answer, answer))
        return next(same, None)


@dataclass
class Packed:
    """A batch of contexts as the model is fed it.

    Attributes
    ----------
    prefix : model inputs of the prefixes (B, W), padded on the left; None where nothing is shared.
    feed : model inputs of the chunk behind them (B, S), or of whole sequences.
    before : W, keys in front of the chunk; 0 without a prefix.
    places : (context, block) -> (batch row, padding in front of the prefix, first key of the block).
    layout : what the tokens are, for edits of attention.
    """

    contexts: list[Context]
    prefix: dict[str, Any] | None
    feed: dict[str, Any]
    before: int
    places: dict[tuple[int, int], tuple[int, int, int]]
    layout: Layout = field(init=False)

    def __post_init__(self):
        n_rows = len(self.feed["input_ids"])
        length = self.before + self.feed["input_ids"].shape[1]
        n_targets = max(sum(not b.null for b in c.blocks) if self.before else 1 for c in self.contexts)
        targets = torch.zeros(n_rows, n_targets, length, dtype=torch.bool)
        asks = torch.full((n_rows, length), -1)
        decoded = torch.zeros(n_rows, length, dtype=torch.bool)
        names, last = [""] * n_rows, torch.full((n_rows,), -1)
        places = torch.full((n_rows, length), -1)
        for (c, k), (row, _, _) in self.places.items():
            block = self.contexts[c].blocks[k]
            t, column = block.tagged, block.owner if self.before else 0
            decoded[row, self.keys(c, k, t.answer)] = True
            names[row] = t.sample.id
            places[row, self.keys(c, k, np.arange(len(t.ids)))] = torch.arange(len(t.ids))
            if not self.before:
                last[row] = int(self.keys(c, k, np.array([t.last]))[0])
            if not (block.null and self.before):  # behind a prefix, the samples' own blocks mark what is asked for
                targets[row, column, self.keys(c, k, t.target)] = True
            if not block.null:
                asking = t.asking()
                asks[row, self.keys(c, k, asking[asking >= self.contexts[c].shared])] = column
        self.layout = Layout(targets, asks, decoded, names, places, None if self.before else last)

    def keys(self, c: int, k: int, tokens: np.ndarray) -> np.ndarray:
        """Positions among the keys, padding and prefix included, of tokens of a block's full sequence."""
        _, pad, start = self.places[c, k]
        shared = self.contexts[c].shared
        return np.where(tokens < shared, pad + tokens, start + tokens - shared)

    def rows(self, c: int, k: int, tokens: np.ndarray) -> np.ndarray:
        """Rows of `feed` of tokens behind the prefix."""
        return self.keys(c, k, tokens) - self.before


def null_sample(sample: Sample, question: str) -> Sample:
    """The same sample with its question replaced by "N/A"."""
    messages = list(sample.messages)
    for m in reversed(range(len(messages))):
        content = messages[m]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        for p in reversed(range(len(parts))):
            if question in parts[p].get("text", ""):
                head, _, tail = parts[p]["text"].rpartition(question)
                parts[p] = {**parts[p], "text": head + NULL + tail}
                messages[m] = {**messages[m], "content": parts}
                return replace(sample, messages=messages, question=NULL)
    raise SampleError(sample.id, "question", f"{question!r} is in no message", "Quote it as it stands there")


def batches(
    mllm: MLLM,
    samples: Iterable[Sample | Tagged | None],
    batch_size: int,
    *,
    null: bool = False,
    fail: Callable[[SampleError], None] | None = None,
) -> Iterator[list[Context]]:
    """Tag samples and gather them: contexts in batches of about one length, those with a prefix apart from the others.

    Parameters
    ----------
    mllm, samples : the model and what to tag; a `Tagged` must name its sample. None, where samples were left out, keeps
        those on either side apart, so that a run that goes on has the batches of one that was not stopped.
    batch_size : contexts in a batch; fewer where they would have more than FULL tokens.
    null : give every sample also a block with the question "N/A".
    fail : what to do with the error of a sample that cannot be tagged; None raises it.
    """
    waiting: dict[tuple[bool, int], list[Context]] = {}
    for group in _groups(mllm, samples, null, fail):
        for context in _contexts(group):
            # lengths within a factor of 1.4, so that little is padding
            kind = context.prefix is not None, int(2 * math.log2(context.shared or len(context.members[0].ids)))
            queue = waiting.setdefault(kind, [])
            queue.append(context)
            longest = max(len(c.members[0].ids) for c in queue)
            if len(queue) == batch_size or (len(queue) + 1) * longest > FULL:
                yield waiting.pop(kind)
    yield from waiting.values()


def _groups(mllm, samples, null, fail) -> Iterator[list[tuple[Tagged, Tagged | None]]]:
    """Runs of samples on one context: (tagged, tagged with the null question) pairs."""
    group: list[tuple[Tagged, Tagged | None]] = []
    like: Prompt | None = None  # the last sample's
    before = ""  # its text in front of the question
    for sample in samples:
        if sample is None:
            like = None
            continue
        if isinstance(sample, Tagged):
            pair, joins, like = (sample, None), False, None
        else:
            try:
                prompt = Prompt(mllm, sample, like=like)
                begin, end = prompt.find_question()
                tagged, blank = prompt.tag(), None
                if null:
                    empty = null_sample(sample, prompt.text[begin:end])
                    blank = Prompt(mllm, empty, like=prompt).tag()
            except SampleError as error:
                if fail is None:
                    raise
                fail(error)
                continue
            same_media = like is not None and (prompt.shares or not (prompt.raw or like.raw))
            joins = same_media and prompt.text[:begin] == before
            pair, like, before = (tagged, blank), prompt, prompt.text[:begin]
        if not joins or len(group) == MOST:
            if group:
                yield group
            group = []
        group.append(pair)
    if group:
        yield group


def _contexts(group: list[tuple[Tagged, Tagged | None]]) -> list[Context]:
    """Cut a group into the prefix that all its sequences share and a block for each; without a prefix, one each."""
    every = [t for pair in group for t in pair if t is not None]
    shared = min(int(t.question[0]) if len(t.question) else t.last for t in every)
    for t in every[1:]:
        n = min(shared, len(t.ids))
        differ = np.flatnonzero(every[0].ids[:n] != t.ids[:n])
        shared = int(differ[0]) if len(differ) else n
    if any(len(t.visual) and t.visual[-1] >= shared for t in every):
        shared = 0
    blocks: dict[tuple, Block] = {}
    for owner, pair in enumerate(group):
        for t in pair:
            if t is None:
                continue
            ids, blank = t.ids[shared:], t is pair[1]
            # null blocks that are the same token for token run once
            blocks[("null", *ids) if blank and shared else (blank, owner)] = Block(ids, owner, blank, t)
    if shared:
        inputs = {k: v[:, :shared] if k in PER_TOKEN else v for k, v in every[0].inputs.items() if torch.is_tensor(v)}
        prefix = Tagged(inputs, every[0].visual, np.empty(0), np.empty(0), np.empty(0), shared - 1)
        return [Context(prefix, list(blocks.values()), [t for t, _ in group], group[0][0].sample.id)]
    out = []
    for owner, (tagged, _) in enumerate(group):  # each sequence runs alone: its block is the whole of it
        own = [b for b in blocks.values() if b.owner == owner]
        for block in own:
            block.owner = 0
        out.append(Context(None, own, [tagged], tagged.sample.id))
    return out


def require_answers(batch: list[Context]) -> None:
    """Raise SampleError where a sample has no answer."""
    for context in batch:
        for tagged in context.members:
            if len(tagged.answer) == 0:
                raise SampleError(tagged.sample.id, "answer", "is missing", "Give the text that the model should say")


def pack(mllm: MLLM, batch: list[Context], alone: bool = False) -> Packed:
    """Make the model's inputs of a batch of contexts, all with a prefix or all without.

    Parameters
    ----------
    mllm, batch : the model and the contexts.
    alone : share nothing: every block is its full sequence.
    """
    return _pack_alone(mllm, batch) if alone or batch[0].prefix is None else _pack_shared(mllm, batch)


def forward(mllm: MLLM, inputs: dict[str, Any]):
    """Run the model where nobody wants logits."""
    return mllm.model(**inputs, use_cache=CACHE in inputs, logits_to_keep=1)


class _Decoded(Exception):
    """Raised where the decoder would begin."""


def prefill(mllm: MLLM, inputs: dict[str, Any]) -> None:
    """`forward`, ROWS tokens at a time where there are more, so that activations do not grow with the context.

    The attention function is called for each chunk behind the chunks before it. Nothing holds N x N elements, and
    there are no logits at all: peak memory is that of keys, values and embeddings, and of one chunk.
    """
    length = inputs["input_ids"].shape[1]
    if length <= ROWS:
        forward(mllm, inputs)
        return
    past = inputs.get(CACHE) or room_for(mllm, length)
    feed = embedded(mllm, {k: v for k, v in inputs.items() if k != CACHE})
    before = past.get_seq_length()
    with own_attention(mllm, HYBRID):
        for i in range(0, length, ROWS):
            part = _chunk(feed, i, min(i + ROWS, length), before)
            mllm.family.decoder(mllm.model)(**part, **{CACHE: past}, use_cache=True)


def _chunk(feed: dict[str, Any], i: int, j: int, before: int) -> dict[str, Any]:
    """The decoder's inputs of the tokens i ... j - 1, `before` cached ones in front of the first."""
    mask = feed.get("attention_mask")
    part = dict(inputs_embeds=feed["inputs_embeds"][:, i:j], position_ids=feed["position_ids"][..., i:j])
    if mask is not None:
        rows = mask if mask.dim() == 2 else mask[:, :, i:j]
        part["attention_mask"] = rows[..., : before + j]
    visual = feed.get("visual_pos_masks")
    if visual is not None and feed.get("deepstack_visual_embeds") is not None:
        order = visual.flatten().cumsum(0).view(visual.shape) - 1  # of the visual tokens among all of the batch
        own = order[:, i:j][visual[:, i:j]]
        part["visual_pos_masks"] = visual[:, i:j]
        part["deepstack_visual_embeds"] = [x[own.to(x.device)] for x in feed["deepstack_visual_embeds"]]
    return part


class _Room(DynamicLayer):
    """A layer of a cache with memory for `room` tokens from the start: chunks are written, nothing is copied."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states, value_states, *args, **kwargs):
        n, new = self.get_seq_length(), (key_states, value_states)
        end = n + key_states.shape[2]
        if end > self.room or key_states.requires_grad:  # autograd would miss what was there before
            self.room = 0
            return super().update(key_states, value_states)
        if not n:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in new]
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, n:end] = x
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def room_for(mllm: MLLM, tokens: int) -> DynamicCache:
    """An empty cache with memory for `tokens` tokens."""
    cache = DynamicCache(config=mllm.text_config)
    cache.layers, cache.layer_class_to_replicate = [_Room(tokens) for _ in cache.layers], None
    return cache


def embedded(mllm: MLLM, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the decoder gets for the model's inputs: embeddings with the visual features in, masks, positions."""
    caught = {}

    def stop(module, args, kwargs):
        caught.update({k: v for k, v in kwargs.items() if v is not None})
        raise _Decoded

    handle = mllm.family.decoder(mllm.model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        mllm.model(**inputs, use_cache=False)
    except _Decoded:
        pass
    finally:
        handle.remove()
    if "inputs_embeds" not in caught:  # a plain language model hands the ids on
        caught["inputs_embeds"] = mllm.model.get_input_embeddings()(caught.pop("input_ids"))
    return {k: v for k, v in caught.items() if k not in ("use_cache", CACHE)}


def behind_prefix(mllm: MLLM, packed: Packed) -> dict[str, Any]:
    """Model inputs of the chunk, with the cache of the prefixes, which run now."""
    if packed.prefix is None:
        return packed.feed
    cache = room_for(mllm, packed.before + packed.feed["input_ids"].shape[1])
    prefill(mllm, packed.prefix | {CACHE: cache})
    return packed.feed | {CACHE: cache}


def _pack_shared(mllm: MLLM, batch: list[Context]) -> Packed:
    device = mllm.device
    inputs, _ = collate([c.prefix for c in batch], pad_id(mllm))
    before, width = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    sequences = [mllm.family.positions(mllm, c.blocks[0].tagged.inputs)[..., 0, :].cpu() for c in batch]
    positions = _pad_left([p[..., : c.shared] for c, p in zip(batch, sequences)], width)
    prefix = to_model(inputs, mllm) | dict(position_ids=positions.to(device))

    size = max(sum(len(b.ids) for b in c.blocks) for c in batch)
    ids = torch.full((len(batch), size), pad_id(mllm))
    chunk = torch.zeros(*positions.shape[:-1], size, dtype=torch.long)
    block_of = torch.full((len(batch), size), -1)
    places = {}
    for c, (context, sequence) in enumerate(zip(batch, sequences)):
        at = 0
        for k, block in enumerate(context.blocks):
            end = at + len(block.ids)
            ids[c, at:end] = torch.from_numpy(block.ids)
            # behind the prefix there is text alone, so that positions go on one by one
            chunk[..., c, at:end] = sequence[..., context.shared][..., None] + torch.arange(end - at)
            block_of[c, at:end] = k
            places[c, k] = (c, width - context.shared, width + at)
            at = end
    inside = (block_of[:, :, None] == block_of[:, None, :]).tril()
    mask = torch.cat([before[:, None].expand(-1, size, -1), inside], 2)[:, None]
    feed = dict(input_ids=ids, position_ids=chunk, attention_mask=mask)
    return Packed(batch, prefix, {k: v.to(device) for k, v in feed.items()}, width, places)


def _pack_alone(mllm: MLLM, batch: list[Context]) -> Packed:
    jobs = [(c, k) for c, context in enumerate(batch) for k in range(len(context.blocks))]
    sequences = [batch[c].blocks[k].tagged for c, k in jobs]
    inputs, _ = collate(sequences, pad_id(mllm))
    width = inputs["input_ids"].shape[1]
    positions = _pad_left([mllm.family.positions(mllm, t.inputs)[..., 0, :].cpu() for t in sequences], width)
    alone = [replace(c, prefix=None) for c in batch]
    places = {job: (j, 0, width - len(t.ids)) for j, (job, t) in enumerate(zip(jobs, sequences))}
    return Packed(alone, None, to_model(inputs, mllm) | dict(position_ids=positions.to(mllm.device)), 0, places)


def _pad_left(places: list[torch.Tensor], width: int) -> torch.Tensor:
    """Position ids (L,) or (3, L) each to one batch (B, width) or (3, B, width)."""
    return torch.stack([torch.nn.functional.pad(p, (width - p.shape[-1], 0)) for p in places], -2)
