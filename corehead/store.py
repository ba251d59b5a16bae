"""Results in one SQLite file: rows that survive a kill, and never those of two configurations."""

from __future__ import annotations

import errno
import json
import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# A rollback journal, not a write-ahead log: a log needs memory that processes share, which network file systems lack,
# and writes every row twice. Rows are only ever added, so that the journal stays small whatever the store holds.
# The lock is taken once and goes with the process that holds it, killed or not. synchronous=FULL: what `append` has
# acknowledged outlives a power cut as well. It costs milliseconds, where the batch of a model costs seconds.
SETTINGS = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = DELETE;
PRAGMA synchronous = FULL;
"""
TABLES = """
CREATE TABLE IF NOT EXISTS provenance (id INTEGER PRIMARY KEY, settings TEXT);
CREATE TABLE IF NOT EXISTS batches (fields TEXT, layout TEXT, arrays BLOB);
"""
PIECE = 64  # rows in one entry of the table: SQLite takes at most 1 GB in an entry


class Store:
    """A folder with the file ``results.sqlite``: rows, and the configuration that made them.

    While it is open nobody else reads or writes it. Where other machines may write too, the file system must lock for
    all of them: NFS 4 does, and Lustre mounted with ``flock``; a mount with ``nolock`` or ``localflock`` does not.

    Parameters
    ----------
    path : str, Path or None
        The folder; None keeps nothing.
    provenance : dict
        All that determines the rows, as JSON can hold it.
    resume : bool, default False
        Accept a store that holds rows already.

    Attributes
    ----------
    rows : list of dict
        What the store held when it was opened, in the order in which it was appended.

    Raises
    ------
    ValueError
        The store belongs to another configuration, or holds rows and `resume` is off.
    BlockingIOError
        Another process holds the store.
    OSError
        It cannot be written to (full, read-only), or is damaged. What was finished is kept.

    Examples
    --------
    >>> with Store("data/cache/run1", {"model": "qwen3vl-s"}) as store:
    ...     store.append([{"sample": "s0", "mass": np.zeros((6, 8), np.float32)}])
    """

    def __init__(self, path: str | Path | None, provenance: dict, resume: bool = False):
        self.path = None if path is None else Path(path)
        self.rows: list[dict] = []
        self._database: sqlite3.Connection | None = None
        if self.path is None:
            return
        try:
            # through JSON, as what is stored has gone: tuples become lists
            self._open(json.loads(json.dumps(provenance)), resume)
        except BaseException:  # whoever catches it must find the lock free
            self.close()
            raise

    def _open(self, provenance: dict, resume: bool) -> None:
        with self._named_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            # timeout=0: another run takes hours, so that waiting for its lock is no use
            self._database = sqlite3.connect(self.path / "results.sqlite", timeout=0)
            self._database.executescript(SETTINGS + "BEGIN EXCLUSIVE;" + TABLES + "COMMIT;")
            # for the message to whoever finds the store locked
            (self.path / "writer").write_text(f"process {os.getpid()} on {platform.node()}")
            batches = self._database.execute("SELECT * FROM batches ORDER BY rowid")
            self.rows = [row for batch in batches for row in _decode(*batch)]
            entry = self._database.execute("SELECT settings FROM provenance").fetchone()
        # a store without rows may belong to anybody: a run that failed on its first sample binds nothing
        if not self.rows:
            with self._named_errors(), self._database:
                self._database.execute(
                    "REPLACE INTO provenance VALUES (1, ?)", [json.dumps(provenance)]
                )
            return
        if not resume:
            raise ValueError(
                f"{self.path} holds results: pass resume=True to go on with them, or give another folder"
            )
        old = json.loads(entry[0])
        differing = sorted(
            key for key in old | provenance if old.get(key) != provenance.get(key)
        )
        if differing:
            names = ", ".join(differing)
            raise ValueError(
                f"{self.path} belongs to another configuration ({names} differ): give another folder, or delete it"
            )

    def append(self, rows: list[dict]) -> None:
        """Keep rows, all or none; once this returns they outlive a kill.

        Parameters
        ----------
        rows : list of dict
            Of numbers, strings, dictionaries (as JSON) and arrays; all with the same arrays, in the same shapes.

        Raises
        ------
        OSError
            They cannot be written; the store is as it was before.
        """
        if self._database is not None and rows:
            pieces = (rows[i : i + PIECE] for i in range(0, len(rows), PIECE))
            with self._named_errors(), self._database:
                self._database.executemany(
                    "INSERT INTO batches VALUES (?, ?, ?)", map(_encode, pieces)
                )

    def close(self) -> None:
        """Let others open the store."""
        if self._database is not None:
            self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of SQLite and of the file system, with the store, the reason and the fix."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            reason = getattr(
                error, "strerror", str(error)
            )  # errors of SQLite have no strerror
            if "locked" in reason:
                writer = self.path / "writer"
                name = writer.read_text() if writer.exists() else "another process"
                problem = f"store={self.path}: {name} writes to it. Wait until it has finished, or give another folder"
                raise BlockingIOError(errno.EAGAIN, problem) from error
            fix = "Make room there, or copy the folder to where there is; what is finished is whole: resume=True"
            if "malformed" in reason or "not a database" in reason:
                fix = "The file is damaged: take a copy of it, or give another folder"
            number = getattr(
                error, "errno", errno.ENOSPC if "full" in reason else errno.EIO
            )
            raise OSError(number, f"store={self.path}: {reason}. {fix}") from error


def _encode(rows: list[dict]) -> tuple[str, str, bytes]:
    """Fields as JSON; arrays stacked over the rows: their names, types and shapes as JSON, and their bytes."""
    names = {name for name, value in rows[0].items() if isinstance(value, np.ndarray)}
    fields = [
        {name: value for name, value in row.items() if name not in names} for row in rows
    ]
    arrays = {name: np.stack([row[name] for row in rows]) for name in sorted(names)}
    layout = [(name, values.dtype.str, values.shape) for name, values in arrays.items()]
    data = b"".join(values.tobytes() for values in arrays.values())
    return json.dumps(fields), json.dumps(layout), data


def _decode(fields: str, layout: str, data: bytes) -> list[dict]:
    """The rows that `_encode` was given."""
    rows = json.loads(fields)
    offset = 0
    for name, dtype, shape in json.loads(layout):
        values = np.ndarray(shape, dtype, data, offset)  # a read-only view, no copy
        offset += values.nbytes
        for row, value in zip(rows, values):
            row[name] = value
    return rows
