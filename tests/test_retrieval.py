"""Pages ranked by attention, and visual sinks, against the full matrices of transformers' eager attention."""

from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ask, film, image_part, picture, tiny, video_part

import corehead as ch
from corehead.attention import Hook, hooks
from corehead.ranking import HeadRanking
from corehead.retrieval import recall, units
from corehead.sinks import drawn_attention, find_sinks, mass_beside_sinks
from corehead.stats import summary

ROOT = "data/testbed/qwen3vl-s"


def attention(mllm, tagged) -> np.ndarray:
    """(layer, head, N, N)."""
    before = mllm.text_config._attn_implementation
    mllm.text_config._attn_implementation = "eager"
    inputs = {k: v for k, v in tagged.inputs.items() if torch.is_tensor(v)}
    try:
        with torch.no_grad():
            out = mllm.model(**inputs, output_attentions=True)
    finally:
        mllm.text_config._attn_implementation = before
    return torch.stack(out.attentions)[:, 0].double().numpy()


def documents() -> list[ch.Sample]:
    """Two questions on three pages of different sizes, a film, and what cannot be ranked: one page, text."""
    pages = [
        image_part(picture(*size, seed=i))
        for i, size in enumerate([(60, 80), (40, 40), (70, 50)])
    ]
    meta = {"domain": "document", "item": "a"}
    return [
        ask(*pages, id="d0", evidence=[ch.Pages([1])], question="Where?", meta=meta),
        ask(*pages, id="d1", evidence=[ch.Pages([0, 2])], question="Who?", meta=meta),
        ask(pages[0], id="one", evidence=[ch.Pages([0])], meta=meta),
        ask(
            video_part(film(8, 40, 60)), id="film", evidence=[ch.Frames(0, [2])], meta=meta
        ),
        ask("A 7.", *pages, id="words", evidence=[ch.Span("A 7.")], meta=meta),
    ]


def pages_of(tagged, unit) -> list[np.ndarray]:
    """Tokens of every unit, by the media themselves."""
    if unit == "token":
        return [np.array([token]) for token in tagged.visual]
    found = []
    for medium in tagged.media:
        if medium.kind == "image":
            found.append(medium.tokens)
        else:
            found += [medium.tokens[medium.view == v] for v in np.unique(medium.view)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("query", "unit", "per_token"),
    [("question", "page", False), ("last", "page", True), ("question", "token", False)],
)
def test_recall_is_that_of_full_matrices_and_a_loop(family, query, unit, per_token):
    mllm = tiny(family)
    top = ch.HeadSet.of([(0, 1), (1, 0), (1, 2)], mllm.shape)
    sets = {"some": top, "all": ~ch.HeadSet(np.zeros(mllm.shape, bool))}
    samples = documents()
    table = recall(
        mllm, samples, sets, ks=(1, 2), query=query, unit=unit, per_token=per_token
    )
    known = ["d0", "d1", "film"] + ["one"] * (unit == "token")
    assert set(table["sample"]) == set(known) and len(table) == 2 * len(known)
    for sample in samples:
        if sample.id not in known:
            continue
        tagged = mllm.tag(sample)
        a = attention(mllm, tagged)
        rows = tagged.question if query == "question" else [tagged.last]
        pages = pages_of(tagged, unit)
        relevant = [np.isin(page, tagged.evidence).any() for page in pages]
        for name, heads in sets.items():
            worth = []
            for page in pages:
                mass = 0.0
                for layer, head in heads:
                    mass += np.mean([a[layer, head, q, page].sum() for q in rows])
                worth.append(mass / len(page) if per_token else mass)
            order = sorted(range(len(pages)), key=lambda i: -worth[i])
            row = table[(table["sample"] == sample.id) & (table["heads"] == name)].iloc[0]
            assert row.n == len(pages) and row.relevant == sum(relevant)
            assert row.place == 1 + [relevant[i] for i in order].index(True)
            for k in (1, 2):
                hits = sum(relevant[i] for i in order[:k])
                assert row[f"recall@{k}"] == hits / min(k, sum(relevant))


def test_units_are_pages_frames_or_tokens(mllm):
    document, _, _, video, _ = (mllm.tag(sample) for sample in documents())
    for tagged in (document, video):
        for unit in ("page", "token"):
            labels = units(tagged, unit)
            for number, tokens in enumerate(pages_of(tagged, unit)):
                assert (np.flatnonzero(labels == number) == tokens).all()
            assert (labels >= 0).sum() == len(tagged.visual)


def test_chance_is_the_mean_over_all_orders():
    from itertools import permutations

    from corehead.retrieval import _places

    relevant = np.array([1, 3])
    for k in (1, 2, 3, 9):
        rows = [
            _places(np.array(order, float), relevant, [k])
            for order in permutations(range(5))
        ]
        mean = np.mean([row[f"recall@{k}"] for row in rows])
        assert mean == pytest.approx(rows[0][f"chance@{k}"])
    # heads that look nowhere have found nothing
    assert _places(np.zeros(5), relevant, [1])["recall@1"] == 0


def test_names_become_columns_and_intervals_know_contexts_and_items():
    mllm = tiny("qwen3_vl")
    Draw = namedtuple("Draw", "heads draw")
    ranking = HeadRanking(np.random.default_rng(0).random(mllm.shape))
    top = ranking.top(0.2)
    sets = {Draw("random", seed): ch.random_heads(ranking, top, seed) for seed in range(3)}
    table = recall(mllm, documents(), sets)
    assert {"heads", "draw", "context", "item"} <= set(table)
    # two questions on one document
    assert table.groupby("sample").context.first()[["d0", "d1"]].tolist() == ["d0", "d0"]
    found = summary(table.assign(item=table["sample"]), "heads", ["recall@1"])
    assert found.n.iloc[0] == 9


