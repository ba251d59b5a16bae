"""Append-only tables of results, a row a sample, that survive a kill and never mix two configurations."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .samples import Sample


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


class Store:
    """A folder of parquet parts and the configuration that made them; used as a context manager while it is written.

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
    OSError : it cannot be written to.
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
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held until the run ends
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write to the store ({error.strerror}): give another folder", str(path)
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BlockingIOError(errno.EAGAIN, "another run writes to this store: wait for it", str(path)) from error
        try:
            self._open(resume)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, resume: bool) -> None:
        card = self.path / "provenance.json"
        parts = sorted(self.path.glob("part-*.parquet"))
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
        for part in parts:
            try:
                self.rows += _from_table(pq.read_table(part))
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                warnings.warn(f"{part} cannot be read ({error}): its samples are done again", stacklevel=3)
                part.unlink()
        self._next = 1 + max((int(p.stem.removeprefix("part-")) for p in parts), default=0)

    def _write(self, path: Path, write) -> None:
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
            raise OSError(
                error.errno, f"cannot write to the store ({error.strerror}): what is there is whole", str(path)
            ) from error

    def append(self, rows: list[dict]) -> None:
        """Keep rows; once this returns they outlive a kill."""
        if self.path is None or not rows:
            return
        table = _to_table(rows)
        self._write(
            self.path / f"part-{self._next:06d}.parquet", lambda f: pq.write_table(table, f, compression="zstd")
        )
        self._next += 1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()


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
