"""Time scoring, ablation, the store and hybrid attention; writes tables to data/results/bench/."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from ..models import MLLM, load
from ..testbed import samples
from . import attention, costs, engine
from .attention import Setting
from .models import GEOMETRIES, RELEASED, build, questions

GOALS = """
parts:
  scoring, sharing, ablation, store   beside plain forward passes; on a GPU scoring alone, at the released geometries
  counted                             what FLOPs and bytes predict of hybrid attention
  attention, testbed                  its prefill and decoding; its prefill at the lengths of the testbed's documents
  costs                               GPU hours of scoring the benchmarks: computed

goals on a GPU, 10 % of KV groups full, window 2048, 16 sinks:
  prefill at least 2.1x at 64k tokens and 3x at 128k, and within 85 % of its bound
  decoding at least 1.7x at 128k, a cache of at most 15 %
"""
TESTBED, LONG_TESTBED = "data/testbed/qwen3vl-s", "data/testbed/qwen3vl-s-long"
RANDOM = {"weights": "random: they serve speed alone"}
WINDOW = {"cpu": 256, "cuda": 2048}
LONG = [2**i for i in range(13, 18)]  # 8k to 128k tokens
Tables = Iterator[tuple[str, list[dict], dict]]  # name, rows, what they were measured on


def grid(
    options: argparse.Namespace, geometry: str, lengths: list[int]
) -> Iterator[tuple[str, MLLM, int]]:
    """Models and numbers of tokens: those asked for, or these on a CPU and the released ones on a GPU."""
    cpu = options.device == "cpu"
    for name in options.geometry or ([geometry] if cpu else RELEASED):
        # the dtypes in which models run on the two; many CPUs are slow in bfloat16
        mllm = build(name, options.device, torch.float32 if cpu else torch.bfloat16)
        for tokens in options.lengths or (lengths if cpu else LONG):
            yield name, mllm, tokens


def scoring(options: argparse.Namespace) -> Tables:
    cpu, rows = options.device == "cpu", []
    for geometry, mllm, tokens in grid(options, "small", [2**i for i in range(9, 14)]):
        repeats = options.repeats or max(
            3, min(15, 2**15 // tokens)
        )  # short runs are noisy
        rows += [
            {"geometry": geometry} | row
            for row in engine.scoring_rows(mllm, tokens, repeats)
        ]
        # the table so far, after each length
        yield "scoring" if cpu else "scoring-cuda", rows, RANDOM


def sharing(options: argparse.Namespace) -> Tables:
    rows = engine.sharing_rows(build("small"), 2048, (1, 2, 5, 10), options.repeats or 3)
    yield "sharing", rows, RANDOM


def ablation(options: argparse.Namespace) -> Tables:
    repeats = options.repeats or 3
    # many questions on small contexts, as in the notebooks, and few on a larger one
    documents = samples("document", "validation", 128, questions=8)
    name = "testbed, documents of 8 pages"
    rows = engine.ablation_rows(name, load(TESTBED), documents, 8, repeats)
    mllm = build("small")
    name = "random weights, 512 visual tokens"
    rows += engine.ablation_rows(name, mllm, questions(mllm, 512, 8), 8, repeats)
    yield "ablation", rows, {}


def store(options: argparse.Namespace) -> Tables:
    yield "store", engine.store_rows((10**4, 10**5, 10**6)), {}


def counted(options: argparse.Namespace) -> Tables:
    setting = Setting(WINDOW["cuda"], sinks=16)
    rows = [
        row
        for geometry in RELEASED
        for row in attention.counted_rows(geometry, LONG, setting)
    ]
    card = dict(machine="none: counted", window=setting.window, sinks=setting.sinks)
    yield "acceleration-counted", rows, card


def hybrid(options: argparse.Namespace) -> Tables:
    setting = Setting(WINDOW[options.device], sinks=16, repeats=options.repeats or 3)
    card = RANDOM | dict(window=setting.window, sinks=setting.sinks)
    tables: dict[str, list] = {"prefill": [], "decode": []}
    for geometry, mllm, tokens in grid(options, "cpu", [2**i for i in range(10, 15)]):
        new = attention.attention_rows(mllm, tokens, setting)
        for (name, rows), found in zip(tables.items(), new):
            rows += [{"geometry": geometry} | row for row in found]
            yield f"acceleration-{options.device}-{name}", rows, card


def testbed(options: argparse.Namespace) -> Tables:
    mllm = load(LONG_TESTBED)
    rows = []
    # without decoding: its answers are one token
    setting = Setting(window=64, sinks=4, repeats=options.repeats or 3, steps=0)
    for distractors in (164, 340):
        [sample] = samples("document", "validation", 1, distractors=distractors)
        rows += attention.attention_rows(mllm, len(mllm.tag(sample).ids), setting)[0]
    card = dict(weights="trained", window=setting.window, sinks=setting.sinks)
    yield "acceleration-testbed", rows, card


def computed(options: argparse.Namespace) -> Tables:
    card = dict(machine="none: computed for one H100 (989 TFLOP/s in bfloat16) at 40 % MFU")
    for model in costs.MODELS:
        yield f"costs-{model}", costs.table(model).reset_index().to_dict("records"), card


PARTS = {
    "scoring": scoring,
    "sharing": sharing,
    "ablation": ablation,
    "store": store,
    "counted": counted,
    "attention": hybrid,
    "testbed": testbed,
    "costs": computed,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        "python -m corehead.bench",
        None,
        __doc__,
        GOALS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help="all; on a GPU scoring and attention",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default="data/results/bench")
    parser.add_argument(
        "--geometry",
        nargs="+",
        choices=GEOMETRIES,
        metavar="NAME",
        help=f"of {', '.join(GEOMETRIES)}",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help="of scoring and attention"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="rounds after one that warms up: 3, up to 15 of short ones",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand: leave --device out to time the CPU")
    return options


def main(arguments: list[str] | None = None) -> None:
    """The command. A table of many lengths is written with each of them, so that no hour is lost."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cpu = options.device == "cpu"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, CPU"
    if not cpu:
        machine = torch.cuda.get_device_name()
    # a time means nothing without what it was measured on: every table has a card beside it
    card = {"machine": machine, "torch": torch.__version__}
    gc.freeze()  # modules need not be looked through for garbage between the runs
    try:
        for part in options.only or (PARTS if cpu else ("scoring", "attention")):
            for name, rows, more in PARTS[part](options):
                table = pd.DataFrame(rows).round(5)
                table.to_csv(options.out / f"{name}.csv", index=False)
                (options.out / f"{name}.json").write_text(
                    json.dumps(card | more, indent=1) + "\n"
                )
                print(name, table.to_string(index=False), sep="\n", flush=True)
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    main()
