"""Append-only tables of results, a row a sample, that survive a kill and never mix two configurations."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .samples import Sample

MERGED = 64  # parts that become one
LARGEST = 2**28  # bytes of parts that are still merged


def digest(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of a nested value: strings, numbers, containers, arrays, images, Samples."""
    h = hashlib.sha256()

    def feed(v):
        if isinstance(v, Sample):
            v = [v.id, v.messages, [repr(e) for e in v.evidence], v.answer, v.question]
        if isinstance(v, dict):
            for k in sorted(v):
                h.update(f"k{k}".encode())
                feed(v[k])
        elif isinstance(v, (list, tuple)):
            h.update(f"[{len(v)}".encode())
            for x in v:
                feed(x)
        elif isinstance(v, Image.Image):
            h.update(f"i{v.size}{v.mode}".encode() + v.tobytes())
        elif isinstance(v, np.ndarray):
            h.update(f"a{v.shape}{v.dtype}".encode() + np.ascontiguousarray(v).tobytes())
        else:
            h.update(repr(v).encode() + b"\0")

    feed(value)
    return h.hexdigest()[:16]


class Part(NamedTuple):
    """One parquet file of a store: which appends it holds, from `first` to `last`."""

    path: Path
    first: int
    last: int

    @classmethod
    def of(cls, path: Path) -> Part:
        first, _, last = path.stem.removeprefix("part-").partition("-")
        return cls(path, int(first), int(last or first))

    @property
    def level(self) -> int:
        """How often its rows were merged."""
        return round(math.log(self.last - self.first + 1, MERGED))


