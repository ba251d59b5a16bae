"""Ablations against independent references: edited weights, and attention with full matrices."""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ask, tiny
from test_scoring import EVERY, brute_force, samples_for
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import corehead as ch
from corehead import attention
from corehead.ablation import MODES, Ablation, Reference, curve
from corehead.attention import NAME
from corehead.batching import Feed, collate, pad_id, to_model
from corehead.tagging import with_text

SHAPE = (2, 6)  # of all tiny models
HEADS = ch.HeadSet.of([(0, 1), (1, 0), (1, 3)], SHAPE)
# layer -> (edit of logits, edit of outputs, and perhaps edit of weights) for the reference attention
ORACLE: dict = {}


def reference_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    softcap=None,
    **kwargs,
):
    """Attention by full matrices, a row a head, with whatever ORACLE says."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + attention_mask[..., : key.shape[2]]
    before, after, between = (*ORACLE.get(module.layer_idx, (None, None)), None)[:3]
    if before is not None:
        logits = before(logits)
    weights = logits.softmax(-1)
    if between is not None:
        weights = between(weights)
    out = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)
    if after is not None:
        out = after(out)
    return out.contiguous(), weights


AttentionInterface.register("reference", reference_attention)
AttentionMaskInterface.register("reference", eager_mask)


@contextmanager
def oracle(mllm, edits):
    before = mllm.text_config._attn_implementation
    mllm.text_config._attn_implementation = "reference"
    ORACLE.update(edits)
    try:
        yield
    finally:
        mllm.text_config._attn_implementation = before
        ORACLE.clear()


@torch.no_grad()
def logits_of(mllm, tagged) -> torch.Tensor:
    return mllm.model(**tagged.inputs).logits[0]


def heads_in(layer):
    return [h for other, h in HEADS if other == layer]


def rows_of(tagged, phase):
    every, asking = np.arange(len(tagged.ids)), tagged.query_tokens()
    return {
        "both": every,
        "prefill": every[: tagged.last + 1],
        "decode": every[tagged.last + 1 :],
        "question": asking,
        "context": np.setdiff1d(every, asking),
        "last": np.array([tagged.last]),
    }[phase]


def donor_rows(tagged, donor, rows, phase):
    """Rows of a donor at the same distance from the prompt's end, or the next or else the last of the phase."""
    known = rows_of(donor, phase)
    found = []
    for row in rows - tagged.last + donor.last:
        behind = known[known >= row]
        found.append(behind[0] if len(behind) else known[-1])
    return np.array(found)


def expected_logits(mllm, tagged, mode, phase="both", reference=None) -> torch.Tensor:
    """Logits (N, V) of one sample under an ablation of HEADS, by full matrices."""
    rows, edits = rows_of(tagged, phase), {}
    if mode in ("mean", "resample", "patch"):
        outputs = {layer: [] for layer, _ in HEADS}  # of every head, by sample
        for other in reference:
            note = {
                layer: (None, lambda out, layer=layer: outputs[layer].append(out[0]) or out)
                for layer in outputs
            }
            with oracle(mllm, note):
                logits_of(mllm, mllm.tag(other))
    for layer in {layer for layer, _ in HEADS}:

        def before(logits, layer=layer):
            logits = logits.clone()
            for h in heads_in(layer):
                if mode == "knockout":
                    asking = np.intersect1d(tagged.query_tokens(), rows)
                    logits[:, h, asking[:, None], tagged.evidence] = -torch.inf
            return logits

        def between(weights, layer=layer):
            weights = weights.clone()
            if mode == "zero_edges":
                for h in heads_in(layer):
                    asking = np.intersect1d(tagged.query_tokens(), rows)
                    weights[:, h, asking[:, None], tagged.evidence] = 0
            return weights

        def after(out, layer=layer):
            out = out.clone()
            for h in heads_in(layer):
                if mode == "zero":
                    out[:, rows, h] = 0
                elif mode == "mean":
                    out[:, rows, h] = torch.cat(outputs[layer])[:, h].mean(0)
                elif mode in ("resample", "patch"):  # of two, the other; or the one before
                    own = [s.id for s in reference].index(tagged.sample.id)
                    donor = own - 1 if mode == "patch" else 1 - own
                    at = donor_rows(tagged, mllm.tag(reference[donor]), rows, phase)
                    out[:, rows, h] = outputs[layer][donor][at, h][None]
            return out

        edits[layer] = (before, after, between)
    with oracle(mllm, edits):
        return logits_of(mllm, tagged)