def test_what_cannot_be_ranked_is_refused():
    mllm = tiny("qwen3_vl")
    every = {"all": ~ch.HeadSet(np.zeros(mllm.shape, bool))}
    with pytest.raises(ValueError, match="two or more"):
        recall(mllm, documents()[2:3], every)
    with pytest.raises(ValueError, match="unit="):
        recall(mllm, documents(), every, unit="word")
    with pytest.raises(ValueError, match="rank the heads of this model"):
        recall(mllm, documents(), {"other": ch.HeadSet(np.ones((1, 2), bool))})
    with pytest.raises(ValueError, match="two samples have the id 'd0'"):
        recall(mllm, [*documents(), documents()[0]], every)
    mute = [replace(sample, answer=None) for sample in documents()]
    with pytest.raises(ch.SampleError, match="'d0', answer: is missing"):
        recall(mllm, mute, every, query="answer")


# --- sinks


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_attention_is_that_of_full_matrices(family):
    mllm = tiny(family)
    for sample in documents()[:1] + documents()[3:4]:
        tagged = mllm.tag(sample)
        a = attention(mllm, tagged).mean((0, 1))
        drawn = drawn_attention(mllm, tagged)
        for j in range(tagged.last):
            rows = range(j + 1, tagged.last + 1)
            expected = sum(a[i, j] for i in rows) / sum(1 / (i + 1) for i in rows)
            assert drawn[j] == pytest.approx(expected, rel=1e-4)
        assert np.isnan(drawn[-1]) and len(drawn) == tagged.last + 1


class Planted(Hook):
    """One token's key answers every query, in every head."""

    def __init__(self, token: int):
        self.token = token

    def attend(self, call):
        # copies: the cache's own keys must not change
        call.query = call.query.clone()
        call.key = call.key.clone()
        call.query[..., 0] = 1
        call.key[:, :, self.token] = 0
        call.key[:, :, self.token, 0] = 5 / call.scaling


def test_a_planted_sink_is_found_and_taken_out():
    mllm = tiny("qwen3_vl")
    samples = documents()[:2]
    # the first of the third page: in V* of the second question alone
    token = int(mllm.tag(samples[0]).media[2].tokens[0])
    sinks = ["sinks in evidence", "other sinks"]
    clean = mass_beside_sinks(mllm, samples, find_sinks(mllm, samples))
    assert clean.sel(kind=sinks).sum() == 0
    with hooks(mllm, {layer: [Planted(token)] for layer in range(mllm.n_layers)}):
        table = find_sinks(mllm, samples)
        masses = mass_beside_sinks(mllm, samples, table)
        ram = ch.score(mllm, samples, null=False, progress=False).per_sample("ram")
    assert table[table.sink].token.tolist() == [token, token]
    assert table[table.sink].evidence.tolist() == [False, True]
    # the sink is the greater part of the attention, and belongs to the evidence of the one that asks for its page
    assert (masses.sel(sample="d0", kind="other sinks") > 0.5).all()
    assert (masses.sel(sample="d1", kind="sinks in evidence") > 0.5).all()
    assert (masses.sel(sample="d0", kind="sinks in evidence") == 0).all()
    whole = masses.sel(kind=["evidence", "sinks in evidence"]).sum("kind")
    np.testing.assert_allclose(whole, ram, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_a_sink_in_text_is_found_beside_the_first_token(family):
    mllm = tiny(family)
    sample = ask("A 7. " * 30 + "B 5.", evidence=[ch.Span("B 5.")], question="B?")
    tagged = mllm.tag(sample)
    token = int(tagged.evidence[0])
    with hooks(mllm, {layer: [Planted(token)] for layer in range(mllm.n_layers)}):
        table = find_sinks(mllm, [sample], "text")
        [mass] = mass_beside_sinks(mllm, [sample], table)
        ram = ch.score(mllm, [sample], null=False, progress=False).per_sample("ram")
    assert table.token.tolist() == list(range(1, tagged.question[0]))
    assert table[table.sink].token.tolist() == [token]
    in_evidence, rest = mass.sel(kind="sinks in evidence"), mass.sel(kind="evidence")
    assert (in_evidence > rest).all() and (mass.sel(kind="other sinks") == 0).all()
    np.testing.assert_allclose(in_evidence + rest, ram[0], atol=1e-5)


def test_nothing_is_a_sink_where_attention_is_even():
    mllm = tiny("qwen3_vl")
    table = find_sinks(mllm, documents())
    assert not table.sink.any() and set(table["sample"]) == {
        "d0",
        "d1",
        "one",
        "film",
        "words",
    }
    means = table.groupby("sample").drawn.mean()
    np.testing.assert_allclose(means, 1)
    with pytest.raises(ValueError, match="among='video': take 'visual' or 'text'"):
        find_sinks(mllm, documents(), "video")
    with pytest.raises(ValueError, match="no sample has visual tokens"):
        find_sinks(mllm, [ask("A 7.", evidence=[ch.Span("A 7.")])])


def test_evidence_in_text_beside_a_page_does_not_cost_the_sample():
    mllm = tiny("qwen3_vl")
    *_, words = documents()
    mixed = replace(words, evidence=[*words.evidence, ch.Pages([1])])
    alone = replace(words, evidence=[ch.Pages([1])])
    heads = {"all": ch.HeadSet(np.ones(mllm.shape, bool))}
    for unit in ("page", "token"):
        first, second = (recall(mllm, [s], heads, unit=unit) for s in (mixed, alone))
        assert first.equals(second)
