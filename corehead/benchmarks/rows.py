"""Rows of a benchmark's files: found, checked against a schema, and made into samples one after the other."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
)

from ..samples import Evidence, Sample, SampleError

Found = Iterator[Sample | SampleError]
Box = tuple[float, float, float, float]
AGAIN = "Download the file again, or leave the row out"
SLACK = 2.0  # pixels that rounding may put an annotated box outside its picture


# Files


def locate(
    source: str | Path | None, hub: str, revision: str | None, patterns: list[str]
) -> Path:
    """The folder of a benchmark's files: a local one, or that of a download from the Hugging Face hub.

    Parameters
    ----------
    source : str, Path or None
        A folder, another hub id, or None for `hub`.
    hub, revision : str
        The data set on the hub, and its version.
    patterns : list of str
        Which of its files are needed.

    Raises
    ------
    FileNotFoundError
        They cannot be had; the message is the command that fetches them.
    """
    if source is not None and Path(source).is_dir():
        return Path(source)
    name = str(source or hub)
    fetch = "hf download --repo-type dataset {} " + (
        f"--revision {revision} " if revision else ""
    )
    fetch += " ".join(f"--include '{pattern}'" for pattern in patterns) + " --local-dir {}"
    # what looks like a path is one that is not there, and no hub id
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no folder {name}: fetch it with `{fetch.format(hub, name)}`"
        )
    options = dict(repo_type="dataset", revision=revision, allow_patterns=patterns)
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:
        # no network, no such revision, terms not accepted: the fix is the same
        folder = "data/cache/" + name.split("/")[1]
        raise FileNotFoundError(
            f"{name} is not here and cannot be downloaded ({type(error).__name__}): where there is a network, run "
            f"`{fetch.format(name, folder)}` and pass source={folder!r}"
        ) from error


def files(
    folder: Path, pattern: str, fix: str = "download the benchmark again"
) -> list[Path]:
    """Files below a folder, by name; FileNotFoundError, which ends with `fix`, where there is none."""
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if not found:
        raise FileNotFoundError(f"no {pattern} below {folder}: {fix}")
    return found


def _json(text: bytes, name: str, where: str) -> Any:
    """A value, or a SampleError where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return SampleError(name, where, f"is no JSON ({error})", AGAIN)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of a jsonl file: (file:line, value)."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                name = f"{path.stem}:{number}"
                yield name, _json(line, name, "row")


def json_list(path: Path) -> list:
    """The list of rows that a JSON file holds; a SampleError as its only row where it does not."""
    value = _json(path.read_bytes(), path.name, "file")
    if isinstance(value, list):
        return value
    if not isinstance(value, SampleError):
        problem = f"holds {type(value).__name__}, not a list of rows"
        value = SampleError(path.name, "file", problem, AGAIN)
    return [value]


def parquet_rows(
    paths: list[Path], columns: set[str]
) -> Iterator[tuple[int, dict | SampleError]]:
    """Rows of parquet files in order, a few in memory at a time: (row counted over all files, row).

    A row group that cannot be read gives one SampleError in place of its first row, and counting goes on behind it; so
    does a file (field "file"), but nobody knows how many rows it had. Columns that a file does not have are left out.
    """
    at = 0
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except Exception as error:  # arrow raises several kinds
            problem = f"is no parquet file ({error})"
            yield at, SampleError(path.name, "file", problem, "Download it again")
            continue
        with file:
            names = [name for name in file.schema_arrow.names if name in columns]
            for group in range(file.num_row_groups):
                row = at
                end = at + file.metadata.row_group(group).num_rows
                try:
                    # a few rows at a time: they may hold pictures
                    for batch in file.iter_batches(8, row_groups=[group], columns=names):
                        for values in batch.to_pylist():
                            yield row, values
                            row += 1
                except Exception as error:
                    problem = f"rows {row} to {end - 1} cannot be read ({error})"
                    where = f"row group {group}"
                    yield (
                        row,
                        SampleError(path.name, where, problem, "Download the file again"),
                    )
                at = end  # also behind a broken group: ids of later rows stay what they are


# Fields


def listed(value: Any) -> Any:
    """A list, or the Python text of one; any other text is its only entry."""
    if not isinstance(value, str):
        return value
    if not value.strip().startswith("["):
        return [value]
    try:
        return ast.literal_eval(value.strip())  # evaluates no code
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"is no list as Python writes it ({error})") from error


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Index = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Integers = Annotated[list[int], BeforeValidator(listed)]
Names = Annotated[list[Any], BeforeValidator(lambda value: listed(value or []))]
Corners = Annotated[Box, Strict(False)]  # a list will do


