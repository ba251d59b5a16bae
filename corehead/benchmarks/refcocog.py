"""RefCOCOg: a sentence, and the region of a picture that it describes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from PIL import Image

from ..samples import Region, Sample, SampleError
from .media import image
from .metrics import box_metric
from .rows import SLACK, Found, Row, files, guarded, locate, parquet_rows

HUB = "lmms-lab/RefCOCOg"
SPLITS = ("val", "test")
ASK = (
    "Give the bounding box of the region that the sentence describes as [x1, y1, x2, y2], all between 0 and 1. "
    "Sentence: "
)
COLUMNS = ["question_id", "image", "answer", "segmentation", "bbox", "iscrowd", "file_name"]
BARE_COLUMNS = ["ref_id", "sentences", "image_path", "bbox", "raw_anns"]
BATCH = 128  # rows in memory at once; rows on one picture within them come together


def samples(source: str | Path | None, *, split: str = "val", revision: str | None = None) -> Found:
    """A sample for each sentence; sentences on one picture follow each other and share it.

    Two forms of the data are read: lmms-lab/RefCOCOg (with pixels; bbox is x, y, width, height) and, from a folder that
    also holds COCO's pictures, jxu124/refcocog (bbox is x1, y1, x2, y2; that of raw_anns is x, y, width, height).

    Parameters
    ----------
    source : a folder, a hub id, or None for the hub's lmms-lab/RefCOCOg.
    split : "val" or "test".
    revision : version on the hub.
    """
    pattern = f"{split}*.parquet"
    folder = locate(source, HUB, revision=revision, patterns=[f"*{pattern}"])
    paths = files(folder, pattern, f"its splits are {', '.join(SPLITS)}")
    batch: list[tuple[str, dict]] = []
    for at, row in parquet_rows(paths, list(dict.fromkeys(COLUMNS + BARE_COLUMNS))):
        if isinstance(row, SampleError):
            yield row
            continue
        batch.append((f"refcocog-{split}-{row.get('question_id', row.get('ref_id'))}-{at}", row))
        if len(batch) == BATCH:
            yield from _grouped(batch, folder)
            batch = []
    yield from _grouped(batch, folder)


def _grouped(batch: list[tuple[str, dict]], folder: Path) -> Found:
    groups: dict[object, list[tuple[str, dict]]] = {}
    for id, row in batch:
        cell = row.get("image")
        key = cell.get("bytes") if isinstance(cell, dict) else row.get("image_path")
        groups.setdefault(key or id, []).append((id, row))
    for group in groups.values():
        picture: list[Image.Image] = []  # of the first row that can read it
        for id, row in group:
            yield from guarded(id, _row, id, row, folder, picture)


def _row(id: str, values: dict, folder: Path, picture: list[Image.Image]) -> Found:
    row = Row(id, values)
    bare = "raw_anns" in values
    x1, y1, a, b = row.numbers("bbox", 4)
    if bare:
        x2, y2, sentences = a, b, [sentence.text("raw") for sentence in row.rows("sentences")]
        again = Row(id, json.loads(row.text("raw_anns"))).numbers("bbox", 4)
        if max(abs(p - q) for p, q in zip((x1, y1, x2 - x1, y2 - y1), again)) > SLACK:
            row.fail("bbox", f"{(x1, y1, x2, y2)} as corners is not raw_anns' {again} as corner and size")
    else:
        x2, y2, sentences = x1 + a, y1 + b, row.get("answer", list)
        if values.get("segmentation") and not values.get("iscrowd"):
            outline = row.numbers("segmentation")
            xs, ys = outline[::2], outline[1::2]
            if min(xs) < x1 - SLACK or max(xs) > x2 + SLACK or min(ys) < y1 - SLACK or max(ys) > y2 + SLACK:
                row.fail("bbox", f"{(x1, y1, a, b)} as corner and size does not hold the outline")
    if not picture:
        cell = folder / row.text("image_path") if bare else row.get("image", dict, bytes)
        picture.append(image(cell, id, "image_path" if bare else "image"))
    [shown] = picture
    box = row.box("bbox", (x1, y1, x2, y2), shown.size)
    relative = tuple(v / side for v, side in zip(box, shown.size * 2))
    if not sentences:
        row.fail("answer", "holds no sentence")
    for k, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not sentence.strip():
            yield SampleError(f"{id}-{k}", "answer", f"sentence {k} is no text", "Leave the sentence out")
            continue
        text = sentence.strip()
        content = [{"type": "image", "image": shown}, {"type": "text", "text": ASK + text}]
        yield Sample(
            f"{id}-{k}",
            [{"role": "user", "content": content}],
            [Region(0, box)],
            "[" + ", ".join(f"{v:.2f}" for v in relative) + "]",
            text,
            {"benchmark": "refcocog"},
            partial(box_metric, box=relative),
        )
