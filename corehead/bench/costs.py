"""What scoring a benchmark costs on a GPU: computed from published counts, not measured.

A context is prefilled once; every question on it, and the same with "N/A", is a short chunk behind the cache. FLOPs: 2
for each parameter and token of the decoder and of the vision tower, and 4 for each query, key, head and channel of
attention (Q K^T and A V; half the pairs in the causal prefill). The rows that are read for scores are computed twice;
the vocabulary is not multiplied, as no logits are asked for.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from .models import GEOMETRIES
from .work import layer_parameters

BENCHMARKS = pd.DataFrame(
    yaml.safe_load(Path(__file__).with_name("costs.yaml").read_text())
).set_index("benchmark")
PATCHES = 4  # of a vision tower, that make one visual token
MODELS = tuple(name for name, geometry in GEOMETRIES.items() if "vision" in geometry)


def decoder_parameters(model: str) -> int:
    """Parameters of the decoder's layers, those that every token passes."""
    text = GEOMETRIES[model]["text"]
    heads = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    return text["num_hidden_layers"] * layer_parameters(
        text["hidden_size"], text["intermediate_size"], *heads
    )


def vision_flops(model: str, patches: pd.Series) -> pd.Series:
    """FLOPs of the vision tower over a view; its MLP has two matrices."""
    tower = GEOMETRIES[model]["vision"]
    hidden = tower["hidden_size"]
    parameters = 4 * hidden**2 + 2 * hidden * tower["intermediate_size"]  # of a layer
    return tower["depth"] * (2 * parameters * patches + 4 * hidden * patches**2)


def scoring_costs(
    model: str, counts: pd.DataFrame = BENCHMARKS, *, question: int = 40
) -> pd.DataFrame:
    """Tokens and FLOPs of scoring benchmarks once, the null question included.

    Parameters
    ----------
    model : str
        One of MODELS.
    counts : DataFrame
        A row a benchmark, with the columns of costs.yaml.
    question : int
        Tokens behind the context for a question: its own, the template's, the answer's.

    Returns
    -------
    DataFrame
        ``context_tokens`` of one context; ``prefill_tokens``, ``chunk_tokens`` of all; ``flops`` of all, of which
        ``share_attention`` is attention in the decoder and ``share_vision`` the vision tower.

    Raises
    ------
    KeyError
        The model is not one of MODELS.
    """
    text = GEOMETRIES[model]["text"]
    context = counts.views * counts.tokens
    prefill = counts.contexts * context
    chunk = 2 * counts.questions * question  # the question itself and "N/A"
    linear = 2 * decoder_parameters(model) * (prefill + chunk)
    # pairs of query and key: half of N x N in the prefill; a chunk sees the context, and its rows are read once more
    pairs = counts.contexts * context**2 / 2 + 1.5 * chunk * context
    channels = text["num_hidden_layers"] * text["num_attention_heads"] * text["head_dim"]
    attention = 4 * channels * pairs
    # every view once, whatever the number of questions on it
    vision = counts.contexts * counts.views * vision_flops(model, counts.tokens * PATCHES)
    flops = linear + attention + vision
    columns = dict(
        context_tokens=context, prefill_tokens=prefill, chunk_tokens=chunk, flops=flops
    )
    return pd.DataFrame(columns).assign(
        share_attention=attention / flops, share_vision=vision / flops
    )


def gpu_hours(flops: pd.Series, peak: float = 989e12, mfu: float = 0.4) -> pd.Series:
    """Hours of one GPU: `peak` FLOP/s (H100 SXM, dense bfloat16) at a model FLOPs utilisation of `mfu`."""
    return flops / (peak * mfu) / 3600


def table(model: str) -> pd.DataFrame:
    """A row a benchmark: counts, tokens, PFLOPs and GPU hours; computed, not measured."""
    cost = scoring_costs(model)
    columns = {
        "tokens a context": cost.context_tokens.round(),
        "million tokens": ((cost.prefill_tokens + cost.chunk_tokens) / 1e6).round(1),
        "PFLOP": (cost.flops / 1e15).round(),
        "attention": cost.share_attention.round(2),
        "vision": cost.share_vision.round(2),
        "GPU hours": gpu_hours(cost.flops).round(2),
    }
    return pd.concat(
        [BENCHMARKS[["contexts", "questions"]], pd.DataFrame(columns), BENCHMARKS.assumed],
        axis=1,
    )
