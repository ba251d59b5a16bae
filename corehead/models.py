"""Load a checkpoint, and say where an architecture keeps its layers and its visual tokens."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.utils import cached_file

from .store import digest


@dataclass
class Medium:
    """One image or video as the language model sees it.

    Attributes
    ----------
    kind : "image" or "video"; index : its place among the media of that kind.
    size : (T, H, W) in frames and pixels of what was given; T = 1 for an image.
    tokens : (n,) int64, positions in input_ids.
    boxes : (n, 4) float64, the pixels (x1, y1, x2, y2) that each token looks at; NaN for newline slots.
    frames : (n, 2) int64, half-open range of frames that each token looks at.
    view : (n,) int64, which view of the picture a token belongs to: the tiles or the thumbnail, the base view or the
        crops, a frame or pair of frames of a video.
    closers : tokens that the processor adds behind the last visual token.
    """

    kind: str
    index: int
    size: tuple[int, int, int]
    tokens: np.ndarray
    boxes: np.ndarray
    frames: np.ndarray
    view: np.ndarray
    closers: int = 0


def _edges(n: int, length: float) -> np.ndarray:
    """(n, 2) equal intervals over [0, length]."""
    edge = np.arange(n + 1) * (length / n)
    return np.stack([edge[:-1], edge[1:]], 1)


def _cells(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Row intervals (R, 2) and column intervals (C, 2) to boxes (R * C, 4), row by row."""
    r, c = np.repeat(rows, len(columns), 0), np.tile(columns, (len(rows), 1))
    return np.stack([c[:, 0], r[:, 0], c[:, 1], r[:, 1]], 1)


class Family:
    """What corehead must know of an architecture. One instance each, in `FAMILIES`."""

    name = "text"
    nested_images = False

    def decoder(self, model: PreTrainedModel) -> torch.nn.Module:
        """The module that holds `layers`."""
        return model.model

    def visual_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        """Token ids that stand for visual features."""
        return ()

    def placeholders(self, processor: Any) -> tuple[str, str] | None:
        """What the chat template writes for an image and for a video."""
        return None

    def media(self, mllm: MLLM, ids: np.ndarray, inputs: dict, given: list[tuple]) -> list[Medium]:
        """Geometry of every visual token. `given`: (kind, index, (T, H, W)) of each medium, in the prompt's order."""
        return []

    def positions(self, mllm: MLLM, inputs: dict) -> torch.Tensor:
        """Position ids of a whole unpadded sequence, (1, L) or (3, 1, L)."""
        length = inputs["input_ids"].shape[1]
        return torch.arange(length, device=inputs["input_ids"].device)[None]


