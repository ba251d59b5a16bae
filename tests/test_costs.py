"""The computed cost of scoring, against parameters and FLOPs that PyTorch counts."""

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from corehead.bench.costs import (
    BENCHMARKS,
    MODELS,
    decoder_parameters,
    gpu_hours,
    scoring_costs,
    table,
)
from corehead.bench.models import build


def cost(model="qwen3-vl-8b", **counts) -> pd.Series:
    return scoring_costs(model, pd.DataFrame([counts])).iloc[0]


def test_decoders_have_the_parameters_of_the_real_architecture():
    assert MODELS == ("qwen3-vl-4b", "qwen3-vl-8b")
    for name in MODELS:
        layers = build(name, "meta").model.model.language_model.layers
        assert decoder_parameters(name) == sum(
            p.numel() for p in layers.parameters() if p.dim() == 2
        )


def test_a_prefill_has_the_flops_that_pytorch_counts():
    n = 1000
    decoder = build("qwen3-vl-8b", "meta").model.model.language_model
    embeds, positions = (
        torch.zeros(1, n, 4096, device="meta"),
        torch.zeros(3, 1, n, device="meta", dtype=torch.long),
    )
    with FlopCounterMode(display=False) as counter:
        decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    found = cost(contexts=1, questions=0, views=1, tokens=n)
    language = found.flops * (1 - found.share_vision)
    attention = found.flops * found.share_attention
    assert counter.get_total_flops() == pytest.approx(
        language + attention, rel=0.01
    )  # PyTorch counts all N x N pairs


def test_costs_add_up():
    one, two = (cost(contexts=n, questions=8 * n, views=4, tokens=256) for n in (1, 2))
    assert (
        two.flops == 2 * one.flops
        and two.prefill_tokens == 2048
        and one.chunk_tokens == 640
    )
    alone = cost(contexts=8, questions=8, views=4, tokens=256)
    assert alone.flops > 3 * one.flops  # questions that share a context are cheap
    assert gpu_hours(989e12 * 3600, mfu=0.5) == pytest.approx(2)
    with pytest.raises(KeyError):
        table("qwen3-vl-9b")


def test_the_table_says_what_was_computed():
    found = table("qwen3-vl-8b")
    assert list(found.index) == list(BENCHMARKS.index) and len(found) == 5
    assert found.loc["MMDocIR", ["contexts", "questions", "GPU hours"]].tolist() == [
        313,
        1658,
        1.57,
    ]