def some(mllm) -> list[ch.Sample]:
    samples = samples_for(mllm)
    for sample, answer in zip(samples, ["7", "at the left", "no", "yes it is", "7"]):
        sample.answer = answer
    return samples


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(
    "phase", ["both", "prefill", "decode", "context", "question", "last"]
)
@pytest.mark.parametrize("mode", MODES)
def test_equal_to_full_matrices(family, mode, phase):
    """Batched, padded and behind a shared prefix or not: what one sample alone gives by full attention matrices."""
    mllm = tiny(family)
    samples = some(mllm)
    reference = {"mean": samples[:2], "resample": samples[:2], "patch": samples}.get(mode)
    samples = samples[:2] if mode == "resample" else samples
    given, names = None, [sample.id for sample in samples]
    if reference:
        donor_of = dict(zip(names, names[-1:] + names[:-1])) if mode == "patch" else None
        given = Reference(mllm, reference, donor_of)
    ablation = Ablation(HEADS, mode, phase, given)
    found = ch.evaluate(
        mllm, samples, {"intact": None, "ablated": ablation}, batch_size=3, progress=False
    )
    with ch.ablate(mllm, HEADS, mode, phase, reference=given):
        inside = ch.evaluate(mllm, samples, batch_size=2, progress=False)
    for i, sample in enumerate(samples):
        tagged = mllm.tag(sample)
        logits = expected_logits(mllm, tagged, mode, phase, reference)
        n = len(tagged.answer)
        log = (
            logits[-n - 1 : -1]
            .log_softmax(-1)[torch.arange(n), torch.from_numpy(tagged.ids[tagged.answer])]
            .sum()
        )
        row = found[found.condition == "ablated"].iloc[i]
        assert row["sample"] == sample.id
        assert row.logprob == pytest.approx(float(log), abs=1e-5 * n)
        assert inside.logprob[i] == pytest.approx(float(log), abs=1e-5 * n)
        first = logits[-n - 1].clone()
        own = float(first[tagged.ids[tagged.answer[0]]])
        first[tagged.ids[tagged.answer[0]]] = -torch.inf
        assert row.margin == pytest.approx(own - float(first.max()), abs=1e-5)
    plain = ch.evaluate(mllm, samples, progress=False)
    intact = found[found.condition == "intact"].reset_index(drop=True)
    np.testing.assert_allclose(intact.logprob, plain.logprob, atol=1e-5)
    changed = abs(found[found.condition == "ablated"].logprob.values - plain.logprob.values)
    longer = [len(mllm.tag(s).answer) > 1 for s in samples]
    # the context asks for nothing
    if mode in ("knockout", "zero_edges") and phase == "context":
        assert (changed < 1e-6).all()
    # the samples that are swapped share a context
    elif not (mode in ("resample", "patch") and phase == "context"):
        assert (changed[longer] > 1e-6).all()
    if phase == "decode":  # the first token of an answer is the prompt's
        assert (changed[~np.array(longer)] < 1e-6).all()


def without_columns(mllm, heads=HEADS):
    """A copy of the model with the heads' columns of o_proj set to zero by hand."""
    other = ch.MLLM(copy.deepcopy(mllm.model), mllm.processor)
    for layer, head in heads:
        weight = other.attentions[layer].o_proj.weight
        with torch.no_grad():
            weight[:, head * mllm.head_dim : (head + 1) * mllm.head_dim] = 0
    return other


