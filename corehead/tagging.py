"""From evidence to token indices: V*, and where the question and the answer stand.

Two constructions of the paper are here beside our own. *Geometry* (the default) asks the family which pixels every
visual token looks at and takes those that meet the evidence. *Markers* (eqs. 6-8, 11-13, 15-17) wraps the evidence in
boundary markers, scans the tagged ids once and maps what lies between back to the untagged prompt. *Counting* (eqs.
9-10, 14, 18 and the cumulative offsets of eq. 19) cuts the visual tokens into one block a picture or frame. The paper's
two know whole frames: of a tube they take its frames, whatever its boxes.
"""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.video_utils import load_video

from .families import Medium
from .samples import (
    Evidence,
    Frames,
    Pages,
    Region,
    Sample,
    SampleError,
    Span,
    Tube,
    read_messages,
)

if TYPE_CHECKING:
    from .models import MLLM

URLS = ("http://", "https://", "file://", "data:")
# how much of a picture's width or height a unit of a box is; pixels are counted, not scaled
UNITS = {"pixel": None, "fraction": 1, "thousandth": 1000}
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
        Tokens of the answer (teacher-forced), empty without one. They follow the prompt at once.
    last : int
        The last token of the prompt, which predicts what comes next: of the template's generation prompt, if it has
        one. Instruct models' ends in ``<|im_start|>assistant\\n``, and the answer comes next. Thinking models' opens
        the reasoning as well (Qwen3-VL Thinking: ``<think>\\n``): `last` is the newline behind it, and predicts
        the first word of the reasoning. An answer that is teacher-forced there is one given without reasoning, which
        such a model would hardly write by itself; to score it behind its reasoning, let `answer` begin with that.
    media : list of Medium
        Geometry of every image and video, in the order in which they stand in the prompt.
    sample : Sample or None
        What was tagged.
    foil : ndarray (n,) int64, optional
        Tokens of the sample's foil, as they would stand in the answer's place.
    """

    inputs: dict[str, torch.Tensor]
    visual: np.ndarray
    evidence: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    last: int
    media: list[Medium] = field(default_factory=list)
    sample: Sample | None = None
    foil: np.ndarray | None = None

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
    """An upright RGB image on white from whatever the image part of a message holds: see `Sample`."""
    try:
        # load_image of transformers would fetch these as well, but put what is transparent on black
        if isinstance(value, str) and value.startswith(URLS):
            with urlopen(value, timeout=60) as reply:
                value = reply.read()
        if isinstance(value, bytes):
            value = io.BytesIO(value)
        if isinstance(value, (str, os.PathLike)) or hasattr(value, "read"):
            with Image.open(value) as image:
                return upright(image)
        if not isinstance(value, Image.Image):
            value = Image.fromarray(_channels_last(value))
        return upright(value)
    # PIL raises many kinds, from a missing file to one that is cut off
    except Exception as error:
        fix = "Give a PIL image, the path of a whole image file or a uint8 array (H, W, 3)"
        problem = f"cannot be read as an image ({_brief(error)})"
        raise SampleError(sample_id, where, problem, fix) from error


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as EXIF says, on white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        # 16 bits and more: PIL would cut them off at 255, and leave a white picture
        raise TypeError(f"mode {image.mode!r}: scale it to 8 bits a channel")
    # phones write a picture and its preview (MPO); of a film or a document the rest would be lost
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise TypeError(
            f"{image.n_frames} frames or pages: give each as an image, or a video"
        )
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _channels_last(value: Any) -> np.ndarray:
    """(..., H, W, C) uint8 from an array or tensor with the channels there, or in front of H as in torchvision."""
    array = value.numpy(force=True) if torch.is_tensor(value) else np.asarray(value)
    if array.dtype != np.uint8 or array.ndim < 2:
        raise TypeError(f"{type(value).__name__} of {array.dtype}, shape {array.shape}")
    channels = (1, 3, 4)
    first = array.ndim > 2 and array.shape[-3] in channels
    if first and array.shape[-1] not in channels:
        array = np.moveaxis(array, -3, -1)
    return array[..., 0] if array.ndim > 2 and array.shape[-1] == 1 else array


def to_video(part: dict, sample_id: str, where: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames (T, H, W, 3) uint8 of the video part of a message (see `Sample`), and the processor's metadata of them."""
    video = part["video"]
    fps = part.get("fps", math.nan)
    indices = part.get("frames_indices")
    try:
        # no default: Qwen3-VL writes time stamps into the prompt, and would write wrong ones
        if not 0 < fps < math.inf:
            raise ValueError(f"its 'fps' is {fps}")
        if isinstance(video, (str, os.PathLike)):
            path = os.fspath(video)
            if path.startswith("file://"):
                path = url2pathname(path.removeprefix("file://"))
            frames, metadata = load_video(path, fps=fps)
            fps, indices = metadata.fps, metadata.frames_indices
        elif isinstance(video, (list, tuple)):
            images = [
                to_image(x, sample_id, f"{where}.video[{i}]") for i, x in enumerate(video)
            ]
            frames = np.stack(images)
        else:
            frames = _channels_last(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise ValueError(f"its shape is {frames.shape}")
        indices = _frame_indices(indices, len(frames))
    except SampleError:
        raise
    except Exception as error:  # decoders raise many kinds
        fix = "Give a uint8 array (T, H, W, 3) of sampled frames, a list of images, or a path with 'fps'"
        problem = f"is no video that can be read ({_brief(error)})"
        raise SampleError(sample_id, where, problem, fix) from error
    # time stamps that a processor writes into the prompt come from fps and indices
    timing = {"fps": fps, "frames_indices": indices, "total_num_frames": max(indices) + 1}
    return frames, timing


def _frame_indices(given: Any, count: int) -> list[int]:
    """Places of the frames in their source, one by one where none are given; a list that processors may write into."""
    indices = list(range(count)) if given is None else [int(i) for i in given]
    if len(indices) != count:
        raise ValueError(f"{len(indices)} frames_indices for {count} frames")
    if indices[0] < 0 or (np.diff(indices) < 0).any():
        raise ValueError("its frames_indices do not count up from 0 or more")
    return indices


def _brief(error: Exception) -> str:
    """What an error says, without the base64 text of a whole picture that it may quote."""
    text = str(error)
    return text if len(text) < 300 else f"{text[:300]} ..."


def same_content(a: Any, b: Any) -> bool:
    """Whether two media are one object, or have the same content."""
    if a is b or type(a) is not type(b):
        return a is b
    try:
        # array_equal would make an array of each first; PIL compares sizes before pixels
        if isinstance(a, (str, bytes, Image.Image)):
            return bool(a == b)
        return np.array_equal(a, b)
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
        # what the template opens the model's turn with quotes nothing of the messages
        before = self._render(add_generation_prompt=False)
        opens = self.rendered.startswith(before)
        self.opening = len(self.rendered) - len(before) if opens else 0
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
        expected = evidence
        if construction != "geometry":
            expected = _by_geometry(self, whole_frames=True)
        if not np.array_equal(evidence, expected):
            problem = (
                f"{construction} finds {len(evidence)} tokens, geometry {len(expected)}"
            )
            self.sample.fail("evidence", problem, "Take construction='geometry'")
        question = self.text_tokens(*self.find_question(), "question")
        inputs = self.inputs
        length = len(self.ids)
        answer_ids = []
        foil = self.sample.foil
        if self.sample.answer is not None:
            answer_ids = self.written(self.sample.answer)
            if not answer_ids:
                self.sample.fail(
                    "answer", "is empty", "Give the text of the answer, or None"
                )
            inputs = with_text(inputs, length, answer_ids)
        total = length + len(answer_ids)
        limit = getattr(self.mllm.text_config, "max_position_embeddings", None)
        if limit and total > limit:
            problem = f"{total} tokens, but the model's context ends at {limit}"
            self.sample.fail("messages", problem, "Give less context")
        return TaggedSample(
            inputs=inputs,
            visual=self.visual,
            evidence=evidence,
            question=question,
            answer=np.arange(length, total),
            last=length - 1,
            media=self.media,
            sample=self.sample,
            foil=None if foil is None else np.array(self.written(foil), np.int64),
        )

    def written(self, answer: str) -> list[int]:
        """Token ids of an answer as the model writes it behind the prompt: no token straddles the two."""

        def encode(text: str) -> list[int]:
            return self.mllm.tokenizer(text, add_special_tokens=False)["input_ids"]

        gap = self._gap(answer)
        if not gap:
            return encode(answer)
        # behind the prompt's end, for some vocabularies write a blank in front of whatever stands first
        end = self.rendered[-32:]
        before, together = encode(end), encode(end + gap + answer)
        if together[: len(before)] == before:
            return together[len(before) :]
        return encode(gap + answer)

    def _gap(self, answer: str) -> str:
        """What the chat template puts between the prompt and an answer, such as the blank in "Assistant: left"."""
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        try:
            whole = self._render([*self.messages, turn], add_generation_prompt=False)
        except SampleError:  # a template that takes no such turn
            return ""
        if not whole.startswith(self.rendered):
            return ""
        behind = whole[len(self.rendered) :]
        gap = behind[: len(behind) - len(behind.lstrip())]
        # of an answer that brings its own the template's would be one more
        brings = answer[:1].isspace() or not behind.lstrip().startswith(answer)
        return "" if brings else gap

    def _read_messages(self) -> None:
        """The messages in one form, and those of their parts that are images and videos."""
        self.messages = read_messages(self.sample)
        self.parts = []
        self.fields = []
        for m, message in enumerate(self.messages):
            for p, part in enumerate(message["content"]):
                if part["type"] != "text":
                    self.parts.append(part)
                    self.fields.append(f"messages[{m}].content[{p}]")

    def _render(
        self, messages: list[dict] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The prompt by the chat template, each medium one placeholder."""
        processor = self.mllm.processor
        messages = self.messages if messages is None else messages
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
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
            self.sample.fail("messages", problem, "Give roles that the model knows")

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
            frames, timing = to_video(part, self.sample.id, where)
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
        # checkpoints may bring a length along at which their tokenizer cuts
        options = {
            "return_tensors": "pt",
            "add_special_tokens": self.add_special_tokens,
            "truncation": False,
        }
        try:
            self.inputs = dict(processor(text=[self.rendered], **options, **media))
        # processors raise many kinds; the sample's name must not be lost
        except Exception as error:
            fix = "Give each image and video as a part of its own, and write no placeholder of one into the text"
            self.sample.fail("messages", f"the processor refuses them ({error})", fix)

    def _record(self, *given, **named):
        """The processor's own method; it alone knows where each placeholder's tokens come to stand."""
        expanded = self.mllm.processor.get_text_with_replacements(*given, **named)
        [self.text], [self.replaced] = expanded  # lists over a batch, here of one
        return expanded

    def encode(self, text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) of a text, and the characters (L, 2) that they stand for."""
        options = {
            "return_offsets_mapping": True,
            "truncation": False,
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
            self.sample.fail(
                "messages", problem, "Give text alone, or take a model that reads them"
            )
        if self.mllm.family.one_token and len({m.kind for m in self.media}) > 1:
            problem = (
                "they hold images and videos, and the model reads one of the two at a time"
            )
            self.sample.fail("messages", problem, "Give images alone, or videos alone")
        # a tokenizer's own end token, behind which no model goes on
        if len(self.ids) and self.offsets[-1, 0] == self.offsets[-1, 1]:
            problem = f"the tokenizer puts {self.mllm.tokenizer.decode(self.ids[-1])!r} behind them"
            fix = "Set its add_eos_token to False, or take off its post-processor"
            self.sample.fail("messages", problem, fix)
        held = [len(m.tokens) for m in self.media]
        needed = [len(m.boxes) for m in self.media]
        whole = np.array_equal(self.ids, self.inputs["input_ids"][0])
        # the last condition finds visual tokens outside all media: somebody wrote them into the text
        if not whole or held != needed or sum(held) != len(self.visual):
            problem = f"the prompt holds {len(self.visual)} visual tokens where its media need {sum(needed)}"
            fix = "Do not truncate the input, and write no placeholder of an image or a video into the text"
            self.sample.fail("messages", problem, fix)

    def text_tokens(self, first: int, last: int, where: str) -> np.ndarray:
        """Tokens that overlap the characters [first, last) of the prompt."""
        # overlap, not containment: a token often takes in the space in front of a word
        begin, end = self.offsets.T
        tokens = np.flatnonzero((begin < last) & (end > first))
        if len(tokens) == 0 or self.is_visual(self.ids[tokens]).any():
            problem = f"{self.text[first:last]!r} has no tokens of its own"
            self.sample.fail(where, problem, "Quote a piece of the plain text")
        return tokens

    def find(self, text: str, where: str, once: bool = False) -> tuple[int, int]:
        """Characters of a piece of text in the prompt, where it stands last."""
        said = self.text[: len(self.text) - self.opening]
        if not isinstance(text, str):
            self.sample.fail(where, f"{text!r} is no text", "Give a string")
        count = said.count(text) if text else 0
        # "ana" stands twice in "banana", and is counted once
        overlaps = count == 1 and said.find(text) != said.rfind(text)
        count += overlaps
        if count == 0 or (once and count > 1):
            fix = (
                "Quote a piece of the messages' text, exactly"
                + ", that stands there once" * once
            )
            self.sample.fail(where, f"{text!r} stands {count} times in the prompt", fix)
        start = said.rindex(text)
        return start, start + len(text)

    def find_question(self) -> tuple[int, int]:
        """Characters of the question in the prompt: its last occurrence."""
        question = self.sample.question
        if question is None:
            question = ""
            behind = ""  # what other roles say after it
            for message in self.messages:
                for part in message["content"]:
                    if message.get("role") == "user" and part["type"] == "text":
                        question, behind = part["text"], ""
                    else:
                        behind += part.get("text", "") + "\n"
            if question.strip() and question.strip() in behind:
                problem = f"{question.strip()!r} is quoted in a later message"
                fix = "Give as question= a piece of it that is not"
                self.sample.fail("question", problem, fix)
        # chat templates may strip what they are given
        return self.find(question.strip(), "question")

    def evidence_tokens(self, piece: Evidence, where: str) -> np.ndarray:
        """Tokens of one piece of evidence, by the geometry of the media."""
        match piece:
            case Span(text):
                tokens = [self.text_tokens(*self.find(text, where, once=True), where)]
            case Pages(pages):
                tokens = [self._look(where, "image", page) for page in pages]
            case Region(image, box, unit):
                tokens = [self._look(where, "image", image, box=(box, unit))]
            case Frames(video, frames):
                tokens = [self._look(where, "video", video, frame) for frame in frames]
            case Tube(video, Mapping() as boxes, unit):
                tokens = [
                    self._look(where, "video", video, frame, (box, unit))
                    for frame, box in boxes.items()
                ]
            case _:
                fix = "Take Region, Pages, Frames, Tube or Span"
                self.sample.fail(where, f"{piece!r} is no evidence", fix)
        # a box in a strip that preprocessing cuts off, or no pages, frames or boxes at all
        if sum(map(len, tokens)) == 0:
            fix = "Give evidence that the model's preprocessing keeps"
            self.sample.fail(where, f"{piece} maps to no token", fix)
        return np.concatenate(tokens)

    def _look(
        self,
        where: str,
        kind: str,
        index: int,
        frame: int | None = None,
        box: tuple[Any, str] | None = None,
    ) -> np.ndarray:
        """Tokens of a medium that look at a frame of it, if it is a video, and at a box in a unit, if one is given."""
        media = [medium for medium in self.media if medium.kind == kind]
        self._check_index(where, kind, index, len(media))
        medium = media[index]
        hit = np.ones(len(medium.tokens), bool)
        if kind == "video":
            self._check_index(where, "frame", frame, medium.size[0])
            hit &= (medium.frames[:, 0] <= frame) & (frame < medium.frames[:, 1])
        if box is not None:
            hit &= medium.overlaps(self._read_box(*box, medium, where))
        return medium.tokens[hit]

    def _check_index(self, where: str, name: str, index: Any, count: int) -> None:
        if type(index) is not int or not 0 <= index < count:
            fix = f"There are {count}, counted from 0"
            self.sample.fail(where, f"{name} {index!r} is out of range", fix)

    def _read_box(
        self, box: Any, unit: str, medium: Medium, where: str
    ) -> tuple[float, float, float, float]:
        """A box in pixels."""
        _, height, width = medium.size
        medium_name = f"{medium.kind} {medium.index}"
        if unit not in UNITS:
            fix = f"Take one of {', '.join(map(repr, UNITS))}"
            self.sample.fail(where, f"unit {unit!r} is unknown", fix)
        slack = 0.5  # annotations are rounded
        try:
            x1, y1, x2, y2 = map(float, box)
            if whole := UNITS[unit]:
                x1, x2 = x1 / whole * width, x2 / whole * width
                y1, y2 = y1 / whole * height, y2 / whole * height
            # NaN compares as false, so that it is refused as well
            inside = (
                -slack <= x1 < x2 <= width + slack and -slack <= y1 < y2 <= height + slack
            )
        except (TypeError, ValueError):
            inside = False
        if not inside:
            problem = f"{box} is no box inside the {width} x {height} px of {medium_name} (unit {unit!r})"
            fix = (
                "Give (x1, y1, x2, y2) with x1 < x2 and y1 < y2 in pixels of the upright image, "
                "or unit='fraction' or 'thousandth'"
            )
            self.sample.fail(where, problem, fix)
        if unit == "pixel" and max(x2, y2) <= 1:
            problem = f"{box} is one pixel of {medium_name}, or its corner"
            self.sample.fail(
                where, problem, "Say unit='fraction', if it is a part of the whole"
            )
        return x1, y1, x2, y2


def _same_part(a: dict, b: dict) -> bool:
    """Whether two parts of messages hold the same image or video, with the same timing."""
    return a.keys() == b.keys() and all(same_content(a[name], b[name]) for name in a)


# --- the three constructions of V*


def _by_geometry(prompt: Prompt, whole_frames: bool = False) -> np.ndarray:
    tokens = []
    for i, piece in enumerate(prompt.sample.evidence):
        tokens.append(prompt.evidence_tokens(piece, f"evidence[{i}]"))
        if whole_frames and isinstance(piece, Tube):
            frames = Frames(piece.video, list(piece.boxes))
            tokens.append(prompt.evidence_tokens(frames, f"evidence[{i}]"))
    return _union(tokens)


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
        prompt.sample.fail(where, problem, "Take construction='counting' or 'geometry'")
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
        prompt.sample.fail("messages", problem, "Take construction='geometry'")
    mllm = prompt.mllm
    total = len(prompt.visual)
    sizes = [medium.size for medium in prompt.media]
    sources = mllm.model.config, mllm.processor, prompt.inputs
    lengths = mllm.family.block_lengths(*kinds, sizes, total, *sources)
    held = [len(medium.tokens) for medium in prompt.media]
    if held != [sum(blocks) for blocks in lengths]:
        problem = f"blocks of {lengths} tokens, but its media have {held}"
        prompt.sample.fail("messages", problem, "Take construction='geometry'")
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
            prompt.sample.fail(f"evidence[{i}]", problem, "Take construction='geometry'")
        prompt.evidence_tokens(piece, f"evidence[{i}]")


def _union(tokens: list[np.ndarray]) -> np.ndarray:
    # with no evidence at all, an empty array of integers and not of floats
    return np.unique(np.concatenate([np.empty(0, np.int64), *tokens]))


CONSTRUCTIONS = {"geometry": _by_geometry, "markers": _by_markers, "counting": _by_counting}
