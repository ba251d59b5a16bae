"""What scoring and ablation cost: ``python -m corehead.bench`` writes data/results/bench/.

*Scoring*, beside a plain forward pass. A random-weight Qwen3-VL reads pages of 256 visual tokens and a question. Side
by side, in one process and in turn: a plain forward pass (SDPA), scoring one question (with its null question), scoring
eight questions on the same pages, and eager attention with `output_attentions=True`, which is how attention rows are
read elsewhere. All include the processor's work. Times are medians; peak memory is each way's own, in a process of its
own, above the loaded model.

*Sharing*: k questions on one document in one call of `score`, which computes the document once, and in k calls.

*Ablation*: conditions per second over the same samples, all conditions in one call of `evaluate`, one call for each
condition, and a plain forward pass for each question and condition; on the testbed and on the same random weights.

*Store*: rows per second that are appended, 128 at a time, and read back, up to a million; bytes of a sample on the
disk. "answers" are rows of `evaluate`; "scores" those of `score` for a model of 6 layers x 8 heads, with random values.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .ablation import Ablation, ablate
from .evaluation import evaluate
from .models import MLLM, load
from .ranking import HeadRanking
from .samples import Pages, Sample
from .scoring import score
from .store import Store
from .tagging import collate, pad_id, to_model
from .testbed.generator import samples
from .testbed.tiny import tiny

GEOMETRY = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)
LENGTHS = (512, 1024, 2048, 4096, 8192)
WAYS = ("plain", "score 1", "score 8", "eager")
PAGE = 256  # visual tokens: 16 x 16 cells of 32 px


def build() -> MLLM:
    """A random-weight Qwen3-VL of GEOMETRY."""
    return tiny("qwen3_vl", real_tiles=True, text=GEOMETRY)


def questions(tokens: int, n: int) -> list[Sample]:
    """`n` questions on the same pages, `tokens` visual tokens in all."""
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 256, (512, 512, 3), dtype=np.uint8) for _ in range(tokens // PAGE)]
    content = [{"type": "image", "image": page} for page in pages]
    ask = "Sum of row {:03}?"  # a token a byte: 15, as a question has in a real vocabulary
    return [
        Sample(
            f"q{i}",
            [{"role": "user", "content": [*content, {"type": "text", "text": ask.format(i)}]}],
            [Pages([i % len(pages)])],
            "ninety",
        )
        for i in range(n)
    ]


@torch.inference_mode()
def run(mllm: MLLM, way: str, tokens: int) -> None:
    """One way over one input."""
    if way.startswith("score"):
        score(mllm, questions(tokens, int(way.split()[1])), progress=False, on_error="raise")
        return
    inputs = to_model(mllm.tag(questions(tokens, 1)[0]).inputs, mllm)
    mllm.text_config._attn_implementation = "eager" if way == "eager" else "sdpa"
    mllm.model(**inputs, output_attentions=way == "eager", use_cache=way != "eager", logits_to_keep=1)
    mllm.text_config._attn_implementation = "sdpa"


def memory_mib(name: str) -> float:
    """Resident memory of this process, now ("VmRSS") or at its highest ("VmHWM"); Linux."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def in_fresh_process(code: str) -> float:
    """The number that a program prints; NaN if it was killed, as for want of memory."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else float("nan")


def print_peak(function: Callable[[], object]) -> None:
    """Print the peak in MiB of a call above what the process holds before it; Linux."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mib("VmRSS")
    function()
    print(json.dumps(memory_mib("VmHWM") - before))


def measure_memory(way: str, tokens: int) -> float:
    """Peak memory in MiB above the loaded model, in a fresh process; NaN if it was killed for it."""
    return in_fresh_process(f"from corehead import bench; bench.print_memory({way!r}, {tokens})")


def print_memory(way: str, tokens: int) -> None:
    """Print the peak in MiB above what the model and a warm-up hold."""
    mllm = build()
    run(mllm, way, PAGE)
    print_peak(lambda: run(mllm, way, tokens))


