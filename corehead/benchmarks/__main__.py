"""Check a download: ``python -m corehead.benchmarks refcocog --check data/cache/RefCOCOg [--split val]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ..samples import Frames, Pages, Region, Sample, SampleError, Span, Tube
from . import BENCHMARKS, load

SHOWN = 10  # bad rows


def describe(sample: Sample) -> dict[str, float]:
    """Numbers about a sample's context and evidence."""
    parts = [part for message in sample.messages for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    # all kinds for each sample: 0 where it has none, or the means would be over some samples only
    kinds = "evidence: spans", "evidence: pages", "evidence: frames", "evidence: boxes"
    numbers = dict.fromkeys(kinds, 0)
    shares = []  # of the picture's area
    for piece in sample.evidence:
        boxes = []
        if isinstance(piece, Span):
            numbers["evidence: spans"] += 1
        elif isinstance(piece, Pages):
            numbers["evidence: pages"] += len(piece.pages)
        elif isinstance(piece, Frames):
            numbers["evidence: frames"] += len(piece.frames)
        elif isinstance(piece, Region):
            boxes = [piece.box]
            width, height = images[piece.image].size
        elif isinstance(piece, Tube):
            boxes = list(piece.boxes.values())
            height, width = videos[piece.video].shape[1:3]
            numbers["evidence: frames"] += len(boxes)
        shares += [(x2 - x1) * (y2 - y1) / (width * height) for x1, y1, x2, y2 in boxes]
    context = {
        "images": len(images),
        "frames": sum(map(len, videos)),
        "evidence: none": int(not sample.evidence),
    }
    numbers["evidence: boxes"] = len(shares)
    if shares:  # a sample without boxes has no such share, rather than one of 0
        numbers["evidence: share of the picture's area in a box"] = float(np.mean(shares))
    return context | numbers


def report(rows: list[dict[str, float]], bad: list[SampleError]) -> str:
    """Counts, statistics (mean, least, most over samples) and the first bad rows."""
    lines = [f"{len(rows)} samples, {len(bad)} bad rows"]
    for name, values in pd.DataFrame(rows).items():
        if values.any():  # kinds that this benchmark does not have are left out
            lines.append(
                f"  {name}: {values.mean():.3g} ({values.min():.3g} to {values.max():.3g})"
            )
    lines += [f"bad: {error}" for error in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"... and {len(bad) - SHOWN} more")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a row is bad, there is none, or files are missing."""
    parser = argparse.ArgumentParser(
        prog="python -m corehead.benchmarks", description=__doc__
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument(
        "--check", metavar="PATH", type=Path, required=True, help="the folder of a download"
    )
    parser.add_argument("--split")
    given = parser.parse_args(arguments)
    bad: list[SampleError] = []
    options = {} if given.split is None else {"split": given.split}
    try:
        # the whole download is looked through: bad rows are collected on the way
        samples = load(given.name, given.check, errors=bad.append, **options)
        rows = [describe(sample) for sample in samples]
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report(rows, bad))
    return int(bool(bad) or not rows)


if __name__ == "__main__":
    sys.exit(main())
