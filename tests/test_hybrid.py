"""Hybrid attention against full matrices with an explicit mask, in every path."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny
from test_ablation import logits_of, oracle, prompts
from test_scoring import EVERY, brute_force, samples_for
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import DynamicCache, StaticCache

import corehead as ch
from corehead import hybrid
from corehead.ablation import Ablation
from corehead.attention import NAME, Call, Hook, hooks
from corehead.batching import collate, pad_id, to_model
from corehead.hybrid import (
    Buffer,
    HybridAttention,
    HybridLayer,
    blocks,
    stream_chunked,
    stream_flex,
)

SHAPE = (2, 6)  # layers x heads (2 KV groups) of all tiny models


def heads(*pairs) -> ch.HeadSet:
    return ch.HeadSet.of(pairs, SHAPE)


# single heads in groups that stream otherwise; a whole group in each layer; one layer that streams alone
SETS = {
    "mixed": heads((0, 1), (1, 3), (1, 4)),
    "groups": heads((0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)),
    "one group": heads((0, 3), (0, 4), (0, 5)),
    "none": heads(),
    "all": ~heads(),
}


def seen(n: int, window: int, sinks: int) -> torch.Tensor:
    """(N, N) bool by its definition, the causal part left to the model's mask."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (i - j <= window) | (j < sinks)


def pattern_of(mllm, full: ch.HeadSet, window: int, sinks: int):
    """Edits for the oracle: what a streaming head must not see."""

    def edit(layer):
        def before(logits):
            hidden = ~seen(logits.shape[-1], window, sinks)
            hidden = (
                hidden[-logits.shape[2] :] & ~torch.tensor(full.mask[layer])[:, None, None]
            )
            return logits.masked_fill(hidden, -torch.inf)

        return before, None

    return {layer: edit(layer) for layer in range(mllm.n_layers)}


def expected(mllm, tagged, *pattern) -> torch.Tensor:
    with oracle(mllm, pattern_of(mllm, *pattern)):
        return logits_of(mllm, tagged)


