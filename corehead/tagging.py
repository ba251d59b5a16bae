"""From evidence to token indices: V*, and where the question and the answer stand.

Two constructions of the paper are here beside our own. *Geometry* (the default) asks the family which pixels every
visual token looks at and takes those that meet the evidence. *Markers* (eqs. 6-8, 11-13, 15-17) wraps the evidence in
boundary markers, scans the tagged ids once and maps what lies between back to the untagged prompt. *Counting* (eqs.
9-10, 14, 18 and the cumulative offsets of eq. 19) cuts the visual tokens into one block a picture or frame. The paper's
two know whole frames: of a tube they take its frames, whatever its boxes.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from PIL import Image

from .families import Medium
from .samples import Evidence, Frames, Pages, Region, Sample, SampleError, Span, Tube

if TYPE_CHECKING:
    from .models import MLLM

MARKERS = "<GT_START>", "<GT_END>"
# what processors give for each token, to be cut and padded with the sequence; all else belongs to the media
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass
class TaggedSample:
    """A tokenised sample and the indices that scoring needs.

    Attributes
    ----------
    inputs : dict of tensors
        What the model takes, a batch of one on the CPU; input_ids (1, L) end with the answer, if there is one.
    visual : ndarray (n,) int64
        Tokens that stand for visual features.
    evidence : ndarray (n,) int64
        V*: the tokens of the evidence.
    question : ndarray (n,) int64
        Tokens of the question's text.
    answer : ndarray (n,) int64
        Tokens of the answer (teacher-forced), empty without one.
    last : int
        The last token of the prompt, which predicts the answer's first.
    media : list of Medium
        Geometry of every image and video, in the order in which they stand in the prompt.
    sample : Sample or None
        What was tagged.
    """

    inputs: dict[str, torch.Tensor]
    visual: np.ndarray
    evidence: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    last: int
    media: list[Medium] = field(default_factory=list)
    sample: Sample | None = None

    @property
    def ids(self) -> np.ndarray:
        """(L,) int64 token ids."""
        return self.inputs["input_ids"][0].numpy()

    def query_tokens(self) -> np.ndarray:
        """Tokens that may look for the evidence: the question's, and everything behind question and context."""
        context = np.concatenate([[-1], self.visual, self.evidence, self.question])
        behind = np.arange(int(context.max()) + 1, len(self.ids))
        # where the question quotes its evidence, those tokens are what is looked for
        return np.union1d(np.setdiff1d(self.question, self.evidence), behind)


def with_text(
    inputs: dict[str, Any], keep: int, ids: np.ndarray | list[int]
) -> dict[str, Any]:
    """The first `keep` tokens of a processor's output and then text tokens, in every tensor with one entry a token."""
    new = dict(inputs)
    for name in PER_TOKEN:
        if name in inputs:
            # text is of type 0, and never padding
            fill = (
                ids if name == "input_ids" else [int(name == "attention_mask")] * len(ids)
            )
            fill = torch.tensor(fill, dtype=inputs[name].dtype)[None]
            new[name] = torch.cat([inputs[name][:, :keep], fill], 1)
    return new


def to_image(value: Any, sample_id: str, where: str) -> Image.Image:
    """A PIL image from what a message holds: a PIL image, an array (H, W, 3) or (H, W) uint8, or a path."""
    try:
        if isinstance(value, (str, os.PathLike)):
            with Image.open(value) as image:
                return image.convert("RGB")
        if not isinstance(value, Image.Image):
            array = np.asarray(value)
            if array.dtype != np.uint8 or array.ndim < 2:
                raise TypeError(
                    f"{type(value).__name__} of {array.dtype}, shape {array.shape}"
                )
            value = Image.fromarray(array)
        return value.convert("RGB")
    except (
        Exception
    ) as error:  # PIL raises many kinds, from a missing file to one that is cut off
        fix = "Give a PIL image, the path of a whole image file or a uint8 array (H, W, 3)"
        raise SampleError(
            sample_id, where, f"cannot be read as an image ({error})", fix
        ) from error


def same_content(a: Any, b: Any) -> bool:
    """Whether two media are one object, or have the same content."""
    if a is b or type(a) is not type(b):
        return a is b
    try:
        # array_equal would make an array of each image first; PIL compares their sizes before their pixels
        return bool(a == b) if isinstance(a, Image.Image) else np.array_equal(a, b)
    except Exception:  # what cannot be read is reported where it is read
        return False