def prompts(mllm, n=3) -> list[ch.TaggedSample]:
    """Prompts of different lengths without answers."""
    samples = some(mllm)[:n]
    for sample in samples:
        sample.answer = None
    return [mllm.tag(sample) for sample in samples]


@pytest.mark.parametrize("family", EVERY)
def test_generate_equals_edited_weights(family):
    mllm = tiny(family)
    batch = prompts(mllm)
    inputs = to_model(collate(batch, pad_id(mllm)), mllm)
    options = dict(
        max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    intact = mllm.model.generate(**inputs, **options)
    with ch.ablate(mllm, HEADS):
        found = mllm.model.generate(**inputs, **options)
    expected = without_columns(mllm).model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=0
    )
    assert (torch.stack(found.logits) - torch.stack(intact.logits)).abs().max() > 1e-4
    again = mllm.model.generate(**inputs, **options)
    assert torch.equal(torch.stack(again.logits), torch.stack(intact.logits))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@torch.no_grad()
def test_phases_of_generate(family, phase):
    """By hand: prefill by one model, decode by the other, from the same cache."""
    mllm = tiny(family)
    [tagged] = prompts(mllm, 1)
    edited = without_columns(mllm)
    first, second = (edited, mllm) if phase == "prefill" else (mllm, edited)
    out = first.model(**tagged.inputs, use_cache=True)
    expected = []
    for _ in range(4):
        token = out.logits[:, -1:].argmax(-1)
        expected.append(out.logits[0, -1])
        length = out.past_key_values.get_seq_length()
        positions = (
            mllm.family.positions(mllm.model, tagged.inputs).max()
            + 1
            + length
            - len(tagged.ids)
        )
        shape = (3, 1, 1) if family == "qwen3_vl" else (1, 1)
        position_ids = torch.full(shape, int(positions))
        out = second.model(
            input_ids=token, past_key_values=out.past_key_values, position_ids=position_ids
        )
    with ch.ablate(mllm, HEADS, phase=phase):
        options = dict(
            max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True
        )
        found = mllm.model.generate(
            **tagged.inputs, **options, return_dict_in_generate=True
        )
    torch.testing.assert_close(
        torch.stack(found.logits)[:, 0], torch.stack(expected), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_knockout_in_generate_and_with_a_chunked_prefill(family):
    mllm = tiny(family)
    batch = prompts(mllm)
    inputs = to_model(collate(batch, pad_id(mllm)), mllm)
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True)
    with ch.ablate(mllm, HEADS, "knockout", tagged=batch):
        found = mllm.model.generate(**inputs, **options, return_dict_in_generate=True)
        beams = mllm.model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert len(beams) == len(batch)
    ids = collate(batch, pad_id(mllm))["input_ids"].shape[1]
    for i, tagged in enumerate(batch):  # the tokens that it wrote, fed along as an answer
        tokens = found.sequences[i, ids:]
        full = copy.copy(tagged)
        full.inputs = dict(tagged.inputs)
        full.inputs = with_text(tagged.inputs, len(tagged.ids), tokens.tolist())
        full.answer = len(tagged.ids) + np.arange(len(tokens))
        logits = expected_logits(mllm, full, "knockout")
        torch.testing.assert_close(
            torch.stack(found.logits)[:, i], logits[-4:-1], atol=1e-5, rtol=0
        )
    if mllm.family.name == "text":
        tagged = batch[0]
        with ch.ablate(mllm, HEADS, "knockout", tagged=tagged):
            whole = mllm.model(input_ids=tagged.inputs["input_ids"]).logits
            half = mllm.model(input_ids=tagged.inputs["input_ids"][:, :9], use_cache=True)
            rest = mllm.model(
                input_ids=tagged.inputs["input_ids"][:, 9:],
                past_key_values=half.past_key_values,
            )
        torch.testing.assert_close(
            torch.cat([half.logits, rest.logits], 1), whole, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("family", EVERY)
def test_scores_inside_an_ablation(family):
    """Zeroed heads change what later layers look at; cut edges have no mass left."""
    mllm = tiny(family)
    samples = some(mllm)
    with ch.ablate(mllm, ch.HeadSet.of([(0, 1), (0, 2)], SHAPE)):
        found = ch.score(mllm, samples, progress=False)
    edited = without_columns(mllm, [(0, 1), (0, 2)])
    for i, sample in enumerate(samples):
        expected = brute_force(edited, edited.tag(sample))
        np.testing.assert_allclose(
            found.data.evidence.isel(sample=i), expected["evidence"], atol=1e-5
        )
    intact = ch.score(mllm, samples, progress=False)
    with ch.ablate(mllm, HEADS, "knockout"):
        cut = ch.score(mllm, samples, progress=False)
    mask = HEADS.mask
    for query in ("question", "last", "answer"):
        assert abs(cut.data.evidence.sel(query=query).values[:, mask]).max() < 1e-6
        first = intact.per_sample("ram", query)[:, 0]
        kept = [h for h in range(mllm.n_heads) if not mask[0, h]]
        np.testing.assert_allclose(
            cut.per_sample("ram", query)[:, 0, kept], first[:, kept], atol=1e-5
        )
    total = cut.data.visual + cut.data.text + cut.data.sink
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_samples_on_one_context_are_scored_inside_resampling_as_each_alone(family):
    """A donor is drawn for the sample of each batch row, so that nothing is shared but the name of the context."""
    mllm = tiny(family)
    samples = samples_for(mllm)[:3]
    with ch.ablate(mllm, HEADS, "resample", reference=samples):
        together = ch.score(mllm, samples, progress=False, on_error="raise").data
        alone = [ch.score(mllm, [s], progress=False).data for s in samples]
    assert set(together.context.values) == {samples[0].id}
    for i, one in enumerate(alone):
        for name in one.data_vars:
            np.testing.assert_allclose(
                together[name].isel(sample=i), one[name].isel(sample=0), atol=1e-5
            )


def test_nesting_repeating_and_restoring(mllm):
    [tagged] = prompts(mllm, 1)
    before = mllm.text_config._attn_implementation
    intact = logits_of(mllm, tagged)
    both = without_columns(mllm)
    one, two = ch.HeadSet.of([(0, 1)], SHAPE), HEADS - ch.HeadSet.of([(0, 1)], SHAPE)
    for _ in range(2):
        with ch.ablate(mllm, one):
            with ch.ablate(mllm, two):
                torch.testing.assert_close(
                    logits_of(mllm, tagged), logits_of(both, tagged), atol=1e-5, rtol=0
                )
            only = without_columns(mllm, one)
            torch.testing.assert_close(
                logits_of(mllm, tagged), logits_of(only, tagged), atol=1e-5, rtol=0
            )
            with ch.ablate(mllm, one):  # the same heads again
                torch.testing.assert_close(
                    logits_of(mllm, tagged), logits_of(only, tagged), atol=1e-5, rtol=0
                )
        assert mllm.text_config._attn_implementation == before
        assert torch.equal(logits_of(mllm, tagged), intact)
    with (
        pytest.raises(RuntimeError, match="boom"),
        ch.ablate(mllm, one),
        ch.ablate(mllm, two, "knockout"),
    ):
        assert mllm.text_config._attn_implementation == NAME
        raise RuntimeError("boom")
    assert mllm.text_config._attn_implementation == before
    assert torch.equal(logits_of(mllm, tagged), intact)


def test_conditions_inside_an_ablation_act_together(mllm):
    samples = some(mllm)
    one, two = ch.HeadSet.of([(0, 1)], SHAPE), HEADS - ch.HeadSet.of([(0, 1)], SHAPE)
    with ch.ablate(mllm, one):
        found = ch.evaluate(
            mllm, samples, {"none": None, "more": Ablation(two)}, progress=False
        )
    expected = ch.evaluate(
        mllm, samples, {"none": Ablation(one), "more": Ablation(HEADS)}, progress=False
    )
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)


