"""From evidence to token indices: V*, and where the question and the answer stand.

Two constructions of the paper are here beside our own. *Geometry* (the default) asks the family which pixels every
visual token looks at and takes those that meet the evidence. *Markers* (eqs. 6-8, 11-13) wraps the evidence in boundary
markers, scans the tagged ids once and maps what lies between back to the untagged prompt. *Counting* (eqs. 9-10, 14
and the cumulative offsets for tiles) cuts the visual tokens into one block a picture.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .models import MLLM, Medium
from .samples import Frames, Pages, Region, Sample, SampleError, Span, Tube

MARKERS = "<GT_START>", "<GT_END>"


@dataclass
class Tagged:
    """A tokenised sample and the indices that scoring needs.

    Attributes
    ----------
    inputs : what the model takes, batch of one on the CPU; input_ids (1, L) end with the answer, if there is one.
    visual : (n,) int64, tokens that stand for visual features.
    target : (n,) int64, V*: the tokens of the evidence.
    question : (n,) int64, tokens of the question's text.
    answer : (n,) int64, tokens of the answer (teacher-forced), empty without one.
    last : int, the last token of the prompt, which predicts the answer's first.
    image_grid : geometry of every image and video, for drawing.
    sample : what was tagged.
    """

    inputs: dict[str, torch.Tensor]
    visual: np.ndarray
    target: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    last: int
    image_grid: list[Medium] = field(default_factory=list)
    sample: Sample | None = None

    @property
    def ids(self) -> np.ndarray:
        """(L,) int64 token ids."""
        return self.inputs["input_ids"][0].numpy()

    def asking(self) -> np.ndarray:
        """Tokens that may look for the evidence: the question's, and all behind question and context."""
        end = max(int(part[-1]) for part in (self.visual, self.target, self.question, [-1]) if len(part))
        return np.union1d(np.setdiff1d(self.question, self.target), np.arange(end + 1, len(self.ids)))

    def shifted(self, by: int) -> Tagged:
        """The same tokens in a row that has `by` tokens of padding on the left."""
        move = {name: getattr(self, name) + by for name in ("visual", "target", "question", "answer", "last")}
        return replace(self, **move, image_grid=[replace(m, tokens=m.tokens + by) for m in self.image_grid])


def tag(mllm: MLLM, sample: Sample, construction: str = "geometry") -> Tagged:
    """Tokenise a sample by the model's own processor and find its tokens.

    Parameters
    ----------
    mllm : the model whose processor and geometry count.
    sample : messages, evidence, answer.
    construction : "geometry" for any evidence; "markers" for Pages and Span; "counting" for Pages. All three give the
        same target wherever they apply.

    Returns
    -------
    Tagged

    Raises
    ------
    SampleError : evidence that does not fit the sample, media that cannot be read, a prompt that is too long. The
        message names sample, field and mend.
    """
    return Prompt(mllm, sample).tag(construction)


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def with_text(inputs: dict[str, Any], keep: int, ids) -> dict[str, Any]:
    """The first `keep` tokens of a processor's output and then text tokens, in every tensor with one entry a token."""
    new = dict(inputs)
    for name in PER_TOKEN:
        if name in inputs:
            fill = torch.tensor(ids) if name == "input_ids" else torch.full((len(ids),), int(name == "attention_mask"))
            new[name] = torch.cat([inputs[name][:, :keep], fill[None].to(inputs[name].dtype)], 1)
    return new


def collate(tagged: list[Tagged], pad: int) -> tuple[dict[str, torch.Tensor], list[Tagged]]:
    """Pad rows on the left to one batch; the tags move along.

    Parameters
    ----------
    tagged : samples of one model.
    pad : token id to pad with.

    Returns
    -------
    inputs : dict of tensors, input_ids and attention_mask (B, L).
    tagged : the same samples with shifted indices.
    """
    length = max(t.inputs["input_ids"].shape[1] for t in tagged)
    shifts = [length - t.inputs["input_ids"].shape[1] for t in tagged]
    out: dict[str, Any] = {}
    for name in dict.fromkeys(name for t in tagged for name in t.inputs):
        rows = [t.inputs[name] for t in tagged if name in t.inputs]
        if name in PER_TOKEN:
            fill = pad if name == "input_ids" else 0
            rows = [torch.nn.functional.pad(row, (by, 0), value=fill) for row, by in zip(rows, shifts, strict=True)]
        elif name == "pixel_values" and rows[0].dim() == 5:  # anyres: (1, crops, 3, S, S), crops padded
            crops = max(row.shape[1] for row in rows)
            rows = [torch.nn.functional.pad(row, (0, 0) * 3 + (0, crops - row.shape[1])) for row in rows]
        out[name] = rows[0] if len(rows) == 1 else torch.cat(rows)  # pictures are large: no needless copy
    return out, [t.shifted(by) for t, by in zip(tagged, shifts, strict=True)]


