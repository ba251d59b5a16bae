"""What runs a batch: greedy writing against generate(), chunks, shared contexts, the roles of tokens."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, ask, image_part, picture, tiny
from test_scoring import EVERY, samples_for

import corehead as ch
from corehead import controls, testbed
from corehead.ablation import Ablation, Reference
from corehead.attention import ANSWER, CONTEXT, LAST, PADDING, QUESTION, TokenRoles
from corehead.batching import (
    PER_TOKEN,
    Condition,
    Feed,
    batches,
    context_of,
    has_context,
    pack,
    same_context,
    to_model,
)

HEADS = ch.HeadSet.of([(0, 1), (1, 0), (1, 3)], (2, 6))


def generated(mllm, sample, new_tokens: int) -> str:
    """What transformers' own greedy generate() writes behind one prompt."""
    tagged = mllm.tag(sample)
    end = tagged.last + 1
    inputs = {k: v[:, :end] if k in PER_TOKEN else v for k, v in tagged.inputs.items()}
    options = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        ids = mllm.model.generate(**to_model(inputs, mllm), **options)[0, end:]
    return mllm.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("chunk", [7, 8192])
def test_writing_is_what_generate_writes(family, chunk, monkeypatch):
    """Shared contexts and sequences that run alone, intact and ablated, in chunks or at once."""
    mllm, samples = tiny(family), samples_for(tiny(family))
    expected = [generated(mllm, sample, 5) for sample in samples]
    with ch.ablate(mllm, HEADS):
        expected += [generated(mllm, sample, 5) for sample in samples]
    monkeypatch.setattr("corehead.batching.PREFILL_CHUNK", chunk)
    conditions = {"intact": None, "zero": Ablation(HEADS)}
    table = ch.evaluate(
        mllm, samples, conditions, new_tokens=5, batch_size=3, progress=False
    )
    assert list(table.written) == expected
    assert (
        family == "internvl" or len(set(expected)) > 1
    )  # the tiny InternVL writes special tokens, which are no text


def test_writing_ends_with_the_end_token(monkeypatch):
    mllm, samples = tiny("llama"), samples_for(tiny("llama"))
    [batch] = batches(mllm, samples[:2], 4)
    feed = Feed(mllm, pack(mllm, batch, apart=True), new_tokens=4)
    with torch.inference_mode():
        [whole] = feed.write([Condition()])
        monkeypatch.setattr(mllm.model.generation_config, "eos_token_id", [whole[0][2]])
        [ended] = feed.write([Condition()])
    assert len(whole[0]) == len(whole[1]) == 4
    assert ended[0] == whole[0][: whole[0].index(whole[0][2])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["evaluate", "write", "knockout", "controls"])