def measure_times(tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, in turn, `repeats` times after a warm-up; eager, which is slow, twice where it is long."""
    mllm = build()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(repeats + 1):
        for way in WAYS:
            if way == "eager" and tokens > 2048 and i > 2:
                continue
            begin = time.perf_counter()
            run(mllm, way, tokens if i else PAGE)
            if i:
                times[way].append(time.perf_counter() - begin)
    return times


def by_hand(mllm: MLLM, asked: list[Sample], ablations: list[Ablation]) -> None:
    """Answers under every ablation by full forward passes that share nothing."""
    for ablation in ablations:
        for i in range(0, len(asked), 32):
            batch = [mllm.tag(sample) for sample in asked[i : i + 32]]
            inputs = to_model(collate(batch, pad_id(mllm))[0], mllm)
            with ablate(mllm, ablation.heads, ablation.mode, tagged=batch), torch.inference_mode():
                mllm.model(**inputs, logits_to_keep=2)


def one_by_one(mllm: MLLM, asked: list[Sample], ablations: list[Ablation]) -> None:
    """One call of `evaluate` for each ablation."""
    for ablation in ablations:
        evaluate(mllm, asked, {"ablated": ablation}, progress=False)


def together(mllm: MLLM, asked: list[Sample], ablations: list[Ablation]) -> None:
    """One call of `evaluate` for all."""
    evaluate(mllm, asked, dict(enumerate(ablations)), progress=False)


def ablation_rows(testbed: str | None, conditions: int, repeats: int, tokens: int = 512) -> list[dict]:
    """Conditions per second of the three ways, in turn, the median of `repeats`."""
    models = {f"random weights, {tokens} visual tokens": (build(), questions(tokens, 8))}
    if testbed is not None:
        asked = samples("document", "validation", 128, questions=8)
        models = {"testbed, documents of 8 pages": (load(testbed), asked)} | models
    ways = {"together": together, "one by one": one_by_one, "nothing shared": by_hand}
    rows = []
    for name, (mllm, asked) in models.items():
        scores = np.random.default_rng(0).random((conditions, mllm.n_layers, mllm.n_heads))
        for mode in ("zero", "knockout"):
            ablations = [Ablation(HeadRanking(values).top(0.1), mode) for values in scores]
            times: dict[str, list[float]] = {way: [] for way in ways}
            for i in range(repeats + 1):
                for way, function in ways.items():
                    begin = time.perf_counter()
                    function(mllm, asked, ablations if i else ablations[:1])  # a warm-up first
                    if i:
                        times[way].append(time.perf_counter() - begin)
            for way in ways:
                ratio = statistics.median(b / a for a, b in zip(times["together"], times[way]))
                rate = conditions / statistics.median(times[way])
                row = {"model": name, "questions": len(asked), "mode": mode, "conditions": conditions, "way": way}
                rows.append(row | {"conditions / s": round(rate, 3), "time / together": round(ratio, 2)})
                print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def sharing_rows(counts: tuple[int, ...], repeats: int, tokens: int = 2048) -> list[dict]:
    """Scoring k questions on one document together and each for itself, in turn, the median of `repeats`."""
    mllm, rows = build(), []
    score(mllm, questions(PAGE, 1), progress=False)  # a warm-up
    for k in counts:
        asked, times = questions(tokens, k), {"together": [], "one by one": []}
        for _ in range(repeats):
            for way, calls in ("together", [asked]), ("one by one", [[sample] for sample in asked]):
                begin = time.perf_counter()
                for given in calls:
                    score(mllm, given, progress=False, on_error="raise")
                times[way].append(time.perf_counter() - begin)
        ratio = statistics.median(b / a for a, b in zip(*times.values()))
        for way, taken in times.items():
            row = {"visual tokens": tokens, "questions": k, "way": way, "seconds": round(statistics.median(taken), 3)}
            gain = round(ratio, 2) if way == "one by one" else 1.0
            rows.append(row | {"time / together": gain, "repeats": repeats})
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def scoring_rows(lengths: list[int], most: int) -> list[dict]:
    """Time and memory of every way to score, at every length."""
    rows = []
    for tokens in lengths:
        times = measure_times(tokens, max(3, most * 2048 // max(tokens, 2048)))
        memory = {way: measure_memory(way, tokens) for way in WAYS}
        for way in WAYS:
            pairs = [a / b for a, b in zip(times[way], times["plain"])]
            row = {
                "visual tokens": tokens,
                "way": way,
                "seconds": round(statistics.median(times[way]), 3),
                "time / plain": round(statistics.median(pairs), 3),
                "peak MiB": round(memory[way], 1),
                "memory / plain": round(memory[way] / memory["plain"], 2),
                "repeats": len(times[way]),
            }
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    return rows


def answers_row(i: int, rng: np.random.Generator) -> dict:
    row = dict(sample=f"sample-{i}", context=f"sample-{i // 8}", ablation="0123456789abcdef", answer="7")
    return row | dict(prediction="7", correct=True, logprob=-rng.random(), margin=rng.random(), digest=f"{i:016x}")


def scores_row(i: int, rng: np.random.Generator) -> dict:
    row = dict(sample=f"sample-{i}", n_target=4, n_context=1024, on_text=False, depth=rng.random(), meta={"cells": 25})
    arrays = rng.random((7, 3, 6, 8), dtype=np.float32)
    return row | dict(zip("abcdefg", arrays)) | dict(digest=f"{i:016x}")


def store_rows(sizes: Iterable[int], at_once: int = 128) -> list[dict]:
    """Appending and reading back tables of `sizes` rows, each in a folder of its own."""
    rows = []
    for kind, make in {"answers": answers_row, "scores": scores_row}.items():
        rng = np.random.default_rng(0)
        fresh = [make(i, rng) for i in range(at_once)]
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                with Store(folder, {}) as keep:
                    for first in range(0, size, at_once):
                        part = fresh[: size - first]
                        keep.append([row | {"sample": f"sample-{first + i}"} for i, row in enumerate(part)])
                written = time.perf_counter()
                files = list(Path(folder).glob("part-*"))
                with Store(folder, {}, resume=True) as keep:
                    read = time.perf_counter()
                    assert len(keep.rows) == size
                row = {"table": kind, "rows": size, "appended / s": round(size / (written - begin))}
                row |= {"read / s": round(size / (read - written)), "files": len(files)}
                row["bytes / row"] = round(sum(file.stat().st_size for file in files) / size)
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    return rows


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, CPU"


def write(out: Path, name: str, rows: list[dict], card: dict) -> None:
    """Write a table, and beside it what it was measured on."""
    pd.DataFrame(rows).round(5).to_csv(out / f"{name}.csv", index=False)
    (out / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="data/results/bench")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=15, help="up to 2048 tokens; fewer, in proportion, beyond")
    parser.add_argument("--testbed", default="data/testbed/qwen3vl-s")
    parser.add_argument("--only", choices=("scoring", "sharing", "ablation", "store"))
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    card = dict(
        machine=machine(),
        torch=torch.__version__,
        geometry=GEOMETRY | {"weights": "random: they serve speed alone"},
        page_tokens=PAGE,
    )
    tables = {
        "scoring": lambda: scoring_rows(options.lengths, options.repeats),
        "sharing": lambda: sharing_rows((1, 2, 5, 10), repeats=3),
        "ablation": lambda: ablation_rows(options.testbed, conditions=8, repeats=3),
        "store": lambda: store_rows((10**4, 10**5, 10**6)),
    }
    for name, rows in tables.items():
        if options.only in (None, name):
            write(out, name, rows(), card)


if __name__ == "__main__":
    main()
