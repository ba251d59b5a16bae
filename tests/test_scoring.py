"""Scores against brute force: the full attention matrices of transformers' eager attention."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import FAMILIES, ask, film, image_part, picture, tiny, video_part
from transformers import Qwen3VLConfig

import corehead as ch
from corehead import testbed
from corehead.attention import CACHE, WEIGHTS_BLOCK, Call, Reader, hooks, row_weights
from corehead.batching import NULL, batches, room_for, with_question
from corehead.models import memory
from corehead.scoring import QUERIES, attention_map, mass_on

EVERY = [*FAMILIES, "llama", "qwen3"]
QWEN3_VL_8B = dict(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)


def samples_for(mllm, n=5) -> list[ch.Sample]:
    """Images, pages, videos and spans, of different lengths; the first three share a context."""
    if mllm.family.name == "text":
        records = [f"key{i} is {i * i}. " for i in range(6)]
        shared = [
            ask(
                "".join(records),
                id=f"t{i}",
                evidence=[ch.Span(f"key{i} is {i * i}.")],
                question=f"key{i}?",
            )
            for i in range(3)
        ]
        return [
            *shared,
            *(
                ask("".join(records[:i]), id=f"u{i}", evidence=[ch.Span("key0 is 0.")])
                for i in (2, 3)
            ),
        ]
    image, second, video = picture(70, 110), picture(50, 60, seed=2), film(4, 60, 70)
    shared = [
        ask(
            image_part(image),
            "Page 1.",
            image_part(second),
            id=f"s{i}",
            question="Where is it" + "?" * i,
            evidence=e,
        )
        for i, e in enumerate(
            [[ch.Region(0, (0, 0, 40, 40))], [ch.Pages([1])], [ch.Span("Page 1")]]
        )
    ]
    alone = ask(
        "Look: ",
        video_part(video),
        id="v",
        evidence=[ch.Tube(0, {1: (0, 0, 30, 30)})],
        answer="at the left",
    )
    # the question in front of the picture: nothing can be shared
    reverse = ask(id="r", question="Is it there?", evidence=[ch.Region(0, (0, 0, 20, 20))])
    reverse.messages[0]["content"].append(image_part(second))
    return [*shared, alone, reverse][:n]


def brute_force(
    mllm, tagged: ch.TaggedSample, implementation: str = "eager"
) -> dict[str, np.ndarray]:
    """(query, layer, head) arrays from full attention matrices in float32."""
    before = mllm.text_config._attn_implementation
    mllm.text_config._attn_implementation = implementation
    try:
        with torch.no_grad():
            out = mllm.model(
                **{k: v for k, v in tagged.inputs.items() if torch.is_tensor(v)},
                output_attentions=True,
            )
    finally:
        mllm.text_config._attn_implementation = before
    a = torch.stack(out.attentions)[:, 0].double().numpy()  # (layer, head, N, N)
    text = np.setdiff1d(np.arange(1, a.shape[-1]), tagged.visual)
    keys = dict(
        evidence=tagged.evidence, visual=tagged.visual, text=text, sink=np.array([0])
    )
    rows = dict(
        question=tagged.question, last=np.array([tagged.last]), answer=tagged.answer
    )

    def over_rows(
        per_row,
    ):  # (layer, head, N) -> (query, layer, head); NaN where a query set is empty
        empty = np.full(per_row.shape[:2], np.nan)
        return np.stack(
            [per_row[:, :, rows[q]].mean(-1) if len(rows[q]) else empty for q in QUERIES]
        )

    found = {name: over_rows(a[..., columns].sum(-1)) for name, columns in keys.items()}
    return found | {"entropy": over_rows(-(a * np.log(np.clip(a, 1e-300, None))).sum(-1))}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_equal_to_brute_force(family, batch_size):
    mllm = tiny(family)
    samples = samples_for(mllm)
    scores = ch.score(
        mllm, samples, batch_size=batch_size, on_error="raise", progress=False
    )
    assert list(scores.data.sample.values) == [s.id for s in samples]
    for i, sample in enumerate(samples):
        row = scores.data.isel(sample=i)
        for name, expected in brute_force(mllm, mllm.tag(sample)).items():
            np.testing.assert_allclose(
                row[name], expected, atol=1e-5, err_msg=f"{sample.id} {name}"
            )
        quoted = sample.messages[0]["content"][0 if sample.id == "r" else -1]["text"]
        blank = mllm.tag(with_question(sample, quoted, NULL))
        np.testing.assert_allclose(
            row.null_evidence, brute_force(mllm, blank)["evidence"], atol=1e-5
        )
    total = scores.data.visual + scores.data.text + scores.data.sink
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_batches_do_not_matter(family):
    mllm = tiny(family)
    samples = samples_for(mllm) + [
        ask(*(s.messages[0]["content"][:-1]), id=f"{s.id}-again", evidence=s.evidence)
        for s in samples_for(mllm)[:3]
    ]
    one = ch.score(mllm, samples, batch_size=1, progress=False).data
    for size in (3, 8):
        other = ch.score(mllm, samples, batch_size=size, progress=False).data
        for name in one.data_vars:
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_rows_in_blocks_are_the_same_rows(monkeypatch):
    """Reading a few rows at a time gives what reading them at once gives; masked keys get nothing."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 33, 8), torch.randn(2, 2, 33, 8)
    groups, mask = torch.rand(2, 33, 3).round(), torch.rand(2, 1, 33, 33) < 0.7
    rows = torch.tensor([2, 3, 5, 8, 13, 21, 30, 31, 32])
    expected = (query @ key.repeat_interleave(3, 1).transpose(2, 3) / 8**0.5).masked_fill(
        ~mask, -torch.inf
    )
    expected = expected.softmax(-1)[:, :, rows]
    call = Call(0, query, key, key, 8**-0.5, first=0, attention_mask=mask)
    for block in (1, 1000, 2**24):
        monkeypatch.setitem(WEIGHTS_BLOCK, "cpu", block)
        reader = Reader(rows, mass_on(groups))
        for part, weights in row_weights(call, rows):
            reader.read(call, part, weights)
        measured = torch.from_numpy(reader.result())
        sums, entropy = measured[..., :-1], measured[..., -1]
        torch.testing.assert_close(
            sums[0], torch.einsum("bhrn,bng->brhg", expected, groups)
        )
        torch.testing.assert_close(
            entropy[0], torch.special.entr(expected).sum(-1).transpose(1, 2)
        )


