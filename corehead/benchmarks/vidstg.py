"""VidSTG: a sentence, and the tube of a video that it describes. Videos and boxes are VidOR's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..samples import Sample, SampleError, Tube
from .media import Video, unpack_all, video
from .metrics import tube_metric
from .rows import AGAIN, Found, Row, files, guarded, json_list, locate

HUB = "shangxd/vidor"
GIT = "git clone https://github.com/Guaranteer/VidSTG-Dataset"
SPLITS = ("train", "val", "test")
FRAMES = 3  # that VidOR's count and the file's may differ by
ASK = (
    "Give the tube of the object that the sentence describes: for each frame that shows it, [seconds, x1, y1, x2, y2], "
    "the box between 0 and 1. Sentence: "
)


def samples(
    source: str | Path | None,
    *,
    split: str = "val",
    revision: str | None = None,
    fps: float = 5.0,
    max_frames: int = 200,
) -> Found:
    """A sample for each caption and question; those on one segment of a video follow each other and share its frames.

    Only `used_segment` of a video is shown, as the annotation means it; the tube is cut to it.

    Parameters
    ----------
    source : a folder that holds annotations/{split}_annotations.json of VidSTG and, anywhere below, VidOR's videos
        ({vid}.mp4) and boxes ({vid}.json); archives in it are unpacked.
    split : "train", "val" or "test".
    revision : version on the hub.
    fps, max_frames : frames a second, and at most how many.
    """
    try:
        folder = locate(source, HUB, revision=revision, patterns=["*"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; run `{GIT}` in the same folder for the annotations") from error
    fetch = f"run `{GIT} {folder}/VidSTG-Dataset` (splits {', '.join(SPLITS)})"
    [path, *_] = files(folder, f"{split}_annotations.json", fetch)
    unpack_all(folder)  # VidOR comes as zip archives
    listed = json_list(path)
    at_hand = {p.name: p for kind in ("*.mp4", "*.json") for p in folder.rglob(kind)}
    groups: dict[str, list[tuple[str, object]]] = {}
    for i, values in enumerate(listed):
        vid, used = (values.get("vid"), values.get("used_segment")) if isinstance(values, dict) else (None, i)
        groups.setdefault(f"{vid} {used}", []).append((f"vidstg-{split}-{vid}-{i}", values))
    for group in groups.values():
        clips: list[tuple[Video, int]] = []  # of the first row that can read it
        for id, values in group:
            yield from guarded(id, _row, id, values, at_hand, clips, fps, max_frames)


def _range(row: Row, name: str) -> tuple[int, int]:
    """Frames [begin, end)."""
    part = Row(row.id, row.get(name, dict))
    begin, end = part.integer("begin_fid"), part.integer("end_fid")
    if begin >= end:
        row.fail(name, f"frames [{begin}, {end}) are none", "Correct it: end_fid is the frame behind the last")
    return begin, end


def _row(
    id: str, values: object, at_hand: dict[str, Path], clips: list[tuple[Video, int]], fps: float, most: int
) -> Found:
    row = Row(id, values)
    vid = row.text("vid")
    used, true = _range(row, "used_segment"), _range(row, "temporal_gt")
    count, size = row.integer("frame_count", 1), (row.integer("width", 1), row.integer("height", 1))
    begin, end = max(used[0], true[0]), min(used[1], true[1])
    if begin >= end:
        row.fail("temporal_gt", f"frames {true} lie outside used_segment's {used}", "Leave the row out")
    for name in (f"{vid}.mp4", f"{vid}.json"):
        if name not in at_hand:
            row.fail("vid", f"there is no {name}", f"Fetch it with `hf download --repo-type dataset {HUB}`")
    sentences = [*row.rows("captions"), *(row.rows("questions") if values.get("questions") else [])]
    boxes = _boxes(row, at_hand[f"{vid}.json"], (begin, end), {s.get("target_id", int) for s in sentences}, size)
    if not clips:
        clips.append(video(at_hand[f"{vid}.mp4"], id, "vid", fps=fps, most=most, segment=used))
    [(clip, total)] = clips
    if clip.size != size or abs(total - count) > FRAMES:
        row.fail(
            "vid",
            f"{vid}.mp4 has {total} frames of {clip.size} px, but {count} of {size} px were annotated",
            "Take VidOR's own file",
        )
    for k, sentence in enumerate(sentences):
        yield from guarded(f"{id}-{k}", _sentence, Row(f"{id}-{k}", sentence.values), clip, boxes)


def _boxes(row: Row, path: Path, span: tuple[int, int], targets: set[int], size) -> dict[int, dict[int, tuple]]:
    """target -> source frame -> box, in the frames [begin, end) of `span`, in the source's pixels."""
    try:
        marked = Row(row.id, json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        row.fail("vid", f"{path.name} is no JSON ({error})", "Download it again")
    frames, out = marked.get("trajectories", list), {target: {} for target in targets}
    if len(frames) < span[1]:
        row.fail("vid", f"{path.name} has boxes for {len(frames)} frames, fewer than {span[1]}", AGAIN)
    for f in range(*span):
        for entry in frames[f]:
            entry = Row(row.id, entry)
            if (target := entry.get("tid", int)) in out:
                box = Row(row.id, entry.get("bbox", dict))
                corners = [float(box.get(name, int, float)) for name in ("xmin", "ymin", "xmax", "ymax")]
                out[target][f] = row.box(f"trajectories[{f}]", corners, size)
    return out


def _sentence(row: Row, clip: Video, boxes: dict[int, dict[int, tuple]]) -> Iterable[Sample | SampleError]:
    text, target = row.text("description"), row.get("target_id", int)
    tube = {i: clip.scaled(boxes[target][f]) for i, f in enumerate(clip.indices) if f in boxes[target]}
    if not tube:
        row.fail(
            "temporal_gt",
            f"none of the {len(clip.indices)} sampled frames shows object {target}",
            "Sample more frames: raise fps= or max_frames=",
        )
    width, height = clip.frames.shape[2], clip.frames.shape[1]
    relative = {i: (b[0] / width, b[1] / height, b[2] / width, b[3] / height) for i, b in tube.items()}
    said = ([f"{clip.seconds[i]:.1f}", *(f"{v:.2f}" for v in b)] for i, b in relative.items())
    yield Sample(
        row.id,
        [{"role": "user", "content": [clip.part, {"type": "text", "text": ASK + text}]}],
        [Tube(0, tube)],
        " ".join("[" + ", ".join(entry) + "]" for entry in said),
        text,
        {"benchmark": "vidstg", "task": str(row.values.get("type", ""))},
        partial(tube_metric, seconds=clip.seconds, boxes=relative),
    )
