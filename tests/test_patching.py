"""Patching against edits of o_proj's input in plain forward passes, and what the digits' counterfactuals are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny

import corehead as ch
from corehead import patching
from corehead.ablation import Ablation, Reference
from corehead.attention import LAST, hooks_in_force
from corehead.batching import batches, pack
from corehead.testbed.scenes import cell_box, counterfactuals

ROOT = "data/testbed/qwen3vl-s"
DOMAINS = ("image", "document", "video", "text")
LAYOUT = {
    "image": {"cells": 4},
    "document": {"pages": 2},
    "video": {"frames": 4},
    "text": {"cells": 4},
}


def pairs_for(domain, n=4, seed=0):
    return counterfactuals(domain, "train", n, seed, **LAYOUT[domain])


@pytest.mark.parametrize("domain", DOMAINS)
def test_pairs_differ_in_the_needle_alone(domain):
    for base, donor in pairs_for(domain, 12):
        assert base.answer != donor.answer
        assert (base.foil, donor.foil) == (donor.answer, base.answer)
        assert base.question == donor.question and (
            base.evidence == donor.evidence or domain == "text"
        )
        media, other = (s.messages[0]["content"][:-1] for s in (base, donor))
        if domain == "text":
            words, changed = media[0]["text"].split(), other[0]["text"].split()
            differ = [i for i, pair in enumerate(zip(words, changed)) if pair[0] != pair[1]]
            assert len(differ) == 1
            assert (words[differ[0]], changed[differ[0]]) == (base.answer, donor.answer)
            continue
        pixels, others = (
            np.concatenate(
                [
                    np.asarray(p["image"])[None] if "image" in p else p["video"]
                    for p in parts
                ]
            )
            for parts in (media, other)
        )
        frame, y, x = np.nonzero((pixels != others).any(-1))
        assert len(frame)
        # all that changed lies inside one cell a frame, the one that the evidence names
        cells = {(f, r // 16, c // 16) for f, r, c in zip(frame, y, x)}
        assert len({f for f, *_ in cells}) == len(cells)
        [piece] = base.evidence
        for f, row, column in cells:
            box = cell_box(row, column)
            if domain == "image":
                assert tuple(piece.box) == box
            elif domain == "video":
                assert tuple(piece.boxes[int(f)]) == box
            else:
                assert piece.pages == (f,)


def test_pairs_are_drawn_from_their_split_and_seed():
    first, again, other = (
        counterfactuals("image", "test", 6, seed, cells=4) for seed in (0, 0, 1)
    )
    assert [a.answer for a, _ in first] == [a.answer for a, _ in again]
    assert [np.asarray(a.messages[0]["content"][0]["image"]).sum() for a, _ in first] != [
        np.asarray(a.messages[0]["content"][0]["image"]).sum() for a, _ in other
    ]
    for domain in ("majority", "text_only"):
        with pytest.raises(ValueError, match="no needle"):
            counterfactuals(domain)
    with pytest.raises(ValueError, match="split"):
        counterfactuals("image", "dev")


@torch.no_grad()
def by_hand(mllm, base, donor, heads):
    """Logits behind the prompt with the donor's inputs of o_proj at the last prompt token."""
    width = mllm.attentions[0].o_proj.in_features // mllm.n_heads
    recorded = {}

    def note(layer):
        return lambda module, given: recorded.__setitem__(layer, given[0].clone())

    def put(layer, last, other):
        def hook(module, given):
            x = given[0].clone()
            for _, h in (place for place in heads if place[0] == layer):
                where = slice(h * width, (h + 1) * width)
                x[0, last, where] = recorded[layer][0, other, where]
            return (x,)

        return hook

    tagged, other = mllm.tag(base), mllm.tag(donor)
    handles = [
        m.o_proj.register_forward_pre_hook(note(i)) for i, m in enumerate(mllm.attentions)
    ]
    mllm.model(**other.inputs)
    for handle in handles:
        handle.remove()
    handles = [
        m.o_proj.register_forward_pre_hook(put(i, tagged.last, other.last))
        for i, m in enumerate(mllm.attentions)
    ]
    logits = mllm.model(**tagged.inputs).logits[0, tagged.last]
    for handle in handles:
        handle.remove()
    plain = mllm.model(**tagged.inputs).logits[0, tagged.last]
    other_logits = mllm.model(**other.inputs).logits[0, other.last]
    own, foil = (
        mllm.tokenizer(text)["input_ids"][0] for text in (base.answer, donor.answer)
    )
    contrast = [float(x[own] - x[foil]) for x in (plain, logits, other_logits)]
    return contrast, int(logits.argmax()) == foil