def pad_id(mllm: MLLM) -> int:
    """The token to pad with; which one does not matter behind the attention mask."""
    pad = mllm.text_config.pad_token_id
    return 0 if pad is None else pad


def to_model(inputs: dict[str, Any], mllm: MLLM) -> dict[str, torch.Tensor]:
    """Processor output on the model's device, pictures in its dtype."""
    cast = {k: v.to(mllm.device) for k, v in inputs.items()}
    return {k: v.to(mllm.model.dtype) if v.is_floating_point() else v for k, v in cast.items()}


def to_image(value: Any, sample_id: str, where: str) -> Image.Image:
    """A PIL image from what a message holds: a PIL image, an array (H, W, 3) or (H, W) uint8, or a path."""
    try:
        if isinstance(value, Image.Image):
            value.load()
            return value.convert("RGB")
        if isinstance(value, (str, os.PathLike)):
            with Image.open(value) as image:
                return image.convert("RGB")
        array = np.asarray(value)
        if array.dtype == np.uint8 and array.ndim in (2, 3) and array.size:
            return Image.fromarray(array).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(
            sample_id, where, f"cannot be read ({error})", "Give a whole image file, a PIL image or a uint8 array"
        ) from error
    raise SampleError(
        sample_id, where, f"is no image ({type(value).__name__})", "Give a PIL image, a path or a uint8 array (H, W, 3)"
    )


