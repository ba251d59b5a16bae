"""Stores: what is appended comes back, also after kills, on full and read-only disks, and with two writers."""

import errno
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from corehead import store as stores
from corehead.store import Store


def row(i: int) -> dict:
    return {
        "sample": f"s{i}",
        "n": i,
        "meta": {"i": i},
        "mass": np.full((3, 2, 6), i, np.float32),
    }


def filled(path: Path, n: int) -> Path:
    with Store(path, {"a": 1}) as store:
        for i in range(n):
            store.append([row(i)])
    return path


def names(path: Path) -> list[str]:
    with Store(path, {"a": 1}, resume=True) as store:
        return [r["sample"] for r in store.rows]


def in_a_process(code: str, *arguments) -> subprocess.Popen:
    """Python that knows the store alone, so that it starts quickly; it says on its standard output how far it is."""
    begin = f"import sys; sys.path.insert(0, {str(Path(stores.__file__).parent)!r}); from store import Store\n"
    command = [sys.executable, "-u", "-c", begin + code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# --- what goes in comes out


def test_rows_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    batches = [
        [row(0)],
        [row(1), row(2)],
        [],
        [row(i) for i in range(3, 3 + 2 * stores.PIECE + 1)],
        [{"sample": "Zürich \N{BLACK STAR}", "key": "", "number": 0.1 + 0.2}],
    ]
    strange = {
        "sample": "x",
        "yes": True,
        "none": None,
        "nan": float("nan"),
        "meta": {"a": [1, {"b": "c"}]},
    }
    strange |= {
        "whole": rng.integers(0, 9, (2, 3)),
        "single": np.float64(1 / 3),
        "empty": np.empty((0, 4), np.float32),
    }
    strange |= {
        "turned": rng.random((4, 5), dtype=np.float32).T,
        "lost": np.array([np.nan, np.inf], np.float32),
    }
    batches.append([strange])
    with Store(tmp_path / "run", {}) as store:
        for batch in batches:
            store.append(batch)
    with Store(tmp_path / "run", {}, resume=True) as store:
        found = store.rows
    expected = [r for batch in batches for r in batch]
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if isinstance(value, np.ndarray):
                assert a[name].dtype == value.dtype
            np.testing.assert_array_equal(a[name], value)


def test_a_store_of_nothing_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store(None, {"a": 1}) as store:
        store.append([row(0)])
    assert store.rows == [] and not list(tmp_path.iterdir())


def test_the_file_is_sqlite_for_anybody(tmp_path):
    filled(tmp_path / "run", 3)
    database = sqlite3.connect(f"file:{tmp_path}/run/results.sqlite?mode=ro", uri=True)
    query = "SELECT json_extract(value, '$.sample') FROM batches, json_each(fields)"
    assert [name for [name] in database.execute(query)] == ["s0", "s1", "s2"]
    assert [name for [name] in database.execute("SELECT settings FROM provenance")] == [
        '{"a": 1}'
    ]
    database.close()


# --- one configuration


def test_results_of_two_configurations_do_not_mix(tmp_path):
    filled(tmp_path, 2)
    with pytest.raises(
        ValueError,
        match=r"holds results: pass resume=True to go on with them, or give another folder",
    ):
        Store(tmp_path, {"a": 1})
    with pytest.raises(
        ValueError,
        match=r"another configuration \(a, b differ\): give another folder, or delete it",
    ):
        Store(tmp_path, {"a": 2, "b": {"c": [1]}}, resume=True)
    assert names(tmp_path) == ["s0", "s1"]


def test_an_empty_store_takes_any_configuration(tmp_path):
    Store(tmp_path, {"a": 1}).close()
    with Store(tmp_path, {"a": (2, 3)}) as store:
        store.append([row(0)])
    with Store(tmp_path, {"a": [2, 3]}, resume=True) as store:
        assert len(store.rows) == 1


# --- disks that are full or read-only, and damage


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path):
    with Store(filled(tmp_path, 5), {"a": 1}, resume=True) as store:
        pages = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(
            OSError, match=r"store=.*disk is full.*Make room there.*resume=True"
        ) as error:
            store.append([row(i) for i in range(5, 100)])
        assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == [f"s{i}" for i in range(5)]
    with Store(tmp_path, {"a": 1}, resume=True) as store:  # there is room again
        store.append([row(5)])
    assert names(tmp_path) == [f"s{i}" for i in range(6)]


