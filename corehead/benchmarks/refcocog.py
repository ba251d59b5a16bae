"""RefCOCOg: a sentence, and the region of a picture that it describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Json

from ..samples import Region, SampleError
from .media import image
from .metrics import box_metric
from .rows import SLACK, Box, Corners, Found, Loader, Row, Text, files, images, parquet_rows

ASK = (
    "Give the bounding box of the region that the sentence describes as [x1, y1, x2, y2], all between 0 and 1. "
    "Sentence: "
)


class Pixels(Row):
    """A row of lmms-lab/RefCOCOg, with pixels; `bbox` is x, y, width, height."""

    image: Annotated[
        bytes,
        BeforeValidator(lambda cell: cell.get("bytes") if isinstance(cell, dict) else cell),
    ]
    answer: list[Any]
    bbox: Corners
    segmentation: list[float] | None = None
    iscrowd: int | None = None

    def corners(self) -> Box:
        x, y, width, height = self.bbox
        box = x, y, x + width, y + height
        # two forms of this data set write boxes in two ways: the outline tells when it is the other one
        if self.segmentation and not self.iscrowd:
            xs, ys = self.segmentation[::2], self.segmentation[1::2]
            outside = max(
                box[0] - min(xs), box[1] - min(ys), max(xs) - box[2], max(ys) - box[3]
            )
            if outside > SLACK:
                self.fail(
                    "bbox", f"{self.bbox} as corner and size does not hold the outline"
                )
        return box


class Sentence(Row):
    raw: Text


class Annotation(Row):
    bbox: Corners


class Bare(Row):
    """A row of jxu124/refcocog, without pixels; `bbox` is x1, y1, x2, y2, that of `raw_anns` x, y, width, height."""

    image_path: Text
    sentences: list[Sentence]
    bbox: Corners
    raw_anns: Json[Annotation]

    def corners(self) -> Box:
        x1, y1, x2, y2 = self.bbox
        again = self.raw_anns.bbox
        # the same box in both notations, or one of them is not what we take it for
        if max(abs(p - q) for p, q in zip((x1, y1, x2 - x1, y2 - y1), again)) > SLACK:
            self.fail(
                "bbox",
                f"{self.bbox} as corners is not raw_anns' {again} as corner and size",
            )
        return self.bbox


@dataclass(kw_only=True)
class RefCOCOg(Loader):
    """A sample for each sentence; sentences on one picture follow each other and share it.

    Two forms of the data are read: lmms-lab/RefCOCOg and, from a folder that also holds COCO's pictures,
    jxu124/refcocog.

    Parameters
    ----------
    split : str
        "val" or "test".
    """

    name, hub = "refcocog", "lmms-lab/RefCOCOg"
    context = ("image", "image_path")
    at_once = 128  # rows hold pixels: not all of them at a time
    split: str = "val"

    @property
    def patterns(self) -> list[str]:
        return [f"*{self.split}*.parquet"]

    def rows(self) -> Iterator[tuple[str, Any]]:
        paths = files(self.folder, f"{self.split}*.parquet", "its splits are val, test")
        columns = {"question_id", "ref_id", *Pixels.model_fields, *Bare.model_fields}
        for at, values in parquet_rows(paths, columns):
            known = values if isinstance(values, dict) else {}
            name = known.get("question_id", known.get("ref_id"))
            yield f"refcocog-{self.split}-{name}-{at}", values

    def samples(self, id: str, values: Any) -> Found:
        if isinstance(values, dict) and "raw_anns" in values:
            row = Bare.of(id, values)
            field = "image_path"
            file = self.folder / row.image_path
            sentences = [sentence.raw for sentence in row.sentences]
        else:
            row = Pixels.of(id, values)
            field = "image"
            file = row.image
            sentences = row.answer
        corners = row.corners()
        with row.reading(field, "the picture"):
            picture = self.kept(file, partial(image, file))
        box = row.inside("bbox", corners, picture.size)
        # in parts of the picture, as ASK wants it: processors change its size in pixels
        relative = tuple(side / length for side, length in zip(box, picture.size * 2))
        answer = "[" + ", ".join(f"{side:.2f}" for side in relative) + "]"
        if not sentences:
            row.fail("answer", "holds no sentence")
        for k, sentence in enumerate(sentences):
            # an error of its own: the other sentences on the picture are good
            if not isinstance(sentence, str) or not sentence.strip():
                problem = f"sentence {k} is no text"
                yield SampleError(f"{id}-{k}", "answer", problem, "Leave the sentence out")
                continue
            text = sentence.strip()
            metric = partial(box_metric, box=relative)
            yield self.sample(
                f"{id}-{k}",
                images([picture]),
                ASK + text,
                text,
                [Region(0, box)],
                answer,
                metric,
            )
