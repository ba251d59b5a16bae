"""Head sets, rankings, their agreement and controls, against what they must be."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

import corehead as ch
from corehead import testbed
from corehead.ranking import NEAREST, agreement, chance, random_heads, universal
from corehead.runs import check_model, provenance

SHAPE = (4, 6)
KEYS = ["spearman", "kendall", "overlap", "jaccard", "corrected", "rbo"]
EVERY = set(itertools.product(range(SHAPE[0]), range(SHAPE[1])))
sets_of_heads = st.sets(st.sampled_from(sorted(EVERY)))


def none(shape=SHAPE) -> ch.HeadSet:
    return ch.HeadSet.of((), shape)


# --- head sets


def test_head_sets_are_sets():
    a, b = (
        ch.HeadSet.of([(0, 1), (1, 2), (0, 1)], (3, 4)),
        ch.HeadSet.of(np.array([[1, 2], [2, 0]]), (3, 4)),
    )
    assert (
        len(a) == 2
        and (1, 2) in a
        and np.array([1, 2]) in b
        and (0, 0) not in a
        and (9, -1) not in a
    )
    assert (
        list(a | b) == [(0, 1), (1, 2), (2, 0)]
        and list(a & b) == [(1, 2)]
        and list(a - b) == [(0, 1)]
    )
    assert a == ch.HeadSet.of([(1, 2), (0, 1)], (3, 4)) and a != b and a != {(0, 1), (1, 2)}
    assert len({a, ch.HeadSet(a.mask)}) == 1 and eval(repr(a), {"HeadSet": ch.HeadSet}) == a
    assert all(type(i) is int for head in b for i in head)  # as JSON wants them
    assert not none() and len(~none()) == 24


@given(sets_of_heads, sets_of_heads)
@settings(deadline=None)
def test_head_sets_combine_as_sets_of_pairs_do(a, b):
    x, y = ch.HeadSet.of(a, SHAPE), ch.HeadSet.of(b, SHAPE)
    for ours, theirs in ((x & y, a & b), (x | y, a | b), (x - y, a - b), (~x, EVERY - a)):
        assert isinstance(ours, ch.HeadSet) and ours.shape == SHAPE
        assert list(ours) == sorted(theirs) and len(ours) == len(theirs)
        assert all((head in ours) == (head in theirs) for head in EVERY)
    assert (x == y) == (a == b) and (a != b or hash(x) == hash(y))


def test_equal_heads_of_two_models_differ():
    a, b = ch.HeadSet.of([(0, 1)], (2, 3)), ch.HeadSet.of([(0, 1)], (3, 3))
    assert a != b and len({a, b}) == 2


def test_a_head_set_does_not_change():
    source = np.zeros((2, 3), bool)
    heads = ch.HeadSet(source)
    source[0, 0] = True
    assert not heads and heads.mask.dtype == bool
    with pytest.raises(ValueError, match="read-only"):
        heads.mask[0, 0] = True


@pytest.mark.parametrize(
    "bad", [[(0, 1), (1, 2)], np.eye(2), [True, False], [[[True]]], []]
)
def test_only_a_mask_makes_a_head_set(bad):
    with pytest.raises(ValueError, match=r"for pairs use HeadSet\.of\(pairs, shape\)"):
        ch.HeadSet(bad)


@pytest.mark.parametrize("head", [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_heads_outside_the_shape(head):
    with pytest.raises(
        ValueError,
        match=rf"head \({head[0]}, {head[1]}\) is outside a model with 2 x 3 heads",
    ):
        ch.HeadSet.of([(0, 0), head], (2, 3))


def test_check():
    ch.HeadSet.of([(1, 2)], (2, 3)).check((2, 3))
    with pytest.raises(ValueError, match="no heads: take at least one"):
        none((2, 3)).check((2, 3))
    with pytest.raises(
        ValueError,
        match=r"heads of a model with 8 x 16 heads, but this one has 12 x 16: rank the heads",
    ):
        ch.HeadSet.of([(1, 2)], (8, 16)).check((12, 16))


def test_sets_of_two_models_do_not_combine():
    a, b = ch.HeadSet.of([(0, 0)], (2, 3)), ch.HeadSet.of([(0, 0)], (3, 3))
    for combine in (a.__and__, a.__or__, a.__sub__):
        with pytest.raises(
            ValueError, match="a model with 3 x 3 heads, but this one has 2 x 3"
        ):
            combine(b)


def test_duo_attention_files(tmp_path):
    heads = ch.HeadSet.of([(0, 1), (1, 4)], (2, 6))
    heads.to_duo_attention(tmp_path / "new", kv_heads=2, sinks=3, window=9)
    table = np.loadtxt(tmp_path / "new/full_attention_heads.tsv", delimiter="\t")
    assert np.array_equal(table, [[1, 0], [0, 1]])
    assert json.loads((tmp_path / "new/config.json").read_text()) == {
        "sink_size": 3,
        "recent_size": 10,
    }
    with pytest.raises(ValueError, match="kv_heads=4: the 6 query heads"):
        heads.to_duo_attention(tmp_path, kv_heads=4, sinks=3, window=9)


# --- rankings


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.001, 1))
@settings(deadline=None)
def test_top_and_bottom(layers, heads, seed, share):
    values = np.random.default_rng(seed).normal(size=(layers, heads))
    ranking = ch.HeadRanking(values)
    top, bottom = ranking.top(share), ranking.bottom(share)
    assert ranking.shape == top.shape == bottom.shape == (layers, heads)
    assert len(top) == len(bottom) == max(1, int(share * (layers * heads) + 0.5))
    assert ranking.count(share) == len(top) and list(~none((layers, heads))) == sorted(
        map(tuple, ranking.order.tolist())
    )
    outside = [values[h] for h in ~top]
    assert not outside or min(values[h] for h in top) >= max(outside)
    if len(top) <= layers * heads // 2:
        assert not top & bottom


def test_bad_shares_and_scores():
    ranking = ch.HeadRanking(np.eye(3))
    for share in (0, -0.1, 1.1, float("nan")):
        for use in (
            ranking.top,
            lambda s: agreement(ranking, ranking, s),
            lambda s: chance(9, s),
        ):
            with pytest.raises(ValueError, match=r"\(0, 1\]"):
                use(share)
    for values in (np.ones(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite scores"):
            ch.HeadRanking(values)


def test_equal_scores_keep_the_order_of_heads():
    ranking = ch.HeadRanking([[1, 2, 1], [2, 1, 2]])
    assert ranking.order.tolist() == [[0, 1], [1, 0], [1, 2], [0, 0], [0, 2], [1, 1]]


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.floats(0.001, 1),
)
@settings(deadline=None, max_examples=50)
def test_whole_groups_keep_their_budget(layers, kv_heads, group, seed, share):
    values = np.random.default_rng(seed).random((layers, kv_heads * group))
    top = ch.HeadRanking(values).top(share, group)
    best = values.reshape(layers, kv_heads, group).max(2)
    count = max(1, int(share * best.size + 0.5))
    wanted = {divmod(int(i), kv_heads) for i in best.argsort(axis=None)[::-1][:count]}
    assert {(layer, head // group) for layer, head in top} == wanted
    assert len(top) == count * group and top.shape == values.shape


def test_bad_groups():
    ranking = ch.HeadRanking(np.zeros((4, 12)))
    for use in (
        lambda g: ranking.top(0.25, group=g),
        lambda g: random_heads(ranking, ranking.top(0.1), group=g),
    ):
        with pytest.raises(
            ValueError, match="group=5: the 12 query heads of a layer are not a multiple"
        ):
            use(5)


def test_a_saved_ranking_comes_back(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 6)) / 3
    ranking = ch.HeadRanking(
        values,
        "ram/question",
        {"model": "org/some-vl", "weights": "ab12", "options": {"n": 3}},
    )
    ranking.save(tmp_path / "heads.json")
    back = ch.HeadRanking.load(tmp_path / "heads.json")
    assert np.array_equal(back.values, values) and back.top(0.2) == ranking.top(0.2)
    assert (back.name, back.provenance) == (ranking.name, ranking.provenance)
    assert repr(back) == "HeadRanking(ram/question: 4 x 6 heads of org/some-vl)"
    card = json.loads((tmp_path / "heads.json").read_text())
    assert card["shape"] == [4, 6] and card["provenance"]["model"] == "org/some-vl"
    ch.HeadRanking(values).save(tmp_path / "bare.json")
    assert ch.HeadRanking.load(tmp_path / "bare.json").provenance == {}


def test_a_ranking_of_another_model_is_refused(tmp_path):
    mllm, path = tiny("llama"), tmp_path / "heads.json"
    ch.HeadRanking(np.eye(2, 6), "ram", provenance(mllm)).save(path)
    assert ch.HeadRanking.load(path, mllm).provenance == provenance(mllm)
    other = testbed.tiny("llama", seed=1)  # of the same shape
    with pytest.raises(
        ValueError, match=r"of tiny-llama \(torch\.float32, .*with other weights"
    ):
        ch.HeadRanking.load(path, other)
    assert ch.HeadRanking.load(path).shape == other.shape  # whoever wants to may
    ch.HeadRanking(
        np.zeros((28, 16)), "ram", {"model": "org/some-vl", "revision": "ab12"}
    ).save(path)
    with pytest.raises(
        ValueError,
        match=r"ram: 28 x 16 heads of org/some-vl@ab12\).*28 x 16 heads, but this one has 2 x 6",
    ):
        ch.HeadRanking.load(path, mllm)


@pytest.mark.parametrize(
    "changes, fits",
    [
        ({}, True),
        ({"model": "a/folder", "revision": None}, True),  # the same weights from elsewhere
        ({"weights": "0"}, False),  # trained on under its old name
        ({"weights": "0", "dtype": "torch.bfloat16"}, True),
        ({"weights": "0", "transformers": "5.0"}, True),
        ({"weights": "0", "transformers": "5.0", "revision": "cd34"}, False),
        ({"weights": "0", "transformers": "5.0", "model": "org/other"}, False),
    ],
)
def test_which_models_are_the_same(changes, fits):
    llama = tiny("llama")
    mllm = ch.MLLM(llama.model, llama.processor, source="org/some", revision="ab12")
    made_by = provenance(mllm) | changes
    check_model({}, mllm)  # of which nothing is known
    if fits:
        check_model(made_by, mllm)
    else:
        with pytest.raises(ValueError, match=r"but this model is org/some@ab12"):
            check_model(made_by, mllm)


def test_a_folder_in_another_dtype_has_no_commit_to_tell_by():
    made_by = provenance(tiny("llama")) | {"weights": "0", "dtype": "torch.bfloat16"}
    with pytest.raises(ValueError, match=r"torch\.bfloat16, 0.*torch\.float32"):
        check_model(made_by, tiny("llama"))


# as retrieval_head_detection.py of nightdessert/Retrieval_Head writes it: one line, every head, a score a detection
HEAD_SCORES = {"0-0": [0, 0.25], "0-1": [0.5, 0.75], "1-0": [0, 0], "1-1": [1, 0.5]}


def test_head_scores_of_retrieval_head(tmp_path):
    path = tmp_path / "llama-2-7b-80k.json"
    path.write_text(json.dumps(HEAD_SCORES))
    ranking = ch.HeadRanking.load(path)
    assert ranking.values.tolist() == [[0.125, 0.625], [0, 0.75]]
    assert repr(ranking) == "HeadRanking(llama-2-7b-80k: 2 x 2 heads of an unnamed model)"
    with pytest.raises(ValueError, match="2 x 2 heads, but this one has 2 x 6"):
        ch.HeadRanking.load(path, tiny("llama"))
    values = np.random.default_rng(0).normal(size=(12, 11))
    ch.HeadRanking(values, "ram").to_retrieval_head(path)
    assert np.array_equal(ch.HeadRanking.load(path).values, values)
    # what those who use such files do with them: the first line, lists to average, heads in order
    lists = json.loads(path.read_text().split("\n")[0])
    assert list(lists) == [f"{layer}-{head}" for layer, head in np.ndindex(12, 11)]
    assert lists["10-2"] == [values[10, 2]]


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda lists: lists.pop("0-1"), r"no score for head \(0, 1\)"),
        (lambda lists: lists.update({"99999-99999": [0]}), r"no score for head \(0, 2\)"),
        (lambda lists: lists.update({"L1-0": [0]}), "key 'L1-0' is not layer-head"),
        (lambda lists: lists.update({"-1-0": [0]}), "key '-1-0' is not layer-head"),
        (lambda lists: lists.update({"0-0-0": [0]}), "key '0-0-0' is not layer-head"),
        (lambda lists: lists.update({"1-1": [None]}), "unsupported operand"),
        (lambda lists: lists.update({"1-1": [math.nan]}), "finite scores"),
        (lambda lists: lists.clear(), "zero-size"),
    ],
)
def test_bad_head_scores(tmp_path, change, problem):
    lists = dict(HEAD_SCORES)
    change(lists)
    (tmp_path / "scores.json").write_text(json.dumps(lists))
    with pytest.raises(
        ValueError, match=rf"scores\.json is not a ranking of heads .*{problem}"
    ):
        ch.HeadRanking.load(tmp_path / "scores.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("values"),
        lambda card: card.pop("shape"),
        lambda card: card.update(shape=[6, 5]),
        lambda card: card.update(shape=[6, 4]),  # as many heads, in other layers
        lambda card: card.update(values=[[None] * 6] * 4),
        lambda card: card.update(values=[[1.0], [1.0, 2.0]]),
    ],
)
def test_a_file_that_is_not_a_ranking(tmp_path, change):
    path = tmp_path / "heads.json"
    ch.HeadRanking(np.zeros((4, 6))).save(path)
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))
    with pytest.raises(
        ValueError, match=r"heads\.json is not a ranking of heads .*HeadRanking\.save"
    ):
        ch.HeadRanking.load(path)


def test_files_that_hold_something_else(tmp_path):
    path = tmp_path / "heads.json"
    for text in ("", "{", "[1, 2]", '"text"', "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a ranking of heads"):
            ch.HeadRanking.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ch.HeadRanking.load(tmp_path / "nowhere.json")


# --- random heads


@given(sets_of_heads, st.integers(0, 2**31), st.sampled_from([None, "layer"]))
@settings(deadline=None)
def test_random_heads_are_others_and_as_many(heads, seed, match):
    assume(1 <= len(heads) <= math.prod(SHAPE) // 2)
    ranking, like = ch.HeadRanking(np.zeros(SHAPE)), ch.HeadSet.of(heads, SHAPE)
    drawn = random_heads(ranking, like, seed, match)
    assert not drawn & like and len(drawn) == len(like) and drawn.shape == SHAPE
    assert drawn == random_heads(ranking, like, seed, match)
    wanted, got = like.mask.sum(1), drawn.mask.sum(1)
    room = SHAPE[1] - wanted
    if match == "layer":
        assert (got >= np.minimum(wanted, room)).all()
        if (wanted <= room).all():
            assert (got == wanted).all()
    choice = room.sum() > len(like)
    if match == "layer":
        choice = (wanted <= room).all() and ((wanted > 0) & (wanted < room)).any()
    if (
        choice
    ):  # there are at least two ways to draw: 60 equal draws have a chance of at most 2^-59
        assert len({random_heads(ranking, like, s, match) for s in range(60)}) > 1


@pytest.mark.parametrize("seed", range(5))
def test_heads_of_like_scores_are_as_many_when_few_are_left(seed):
    scores = np.random.default_rng(seed).random((4, 4))
    ranking = ch.HeadRanking(scores)
    like = ranking.top(0.5)
    drawn = random_heads(ranking, like, seed, match=scores)
    assert drawn == ~like
    scores[next(iter(like))] = np.nan
    with pytest.raises(ValueError, match="not all finite"):
        random_heads(ranking, like, seed, match=scores)


def test_what_a_layer_cannot_give_comes_from_the_nearest():
    ranking = ch.HeadRanking(np.zeros((6, 4)))

    def layers(like, seed):
        return (
            random_heads(ranking, ch.HeadSet.of(like, (6, 4)), seed, "layer")
            .mask.sum(1)
            .tolist()
        )

    full = list(itertools.product([2], range(4)))
    drawn = [layers(full, seed) for seed in range(50)]
    assert all(d[0] == d[2] == d[4] == d[5] == 0 for d in drawn)
    assert {d[1] for d in drawn} >= {1, 2, 3}  # layers 1 and 3 are as near
    # layer 1 gives what it owes first, and then has none left for layer 0
    edge = [*itertools.product([0], range(4)), (1, 0), (1, 1)]
    assert [layers(edge, seed) for seed in range(20)] == [[0, 2, 4, 0, 0, 0]] * 20


def test_random_heads_of_a_score_are_like_those_they_stand_for():
    scores = np.random.default_rng(0).random((8, 10))
    ranking = ch.HeadRanking(np.zeros((8, 10)))
    like = ch.HeadSet(scores > 0.9)
    drawn = [random_heads(ranking, like, seed, scores) for seed in range(50)]
    assert all(len(d) == len(like) and not d & like for d in drawn) and len(set(drawn)) > 1
    free = np.sort(scores[~like.mask])[::-1]
    # at worst the others took the nearest first
    least = free[len(like) + NEAREST - 1]
    assert all((scores[d.mask] >= least).all() for d in drawn)
    # one head: any of the nearest, and no other
    one = ch.HeadSet.of([(3, 4)], (8, 10))
    near = {next(iter(random_heads(ranking, one, seed, scores))) for seed in range(200)}
    distance = np.abs(scores - scores[3, 4])
    expected = np.argsort(distance, axis=None)[1 : NEAREST + 1]
    assert near == {tuple(map(int, np.unravel_index(i, (8, 10)))) for i in expected}
    with pytest.raises(ValueError, match="8 x 10"):
        random_heads(ranking, like, 0, scores[:4])
    with pytest.raises(ValueError, match="scores match heads, not groups"):
        random_heads(ranking, like, 0, scores, group=2)


def test_random_heads_are_uniform():
    ranking, like = (
        ch.HeadRanking(np.zeros((3, 4))),
        ch.HeadSet.of([(0, 0), (1, 1)], (3, 4)),
    )
    for match, expected in (
        (None, np.full((3, 4), 2 / 10)),
        ("layer", np.array([[1 / 3], [1 / 3], [0]]) * np.ones(4)),
    ):
        expected[0, 0] = expected[1, 1] = 0
        counts = sum(
            random_heads(ranking, like, seed, match).mask.astype(int)
            for seed in range(2000)
        )
        assert (np.abs(counts / 2000 - expected) < 0.05).all() and not counts[
            expected == 0
        ].any()


def test_random_heads_are_the_same_draws_as_ever():
    """Result tables depend on them."""
    ranking = ch.HeadRanking(np.random.default_rng(0).random((6, 4)))
    top = ranking.top(0.25)
    assert list(top) == [(1, 0), (1, 1), (2, 1), (2, 2), (3, 0), (4, 0)]
    assert [list(random_heads(ranking, top, seed)) for seed in (0, 1)] == [
        [(0, 0), (0, 2), (0, 3), (1, 2), (3, 3), (4, 2)],
        [(0, 1), (2, 3), (3, 3), (4, 1), (4, 2), (5, 1)],
    ]
    assert list(random_heads(ranking, top, 0, "layer")) == [
        (1, 2),
        (1, 3),
        (2, 0),
        (2, 3),
        (3, 3),
        (4, 2),
    ]
    edge = ch.HeadSet.of(
        [*itertools.product([2], range(4)), (1, 0), (1, 1), (1, 2)], (6, 4)
    )
    assert list(random_heads(ranking, edge, 5, "layer")) == [
        (0, 1),
        (0, 3),
        (1, 3),
        (3, 0),
        (3, 1),
        (3, 2),
        (3, 3),
    ]


@pytest.mark.parametrize("match", [None, "layer"])
def test_random_groups_are_whole_and_others(match):
    ranking = ch.HeadRanking(np.random.default_rng(0).random((4, 12)))
    like = ranking.top(0.25, group=3)
    seen = set()
    for seed in range(20):
        drawn = random_heads(ranking, like, seed, match, group=3)
        whole = drawn.mask.reshape(4, 4, 3)
        assert (
            (whole.any(2) == whole.all(2)).all()
            and not drawn & like
            and len(drawn) == len(like)
        )
        seen.add(drawn)
    assert len(seen) > 1
    single = ch.HeadSet.of([(0, 0), (0, 5)], (4, 12))  # in two groups
    assert len(random_heads(ranking, single, 0, match, group=3)) == 6


def test_bad_random_heads():
    ranking = ch.HeadRanking(np.zeros((2, 3)))
    all_but = ch.HeadSet.of(ranking.order[2:], (2, 3))
    with pytest.raises(ValueError, match="no heads"):
        random_heads(ranking, none((2, 3)))
    with pytest.raises(ValueError, match="8 x 16 heads, but this one has 2 x 3"):
        random_heads(ranking, ch.HeadSet.of([(0, 0)], (8, 16)))
    with pytest.raises(
        ValueError, match="4 of 6 heads leave 2 to draw from: take at most half"
    ):
        random_heads(ranking, all_but)
    with pytest.raises(ValueError, match="match='layers': take None or 'layer'"):
        random_heads(ranking, ch.HeadSet.of([(0, 0)], (2, 3)), match="layers")


# --- agreement


def literal_rbo(a: list, b: list, p: float) -> float:
    """Rank-biased overlap from two lists of items, beyond their end with agreement 1."""
    total = 0.0
    for d in range(1, len(a) + 1):
        common = 0
        for item in a[:d]:
            common += item in b[:d]
        total += (1 - p) * p ** (d - 1) * common / d
    return total + p ** len(a)


@pytest.mark.parametrize("ties", [False, True])
def test_agreement_is_what_pairs_of_rankings_give(ties):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 1, 5, 6)), rng.normal(size=(4, 5, 6))
    if ties:
        a, b = a.round(), b.round()
    out = agreement(a, b, share=0.2)
    assert list(out) == KEYS and all(v.shape == (3, 4) for v in out.values())
    for i, j in np.ndindex(3, 4):
        x, y = a[i, 0], b[j]
        ranks = ch.HeadRanking(x), ch.HeadRanking(y)
        tops = [r.top(0.2) for r in ranks]
        k, common = 6, len(tops[0] & tops[1])
        assert out["spearman"][i, j] == pytest.approx(
            spearmanr(x.ravel(), y.ravel()).statistic
        )
        assert out["kendall"][i, j] == pytest.approx(
            kendalltau(x.ravel(), y.ravel()).statistic
        )
        assert out["overlap"][i, j] == common / k
        assert out["jaccard"][i, j] == pytest.approx(common / len(tops[0] | tops[1]))
        assert out["corrected"][i, j] == pytest.approx((common / k - 0.2) / 0.8)
        orders = [list(map(tuple, r.order.tolist())) for r in ranks]
        assert out["rbo"][i, j] == pytest.approx(literal_rbo(*orders, p=1 - 1 / k))
        single = agreement(*ranks, share=0.2)
        assert all(
            np.ndim(v) == 0 and v == pytest.approx(out[name][i, j])
            for name, v in single.items()
        )
        assert agreement(x, xr.DataArray(y), 0.2) == single


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 2**31), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_agreement_of_a_ranking_with_itself_and_its_reverse(layers, heads, seed, share):
    values = np.random.default_rng(seed).permutation(layers * heads).reshape(layers, heads)
    same, other = (
        agreement(values, 3.0 * values + 1, share),
        agreement(values, -values, share),
    )
    corrects = ch.HeadRanking(values).count(share) < layers * heads
    for name, value in same.items():
        assert (
            value == pytest.approx(1)
            if corrects or name != "corrected"
            else np.isnan(value)
        )
    assert other["spearman"] == pytest.approx(-1) and other["kendall"] == pytest.approx(-1)
    assert 0 < other["rbo"] < 1 and other["overlap"] <= 1


def test_rbo_looks_as_deep_as_the_top():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 40))
    orders = [np.argsort(-x[0]).tolist() for x in (a, b)]
    for share, p in ((0.5, 0.95), (0.25, 0.9), (0.05, 0.5), (0.025, 0.5)):
        assert agreement(a, b, share)["rbo"] == pytest.approx(literal_rbo(*orders, p))


@pytest.mark.filterwarnings("error")
def test_constant_scores_have_no_correlation():
    out = agreement(np.ones((2, 3)), np.arange(6.0).reshape(2, 3), share=0.34)
    assert np.isnan(out["spearman"]) and np.isnan(out["kendall"]) and out["overlap"] == 0
    assert np.isnan(agreement(np.eye(2), np.eye(2), share=1)["corrected"])


def test_bad_agreement():
    good = np.arange(6.0).reshape(2, 3)
    for bad in (good[0], np.where(good == 0, np.nan, good)):
        with pytest.raises(
            ValueError, match=r"finite scores of shape \(\.\.\., layers, heads\)"
        ):
            agreement(good, bad)
    with pytest.raises(ValueError, match="3 x 2 heads, but this one has 2 x 3"):
        agreement(good, good.T)
    with pytest.raises(ValueError, match="at least 2 heads"):
        chance(1, 0.5)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_chance_is_the_mean_over_random_rankings(share):
    rng, n, repeats = np.random.default_rng(1), 20, 4000
    a, b = rng.random((2, repeats, 4, 5))
    found, expected = agreement(a, b, share), chance(n, share)
    assert list(expected) == KEYS
    for name, values in found.items():
        assert abs(values.mean() - expected[name]) < 4 * values.std() / repeats**0.5, name


def test_chance_by_counting():
    """All 4! orders of four heads against one."""
    one = np.arange(4.0)[None]
    every = np.array(list(itertools.permutations(range(4))), float)[:, None]
    for share in (0.25, 0.5, 0.75):
        found, expected = agreement(one, every, share), chance(4, share)
        assert {k: v.mean() for k, v in found.items()} == pytest.approx(expected, abs=1e-12)
    assert np.isnan(chance(4, 1)["corrected"]) and chance(4, 1)["jaccard"] == pytest.approx(
        1
    )


# --- universal heads


def test_universal():
    first, second = np.zeros((2, 3)), np.zeros((2, 3))
    first[1, 2], first[0, 1] = 2, 1
    second[1, 2], second[0, 0] = 1, 2
    table = universal({"image": xr.DataArray(first), "text": second}, 1 / 3)
    expected = pd.DataFrame(
        {
            "layer": [1, 0, 0],
            "head": [2, 0, 1],
            "image": [True, False, True],
            "text": [True, True, False],
            "domains": [2, 1, 1],
        }
    )
    pd.testing.assert_frame_equal(table, expected)
    assert len(universal({"image": first}, 1)) == 6


@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.05, 1))
@settings(deadline=None, max_examples=30)
def test_universal_counts_domains(seed, domains, share):
    values = np.random.default_rng(seed).normal(size=(domains, 3, 4))
    table = universal({f"d{i}": v for i, v in enumerate(values)}, share)
    tops = [ch.HeadRanking(v).top(share) for v in values]
    assert {(r.layer, r.head): r.domains for r in table.itertuples()} == {
        head: sum(head in top for top in tops) for head in set().union(*tops)
    }
    assert list(map(tuple, table[["domains", "layer", "head"]].values)) == sorted(
        map(tuple, table[["domains", "layer", "head"]].values),
        key=lambda r: (-r[0], r[1], r[2]),
    )


def test_bad_universal():
    with pytest.raises(ValueError, match="3 x 2 heads, but this one has 2 x 3"):
        universal({"a": np.zeros((2, 3)), "b": np.zeros((3, 2))}, 0.5)
    with pytest.raises(ValueError, match="no scores: give those of one domain at least"):
        universal({}, 0.5)