def test_a_write_that_the_system_refuses_half_way_leaves_all_or_nothing(tmp_path):
    file = filled(tmp_path, 5) / "results.sqlite"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(tmp_path, {"a": 1}, resume=True) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10_000, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"store=.*what is finished is whole: resume=True"
            ):
                store.append([row(i) for i in range(5, 200)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [f"s{i}" for i in range(5)]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "locked full").write_text("")
    for path, reason in (
        (tmp_path / "locked full", "File exists"),
        (tmp_path / "locked full" / "run", "Not a directory"),
    ):
        with pytest.raises(
            OSError,
            match=rf"store=.*full.*: {reason}\. .*copy the folder to where there is",
        ) as error:
            Store(path, {})
        assert not isinstance(error.value, BlockingIOError) and error.value.errno in (
            errno.EEXIST,
            errno.ENOTDIR,
        )


@pytest.mark.skipif(
    os.geteuid() != 0, reason="becomes another user for a moment, which root alone can"
)
def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder) / "s", 2)
        for read_only in (Path(folder), path):
            read_only.chmod(0o555)
        os.seteuid(65534)  # root may write anywhere; nobody may not
        try:
            for place in (path, Path(folder) / "new"):
                with pytest.raises(
                    OSError,
                    match=r"store=.*(readonly|Permission denied).*copy the folder to where",
                ):
                    Store(place, {"a": 1}, resume=True)
            database = sqlite3.connect(f"file:{path}/results.sqlite?mode=ro", uri=True)
            assert database.execute("SELECT count(*) FROM batches").fetchone() == (2,)
            database.close()
        finally:
            os.seteuid(0)
        assert names(path) == ["s0", "s1"]


def test_a_damaged_file_is_named(tmp_path):
    file = filled(tmp_path, 50) / "results.sqlite"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"no database" * 100):
        file.write_bytes(damaged)
        with pytest.raises(
            OSError,
            match=r"store=.*The file is damaged: take a copy of it, or give another folder",
        ):
            names(tmp_path)
    file.write_bytes(content)
    assert len(names(tmp_path)) == 50


# --- one writer, and kills


def test_the_second_writer_is_told_who_holds_the_store(tmp_path):
    hold = (
        "store = Store(sys.argv[1], {'a': 1}, resume=True); print('open'); sys.stdin.read()"
    )
    for held in (tmp_path / "new", filled(tmp_path / "old", 2)):
        other = in_a_process(hold, held)
        try:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(
                BlockingIOError,
                match=rf"store=.*: process {other.pid} on .* writes to it\. Wait",
            ):
                Store(held, {"a": 1}, resume=True)
        finally:
            other.kill()  # the lock goes with its process
            other.communicate()
        Store(held, {"a": 1}, resume=True).close()


def test_two_stores_of_one_process_do_not_share_a_file(tmp_path):
    with Store(tmp_path, {"a": 1}) as store:
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} "):
            Store(tmp_path, {"a": 1}, resume=True)
        store.append([row(0)])
    assert names(tmp_path) == ["s0"]


WRITER = """
import numpy as np
with Store(sys.argv[1], {"a": 1}, resume=True) as store:
    first = len(store.rows)
    print(first)
    while True:
        store.append([{"sample": f"s{i}", "mass": np.full(50_000, i, np.float32)} for i in range(first, first + 3)])
        first += 3
        print(first)
"""


def test_kill_minus_nine_loses_no_acknowledged_row(tmp_path):
    draw, kept = random.Random(0), 0
    for _ in range(8):
        writer = in_a_process(WRITER, tmp_path)
        acknowledged = [int(writer.stdout.readline()) for _ in range(draw.randrange(1, 5))]
        assert acknowledged[0] == kept
        time.sleep(0.02 * draw.random())  # somewhere within an append
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.communicate()[0].splitlines()]
        with Store(tmp_path, {"a": 1}, resume=True) as store:
            kept = len(store.rows)
            assert kept in (
                acknowledged[-1],
                acknowledged[-1] + 3,
            )  # a batch is there whole or not at all
            assert [r["sample"] for r in store.rows] == [f"s{i}" for i in range(kept)]
            assert all((r["mass"] == i).all() for i, r in enumerate(store.rows))
    assert kept >= 8
