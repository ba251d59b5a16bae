"""The computed cost of scoring, against parameters and FLOPs that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from corehead import speed
from corehead.costs import BENCHMARKS, VISION, Benchmark, decoder_parameters, gpu_hours, scoring_cost, table


def test_decoders_have_the_parameters_of_the_real_architecture():
    for name in VISION:
        layers = speed.build(name, "meta").model.model.language_model.layers
        assert decoder_parameters(name) == sum(p.numel() for p in layers.parameters() if p.dim() == 2)


def test_a_prefill_has_the_flops_that_pytorch_counts():
    name, n = "qwen3-vl-8b", 1000
    mllm = speed.build(name, "meta")
    decoder = mllm.model.model.language_model
    embeds, places = torch.zeros(1, n, 4096, device="meta"), torch.zeros(3, 1, n, device="meta", dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        decoder(inputs_embeds=embeds, position_ids=places, use_cache=False)
    cost = scoring_cost(name, Benchmark(1, 0, 1, n, ""))
    language = cost["flops"] * (1 - cost["share_vision"])
    attention = cost["flops"] * cost["share_attention"]
    assert counter.get_total_flops() == pytest.approx(language + attention, rel=0.01)  # PyTorch counts all N x N pairs


def test_costs_add_up():
    one, two = (scoring_cost("qwen3-vl-8b", Benchmark(n, 8 * n, 4, 256, "")) for n in (1, 2))
    assert two["flops"] == 2 * one["flops"] and two["prefill_tokens"] == 2048 and one["chunk_tokens"] == 640
    alone = scoring_cost("qwen3-vl-8b", Benchmark(8, 8, 4, 256, ""))
    assert alone["flops"] > 3 * one["flops"]  # questions that share a context are cheap
    assert gpu_hours(989e12 * 3600, mfu=0.5) == pytest.approx(2)
    assert list(table().index) == list(BENCHMARKS)
    with pytest.raises(KeyError):
        table("qwen3-vl-9b")