def test_a_reference_runs_once_for_all_batches(mllm, monkeypatch):
    samples = some(mllm)
    reference = Reference(mllm, samples[:2])
    runs = []
    original = Reference._run
    monkeypatch.setattr(
        Reference, "_run", lambda self, *given: runs.append(1) or original(self, *given)
    )
    ch.evaluate(
        mllm,
        samples,
        {"a": Ablation(HEADS, "resample", reference=reference)},
        batch_size=1,
        progress=False,
    )
    assert len(runs) == 1


def test_a_reference_in_batches_is_what_each_sample_gives_alone(mllm, monkeypatch):
    samples = [*some(mllm), *(replace(s, id=f"{s.id} again") for s in some(mllm))]
    together = Reference(mllm, samples)
    assert 1 < len(together._batches) < len(samples)  # lengths differ, and come again
    monkeypatch.setattr("corehead.ablation.TOKENS", 1)
    alone = Reference(mllm, samples)
    assert len(alone._batches) == len(samples)
    torch.testing.assert_close(together.means, alone.means, atol=1e-5, rtol=1e-5)
    for phase in ("both", "prefill", "decode", "context", "question", "last"):
        found, expected = (given.outputs([0, 1], phase) for given in (together, alone))
        for layer in (0, 1):
            for one, other in zip(found[layer], expected[layer], strict=True):
                assert one.tokens.tolist() == other.tokens.tolist()
                torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)


