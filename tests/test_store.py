"""Stores: many rows, kills, full and read-only disks, two runs at once, and the same bits again."""

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ask, image_part, picture

import corehead as ch
from corehead import store as stores
from corehead import testbed
from corehead.ablation import curve
from corehead.store import Store


def row(i: int) -> dict:
    return {"sample": f"s{i}", "n": i, "meta": {"i": i}, "mass": np.full((3, 2, 6), i, np.float32)}


def filled(path, n: int) -> Path:
    with Store(path, {"a": 1}) as keep:
        for i in range(n):
            keep.append([row(i)])
    return path


def names(path) -> list[str]:
    with Store(path, {"a": 1}, resume=True) as keep:
        return [r["sample"] for r in keep.rows]


def questions(mllm, n: int = 18) -> list[ch.Sample]:
    """Three questions on each picture; the pictures are of several sizes, so that batches of several lengths wait."""
    pictures = [image_part(picture(40 + 40 * (i % 3), 60, seed=i)) for i in range(n // 3)]
    return [
        ask(pictures[i // 3], id=f"s{i}", question=f"Where is {i}?", evidence=[ch.Region(0, (0, 0, 30, 30))])
        for i in range(n)
    ]


# --- many rows


def test_parts_are_merged_and_rows_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MERGED", 4)
    path = filled(tmp_path / "s", 100)
    assert len(list(path.glob("part-*"))) == sum(int(digit) for digit in np.base_repr(100, 4))
    assert names(path) == [f"s{i}" for i in range(100)]
    with Store(path, {"a": 1}, resume=True) as keep:
        assert all((r["mass"] == i).all() and r["meta"] == {"i": i} and r["n"] == i for i, r in enumerate(keep.rows))
        keep.append([row(100)])
    assert names(path)[-1] == "s100"


def test_large_parts_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MERGED", 4)
    monkeypatch.setattr(stores, "LARGEST", 10)
    assert len(list(filled(tmp_path / "s", 9).glob("part-*"))) == 9


def test_what_was_merged_but_not_removed_does_not_count_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MERGED", 4)
    path = filled(tmp_path / "s", 3)
    kept = {part: part.read_bytes() for part in path.glob("part-*")}
    with Store(path, {"a": 1}, resume=True) as keep:
        keep.append([row(3)])
    for part, content in kept.items():  # as if the run had been killed between the merge and the removal
        part.write_bytes(content)
    assert names(path) == [f"s{i}" for i in range(4)]
    assert [p.name for p in path.glob("part-*")] == ["part-000001-000004.parquet"]


# --- disks that are full or read-only, and two runs


def test_a_full_disk_stops_the_run_and_what_was_finished_goes_on(tmp_path):
    mllm, store = testbed.tiny("qwen3_vl"), tmp_path / "run"
    samples = questions(mllm)

    def until_full():
        for i, sample in enumerate(samples):
            if i == 9:  # from here on, a device that answers every write with ENOSPC
                part = 1 + len(list(store.glob("part-*")))
                (store / f"part-{part:06d}.parquet.writing").symlink_to("/dev/full")
            yield sample

    with pytest.raises(OSError, match=r"store=.*run: .*No space left on device.*Make room.*resume=True") as error:
        ch.score(mllm, until_full(), batch_size=1, store=store, progress=False)
    assert error.value.errno == errno.ENOSPC
    assert list(store.glob("part-*.parquet")) and not list(store.glob("*.writing"))
    resumed = ch.score(mllm, samples, batch_size=1, store=store, resume=True, progress=False)
    assert resumed.data.identical(ch.score(mllm, samples, batch_size=1, progress=False).data)


def test_a_merge_that_finds_the_disk_full_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MERGED", 4)
    path = filled(tmp_path / "s", 3)
    with Store(path, {"a": 1}, resume=True) as keep:
        (path / "part-000001-000004.parquet.writing").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            keep.append([row(3)])
    assert names(path) == [f"s{i}" for i in range(4)]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"store=.*run: .*Not a directory.*Give a folder that can be written to"):
        Store(tmp_path / "file" / "run", {})


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment, which root alone can")
def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder) / "s", 2)
        for read_only in (Path(folder), path):
            read_only.chmod(0o555)
        os.seteuid(65534)  # root may write anywhere; nobody may not
        try:
            for place in (path, Path(folder) / "new"):
                with pytest.raises(OSError, match=r"store=.*Permission denied.*Give a folder that can be written to"):
                    Store(place, {"a": 1}, resume=True)
            assert pd.read_parquet(path / "part-000001.parquet")["sample"].tolist() == ["s0"]
        finally:
            os.seteuid(0)
        assert names(path) == ["s0", "s1"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stores.fcntl, "flock", none)
    with pytest.raises(OSError, match=r"store=.*No locks available.*Give a folder on a file system with locks"):
        Store(tmp_path, {})


def test_the_second_run_is_told_who_holds_the_store(tmp_path):
    ready, tell = os.pipe()
    other = os.fork()
    if not other:
        held = Store(tmp_path, {})
        os.write(tell, b"." if held.path else b"")
        signal.pause()
    os.read(ready, 1)
    try:
        with pytest.raises(BlockingIOError, match=rf"another run writes to it \(process {other} on .*\)\. Wait"):
            Store(tmp_path, {})
    finally:
        os.kill(other, signal.SIGKILL)  # the lock goes with its process
        os.waitpid(other, 0)
    Store(tmp_path, {})


# --- the same bits


def test_two_runs_give_the_same_bits():
    tables = []
    for _ in range(2):
        mllm = testbed.tiny("qwen3_vl")
        samples = questions(mllm)
        scores = ch.score(mllm, samples, batch_size=2, progress=False)
        ranking = scores.rank("ram")
        conditions = {"intact": None} | curve(ranking, [0.2], "random", draws=range(2)) | curve(ranking, [0.2])
        tables.append((scores, ranking, ch.evaluate(mllm, samples, conditions, batch_size=2, progress=False)))
    (scores, ranking, answers), (scores2, ranking2, answers2) = tables
    assert scores.data.identical(scores2.data)
    assert np.array_equal(ranking.order, ranking2.order)
    pd.testing.assert_frame_equal(answers, answers2, check_exact=True)


def kill_at_random(folder: Path, kills: int) -> None:
    """In a process of its own: fork runs, kill them at random points until `kills` died, and compare what they leave.

    A point is the drawing of a sample or anything done to a file of the store: opened, renamed, removed.
    """
    stores.MERGED = 3
    mllm = testbed.tiny("qwen3_vl")
    samples, draw = questions(mllm), random.Random(0)

    def run(store: Path, stop: int | None, out: Path) -> bool:
        """Whether a run in a child came to its end before it was killed at point `stop`."""
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == 0
        passed = 0

        def point():
            nonlocal passed
            passed += 1
            if passed == stop:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(event, arguments):
            if event in ("open", "os.rename", "os.remove") and str(store) in str(arguments[0]):
                point()

        def drawn():
            for sample in samples:
                point()
                yield sample

        status = 1
        try:
            sys.addaudithook(watch)
            data = ch.score(mllm, drawn(), batch_size=2, store=store, resume=True, progress=False).data
            out.write_bytes(pickle.dumps(data))
            status = 0
        finally:
            os._exit(status)

    def finished(store: Path) -> list[str]:
        card = store / "provenance.json"
        with Store(store, json.loads(card.read_text()) if card.exists() else {}, resume=True) as keep:
            return [r["sample"] for r in keep.rows]

    whole = folder / "whole.pickle"
    assert run(folder / "whole", None, whole)
    died = runs = 0
    while died < kills:
        store, out, kept = folder / f"run{runs}", folder / f"run{runs}.pickle", []
        runs += 1
        while not run(store, draw.randrange(1, 60), out):
            died += 1
            now = finished(store)
            assert set(kept) <= set(now) and len(set(now)) == len(now)
            kept = now
        assert sorted(finished(store)) == sorted(s.id for s in samples)
        assert pickle.loads(out.read_bytes()).identical(pickle.loads(whole.read_bytes()))
    print(died, runs)


@pytest.mark.slow
def test_kill_minus_nine_twenty_times(tmp_path):
    """Nothing is lost, nothing is there twice, and the table has the bits of a run that nobody stopped."""
    code = "import sys; from pathlib import Path; import test_store as t; t.kill_at_random(Path(sys.argv[1]), 20)"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    died, runs = map(int, done.stdout.split())
    assert died >= 20 and runs > 1
