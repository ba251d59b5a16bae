"""Which pixels and frames each visual token covers, one class an architecture.

To add an architecture, subclass `Family`, say in `views` which pixels its tokens look at, and enter it in `FAMILIES`
under the model_type of its configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

# a visual token that closes a row of the picture and looks at no pixel
NEWLINE = np.full((1, 4), np.nan)


@dataclass
class Medium:
    """One image or video as the language model sees it.

    Attributes
    ----------
    kind : str
        "image" or "video".
    index : int
        Its place among the media of that kind, from 0.
    size : tuple of int
        (T, H, W) in frames and pixels of what was given; T = 1 for an image.
    tokens : ndarray (n,) int64
        Positions in input_ids.
    boxes : ndarray (n, 4) float64
        Pixels (x1, y1, x2, y2) that each token looks at; NaN where it looks at none: newline slots, padding.
    frames : ndarray (n, 2) int64
        Half-open range of frames that each token looks at.
    view : ndarray (n,) int64
        Which view of the picture a token belongs to: the tiles or the thumbnail, the base view or the crops, a frame or
        pair of frames of a video.
    """

    kind: str
    index: int
    size: tuple[int, int, int]
    tokens: np.ndarray
    boxes: np.ndarray
    frames: np.ndarray
    view: np.ndarray

    def overlaps(self, box: tuple[float, float, float, float]) -> np.ndarray:
        """(n,) bool: which tokens look at a box of pixels."""
        left, top, right, bottom = self.boxes.T
        x1, y1, x2, y2 = box
        # An edge that is a cell's edge up to rounding does not touch the next cell. Half of the box bounds the
        # tolerance, so that the smallest box still meets the cell around it. NaN compares as false: newlines meet none.
        tolerance = 1e-6 * max(self.size)
        width = np.minimum(right, x2) - np.maximum(left, x1)
        height = np.minimum(bottom, y2) - np.maximum(top, y1)
        wide = width > min(tolerance, (x2 - x1) / 2)
        high = height > min(tolerance, (y2 - y1) / 2)
        return wide & high


class Family:
    """What corehead must know of an architecture; one instance each, in `FAMILIES`."""

    name = ""
    auto_model: Any = AutoModelForImageTextToText
    auto_processor: Any = AutoProcessor
    # images and videos have the same token, so that the model reads one of the two at a time
    one_token = False

    def decoder(self, model: PreTrainedModel) -> torch.nn.Module:
        """The module that holds `layers`."""
        return model.get_decoder()

    def visual_ids(self, config: PretrainedConfig) -> list[int]:
        """Token ids that stand for visual features."""
        ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return [i for i in ids if i is not None]

    def positions(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Position ids of a whole unpadded sequence, (1, L) or (3, 1, L)."""
        return torch.arange(
            inputs["input_ids"].shape[1], device=inputs["input_ids"].device
        )[None]

    def views(
        self, kind, index, size, count, config, processor, inputs
    ) -> list[np.ndarray]:
        """The pixels that the visual tokens of one image or video look at, in the order of the tokens.

        Parameters
        ----------
        kind, index, size : str, int, tuple of int
            As in `Medium`.
        count : int
            How many tokens it has.
        config, processor, inputs : PretrainedConfig, ProcessorMixin, dict of tensors
            Those of the model, and what the processor made of the prompt.

        Returns
        -------
        list of ndarray (n, 4)
            Boxes as in `Medium`, an array for each view; each frame, or group of frames, of a video is a view.
        """
        raise NotImplementedError(f"{self.name} reads no {kind}")

    def block_lengths(
        self, kind, sizes, total, config, processor, inputs
    ) -> list[list[int]]:
        """How the visual tokens of a prompt follow each other in blocks: P_k of eqs. 9-10, 14, 18 and 19.

        Parameters
        ----------
        kind : str
            "image" or "video"; the prompt holds one kind alone.
        sizes : list of tuple of int
            (T, H, W) of every image or video.
        total : int
            M, the visual tokens of the prompt.
        config, processor, inputs
            As in `views`.

        Returns
        -------
        list of list of int
            Lengths for each image, of which each is one block, or each video: a block a frame, or group of frames that
            the vision tower merges, and perhaps one behind the last that no frame owns. Here images alone, all alike:
            P = M / N.
        """
        if kind == "video":
            raise NotImplementedError(f"{self.name} counts no frames")
        return [[total // len(sizes)]] * len(sizes)

    def medium(
        self, kind: str, index: int, size, tokens: np.ndarray, config, processor, inputs
    ) -> Medium:
        """Geometry of one image or video, of which `tokens` are the positions in input_ids."""
        count = len(tokens)
        views = self.views(kind, index, size, count, config, processor, inputs)
        boxes = np.concatenate(views)
        # boxes are clipped to the picture, so that those beside it come out empty
        on_padding = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
        boxes[on_padding] = np.nan
        view = np.repeat(np.arange(len(views)), [len(v) for v in views])
        # Some vision towers merge neighbouring frames into one. The last group is filled up with copies of the last
        # frame, and what is behind it covers nothing (LLaVA's newline behind a video).
        step = getattr(config.vision_config, "temporal_patch_size", 1)
        first = view * step if kind == "video" else np.zeros_like(view)
        frames = np.stack([first, np.minimum(first + step, size[0])], 1)
        return Medium(
            kind=kind,
            index=index,
            size=size,
            tokens=tokens,
            boxes=boxes,
            frames=frames,
            view=view,
        )


class Text(Family):
    """A plain language model."""

    name = "text"
    auto_model = AutoModelForCausalLM
    auto_processor = AutoTokenizer


class QwenVL(Family):
    """One token a merged patch of the resized picture; a video has one grid for each pair of frames.

    Parameters
    ----------
    name : str
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v" (GLM-4.1V) or "glm4v_moe" (GLM-4.5V), which differ
        in what stands between the frames.
    """

    def __init__(self, name: str):
        self.name = name
        self.one_token = name.startswith("glm")

    def views(self, kind, index, size, count, config, processor, inputs):
        # the grid counts patches, of which merge x merge become one token
        times, rows, columns = inputs[f"{kind}_grid_thw"][index].tolist()
        merge = config.vision_config.spatial_merge_size
        return [_grid(rows // merge, columns // merge, *size[1:])] * times

    def block_lengths(self, kind, sizes, total, config, processor, inputs):
        area = config.vision_config.spatial_merge_size**2
        grids = inputs[f"{kind}_grid_thw"].tolist()
        return [[rows * columns // area] * times for times, rows, columns in grids]

    def positions(self, model, inputs):
        if "mm_token_type_ids" not in inputs:
            return super().positions(model, inputs)
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        grids = {name: inputs.get(name) for name in names}
        # Qwen2.5-VL's positions in time are seconds, the others' count the pairs of frames
        if "second_per_grid_ts" in inputs:
            grids["second_per_grid_ts"] = inputs["second_per_grid_ts"]
        # what comes second is by how much positions lag behind a count of tokens
        return model.model.get_rope_index(inputs["input_ids"], **grids)[0]


class InternVL(Family):
    """A picture is stretched over C x R tiles of u x u tokens each, and a thumbnail follows; a frame is one tile."""

    name = "internvl"

    def views(self, kind, index, size, count, config, processor, inputs):
        frames, height, width = size
        unit = math.isqrt(processor.image_seq_length)
        whole = _grid(unit, unit, height, width)
        if kind == "video":
            return [whole] * frames
        settings = processor.image_processor
        tile = settings.size["height"], settings.size["width"]
        columns, rows = get_optimal_tiled_canvas(
            (height, width), tile, settings.min_patches, settings.max_patches
        )
        if rows * columns == 1:
            return [whole]
        return [_tiled(rows, columns, unit, height, width), whole]

    def block_lengths(self, kind, sizes, total, config, processor, inputs):
        tile = processor.image_seq_length
        if kind == "video":
            return [[tile] * frames for frames, _, _ in sizes]
        count = processor.image_processor.get_number_of_image_patches
        tiles = [
            count(height, width, {"crop_to_patches": True}) for _, height, width in sizes
        ]
        return [[n * tile] for n in tiles]


class Llava(Family):
    """A picture is fitted into one square: cropped, padded or stretched; what is cropped off is seen by no token.

    With Pixtral's vision tower (Pixtral 12B) it is one token a patch of the resized picture, and each row is closed by
    a text token.
    """

    name = "llava"

    def views(self, kind, index, size, count, config, processor, inputs):
        if config.vision_config.model_type == "pixtral":
            _check_resized(processor.image_processor)
            return [_patches(index, size, config.vision_config.patch_size, inputs)]
        patches, side = _tower_patches(config)
        settings = processor.image_processor
        shortest = settings.size.get("shortest_edge")
        _check_resized(settings)
        padded = isinstance(settings, LlavaImageProcessor) and settings.do_pad
        sides = {shortest or settings.size.get(edge) for edge in ("height", "width")}
        # of a picture that is padded or stretched the middle alone would be left
        if (padded or not shortest) and sides != {side}:
            raise ValueError(
                f"pictures of size {settings.size} are cropped to {side}: set that as their size"
            )
        axes = []
        for x in size[1:]:
            scale, padding = x / side, 0
            # padded to a square, in front of all else
            if padded:
                scale, padding = max(size) / side, (max(size) - x) // 2
            elif shortest:  # the longer side keeps the ratio, and its ends are cropped off
                fitted = int(shortest * x / min(size[1:]))
                scale = x / fitted
                padding = -((fitted - side) // 2) * scale
            axes.append(_pixels(patches, scale, padding, x))
        return [_cells(*axes)]


class LlavaNext(Family):
    """A base view, then the crops' features unpadded, each row closed by a newline slot (anyres)."""

    name = "llava_next"

    def views(self, kind, index, size, count, config, processor, inputs):
        patches, side = _tower_patches(config)
        crops = _crops(size[1:], patches, side, config.image_grid_pinpoints)
        return [_stretched(size[1:], patches, side), _with_newlines(*crops)]


class LlavaOnevision(Family):
    """As `LlavaNext`, but many crops' features are resampled, and several images or a video are not cropped."""

    name = "llava_onevision"

    def views(self, kind, index, size, count, config, processor, inputs):
        patches, side = _tower_patches(config)
        if kind == "video":
            # the model halves the features of a frame, and closes the video with one newline
            base = [_pixels(patches, x / side, 0, x) for x in size[1:]]
            pooled = [_resample(axis, math.ceil(len(axis) / 2)) for axis in base]
            return [_cells(*pooled)] * size[0] + [NEWLINE]
        if int(inputs["batch_num_images"][0]) == 1:
            axes = _crops(size[1:], patches, side, config.image_grid_pinpoints)
            # "anyres_max_9": features of more than 9 tiles are resampled; the model lets 10 % a side pass
            budget = int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
            ratio = math.sqrt(math.prod(map(len, axes)) / budget) / len(patches)
            if ratio > 1.1:
                axes = [_resample(axis, int(len(axis) // ratio)) for axis in axes]
            return [_stretched(size[1:], patches, side), _with_newlines(*axes)]
        # of several images each is padded to a square and not cropped
        long = max(size[1:])
        square = [_pixels(patches, long / side, (long - x) // 2, x) for x in size[1:]]
        return [_cells(*square), NEWLINE]

    def block_lengths(self, kind, sizes, total, config, processor, inputs):
        if kind == "image":
            return super().block_lengths(kind, sizes, total, config, processor, inputs)
        patches = config.vision_config.image_size // config.vision_config.patch_size
        pooled = math.ceil(patches / 2) ** 2
        # one newline slot behind all frames of a video
        return [[pooled] * frames + [1] for frames, _, _ in sizes]


class Gemma3(Family):
    """A picture is stretched to a square; with pan and scan, crops that cut its longer side into equal parts follow.

    Images attend to themselves both ways, by masks of N x N, which bounds the length of a prompt. Pan and scan is
    ``do_pan_and_scan`` in the processor's images_kwargs, off by default.
    """

    name = "gemma3"

    def views(self, kind, index, size, count, config, processor, inputs):
        _, height, width = size
        unit = math.isqrt(processor.image_seq_length)
        whole = _grid(unit, unit, height, width)
        views = [whole]
        crops = count // len(whole) - 1
        if crops:
            long = max(height, width)
            part = math.ceil(long / crops)
            for start in range(0, long, part):
                length = min(part, long - start)
                wide = width >= height
                crop = (height, length) if wide else (length, width)
                shift = (start, 0) if wide else (0, start)
                views.append(_grid(unit, unit, *crop) + [*shift, *shift])
        return views


class Idefics3(Family):
    """A picture is stretched over R x C tiles, separated by text, and all of it follows as one; a frame is one tile.

    Parameters
    ----------
    name : str
        "idefics3" or "smolvlm", which reads videos as well.
    """

    def __init__(self, name: str):
        self.name = name

    def views(self, kind, index, size, count, config, processor, inputs):
        frames, height, width = size
        unit = math.isqrt(processor.image_seq_len)
        whole = _grid(unit, unit, height, width)
        if kind == "video":
            return [whole] * frames
        tiles = count // len(whole) - 1
        if tiles < 1:
            return [whole]
        _check_resized(processor.image_processor)
        # the longer side always has as many tiles
        settings = processor.image_processor
        tile = settings.max_image_size["longest_edge"]
        along = math.ceil(settings.size["longest_edge"] / tile)
        across = tiles // along
        rows, columns = (across, along) if width >= height else (along, across)
        return [_tiled(rows, columns, unit, height, width), whole]

    def block_lengths(self, kind, sizes, total, config, processor, inputs):
        if kind == "image":
            return super().block_lengths(kind, sizes, total, config, processor, inputs)
        return [[processor.image_seq_len] * frames for frames, _, _ in sizes]


class Mistral3(Family):
    """One token a merged patch of the resized picture, each row closed by a text token."""

    name = "mistral3"

    def views(self, kind, index, size, count, config, processor, inputs):
        _check_resized(processor.image_processor)
        unit = config.vision_config.patch_size * config.spatial_merge_size
        return [_patches(index, size, unit, inputs)]


def _check_resized(settings: Any) -> None:
    """Raise ValueError where pictures keep their size, which the model then cuts or pads in ways of its own."""
    if not settings.do_resize:
        raise ValueError(
            "its image processor has do_resize=False: leave pictures to be resized"
        )


def _patches(index: int, size, unit: int, inputs) -> np.ndarray:
    """Boxes (n, 4) of a picture that Pixtral's processor resized to whole tokens of `unit` x `unit` pixels."""
    rows, columns = (inputs["image_sizes"][index] // unit).tolist()
    return _grid(rows, columns, *size[1:])


def _tower_patches(config: PretrainedConfig) -> tuple[np.ndarray, int]:
    """(n, 2) pixels of the patches along one axis of a tile, and its side; a strip behind the last is dropped."""
    side = config.vision_config.image_size
    patch = config.vision_config.patch_size
    return np.arange(side // patch)[:, None] * patch + [0, patch], side


def _stretched(size, patches, side) -> np.ndarray:
    """Boxes (n, 4) of a picture that is stretched to a square: each axis has a scale of its own."""
    return _cells(*(_pixels(patches, x / side, 0, x) for x in size))


def _crops(size, patches, side, resolutions) -> list[np.ndarray]:
    """Pixels of the rows and of the columns of a picture in a canvas of tiles, whose features are unpadded."""
    canvas = select_best_resolution(size, resolutions)
    scale = min(new / old for new, old in zip(canvas, size, strict=True))
    # rows and columns are independent of each other, so that an axis at a time will do
    axes = []
    for old, new in zip(size, canvas, strict=True):
        fitted = min(math.ceil(old * scale), new)
        tiles = np.arange(new // side)[:, None, None] * side + patches
        padding = (new - fitted) // 2
        scale_back = old / fitted
        axes.append(_pixels(tiles.reshape(-1, 2), scale_back, padding * scale_back, old))
    # the model's own function says how many rows and columns of features it keeps
    features = torch.empty(1, *map(len, axes))
    kept = unpad_image(features, size).shape[1:]
    for i, n in enumerate(kept):
        cut = (len(axes[i]) - n) // 2
        axes[i] = axes[i][cut : cut + n]
    return axes


def _with_newlines(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Boxes of cells, each row closed by a newline slot."""
    cells = _cells(rows, columns).reshape(len(rows), len(columns), 4)
    return np.insert(cells, len(columns), NEWLINE, axis=1).reshape(-1, 4)


def _tiled(rows: int, columns: int, unit: int, height: float, width: float) -> np.ndarray:
    """Boxes of a picture stretched over tiles of `unit` x `unit` tokens, tile by tile."""
    # the grid runs row by row over the whole picture, the tokens tile by tile
    cells = _grid(rows * unit, columns * unit, height, width)
    cells = cells.reshape(rows, unit, columns, unit, 4).swapaxes(1, 2)
    return cells.reshape(-1, 4)


def _cells(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Row intervals (R, 2) and column intervals (C, 2) to boxes (R * C, 4), row by row."""
    y = np.repeat(rows, len(columns), 0)
    x = np.tile(columns, (len(rows), 1))
    corners = np.stack([x, y], 2)  # (R * C, start or end, x or y)
    return corners.reshape(-1, 4)


def _grid(rows: int, columns: int, height: float, width: float) -> np.ndarray:
    """(rows * columns, 4) equal boxes over a whole picture."""
    y = np.linspace(0, height, rows + 1)
    x = np.linspace(0, width, columns + 1)
    return _cells(np.stack([y[:-1], y[1:]], 1), np.stack([x[:-1], x[1:]], 1))


def _pixels(patches: np.ndarray, scale: float, offset: float, length: float) -> np.ndarray:
    """(n, 2) pixels of a picture `length` long under patches of a tile: `scale` of them a pixel, behind padding."""
    return (patches * scale - offset).clip(0, length)


def _resample(axis: np.ndarray, n: int) -> np.ndarray:
    """Intervals (m, 2) after a bilinear resampling m -> n (align_corners=False): the two that are mixed, together."""
    # where torch's interpolate samples: pixel centres are at half integers, and what falls outside is clamped
    source = ((np.arange(n) + 0.5) * (len(axis) / n) - 0.5).clip(0)
    low = np.floor(source).astype(int)
    high = np.minimum(low + (source > low), len(axis) - 1)
    return np.stack([axis[low, 0], axis[high, 1]], 1)


TEXT = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma", "gemma2", "gemma3_text")
MERGED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe")
FAMILIES: dict[str, Family] = {
    **{name: QwenVL(name) for name in MERGED},
    "internvl": InternVL(),
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "gemma3": Gemma3(),
    "idefics3": Idefics3("idefics3"),
    "smolvlm": Idefics3("smolvlm"),
    "mistral3": Mistral3(),
    # plain language models differ in nothing that corehead must know
    **dict.fromkeys(TEXT, Text()),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a configuration's model_type; ValueError where there is none."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported: take one of {', '.join(FAMILIES)}, "
            "or add a Family to corehead.families.FAMILIES"
        )
    return FAMILIES[config.model_type]