def test_tagged_samples_need_no_name(mllm):
    samples = some(mllm)[:3]
    bare = [replace(mllm.tag(s), sample=None) for s in samples]
    found = ch.evaluate(mllm, bare, {"a": Ablation(HEADS)}, progress=False)
    expected = ch.evaluate(mllm, samples, {"a": Ablation(HEADS)}, progress=False)
    assert list(found["sample"]) == ["0", "1", "2"]
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)


def test_many_conditions_are_what_each_is_alone(mllm, monkeypatch):
    samples = some(mllm)
    ranking = ch.HeadRanking(np.random.default_rng(0).random((mllm.n_layers, mllm.n_heads)))
    conditions = {"intact": None}
    for mode in ("zero", "knockout"):
        for k, v in curve(ranking, [0.1, 0.3, 0.5], mode=mode).items():
            conditions[mode, k.share] = v
    together = ch.evaluate(mllm, samples, conditions, progress=False)
    monkeypatch.setitem(ch.evaluation.TOKENS, "cpu", 1)
    for name, ablation in conditions.items():
        alone = ch.evaluate(mllm, samples, {name: ablation}, batch_size=1, progress=False)
        same = together[[c == name for c in together.condition]]
        np.testing.assert_allclose(same.logprob, alone.logprob, atol=1e-5)
        assert list(same.prediction) == list(alone.prediction)


def test_no_more_conditions_run_side_by_side_than_memory_holds(mllm, monkeypatch):
    ranking = ch.HeadRanking(np.random.default_rng(0).random((mllm.n_layers, mllm.n_heads)))
    conditions = curve(ranking, [0.1, 0.2, 0.3, 0.4, 0.5], mode="zero", phase="last")
    original, runs = Feed._cache, []
    # layers that are passed over hold nothing
    monkeypatch.setattr(Ablation, "first_layer", 0)

    def cache(self, together, entry):
        held = original(self, together, entry)
        size = sum(x.nbytes for layer in held.layers for x in layer.buffers)
        runs.append((len(together), size))
        return held

    monkeypatch.setattr(Feed, "_cache", cache)
    samples, found = some(mllm)[:1], []
    # nothing is free, then twice what two conditions hold
    for copies in (0, 2):
        free = 2 * copies * runs[0][1] if runs else 0
        monkeypatch.setattr("corehead.batching.free_memory", lambda device, free=free: free)
        found.append(ch.evaluate(mllm, samples, conditions, progress=False))
    assert [n for n, _ in runs] == [1] * 5 + [2, 2, 1]
    np.testing.assert_allclose(found[0].logprob, found[1].logprob, atol=1e-5)


