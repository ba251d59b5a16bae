"""Gates against finite differences, and learned ones against a model with one head that matters."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_scoring import EVERY, samples_for

import corehead as ch
from corehead import gates, testbed
from corehead.batching import batches

OPTIONS = dict(progress=False)


@pytest.mark.parametrize("family", EVERY)
def test_gradients_are_finite_differences(family):
    mllm = tiny(family)
    [contexts] = batches(mllm, samples_for(mllm)[:1], 4, need_answer=True)
    batch = gates.GatedBatch(mllm, contexts)
    shape = mllm.n_layers, len(batch.names), mllm.n_heads
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    values.requires_grad_()
    [gradient] = torch.autograd.grad(batch.logprobs(values).sum(), values)
    assert all(parameter.grad is None for parameter in mllm.model.parameters())
    e = 0.05
    for layer, head in [(0, 0), (1, mllm.n_heads - 1)]:
        step = torch.zeros(shape)
        step[layer, :, head] = e
        up, down = (batch.logprobs(values.detach() + s).sum() for s in (step, -step))
        expected = float(up.detach() - down.detach()) / (2 * e)
        found = float(gradient[layer, :, head].sum())
        assert found == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_open_gates_change_nothing_and_closed_ones_zero_heads():
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm)[:2]
    heads = ch.HeadSet.of([(0, 1), (1, 2)], mllm.shape)
    conditions = {"open": None, "closed": ch.Ablation(heads)}
    table = ch.evaluate(mllm, samples, conditions, **OPTIONS)
    expected = table.set_index(["condition", "sample"]).logprob
    for contexts in batches(mllm, samples, 4, need_answer=True):
        batch = gates.GatedBatch(mllm, contexts)
        for name, closed in ("open", heads - heads), ("closed", heads):
            values = torch.from_numpy(~closed.mask).float()[:, None]
            found = batch.logprobs(values.expand(-1, len(batch.names), -1))
            np.testing.assert_allclose(
                found.detach(), expected[name][batch.names], atol=1e-4
            )


@pytest.fixture(scope="module")
def planted() -> tuple[ch.MLLM, list[ch.Sample]]:
    """A model that only head (1, 2) tells what to answer, and samples that it answers right."""
    mllm = testbed.tiny("qwen3_vl")  # not the one that other tests share
    with torch.no_grad():
        for layer, module in enumerate(mllm.attentions):
            weight = module.o_proj.weight.unflatten(1, (mllm.n_heads, -1))
            weight *= 0.01
            if layer == 1:
                weight[:, 2] *= 2000
        # sure of itself, as trained models are
        mllm.model.get_output_embeddings().weight *= 20
    samples = samples_for(mllm)
    answers = ch.evaluate(mllm, samples, **OPTIONS).set_index("sample").prediction
    return mllm, [replace(sample, answer=answers[sample.id]) for sample in samples]


def test_a_planted_head_is_the_first_to_be_closed(planted):
    mllm, samples = planted
    closings = gates.closings(mllm, samples, steps=40, rate=0.3, **OPTIONS)
    ranking = ch.HeadRanking(closings)
    assert ranking.order[0].tolist() == [1, 2] and closings[1, 2] > 0.9
    assert float(closings.sum()) < 2
    again = gates.closings(mllm, samples, steps=40, rate=0.3, **OPTIONS)
    np.testing.assert_array_equal(closings, again)


def test_a_high_penalty_closes_nothing(planted):
    mllm, samples = planted
    closings = gates.closings(mllm, samples, penalty=100, steps=40, rate=0.3, **OPTIONS)
    assert float(closings.max()) < 0.1


def test_errors_say_what_to_do():
    mllm = tiny("qwen3_vl")
    with pytest.raises(ValueError, match="penalty=0: above 0"):
        gates.closings(mllm, samples_for(mllm), penalty=0)
    with pytest.raises(ValueError, match="no samples: give some"):
        gates.closings(mllm, [])
    with pytest.raises(ch.SampleError, match="answer"):
        gates.closings(mllm, [replace(samples_for(mllm)[0], answer=None)], **OPTIONS)
