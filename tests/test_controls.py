"""Control rankings against full attention matrices, values from hooks, and finite differences."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import ask, image_part, picture, tiny
from test_scoring import EVERY, samples_for

import corehead as ch
from corehead import controls
from corehead.ablation import Reference

OPTIONS = dict(progress=False)


@torch.no_grad()
def seen(mllm, tagged):
    """Matrices (L, H, N, N), values (L, N, Hkv, D) and inputs of o_proj (L, N, H, D), the eager way."""
    values, outputs, handles = [], [], []
    for module in mllm.attentions:
        handles.append(
            module.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0]))
        )
        handles.append(
            module.o_proj.register_forward_pre_hook(
                lambda m, args: outputs.append(args[0][0])
            )
        )
    before = mllm.text_config._attn_implementation
    mllm.text_config._attn_implementation = "eager"
    try:
        attention = torch.stack(
            mllm.model(**tagged.inputs, output_attentions=True).attentions
        )[:, 0]
    finally:
        mllm.text_config._attn_implementation = before
        for handle in handles:
            handle.remove()
    n, d = len(tagged.ids), mllm.head_dim
    return (
        attention,
        torch.stack(values).view(-1, n, mllm.n_kv_heads, d),
        torch.stack(outputs).view(-1, n, mllm.n_heads, d),
    )


@torch.no_grad()
def expected(mllm, tagged) -> dict[str, np.ndarray]:
    """(layer, head) by loops over layers, heads and rows."""
    attention, values, outputs = seen(mllm, tagged)
    rows = tagged.last + np.arange(len(tagged.answer))
    found = {
        name: np.zeros((mllm.n_layers, mllm.n_heads))
        for name in ("output", "value", "copy", "hits")
    }
    on_text = not np.isin(tagged.evidence, tagged.visual).any()
    among = (
        np.setdiff1d(np.arange(len(tagged.ids)), tagged.visual)
        if on_text
        else tagged.visual
    )
    for layer, module in enumerate(mllm.attentions):
        for h in range(mllm.n_heads):
            w = module.o_proj.weight[
                :, h * mllm.head_dim : (h + 1) * mllm.head_dim
            ]  # (hidden, D)
            norms = (values[layer, :, h * mllm.n_kv_heads // mllm.n_heads] @ w.T).norm(
                dim=-1
            )
            for i, row in enumerate(rows):
                a = attention[layer, h, row]
                top, best = int(a.argmax()), among[int(a[among].argmax())]
                found["output"][layer, h] += float((w @ outputs[layer, row, h]).norm())
                found["value"][layer, h] += float(a @ norms)
                found["copy"][layer, h] += (
                    top in tagged.evidence
                    and tagged.ids[top] == tagged.ids[tagged.answer[i]]
                )
                found["hits"][layer, h] += best in tagged.evidence
    return {name: total / len(rows) for name, total in found.items()}


@pytest.mark.parametrize("family", EVERY)
def test_equal_to_brute_force(family):
    mllm = tiny(family)
    samples = samples_for(mllm)
    if (
        mllm.family.name == "text"
    ):  # answers that stand in the context, so that something can be copied
        for sample in samples:
            sample.answer = "0."
    found = {
        "output": controls.output_norm(mllm, samples, **OPTIONS),
        "value": controls.value_norm(mllm, samples, batch_size=1, **OPTIONS),
        "copy": controls.copy_score(mllm, samples, **OPTIONS),
        "hits": controls.evidence_hits(mllm, samples, batch_size=2, **OPTIONS),
    }
    total = dict.fromkeys(found, 0.0)
    for sample in samples:
        for name, values in expected(mllm, mllm.tag(sample)).items():
            np.testing.assert_allclose(
                found[name].sel(sample=sample.id),
                values,
                atol=2e-5,
                err_msg=f"{sample.id} {name}",
            )
            total[name] += values.sum()
    assert total["hits"] > 0 and (total["copy"] > 0 or mllm.family.name != "text")


@pytest.mark.parametrize("family", EVERY)
def test_attribution_is_the_derivative_by_a_gate(family):
    """Scaling a head's columns of o_proj by 1 + e and by 1 - e changes the log-probability by 2 e times the score."""
    mllm = tiny(family)
    samples = samples_for(mllm)[:4]
    found = controls.attribution(mllm, samples, batch_size=3, **OPTIONS)
    assert all(p.grad is None for p in mllm.model.parameters())
    e = 3e-2
    for layer, head in [(0, 0), (1, mllm.n_heads - 1)]:
        weight = mllm.attentions[layer].o_proj.weight
        columns = slice(head * mllm.head_dim, (head + 1) * mllm.head_dim)
        kept, results = weight.detach().clone(), []
        for factor in (1 + e, 1 - e):
            with torch.no_grad():
                weight[:, columns] = kept[:, columns] * factor
            results.append(ch.evaluate(mllm, samples, progress=False).logprob.values)
            with torch.no_grad():
                weight.copy_(kept)
        np.testing.assert_allclose(
            found[:, layer, head], (results[0] - results[1]) / (2 * e), rtol=0.05, atol=2e-3
        )