def test_masks_of_single_heads_are_held_in_pieces(mllm, monkeypatch):
    conditions = {"cut": Ablation(HEADS, "knockout")}
    whole = ch.evaluate(mllm, some(mllm), conditions, progress=False)
    most, sizes = 2**12, []
    sdpa = attention.scaled_dot_product_attention

    def spy(*states, attn_mask, **options):
        sizes.append(attn_mask.numel())
        return sdpa(*states, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "MASK_BLOCK", most)
    pieces = ch.evaluate(mllm, some(mllm), conditions, batch_size=1, progress=False)
    assert sizes and max(sizes) <= most
    np.testing.assert_allclose(pieces.logprob, whole.logprob, atol=1e-5)


def test_named_tuples_become_columns_and_equal_sets_run_once(mllm, monkeypatch):
    ranking = ch.HeadRanking(np.random.default_rng(0).random((mllm.n_layers, mllm.n_heads)))
    conditions = curve(ranking, [0.1, 0.101]) | curve(
        ranking, [0.1], "random", draws=range(3)
    )
    seen = []
    original = Feed.run
    monkeypatch.setattr(
        Feed,
        "run",
        lambda self, which, wanted: seen.extend(which) or original(self, which, wanted),
    )
    table = ch.evaluate(mllm, some(mllm)[:1], conditions, progress=False)
    assert list(table.columns[:3]) == ["heads", "share", "draw"]
    assert [tuple(r) for r in table[["heads", "share", "draw"]].to_numpy()] == [
        tuple(c) for c in conditions
    ]
    assert len(seen) == len({a.heads for a in conditions.values()}) < len(conditions)


def test_vision_runs_once_for_all_conditions(mllm):
    tower = (
        mllm.model.model.visual
        if mllm.family.name == "qwen3_vl"
        else mllm.model.model.vision_tower
    )
    calls = []
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    ranking = ch.HeadRanking(np.random.default_rng(0).random((mllm.n_layers, mllm.n_heads)))
    try:
        ch.evaluate(
            mllm, some(mllm)[:3], curve(ranking, [0.1, 0.2, 0.3, 0.4, 0.5]), progress=False
        )
    finally:
        handle.remove()
    assert len(calls) == 1  # three questions on one context


def test_a_store_resumes_and_takes_more_conditions(mllm, tmp_path, monkeypatch):
    samples = some(mllm)
    first = {"intact": None, "a": Ablation(HEADS)}
    more = first | {"b": Ablation(HEADS, "knockout")}
    ran = []
    original = ch.evaluation._answers

    def spy(mllm, batch, todo, new_tokens):
        ran.append((sum(len(c.members) for c in batch), len(todo)))
        return original(mllm, batch, todo, new_tokens)

    monkeypatch.setattr(ch.evaluation, "_answers", spy)
    options = dict(store=tmp_path / "s", batch_size=1, progress=False)
    ch.evaluate(mllm, samples[:3], first, **options)
    done = list(ran)
    ran.clear()
    with pytest.raises(ValueError, match="resume=True"):
        ch.evaluate(mllm, samples, first, **options)
    table = ch.evaluate(mllm, samples, first, **options, resume=True)
    assert sum(n for n, _ in ran) == len(samples) - sum(n for n, _ in done)
    ran.clear()
    table = ch.evaluate(mllm, samples, more, **options, resume=True)
    assert {n for _, n in ran} == {1}  # the new condition alone
    ran.clear()
    again = ch.evaluate(mllm, samples, more, **options, resume=True)
    assert not ran
    pd.testing.assert_frame_equal(table, again)
    fresh = ch.evaluate(mllm, samples, more, progress=False)
    pd.testing.assert_frame_equal(table, fresh, atol=1e-5)
    with pytest.raises(ValueError, match="inside ablate"), ch.ablate(mllm, HEADS):
        ch.evaluate(mllm, samples, more, **options, resume=True)
    with pytest.raises(ValueError, match="inside ablate"), ch.ablate(mllm, HEADS):
        ch.score(mllm, samples, store=tmp_path / "t", progress=False)
    samples[0].answer = "another"
    with pytest.raises(ValueError, match=f"{samples[0].id!r} is not the one in the store"):
        ch.evaluate(mllm, samples, more, **options, resume=True)