def test_long_contexts_run_in_chunks(family, what, monkeypatch):
    """No layer ever computes more tokens at once than a chunk has, and nothing else comes out."""
    mllm, samples = tiny(family), samples_for(tiny(family))
    run = {
        "evaluate": lambda: ch.evaluate(mllm, samples, progress=False).logprob,
        "write": lambda: ch.evaluate(mllm, samples, new_tokens=2, progress=False).logprob,
        "knockout": lambda: (
            ch.evaluate(
                mllm, samples, {"k": Ablation(HEADS, "knockout")}, progress=False
            ).logprob
        ),
        "controls": lambda: controls.value_norm(mllm, samples, progress=False),
    }[what]
    whole, fed = run(), []
    count = mllm.attentions[0].register_forward_pre_hook(
        lambda module, args, given: fed.append(given["hidden_states"].shape[1]),
        with_kwargs=True,
    )
    monkeypatch.setattr("corehead.batching.PREFILL_CHUNK", 16)
    try:
        np.testing.assert_allclose(run(), whole, atol=1e-4)
    finally:
        count.remove()
    assert max(fed) == 16 and len(fed) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_of_an_answer_is_not_run(family):
    """It predicts nothing that is asked for."""
    mllm, fed = tiny(family), []
    sample = samples_for(mllm)[0]
    count = mllm.attentions[0].register_forward_pre_hook(
        lambda module, args, given: fed.append(given["hidden_states"].shape[1]),
        with_kwargs=True,
    )
    try:
        ch.evaluate(mllm, [sample], progress=False)
    finally:
        count.remove()
    assert sum(fed) == len(mllm.tag(sample).ids) - 1


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_answers_of_several_tokens_against_a_forward_pass(family):
    """The foil differs at a later token; several conditions are read at once."""
    mllm = tiny(family)
    samples = [
        replace(sample, answer="left top left", foil="left bottom")
        for sample in samples_for(mllm)
    ]
    ablations = {"zero": Ablation(HEADS), "other": Ablation(~HEADS, phase="last")}
    answers = ch.evaluate(mllm, samples, {"intact": None} | ablations, progress=False)
    assert len(answers) == 3 * len(samples)
    for row in answers.itertuples():
        tagged = mllm.tag(next(s for s in samples if s.id == row.sample))
        own = torch.from_numpy(tagged.ids[tagged.answer])
        place = next(i for i, (a, b) in enumerate(zip(own, tagged.foil)) if a != b)
        assert place and place < len(own) - 1
        context = nullcontext()
        if row.condition in ablations:
            ablation = ablations[row.condition]
            context = ch.ablate(mllm, ablation.heads, phase=ablation.phase, tagged=tagged)
        with context, torch.inference_mode():
            logits = mllm.model(**to_model(tagged.inputs, mllm)).logits[0]
        logits = logits[tagged.last : tagged.last + len(own)].float()
        logprob = logits.log_softmax(-1).gather(1, own[:, None]).sum()
        contrast = logits[place, own[place]] - logits[place, int(tagged.foil[place])]
        assert row.logprob == pytest.approx(float(logprob), abs=1e-4)
        assert row.contrast == pytest.approx(float(contrast), abs=1e-4)
        assert row.correct == bool((logits.argmax(1) == own).all())
        assert row.flipped == (int(logits[place].argmax()) == int(tagged.foil[place]))


def test_logits_are_read_in_parts(monkeypatch):
    mllm = tiny("qwen3_vl")
    samples = [replace(sample, foil="on top") for sample in samples_for(mllm)]
    conditions = {
        "intact": None,
        "zero": Ablation(HEADS),
        "cut": Ablation(HEADS, "knockout"),
    }
    whole = ch.evaluate(mllm, samples, conditions, progress=False)
    monkeypatch.setattr("corehead.evaluation.LOGIT_ROWS", 3)
    parts = ch.evaluate(mllm, samples, conditions, progress=False)
    assert {"contrast", "flipped"} <= set(parts) and len(parts) > 10
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-4, atol=1e-5)


def test_what_is_the_same_context():
    page = picture(40, 50)
    first = ask(image_part(page), "Page 1. ", id="a", question="Where?")
    assert same_context(
        first, ask(image_part(page.copy()), "Page 1. ", id="b", question="When?")
    )
    assert not same_context(
        first, ask(image_part(picture(40, 50, seed=1)), "Page 1. ", id="c")
    )
    assert not same_context(first, ask(image_part(page), "Page 2. ", id="d"))
    system = ask(image_part(page), "Page 1. ", id="e")
    system.messages.insert(0, {"role": "system", "content": "Be brief."})
    assert not same_context(first, system) and not same_context(first, None)
    assert has_context(first) and has_context(system) and not has_context(ask(id="f"))
    assert has_context(ask("In front. ", id="g"))