def same_content(a: Any, b: Any) -> bool:
    """Whether two media are one object, or have the same content."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, (str, os.PathLike)):
        return a == b
    try:
        return a == b if isinstance(a, Image.Image) else bool(np.array_equal(a, b))
    except Exception:  # what cannot be read is reported where it is read
        return False


def _join(parts: list[dict]) -> str:
    return "".join(part["text"] for part in parts)


class Prompt:
    """A rendered and processed sample: text, ids, geometry, and the way from characters to tokens.

    Parameters
    ----------
    mllm, sample : what to process.
    like : an earlier prompt. Where it has the same media (the same objects, or equal ones) behind the same text,
        their preprocessing is not done again: only the text behind the last of them is tokenised.
    """

    def __init__(self, mllm: MLLM, sample: Sample, like: Prompt | None = None):
        self.mllm, self.sample = mllm, sample
        self._find_media()
        self.text = self._render(sample.messages)
        self._tokenise_text()
        self.shares = like is not None and self._same_media(like)
        if self.shares:
            self.images, self.videos, self.media, self.visual = like.images, like.videos, like.media, like.visual
            self.inputs = with_text(like.inputs, like.after_media, self.plain[self.text_start :])
            self.ids = self.inputs["input_ids"][0].numpy()
        else:
            self._read_media()
            self.inputs = self._process(mllm.processor, self.text)
            self.ids = self.inputs["input_ids"][0].numpy()
            self.visual = np.flatnonzero(np.isin(self.ids, mllm.family.visual_ids(mllm.model.config)))
            self._measure()
        self._align()

    def tag(self, construction: str = "geometry") -> Tagged:
        """Find target, question and answer: see `tag`."""
        if construction not in _TARGETS:
            raise ValueError(f"construction={construction!r}: take one of {', '.join(map(repr, _TARGETS))}")
        target = _TARGETS[construction](self)
        question = self.text_tokens(*self.find_question())
        inputs, length, answer = self.inputs, len(self.ids), np.empty(0, np.int64)
        if self.sample.answer is not None:
            ids = self.mllm.tokenizer(self.sample.answer, add_special_tokens=False)["input_ids"]
            if not ids:
                self._fail("answer", "is empty", "Give the text of the answer, or None")
            answer = length + np.arange(len(ids))
            inputs = with_text(inputs, length, ids)
        limit = getattr(self.mllm.text_config, "max_position_embeddings", None)
        total = inputs["input_ids"].shape[1]
        if limit and total > limit:
            self._fail("messages", f"{total} tokens, but the model's context ends at {limit}", "Give less context")
        return Tagged(inputs, self.visual, target, question, answer, length - 1, self.media, self.sample)

    def _same_media(self, like: Prompt) -> bool:
        return (
            like.mllm is self.mllm
            and len(like.raw) == len(self.raw) > 0
            and all(map(same_content, like.raw, self.raw))
            and like.metadata == self.metadata
            and like.before_text == self.before_text
        )

    def _measure(self) -> None:
        """Geometry of the visual tokens; every one of them must be accounted for."""
        try:
            self.media = self.mllm.family.media(self.mllm, self.ids, self.inputs, self.given)
        except (IndexError, KeyError):
            self.media = []
        found, need = sum(len(m.tokens) for m in self.media), sum(len(m.boxes) for m in self.media)
        if found != need or found != len(self.visual) or len(self.media) != len(self.given):
            self._fail(
                "messages",
                f"the prompt holds {len(self.visual)} visual tokens where its media need {need}",
                "Do not truncate the input, and write no placeholder of an image or a video into the text",
            )

    def _fail(self, where: str, problem: str, mend: str):
        raise SampleError(self.sample.id, where, problem, mend)

    def _find_media(self) -> None:
        """What the messages hold, in their order: `raw` objects, where they stand, and the videos' timing."""
        self.raw, self.kinds, self.where, self.metadata = [], [], [], []
        for m, message in enumerate(self.sample.messages):
            content = message.get("content")
            if isinstance(content, str):
                continue
            if not isinstance(content, list):
                self._fail(f"messages[{m}]", "has no content", "Give a text, or a list of parts")
            for p, part in enumerate(content):
                where, kind = f"messages[{m}].content[{p}]", part.get("type")
                if kind == "text":
                    if not isinstance(part.get("text"), str):
                        self._fail(where, "a text part without text", "Give 'text'")
                elif kind in ("image", "video"):
                    if part.get(kind) is None:
                        self._fail(where, f"the {kind} is missing", f"Give {kind!r}, as Sample describes it")
                    self.raw.append(part[kind])
                    self.kinds.append(kind)
                    self.where.append(where)
                    if kind == "video":
                        indices = part.get("frames_indices")
                        indices = None if indices is None else [int(i) for i in indices]
                        self.metadata.append((part.get("fps", 1.0), indices))
                else:
                    self._fail(where, f"unknown type {kind!r}", "Take 'text', 'image' or 'video'")
        if self.raw and not self.mllm.family.visual_ids(self.mllm.model.config):
            self._fail("messages", "holds images or videos, but the model reads text only", "Give text alone")

    def _read_media(self) -> None:
        """Decode what the messages hold: `images`, `videos`, and `given`: (kind, index, (T, H, W)) in their order."""
        self.images, self.videos = [], []
        for value, kind, where in zip(self.raw, self.kinds, self.where, strict=True):
            if kind == "image":
                self.images.append(to_image(value, self.sample.id, where))
            else:
                frames = np.asarray(value)
                if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
                    self._fail(where, "is no video", "Give 'video': a uint8 array (T, H, W, 3) of sampled frames")
                _, indices = self.metadata[len(self.videos)]
                if indices is not None and len(indices) != len(frames):
                    self._fail(where, f"{len(indices)} frames_indices for {len(frames)} frames", "Give one a frame")
                self.videos.append(frames)

    @property
    def given(self) -> list[tuple[str, int, tuple[int, int, int]]]:
        """(kind, index, (T, H, W)) of each medium, in the order of the prompt."""
        sizes = {
            "image": iter((1, i.height, i.width) for i in self.images),
            "video": iter(v.shape[:3] for v in self.videos),
        }
        count = {"image": 0, "video": 0}
        out = []
        for kind in self.kinds:
            out.append((kind, count[kind], next(sizes[kind])))
            count[kind] += 1
        return out

    def _render(self, messages: list[dict]) -> str:
        processor = self.mllm.processor
        if processor is None:
            raise ValueError("this MLLM was made without a processor, so it cannot tag: pass processor=")
        if processor is self.mllm.tokenizer:  # templates of plain language models take strings, not parts
            joined = (m["content"] if isinstance(m["content"], str) else _join(m["content"]) for m in messages)
            messages = [{**m, "content": text} for m, text in zip(messages, joined)]
            if getattr(processor, "chat_template", None) is None:  # a base model: the text as it stands
                return "".join(m["content"] for m in messages)
        try:
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises what the template's author chose
            self._fail("messages", f"the chat template refuses them ({error})", "Give roles that the model knows")

    def _process(self, processor: Any, text: str) -> dict[str, Any]:
        if processor is self.mllm.tokenizer:
            return dict(processor(text, return_tensors="pt", add_special_tokens=self._add_special(processor, text)))
        media: dict[str, Any] = {}
        if self.images:
            media["images"] = [self.images] if self.mllm.family.nested_images else self.images
        if self.videos:
            meta = []
            for video, (fps, indices) in zip(self.videos, self.metadata, strict=True):
                indices = list(range(len(video))) if indices is None else indices
                size = dict(height=video.shape[1], width=video.shape[2])
                meta.append(dict(fps=fps, frames_indices=indices, total_num_frames=max(indices) + 1, **size))
            media |= dict(videos=self.videos, video_metadata=meta, do_sample_frames=False)
        try:
            return dict(processor(text=[text], return_tensors="pt", **media))
        except Exception as error:  # processors raise many kinds; the sample's name must not be lost
            self._fail("messages", f"the processor refuses them ({error})", "See the message of the processor")

    @staticmethod
    def _add_special(tokenizer: Any, text: str) -> bool:
        """Chat templates write the start token themselves; it must not stand there twice."""
        return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))

    def _tokenise_text(self) -> None:
        """Tokens of the prompt as it was rendered, each medium still one placeholder."""
        tokenizer, processor = self.mllm.tokenizer, self.mllm.processor
        special = processor is not tokenizer or self._add_special(tokenizer, self.text)
        encoded = tokenizer(self.text, return_offsets_mapping=True, add_special_tokens=special)
        self.offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
        self.plain = np.array(encoded["input_ids"])
        names = self.mllm.family.placeholders(processor) if self.raw else None
        holders = np.isin(self.plain, tokenizer.convert_tokens_to_ids(list(names))) if names else np.zeros(0, bool)
        self.cuts = np.flatnonzero(holders)
        if len(self.cuts) != len(self.raw):
            self._fail(
                "messages",
                f"the prompt has {len(self.cuts)} placeholders for {len(self.raw)} images and videos",
                "Give each medium as a part of its own, and write no placeholder into the text",
            )

    @property
    def text_start(self) -> int:
        """First token of `plain` behind the last medium."""
        return int(self.cuts[-1]) + 1 if len(self.cuts) else 0

    @property
    def before_text(self) -> str:
        """The rendered prompt up to and with its last medium."""
        return self.text[: self.offsets[self.text_start - 1, 1]] if len(self.cuts) else ""

    @property
    def after_media(self) -> int:
        """First token of input_ids behind the last medium and what the processor closes it with."""
        return max((int(m.tokens[-1]) + 1 + m.closers for m in self.media), default=0)

    def _align(self) -> None:
        """Find, for every token of `plain`, its place in input_ids (-1 for a placeholder).

        Text between two media is not changed by a processor; what it puts in stands at the placeholder.
        """
        by_name = {(m.kind, m.index): m for m in self.media}
        self.place = np.full(len(self.plain), -1)
        start, position = 0, 0
        for cut, (kind, index, _) in zip([*self.cuts, len(self.plain)], [*self.given, (None, 0, None)], strict=True):
            self.place[start:cut] = position + np.arange(cut - start)
            if kind:
                medium = by_name[kind, index]
                start, position = cut + 1, int(medium.tokens[-1]) + 1 + medium.closers
        same = (self.place >= 0) & (self.place < len(self.ids))
        same[same] = self.ids[self.place[same]] == self.plain[same]
        self.place[~same] = -1

    def text_tokens(self, first: int, last: int) -> np.ndarray:
        """Tokens that overlap the characters [first, last) of the rendered prompt."""
        over = (self.offsets[:, 0] < last) & (self.offsets[:, 1] > first)
        place = self.place[over]
        if len(place) == 0 or (place < 0).any():
            self._fail("text", f"{self.text[first:last]!r} has no tokens of its own", "Take a piece of the plain text")
        return place

    def find_question(self) -> tuple[int, int]:
        """Characters of the question in the rendered prompt: its last occurrence."""
        text = self.sample.question
        if text is None:
            for message in reversed(self.sample.messages):
                if message.get("role") == "user":
                    content = message["content"]
                    texts = [content] if isinstance(content, str) else [c["text"] for c in content if "text" in c]
                    text = texts[-1] if texts else None
                    break
        text = (text or "").strip()
        at = self.text.rfind(text) if text else -1
        if at < 0:
            self._fail("question", f"{text!r} is not in the prompt", "Quote the question as it stands in the messages")
        return at, at + len(text)

    def find_span(self, span: Span, where: str) -> tuple[int, int]:
        count = self.text.count(span.text) if span.text else 0
        if count != 1:
            problem = f"{span.text!r} stands {count} times in the prompt" if count else f"{span.text!r} is not there"
            self._fail(where, problem, "Quote a piece of the text, exactly, that stands there once")
        at = self.text.index(span.text)
        return at, at + len(span.text)

    def medium(self, kind: str, index: int, where: str) -> Medium:
        found = [m for m in self.media if m.kind == kind and m.index == index]
        if not found:
            n = sum(m.kind == kind for m in self.media)
            self._fail(where, f"{kind} {index} is out of range", f"The sample has {n} of them, counted from 0")
        return found[0]

    def overlap(self, medium: Medium, box, where: str) -> np.ndarray:
        """(n,) bool: which tokens of a medium look at a box of pixels."""
        _, height, width = medium.size
        try:
            x1, y1, x2, y2 = (float(v) for v in box)
        except (TypeError, ValueError):
            self._fail(where, f"{box!r} is no box", "Give (x1, y1, x2, y2) in pixels")
        if not (x1 < x2 and y1 < y2):
            self._fail(where, f"box {tuple(box)} is empty", "Give (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
        slack = 0.5  # annotations are rounded
        if x1 < -slack or y1 < -slack or x2 > width + slack or y2 > height + slack:
            self._fail(
                where,
                f"box {tuple(box)} is not inside the {width} x {height} px of {medium.kind} {medium.index}",
                "Give pixels of the image as it is in the message",
            )
        tolerance = 1e-6 * max(height, width)  # an edge that is a cell's edge up to rounding does not touch the next
        b = medium.boxes
        with np.errstate(invalid="ignore"):
            wide = np.minimum(b[:, 2], x2) - np.maximum(b[:, 0], x1) > min(tolerance, (x2 - x1) / 2)
            high = np.minimum(b[:, 3], y2) - np.maximum(b[:, 1], y1) > min(tolerance, (y2 - y1) / 2)
        return wide & high

    def frames_hit(self, medium: Medium, frame: int, where: str) -> np.ndarray:
        if not 0 <= frame < medium.size[0]:
            self._fail(where, f"frame {frame} is out of range", f"The video has {medium.size[0]} frames, from 0")
        return (medium.frames[:, 0] <= frame) & (frame < medium.frames[:, 1])


def _by_geometry(prompt: Prompt) -> np.ndarray:
    hits = [np.empty(0, np.int64)]
    for i, piece in enumerate(prompt.sample.evidence):
        where = f"evidence[{i}]"
        if isinstance(piece, Span):
            found = prompt.text_tokens(*prompt.find_span(piece, where))
        elif isinstance(piece, Pages):
            found = np.concatenate([hits[0], *(prompt.medium("image", p, where).tokens for p in piece.pages)])
        elif isinstance(piece, Region):
            medium = prompt.medium("image", piece.image, where)
            found = medium.tokens[prompt.overlap(medium, piece.box, where)]
        elif isinstance(piece, Frames):
            medium = prompt.medium("video", piece.video, where)
            seen = [prompt.frames_hit(medium, f, where) for f in piece.frames]
            found = medium.tokens[np.any(seen, 0)] if seen else hits[0]
        elif isinstance(piece, Tube):
            medium = prompt.medium("video", piece.video, where)
            seen = [
                prompt.frames_hit(medium, f, where) & prompt.overlap(medium, b, where) for f, b in piece.boxes.items()
            ]
            found = medium.tokens[np.any(seen, 0)] if seen else hits[0]
        else:
            prompt._fail(where, f"{type(piece).__name__} is no evidence", "Take Region, Pages, Frames, Tube or Span")
        if len(found) == 0:
            prompt._fail(where, f"{piece} maps to no token", "Give evidence that the model's preprocessing keeps")
        hits.append(found)
    return np.unique(np.concatenate(hits))


def _by_markers(prompt: Prompt) -> np.ndarray:
    """Eqs. 6-8 and 11-13: wrap, tokenise the tagged context, scan its ids once for the two markers.

    Markers would change what the model sees, so the indices are mapped back to the untagged prompt: the k-th visual
    token stays the k-th visual token, a text token is found again by its characters.
    """
    sample, mllm = prompt.sample, prompt.mllm
    pages = {p for piece in sample.evidence if isinstance(piece, Pages) for p in piece.pages}
    spans = [piece for piece in sample.evidence if isinstance(piece, Span)]
    if len(spans) + sum(isinstance(p, Pages) for p in sample.evidence) != len(sample.evidence):
        prompt._fail("evidence", "markers can only wrap Pages and Span", "Take construction='geometry'")
    for i, piece in enumerate(sample.evidence):
        if isinstance(piece, Span):
            prompt.find_span(piece, f"evidence[{i}]")
        else:
            for p in piece.pages:
                prompt.medium("image", p, f"evidence[{i}]")
    processor = copy.deepcopy(mllm.processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    start, end = tokenizer.convert_tokens_to_ids(list(MARKERS))

    image, messages = 0, []
    for message in sample.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        wrapped = []
        for part in parts:
            if part["type"] == "text":
                text = part["text"]
                for span in spans:
                    text = text.replace(span.text, span.text.join(MARKERS))
                wrapped.append({**part, "text": text})
            elif part["type"] == "image":
                around = [{"type": "text", "text": m} for m in MARKERS] if image in pages else []
                wrapped += [*around[:1], part, *around[1:]]
                image += 1
            else:
                wrapped.append(part)
        messages.append({**message, "content": wrapped})
    text = prompt._render(messages)
    ids = prompt._process(processor, text)["input_ids"][0].numpy()
    depth = np.cumsum((ids == start).astype(int) - (ids == end))
    inside = (depth > 0) & (ids != start)
    visual = np.isin(ids, mllm.family.visual_ids(mllm.model.config))
    target = [prompt.visual[inside[visual]]]
    if spans:
        # characters strictly between the markers, in the untagged prompt
        for piece in text.split(MARKERS[0])[1:]:
            before = text[: text.index(MARKERS[0] + piece)]
            for marker in MARKERS:
                before = before.replace(marker, "")
            quoted = piece.split(MARKERS[1])[0]
            if quoted in {s.text for s in spans}:
                target.append(prompt.text_tokens(len(before), len(before) + len(quoted)))
        if len(target) != 1 + len(spans):
            prompt._fail("evidence", "its spans overlap, so that markers cannot wrap them", "Take 'geometry'")
    return np.unique(np.concatenate(target))


def _by_counting(prompt: Prompt) -> np.ndarray:
    """Eqs. 9-10 and 14, and cumulative offsets: blocks of the ordered visual positions, one block an image.

    Blocks are equal (P = M / N) in the fixed-length family with several images, and as long as each image's tiles or
    grid say otherwise: P_all[O_k .. O_k + P_k - 1] with O_k the sum of the blocks before.
    """
    sample, mllm = prompt.sample, prompt.mllm
    if not all(isinstance(piece, Pages) for piece in sample.evidence) or prompt.videos:
        prompt._fail("evidence", "counting can only tell Pages apart", "Take construction='geometry'")
    n, total = len(prompt.images), len(prompt.visual)
    if not n:
        lengths = np.empty(0, np.int64)
    elif mllm.family.name == "llava_onevision":
        lengths = np.full(n, total // n)
    elif mllm.family.name == "internvl":
        closing = np.flatnonzero(prompt.ids == mllm.processor.end_image_token_id)
        lengths = np.diff(np.searchsorted(prompt.visual, closing), prepend=0)
    else:
        grids = prompt.inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        lengths = grids.prod(1).numpy() // mllm.model.config.vision_config.spatial_merge_size**2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for i, piece in enumerate(sample.evidence):
        for p in piece.pages:
            prompt.medium("image", p, f"evidence[{i}]")
    blocks = [prompt.visual[offsets[p] : offsets[p + 1]] for piece in sample.evidence for p in piece.pages]
    return np.unique(np.concatenate([np.empty(0, np.int64), *blocks]))


_TARGETS = {"geometry": _by_geometry, "markers": _by_markers, "counting": _by_counting}