def test_what_was_finished_survives_a_bad_sample(mllm, tmp_path):
    samples = some(mllm)
    bad = ask("no picture", id="bad", evidence=[ch.Pages([3])])
    options = dict(store=tmp_path / "s", batch_size=1, progress=False)
    with pytest.raises(ch.SampleError, match="'bad'"):
        ch.evaluate(mllm, [*samples, bad], {"a": Ablation(HEADS)}, **options)
    with pytest.raises(ValueError, match="holds results"):
        ch.evaluate(mllm, samples, {"a": Ablation(HEADS)}, **options)


def test_bad_input_is_named(mllm):
    shape = (mllm.n_layers, mllm.n_heads)
    ranking = ch.HeadRanking(np.random.default_rng(0).random(shape))
    larger = ch.HeadRanking(np.random.default_rng(0).random((9, 9)))
    samples = some(mllm)
    with (
        pytest.raises(ValueError, match="mode='zeros': take one of 'zero'"),
        ch.ablate(mllm, HEADS, "zeros"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="phase='decoding': take one of"),
        ch.ablate(mllm, HEADS, phase="decoding"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no heads"),
        ch.ablate(mllm, ch.HeadSet(np.zeros(SHAPE, bool))),
    ):
        pass
    with pytest.raises(ValueError, match=r"head \(40, 0\)"), ch.ablate(mllm, [(40, 0)]):
        pass
    with pytest.raises(ValueError, match="9 x 9"), ch.ablate(mllm, larger.top(0.01)):
        pass
    with pytest.raises(ValueError, match="9 x 9"):
        ch.evaluate(mllm, samples, {"a": Ablation(larger.top(0.01))}, progress=False)
    for mode in ("mean", "resample"):
        with (
            pytest.raises(ValueError, match=f"mode='{mode}' needs reference="),
            ch.ablate(mllm, HEADS, mode),
        ):
            pass
    with pytest.raises(ValueError, match="needs reference=, a Reference"):
        Ablation(HEADS, "mean", reference=samples)
    with (
        pytest.raises(ValueError, match="at least 2 samples"),
        ch.ablate(mllm, HEADS, "resample", reference=samples[:1]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="empty reference"),
        ch.ablate(mllm, HEADS, "mean", reference=[]),
    ):
        pass
    tagged = mllm.tag(samples[0])
    with (
        pytest.raises(ValueError, match="pass tagged="),
        ch.ablate(mllm, HEADS, "knockout"),
    ):
        logits_of(mllm, tagged)
    with (
        pytest.raises(ValueError, match="must know the question: pass tagged="),
        ch.ablate(mllm, HEADS, phase="context"),
    ):
        logits_of(mllm, tagged)
    two = to_model(collate([tagged, tagged], pad_id(mllm)), mllm)
    with (
        pytest.raises(ValueError, match="roles of 3 samples are known, but 2 rows run"),
        ch.ablate(mllm, HEADS, "knockout", tagged=[tagged] * 3),
    ):
        mllm.model(**two)
    with pytest.raises(ValueError, match="share"):
        curve(ranking, [0.0])
    with pytest.raises(ValueError, match="share"):
        curve(ranking, [1.2])
    with pytest.raises(ValueError, match="order='best'"):
        curve(ranking, [0.1], "best")
    no_answer = samples[0]
    no_answer.answer = None
    with pytest.raises(ch.SampleError, match="answer: is missing"):
        ch.evaluate(mllm, [no_answer], progress=False)


def test_resampling_needs_the_prompt_in_one_piece():
    mllm = tiny("llama")
    samples = some(mllm)
    [tagged] = prompts(mllm, 1)
    ids = tagged.inputs["input_ids"]
    with ch.ablate(mllm, HEADS, "resample", reference=samples[:2]), torch.no_grad():
        half = mllm.model(input_ids=ids[:, :9], use_cache=True)
        with pytest.raises(ValueError, match="one piece"):
            mllm.model(input_ids=ids[:, 9:], past_key_values=half.past_key_values)


@torch.no_grad()
def test_zeroed_edges_take_out_what_is_read_and_no_more():
    """Inside other contexts too: what these have cut, zeroed or taken out is not taken out again."""
    mllm = tiny("qwen3_vl")
    tagged = mllm.tag(some(mllm)[0])
    heads = ch.HeadSet.of([(1, 0), (1, 1)], SHAPE)

    def logits(*modes, window=None):
        with ExitStack() as stack:
            if window is not None:
                stack.enter_context(ch.hybrid_attention(mllm, [], window, 2))
            for mode in modes:
                stack.enter_context(ch.ablate(mllm, heads, mode, tagged=tagged))
            return logits_of(mllm, tagged)

    assert not torch.allclose(logits("zero_edges"), logits(), atol=1e-3)
    for outer in ("zero_edges", "zero", "knockout"):
        torch.testing.assert_close(logits(outer, "zero_edges"), logits(outer))
    torch.testing.assert_close(logits("zero_edges", "zero"), logits("zero"))
    # the evidence stands in front of the window: streaming heads read nothing of it
    assert tagged.question.min() - tagged.evidence.max() > 6
    windowed = logits(window=6)
    torch.testing.assert_close(logits("zero_edges", window=6), windowed)


def test_an_ablation_around_a_run_reaches_the_question_whatever_the_run_compares(mllm):
    samples = some(mllm)
    ablated, last = ch.HeadSet.of([(0, 1), (0, 2)], SHAPE), Ablation(HEADS, "zero", "last")
    for mode, phase in (("zero", "question"), ("knockout", "both")):
        with ch.ablate(mllm, ablated, mode, phase):
            alone = ch.evaluate(mllm, samples, {"last": last}, progress=False)
            beside = ch.evaluate(
                mllm, samples, {"last": last, "none": None}, progress=False
            )
        beside = beside[beside.condition == "last"]
        np.testing.assert_allclose(alone.logprob, beside.logprob, atol=1e-5)


def test_static_caches_are_refused(mllm):
    tagged = mllm.tag(some(mllm)[0])
    with (
        ch.ablate(mllm, HEADS),
        pytest.raises(ValueError, match="a static cache has slots"),
    ):
        mllm.model.generate(
            **tagged.inputs, max_new_tokens=2, cache_implementation="static"
        )


def test_a_reference_of_another_model_is_refused():
    one, other = tiny("llama"), tiny("qwen3")
    reference = Reference(other, some(other)[:2])
    condition = Ablation(HEADS, "resample", reference=reference)
    with pytest.raises(ValueError, match="reference was made with another model"):
        ch.evaluate(one, some(one), {"resampled": condition}, progress=False)


def test_an_input_that_is_padded_otherwise_than_its_samples_is_refused(mllm):
    tagged = mllm.tag(some(mllm)[0])
    inputs = to_model(collate([tagged], pad_id(mllm)), mllm)
    with ch.ablate(mllm, HEADS, "knockout", tagged=tagged), torch.no_grad():
        mllm.model(**inputs)
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][:, :3] = 0
        with pytest.raises(ValueError, match="padded otherwise than its tagged samples"):
            mllm.model(**inputs)
