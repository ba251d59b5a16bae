"""VidSTG: a sentence, and the tube of a video that it describes. Videos and boxes are VidOR's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import model_validator

from ..samples import Tube
from .media import Video, unpack_all, video
from .metrics import tube_metric
from .rows import Box, Found, Index, Loader, Row, Size, Text, files, guarded, json_list

GIT = "git clone https://github.com/Guaranteer/VidSTG-Dataset"
MISCOUNT = 3  # frames by which VidOR's count and the file's may differ
ASK = (
    "Give the tube of the object that the sentence describes: for each frame that shows it, [seconds, x1, y1, x2, y2], "
    "the box between 0 and 1. Sentence: "
)


class Range(Row):
    """Frames from the first, the end left out."""

    begin_fid: Index
    end_fid: Index

    @model_validator(mode="after")
    def _not_empty(self):
        if self.begin_fid >= self.end_fid:
            raise ValueError("end_fid is to be the frame behind the last")
        return self


class Sentence(Row):
    description: Text
    target_id: int
    type: Any = ""


class Annotation(Row):
    """A row of VidSTG."""

    vid: Text
    frame_count: Size
    width: Size
    height: Size
    used_segment: Range
    temporal_gt: Range
    captions: list[Any]
    questions: list[Any] | None = None


class Corners(Row):
    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Entry(Row):
    """The box of one object in one frame of VidOR."""

    tid: int
    bbox: Corners


class Tracks(Row):
    """A file of VidOR: the boxes of every frame."""

    trajectories: list[list[Entry]]


@dataclass(kw_only=True)
class VidSTG(Loader):
    """A sample for each caption and question; those on one segment of a video follow each other and share its frames.

    Only `used_segment` of a video is shown, as the annotation means it; the tube is cut to it. The folder holds
    annotations/{split}_annotations.json of VidSTG and, anywhere below, VidOR's videos ({vid}.mp4) and boxes
    ({vid}.json); archives in it are unpacked.

    Parameters
    ----------
    split : str
        "train", "val" or "test".
    fps, max_frames : float, int
        Frames a second, and at most how many.
    """

    name, hub, patterns = "vidstg", "shangxd/vidor", ("*",)
    context = ("vid", "used_segment")
    also = f"; run `{GIT}` in the same folder for the annotations"
    split: str = "val"
    fps: float = 5.0
    max_frames: int = 200

    def rows(self) -> Iterator[tuple[str, Any]]:
        fix = f"run `{GIT} {self.folder}/VidSTG-Dataset` (splits train, val, test)"
        [path, *_] = files(self.folder, f"{self.split}_annotations.json", fix)
        unpack_all(self.folder)  # VidOR comes as zip archives
        for i, values in enumerate(json_list(path)):
            vid = values.get("vid") if isinstance(values, dict) else None
            yield f"vidstg-{self.split}-{vid}-{i}", values

    @cached_property
    def media(self) -> dict[str, Path]:
        """Files of videos and of boxes by name."""
        return {
            path.name: path
            for kind in ("*.mp4", "*.json")
            for path in self.folder.rglob(kind)
        }

    def samples(self, id: str, values: Any) -> Found:
        row = Annotation.of(id, values)
        used = row.used_segment
        true = row.temporal_gt
        begin = max(used.begin_fid, true.begin_fid)
        end = min(used.end_fid, true.end_fid)
        if begin >= end:  # then nothing that is shown is evidence
            problem = f"{true!r} lies outside used_segment's {used!r}"
            row.fail("temporal_gt", problem, "Leave the row out")
        for name in (f"{row.vid}.mp4", f"{row.vid}.json"):
            if name not in self.media:
                self.fetch(row, "vid", name)
        tracks = Tracks.of(id, self.media[f"{row.vid}.json"].read_bytes()).trajectories
        # boxes go by frame number: a file that is too short is another video's, or broken
        if len(tracks) < end:
            row.fail(
                "vid",
                f"{row.vid}.json has boxes for {len(tracks)} frames, fewer than {end}",
            )
        path = self.media[f"{row.vid}.mp4"]
        segment = used.begin_fid, used.end_fid
        with row.reading("vid", f"the video {path.name}"):
            decode = partial(
                video, path, fps=self.fps, most=self.max_frames, segment=segment
            )
            clip = self.kept((path, segment), decode)
        # a copy in another size or at another rate would put boxes beside the object, or on other frames
        size = row.width, row.height
        if clip.size != size or abs(clip.total - row.frame_count) > MISCOUNT:
            found = f"{row.vid}.mp4 has {clip.total} frames of {clip.size} px"
            problem = f"{found}, but {row.frame_count} of {size} px were annotated"
            row.fail("vid", problem, "Take VidOR's own file")
        # by the number that a frame has among those shown
        boxes = {
            i: tracks[frame] for i, frame in enumerate(clip.indices) if begin <= frame < end
        }
        for k, sentence in enumerate([*row.captions, *(row.questions or [])]):
            yield from guarded(f"{id}-{k}", self._sentence, sentence, clip, boxes)

    def _sentence(
        self, id: str, values: Any, clip: Video, boxes: dict[int, list[Entry]]
    ) -> Found:
        row = Sentence.of(id, values)
        tube: dict[int, Box] = {}
        for i, entries in boxes.items():
            for entry in entries:
                if entry.tid == row.target_id:
                    box = entry.bbox.xmin, entry.bbox.ymin, entry.bbox.xmax, entry.bbox.ymax
                    where = f"trajectories[{clip.indices[i]}]"
                    tube[i] = clip.scaled(row.inside(where, box, clip.size))
        # a short moment may fall between the frames that are sampled
        if not tube:
            problem = f"none of the {len(clip.indices)} sampled frames shows object {row.target_id}"
            row.fail(
                "temporal_gt", problem, "Sample more frames: raise fps= or max_frames="
            )
        height, width = clip.frames.shape[1:3]
        relative = {
            i: (x1 / width, y1 / height, x2 / width, y2 / height)
            for i, (x1, y1, x2, y2) in tube.items()
        }
        spoken = []
        for i, box in relative.items():
            numbers = [f"{clip.seconds[i]:.1f}", *(f"{side:.2f}" for side in box)]
            spoken.append("[" + ", ".join(numbers) + "]")
        text = row.description
        answer = " ".join(spoken)
        evidence = [Tube(0, tube)]
        metric = partial(tube_metric, seconds=clip.seconds, boxes=relative)
        meta = dict(task=str(row.type))
        yield self.sample(
            id, [clip.part], ASK + text, text, evidence, answer, metric, **meta
        )
