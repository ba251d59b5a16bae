"""Rows of a benchmark's files: found, read one after the other, and checked field by field."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..samples import Sample, SampleError

Found = Iterator[Sample | SampleError]
AGAIN = "Download the file again, or leave the row out"
SLACK = 2.0  # pixels that rounding may put an annotated box outside its picture


def locate(source: str | Path | None, hub: str, *, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a benchmark's files: a local one, or that of a download from the Hugging Face hub.

    Parameters
    ----------
    source : a folder, another hub id, or None for `hub`.
    hub, revision : the data set on the hub and its version.
    patterns : which of its files are needed.

    Raises
    ------
    FileNotFoundError : they cannot be had; the message is the command that fetches them.
    """
    if source is not None and Path(source).is_dir():
        return Path(source)
    name = str(source or hub)
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {name}: fetch it with `{command(hub, revision, patterns, name)}`")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:  # no network, no such revision, terms not accepted: the mend is the same
        folder = "data/cache/" + name.split("/")[1]
        raise FileNotFoundError(
            f"{name} is not here and cannot be downloaded ({type(error).__name__}): where there is a network, run "
            f"`{command(name, revision, patterns, folder)}` and pass source={folder!r}"
        ) from error


def command(hub: str, revision: str | None, patterns: list[str], folder: str) -> str:
    """The shell command that downloads files of a data set."""
    version = f" --revision {revision}" if revision else ""
    wanted = "".join(f" --include '{p}'" for p in patterns)
    return f"hf download --repo-type dataset {hub}{version}{wanted} --local-dir {folder}"


def files(folder: Path, pattern: str, mend: str) -> list[Path]:
    """Files below a folder, by name; at least one.

    Raises
    ------
    FileNotFoundError : there is none; the message ends with `mend`.
    """
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if not found:
        raise FileNotFoundError(f"no {pattern} below {folder}: {mend}")
    return found


class Row:
    """A row and the name that errors call it by.

    Parameters
    ----------
    id : the sample's.
    values : field -> value, as the file has them.

    Raises
    ------
    SampleError : no row; from every method, a field that is not what the schema says.
    """

    def __init__(self, id: str, values: Any):
        self.id, self.values = id, values
        if isinstance(values, SampleError):  # what the reader of the file found instead
            raise values
        if not isinstance(values, dict):
            self.fail("row", f"is {type(values).__name__}, not an object with fields", AGAIN)

    def fail(self, where: str, problem: str, mend: str = AGAIN):
        raise SampleError(self.id, where, problem, mend)

    def get(self, name: str, *kinds: type) -> Any:
        """A field of one of the given types."""
        if self.values.get(name) is None:
            self.fail(name, "is missing")
        value = self.values[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.fail(
                name, f"{str(value)[:60]!r} is {type(value).__name__}, not {' or '.join(k.__name__ for k in kinds)}"
            )
        return value

    def text(self, name: str) -> str:
        """A text that is not empty, without blanks around it."""
        value = self.get(name, str).strip()
        if not value:
            self.fail(name, "is empty")
        return value

    def integer(self, name: str, least: int = 0) -> int:
        value = self.get(name, int, np.integer)
        if value < least:
            self.fail(name, f"{value} is less than {least}")
        return int(value)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = float(self.get(name, int, float, np.number))
        if not (math.isfinite(value) and value > 0):
            self.fail(name, f"{value} is no positive number")
        return value

    def numbers(self, name: str, count: int | None = None) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.get(name, list, tuple)
        good = all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values)
        if not good or not all(math.isfinite(v) for v in values) or (count is not None and len(values) != count):
            self.fail(name, f"{str(values)[:60]} is no list of {'' if count is None else f'{count} '}finite numbers")
        return tuple(float(v) for v in values)

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers, as a list or as its Python text ("[3, 4]")."""
        values = self.listed(name)
        if not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
            self.fail(name, f"{str(values)[:60]} is no list of whole numbers")
        return [int(v) for v in values]

    def listed(self, name: str) -> list:
        """A list, or the Python text of one; any other text is its only entry."""
        value = self.get(name, list, tuple, str)
        if not isinstance(value, str):
            return list(value)
        if not value.strip().startswith("["):
            return [value]
        try:
            value = ast.literal_eval(value.strip())  # evaluates no code
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            self.fail(name, f"{value[:60]!r} is no list as Python writes it")
        return list(value) if isinstance(value, (list, tuple)) else self.fail(name, f"{value!r} is no list")

    def rows(self, name: str) -> list[Row]:
        """A list of objects, each a row of its own under the same id."""
        return [Row(self.id, value) for value in self.get(name, list, tuple)]

    def box(self, where: str, box: Iterable[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2), checked against a picture of `size` (width, height) and cut to it."""
        x1, y1, x2, y2 = box
        width, height = size
        if not (x1 < x2 and y1 < y2):
            self.fail(where, f"the box {(x1, y1, x2, y2)} is empty", "Correct it: x1 < x2 and y1 < y2")
        if x1 < -SLACK or y1 < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
            self.fail(
                where,
                f"the box {(x1, y1, x2, y2)} is not inside its picture of {width} x {height} px",
                "Take the picture that was annotated, in its own size",
            )
        cut = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        if not (cut[0] < cut[2] and cut[1] < cut[3]):
            self.fail(where, f"the box {(x1, y1, x2, y2)} lies outside its picture of {width} x {height} px", AGAIN)
        return cut


def guarded(id: str, make: Callable[..., Iterable[Sample | SampleError]], *args) -> Found:
    """What `make` yields; where it fails, the error under the row's id, so that the next rows go on."""
    try:
        yield from make(*args)
    except SampleError as error:
        yield error
    except Exception as error:  # a broken row can fail in any way, but never without its name
        yield SampleError(id, "row", f"cannot be used ({type(error).__name__}: {error})", AGAIN)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of a jsonl file: (file:line, value), the value a SampleError where it is no JSON."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            name = f"{path.stem}:{number}"
            if line.strip():
                try:
                    yield name, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield name, SampleError(name, "row", f"is no JSON ({error})", AGAIN)


def json_list(path: Path) -> list:
    """The list of rows that a JSON file holds; a SampleError as its only row where it does not."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return [SampleError(path.name, "file", f"is no JSON ({error})", "Download it again")]
    if not isinstance(value, list):
        value = [
            SampleError(path.name, "file", f"holds {type(value).__name__}, not a list of rows", "Download it again")
        ]
    return value


def parquet_rows(paths: list[Path], columns: list[str], *, batch: int = 32) -> Iterator[tuple[int, dict | SampleError]]:
    """Rows of parquet files in order, a record batch in memory at a time: (row counted over all files, row).

    A row group that cannot be read gives one SampleError in place of its first row, and counting goes on behind it; so
    does a file (field "file"), but nobody knows how many rows it had. Columns that a file does not have are left out.
    """
    at = 0
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except Exception as error:  # arrow raises several kinds
            yield at, SampleError(path.name, "file", f"is no parquet file ({error})", "Download it again")
            continue
        with file:
            names = [name for name in file.schema_arrow.names if name in columns]
            for group in range(file.num_row_groups):
                done, size = 0, file.metadata.row_group(group).num_rows
                try:
                    for part in file.iter_batches(batch, row_groups=[group], columns=names):
                        for row in part.to_pylist():
                            yield at + done, row
                            done += 1
                except Exception as error:
                    problem = f"rows {at + done} to {at + size - 1} cannot be read ({error})"
                    yield at + done, SampleError(path.name, f"row group {group}", problem, "Download the file again")
                at += size