class Qwen3VL(Family):
    """One token a merged patch of the resized picture; a video has one grid for each pair of frames."""

    name = "qwen3_vl"

    def decoder(self, model):
        return model.model.language_model

    def visual_ids(self, config):
        return config.image_token_id, config.video_token_id

    def placeholders(self, processor):
        return processor.image_token, processor.video_token

    def media(self, mllm, ids, inputs, given):
        config, out = mllm.model.config, []
        merge = config.vision_config.spatial_merge_size
        place = {k: np.flatnonzero(ids == i) for k, i in zip(("image", "video"), self.visual_ids(config), strict=True)}
        for kind, i, size in given:
            t, rows, columns = (int(g) for g in inputs[f"{kind}_grid_thw"][i])
            rows, columns = rows // merge, columns // merge
            cells = np.tile(_cells(_edges(rows, size[1]), _edges(columns, size[2])), (t, 1))
            step = config.vision_config.temporal_patch_size if kind == "video" else 1
            first = np.repeat(np.arange(t), rows * columns) * step
            frames = np.stack([first, np.minimum(first + step, size[0])], 1)
            tokens, place[kind] = np.split(place[kind], [len(cells)])
            out.append(Medium(kind, i, size, tokens, cells, frames, first // step, closers=int(kind == "video")))
        return out

    def positions(self, mllm, inputs):
        if "mm_token_type_ids" not in inputs:
            return super().positions(mllm, inputs)
        return mllm.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )[0]


class InternVL(Family):
    """A picture is stretched over C x R tiles of u x u tokens each, and a thumbnail follows; a frame is one tile."""

    name = "internvl"

    def decoder(self, model):
        return model.model.language_model

    def visual_ids(self, config):
        return (config.image_token_id,)

    def placeholders(self, processor):
        return processor.image_token, processor.video_token

    def media(self, mllm, ids, inputs, given):
        settings, per_tile, out = mllm.processor.image_processor, mllm.processor.image_seq_length, []
        tile, unit = (settings.size["height"], settings.size["width"]), math.isqrt(per_tile)
        place = np.flatnonzero(ids == mllm.model.config.image_token_id)
        for kind, i, size in given:
            t, h, w = size
            whole = _cells(_edges(unit, h), _edges(unit, w))
            if kind == "video":
                boxes, first = np.tile(whole, (t, 1)), np.repeat(np.arange(t), per_tile)
                view = first
            else:
                # nothing stands between an image's tiles, so that the run of tokens is the image
                run = int((np.diff(place, append=-1) != 1).argmax()) + 1 if len(place) else 0
                boxes = whole
                if run > per_tile:
                    columns, rows = get_optimal_tiled_canvas((h, w), tile, settings.min_patches, settings.max_patches)
                    canvas = _cells(_edges(rows * unit, h), _edges(columns * unit, w))
                    canvas = canvas.reshape(rows, unit, columns, unit, 4).swapaxes(1, 2).reshape(-1, 4)  # tile by tile
                    boxes = np.concatenate([canvas, whole])
                first = np.zeros(len(boxes), np.int64)
                view = (np.arange(len(boxes)) >= len(boxes) - per_tile).astype(np.int64) * (run > per_tile)
            tokens, place = np.split(place, [len(boxes)])
            out.append(Medium(kind, i, size, tokens, boxes, np.stack([first, first + 1], 1), view, closers=1))
        return out


class LlavaOnevision(Family):
    """A base view, then the crops' features unpadded, each row closed by a newline slot (anyres)."""

    name = "llava_onevision"
    nested_images = True

    def decoder(self, model):
        return model.model.language_model

    def visual_ids(self, config):
        return config.image_token_id, config.video_token_id

    def placeholders(self, processor):
        return processor.image_token, processor.video_token

    def media(self, mllm, ids, inputs, given):
        config, out = mllm.model.config, []
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        n, newline = side // patch, np.full((1, 4), np.nan)
        place = {k: np.flatnonzero(ids == i) for k, i in zip(("image", "video"), self.visual_ids(config), strict=True)}
        single = sum(kind == "image" for kind, _, _ in given) == 1
        for kind, i, size in given:
            t, h, w = size
            frames = np.zeros(1, np.int64)
            if kind == "video":  # the features of a frame are resampled n -> ceil(n / 2), one newline slot at the end
                rows, columns = (_bilinear(_patches(n, patch, side, x), math.ceil(n / 2)) for x in (h, w))
                cells = _cells(rows, columns)
                boxes = np.concatenate([np.tile(cells, (t, 1)), newline])
                frames = np.append(np.repeat(np.arange(t), len(cells)), t)
            elif single:
                base = _cells(_patches(n, patch, side, h), _patches(n, patch, side, w))
                boxes = np.concatenate([base, self._crops(mllm, h, w, side, patch, n)])
            else:  # padded to a square, no crops
                long = max(h, w)
                rows, columns = (_patches(n, patch, side, long, (long - x) // 2, x) for x in (h, w))
                boxes = np.concatenate([_cells(rows, columns), newline])
            boxes[(boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])] = np.nan  # on the padding alone
            frames = np.broadcast_to(frames, len(boxes))
            view = frames if kind == "video" else (np.arange(len(boxes)) >= n * n).astype(np.int64)
            tokens, place[kind] = np.split(place[kind], [len(boxes)])
            out.append(Medium(kind, i, size, tokens, boxes, np.stack([frames, frames + 1], 1), view))
        return out

    def _crops(self, mllm, h, w, side, patch, n) -> np.ndarray:
        best_h, best_w = select_best_resolution((h, w), mllm.model.config.image_grid_pinpoints)
        scale_w, scale_h = best_w / w, best_h / h
        if scale_w < scale_h:
            new_w, new_h = best_w, min(math.ceil(h * scale_w), best_h)
        else:
            new_h, new_w = best_h, min(math.ceil(w * scale_h), best_w)
        rows = _crop_axis(h, new_h, best_h, side, patch, n)
        columns = _crop_axis(w, new_w, best_w, side, patch, n)
        # unpad, in feature space, as the model does
        if w / h > len(columns) / len(rows):
            pad = (len(rows) - int(round(h * (len(columns) / w), 7))) // 2
            rows = rows[pad : len(rows) - pad]
        else:
            pad = (len(columns) - int(round(w * (len(rows) / h), 7))) // 2
            columns = columns[pad : len(columns) - pad]
        limit = int(mllm.processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(len(rows) * len(columns) / (limit * n * n))
        if ratio > 1.1:
            rows, columns = (_bilinear(axis, int(len(axis) // ratio)) for axis in (rows, columns))
        cells = _cells(rows, columns).reshape(len(rows), len(columns), 4)
        newlines = np.full((len(rows), 1, 4), np.nan)
        return np.concatenate([cells, newlines], 1).reshape(-1, 4)


def _patches(n: int, patch: int, side: int, length: float, offset: float = 0, limit: float = math.inf) -> np.ndarray:
    """(n, 2) pixels under each of n patches when `length` pixels are stretched over `side`; the rest is dropped.

    `offset` pixels of padding come first; what is cut at 0 and `limit` is padding too.
    """
    start = np.arange(n) * patch
    pixels = np.stack([start, start + patch], 1) * (length / side) - offset
    return pixels.clip(0, min(length, limit))


def _crop_axis(size: int, fitted: int, canvas: int, side: int, patch: int, n: int) -> np.ndarray:
    """(canvas / side * n, 2) pixels under each feature of the crops along one axis; empty on the padding."""
    start = (np.arange(canvas // side)[:, None] * side + np.arange(n) * patch).reshape(-1)
    pixels = (np.stack([start, start + patch], 1) - (canvas - fitted) // 2) * (size / fitted)
    return pixels.clip(0, size)


def _bilinear(axis: np.ndarray, n: int) -> np.ndarray:
    """Intervals (m, 2) after a bilinear resampling m -> n (align_corners=False): the two that are mixed, together."""
    source = ((np.arange(n) + 0.5) * (len(axis) / n) - 0.5).clip(0)
    low = np.floor(source).astype(int)
    high = np.minimum(low + (source > low), len(axis) - 1)
    return np.stack([axis[low, 0], axis[high, 1]], 1)


FAMILIES: dict[str, Family] = {
    "qwen3_vl": Qwen3VL(),
    "internvl": InternVL(),
    "llava_onevision": LlavaOnevision(),
    **dict.fromkeys(("llama", "qwen2", "qwen3"), Family()),
}


@dataclass(eq=False)
class MLLM:
    """A language model, multimodal or not, with what corehead needs to know of it.

    Parameters
    ----------
    model : a transformers model of a supported family, in eval mode or not; it is not changed.
    processor : its processor (a tokenizer for plain language models), or None for bare token ids.
    source : where it came from, for provenance.
    revision : commit or tag, for provenance.

    Raises
    ------
    ValueError : the architecture is not supported.
    """

    model: PreTrainedModel
    processor: Any = None
    source: str = ""
    revision: str | None = None
    family: Family = field(init=False)

    def __post_init__(self):
        kind = self.model.config.model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"model_type {kind!r} is not supported: take one of {', '.join(FAMILIES)}, "
                "or add a Family to corehead.models.FAMILIES"
            )
        self.family = FAMILIES[kind]

    @cached_property
    def text_config(self) -> PretrainedConfig:
        return self.model.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return self.text_config.num_hidden_layers

    @property
    def n_heads(self) -> int:
        """Query heads a layer."""
        return self.text_config.num_attention_heads

    @property
    def n_kv_heads(self) -> int:
        return self.text_config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.attentions[0].head_dim

    @property
    def attentions(self) -> list[torch.nn.Module]:
        """The self-attention module of every decoder layer."""
        return [layer.self_attn for layer in self.family.decoder(self.model).layers]

    @property
    def device(self) -> torch.device:
        """Where token ids go in; layers may be on others."""
        return device_of(self.model.get_input_embeddings())

    @property
    def tokenizer(self) -> Any:
        if self.processor is None:
            raise ValueError("this MLLM was made without a processor: give token ids (Tagged), or pass processor=")
        return getattr(self.processor, "tokenizer", self.processor)

    def tag(self, sample, construction: str = "geometry"):
        """Tokenise a sample and find its target, visual, question and answer tokens: see `corehead.tagging.tag`."""
        from .tagging import tag

        return tag(self, sample, construction)

    def __repr__(self) -> str:
        heads = f"{self.n_layers} layers x {self.n_heads} heads ({self.n_kv_heads} KV)"
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"MLLM({self.source or type(self.model).__name__}: {self.family.name}, {heads}, {parameters:,} parameters)"
        )


GIB = 2**30
ROWS = 2**13  # tokens that the decoder computes at once


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate takes them to if they are offloaded."""
    weight = next(module.parameters())
    if not weight.is_meta:
        return weight.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    return next((torch.device(h.execution_device) for h in hooks if h is not None), weight.device)


def resident(model: torch.nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of a model, or, where it is offloaded, its copy in host memory or on disk."""
    if not parameter.is_meta:
        return parameter
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner)._hf_hook.weights_map[own]


@dataclass(frozen=True)
class Memory:
    """What scoring takes, in bytes; `total` is their sum.

    Attributes
    ----------
    weights : parameters and buffers.
    cache : keys and values of all tokens in all layers.
    features : embeddings of all tokens, with the vision tower's features for the first layers (deepstack).
    work : one layer over one chunk, and the rows that are read: it does not grow with the context, except for one
        layer's keys in float32.
    """

    weights: int
    cache: int
    features: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.features + self.work

    def __str__(self) -> str:
        parts = ", ".join(f"{f} {getattr(self, f) / GIB:.1f}" for f in ("weights", "cache", "features", "work"))
        return f"{self.total / GIB:.1f} GiB ({parts})"


def memory(
    source: str | Path | PretrainedConfig,
    dtype: str | torch.dtype = "auto",
    *,
    tokens: int = 0,
    revision: str | None = None,
) -> Memory:
    """What it takes to score a prompt, from the configuration alone: nothing is loaded.

    Parameters
    ----------
    source : a checkpoint's folder or hub id, of which config.json is read, or a configuration.
    dtype : as for `load`.
    tokens : length of the context; 0 counts the weights alone.
    revision : as for `load`.

    Returns
    -------
    Memory, in bytes

    Raises
    ------
    FileNotFoundError, ValueError : as `load`.

    Examples
    --------
    >>> print(ch.models.memory("Qwen/Qwen3-VL-8B-Instruct", "bfloat16", tokens=131072))
    """
    config = source if isinstance(source, PretrainedConfig) else _find(str(source), revision)[0]
    dtype = _dtype(config, dtype)
    with torch.device("meta"):
        model = _auto(config).from_config(config, dtype=dtype)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    if not tokens:
        return Memory(weights, 0, 0, 0)
    text, size = config.get_text_config(), dtype.itemsize
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * head_dim * tokens  # of one layer
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ())
    rows, heads = min(tokens, ROWS), text.num_attention_heads * head_dim
    layer = rows * (6 * text.hidden_size + 4 * heads + 3 * text.intermediate_size) * size
    return Memory(
        weights=weights,
        cache=2 * text.num_hidden_layers * keys * size,
        features=(1 + len(deepstack)) * tokens * text.hidden_size * size,
        work=layer + 2 * 4 * keys + 4 * 4 * 2**26,  # float32: keys and their transpose, blocks of attention rows
    )


def _free(device: str) -> int:
    """Bytes of free memory on a device; for "auto" on all of them."""
    if device == "auto":
        return sum(_free(f"cuda:{i}") for i in range(torch.cuda.device_count())) + _free("cpu")
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _require_room(name: str, config: PretrainedConfig, dtype: str | torch.dtype, device: str) -> None:
    """Raise MemoryError where the weights cannot fit; warn where they would be offloaded."""
    need, free = memory(config, dtype).weights, _free(device)
    if need > free:
        raise MemoryError(
            f"{name}: its weights take {need / GIB:.1f} GiB in {_dtype(config, dtype)}, but {device} has "
            f"{free / GIB:.1f} GiB free. Take dtype='bfloat16', device='auto' (all GPUs and the host's memory), or a "
            "smaller checkpoint"
        )
    gpus = torch.cuda.device_count() if device == "auto" else 0
    if gpus and need > sum(_free(f"cuda:{i}") for i in range(gpus)):
        warnings.warn(
            f"{name}: its weights take {need / GIB:.1f} GiB, more than the {gpus} GPUs have free: some layers stay in "
            "the host's memory, which is slow",
            stacklevel=3,
        )


def _dtype(config: PretrainedConfig, dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by name; "auto" is the one that the checkpoint was saved in."""
    found = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return getattr(torch, found) if isinstance(found, str) else found


def _auto(config: PretrainedConfig):
    multimodal = FAMILIES[config.model_type].name != "text"
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def _find(name: str, revision: str | None, trust_remote_code: bool = False) -> tuple[PretrainedConfig, Path]:
    """The configuration of a folder or hub id of a supported architecture, and the folder that it lies in."""
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.count("/") != 1 or name.startswith(("data/", "."))):
        mend = "Give a checkpoint's folder, or a hub id"
        if folder.with_name(f"{folder.name}.yaml").is_file():
            mend = f"`make testbed MODELS={folder.name}` trains it"
        raise FileNotFoundError(f"{name}: no such folder. {mend}")
    try:
        place = Path(cached_file(name, "config.json", revision=revision)).parent
        config = AutoConfig.from_pretrained(
            name, revision=_commit(place) or revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        said = str(error).splitlines()[0]
        fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        if "gated" in said:
            mend = f"Ask for access at https://huggingface.co/{name}, then `hf auth login` and `{fetch}`"
        elif "not a valid git identifier" in said:
            mend = f"Take a branch, tag or commit that https://huggingface.co/{name}/tree/main lists"
        else:
            mend = f"With a network, `{fetch}` fetches it; without one, give the folder"
        raise FileNotFoundError(f"{name}: cannot be loaded ({said}). {mend}") from error
    except ValueError as error:  # an architecture that transformers does not know, with code of its own or without
        raise ValueError(
            f"{name}: its model_type is not supported; {', '.join(FAMILIES)} are. Code that a checkpoint brings along "
            "is not run: take the checkpoint in transformers' own format (InternVL's end in -HF)"
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name}: model_type {config.model_type!r} is not supported; {', '.join(FAMILIES)} are")
    return config, place


def _commit(place: Path) -> str | None:
    """The commit that a folder of the hub's cache holds."""
    return place.name if place.parent.name == "snapshots" else None


def _bad_file(folder: Path) -> str | None:
    """What is wrong with the weight files of a folder, and the mend; None if nothing is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if not files and pickled:
        return (
            f"it holds pickled weights alone ({pickled[0]}), and reading those can run code. Take a revision with "
            f"safetensors, or, where you trust the file, let transformers convert it: from_pretrained({str(folder)!r}, "
            f"use_safetensors=False).save_pretrained({str(folder)!r})"
        )
    for file in files:
        if not file.is_file():
            return f"{file.name} is missing, one of {len(files)} pieces. Fetch it again"
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is damaged or cut off ({error}). Fetch it again"
    return None


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the first weights of every parameter."""
    named = ((name, resident(model, name, p)) for name, p in model.named_parameters())
    return digest(json.dumps({name: p.detach().flatten()[:8].float().tolist() for name, p in named}))


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MLLM:
    """Load a checkpoint from a folder or the hub.

    Parameters
    ----------
    source : a folder, or a hub id such as "Qwen/Qwen3-VL-8B-Instruct". With HF_HUB_OFFLINE=1 the hub's cache is read
        alone. Weights are read from safetensors only.
    dtype : "auto" (as saved), "float32", "bfloat16", "float16" or a torch dtype.
    device : "cpu", "cuda", "cuda:1" ..., or "auto" to spread the layers over what there is.
    revision : branch, tag or commit on the hub; None is its main branch. `MLLM.revision` is the commit.
    trust_remote_code : run code that the checkpoint brings along; off unless you say so.

    Returns
    -------
    MLLM, in eval mode

    Raises
    ------
    FileNotFoundError : no such folder, and not to be had from the hub.
    MemoryError : the weights do not fit on the device: see `memory`.
    ValueError : the architecture is not supported; a file of weights is missing, damaged or no safetensors; the
        weights do not fit the architecture.
    """
    name = str(source)
    config, place = _find(name, revision, trust_remote_code)
    commit = _commit(place) or revision  # a branch that moves meanwhile must not mix two commits
    options = dict(revision=commit, trust_remote_code=trust_remote_code)
    _require_room(name, config, dtype, device)
    placement = {} if device == "cpu" else dict(device_map=device)
    try:
        model, info = _auto(config).from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement, **options
        )
    except Exception as error:  # safetensors and transformers raise many kinds for a bad file
        problem = _bad_file(place) or f"{error}. Fetch or train the checkpoint again"
        raise ValueError(f"{name}: the weights cannot be read: {problem}") from error
    lacking = {k: sorted(info[k])[:3] for k in ("missing_keys", "mismatched_keys", "unexpected_keys") if info.get(k)}
    if lacking:
        raise ValueError(f"{name}: the weights do not fit the architecture: {lacking}. Fetch or train it again")
    multimodal = FAMILIES[config.model_type].name != "text"
    processor = (AutoProcessor if multimodal else AutoTokenizer).from_pretrained(name, **options)
    return MLLM(model.eval(), processor, source=name, revision=commit)