@pytest.fixture(scope="module")
def trained():
    return ch.load(ROOT)


@pytest.mark.parametrize("domain", DOMAINS)
def test_patching_equals_editing_inputs_of_o_proj(trained, domain):
    mllm = trained
    pairs = counterfactuals(domain, "validation", 5)
    sets = {
        "one": ch.HeadSet.of([(2, 9)], mllm.shape),
        "some": ch.HeadSet.of([(2, 5), (2, 6), (2, 8), (2, 9), (4, 10)], mllm.shape),
        "all": ch.HeadSet(np.ones(mllm.shape, bool)),
    }
    table = patching.patch(mllm, pairs, sets, batch_size=3, progress=False)
    found = table.set_index(["condition", "sample"])
    pairs = [pair for pair in pairs if pair[0].id in set(table["sample"])]
    assert len(pairs) >= 4
    ways, moved = [], {}
    for name, heads in sets.items():
        for base, donor in pairs:
            (plain, patched, other), flipped = by_hand(mllm, base, donor, list(heads))
            row = found.loc[name, base.id]
            assert row.contrast == pytest.approx(patched, abs=1e-4)
            assert row.flipped == flipped
            moved[name, base.id] = plain - patched
            ways.append(plain - other)
    for place, movement in moved.items():
        assert found.loc[place].recovered == pytest.approx(
            movement / np.mean(ways), abs=1e-4
        )
    # with every head's output of the donor at the row that answers, nothing of the base is left there but its token
    assert found.loc["all"].recovered.mean() == pytest.approx(1, abs=0.05)


def test_use_is_one_head_at_a_time(trained):
    pairs = counterfactuals("image", "validation", 4)
    scores = patching.use(trained, pairs, progress=False)
    assert scores.dims == ("sample", "layer", "head") and scores.shape[1:] == trained.shape
    single = {
        place: ch.HeadSet.of([place], trained.shape) for place in ((2, 9), (4, 10), (11, 3))
    }
    table = patching.patch(trained, pairs, single, progress=False)
    for (layer, head), part in table.groupby("condition"):
        np.testing.assert_allclose(
            scores.sel(sample=part["sample"].to_numpy())[:, layer, head],
            part.recovered,
            atol=1e-5,
        )