def in_chunks(monkeypatch, rows: int, elements: int):
    """Prefill and masks in small pieces."""
    monkeypatch.setattr("corehead.batching.PREFILL_CHUNK", rows)
    monkeypatch.setattr("corehead.attention.MASK_BLOCK", elements)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunked_prefill_is_the_whole_one(family, rows, monkeypatch):
    """Shared contexts, sequences that run alone, padding, knockout, hybrid attention: the same table."""
    mllm = tiny(family)
    samples = samples_for(mllm) if rows > 1 else samples_for(mllm)[-2:]
    heads = [(0, 1), (1, 3)]

    def tables():
        yield ch.score(mllm, samples, progress=False, on_error="raise")
        yield ch.score(mllm, samples, batch_size=1, progress=False)
        with ch.ablate(mllm, heads, mode="knockout"):
            yield ch.score(mllm, samples, progress=False)
        with ch.hybrid_attention(mllm, ch.HeadSet.of(heads, mllm.shape), window=9, sinks=2):
            yield ch.score(mllm, samples, progress=False)

    whole = list(tables())
    calls = []
    count = mllm.attentions[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["hidden_states"].shape[1]),
        with_kwargs=True,
    )
    try:
        in_chunks(monkeypatch, rows, 500)
        for a, b in zip(whole, tables()):
            assert_same(a, b)
    finally:
        count.remove()
    assert max(calls) <= rows


def test_batches_end_where_their_contexts_have_many_tokens(monkeypatch):
    mllm = tiny("llama")
    samples = [
        ask(f"record {i}: ", "alpha is 5. " * 9, id=f"s{i}", evidence=[]) for i in range(6)
    ]
    [whole] = batches(mllm, samples, 16)
    monkeypatch.setattr("corehead.batching.MAX_TOKENS", 2 * len(whole[0].members[0].ids))
    assert [len(batch) for batch in batches(mllm, samples, 16)] == [2, 2, 2]