@pytest.mark.parametrize("family", EVERY)
def test_roles_say_what_the_tokens_are(family):
    """Of a packed batch with shared and padded prefixes, as of each sample by itself."""
    mllm, samples = tiny(family), samples_for(tiny(family))
    for batch in batches(mllm, samples, 8, null=True):
        packed = pack(mllm, batch)
        for c, k, block in packed.blocks():
            tagged, row = block.tagged, packed.slots[c, k].row
            alone = TokenRoles.of([tagged])
            keys = packed.keys(c, k, np.arange(packed.contexts[c].shared, len(tagged.ids)))
            assert (
                packed.roles.positions[row, keys]
                == alone.positions[0, packed.contexts[c].shared :]
            ).all()
            assert (
                packed.roles.roles[row, keys] == alone.roles[0, packed.contexts[c].shared :]
            ).all()
            assert (packed.roles.query_of[row, keys] == -1).all() == block.null
            expected = np.zeros(packed.roles.roles.shape[1], bool)
            expected[packed.keys(c, k, tagged.evidence)] = True
            if not block.null:
                assert (packed.roles.evidence[row, block.owner].numpy() == expected).all()
    alone = TokenRoles.of([mllm.tag(s) for s in samples])
    for row, sample in enumerate(samples):
        tagged = mllm.tag(sample)
        padding = alone.roles.shape[1] - len(tagged.ids)
        assert (alone.roles[row] == PADDING).sum() == padding
        assert (alone.roles[row] == ANSWER).sum() == len(tagged.answer)
        asking = np.setdiff1d(tagged.query_tokens(), [*tagged.answer, tagged.last])
        assert (alone.roles[row, padding + asking] == QUESTION).all()
        assert (alone.roles[row] == LAST).nonzero().tolist() == [[padding + tagged.last]]
        others = len(asking) + 1 + len(tagged.answer)
        assert (alone.roles[row] == CONTEXT).sum() == len(tagged.ids) - others
    longer = alone.covering(2 * len(samples), alone.roles.shape[1] + 3)
    assert (longer.roles[:, -3:] == ANSWER).all() and (longer.query_of[:, -3:] == 0).all()
    assert longer.samples[:2] == [samples[0].id] * 2
    with pytest.raises(ValueError, match="give the samples that run"):
        alone.covering(len(samples) + 1, 5)


def test_no_path_and_no_answer_of_the_model_is_taken_for_the_question():
    """Where no question is given, the user's last text asks; an image by its path is no text."""
    picture = {"type": "image", "image": "what.png"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "what"}, picture]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    asked = ch.Sample("s", turns, [], "7", question="what")
    assert context_of(asked) == [("user", "")]
    assert context_of(ch.Sample("s", turns, [], "7")) == [("user", "")]


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("chunk", [7, 8192])
def test_layers_that_no_condition_touches_run_once(family, chunk, monkeypatch):
    """Whatever is done, and in whichever layer it begins, behind shared contexts and alone."""
    mllm = testbed.tiny(family, text={"num_hidden_layers": 3})
    samples = samples_for(mllm)
    reference = Reference(mllm, samples)
    reference.outputs(range(3), "both")
    monkeypatch.setattr("corehead.batching.PREFILL_CHUNK", chunk)
    rows = [0, 0, 0]

    def count(module, args, given):
        rows[module.layer_idx] += given["hidden_states"].numel()

    def run(layer):
        """Answers under what begins in a layer, and how much each layer computed."""
        heads = ch.HeadSet.of([(layer, 1), (2, 0)], mllm.shape)
        conditions = {
            "zero": Ablation(heads),
            "twice": Ablation(heads | heads.of([(2, 3)], mllm.shape)),
        }
        for mode in ("knockout", "resample"):
            conditions[mode] = Ablation(heads, mode, reference=reference)
        conditions["last"] = Ablation(heads, phase="last")
        rows[:] = 0, 0, 0
        table = ch.evaluate(mllm, samples, conditions, batch_size=3, progress=False)
        return table.logprob, list(rows)

    handles = [
        x.register_forward_pre_hook(count, with_kwargs=True) for x in mllm.attentions
    ]
    found = {layer: run(layer) for layer in (2, 0, 1)}
    monkeypatch.setattr(Ablation, "first_layer", 0)
    for layer, (answers, computed) in found.items():
        expected, everything = run(layer)
        np.testing.assert_allclose(answers, expected, atol=1e-4)
        assert computed[layer:] == everything[layer:]
        assert all(np.array(computed[:layer]) < everything[:layer])
    for handle in handles:
        handle.remove()


def test_layers_are_passed_over_while_all_heads_are_full():
    """A context that changes nothing leaves no hook, but still looks after the cache."""
    mllm, last_layer = tiny("qwen3_vl"), {"zero": Ablation(ch.HeadSet.of([(1, 0)], (2, 6)))}
    samples = samples_for(mllm)
    expected = ch.evaluate(mllm, samples, last_layer, progress=False)
    with ch.hybrid_attention(mllm, ~ch.HeadSet.of([], mllm.shape), window=4):
        found = ch.evaluate(mllm, samples, last_layer, progress=False)
    np.testing.assert_array_equal(found.logprob, expected.logprob)