def test_what_scores_already_hold(mllm):
    samples = samples_for(mllm)
    scores = ch.score(mllm, samples, progress=False)
    np.testing.assert_array_equal(
        controls.visual_mass(scores), scores.data.visual.sel(query="last")
    )
    np.testing.assert_array_equal(
        controls.sink_mass(scores, "question"), scores.data.sink.sel(query="question")
    )
    focused = scores.data.sel(query="question")
    np.testing.assert_allclose(
        controls.query_focused(scores)[0], (focused.evidence - focused.null_evidence)[0]
    )
    with pytest.raises(ValueError, match="text-only"):
        controls.text_entropy(scores)
    plain = ch.score(
        mllm, [ask("two and two", id="plain", question="are?")], progress=False
    )
    np.testing.assert_array_equal(
        controls.text_entropy(plain), -plain.data.entropy.sel(query="last")
    )


def test_rankings_without_samples():
    near = ch.HeadRanking(controls.layer_index((5, 4), first=1, seed=3))
    layers = near.order[:, 0]
    assert (
        list(layers[:4]) == [1] * 4
        and set(layers[4:12]) == {0, 2}
        and list(layers[-4:]) == [4] * 4
    )
    other = ch.HeadRanking(controls.layer_index((5, 4), first=1, seed=4))
    assert not np.array_equal(near.order, other.order)


def test_bad_input(mllm):
    sample = ask(image_part(picture(40, 40)), id="mute", answer=None)
    for function in (controls.output_norm, controls.attribution):
        with pytest.raises(ch.SampleError, match=r"'mute', answer: is missing"):
            function(mllm, [sample], **OPTIONS)
        with pytest.raises(ValueError, match="no samples"):
            function(mllm, [], **OPTIONS)


def test_samples_of_one_id_are_refused(mllm):
    same = [ask("seven", id="twice", answer="7"), ask("eight", id="twice", answer="8")]
    for function, size in product((controls.output_norm, controls.attribution), (1, 4)):
        with pytest.raises(ValueError, match="two samples have the id 'twice'"):
            function(mllm, same, batch_size=size, progress=False)
    with pytest.raises(ValueError, match="two samples have the id 'twice'"):
        controls.token_patterns(mllm, same, False)


@pytest.mark.parametrize("family", EVERY)
def test_token_patterns_are_sums_over_full_matrices(family):
    mllm = tiny(family)
    samples = samples_for(mllm)[:3]
    found = controls.token_patterns(mllm, samples, progress=False)
    for sample in samples:
        tagged = mllm.tag(sample)
        attention, _, _ = seen(mllm, tagged)
        previous, duplicate, repeated = 0.0, 0.0, 0
        for row in range(tagged.last + 1):
            if row:
                previous = previous + attention[:, :, row, row - 1]
            earlier = [
                key
                for key in range(row)
                if tagged.ids[key] == tagged.ids[row] and key not in tagged.visual
            ]
            if earlier:
                duplicate = duplicate + attention[:, :, row, earlier].sum(-1)
                repeated += 1
        one = found.sel(sample=sample.id)
        np.testing.assert_allclose(one.previous, previous / tagged.last, atol=1e-5)
        assert repeated
        np.testing.assert_allclose(one.duplicate, duplicate / repeated, atol=1e-5)


def test_measured_inside_an_ablation_that_cannot_share_a_row():
    """Questions on one context, measured together, are each measured as if it were alone."""
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm)
    every = ch.HeadSet(np.ones(mllm.shape, bool))
    reference = Reference(mllm, samples[:2])
    with ch.ablate(mllm, every, "resample", reference=reference):
        together = controls.output_norm(mllm, samples, **OPTIONS)
        alone = [controls.output_norm(mllm, [sample], **OPTIONS)[0] for sample in samples]
    for one in alone:
        np.testing.assert_allclose(together.sel(sample=one.sample), one, atol=2e-5)