class Row(BaseModel):
    """The fields of a row that a loader reads; a file's others are left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    _id: str = ""

    @classmethod
    def of(cls, id: str, values: Any):
        """A row and the name that its errors go by; SampleError where a field is not what the schema says."""
        if isinstance(values, SampleError):  # what the reader of the file found instead
            raise values
        try:
            # large files are checked while they are read, without a copy in Python's objects
            validate = (
                cls.model_validate_json if isinstance(values, bytes) else cls.model_validate
            )
            row = validate(values)
        except ValidationError as error:
            first = error.errors()[0]  # one fix at a time
            where = (
                ".".join(part for part in first["loc"] if isinstance(part, str)) or "row"
            )
            found = (
                "" if first["type"] == "missing" else f", not {str(first['input'])[:60]!r}"
            )
            raise SampleError(id, where, first["msg"] + found, AGAIN) from error
        row._id = id
        return row

    def fail(self, where: str, problem: str, fix: str = AGAIN) -> NoReturn:
        raise SampleError(self._id, where, problem, fix)

    @contextmanager
    def reading(self, where: str, name: str) -> Iterator[None]:
        """Decoders raise errors of many kinds: whatever they are, they name the sample and the field."""
        try:
            yield
        except Exception as error:
            problem = f"{name} cannot be read ({type(error).__name__}: {error})"
            raise SampleError(self._id, where, problem, "Download it again") from error

    def inside(self, where: str, box: Iterable[float], size: tuple[int, int]) -> Box:
        """A box (x1, y1, x2, y2), checked against a picture of `size` (width, height) and cut to it."""
        (x1, y1, x2, y2), (width, height) = box, size
        if not (x1 < x2 and y1 < y2):
            problem = f"the box {(x1, y1, x2, y2)} is empty"
            self.fail(where, problem, "Correct it: x1 < x2 and y1 < y2")
        # annotators' boxes end a pixel or two outside; more than that, and the picture is not the one they saw
        cut = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        off = max(abs(a - b) for a, b in zip((x1, y1, x2, y2), cut))
        if off > SLACK or cut[0] >= cut[2] or cut[1] >= cut[3]:
            self.fail(
                where,
                f"the box {(x1, y1, x2, y2)} is not inside its picture of {width} x {height} px",
                "Take the picture that was annotated, in its own size",
            )
        return cut


# Samples


def images(pictures: Iterable) -> list[dict]:
    """Parts of a message."""
    return [{"type": "image", "image": picture} for picture in pictures]


@dataclass(kw_only=True)
class Loader:
    """The samples of a benchmark, one after the other; bad rows come as SampleErrors in between.

    A subclass says which files it needs, reads their rows, and makes samples of a row. As rows on one context follow
    each other, it is enough to keep the last context's media: samples share the objects.

    Parameters
    ----------
    source : str, Path or None
        A folder, a hub id, or None for the benchmark's own hub id.
    revision : str, optional
        Version on the hub.
    """

    name: ClassVar[str]
    hub: ClassVar[str]
    context: ClassVar[tuple[str, ...]]  # fields that rows on one context have in common
    # rows in memory, among which those on one context come together; None: all
    at_once: ClassVar[int | None] = None
    also: ClassVar[str] = ""  # how to get what is not on the hub
    source: str | Path | None = None
    revision: str | None = None
    _kept: ClassVar[tuple[Any, Any] | None] = None

    @property
    def patterns(self) -> list[str]:
        """Which files are needed."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Rows and the ids that errors name."""
        raise NotImplementedError

    def samples(self, id: str, values: Any) -> Found:
        """Samples of a row."""
        raise NotImplementedError

    @cached_property
    def folder(self) -> Path:
        """Where the files are; FileNotFoundError, with the command that fetches them, where they cannot be had."""
        try:
            return locate(self.source, self.hub, self.revision, self.patterns)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{self.also}") from error

    def fetch(self, row: Row, field: str, name: str) -> NoReturn:
        """Fail for want of a file."""
        fix = f"Fetch it with `hf download --repo-type dataset {self.hub}`"
        row.fail(field, f"there is no {name}", fix)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made last, if it is asked for again: media of the context."""
        if self._kept is None or self._kept[0] != key:
            self._kept = key, make()
        return self._kept[1]

    def __iter__(self) -> Found:
        rows = self.rows()
        while batch := list(islice(rows, self.at_once)):
            yield from self.by_context(batch)

    def by_context(self, rows: Iterable[tuple[str, Any]]) -> Found:
        """Samples of rows, those on one context after each other."""
        groups: dict[str, list[tuple[str, Any]]] = {}
        for id, values in rows:
            key = id  # a row that is no object is its own context, and fails later
            if isinstance(values, dict):
                key = repr([values.get(field) for field in self.context])
            groups.setdefault(key, []).append((id, values))
        for group in groups.values():
            for id, values in group:
                yield from guarded(id, self.samples, values)

    def sample(
        self,
        id: str,
        context: list[dict],
        text: str,
        question: str,
        evidence: list[Evidence],
        answer: str,
        metric: Callable[[str], dict[str, float]],
        **meta: str,
    ) -> Sample:
        """A sample whose context stands in front of a text that holds its question."""
        messages = [{"role": "user", "content": [*context, {"type": "text", "text": text}]}]
        meta = {"benchmark": self.name} | meta
        return Sample(id, messages, evidence, answer, question, meta, metric)


def guarded(id: str, make: Callable[..., Iterable[Sample | SampleError]], *args) -> Found:
    """What `make` yields; where it fails, the error under the row's id, so that the next rows go on."""
    try:
        yield from make(id, *args)
    except SampleError as error:
        yield error
    except (
        Exception
    ) as error:  # a broken row can fail in any way, but never without its name
        yield SampleError(
            id, "row", f"cannot be used ({type(error).__name__}: {error})", AGAIN
        )
