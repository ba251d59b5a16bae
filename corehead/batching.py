"""Samples on one context share its prefill: what is packed into a batch, and the one way in which a batch is run.

Samples that follow each other on the same context form a `Context`: one prefix and a `Block` of tokens for each
question. A batch of contexts is fed in two parts, the prefixes and then all blocks as one chunk in which blocks do not
see each other. Where nothing can be shared, each sequence runs alone. Long parts are fed in pieces of PREFILL_CHUNK
tokens, so that activations do not grow with the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention import CACHE, Hook, TokenRoles, hooks, hooks_in_force
from .models import MLLM, PREFILL_CHUNK, free_memory
from .samples import Sample, SampleError, read_messages
from .tagging import PER_TOKEN, Prompt, TaggedSample, same_content

NULL = "N/A"
# questions behind one context in one chunk, whose mask is quadratic in their tokens
MAX_QUESTIONS = 32
# tokens of the contexts of a batch, padding included: a bound on the memory for their keys and values
MAX_TOKENS = 2**17


# --- what samples share


def context_of(sample: Sample) -> list[tuple[str, Any]]:
    """(role, text or medium) of all that stands in front of the question."""
    question = sample.question or ""
    parts = []
    asked = None
    for message in read_messages(sample):
        role = message.get("role")
        for part in message["content"]:
            value = part[part["type"]]
            # the last text that quotes the question, or the user's last of all where none is given, asks it
            if (
                part["type"] == "text"
                and question in value
                and (question or role == "user")
            ):
                asked = len(parts)
            parts.append((role, value))
    if asked is None:
        return parts
    role, text = parts[asked]
    in_front = text.rpartition(question)[0] if question else ""
    return [*parts[:asked], (role, in_front)]


def same_context(a: Sample | TaggedSample | None, b: Sample | TaggedSample | None) -> bool:
    """Whether the same texts and media stand in front of two samples' questions."""
    if not (isinstance(a, Sample) and isinstance(b, Sample)):
        return False
    try:
        first, second = context_of(a), context_of(b)
    except SampleError:  # is raised again where the sample is tagged
        return False
    return len(first) == len(second) and all(
        role == other_role and same_content(value, other)
        for (role, value), (other_role, other) in zip(first, second)
    )


def has_context(sample: Sample) -> bool:
    """Whether anything but the chat template stands in front of the question."""
    return any(not isinstance(value, str) or value for _, value in context_of(sample))


def with_question(sample: Sample, asked: str, question: str) -> Sample:
    """The same sample with the question that it asks replaced by another."""
    messages = read_messages(sample)
    # from the end, since the question may be quoted earlier, too
    for message in reversed(messages):
        for part in reversed(message["content"]):
            if asked in part.get("text", ""):
                in_front, _, behind = part["text"].rpartition(asked)
                part["text"] = in_front + question + behind
                return replace(sample, messages=messages, question=question)
    problem = f"{asked!r} is in no message"
    sample.fail("question", problem, "Quote it as it stands there")


@dataclass
class Block:
    """One question behind a context.

    Attributes
    ----------
    ids : (n,) int64 array
        Token ids behind the prefix.
    owner : int
        Which sample of the context; of a null block, the first that it serves.
    null : bool
        It asks the null question.
    tagged : TaggedSample
        The full sequence.
    serves : dict of int to (E,) int64 array
        Of a null block, the samples that it serves, each with its evidence in the full sequence.
    """

    ids: np.ndarray
    owner: int
    null: bool
    tagged: TaggedSample
    serves: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def answer(self) -> np.ndarray:
        return self.tagged.ids[self.tagged.answer]


