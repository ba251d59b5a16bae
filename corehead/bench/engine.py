"""What scoring, ablation and the store cost.

*Scoring*, beside a plain forward pass (SDPA): one question with its null question, eight questions on the same pages,
and eager attention with `output_attentions=True`, which is how attention rows are read elsewhere. All go from pixels
on, the processor's work included. "counted MiB" is what `corehead.models.memory` says of scoring, weights left out.

*Sharing*: k questions on one document in one call of `score`, which computes the document once, and in k calls.

*Ablation*: conditions per second over the same samples, all in one call of `evaluate`, a call for each, and plain
forward passes for each.

*Store*: rows per second appended, 128 at a time, and read back. "answers" are rows of `evaluate`; "scores" those of
`score` for a model of 6 layers x 8 heads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..ablation import Ablation, ablate
from ..batching import collate, pad_id, to_model
from ..evaluation import evaluate
from ..models import MLLM, memory
from ..ranking import HeadRanking, HeadSet
from ..samples import Sample
from ..scoring import score
from ..store import Store
from .measure import MIB, compare, peak_memory, seconds
from .models import questions

Samples = Sequence[Sample]


@torch.inference_mode()
def _forward(mllm: MLLM, sample: Sample, attention: str = "sdpa") -> None:
    inputs = to_model(mllm.tag(sample).inputs, mllm)
    eager = attention == "eager"
    # the decoder's alone: the vision tower is the same in all ways
    mllm.model.set_attn_implementation({"text_config": attention})
    mllm.model(**inputs, use_cache=not eager, logits_to_keep=1, output_attentions=eager)
    mllm.model.set_attn_implementation({"text_config": "sdpa"})


def _score(mllm: MLLM, asked: Samples, at_once: int = 8) -> None:
    for i in range(0, len(asked), at_once):
        score(mllm, asked[i : i + at_once], progress=False, on_error="raise")


def scoring_rows(mllm: MLLM, tokens: int, repeats: int) -> list[dict]:
    """Time and peak memory of every way to score."""
    asked = questions(mllm, tokens, 8)
    ways = {
        "plain": partial(_forward, mllm, asked[0]),
        "score 1": partial(_score, mllm, asked[:1]),
        "score 8": partial(_score, mllm, asked),
        "eager": partial(_forward, mllm, asked[0], "eager"),
    }
    rows = compare(ways, repeats)
    tagged = mllm.tag(asked[0])
    need = memory(mllm.model.config, mllm.model.dtype, tokens=len(tagged.ids))
    for row in rows:
        row["peak MiB"] = peak_memory(ways[row["way"]], mllm.device.type)
        row["memory / plain"] = row["peak MiB"] / rows[0]["peak MiB"]
        # the weights are there before the call and are no part of its peak
        row["counted MiB"] = (need.total - need.weights) / MIB
    return [
        {"visual tokens": len(tagged.visual)} | row | {"repeats": repeats} for row in rows
    ]


def sharing_rows(
    mllm: MLLM, tokens: int, counts: Sequence[int], repeats: int
) -> list[dict]:
    """Scoring k questions on one document together and each for itself."""
    rows = []
    for k in counts:
        asked = questions(mllm, tokens, k)
        ways = {
            "together": partial(_score, mllm, asked, k),
            "one by one": partial(_score, mllm, asked, 1),
        }
        for row in compare(ways, repeats):
            rows.append(
                {"visual tokens": tokens, "questions": k} | row | {"repeats": repeats}
            )
    return rows


def _together(mllm: MLLM, asked: Samples, ablations: Sequence[Ablation]) -> None:
    evaluate(mllm, asked, dict(enumerate(ablations)), progress=False)


def _one_by_one(mllm: MLLM, asked: Samples, ablations: Sequence[Ablation]) -> None:
    for ablation in ablations:
        evaluate(mllm, asked, {"ablated": ablation}, progress=False)


@torch.inference_mode()
def _nothing_shared(mllm: MLLM, asked: Samples, ablations: Sequence[Ablation]) -> None:
    for ablation in ablations:
        for i in range(0, len(asked), 32):
            # processor and vision tower run again for each condition, as in a plain loop
            tagged = [mllm.tag(sample) for sample in asked[i : i + 32]]
            inputs = to_model(collate(tagged, pad_id(mllm)), mllm)
            with ablate(mllm, ablation.heads, ablation.mode, tagged=tagged):
                mllm.model(**inputs, logits_to_keep=2)


ABLATING = {
    "together": _together,
    "one by one": _one_by_one,
    "nothing shared": _nothing_shared,
}


def ablation_rows(
    name: str, mllm: MLLM, asked: Samples, conditions: int, repeats: int
) -> list[dict]:
    """Conditions per second of every way to ablate."""
    scores = np.random.default_rng(0).random((conditions, mllm.n_layers, mllm.n_heads))
    tops = [HeadRanking(values).top(0.1) for values in scores]
    layers = np.linspace(0, mllm.n_layers - 1, conditions).astype(int)
    single = [HeadSet.of([(layer, 0)], mllm.shape) for layer in layers]
    # "zero" changes outputs and needs the context anew, "knockout" masks edges and leaves it as it is; of one head the
    # layers in front need not run again
    modes = {
        "zero": [Ablation(heads) for heads in tops],
        "knockout": [Ablation(heads, "knockout") for heads in tops],
        "zero, a head each": [Ablation(heads) for heads in single],
    }
    rows = []
    for mode, ablations in modes.items():
        head = {
            "model": name,
            "questions": len(asked),
            "mode": mode,
            "conditions": conditions,
        }
        ways = {way: partial(run, mllm, asked, ablations) for way, run in ABLATING.items()}
        for row in compare(ways, repeats):
            row["conditions / s"] = conditions / row.pop("seconds")
            rows.append(head | row)
    return rows


# rows as they are stored: numbers and texts, or arrays
RNG = np.random.default_rng(0)
TABLES = {
    "answers": dict(
        answer="7", prediction="7", correct=True, logprob=RNG.random(), margin=RNG.random()
    ),
    "scores": dict(zip("abcdefg", RNG.random((7, 3, 6, 8), dtype=np.float32))),
}


def _append(folder: Path, row: dict, size: int) -> None:
    with Store(folder, {}) as store:
        for first in range(0, size, 128):
            ids = range(first, min(first + 128, size))
            store.append(
                [row | {"sample": f"sample-{i}", "key": "0123456789abcdef"} for i in ids]
            )


def _read(folder: Path, size: int) -> None:
    # opening it reads all rows
    with Store(folder, {}, resume=True) as store:
        assert len(store.rows) == size


def store_row(row: dict, size: int) -> dict:
    """Appending and reading back a table of `size` rows like this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        appending = seconds(lambda: _append(path, row, size))
        # with all files beside it, such as a journal
        files = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
        reading = seconds(lambda: _read(path, size))
    speed = {"appended / s": round(size / appending), "read / s": round(size / reading)}
    return (
        {"rows": size}
        | speed
        | {"files": len(files), "bytes / row": round(sum(files) / size)}
    )


def store_rows(sizes: Sequence[int]) -> list[dict]:
    """Stores of both tables, each of its own."""
    return [
        {"table": name} | store_row(row, size)
        for name, row in TABLES.items()
        for size in sizes
    ]
