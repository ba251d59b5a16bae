"""MLVU: multiple-choice questions on long videos. It labels no evidence, so it serves evaluation alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .media import unpack_all, video
from .metrics import choice_metric
from .rows import Found, Loader, Positive, Row, Text, files, json_list

TASKS = ("plotQA", "needle", "ego", "order", "count", "topic_reasoning", "anomaly_reco")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
ASK = "Look at the video and choose the best option of the question.\n"


class Question(Row):
    task: Text
    video: Text
    duration: Positive
    question: Text
    candidates: list[Any]
    answer: Text
    question_type: Text


@dataclass(kw_only=True)
class MLVU(Loader):
    """A sample for each question, without evidence; those on one video follow each other and share its frames.

    Its terms must be accepted on the hub.

    Parameters
    ----------
    fps, max_frames : float, int
        Frames a second, and at most how many, then evenly over the whole video.
    """

    name, hub, patterns = (
        "mlvu",
        "MLVU/MVLU",
        ("*.json", *(f"*{ending}" for ending in VIDEOS)),
    )
    context = ("task", "video")
    fps: float = 1.0
    max_frames: int = 64

    def rows(self) -> Iterator[tuple[str, Any]]:
        # asked for before anything large is unpacked
        paths = files(self.folder, "*.json")
        unpack_all(self.folder)
        for path in paths:
            task = path.stem.split("_", 1)[
                -1
            ]  # question_type spells one of them in another way
            if task not in TASKS:
                continue  # open-ended ones, and files of the download itself
            for i, values in enumerate(json_list(path)):
                values = values | {"task": task} if isinstance(values, dict) else values
                yield f"mlvu-{path.stem}-{i}", values

    def samples(self, id: str, values: Any) -> Found:
        row = Question.of(id, values)
        options = [str(option).strip() for option in row.candidates]
        times = options.count(row.answer)
        # the right letter would be unknown, or there would be two
        if times != 1:
            problem = f"{row.answer!r} stands {times} times among the candidates"
            row.fail("answer", problem, "Leave the row out")
        path = self._find(row)
        with row.reading("video", f"the video {path.name}"):
            clip = self.kept(path, partial(video, path, fps=self.fps, most=self.max_frames))
        right = options.index(row.answer)
        letters = [chr(ord("A") + i) for i in range(len(options))]
        choices = "\n".join(
            f"({letter}) {option}" for letter, option in zip(letters, options)
        )
        # ends with the bracket, so that the model goes on with a letter
        text = f"{ASK}Question: {row.question}\nOptions:\n{choices}\nBest option: ("
        metric = partial(choice_metric, options=options, right=right)
        yield self.sample(
            id, [clip.part], text, row.question, [], letters[right], metric, task=row.task
        )

    @cached_property
    def videos(self) -> list[Path]:
        return sorted(
            path for path in self.folder.rglob("*") if path.suffix.lower() in VIDEOS
        )

    def _find(self, row: Question) -> Path:
        found = [path for path in self.videos if path.name == Path(row.video).name]
        if len(found) > 1:  # tasks have videos of one name
            found = [path for path in found if row.task.lower() in path.parent.name.lower()]
        if len(found) != 1:
            self.fetch(row, "video", f"single {row.video}")
        return found[0]