@dataclass
class Context:
    """A prefix and the blocks behind it; without a prefix, one sample, and each block is a whole sequence."""

    prefix: TaggedSample | None  # inputs cut to the prefix
    blocks: list[Block]
    members: list[TaggedSample]
    name: str  # of the first sample on it

    @property
    def shared(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else len(self.prefix.ids)

    def null_of(self, asked: Block) -> int | None:
        """The block with the null question in place of a sample's own, if there is one."""
        for k, block in enumerate(self.blocks):
            if asked.owner in block.serves:
                return k
        return None

    def name_of(self, sample: Sample) -> str:
        """Of a sample's context; of a bare question, which shares nothing but the chat template, its own id."""
        return self.name if has_context(sample) else sample.id


def batches(
    mllm: MLLM,
    samples: Iterable[Sample | TaggedSample | None],
    batch_size: int,
    *,
    null: bool = False,
    need_answer: bool = False,
    to_last: bool = False,
    fail: Callable[[SampleError], None] | None = None,
) -> Iterator[list[Context]]:
    """Tag samples and gather them: contexts in batches of about one length, those with a prefix apart from the others.

    Nothing is shared where a hook in force needs every sequence in a batch row of its own.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample, TaggedSample or None
        A `TaggedSample` must name its sample. None, where samples were left out, keeps those on either side apart, so
        that a resumed run has the batches of one that was not stopped.
    batch_size : int
        Contexts in a batch; fewer where they would have more than MAX_TOKENS tokens.
    null : bool
        Give every sample also a block with the question "N/A".
    need_answer : bool
        A sample without an answer is an error.
    to_last : bool
        A question's own tokens belong to the prefix as well, up to the last of the prompt, where no other question
        stands on its context.
    fail : callable, optional
        What to do with the error of a sample that cannot be tagged; None raises it.

    Yields
    ------
    list of Context

    Raises
    ------
    ValueError
        The model is in training mode.
    """
    if mllm.model.training:
        # numbers of dropout are random, and gradient checkpointing runs layers again without hooks
        raise ValueError("the model is in training mode: call mllm.model.eval()")
    waiting: dict[tuple[bool, int, bool], list[Context]] = {}
    alone = any(hook.needs_own_row for hook in hooks_in_force(mllm))
    for group in _groups(mllm, samples, null, need_answer, fail):
        for context in _contexts(group, to_last, alone):
            # half octaves: lengths within a factor of 1.4, so that little is padding
            length = context.shared or len(context.members[0].ids)
            # what has the same token cannot be told apart within a batch
            inputs = context.members[0].inputs
            videos = mllm.family.one_token and "pixel_values_videos" in inputs
            kind = context.prefix is not None, int(2 * math.log2(length)), videos
            queue = waiting.setdefault(kind, [])
            queue.append(context)
            longest = max(len(c.members[0].ids) for c in queue)
            # the batch is full, or one more context, padded to its longest, would be too much
            if len(queue) == batch_size or (len(queue) + 1) * longest > MAX_TOKENS:
                yield waiting.pop(kind)
    yield from waiting.values()


class _Pair(NamedTuple):
    """A sample with its own question and with the null question."""

    tagged: TaggedSample
    null: TaggedSample | None


def _groups(mllm, samples, null, need_answer, fail) -> Iterator[list[_Pair]]:
    """Runs of samples on one context."""
    group: list[_Pair] = []
    last: Sample | TaggedSample | None = None
    prompt: Prompt | None = None
    for sample in samples:
        joins = same_context(sample, last) and len(group) < MAX_QUESTIONS
        if group and not joins:
            yield group
            group = []
        last = sample
        if sample is None:
            continue
        try:
            # the last prompt's media are not read again where they are the same
            pair, prompt = _tagged(mllm, sample, null, like=prompt if joins else None)
            if need_answer and not len(pair.tagged.answer):
                fix = "Give the text that the model should say"
                pair.tagged.sample.fail("answer", "is missing", fix)
        except Exception as error:
            if fail is None:
                raise
            # whatever a sample holds, a run goes on to the next
            if not isinstance(error, SampleError):
                problem = f"cannot be tagged ({type(error).__name__}: {error})"
                error = SampleError(
                    sample.id, "messages", problem, "Give it as Sample describes"
                )
            fail(error)
            continue
        group.append(pair)
    if group:
        yield group


def _tagged(mllm, sample, null: bool, like: Prompt | None) -> tuple[_Pair, Prompt | None]:
    """A sample with its null question, tagged, and its prompt."""
    if isinstance(sample, TaggedSample):
        return _Pair(sample, None), None
    prompt = Prompt(mllm, sample, like=like)
    if not null:
        return _Pair(prompt.tag(), None), prompt
    # where no question is given, the prompt knows which text is taken for it
    begin, end = prompt.find_question()
    blank = with_question(sample, prompt.text[begin:end], NULL)
    return _Pair(prompt.tag(), Prompt(mllm, blank, like=prompt).tag()), prompt


def _contexts(group: list[_Pair], to_last: bool, alone: bool) -> list[Context]:
    """Cut a group into the prefix that all its sequences share and a block for each; without a prefix, one each."""
    shared = _shared_tokens([t for pair in group for t in pair if t is not None], to_last)
    if alone or not shared:
        return [_alone(pair, like=group[0] if shared else pair) for pair in group]
    blocks: dict[tuple, Block] = {}
    for owner, pair in enumerate(group):
        ids = pair.tagged.ids[shared:]
        blocks["own", owner] = Block(ids, owner, null=False, tagged=pair.tagged)
        if pair.null is not None:
            ids = pair.null.ids[shared:]
            # null questions that are equal token for token run once
            block = Block(ids, owner, null=True, tagged=pair.null)
            block = blocks.setdefault(("null", ids.tobytes()), block)
            block.serves[owner] = pair.null.evidence
    first = group[0].tagged
    nothing = np.empty(0, np.int64)
    # all media stand in the prefix, so that one sample's pixels serve the whole group
    inputs = _first_tokens(first.inputs, shared)
    prefix = TaggedSample(
        inputs=inputs,
        visual=first.visual,
        evidence=nothing,
        question=nothing,
        answer=nothing,
        last=shared - 1,
    )
    context = Context(
        prefix=prefix,
        blocks=list(blocks.values()),
        members=[pair.tagged for pair in group],
        name=first.sample.id,
    )
    return [context]


def _first_tokens(inputs: dict[str, Any], n: int) -> dict[str, torch.Tensor]:
    """The inputs (1, L) cut to their first `n` tokens, with all their media."""
    return {name: x[:, :n] if name in PER_TOKEN else x for name, x in inputs.items()}


def _shared_tokens(sequences: list[TaggedSample], to_last: bool) -> int:
    """How many tokens stand in front of every question, the same in all sequences; 0 if a picture stands behind."""
    first = sequences[0]
    # never a token of a question, even if all begin alike: those are the query rows, which a block must hold
    ends = [
        t.last if to_last or not len(t.question) else int(t.question[0]) for t in sequences
    ]
    shared = min(ends)
    for t in sequences[1:]:
        n = min(shared, len(t.ids))
        differ = np.flatnonzero(first.ids[:n] != t.ids[:n])
        shared = int(differ[0]) if len(differ) else n
    behind = any(len(t.visual) and t.visual[-1] >= shared for t in sequences)
    return 0 if behind else shared


def _alone(pair: _Pair, like: _Pair) -> Context:
    """A context of one sample whose sequences are run whole, with the name of another sample on it."""
    blocks = [Block(pair.tagged.ids, 0, null=False, tagged=pair.tagged)]
    if pair.null is not None:
        serves = {0: pair.null.evidence}
        blocks.append(Block(pair.null.ids, 0, null=True, tagged=pair.null, serves=serves))
    return Context(
        prefix=None,
        blocks=blocks,
        members=[pair.tagged],
        name=like.tagged.sample.id,
    )


# --- a batch, as the model is fed it


class Slot(NamedTuple):
    """Where a block stands: its batch row and its first key."""

    row: int
    start: int


@dataclass
class Packed:
    """A batch of contexts as the model is fed it.

    Attributes
    ----------
    contexts : list of Context
    prefix : dict, optional
        Model inputs of the prefixes (P, W), padded on the left; None where nothing is shared.
    chunk : dict
        Model inputs of the tokens behind them (B, S), or of whole sequences.
    prefix_row : (B,) int64 tensor
        The prefix that each row of the chunk stands behind.
    slots : dict
        (context, block) -> Slot.
    roles : TokenRoles
        Of prefix and chunk together, (B, W + S).
    before : int
        W, the keys in front of the chunk; 0 without a prefix.
    """

    contexts: list[Context]
    prefix: dict[str, Any] | None
    chunk: dict[str, Any]
    prefix_row: torch.Tensor
    slots: dict[tuple[int, int], Slot]
    before: int

    def __post_init__(self):
        rows, size = self.chunk["input_ids"].shape
        sets = max(len(c.members) for c in self.contexts)
        self.roles = TokenRoles.empty(rows, sets, self.before + size)
        for (c, k), slot in self.slots.items():
            block = self.contexts[c].blocks[k]
            shared = self.contexts[c].shared
            keys = torch.from_numpy(self.keys(c, k, np.arange(len(block.tagged.ids))))
            evidence_set = None if block.null else block.owner
            self.roles.mark(slot.row, block.tagged, keys, evidence_set, shared)
            # A null question looks for nothing, but the mass that it gives to V* is wanted, also to what stands behind
            # the question.
            for owner, evidence in block.serves.items():
                self.roles.evidence[slot.row, owner, keys[torch.from_numpy(evidence)]] = (
                    True
                )

    def keys(self, c: int, k: int, tokens: np.ndarray) -> np.ndarray:
        """Positions among the keys, padding and prefix included, of tokens of a block's full sequence."""
        shared = self.contexts[c].shared
        behind = self.slots[c, k].start - shared + tokens
        # prefixes are padded on the left
        return np.where(tokens < shared, self.before - shared + tokens, behind)

    def blocks(self) -> Iterator[tuple[int, int, Block]]:
        """(context, block, Block) of all blocks with a slot."""
        for c, k in self.slots:
            yield c, k, self.contexts[c].blocks[k]


def pack(
    mllm: MLLM, batch: list[Context], *, alone: bool = False, apart: bool = False
) -> Packed:
    """Make the model's inputs of a batch of contexts, all with a prefix or all without.

    Parameters
    ----------
    mllm : MLLM
    batch : list of Context
    alone : bool
        Share nothing: every block is its full sequence.
    apart : bool
        Every question in a batch row of its own behind its prefix.
    """
    if alone or batch[0].prefix is None:
        return _pack_alone(mllm, batch)
    return _pack_behind(mllm, batch, apart)


def cut_off(context: Context, *, whole_answer: bool) -> Context:
    """The same context without its answers, or without the last token of each, which predicts nothing."""
    blocks = []
    for block in context.blocks:
        tagged = block.tagged
        length = tagged.last + 1 if whole_answer else len(tagged.ids) - 1
        tagged = replace(
            tagged,
            inputs=_first_tokens(tagged.inputs, length),
            answer=tagged.answer[tagged.answer < length],
        )
        blocks.append(replace(block, ids=tagged.ids[context.shared :], tagged=tagged))
    return replace(context, blocks=blocks)


def _pack_behind(mllm: MLLM, batch: list[Context], apart: bool) -> Packed:
    """Prefixes, and a chunk with all blocks of a context in one row, or with a row for each."""
    prefixes = collate([c.prefix for c in batch], pad_id(mllm))
    real = prefixes["attention_mask"].bool()
    width = prefixes["input_ids"].shape[1]
    # one block's whole sequence tells the positions of the prefix and where those behind it go on
    sequences = [_positions(mllm, c.blocks[0].tagged) for c in batch]
    before = [p[..., : c.shared] for c, p in zip(batch, sequences)]
    prefix = to_model(prefixes, mllm) | dict(
        position_ids=_pad_left(before, width).to(mllm.device)
    )

    slots, prefix_row, size = _slots(batch, apart, width)
    ids = torch.full((len(prefix_row), size), pad_id(mllm))  # (B, S)
    # (B, S) or (3, B, S): Qwen's multimodal RoPE has a position in time, height and width
    positions = ids.new_zeros(*sequences[0].shape[:-1], *ids.shape)
    block_of = torch.full(ids.shape, -1)
    for (c, k), slot in slots.items():
        block = batch[c].blocks[k]
        here = slice(slot.start - width, slot.start - width + len(block.ids))
        ids[slot.row, here] = torch.from_numpy(block.ids)
        # Behind the prefix there is text alone, so that positions go on one by one. Each block goes on from the prefix
        # and not from the block before it, as if it stood there alone.
        first = sequences[c][..., batch[c].shared, None]
        positions[..., slot.row, here] = first + torch.arange(len(block.ids))
        block_of[slot.row, here] = k
    if apart:
        mask = torch.cat([real[prefix_row], block_of >= 0], 1).long()  # (B, W + S)
    else:
        # (B, 1, S, W + S): every block sees the prefix and, causally, itself; padding (-1) counts as one more block
        inside = (block_of[:, :, None] == block_of[:, None, :]).tril()  # (B, S, S)
        before = real[:, None].expand(-1, size, -1)  # (B, S, W)
        mask = torch.cat([before, inside], 2)[:, None]
    chunk = dict(input_ids=ids, position_ids=positions, attention_mask=mask)
    chunk = {name: value.to(mllm.device) for name, value in chunk.items()}
    return Packed(
        contexts=batch,
        prefix=prefix,
        chunk=chunk,
        prefix_row=prefix_row,
        slots=slots,
        before=width,
    )


def _slots(
    batch: list[Context], apart: bool, width: int
) -> tuple[dict[tuple[int, int], Slot], torch.Tensor, int]:
    """Where blocks stand behind prefixes of `width` tokens; the prefix (B,) of each row; the length of the chunk."""
    in_rows = [(c, list(range(len(context.blocks)))) for c, context in enumerate(batch)]
    if apart:
        in_rows = [(c, [k]) for c, blocks in in_rows for k in blocks]
    lengths = [sum(len(batch[c].blocks[k].ids) for k in blocks) for c, blocks in in_rows]
    size = max(lengths)
    slots = {}
    for row, (c, blocks) in enumerate(in_rows):
        # at the right end: the last column then holds the last token of every row, behind which a model goes on writing
        start = width + size - lengths[row]
        for k in blocks:
            slots[c, k] = Slot(row, start)
            start += len(batch[c].blocks[k].ids)
    return slots, torch.tensor([c for c, _ in in_rows]), size


def _pack_alone(mllm: MLLM, batch: list[Context]) -> Packed:
    """Whole sequences, one a row."""
    alone = []
    for context in batch:
        blocks = [replace(block, ids=block.tagged.ids) for block in context.blocks]
        alone.append(replace(context, prefix=None, blocks=blocks))
    tagged = [block.tagged for context in alone for block in context.blocks]
    slots, prefix_row, width = _slots(alone, apart=True, width=0)
    positions = _pad_left([_positions(mllm, t) for t in tagged], width)
    chunk = to_model(collate(tagged, pad_id(mllm)), mllm)
    chunk |= dict(position_ids=positions.to(mllm.device))
    return Packed(
        contexts=alone,
        prefix=None,
        chunk=chunk,
        prefix_row=prefix_row,
        slots=slots,
        before=0,
    )


def collate(tagged: Sequence[TaggedSample], pad_token: int) -> dict[str, torch.Tensor]:
    """Pad sequences on the left to one batch, input_ids and attention_mask (B, L)."""
    length = max(len(t.ids) for t in tagged)
    out: dict[str, torch.Tensor] = {}
    # samples may hold different media
    for name in dict.fromkeys(name for t in tagged for name in t.inputs):
        rows = [t.inputs[name] for t in tagged if name in t.inputs]
        if name in PER_TOKEN:
            fill = pad_token if name == "input_ids" else 0
            rows = [pad(row, (length - row.shape[1], 0), value=fill) for row in rows]
        # pictures have different numbers of crops, (1, crops, 3, S, S), or sizes of their own, (1, 3, H, W)
        elif name in ("pixel_values", "pixel_attention_mask"):
            most = np.max([row.shape for row in rows], 0)
            rows = [_grown(row, most) for row in rows]
        # pictures are large: no needless copy
        out[name] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return out


def _grown(pixels: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    """A tensor with zeros behind it, up to a shape in all dimensions but the first."""
    missing = (shape - pixels.shape)[:0:-1]  # `pad` begins with the last dimension
    return pad(pixels, [n for more in missing.tolist() for n in (0, more)])


def pad_id(mllm: MLLM) -> int:
    """The token to pad with; which one does not matter behind the attention mask."""
    token = mllm.text_config.pad_token_id
    return 0 if token is None else token


def to_model(inputs: dict[str, Any], mllm: MLLM) -> dict[str, torch.Tensor]:
    """Processor output on the model's device, pictures in its dtype."""
    moved = {}
    for name, value in inputs.items():
        dtype = mllm.model.dtype if value.is_floating_point() else value.dtype
        moved[name] = value.to(mllm.device, dtype)
    return moved


def _positions(mllm: MLLM, tagged: TaggedSample) -> torch.Tensor:
    """Position ids (L,) or (3, L) of one sequence."""
    return mllm.family.positions(mllm.model, tagged.inputs)[..., 0, :].cpu()


def _pad_left(positions: list[torch.Tensor], width: int) -> torch.Tensor:
    """Position ids (L,) or (3, L) each to one batch (B, width) or (3, B, width)."""
    return torch.stack([pad(p, (width - p.shape[-1], 0)) for p in positions], -2)


# --- running a batch


class Condition:
    """What `evaluate` compares, and how it is applied. As it stands here it is the model as it is.

    Attributes
    ----------
    key : str
        What tells it from others in a store.
    group : hashable
        Conditions of one group run side by side as batch rows, and have the following in common.
    leaves_context_intact : bool
        No token in front of the question is touched, so that the context's prefill is shared.
    leaves_prompt_intact : bool
        Nor is any of the question but the last of the prompt, which is worth a longer prefix.
    needs_own_row : bool
        Every sequence must stand in a batch row of its own.
    first_layer : int
        No layer in front of this one is touched, so that all conditions share what those compute.
    """

    key = ""
    group: Hashable = None
    first_layer = 0
    leaves_context_intact = True
    leaves_prompt_intact = False  # a single condition gains nothing by a longer prefix
    needs_own_row = False

    def check(self, mllm: MLLM) -> None:
        """Raise ValueError where it does not fit the model."""

    def hooks(
        self, mllm: MLLM, beside: Sequence[Any] = (), rows: int = 1
    ) -> dict[int, list[Hook]]:
        """Hooks by layer for a batch in which each condition of `beside`, this one first, has `rows` rows."""
        return {}


class _Stop(Exception):
    """Raised where a run is cut off, with the hidden states there, if it is in front of a layer."""

    def __init__(self, hidden: torch.Tensor | None = None):
        super().__init__()
        self.hidden = hidden


def embedded(mllm: MLLM, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the decoder gets for the model's inputs: embeddings with the visual features in, masks, positions."""
    caught = {}

    # How features get into the embeddings differs from model to model. The model's own code does it, in one pass over
    # whole sequences; it is cut off in front of the decoder, which is then fed in chunks and under many conditions.
    def stop(module, args, kwargs):
        caught.update({k: v for k, v in kwargs.items() if v is not None})
        raise _Stop

    with mllm.decoder.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Stop):
        mllm.model(**inputs, use_cache=False)
    if "inputs_embeds" not in caught:  # a plain language model hands the ids on
        caught["inputs_embeds"] = mllm.model.get_input_embeddings()(caught.pop("input_ids"))
    # Gemma 3 makes a mask for each kind of layer; the windows are laid over the full one where layers attend
    if isinstance(caught.get("attention_mask"), dict):
        caught["attention_mask"] = caught["attention_mask"]["full_attention"]
    return {k: v for k, v in caught.items() if k not in ("use_cache", CACHE)}


class _Room(DynamicLayer):
    """A layer of a cache with memory for `room` tokens from the start: chunks are written, nothing is copied.

    The layer that it replaces concatenates, which copies all tokens for each chunk and holds them twice meanwhile.

    Attributes
    ----------
    length : int
        Tokens that went by.
    buffers : list of tensor
        Keys and values (B, Hkv, room, D); empty as long as the layer is passed over.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.length = 0
        self.buffers: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        new = key_states, value_states
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            # values may have another D than keys
            self.buffers = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in new]
        begin = self.length
        self.length = begin + key_states.shape[2]
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, begin : self.length] = x
        return [buffer[:, :, : self.length] for buffer in self.buffers]

    def get_seq_length(self) -> int:
        return self.length

    def rows(self, rows: torch.Tensor) -> _Room:
        """A copy of some batch rows."""
        copy = _Room(self.room)
        copy.buffers = [buffer[rows.to(buffer.device)] for buffer in self.buffers]
        copy.length = self.length
        return copy


def room_for(mllm: MLLM, tokens: int) -> DynamicCache:
    """An empty cache with memory for `tokens` tokens."""
    cache = DynamicCache(config=mllm.text_config)
    cache.layers = [_Room(tokens) for _ in cache.layers]
    return cache


class Wanted(NamedTuple):
    """Which hidden states to keep: those of `tokens` (n,) in batch rows `rows` (n,)."""

    rows: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def last(cls, rows: int, length: int) -> Wanted:
        """Of the last of `length` tokens in each row."""
        return cls(torch.arange(rows), torch.full((rows,), length - 1))


@dataclass
class Entry:
    """A layer that conditions enter the decoder at, and what goes into it: what no condition has touched.

    Attributes
    ----------
    layer : int
    prefix, chunk : tensor, optional
        Hidden states (P, W, hidden) and (B, S, hidden); None in front of the first layer, and of a prefix that is
        taken from a cache.
    """

    layer: int = 0
    prefix: torch.Tensor | None = None
    chunk: torch.Tensor | None = None


class Feed:
    """A packed batch that media have been read into once, to be run under any number of conditions.

    Parameters
    ----------
    mllm : MLLM
    packed : Packed
    new_tokens : int
        So many at most are to be written.
    """

    def __init__(self, mllm: MLLM, packed: Packed, new_tokens: int = 0):
        self.mllm = mllm
        self.packed = packed
        self.new_tokens = new_tokens
        self.prefix = None
        if packed.prefix is None:
            self.chunk = embedded(mllm, packed.chunk)
        else:
            self.prefix = embedded(mllm, packed.prefix)
            # questions are text alone, whose embeddings need no vision tower
            self.chunk = dict(packed.chunk)
            ids = self.chunk.pop("input_ids")
            self.chunk["inputs_embeds"] = mllm.model.get_input_embeddings()(ids)
        # of the prefixes, which no condition has touched
        self._intact: DynamicCache | None = None
        # how far up the model was run as it is
        self._reached = Entry()

    def cost(self, intact: bool) -> int:
        """Tokens of one run, padding included; with intact contexts those are copied, eight in the time of one."""
        rows, size = self.chunk["inputs_embeds"].shape[:2]
        prefixes = rows / 8 if intact else len(self.packed.contexts)
        return rows * size + int(prefixes * self.packed.before)

    def copies(self) -> int:
        """How many conditions' keys and values fit side by side into half of the memory that is free."""
        mllm = self.mllm
        tokens = self.packed.roles.roles.numel()
        size = 2 * mllm.n_layers * mllm.n_kv_heads * mllm.head_dim * tokens
        free = free_memory(str(mllm.device)) // 2
        return free // (size * mllm.model.dtype.itemsize)

    def run(
        self, conditions: Sequence[Condition] = (Condition(),), wanted: Wanted | None = None
    ) -> torch.Tensor | None:
        """Run the decoder over the batch under conditions of one group, side by side.

        Layers that none of them touches run once for all calls, best in ascending order of `Condition.first_layer`.

        Parameters
        ----------
        conditions : sequence of Condition
        wanted : Wanted, optional

        Returns
        -------
        (conditions, n, hidden) tensor of the wanted hidden states, or None
        """
        entry = self._entry(conditions)
        cache = self._cache(conditions, entry)
        return self._run_chunk(conditions, cache, entry, wanted)

    def write(self, conditions: Sequence[Condition]) -> list[list[list[int]]]:
        """Let the model write greedily behind every row, under conditions of one group, side by side.

        A row ends with the generation configuration's end token, which is left out, or after `new_tokens`.

        Parameters
        ----------
        conditions : sequence of Condition

        Returns
        -------
        list (conditions) of lists (rows) of token ids
        """
        mllm = self.mllm
        times = len(conditions)
        rows, size = self.chunk["inputs_embeds"].shape[:2]
        # what is written goes through all layers, and sees their keys
        cache = self._cache(conditions, Entry())
        ends = mllm.model.generation_config.eos_token_id  # a number, a list of them or None
        ends = torch.tensor([] if ends is None else ends, device=mllm.device)
        # the last token of every row, as the first step goes on from it; the mask (B, W + S) grows with each step
        last = {
            "position_ids": self.chunk["position_ids"][..., -1:],
            "attention_mask": self.packed.chunk["attention_mask"],
        }
        step = _repeated(last, times)
        written: list[list[int]] = [[] for _ in range(times * rows)]
        # rows that have not ended; the others run along, for their keys stand in the same cache
        going = torch.ones(times * rows, dtype=torch.bool, device=mllm.device)
        with self._applied(conditions, self.packed.roles):
            behind = Wanted.last(rows, size)
            hidden = decode(mllm, self.chunk, cache, times, behind).flatten(0, 1)
            for _ in range(self.new_tokens):
                token = mllm.logits(hidden).argmax(-1)
                going &= ~torch.isin(token, ends)
                if not going.any():
                    break
                for row in going.nonzero()[:, 0].tolist():
                    written[row].append(int(token[row]))
                step["inputs_embeds"] = mllm.model.get_input_embeddings()(token[:, None])
                step["position_ids"] = step["position_ids"] + 1
                step["attention_mask"] = pad(step["attention_mask"], (0, 1), value=1)
                hidden = decode(mllm, step, cache, 1, Wanted.last(times * rows, 1))[0]
        return [written[i * rows : (i + 1) * rows] for i in range(times)]

    def _applied(self, conditions: Sequence[Condition], roles: TokenRoles):
        """The hooks of conditions that have the batch rows of these roles each."""
        # the first of a group makes the hooks for all: one hook a layer tells the batch rows apart
        by_layer = conditions[0].hooks(self.mllm, conditions, len(roles.samples))
        return hooks(self.mllm, by_layer, roles.repeat(len(conditions)))

    def _entry(self, conditions: Sequence[Condition]) -> Entry:
        """Where conditions of one group enter the decoder; the model as it is runs on to there."""
        layer = min(condition.first_layer for condition in conditions)
        # contexts around this run may touch any layer
        if not layer or hooks_in_force(self.mllm):
            return Entry()
        own_prefix = self.prefix is not None and not conditions[0].leaves_context_intact
        entry = self._reached
        # it is further up already, or came there for conditions that take their prefix from elsewhere
        if layer < entry.layer or own_prefix != (entry.prefix is not None):
            entry = Entry()
        if layer > entry.layer:
            intact = (Condition(),)
            prefix = None
            if own_prefix:
                cache, prefix = self._run_prefix(intact, entry, stop=layer)
                cache = self._in_rows(cache, intact, entry)
            else:
                cache = self._cache(intact, entry)
            chunk = self._run_chunk(intact, cache, entry, stop=layer)
            entry = self._reached = Entry(layer, prefix, chunk)
        return entry

    def _cache(self, conditions: Sequence[Condition], entry: Entry) -> DynamicCache | None:
        """A cache that holds the prefix of every row, as the conditions leave it, from the layer of an entry on."""
        if self.prefix is None:
            return self._room() if self.new_tokens else None
        if not conditions[0].leaves_context_intact:
            cache, _ = self._run_prefix(conditions, entry)
            return self._in_rows(cache, conditions, entry)
        # one prefill for all such conditions, now and later
        if self._intact is None:
            self._intact, _ = self._run_prefix((Condition(),), Entry())
        return self._in_rows(self._intact, conditions, entry)

    def _room(self) -> DynamicCache:
        """An empty cache for the batch and what is written behind it."""
        return room_for(self.mllm, self.packed.roles.roles.shape[1] + self.new_tokens)

    def _in_rows(
        self, cache: DynamicCache, conditions: Sequence[Condition], entry: Entry
    ) -> DynamicCache:
        """A cache of prefixes, for each row of the chunk the one that it stands behind."""
        # the run before may have written its chunk behind the prefixes
        for layer in cache.layers:
            layer.length = self.packed.before
        held = len(cache.layers[entry.layer].buffers[0])
        # all conditions share the prefixes, or each has its own
        step = len(self.packed.contexts) if held > len(self.packed.contexts) else 0
        # (conditions B,), the row of the cache that holds the prefix of each row
        rows = self.packed.prefix_row + step * torch.arange(len(conditions))[:, None]
        # one row for each prefix: no copy, for the chunk is written into the room behind it
        if rows.numel() == held:
            return cache
        copied = self._room()
        # nobody reads what is passed over
        passed, others = cache.layers[: entry.layer], cache.layers[entry.layer :]
        copied.layers = [*passed, *(layer.rows(rows.flatten()) for layer in others)]
        return copied

    def _run_prefix(
        self, conditions: Sequence[Condition], entry: Entry, stop: int | None = None
    ) -> tuple[DynamicCache, torch.Tensor | None]:
        """A cache with the prefixes under each condition, from a layer on; and what goes into layer `stop`."""
        # roles are those of batch rows; all rows behind one prefix have the same in front of them
        _, first_rows = np.unique(self.packed.prefix_row, return_index=True)
        roles = self.packed.roles.select(torch.from_numpy(first_rows))
        cache = self._room()
        feed = self.prefix | {"hidden": entry.prefix}
        with self._applied(conditions, roles):
            times = len(conditions)
            hidden = decode(self.mllm, feed, cache, times, first=entry.layer, stop=stop)
        return cache, hidden

    def _run_chunk(
        self,
        conditions: Sequence[Condition],
        cache: DynamicCache | None,
        entry: Entry,
        wanted: Wanted | None = None,
        stop: int | None = None,
    ) -> torch.Tensor | None:
        """The tokens behind the prefixes: the wanted hidden states, or what goes into layer `stop`."""
        feed = self.chunk | {"hidden": entry.chunk}
        times = len(conditions)
        with self._applied(conditions, self.packed.roles):
            return decode(self.mllm, feed, cache, times, wanted, entry.layer, stop)


@torch.inference_mode()
def run_unpadded(
    mllm: MLLM, batch: Sequence[TaggedSample], by_layer: Mapping[int, Sequence[Hook]]
) -> None:
    """Samples of one length through the decoder, without padding, for what hooks (by layer) see of them."""
    inputs = to_model(collate(batch, pad_id(mllm)), mllm)
    with hooks(mllm, by_layer, TokenRoles.of(batch)):
        decode(mllm, embedded(mllm, inputs))


def decode(
    mllm: MLLM,
    feed: dict[str, Any],
    cache: DynamicCache | None = None,
    times: int = 1,
    wanted: Wanted | None = None,
    first: int = 0,
    stop: int | None = None,
) -> torch.Tensor | None:
    """Run the decoder over a batch, `times` times over, PREFILL_CHUNK tokens at a time.

    The attention function is called for each chunk behind the chunks before it. Nothing holds N x N elements, and
    there are no logits: peak memory is that of keys, values and embeddings, and of one chunk.

    Parameters
    ----------
    mllm : MLLM
    feed : dict
        The decoder's inputs, as `embedded` makes them; with ``hidden`` (B, N, hidden), if it begins higher up.
    cache : DynamicCache, optional
        What was fed before.
    times : int
    wanted : Wanted, optional
    first : int
        The layer to begin with.
    stop : int, optional
        The layer to stop in front of.

    Returns
    -------
    (times, n, hidden) tensor of the wanted hidden states, or (times B, N, hidden) of what goes into layer `stop`, or
    None
    """
    length = feed["inputs_embeds"].shape[1]
    # a single chunk, with nothing cached in front of it, needs no cache
    if cache is None and length > PREFILL_CHUNK:
        cache = room_for(mllm, length)
    before = cache.get_seq_length() if cache is not None else 0
    hidden = None
    at_stop = []
    start = 0
    for end in _chunk_ends(feed, before):
        part = feed if end - start == length else _tokens(feed, start, end, before)
        # repeated chunk by chunk, so that the embeddings of a long context are held once
        inputs = _repeated(part, times) | {CACHE: cache, "use_cache": cache is not None}
        states = _run_layers(mllm.decoder, inputs, first, stop)
        if stop is not None:
            at_stop.append(states)
        if wanted is not None:
            states = states.unflatten(0, (times, -1))  # (times, B, n, hidden)
            if hidden is None:
                hidden = states.new_empty(times, len(wanted.rows), states.shape[-1])
            here = (wanted.tokens >= start) & (wanted.tokens < end)
            rows = wanted.rows[here]
            tokens = wanted.tokens[here] - start
            hidden[:, here.to(hidden.device)] = states[:, rows, tokens]
        start = end
    return torch.cat(at_stop, 1) if at_stop else hidden


@contextmanager
def _passed_over(layer: torch.nn.Module, room: _Room | None) -> Iterator[None]:
    """Let a layer compute nothing, and its cache only count."""

    def forward(hidden_states, *args, **kwargs):
        # a decoder asks its first layer how much is cached
        if room is not None:
            room.length += hidden_states.shape[1]
        return hidden_states

    own = vars(layer).get("forward")  # accelerate puts one there
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _run_layers(
    decoder: torch.nn.Module, inputs: dict[str, Any], first: int, stop: int | None
) -> torch.Tensor:
    """The decoder from layer `first` on, where ``hidden`` goes in, to its end or to what goes into layer `stop`."""
    layers = decoder.layers
    hidden = inputs.pop("hidden", None)
    rooms = inputs[CACHE].layers if inputs[CACHE] is not None else [None] * first

    # in the place of whatever comes from below, features of the vision tower (deepstack) and all
    def enter(layer, args):
        return hidden, *args[1:]

    def leave(layer, args):
        raise _Stop(args[0])

    with ExitStack() as stack:
        for layer, room in zip(layers[:first], rooms):
            stack.enter_context(_passed_over(layer, room))
        if first:
            stack.enter_context(layers[first].register_forward_pre_hook(enter))
        if stop is not None:
            stack.enter_context(layers[stop].register_forward_pre_hook(leave))
        try:
            return decoder(**inputs).last_hidden_state
        except _Stop as stopped:
            return stopped.hidden


def _chunk_ends(feed: dict[str, Any], before: int) -> list[int]:
    """Where chunks of PREFILL_CHUNK tokens end: a picture whose tokens attend both ways (Gemma 3) stays in one."""
    length = feed["inputs_embeds"].shape[1]
    mask = feed.get("attention_mask")
    if length <= PREFILL_CHUNK or mask is None or mask.dim() == 2:
        return [*range(PREFILL_CHUNK, length, PREFILL_CHUNK), length]
    allowed = mask if mask.dtype == torch.bool else mask == 0
    seen = allowed.any(0)[0, :, before : before + length]  # (L, L)
    last = length - seen.flip(1).to(torch.uint8).argmax(1)
    # how many of these tokens are seen by any up to each one
    reach = torch.where(seen.any(1), last, 0).cummax(0).values.cpu()
    # a chunk may end where none of its tokens sees a later one
    ends = torch.nonzero(reach <= torch.arange(1, length + 1))[:, 0] + 1
    chosen = [0]
    for end, following in zip(ends.tolist(), [*ends[1:].tolist(), math.inf]):
        if following - chosen[-1] > PREFILL_CHUNK:
            chosen.append(end)
    return chosen[1:]


def _tokens(feed: dict[str, Any], start: int, stop: int, before: int) -> dict[str, Any]:
    """The decoder's inputs of the tokens start ... stop - 1, `before` cached ones in front of the first."""
    part = dict(
        inputs_embeds=feed["inputs_embeds"][:, start:stop],
        position_ids=feed["position_ids"][..., start:stop],
    )
    if feed.get("hidden") is not None:
        part["hidden"] = feed["hidden"][:, start:stop]
    mask = feed.get("attention_mask")
    if mask is not None:
        rows = mask if mask.dim() == 2 else mask[:, :, start:stop]
        # keys from the very first on, cached ones included, up to the chunk's last
        part["attention_mask"] = rows[..., : before + stop]
    # Qwen3-VL adds features of the vision tower in the first layers as well (deepstack). They are a list over layers of
    # (visual tokens of the batch, hidden), row by row: those of a chunk do not stand together.
    visual = feed.get("visual_pos_masks")
    features = feed.get("deepstack_visual_embeds")
    if visual is not None and features is not None:
        # which of all visual tokens of the batch each one is
        order = visual.flatten().cumsum(0).view(visual.shape) - 1
        in_chunk = order[:, start:stop][visual[:, start:stop]]
        part["visual_pos_masks"] = visual[:, start:stop]
        part["deepstack_visual_embeds"] = [x[in_chunk.to(x.device)] for x in features]
    return part


def _repeated(feed: dict[str, Any], times: int) -> dict[str, Any]:
    """The decoder's inputs with the batch `times` times over."""
    if times == 1:
        return feed
    wide = {}
    for name, value in feed.items():
        if name == "deepstack_visual_embeds":
            value = [x.repeat(times, 1) for x in value]
        elif name == "position_ids":
            # (B, N) or (3, B, N): the batch does not always come first
            value = value.repeat(*[1] * (value.dim() - 2), times, 1)
        elif torch.is_tensor(value) and value.dim():
            value = value.repeat(times, *[1] * (value.dim() - 1))
        wide[name] = value
    return wide