def test_donors_are_recorded_on_the_model_as_it_is_edited(trained):
    """Inside `ablate`, donor and base both run without the ablated heads."""
    mllm = trained
    pairs = counterfactuals("text", "validation", 4)
    gone = ch.HeadSet.of([(2, 9), (2, 8)], mllm.shape)
    heads = ch.HeadSet.of([(2, 10), (4, 5)], mllm.shape)
    with ch.ablate(mllm, gone):
        inside = patching.patch(mllm, pairs, {"heads": heads}, progress=False).set_index(
            "sample"
        )
    assert not hooks_in_force(mllm)
    weights = [m.o_proj.weight for m in mllm.attentions]
    width = weights[0].shape[1] // mllm.n_heads
    with torch.no_grad():
        kept = {layer: weights[layer].clone() for layer, _ in gone}
        for layer, h in gone:
            weights[layer][:, h * width : (h + 1) * width] = 0
        try:
            edited = patching.patch(
                mllm, pairs, {"heads": heads}, progress=False
            ).set_index("sample")
        finally:
            for layer, weight in kept.items():
                weights[layer].copy_(weight)
    assert list(inside.index) == list(edited.index)
    np.testing.assert_allclose(inside.contrast, edited.contrast, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_rows_share_their_prompt(family):
    """Where the last row alone is edited, what runs behind the cache is that row; without sharing it is the same."""
    mllm = tiny(family)
    pairs = pairs_for("image")
    bases, donors = zip(*pairs)
    [batch] = batches(mllm, bases, 8, need_answer=True, to_last=True)
    assert all(len(block.ids) == 2 for context in batch for block in context.blocks)
    roles = pack(mllm, batch, apart=True).roles.roles
    assert ((roles == LAST).sum(1) == 1).all()  # which tells where each prompt ends
    reference = Reference(mllm, donors, {a.id: b.id for a, b in pairs})
    heads = ch.HeadSet(np.ones(mllm.shape, bool))
    late = ch.evaluate(
        mllm, bases, {"last": Ablation(heads, "patch", "last", reference)}, progress=False
    )
    early = {"last": Ablation(heads, "patch", "last", reference), "intact": None}
    whole = ch.evaluate(mllm, bases, early, progress=False).query("condition == 'last'")
    np.testing.assert_allclose(late.logprob, whole.logprob, atol=1e-5)


def test_pairs_that_are_not_answered_are_left_out_or_kept(trained):
    mllm = trained
    pairs = counterfactuals("text", "validation", 3)
    [(base, donor), *others] = pairs
    foreign = {str(d) for d in range(10)} - {base.answer, donor.answer}
    # asked for another digit than stands there, it is wrong
    wrong = [
        (replace(base, answer=min(foreign)), replace(donor, foil=min(foreign))),
        *others,
    ]
    heads = {"all": ch.HeadSet(np.ones(mllm.shape, bool))}
    assert patching.answered(mllm, wrong, progress=False) == others
    left = patching.patch(mllm, wrong, heads, progress=False)
    assert set(left["sample"]) == {pair[0].id for pair in others}
    kept = patching.patch(mllm, wrong, heads, only_right=False, progress=False)
    assert set(kept["sample"]) == {pair[0].id for pair in pairs}
    np.testing.assert_allclose(
        kept.moved / kept.recovered, (kept.moved / kept.recovered)[0], rtol=1e-4
    )


def test_bad_input_is_named(trained):
    mllm = trained
    [(base, donor)] = counterfactuals("text", "validation", 1)
    heads = {"all": ch.HeadSet(np.ones(mllm.shape, bool))}
    with pytest.raises(ValueError, match="no pairs"):
        patching.patch(mllm, [], heads)
    wrong = replace(base, answer=donor.answer, foil=base.answer)
    with pytest.raises(ValueError, match="answered right"):
        patching.patch(mllm, [(wrong, donor)], heads, progress=False)
    assert patching.answered(mllm, [(wrong, donor)], progress=False) == []
    assert patching.answered(mllm, []) == []
    with pytest.raises(ValueError, match="not one of the samples"):
        Reference(mllm, [donor], {base.id: "somebody"})
    with pytest.raises(ValueError, match="donor_of="):
        Ablation(heads["all"], "patch", reference=Reference(mllm, [donor]))
    reference = Reference(mllm, [donor], {"another": donor.id})
    with pytest.raises(ValueError, match=f"{base.id!r} has no donor"):
        ch.evaluate(
            mllm,
            [base],
            {"p": Ablation(heads["all"], "patch", reference=reference)},
            progress=False,
        )
    with pytest.raises(ch.SampleError, match="foil"):
        ch.evaluate(mllm, [replace(base, foil=base.answer)], progress=False)
    without = Reference(mllm, [replace(donor, answer=None, foil=None)], {base.id: donor.id})
    with pytest.raises(ValueError, match="no token in phase='decode'"):
        ch.evaluate(
            mllm,
            [base],
            {"p": Ablation(heads["all"], "patch", "decode", without)},
            progress=False,
        )


def test_a_new_store_takes_both_tables_of_patching(tmp_path):
    mllm = ch.load(ROOT)
    heads = {"one": ch.HeadSet.of([(2, 6)], mllm.shape)}
    options = dict(only_right=False, progress=False)
    plain = patching.patch(mllm, pairs_for("text", 2), heads, **options)
    stored = patching.patch(
        mllm, pairs_for("text", 2), heads, store=tmp_path / "new", **options
    )
    np.testing.assert_allclose(stored.recovered, plain.recovered)
