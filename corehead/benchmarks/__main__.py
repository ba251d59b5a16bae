"""Check a download: ``python -m corehead.benchmarks refcocog --check data/cache/RefCOCOg [--split val]``."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..samples import Frames, Pages, Region, Sample, SampleError, Span, Tube
from . import BENCHMARKS, load

SHOWN = 10  # bad rows


def describe(sample: Sample) -> dict[str, float]:
    """Numbers about a sample's context and evidence."""
    parts = [part for message in sample.messages for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    out = {"images": len(images), "frames": sum(len(video) for video in videos)}
    out["evidence: none"] = float(not sample.evidence)
    out["evidence: spans"] = sum(isinstance(piece, Span) for piece in sample.evidence)
    out["evidence: pages"] = sum(len(piece.pages) for piece in sample.evidence if isinstance(piece, Pages))
    boxes = [(piece.box, images[piece.image].size) for piece in sample.evidence if isinstance(piece, Region)]
    for piece in sample.evidence:
        if isinstance(piece, Tube):
            boxes += [(box, videos[piece.video].shape[2:0:-1]) for box in piece.boxes.values()]
            out["evidence: frames"] = out.get("evidence: frames", 0) + len(piece.boxes)
        elif isinstance(piece, Frames):
            out["evidence: frames"] = out.get("evidence: frames", 0) + len(piece.frames)
    if boxes:
        out["evidence: boxes"] = len(boxes)
        area = [(x2 - x1) * (y2 - y1) / (w * h) for (x1, y1, x2, y2), (w, h) in boxes]
        out["evidence: share of the picture's area in a box"] = float(np.mean(area))
    return out


def check(samples: Iterable[Sample], bad: list[SampleError]) -> str:
    """Read all samples; a report of counts, statistics (mean, least, most over samples) and the first bad rows."""
    columns, count = defaultdict(list), 0
    for sample in samples:
        count += 1
        for name, value in describe(sample).items():
            columns[name].append(value)
    lines = [f"{count} samples, {len(bad)} bad rows"]
    for name, values in columns.items():
        if any(values):
            lines.append(f"  {name}: {np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
    lines += [f"bad: {error}" for error in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"... and {len(bad) - SHOWN} more")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a row is bad, there is none, or files are missing."""
    parser = argparse.ArgumentParser(prog="python -m corehead.benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--check", metavar="PATH", type=Path, required=True, help="the folder of a download")
    parser.add_argument("--split")
    given = parser.parse_args(arguments)
    bad: list[SampleError] = []
    options = {} if given.split is None else {"split": given.split}
    try:
        report = check(load(given.name, given.check, errors=bad.append, **options), bad)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report)
    return int(bool(bad) or report.startswith("0 samples"))


if __name__ == "__main__":
    sys.exit(main())
