"""Time and memory: ways to do one thing are run in turn, in one process, and reported as ratios."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
from torch.utils.benchmark.utils.timer import timer

MIB = 2**20


def seconds(run: Callable[[], object]) -> float:
    """Time that a call takes, on a GPU until it is done there."""
    begin = timer()
    run()
    return timer() - begin


def in_turn(
    ways: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int
) -> dict[str, pd.DataFrame]:
    """What every way measures, one after the other in each of `repeats` rounds.

    Parameters
    ----------
    ways : mapping of str to callable
        Name of a way -> what runs it once and gives the numbers measured.
    repeats : int
        Rounds after a first one that only warms up.

    Returns
    -------
    dict of str to DataFrame
        Way -> a row a round, a column a number; NaN where a GPU's memory did not suffice. Machines drift, so that
        ratios are to be taken round by round.
    """
    rounds: dict[str, list] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            try:
                rounds[name].append(run())
            except torch.OutOfMemoryError:
                rounds[name].append({})  # NaN in the table, and the other ways go on
            gc.collect()  # now, and not in the time of the way that comes next
    columns = list(
        dict.fromkeys(key for rows in rounds.values() for row in rows for key in row)
    )
    return {name: pd.DataFrame(rows[1:], columns=columns) for name, rows in rounds.items()}


def compare(ways: Mapping[str, Callable[[], object]], repeats: int) -> list[dict]:
    """A row a way: its time, and that as a ratio to the first way's."""
    timed = {way: lambda run=run: {"seconds": seconds(run)} for way, run in ways.items()}
    results = in_turn(timed, repeats)
    first = next(iter(ways))
    rows = []
    for way, result in results.items():
        # round by round, so that a machine that slows down does so for both
        ratio = (result / results[first]).median()
        rows.append(
            {
                "way": way,
                "seconds": result.seconds.median(),
                f"time / {first}": ratio.seconds,
            }
        )
    return rows


def _status(name: str) -> float:
    """Memory of this process in MiB, now ("VmRSS") or at its highest ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) / 1024


def peak_memory(run: Callable[[], object], device: str) -> float:
    """MiB that a call takes at its peak, above what is held before it; NaN where that is too much for a GPU.

    On a CPU from Linux's own account of the process.
    """
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not serve the call unseen
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        run()
    except torch.OutOfMemoryError:
        return float("nan")
    return (torch.cuda.max_memory_allocated() - before) / MIB