def text(mllm, n: int, seed: int = 0) -> ch.TaggedSample:
    """n random tokens."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 200, (1, n)))
    none = np.empty(0, np.int64)
    return ch.TaggedSample(
        dict(input_ids=ids, attention_mask=torch.ones_like(ids)),
        none,
        none,
        none,
        none,
        n - 1,
    )


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("name", SETS)
@torch.no_grad()
def test_prefill_equals_a_mask(family, name):
    mllm = tiny(family)
    [tagged] = prompts(mllm, 1)
    for window, sinks in (7, 3), (0, 0), (16, 1), (1000, 4):
        wanted = expected(mllm, tagged, SETS[name], window, sinks)
        with ch.hybrid_attention(mllm, SETS[name], window, sinks):
            close(mllm.model(**tagged.inputs, use_cache=False).logits[0], wanted)
            close(mllm.model(**tagged.inputs, use_cache=True).logits[0], wanted)


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 129, 200, 331])
@pytest.mark.parametrize(
    "window,sinks", [(0, 0), (1, 2), (5, 0), (64, 4), (65, 3), (128, 130), (500, 1)]
)
@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_lengths_that_are_no_multiple_of_anything(n, window, sinks, name):
    mllm = tiny("llama")
    tagged = text(mllm, n)
    wanted = expected(mllm, tagged, SETS[name], window, sinks)
    with ch.hybrid_attention(mllm, SETS[name], window, sinks):
        close(mllm.model(**tagged.inputs).logits[0], wanted)


@torch.no_grad()
def test_single_heads_take_no_masks_in_prefill(monkeypatch):
    """A group with heads of both kinds costs what its heads do, not a mask for each of them."""
    mllm = tiny("llama")
    tagged = text(mllm, 200)
    wanted = expected(mllm, tagged, SETS["mixed"], 9, 3)

    def refuse(*args):
        raise AssertionError("a masked path")

    monkeypatch.setattr("corehead.attention.masked_attention", refuse)
    with ch.hybrid_attention(mllm, SETS["mixed"], 9, 3):
        close(mllm.model(**tagged.inputs).logits[0], wanted)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "cuts", [(40,), (1, 2, 3, 30, 77), (13, 14, 60), (5, 5, 5, 5, 5, 70), (1,) * 20]
)
@torch.no_grad()
def test_chunked_prefill_and_decode_equal_a_mask(family, name, cuts):
    """In chunks of any length, the last ones of a single token."""
    mllm = tiny(family)
    tagged = text(mllm, 100)
    for window, sinks in (9, 3), (0, 0), (30, 12), (10**9, 2):
        wanted = expected(mllm, tagged, SETS[name], window, sinks)
        cache, found, at = None, [], 0
        with ch.hybrid_attention(mllm, SETS[name], window, sinks):
            for size in [*cuts, *[1] * 100]:
                ids = tagged.inputs["input_ids"][:, at : at + size]
                if not ids.numel():
                    break
                out = mllm.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, at = out.past_key_values, at + size
                found.append(out.logits[0])
        close(torch.cat(found), wanted)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("name", SETS)
@torch.no_grad()
def test_generate_with_padding(family, name):
    """A batch padded on the left writes what each sample writes alone, by full matrices over the whole sequence."""
    mllm = tiny(family)
    batch = prompts(mllm)
    inputs = to_model(collate(batch, pad_id(mllm)), mllm)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True)
    for window, sinks in (8, 2), (5, 0), (400, 3):
        with ch.hybrid_attention(mllm, SETS[name], window, sinks):
            found = mllm.model.generate(**inputs, **options, return_dict_in_generate=True)
        width = inputs["input_ids"].shape[1]
        for i, tagged in enumerate(batch):
            with oracle(mllm, pattern_of(mllm, SETS[name], window, sinks)):
                alone = mllm.model.generate(
                    **tagged.inputs, **options, return_dict_in_generate=True
                )
            close(torch.stack(found.logits)[:, i], torch.stack(alone.logits)[:, 0])
            assert torch.equal(
                found.sequences[i, width:], alone.sequences[0, len(tagged.ids) :]
            )


@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_padding_in_chunks_and_rows_that_have_not_begun(name):
    mllm = tiny("llama")
    lengths = (50, 9, 31)
    rows = [text(mllm, n, seed=n) for n in lengths]
    inputs = collate(rows, pad_id(mllm))
    wanted = [expected(mllm, row, SETS[name], 6, 3) for row in rows]
    for sizes in [50], [13, 20, 17], [1] * 50, [45, 5]:
        cache, found, at = None, [], 0
        with ch.hybrid_attention(mllm, SETS[name], 6, 3):
            for size in sizes:
                part = slice(at, at + size)
                positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, part]
                mask = inputs["attention_mask"][:, : at + size]
                ids = inputs["input_ids"][:, part]
                out = mllm.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                )
                cache, at = out.past_key_values, at + size
                found.append(out.logits)
        found = torch.cat(found, 1)
        assert found.isfinite().all()
        for i, n in enumerate(lengths):
            close(found[i, -n:], wanted[i])


@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_padding_on_the_right(name):
    """In the prefill, and between prompt and answer."""
    mllm = tiny("llama")
    rows = [text(mllm, n, seed=n) for n in (30, 22)]
    ids, mask = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 30, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids) - 2] = row.inputs["input_ids"][0, :-2]
        mask[i, : len(row.ids) - 2] = 1
    with ch.hybrid_attention(mllm, SETS[name], 6, 2):
        out = mllm.model(input_ids=ids, attention_mask=mask, use_cache=True)
        last = torch.cat([row.inputs["input_ids"][:, -2:] for row in rows])
        positions = torch.tensor([[28, 29], [20, 21]])
        mask = torch.cat([mask, torch.ones_like(last)], 1)
        cache = out.past_key_values
        behind = mllm.model(
            input_ids=last,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )
    for i, row in enumerate(rows):
        wanted = expected(mllm, row, SETS[name], 6, 2)
        close(out.logits[i, : len(wanted) - 2], wanted[:-2])
        close(behind.logits[i], wanted[-2:])


@pytest.mark.parametrize("name", ["mixed", "groups", "none"])
@pytest.mark.parametrize("lengths", [(30, 30), (30, 22)])
@torch.no_grad()
def test_beams_and_returned_sequences(lengths, name):
    """Over a split cache, and padded over a whole one."""
    mllm = tiny("llama")
    batch = [text(mllm, n, seed=i) for i, n in enumerate(lengths)]
    inputs = to_model(collate(batch, pad_id(mllm)), mllm)
    for options in dict(num_beams=3), dict(num_beams=4, num_return_sequences=2):
        options |= dict(max_new_tokens=8, min_new_tokens=8)
        with ch.hybrid_attention(mllm, SETS[name], 6, 2):
            found = mllm.model.generate(**inputs, **options)[
                :, inputs["input_ids"].shape[1] :
            ]
        each = len(found) // 2
        for i, tagged in enumerate(batch):
            with oracle(mllm, pattern_of(mllm, SETS[name], 6, 2)):
                alone = mllm.model.generate(**tagged.inputs, **options)[
                    :, len(tagged.ids) :
                ]
            assert torch.equal(found[each * i : each * (i + 1)], alone)


@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_batch_rows_of_a_cache_are_repeated_and_selected(name):
    mllm = tiny("llama")
    batch = [text(mllm, 40, seed=i) for i in range(2)]
    wanted = [expected(mllm, tagged, SETS[name], 6, 2) for tagged in batch]
    ids = torch.cat([tagged.inputs["input_ids"] for tagged in batch])
    with ch.hybrid_attention(mllm, SETS[name], 6, 2):
        cache = mllm.model(input_ids=ids[:, :30], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1, 3]))
        rows = [1, 0, 1]
        for part in slice(30, 31), slice(31, 36), slice(36, 40):
            out = mllm.model(input_ids=ids[rows, part], past_key_values=cache).logits
            close(out, torch.stack([wanted[row][part] for row in rows]))


@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_chunked_prefill_of_generate(name):
    mllm = tiny("qwen3")
    tagged = text(mllm, 90)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with ch.hybrid_attention(mllm, SETS[name], 10, 2):
        whole = mllm.model.generate(**tagged.inputs, **options)
        pieces = mllm.model.generate(**tagged.inputs, **options, prefill_chunk_size=32)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_bfloat16(name):
    """As near to float32 as dense bfloat16 is."""
    mllm = tiny("qwen3_vl", seed=1)
    [tagged] = prompts(mllm, 1)
    wanted = expected(mllm, tagged, SETS[name], 9, 2)
    dense = logits_of(mllm, tagged)
    half = ch.MLLM(copy.deepcopy(mllm.model).to(torch.bfloat16), mllm.processor)
    inputs = to_model(tagged.inputs, half)
    noise = (half.model(**inputs).logits[0].float() - dense).abs().mean()
    with ch.hybrid_attention(half, SETS[name], 9, 2):
        found = half.model(**inputs).logits[0]
        new = half.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert found.dtype == torch.bfloat16 and new.shape[1] == len(tagged.ids) + 4
    assert (found.float() - wanted).abs().mean() < 2 * noise


def one(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "rows,start,window,sinks",
    [(300, 44, 40, 4), (200, 170, 33, 5), (130, 209, 200, 9), (7, 1, 1, 0), (65, 3, 1, 2)],
)
@pytest.mark.parametrize("size", [1, 3])
def test_both_ways_to_stream(rows, start, window, sinks, size, monkeypatch):
    """By chunks and by FlexAttention, behind a past that lacks what nobody sees."""
    monkeypatch.setattr(hybrid, "_compiled", lambda: flex_attention)
    n, d = start + rows, 16
    q, k, v = one(2, 2 * size, rows, d), one(2, 2, n, d, seed=1), one(2, 2, n, d, seed=2)
    i, j = torch.arange(start, n)[:, None], torch.arange(n)
    mask = (j <= i) & ((i - j < window) | (j < sinks))
    logits = (q @ k.repeat_interleave(size, 1).mT * d**-0.5).masked_fill(~mask, -torch.inf)
    wanted = (logits.softmax(-1) @ v.repeat_interleave(size, 1)).transpose(1, 2)
    for first in (
        sinks,
        start - window + 1,
    ):  # of the positions behind the sinks that are there
        kept = [*range(sinks), *range(first, n)]
        call = Call(0, q, k[:, :, kept], v[:, :, kept], d**-0.5, start)
        close(stream_chunked(call, sinks, window), wanted)
        close(stream_flex(call, sinks, window), wanted)


@pytest.mark.parametrize(
    "rows,keys,sinks,window",
    [(1000, 1204, 4, 200), (515, 900, 130, 256), (300, 700, 0, 400), (129, 190, 60, 1)],
)
def test_blocks_hold_all_that_is_seen(rows, keys, sinks, window):
    """The table from positions alone is that of the mask, looked at element by element."""
    table = blocks(rows, keys, sinks, window, torch.device("cpu"))
    row, key = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    mask = table.mask_mod(0, 0, torch.arange(rows)[:, None], key)
    assert torch.equal(mask, (key <= row) & ((row - key < window) | (key < sinks)))
    wanted = create_block_mask(table.mask_mod, None, None, rows, keys, device="cpu")
    found = table.to_dense()[0, 0].bool()
    brute = wanted.to_dense()[0, 0].bool()
    assert not (brute & ~found).any()
    assert (
        found & ~brute
    ).sum() <= 1  # a block with the last sinks may be looked at in vain
    full = torch.zeros_like(found)
    for i, index in enumerate(table.full_kv_indices[0, 0]):
        full[i, index[: table.full_kv_num_blocks[0, 0, i]].long()] = True
    for i, j in full.nonzero().tolist():
        assert mask[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].all()


@pytest.mark.parametrize("sinks,recent", [(0, 1), (3, 1), (0, 5), (2, 4), (5, 90)])
@pytest.mark.parametrize("seed", range(5))
def test_a_buffer_hands_over_what_is_seen(sinks, recent, seed):
    """Whatever comes in which pieces: the sinks, all that the first new row still sees, and the new positions."""
    rng = np.random.default_rng(seed)
    keys, values = one(1, 2, 80, 3), one(1, 2, 80, 3, seed=1)
    buffer, begin = Buffer(sinks, recent), 0
    while begin < 80:
        end = min(begin + int(rng.choice([1, 1, 1, 2, 3, 7, 20])), 80)
        found = buffer.append(keys[:, :, begin:end], values[:, :, begin:end])
        needed = [p for p in range(end) if p < sinks or p > begin - recent]
        assert buffer.length == end
        for part, whole in zip(found, (keys, values)):
            if end - begin == 1:  # in any order
                rows = {tuple(row) for row in part[0, 0].tolist()}
                assert rows == {
                    tuple(row) for row in whole[0, 0, needed].tolist()
                } and part.shape[2] == len(needed)
            else:
                held = min(sinks, end)
                assert torch.equal(part[:, :, :held], whole[:, :, :held])
                behind = part.shape[2] - held
                assert torch.equal(part[:, :, held:], whole[:, :, end - behind : end])
                assert behind >= len([p for p in needed if p >= sinks])
        assert all(x.shape[2] <= sinks + recent for x in buffer.tensors)
        begin = end


@torch.no_grad()
def test_the_cache_is_freed():
    mllm = tiny("llama")
    tagged = text(mllm, 400)
    whole = mllm.model(**tagged.inputs, use_cache=True).past_key_values
    bytes_of = sum(x.nbytes for layer in whole.layers for x in (layer.keys, layer.values))
    per_token = bytes_of / 400 / 4  # of one group of one layer
    with ch.hybrid_attention(mllm, [(0, 0), (0, 1), (0, 2)], window=19, sinks=4):
        cache = mllm.model(**tagged.inputs, use_cache=True).past_key_values
        for _ in range(60):
            cache = mllm.model(
                input_ids=torch.ones(1, 1).long(), past_key_values=cache
            ).past_key_values
    layers = cache.layers
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 460
    kept = [
        {kind: buffer.tensors for kind, buffer in layer.buffers.items()} for layer in layers
    ]
    assert [tuple(tensors["streaming"][0].shape[1:3]) for tensors in kept] == [
        (1, 24),
        (2, 24),
    ]
    assert kept[0]["full"][0].shape[1] == 1 and not kept[1]["full"]
    assert layers[1].nbytes == 2 * 24 * per_token
    assert 460 * per_token <= layers[0].nbytes - 24 * per_token < 1.25 * 460 * per_token


def test_whole_groups_keep_their_budget():
    values = np.random.default_rng(0).random((4, 12))
    ranking = ch.HeadRanking(values)
    best = values.reshape(4, 4, 3).max(2)
    top = ranking.top(0.25, group=3)
    assert len(top) == 12 and top.shape == (4, 12)
    wanted = {divmod(int(i), 4) for i in best.argsort(axis=None)[::-1][:4]}
    assert {(layer, head // 3) for layer, head in top} == wanted
    with pytest.raises(ValueError, match="group=5"):
        ranking.top(0.25, group=5)


@pytest.mark.parametrize("name", ["mixed", "groups"])
@pytest.mark.parametrize("family", EVERY)
def test_evaluate_and_score_inside(family, name):
    """Batched, padded, behind a shared prefix: what each sequence gives alone; and as a condition the same."""
    mllm, full = tiny(family), SETS[name]
    samples = samples_for(mllm)
    for sample, answer in zip(samples, ["7", "at the left", "no", "yes it is", "7"]):
        sample.answer = answer
    with ch.hybrid_attention(mllm, full, 6, 2):
        inside = ch.evaluate(mllm, samples, batch_size=3, progress=False)
        scores = ch.score(mllm, samples, progress=False)
    conditions = {"intact": None, "hybrid": HybridAttention(full, 6, 2)}
    table = ch.evaluate(mllm, samples, conditions, batch_size=2, progress=False)
    for i, sample in enumerate(samples):
        tagged = mllm.tag(sample)
        logits = expected(mllm, tagged, full, 6, 2).log_softmax(-1)
        wanted = sum(float(logits[a - 1, tagged.ids[a]]) for a in tagged.answer)
        found = table[table["sample"] == sample.id].set_index("condition").logprob
        assert (
            abs(inside.logprob[i] - wanted) < 1e-4 and abs(found["hybrid"] - wanted) < 1e-4
        )
        dense = logits_of(mllm, tagged).log_softmax(-1)
        assert (
            abs(
                found["intact"]
                - sum(float(dense[a - 1, tagged.ids[a]]) for a in tagged.answer)
            )
            < 1e-4
        )
        with oracle(mllm, pattern_of(mllm, full, 6, 2)):
            rows = brute_force(mllm, tagged, implementation="reference")
        np.testing.assert_allclose(
            scores.data.evidence.isel(sample=i), rows["evidence"], atol=1e-5
        )


@pytest.mark.parametrize("name", ["mixed", "groups"])
@torch.no_grad()
def test_with_ablations(name):
    """Zeroed heads and cut edges act on top of the pattern."""
    mllm = tiny("qwen3_vl")
    [tagged] = prompts(mllm, 1)
    edited = heads((0, 1), (0, 4), (1, 2))
    masks = pattern_of(mllm, SETS[name], 20, 2)

    def cut(layer):
        def before(logits):
            logits = masks[layer][0](logits).clone()
            for h in (h for other, h in edited if other == layer):
                logits[:, h, tagged.query_tokens()[:, None], tagged.evidence] = -torch.inf
            return logits

        return before, None

    with oracle(mllm, {layer: cut(layer) for layer in range(2)}):
        wanted = logits_of(mllm, tagged)
    with (
        ch.hybrid_attention(mllm, SETS[name], 20, 2),
        ch.ablate(mllm, edited, "knockout", tagged=tagged),
    ):
        close(logits_of(mllm, tagged), wanted)
    with (
        ch.ablate(mllm, edited, "knockout", tagged=tagged),
        ch.hybrid_attention(mllm, SETS[name], 20, 2),
    ):
        close(logits_of(mllm, tagged), wanted)

    def zero(layer):
        def after(out):
            out = out.clone()
            out[:, :, [h for other, h in edited if other == layer]] = 0
            return out

        return masks[layer][0], after

    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with oracle(mllm, {layer: zero(layer) for layer in range(2)}):
        wanted = logits_of(mllm, tagged)
        written = mllm.model.generate(**tagged.inputs, **options)
    with ch.hybrid_attention(mllm, SETS[name], 20, 2), ch.ablate(mllm, edited):
        close(logits_of(mllm, tagged), wanted)
        assert torch.equal(mllm.model.generate(**tagged.inputs, **options), written)


def test_a_store_tells_conditions_apart(tmp_path):
    mllm = tiny("qwen3_vl")
    samples = samples_for(mllm)[:2]
    for sample in samples:
        sample.answer = "7"
    conditions = {w: HybridAttention(SETS["mixed"], w, 1) for w in (2, 5)} | {
        "cut": Ablation(SETS["mixed"])
    }
    options = dict(store=tmp_path / "s", progress=False)
    first = ch.evaluate(mllm, samples, conditions, **options)
    again = ch.evaluate(mllm, samples, conditions, **options, resume=True)
    assert first.equals(again) and first.logprob.nunique() == 6
    with pytest.raises(ValueError, match="a store"), ch.hybrid_attention(mllm, [], 4):
        ch.evaluate(mllm, samples, store=tmp_path / "t", progress=False)
    with pytest.raises(ValueError, match="a store"), ch.hybrid_attention(mllm, [], 4):
        ch.score(mllm, samples, store=tmp_path / "t", progress=False)
    with (
        pytest.raises(ValueError, match="in force already"),
        ch.hybrid_attention(mllm, [], 4),
    ):
        ch.evaluate(mllm, samples, conditions, progress=False)


@pytest.mark.parametrize("family", EVERY)
def test_the_model_is_what_it_was(family):
    mllm = tiny(family)
    [tagged] = prompts(mllm, 1)
    before, n_hooks = (
        logits_of(mllm, tagged),
        len(mllm.decoder._forward_pre_hooks),
    )
    implementation = mllm.text_config._attn_implementation
    with (
        pytest.raises(RuntimeError, match="boom"),
        ch.hybrid_attention(mllm, SETS["mixed"], 4),
    ):
        assert not torch.equal(logits_of(mllm, tagged), before)
        raise RuntimeError("boom")
    assert torch.equal(logits_of(mllm, tagged), before)
    assert mllm.text_config._attn_implementation == implementation != NAME
    assert len(mllm.decoder._forward_pre_hooks) == n_hooks


class Fails(Hook):
    """Stops a forward pass inside the attention function."""

    def __init__(self):
        self.failing = True

    def attend(self, call):
        if self.failing:
            raise RuntimeError("boom")


@torch.no_grad()
def test_a_pass_that_was_stopped_leaves_nothing_behind():
    mllm, hook = tiny("llama"), Fails()
    tagged = text(mllm, 30)
    wanted = expected(mllm, tagged, SETS["groups"], 6, 2)
    with hooks(mllm, {1: [hook]}), ch.hybrid_attention(mllm, SETS["groups"], 6, 2):
        cache = DynamicCache(config=mllm.text_config)
        hook.failing = False
        mllm.model(**tagged.inputs, past_key_values=cache)
        hook.failing = True
        with pytest.raises(RuntimeError, match="boom"):
            mllm.model(input_ids=tagged.inputs["input_ids"][:, :1], past_key_values=cache)
        hook.failing = False
        close(mllm.model(**tagged.inputs, use_cache=False).logits[0], wanted)


@torch.no_grad()
def test_bad_input_is_named():
    mllm = tiny("llama")
    tagged = text(mllm, 12)
    ids = tagged.inputs["input_ids"]
    for options, message in (
        (dict(window=-1), "window=-1"),
        (dict(window=4, sinks=-1), "sinks=-1"),
        (dict(full=[(9, 0)], window=4), r"head \(9, 0\) is outside"),
        (
            dict(full=ch.HeadSet.of([(0, 0)], (9, 9)), window=4),
            "9 x 9 heads, but this one has 2 x 6",
        ),
        (
            dict(full=ch.HeadSet.of([], (9, 9)), window=4),
            "9 x 9 heads, but this one has 2 x 6",
        ),
    ):
        with (
            pytest.raises(ValueError, match=message),
            ch.hybrid_attention(mllm, **dict(full=[(0, 0)]) | options),
        ):
            pass
    whole = mllm.model(input_ids=ids, use_cache=True).past_key_values
    with ch.hybrid_attention(mllm, SETS["groups"], 4):
        with pytest.raises(ValueError, match="filled outside this hybrid_attention"):
            mllm.model(input_ids=ids, past_key_values=whole)
        with pytest.raises(ValueError, match="not a StaticCache"):
            mllm.model(
                input_ids=ids,
                past_key_values=StaticCache(config=mllm.text_config, max_cache_len=20),
            )
        with (
            pytest.raises(ValueError, match="in force already"),
            ch.hybrid_attention(mllm, [], 4),
        ):
            pass
        split = mllm.model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cannot be cropped"):
            split.crop(-2)
        with (
            pytest.raises(ValueError, match="lacks keys that are to be read"),
            ch.ablate(mllm, [(0, 1)], "knockout", tagged=tagged),
        ):
            mllm.model(input_ids=ids, past_key_values=split)
        with pytest.raises(ValueError, match="lacks keys that are to be read"):
            mllm.model(
                input_ids=ids,
                attention_mask=torch.tensor([[0] * 4 + [1] * 20]),
                past_key_values=split,
            )
        for use_cache in (False, True):
            with pytest.raises(ValueError, match="four-dimensional"):
                mask = torch.ones(1, 1, 12, 12).bool().tril()
                mllm.model(input_ids=ids, attention_mask=mask, use_cache=use_cache)
        padded = mllm.model(
            input_ids=ids, attention_mask=torch.tensor([[0] * 4 + [1] * 8])
        ).past_key_values
        assert isinstance(split.layers[0], HybridLayer)
    for cache in (split, padded):
        with pytest.raises(ValueError, match="that is over"):
            mllm.model(input_ids=ids, past_key_values=cache)
        with (
            pytest.raises(ValueError, match="filled outside"),
            ch.hybrid_attention(mllm, [(0, 0)], 4),
        ):
            mllm.model(input_ids=ids, past_key_values=cache)


def test_duo_attention_files(tmp_path):
    mllm = tiny("llama")
    single = heads((0, 1), (1, 4))
    single.to_duo_attention(tmp_path, kv_heads=2, sinks=3, window=9)
    table = np.loadtxt(tmp_path / "full_attention_heads.tsv", delimiter="\t")
    assert np.array_equal(table, [[1, 0], [0, 1]])
    back = ch.from_duo_attention(tmp_path, mllm)
    assert (back.window, back.sinks) == (9, 3)
    assert back.full == SETS["groups"]
    with ch.hybrid_attention(mllm, back.full, back.window, back.sinks), torch.no_grad():
        found = logits_of(mllm, text(mllm, 40))
    close(found, expected(mllm, text(mllm, 40), SETS["groups"], 9, 3))
    np.savetxt(
        tmp_path / "full_attention_heads.tsv", [[0.9, 0.2], [0.4, 0.6]], delimiter="\t"
    )
    assert ch.from_duo_attention(tmp_path, mllm).full == back.full
    wider = ch.from_duo_attention(tmp_path, mllm, threshold=0.3).full
    assert wider - back.full == heads((1, 0), (1, 1), (1, 2))
    np.savetxt(tmp_path / "full_attention_heads.tsv", [[0.9, 0.2]], delimiter="\t")
    with pytest.raises(ValueError, match="1 x 2 KV heads, but the model has 2 x 2"):
        ch.from_duo_attention(tmp_path, mllm)
    single.to_duo_attention(tmp_path, kv_heads=2, sinks=3, window=9)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ch.from_duo_attention(tmp_path, mllm)
    with pytest.raises(ValueError, match="kv_heads=4"):
        single.to_duo_attention(tmp_path, kv_heads=4, sinks=3, window=9)