class Store:
    """A folder of parquet parts and the configuration that made them; used as a context manager while it is written.

    Every append is a part of its own. The last `MERGED` parts of one level become one, so that a million rows lie in
    some dozen files, each row having been written two or three times in all. A lock keeps a second run out; it goes
    with the process that holds it. Between machines it holds where the file system locks for all of them: NFS 4, Lustre
    mounted with ``flock``; not where a mount keeps locks to itself (``nolock``, ``localflock``).

    Parameters
    ----------
    path : the folder; None keeps nothing.
    provenance : JSON-able; all that determines the rows.
    resume : accept a folder that holds rows already.

    Attributes
    ----------
    rows : list of dict, what the folder held when it was opened; unreadable parts are dropped, to be done again.

    Raises
    ------
    ValueError : the folder belongs to another configuration, or holds rows and `resume` is off.
    BlockingIOError : another run writes to the folder.
    OSError : it cannot be written to (full, read-only, without locks); what was finished stays readable.
    """

    def __init__(self, path: str | Path | None, provenance: dict, resume: bool = False):
        self.path = None if path is None else Path(path)
        self.provenance = json.loads(json.dumps(provenance))
        self.rows: list[dict] = []
        self._lock = None
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+")  # noqa: SIM115 - held until the run ends
            self._take_lock()
            self._open(resume)
        except BaseException as error:
            if self._lock is not None:
                self._lock.close()
            if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
                raise self._failed(error) from error
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another run"
            problem = f"store={self.path}: another run writes to it ({holder}). Wait for it, or give another folder"
            raise BlockingIOError(errno.EAGAIN, problem) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()

    def _failed(self, error: OSError) -> OSError:
        """The same error, with the store, the field and the mend."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        lockless = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        mend = "Give a folder that can be written to"
        if full:
            mend = "Make room there, or copy the folder to where there is some; what is finished is whole: resume=True"
        elif lockless:
            mend = "Give a folder on a file system with locks"
        reason = os.strerror(error.errno) if error.errno else str(error)
        return OSError(error.errno, f"store={self.path}: it cannot be written to ({reason}). {mend}")

    def _open(self, resume: bool) -> None:
        card = self.path / "provenance.json"
        parts = sorted(map(Part.of, self.path.glob("part-*.parquet")), key=lambda p: (p.first, -p.last))
        for leftover in self.path.glob("*.writing"):
            leftover.unlink()
        if parts and not resume:
            raise ValueError(f"{self.path} holds results: pass resume=True to go on with them, or give another folder")
        if card.exists() and parts:
            old = json.loads(card.read_text())
            if old != self.provenance:
                differ = [k for k in self.provenance.keys() | old.keys() if self.provenance.get(k) != old.get(k)]
                raise ValueError(
                    f"{self.path} belongs to another configuration ({', '.join(sorted(differ))} differ): "
                    "give another folder"
                )
        elif parts:
            raise ValueError(f"{self.path} has results without provenance.json: give another folder")
        else:
            self._write(card, lambda f: f.write(json.dumps(self.provenance, indent=1).encode()))
        self._parts: list[Part] = []
        self._next = 1 + max((part.last for part in parts), default=0)
        for part in parts:
            if self._parts and part.last <= self._parts[-1].last:  # merged, and then killed before it was removed
                part.path.unlink()
                continue
            try:
                self.rows += _from_table(_read(part))
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                warnings.warn(f"{part.path} cannot be read ({error}): its samples are done again", stacklevel=3)
                part.path.unlink()
            else:
                self._parts.append(part)

    def _write(self, path: Path, write: Callable) -> None:
        """Write beside, then rename: a file is there whole or not at all."""
        beside = path.with_name(path.name + ".writing")
        try:
            with beside.open("wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise self._failed(error) from error

    def append(self, rows: list[dict]) -> None:
        """Keep rows; once this returns they outlive a kill."""
        if self.path is None or not rows:
            return
        part = Part(self.path / f"part-{self._next:06d}.parquet", self._next, self._next)
        self._write(part.path, lambda f: _save([_to_table(rows)], f))
        self._next += 1
        self._parts.append(part)
        self._merge()

    def _merge(self) -> None:
        """Make one part of the last MERGED, as long as they are of one level and not too large."""
        while True:
            old = self._parts[-MERGED:]
            large = sum(part.path.stat().st_size for part in old) > LARGEST
            if len(old) < MERGED or len({part.level for part in old}) > 1 or large:
                return
            first, last = old[0].first, old[-1].last
            merged = Part(self.path / f"part-{first:06d}-{last:06d}.parquet", first, last)
            self._write(merged.path, lambda f, old=old: _save(map(_read, old), f))
            for part in old:
                part.path.unlink()
            self._parts[-MERGED:] = [merged]

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()


def _read(part: Part) -> pa.Table:
    with pq.ParquetFile(part.path) as file:
        return file.read()


def _save(tables: Iterable[pa.Table], f: BinaryIO) -> None:
    """Write tables of one schema, a row group each, so that one is in memory at a time."""
    tables = iter(tables)
    first = next(tables)
    arrays = [f"{field.name}.list.element" for field in first.schema if pa.types.is_fixed_size_list(field.type)]
    options = dict(compression="zstd", use_dictionary=False, use_byte_stream_split=arrays, write_statistics=False)
    with pq.ParquetWriter(f, first.schema, **options) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def _to_table(rows: list[dict]) -> pa.Table:
    """Arrays become lists with their shape in the schema, dictionaries JSON."""
    columns, shapes = {}, {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, np.ndarray):
            shapes[name] = list(first.shape)
            flat = pa.array(np.concatenate([np.ravel(v) for v in values]))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, first.size)
        elif isinstance(first, dict):
            columns[name] = pa.array([json.dumps(v) for v in values])
            shapes[name] = "json"
        else:
            columns[name] = pa.array(values)
    return pa.table(columns).replace_schema_metadata({"shapes": json.dumps(shapes)})


def _from_table(table: pa.Table) -> list[dict]:
    shapes = json.loads(table.schema.metadata[b"shapes"])
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if isinstance(shapes.get(name), list):
            columns[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shapes[name])
        elif shapes.get(name) == "json":
            columns[name] = [json.loads(v) for v in column.to_pylist()]
        else:
            columns[name] = column.to_pylist()
    return [{name: values[i] for name, values in columns.items()} for i in range(table.num_rows)]
