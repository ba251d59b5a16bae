"""What scoring a benchmark costs on a GPU, computed from published counts: ``python -m corehead.costs`` prints it.

Computed, not measured. A context is prefilled once; every question on it, and the same with "N/A", is a short chunk
behind the cache. FLOPs: 2 for each parameter and token of the decoder and of the vision tower, and 4 for each query,
key, head and channel of attention (Q K^T and A V; half the pairs in the causal prefill). The rows that are read for
scores are computed twice; the vocabulary is not multiplied, as no logits are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from .speed import GEOMETRIES


@dataclass(frozen=True)
class Vision:
    """A vision tower as its config.json has it; its MLP has two matrices."""

    depth: int
    hidden: int
    intermediate: int
    patches: int = 4  # that make one visual token

    @property
    def parameters(self) -> int:
        """Of the layers, those that every patch passes."""
        return self.depth * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)


VISION = {"qwen3-vl-4b": Vision(24, 1024, 4096), "qwen3-vl-8b": Vision(27, 1152, 4304)}


def decoder_parameters(model: str) -> int:
    """Parameters of the decoder's layers, those that every token passes; the MLP is gated (three matrices)."""
    text = GEOMETRIES[model][1]
    heads = 2 * (text["num_attention_heads"] + text["num_key_value_heads"]) * text["head_dim"]
    return text["num_hidden_layers"] * text["hidden_size"] * (heads + 3 * text["intermediate_size"])


@dataclass(frozen=True)
class Benchmark:
    """Published counts of a benchmark, and what was assumed to make tokens of them.

    Parameters
    ----------
    contexts : pictures, documents or videos.
    questions : in all.
    views : pictures, pages or pairs of frames in a context, which the vision tower sees one by one.
    tokens : visual tokens of a view: 32 x 32 pixels each.
    assumed : in words.
    """

    contexts: int
    questions: int
    views: float
    tokens: int
    assumed: str


BENCHMARKS = {
    "RefCOCOg test": Benchmark(5023, 5023, 1, 300, "pictures of 640 x 480 px, one expression each"),
    "VidSTG test": Benchmark(4610, 4610, 100, 220, "200 frames of 640 x 352 px, one sentence each"),
    "MMDocIR": Benchmark(313, 1658, 65.1, 1900, "pages of 1224 x 1584 px (144 dpi), whole documents"),
    "MMLongBench-Doc": Benchmark(135, 1082, 47.5, 1900, "pages of 1224 x 1584 px (144 dpi), whole documents"),
    "MLVU dev": Benchmark(2175, 2175, 100, 220, "200 frames of 640 x 352 px, one question each; no labels of evidence"),
}


def scoring_cost(model: str, benchmark: Benchmark, *, question: int = 40) -> dict[str, float]:
    """Tokens and FLOPs of scoring a benchmark once, the null question included.

    Parameters
    ----------
    model : "qwen3-vl-4b" or "qwen3-vl-8b".
    benchmark : its counts.
    question : tokens behind the context for a question: its own, the template's, the answer's.

    Returns
    -------
    dict : ``context_tokens`` of one context; ``prefill_tokens``, ``chunk_tokens`` of all; ``flops`` of all, of which
        ``share_attention`` is attention in the decoder and ``share_vision`` the vision tower.
    """
    text, tower = GEOMETRIES[model][1], VISION[model]
    context = benchmark.views * benchmark.tokens
    prefill, chunk = benchmark.contexts * context, 2 * benchmark.questions * question
    channels = text["num_hidden_layers"] * text["num_attention_heads"] * text["head_dim"]
    linear = 2 * decoder_parameters(model) * (prefill + chunk)
    # pairs of query and key: half of N x N in the prefill; a chunk sees the context, and its rows are read once more
    pairs = benchmark.contexts * context**2 / 2 + 1.5 * chunk * context
    patches = benchmark.tokens * tower.patches
    vision = 2 * tower.parameters + 4 * tower.depth * tower.hidden * patches
    vision *= benchmark.contexts * benchmark.views * patches
    flops = linear + 4 * channels * pairs + vision
    return dict(
        context_tokens=context,
        prefill_tokens=prefill,
        chunk_tokens=chunk,
        flops=flops,
        share_attention=4 * channels * pairs / flops,
        share_vision=vision / flops,
    )


def gpu_hours(flops: float, peak: float = 989e12, mfu: float = 0.4) -> float:
    """Hours of one GPU: `peak` FLOP/s (H100 SXM, dense bfloat16) at a model FLOPs utilisation of `mfu`."""
    return flops / (peak * mfu) / 3600


def table(model: str = "qwen3-vl-8b", mfu: float = 0.4) -> pd.DataFrame:
    """A row a benchmark: counts, tokens, PFLOPs and GPU hours; computed, not measured.

    Raises
    ------
    KeyError : the model is not one of VISION.
    """
    rows = {}
    for name, benchmark in BENCHMARKS.items():
        cost = scoring_cost(model, benchmark)
        rows[name] = {
            "contexts": benchmark.contexts,
            "questions": benchmark.questions,
            "tokens a context": round(cost["context_tokens"]),
            "million tokens": round((cost["prefill_tokens"] + cost["chunk_tokens"]) / 1e6, 1),
            "PFLOP": round(cost["flops"] / 1e15),
            "attention": f"{cost['share_attention']:.0%}",
            "vision": f"{cost['share_vision']:.0%}",
            "GPU hours": round(gpu_hours(cost["flops"], mfu=mfu), 2),
            "assumed": benchmark.assumed,
        }
    return pd.DataFrame(rows).T.rename_axis("benchmark")


if __name__ == "__main__":
    for name in VISION:
        print(f"{name}, one H100 (989 TFLOP/s in bfloat16) at 40 % MFU: computed, not measured")
        print(table(name).to_string(), "\n")
