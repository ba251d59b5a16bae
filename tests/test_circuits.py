"""What heads write, against loops over layers, heads and rows; readouts, on vectors with a known content."""

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ask, tiny
from test_controls import OPTIONS, seen
from test_scoring import EVERY, samples_for

from corehead import SampleError, circuits


@torch.no_grad()
def by_hand(mllm, tagged) -> torch.Tensor:
    """(layer, head, row, hidden): the weights on V* scaled to 1, times values, through the head's part of o_proj."""
    attention, values, _ = seen(mllm, tagged)
    rows = tagged.last + np.arange(len(tagged.answer))
    found = []
    for layer, module in enumerate(mllm.attentions):
        for h in range(mllm.n_heads):
            group = h * mllm.n_kv_heads // mllm.n_heads
            columns = slice(h * mllm.head_dim, (h + 1) * mllm.head_dim)
            for row in rows:
                weights = attention[layer, h, row, tagged.evidence]
                read = weights / weights.sum() @ values[layer, tagged.evidence, group]
                found.append(module.o_proj.weight[:, columns] @ read)
    shape = mllm.n_layers, mllm.n_heads, len(rows), -1
    return torch.stack(found).view(shape)


@pytest.mark.parametrize("family", EVERY)
def test_equal_to_brute_force(family):
    mllm = tiny(family)
    samples = [sample for sample in samples_for(mllm) if sample.evidence]
    candidates = ["7", "0.", "3"]
    found = circuits.written(mllm, samples, **OPTIONS)
    right = circuits.answer_written(mllm, samples, candidates, batch_size=2, **OPTIONS)
    ids = mllm.tokenizer(candidates, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(sorted({token for text in ids for token in text}))
    norm = mllm.decoder.norm
    unembedding = mllm.model.get_output_embeddings().weight[tokens]
    for sample in samples:
        tagged = mllm.tag(sample)
        wanted = by_hand(mllm, tagged)
        np.testing.assert_allclose(
            found.sel(sample=sample.id), wanted.mean(2), atol=2e-5, err_msg=sample.id
        )
        with torch.no_grad():
            best = tokens[(norm(wanted) @ unembedding.T).argmax(-1)].numpy()
        hits = (best == tagged.ids[tagged.answer]).mean(-1)
        np.testing.assert_allclose(right.sel(sample=sample.id), hits, err_msg=sample.id)


def test_a_sample_without_evidence_is_named(mllm):
    with pytest.raises(SampleError, match="'bare', evidence: is missing"):
        circuits.written(mllm, [ask(id="bare")], **OPTIONS)


def vectors(labels, content: float, seed: int) -> xr.DataArray:
    """(sample, 1 layer, 2 heads, hidden) of noise; the first head's carry the label."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(labels), 1, 2, 32))
    meaning = np.random.default_rng(9).normal(size=(10, 32))
    noise[:, 0, 0] += content * meaning[labels] + 5  # what all have in common is no content
    return xr.DataArray(noise, dims=("sample", "layer", "head", "hidden"))


def test_nearest_mean_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    before, after = rng.integers(10, size=200), rng.integers(10, size=400)
    train, test = vectors(before, 2.0, 1), vectors(after, 2.0, 2)
    hits = (circuits.nearest_mean(train, before, test) == after[:, None, None]).mean(
        "sample"
    )
    assert hits[0, 0] > 0.95
    # ten labels: 0.1, and four standard deviations of it
    assert abs(hits[0, 1] - 0.1) < 0.06


@pytest.mark.parametrize("labels", [[1, 2], [1, 1, 1]])
def test_labels_that_do_not_fit_are_refused(labels):
    train = vectors(np.zeros(3, int), 1.0, 0)
    with pytest.raises(ValueError, match="labels of"):
        circuits.nearest_mean(train, labels, train)