def peak_bytes(function) -> int:
    """Peak of what torch allocates on the CPU during a call, inside its operations too."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return int(
        np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()
    )


def test_memory_grows_by_keys_values_and_embeddings_alone(monkeypatch):
    """And at the geometry of Qwen3-VL-8B, 128k tokens fit a GPU of 80 GB."""
    in_chunks(monkeypatch, 128, 2**17)
    monkeypatch.setattr("corehead.models.PREFILL_CHUNK", 128)
    monkeypatch.setitem(WEIGHTS_BLOCK, "cpu", 2**12)
    text = dict(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8
    )
    mllm = testbed.tiny("qwen3_vl", text=text | dict(num_key_value_heads=4, head_dim=32))

    def run(n: int) -> tuple[int, int]:
        words = ["alpha is 5. ", "filler. " * n]
        tagged = mllm.tag(ask(*words, question="alpha?", evidence=[ch.Span("alpha is 5")]))
        return len(tagged.ids), peak_bytes(
            lambda: ch.score(mllm, [tagged], null=False, progress=False, on_error="raise")
        )

    run(20)
    tokens, peaks = zip(*(run(n) for n in (120, 200, 280)))
    slopes = np.diff(peaks) / np.diff(tokens)
    assert abs(slopes[1] / slopes[0] - 1) < 0.02  # linear
    keys_and_values = 2 * 4 * 4 * 32 * 4  # layers, KV heads, head_dim, float32
    assert memory(mllm.model.config, tokens=1000).cache == 1000 * keys_and_values
    rest = (
        slopes[1] - keys_and_values - 192 * 4
    )  # embeddings; then ids, masks, positions, roles, groups
    assert 0 < rest < 170

    monkeypatch.undo()
    released = Qwen3VLConfig(
        text_config=QWEN3_VL_8B,
        vision_config=dict(out_hidden_size=4096, deepstack_visual_indexes=[8, 16, 24]),
        tie_word_embeddings=False,
    )
    need = memory(released, "bfloat16", tokens=2**17)
    assert abs(need.weights / 2 / 8.77e9 - 1) < 0.01 and need.cache == 18 * 2**30
    assert need.total < 50e9 < 80e9


def test_prompts_behind_a_cache_are_causal_without_a_mask():
    """Chunks of any length by corehead's attention under transformers' own prefill."""
    mllm = tiny("llama")
    ids = torch.arange(3, 43)[None].repeat(2, 1)
    pad = torch.ones_like(ids)
    pad[0, :9] = 0
    with torch.inference_mode():
        for mask in (None, pad):
            whole = mllm.model(input_ids=ids, attention_mask=mask).logits
            cache, found = room_for(mllm, 40), []
            with hooks(mllm):
                for i, j in ((0, 7), (7, 8), (8, 40)):
                    seen = None if mask is None else mask[:, :j]
                    places = (
                        None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, i:j]
                    )
                    more = {CACHE: cache, "position_ids": places}
                    found.append(
                        mllm.model(
                            input_ids=ids[:, i:j], attention_mask=seen, **more
                        ).logits
                    )
            if mask is not None:
                places = (mask.cumsum(1) - 1).clamp(min=0)
                whole = mllm.model(
                    input_ids=ids, attention_mask=mask, position_ids=places
                ).logits
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            torch.testing.assert_close(
                torch.cat(found, 1)[real], whole[real], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("copied", [False, True])
def test_questions_on_equal_media_share_one_prefill(mllm, copied):
    """Five questions on one document: its pages go through the vision tower once, whoever holds the objects."""
    pages = [picture(60, 90), picture(50, 60, seed=2)]
    samples = [
        ask(
            *(image_part(p.copy() if copied else p) for p in pages),
            id=f"q{i}",
            question=f"Where is {i}?",
            evidence=[ch.Pages([i % 2])],
        )
        for i in range(5)
    ]
    [[context]] = batches(mllm, samples, 16, null=True)
    assert len(context.members) == 5 and context.shared > len(context.members[0].visual)
    runs = []
    tower = (
        mllm.model.model.visual
        if mllm.family.name == "qwen3_vl"
        else mllm.model.model.vision_tower
    )
    count = tower.register_forward_hook(lambda *given: runs.append(1))
    try:
        together = ch.score(mllm, samples, progress=False)
        assert len(runs) == 1
    finally:
        count.remove()
    for i, sample in enumerate(samples):
        alone = ch.score(mllm, [sample], progress=False).data
        for name in alone.data_vars:
            np.testing.assert_allclose(together.data[name][i], alone[name][0], atol=1e-5)


def test_the_model_is_left_as_it_was(mllm):
    before = mllm.text_config._attn_implementation
    inputs = mllm.tag(samples_for(mllm)[0]).inputs
    with torch.no_grad():
        logits = mllm.model(**inputs).logits
        ch.score(mllm, samples_for(mllm), progress=False)
        assert mllm.text_config._attn_implementation == before
        assert torch.equal(mllm.model(**inputs).logits, logits)


def test_variants_follow_their_formulas():
    mllm = tiny("qwen3_vl")
    scores = ch.score(mllm, samples_for(mllm), progress=False)
    d = scores.data.sel(query="last")
    assert np.allclose(scores.per_sample("ram", "last"), d.evidence)
    mass = np.where(
        d.on_text, d.text.transpose(..., "sample"), d.visual.transpose(..., "sample")
    )
    share = d.evidence.transpose(..., "sample").values / mass
    assert np.allclose(scores.per_sample("share", "last").transpose(..., "sample"), share)
    tokens = (d.n_evidence / d.n_context).values
    assert np.allclose(
        scores.per_sample("lift", "last").transpose(..., "sample"), share / tokens
    )
    assert np.allclose(
        scores.per_sample("calibrated", "last"), d.evidence - d.null_evidence
    )
    assert scores.mean("ram").shape == (mllm.n_layers, mllm.n_heads)
    order = scores.rank("ram").order
    assert scores.mean("ram").values[tuple(order[0])] == scores.mean("ram").values.max()
    for bad in ("rams", "RAM"):
        with pytest.raises(ValueError, match="'ram', 'share', 'lift', 'calibrated'"):
            scores.per_sample(bad)
    with pytest.raises(ValueError, match="'question', 'last', 'answer'"):
        scores.per_sample("ram", "prompt")


def test_summaries_cluster_by_context_and_item():
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm, 4)
    for i, sample in enumerate(samples):
        sample.meta |= {"domain": "pages", "item": "ab"[i % 2]}
    scores = ch.score(mllm, samples, progress=False)
    assert scores.samples.context.tolist() == ["s0", "s0", "s0", "v"]
    table = scores.summary("ram", "calibrated", query="last")
    assert len(table) == np.prod(mllm.shape) and set(table.domain) == {"pages"}
    for variant in ("ram", "calibrated"):
        values = scores.per_sample(variant, "last").values
        factors = [np.array([0, 0, 0, 1]), np.array([0, 1, 0, 1])]
        low, high = ch.stats.mean_interval(values, factors)
        for row in table.itertuples():
            place = row.layer, row.head
            assert getattr(row, variant) == pytest.approx(values.mean(0)[place])
            assert getattr(row, f"{variant}_low") == pytest.approx(low[place])
            assert getattr(row, f"{variant}_high") == pytest.approx(high[place])


def test_bare_token_ids_need_no_processor():
    mllm = ch.MLLM(tiny("llama").model)
    ids = torch.arange(3, 23)[None]
    tagged = ch.TaggedSample(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        visual=np.empty(0, np.int64),
        evidence=np.array([4, 5]),
        question=np.array([17, 18]),
        answer=np.empty(0, np.int64),
        last=19,
    )
    scores = ch.score(mllm, [tagged], progress=False)
    np.testing.assert_allclose(
        scores.data.isel(sample=0).evidence[:2],
        brute_force(mllm, tagged)["evidence"][:2],
        atol=1e-5,
    )
    assert (
        np.isnan(scores.data.null_evidence).all()
        and np.isnan(scores.data.sel(query="answer").evidence).all()
    )


def test_a_bad_sample_is_recorded_and_the_others_are_done(mllm):
    samples = samples_for(mllm, 4)
    samples.insert(1, ask(image_part("nowhere.png"), id="bad"))
    scores = ch.score(mllm, samples, progress=False)
    assert list(scores.data.sample.values) == [s.id for s in samples if s.id != "bad"]
    assert (
        list(scores.failures["sample"]) == ["bad"]
        and "cannot be read" in scores.failures.reason[0]
    )
    with pytest.raises(ch.SampleError, match="'bad'"):
        ch.score(mllm, samples, on_error="raise", progress=False)
    with pytest.raises(ValueError, match="no sample could be scored"):
        ch.score(mllm, [samples[1]], progress=False)
    with pytest.raises(ValueError, match="two samples have the id"):
        ch.score(mllm, [samples[0], samples[0]], progress=False)
    with pytest.raises(ValueError, match="on_error"):
        ch.score(mllm, samples, on_error="ignore")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attention_that_is_not_finite_names_the_layer(value):
    mllm = tiny("qwen3_vl")
    weight = mllm.attentions[1].k_norm.weight
    kept = weight.data.clone()
    try:
        weight.data[0] = value
        with pytest.raises(ch.SampleError, match="layer 1 is not finite"):
            ch.score(mllm, samples_for(mllm), on_error="raise", progress=False)
    finally:
        weight.data.copy_(kept)


# --- stores


def assert_same(a: ch.HeadScores, b: ch.HeadScores):
    assert list(a.data.sample.values) == list(b.data.sample.values)
    for name in a.data.data_vars:
        np.testing.assert_allclose(a.data[name], b.data[name], atol=1e-5)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm)
    whole = ch.score(mllm, samples, progress=False)
    with pytest.raises(KeyboardInterrupt):
        ch.score(
            mllm,
            interrupted(samples, 4),
            batch_size=1,
            store=tmp_path / "run",
            progress=False,
        )
    with pytest.raises(ValueError, match="resume=True"):
        ch.score(mllm, samples, store=tmp_path / "run", progress=False)
    again = ch.score(mllm, samples, store=tmp_path / "run", resume=True, progress=False)
    assert_same(again, whole)
    third = ch.score(mllm, samples, store=tmp_path / "run", resume=True, progress=False)
    assert_same(third, whole)


def test_what_a_store_keeps_takes_the_meta_of_today(tmp_path):
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm)[:2]
    for domain in ("before", "after"):
        for sample in samples:
            sample.meta["domain"] = domain
        scores = ch.score(mllm, samples, store=tmp_path, resume=True, progress=False)
        assert set(scores.data.domain.values) == {domain}


def interrupted(samples, after):
    for i, sample in enumerate(samples):
        if i == after:
            raise KeyboardInterrupt
        yield sample


def test_configurations_do_not_mix(tmp_path):
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm)
    ch.score(mllm, samples[:3], store=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another configuration.*options"):
        ch.score(mllm, samples, null=False, store=tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"another configuration.*model"):
        ch.score(
            tiny("internvl"),
            samples_for(tiny("internvl")),
            store=tmp_path,
            resume=True,
            progress=False,
        )
    changed = samples_for(mllm)
    changed[0].answer = "8"
    with pytest.raises(ValueError, match="'s0' is not the one in the store"):
        ch.score(mllm, changed, store=tmp_path, resume=True, progress=False)


# --- files


def test_saved_scores_come_back(tmp_path):
    mllm = tiny("qwen3_vl")
    samples = [*samples_for(mllm), ask(image_part("nowhere.png"), id="Ünread")]
    # meta that NetCDF 3 has no type for: None, and integers of more than 32 bits
    metas = [{"domain": "page", "row": 7}, {"where": "süd", "row": None}, {"row": 2**40}]
    for sample, meta in zip(samples, metas):
        sample.meta = {"n": 2**40, "domain": "photo", "right": True} | meta
    for sample in samples[len(metas) :]:
        sample.meta = {"n": 3, "domain": "", "right": False}
    scores = ch.score(mllm, samples, progress=False)
    scores.save(tmp_path / "scores.nc")
    back = ch.HeadScores.load(tmp_path / "scores.nc", mllm)
    xr.testing.assert_identical(back.data, scores.data)
    types = {name: values.dtype for name, values in scores.data.variables.items()}
    assert types == {name: values.dtype for name, values in back.data.variables.items()}
    pd.testing.assert_frame_equal(back.failures, scores.failures)
    assert back.provenance == scores.provenance and list(back.failures["sample"]) == [
        "Ünread"
    ]
    assert back.rank("lift").top(0.2) == scores.rank("lift").top(0.2)
    assert list(back.by("domain")) == ["page", "photo", ""]
    # others open it, too
    with xr.open_dataset(tmp_path / "scores.nc") as opened:
        assert opened.domain.values.tolist() == scores.data.domain.values.tolist()


def test_scores_of_another_model_are_refused(tmp_path):
    mllm, path = tiny("llama"), tmp_path / "scores.nc"
    scores = ch.score(mllm, samples_for(mllm), progress=False)
    scores.data.attrs["provenance"] = json.dumps(scores.provenance | {"model": "org/some"})
    scores.save(path)
    assert (
        repr(ch.HeadScores.load(path)) == "HeadScores(5 samples, 2 x 6 heads of org/some)"
    )
    with pytest.raises(
        ValueError, match=r"of org/some \(torch\.float32, .* with other weights"
    ):
        ch.HeadScores.load(path, testbed.tiny("llama", seed=1))


def test_files_that_are_no_scores(tmp_path):
    (tmp_path / "text.nc").write_text("scores")
    xr.Dataset({"x": ("y", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="scipy")
    for name in ("text.nc", "other.nc"):
        with pytest.raises(
            ValueError, match=r"nc is not a file of scores: write it with HeadScores\.save"
        ):
            ch.HeadScores.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ch.HeadScores.load(tmp_path / "nowhere.nc")


@pytest.mark.parametrize("order", [["a", "b"], ["b"], ["b", "a"]])
def test_the_null_question_is_a_sample_s_own_whoever_stands_beside_it(order):
    """Options behind the question differ, and the answers do not."""
    mllm = tiny("qwen3_vl")
    image = image_part(picture(48, 48))
    asked = {
        "a": "What is it?\nA. cat B. dog",
        "b": "Which colour?\nA. red B. blue C. some very other thing",
    }
    samples = []
    for name in order:
        content = [image, {"type": "text", "text": asked[name]}]
        evidence = [ch.Region(0, (0, 0, 32, 32))]
        question = asked[name].partition("\n")[0]
        message = {"role": "user", "content": content}
        samples.append(ch.Sample(name, [message], evidence, "A", question))
    alone = ch.score(mllm, samples[order.index("b") :][:1], progress=False)
    beside = ch.score(mllm, samples, progress=False).data.sel(sample="b")
    np.testing.assert_allclose(beside.null_evidence, alone.data.null_evidence[0], atol=1e-6)


def test_the_null_question_attracts_to_what_stands_behind_it():
    mllm = tiny("qwen3_vl")
    question = "What is the code?"
    text = f"{question} Here is the text: the house is red. the code is 734. the end."
    evidence = [ch.Span("the code is 734")]
    sample = ch.Sample("x", [{"role": "user", "content": text}], evidence, "7", question)
    scores = ch.score(mllm, [sample], progress=False).data
    null = mllm.tag(with_question(sample, question, "N/A"))
    for query in ("last", "answer"):
        weights = attention_map(mllm, null, query)
        expected = weights[..., null.evidence].sum(-1)
        found = scores.null_evidence.sel(query=query)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 11, 16, 25])
def test_chunks_never_part_a_picture_that_attends_both_ways(chunk, monkeypatch):
    mllm = tiny("gemma3")
    samples = [
        ask(
            image_part(picture(96, 96, 1)),
            question=q,
            id=q,
            evidence=[ch.Region(0, (0, 0, 32, 32))],
        )
        for q in ("what is it?", "which one?")
    ]
    whole = ch.score(mllm, samples, null=False, progress=False)
    answers = ch.evaluate(mllm, samples, new_tokens=3, progress=False)
    monkeypatch.setattr("corehead.batching.PREFILL_CHUNK", chunk)
    assert_same(whole, ch.score(mllm, samples, null=False, progress=False))
    pieces = ch.evaluate(mllm, samples, new_tokens=3, progress=False)
    np.testing.assert_allclose(pieces.logprob, answers.logprob, atol=1e-5)
    assert list(pieces.written) == list(answers.written)