class Prompt:
    """A rendered and processed sample: text, ids, geometry, and the way from characters to tokens.

    Parameters
    ----------
    mllm : MLLM
        Whose processor and geometry count.
    sample : Sample
        What to process.
    like : Prompt, optional
        An earlier prompt. Where it has the same media (the same objects, or equal ones) behind the same text, their
        preprocessing is not done again: only text is tokenised.

    Attributes
    ----------
    text : str
        The prompt as the model reads it: the chat template's text with the processor's tokens for images and videos.
    inputs : dict of tensors
        What the model takes.
    ids : ndarray (L,) int64
        Token ids.
    offsets : ndarray (L, 2) int64
        Characters of `text` that each token stands for.
    visual : ndarray (n,) int64
        Tokens that stand for visual features.
    media : list of Medium
        Geometry of the visual tokens, in the order of the prompt.
    shares : bool
        Whether the media were taken from `like`.
    """

    def __init__(self, mllm: MLLM, sample: Sample, like: Prompt | None = None):
        self.mllm = mllm
        self.sample = sample
        self._read_messages()
        self.rendered = self._render()
        # chat templates write the start token themselves; it must not stand there twice
        start = mllm.tokenizer.bos_token
        self.add_special_tokens = not (start and self.rendered.startswith(start))
        self.shares = like is not None and self._continues(like)
        if self.shares:
            self.media = like.media
            self.replaced = like.replaced
            # up to the end of the last medium as before, with all placeholders expanded; behind it there is text alone
            last = self.replaced[-1]
            self.text = like.text[: last["new_span"][1]] + self.rendered[last["span"][1] :]
            self._tokenise()
            after_media = int(self.visual[-1]) + 1
            self.inputs = with_text(like.inputs, after_media, self.ids[after_media:])
        else:
            media = self._read_media()
            self._process(media)
            self._tokenise()
            self._measure(media)
        self._check()

    def tag(self, construction: str = "geometry") -> TaggedSample:
        """Find evidence, question and answer: see `MLLM.tag`."""
        if construction not in CONSTRUCTIONS:
            raise ValueError(
                f"construction={construction!r}: take one of {', '.join(map(repr, CONSTRUCTIONS))}"
            )
        evidence = CONSTRUCTIONS[construction](self)
        question = self.text_tokens(*self.find_question(), "question")
        inputs = self.inputs
        length = len(self.ids)
        answer_ids = []
        if self.sample.answer is not None:
            # apart from the prompt, as the model writes it: no token straddles the two
            tokenised = self.mllm.tokenizer(self.sample.answer, add_special_tokens=False)
            answer_ids = tokenised["input_ids"]
            if not answer_ids:
                self._fail("answer", "is empty", "Give the text of the answer, or None")
            inputs = with_text(inputs, length, answer_ids)
        total = length + len(answer_ids)
        limit = getattr(self.mllm.text_config, "max_position_embeddings", None)
        if limit and total > limit:
            problem = f"{total} tokens, but the model's context ends at {limit}"
            self._fail("messages", problem, "Give less context")
        return TaggedSample(
            inputs=inputs,
            visual=self.visual,
            evidence=evidence,
            question=question,
            answer=np.arange(length, total),
            last=length - 1,
            media=self.media,
            sample=self.sample,
        )

    def _fail(self, where: str, problem: str, fix: str) -> NoReturn:
        raise SampleError(self.sample.id, where, problem, fix)

    def _read_messages(self) -> None:
        """Bring every content into the form of a list of parts, and list those that are images and videos."""
        self.messages = []
        self.parts = []
        self.fields = []
        for m, message in enumerate(self.sample.messages):
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list):
                self._fail(
                    f"messages[{m}]", "has no content", "Give a text, or a list of parts"
                )
            for p, part in enumerate(content):
                where = f"messages[{m}].content[{p}]"
                kind = part.get("type")
                if kind not in ("text", "image", "video") or part.get(kind) is None:
                    problem = f"its type {kind!r} is unknown, or there is no {kind!r} in it"
                    fix = "Give a part as Sample describes it: text, image or video"
                    self._fail(where, problem, fix)
                if kind != "text":
                    self.parts.append(part)
                    self.fields.append(where)
            self.messages.append({**message, "content": content})

    def _render(self) -> str:
        """The prompt by the chat template, each medium one placeholder."""
        processor = self.mllm.processor
        messages = self.messages
        options = {"tokenize": False, "add_generation_prompt": True}
        try:
            # templates of plain language models take strings, not parts
            if processor is self.mllm.tokenizer:
                texts = ["".join(p.get("text", "") for p in m["content"]) for m in messages]
                if not processor.chat_template:  # a base model: the text as it stands
                    return "".join(texts)
                messages = [{**m, "content": text} for m, text in zip(messages, texts)]
            return processor.apply_chat_template(messages, **options)
        except Exception as error:  # jinja raises what the template's author chose
            problem = f"the chat template refuses them ({error})"
            self._fail("messages", problem, "Give roles that the model knows")

    def _continues(self, like: Prompt) -> bool:
        """Whether an earlier prompt has the same media behind the same text, so that its preprocessing can be used."""
        if (
            like.mllm is not self.mllm
            or not self.parts
            or len(self.parts) != len(like.parts)
        ):
            return False
        end = like.replaced[-1]["span"][1]  # of the last placeholder
        if (
            self.rendered[:end] != like.rendered[:end]
        ):  # quick, where comparing pixels is not
            return False
        return all(map(_same_part, self.parts, like.parts))

    def _read_media(self) -> dict[str, list]:
        """Decode what the messages hold: images and videos, and the timing of the videos."""
        read: dict[str, list] = {"image": [], "video": [], "timing": []}
        for part, where in zip(self.parts, self.fields, strict=True):
            if part["type"] == "image":
                read["image"].append(to_image(part["image"], self.sample.id, where))
                continue
            frames = np.asarray(part["video"])
            rgb = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
            if not rgb or not frames.size:
                fix = "Give 'video': a uint8 array (T, H, W, 3) of sampled frames"
                self._fail(where, "is no video", fix)
            indices = part.get("frames_indices")
            if indices is None:
                indices = range(len(frames))
            if len(indices) != len(frames):
                problem = f"{len(indices)} frames_indices for {len(frames)} frames"
                self._fail(where, problem, "Give one a frame")
            # a list of its own, because processors write into it
            indices = [int(i) for i in indices]
            # time stamps that a processor writes into the prompt come from fps and indices
            timing = {
                "fps": part.get("fps", 1.0),
                "frames_indices": indices,
                "total_num_frames": max(indices) + 1,
            }
            read["video"].append(frames)
            read["timing"].append(timing)
        return read

    def _process(self, read: dict[str, list]) -> None:
        """Let the model's processor make `inputs` of text and media, and note what it puts in for the placeholders."""
        media: dict[str, Any] = {}
        if read["image"]:
            media["images"] = [read["image"]]
        if read["video"]:
            # frames were sampled by whoever made the sample, and evidence counts them as given
            media |= {
                "videos": read["video"],
                "video_metadata": read["timing"],
                "do_sample_frames": False,
            }
        processor = self.mllm.processor
        self.text = self.rendered
        self.replaced = []
        if media:
            # a copy, since the model's processor must not keep a method of this prompt
            processor = copy.copy(processor)
            processor.get_text_with_replacements = self._record
        options = {"return_tensors": "pt", "add_special_tokens": self.add_special_tokens}
        try:
            self.inputs = dict(processor(text=[self.rendered], **options, **media))
        # processors raise many kinds; the sample's name must not be lost
        except Exception as error:
            fix = "Give each image and video as a part of its own, and write no placeholder of one into the text"
            self._fail("messages", f"the processor refuses them ({error})", fix)

    def _record(self, *given, **named):
        """The processor's own method; it alone knows where each placeholder's tokens come to stand."""
        expanded = self.mllm.processor.get_text_with_replacements(*given, **named)
        [self.text], [self.replaced] = expanded  # lists over a batch, here of one
        return expanded

    def encode(self, text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) of a text, and the characters (L, 2) that they stand for."""
        options = {
            "return_offsets_mapping": True,
            "add_special_tokens": self.add_special_tokens,
        }
        encoded = tokenizer(text, **options)
        return np.array(encoded["input_ids"]), np.reshape(
            encoded["offset_mapping"], (-1, 2)
        )

    def _tokenise(self) -> None:
        # once more, for the offsets, which the processor's output lacks (`_check` compares the ids)
        self.ids, self.offsets = self.encode(self.text, self.mllm.tokenizer)
        self.visual = np.flatnonzero(self.is_visual(self.ids))

    def is_visual(self, ids: np.ndarray) -> np.ndarray:
        return np.isin(ids, self.mllm.family.visual_ids(self.mllm.model.config))

    def _measure(self, read: dict[str, list]) -> None:
        """Geometry of every image and video."""
        mllm = self.mllm
        self.media = []
        sources = mllm.model.config, mllm.processor, self.inputs
        first, last = self.offsets[self.visual].T
        for replaced in self.replaced:
            kind = replaced["type"]
            start, end = replaced["new_span"]
            index = sum(medium.kind == kind for medium in self.media)
            pixels = read[kind][index]
            # (T, H, W); PIL says width first, arrays height first
            size = (1, pixels.height, pixels.width) if kind == "image" else pixels.shape[:3]
            # only visual tokens: time stamps and borders stand between them in what replaced the placeholder
            tokens = self.visual[(first < end) & (last > start)]
            self.media.append(mllm.family.medium(kind, index, size, tokens, *sources))

    def _check(self) -> None:
        """Every medium and every visual token must be accounted for."""
        if len(self.media) != len(self.parts):
            problem = f"they hold {len(self.parts)} images and videos, but the model reads {len(self.media)} of them"
            self._fail(
                "messages", problem, "Give text alone, or take a model that reads them"
            )
        held = [len(m.tokens) for m in self.media]
        needed = [len(m.boxes) for m in self.media]
        whole = np.array_equal(self.ids, self.inputs["input_ids"][0])
        # the last condition finds visual tokens outside all media: somebody wrote them into the text
        if not whole or held != needed or sum(held) != len(self.visual):
            problem = f"the prompt holds {len(self.visual)} visual tokens where its media need {sum(needed)}"
            fix = "Do not truncate the input, and write no placeholder of an image or a video into the text"
            self._fail("messages", problem, fix)

    def text_tokens(self, first: int, last: int, where: str) -> np.ndarray:
        """Tokens that overlap the characters [first, last) of the prompt."""
        # overlap, not containment: a token often takes in the space in front of a word
        begin, end = self.offsets.T
        tokens = np.flatnonzero((begin < last) & (end > first))
        if len(tokens) == 0 or self.is_visual(self.ids[tokens]).any():
            problem = f"{self.text[first:last]!r} has no tokens of its own"
            self._fail(where, problem, "Quote a piece of the plain text")
        return tokens

    def find(self, text: str, where: str, once: bool = False) -> tuple[int, int]:
        """Characters of a piece of text in the prompt, where it stands last."""
        count = self.text.count(text) if text else 0
        if count == 0 or (once and count > 1):
            fix = (
                "Quote a piece of the messages' text, exactly"
                + ", that stands there once" * once
            )
            self._fail(where, f"{text!r} stands {count} times in the prompt", fix)
        start = self.text.rindex(text)
        return start, start + len(text)

    def find_question(self) -> tuple[int, int]:
        """Characters of the question in the prompt: its last occurrence."""
        question = self.sample.question
        if question is None:
            question = ""
            for message in self.messages:
                for part in message["content"]:
                    if message.get("role") == "user" and part["type"] == "text":
                        question = part["text"]
        # chat templates may strip what they are given
        return self.find(question.strip(), "question")

    def evidence_tokens(self, piece: Evidence, where: str) -> np.ndarray:
        """Tokens of one piece of evidence, by the geometry of the media."""
        match piece:
            case Span(text):
                tokens = [self.text_tokens(*self.find(text, where, once=True), where)]
            case Pages(pages):
                tokens = [self._look(where, "image", page) for page in pages]
            case Region(image, box):
                tokens = [self._look(where, "image", image, box=box)]
            case Frames(video, frames):
                tokens = [self._look(where, "video", video, frame) for frame in frames]
            case Tube(video, boxes):
                tokens = [
                    self._look(where, "video", video, *place) for place in boxes.items()
                ]
            case _:
                fix = "Take Region, Pages, Frames, Tube or Span"
                self._fail(where, f"{type(piece).__name__} is no evidence", fix)
        # a box in a strip that preprocessing cuts off, or no pages, frames or boxes at all
        if sum(map(len, tokens)) == 0:
            fix = "Give evidence that the model's preprocessing keeps"
            self._fail(where, f"{piece} maps to no token", fix)
        return np.concatenate(tokens)

    def _look(
        self, where: str, kind: str, index: int, frame: int | None = None, box: Any = None
    ) -> np.ndarray:
        """Tokens of a medium that look at one of its frames (all, if None), at a box of pixels (all, if None)."""
        media = [medium for medium in self.media if medium.kind == kind]
        if not 0 <= index < len(media):
            fix = f"The sample has {len(media)} of them, from 0"
            self._fail(where, f"{kind} {index} is out of range", fix)
        medium = media[index]
        hit = np.ones(len(medium.tokens), bool)
        if frame is not None:
            if not 0 <= frame < medium.size[0]:
                fix = f"The video has {medium.size[0]} frames, from 0"
                self._fail(where, f"frame {frame} is out of range", fix)
            hit &= (medium.frames[:, 0] <= frame) & (frame < medium.frames[:, 1])
        if box is not None:
            hit &= medium.overlaps(self._read_box(box, medium, where))
        return medium.tokens[hit]

    def _read_box(
        self, box: Any, medium: Medium, where: str
    ) -> tuple[float, float, float, float]:
        _, height, width = medium.size
        slack = 0.5  # annotations are rounded
        try:
            x1, y1, x2, y2 = map(float, box)
            # NaN compares as false, so that it is refused as well
            inside = (
                -slack <= x1 < x2 <= width + slack and -slack <= y1 < y2 <= height + slack
            )
        except (TypeError, ValueError):
            inside = False
        if not inside:
            medium_name = f"{medium.kind} {medium.index}"
            problem = f"{box} is no box inside the {width} x {height} px of {medium_name}"
            fix = "Give (x1, y1, x2, y2) with x1 < x2 and y1 < y2 in pixels of the image as given"
            self._fail(where, problem, fix)
        return x1, y1, x2, y2


def _same_part(a: dict, b: dict) -> bool:
    """Whether two parts of messages hold the same image or video, with the same timing."""
    return a.keys() == b.keys() and all(same_content(a[name], b[name]) for name in a)


# --- the three constructions of V*


def _by_geometry(prompt: Prompt) -> np.ndarray:
    evidence = enumerate(prompt.sample.evidence)
    return _union(
        [prompt.evidence_tokens(piece, f"evidence[{i}]") for i, piece in evidence]
    )


def _by_markers(prompt: Prompt) -> np.ndarray:
    """Eqs. 6-8, 11-13 and 15-17: wrap, tokenise the tagged context, scan its ids once for the two markers.

    Markers would change what the model sees, so what lies between them is mapped back to the untagged prompt: the k-th
    visual token stays the k-th visual token, a text token is found again by its characters.
    """
    _require(prompt, (Pages, Frames, Tube, Span), "markers cannot wrap a Region")
    images = [
        replaced["new_span"] for replaced in prompt.replaced if replaced["type"] == "image"
    ]
    pictures = []
    spans = []
    for i, piece in enumerate(prompt.sample.evidence):
        match piece:
            case Span(text):
                spans.append(prompt.find(text, "evidence"))
            case Pages(pages):
                pictures += [images[page] for page in pages]
            case Frames(video) | Tube(video):
                runs = _runs_of_frames(prompt, video, f"evidence[{i}]")
                pictures += [runs[group] for group in _frame_groups(prompt, piece)]
    # A deep copy: the model's own tokenizer must not learn tokens that the model has no embeddings for. Special tokens
    # are never split or merged with their neighbours.
    tokenizer = copy.deepcopy(prompt.mllm.tokenizer)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    # one scan for each kind: visual tokens are found again by their rank, text tokens by their characters
    visual, _ = _between_markers(prompt, tokenizer, pictures)
    _, quoted = _between_markers(prompt, tokenizer, spans)
    tokens = [prompt.text_tokens(first, last, "evidence") for first, last in quoted]
    return _union([prompt.visual[visual], *tokens])


def _runs_of_frames(prompt: Prompt, video: int, where: str) -> list[tuple[int, int]]:
    """Characters of each run of visual tokens in a video, of which every frame or group of frames must have one."""
    videos = [
        replaced["new_span"] for replaced in prompt.replaced if replaced["type"] == "video"
    ]
    begin, end = videos[video]
    characters = prompt.offsets[prompt.visual]
    inside = (characters[:, 0] < end) & (characters[:, 1] > begin)
    tokens = prompt.visual[inside]
    runs = np.split(characters[inside], np.flatnonzero(np.diff(tokens) > 1) + 1)
    media = [medium for medium in prompt.media if medium.kind == "video"]
    groups = -(-media[video].size[0] // _merged_frames(prompt))
    if len(runs) != groups:
        problem = f"the {groups} frames of video {video} stand in {len(runs)} runs of tokens: nothing to wrap"
        prompt._fail(where, problem, "Take construction='counting' or 'geometry'")
    return [(int(run[0, 0]), int(run[-1, 1])) for run in runs]


def _merged_frames(prompt: Prompt) -> int:
    """How many neighbouring frames the vision tower makes one of."""
    return getattr(prompt.mllm.model.config.vision_config, "temporal_patch_size", 1)


def _frame_groups(prompt: Prompt, piece: Frames | Tube) -> list[int]:
    """Which groups of merged frames hold the frames of a piece; of a tube, its boxes left out."""
    frames = piece.frames if isinstance(piece, Frames) else piece.boxes
    return sorted({frame // _merged_frames(prompt) for frame in frames})


def _between_markers(
    prompt: Prompt, tokenizer: Any, pieces: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Of all visual tokens, which stand between markers around pieces of the text; and what characters stand there."""
    text = prompt.text
    marks = [mark for ends in pieces for mark in zip(ends, MARKERS, strict=True)]
    # from the end, so that what is put in does not move the places that are still to come
    for character, marker in sorted(marks, reverse=True):
        text = text[:character] + marker + text[character:]
    ids, offsets = prompt.encode(text, tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(list(MARKERS))
    # a running count of open markers, as pieces may overlap
    step = (ids == start).astype(int) - (ids == end)
    inside = (np.cumsum(step) > 0) & (step == 0)
    # characters of markers in front of each token, which the untagged prompt lacks
    markers_before = np.cumsum(np.where(step, offsets[:, 1] - offsets[:, 0], 0))
    return inside[prompt.is_visual(ids)], (offsets - markers_before[:, None])[inside]


def _by_counting(prompt: Prompt) -> np.ndarray:
    """Eqs. 9-10, 14, 18 and 19: blocks of the ordered visual positions, one an image or a frame.

    P_all[O_k .. O_k + P_k - 1] with O_k the sum of the blocks before; how long they are the family knows.
    """
    _require(prompt, (Pages, Frames, Tube), "counting can only tell Pages and Frames apart")
    if not prompt.sample.evidence:
        return _union([])
    kinds = {medium.kind for medium in prompt.media}
    if len(kinds) > 1:
        # equal blocks of M / N tokens would take the video's for the pages'
        problem = "counting cannot tell a video's visual tokens from the images'"
        prompt._fail("messages", problem, "Take construction='geometry'")
    mllm = prompt.mllm
    total = len(prompt.visual)
    sizes = [medium.size for medium in prompt.media]
    sources = mllm.model.config, mllm.processor, prompt.inputs
    lengths = mllm.family.block_lengths(*kinds, sizes, total, *sources)
    held = [len(medium.tokens) for medium in prompt.media]
    if held != [sum(blocks) for blocks in lengths]:
        problem = f"blocks of {lengths} tokens, but its media have {held}"
        prompt._fail("messages", problem, "Take construction='geometry'")
    # edges of all blocks: O_k, and the end of the last
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    first_block = np.cumsum([0, *map(len, lengths)])  # of each image or video
    blocks = []
    for piece in prompt.sample.evidence:
        if isinstance(piece, Pages):
            blocks += [first_block[page] for page in piece.pages]
        else:
            blocks += [
                first_block[piece.video] + group for group in _frame_groups(prompt, piece)
            ]
    return _union([prompt.visual[offsets[block] : offsets[block + 1]] for block in blocks])


def _require(prompt: Prompt, kinds: tuple[type, ...], problem: str) -> None:
    """Check that a construction applies to all evidence, and that the evidence fits the sample."""
    for i, piece in enumerate(prompt.sample.evidence):
        if not isinstance(piece, kinds):
            prompt._fail(f"evidence[{i}]", problem, "Take construction='geometry'")
        prompt.evidence_tokens(piece, f"evidence[{i}]")


def _union(tokens: list[np.ndarray]) -> np.ndarray:
    # with no evidence at all, an empty array of integers and not of floats
    return np.unique(np.concatenate([np.empty(0, np.int64), *tokens]))


CONSTRUCTIONS = {"geometry": _by_geometry, "markers": _by_markers, "counting": _by_counting}
