"""What scoring costs beside a plain forward pass: ``python -m corehead.bench`` writes data/results/bench/.

A random-weight Qwen3-VL reads pages of 256 visual tokens and a question. Side by side, in one process and in turn: a
plain forward pass (SDPA), scoring one question (with its null question), scoring eight questions on the same pages,
and eager attention with `output_attentions=True`, which is how attention rows are read elsewhere. All include the
processor's work. Times are medians; peak memory is each way's own, in a process of its own, above the loaded model.
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
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .models import MLLM
from .samples import Pages, Sample
from .scoring import score
from .tagging import to_model
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


def measure_memory(way: str, tokens: int) -> float:
    """Peak memory in MiB above the loaded model, in a fresh process; NaN if it was killed for it."""
    code = f"from corehead import bench; bench.print_memory({way!r}, {tokens})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else float("nan")


def print_memory(way: str, tokens: int) -> None:
    """Print the peak in MiB above what the model and a warm-up hold."""
    mllm = build()
    run(mllm, way, PAGE)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mib("VmRSS")
    run(mllm, way, tokens)
    print(json.dumps(memory_mib("VmHWM") - before))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="data/results/bench")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=15, help="up to 2048 tokens; fewer, in proportion, beyond")
    options = parser.parse_args()
    rows = []
    for tokens in options.lengths:
        times = measure_times(tokens, max(3, options.repeats * 2048 // max(tokens, 2048)))
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
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out / "scoring.csv", index=False)
    machine = dict(
        machine=f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        torch=torch.__version__,
        geometry=GEOMETRY | {"weights": "random: this table serves speed alone"},
        page_tokens=PAGE,
    )
    (out / "scoring.json").write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
