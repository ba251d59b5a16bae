"""MLVU: multiple-choice questions on long videos. It labels no evidence, so it serves evaluation alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..samples import Sample
from .media import Video, unpack_all, video
from .metrics import choice_metric
from .rows import Found, Row, files, guarded, json_list, locate

HUB = "MLVU/MVLU"
TASKS = ("plotQA", "needle", "ego", "order", "count", "topic_reasoning", "anomaly_reco")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
ASK = "Look at the video and choose the best option of the question.\n"


def samples(source: str | Path | None, *, revision: str | None = None, fps: float = 1.0, max_frames: int = 64) -> Found:
    """A sample for each question, without evidence; those on one video follow each other and share its frames.

    Parameters
    ----------
    source : a folder, a hub id, or None for the benchmark's own (its terms must be accepted on the hub).
    revision : version on the hub.
    fps, max_frames : frames a second, and at most how many, then evenly over the whole video.
    """
    folder = locate(source, HUB, revision=revision, patterns=["*.json", *(f"*{ending}" for ending in VIDEOS)])
    paths = files(folder, "*.json", "download the benchmark again")
    unpack_all(folder)
    at_hand: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS):
        at_hand.setdefault(path.name, []).append(path)
    for path in paths:
        task = path.stem.split("_", 1)[-1]  # question_type spells one of them in another way
        if task not in TASKS:
            continue  # open-ended tasks, and files of the download itself
        groups: dict[str, list[tuple[str, object]]] = {}
        for i, values in enumerate(json_list(path)):
            name = values.get("video") if isinstance(values, dict) else i
            groups.setdefault(str(name), []).append((f"mlvu-{path.stem}-{i}", values))
        for group in groups.values():
            clips: list[Video] = []  # of the first row that can read it
            for id, values in group:
                yield from guarded(id, _row, id, values, task, at_hand, clips, fps, max_frames)


def _row(
    id: str, values, task: str, at_hand: dict[str, list[Path]], clips: list[Video], fps: float, most: int
) -> Found:
    row = Row(id, values)
    name = row.text("video")
    question, answer = row.text("question"), row.text("answer")
    row.number("duration")
    row.text("question_type")
    options = [str(option).strip() for option in row.get("candidates", list)]
    if options.count(answer) != 1:
        row.fail("answer", f"{answer!r} stands {options.count(answer)} times among the candidates", "Leave the row out")
    if not clips:
        found = at_hand.get(Path(name).name, [])
        found = [p for p in found if task.lower() in p.parent.name.lower()] if len(found) > 1 else found
        if len(found) != 1:
            mend = f"Fetch it with `hf download --repo-type dataset {HUB}`"
            row.fail("video", f"{len(found)} files {name} below the folder", mend)
        clips.append(video(found[0], id, "video", fps=fps, most=most)[0])
    [clip], right = clips, options.index(answer)
    listed = "\n".join(f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    text = f"{ASK}Question: {question}\nOptions:\n{listed}\nBest option: ("
    yield Sample(
        id,
        [{"role": "user", "content": [clip.part, {"type": "text", "text": text}]}],
        [],
        chr(ord("A") + right),
        question,
        {"benchmark": "mlvu", "task": task},
        partial(choice_metric, options=options, right=right),
    )
