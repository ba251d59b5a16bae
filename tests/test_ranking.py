"""Head sets, rankings, their agreement and controls, against what they must be."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

import corehead as ch
from corehead.ranking import agreement, chance, random_heads, resample_means, split_halves, universal

SHAPE = (4, 6)
KEYS = ["spearman", "kendall", "overlap", "jaccard", "corrected", "rbo"]
sets_of_heads = st.sets(st.tuples(st.integers(0, SHAPE[0] - 1), st.integers(0, SHAPE[1] - 1)))


def test_head_sets_are_sets():
    a, b = ch.HeadSet([(0, 1), (1, 2), (0, 1)]), ch.HeadSet(np.array([[1, 2], [2, 0]]))
    assert len(a) == 2 and (1, 2) in a and np.array([1, 2]) in b
    assert list(a | b) == [(0, 1), (1, 2), (2, 0)] and list(a & b) == [(1, 2)] and list(a - b) == [(0, 1)]
    assert isinstance(a | b, ch.HeadSet) and a == ch.HeadSet([(1, 2), (0, 1)]) and len({a, ch.HeadSet(a)}) == 1
    assert a.mask((2, 3)).tolist() == [[False, True, False], [False, False, True]]


@given(sets_of_heads, sets_of_heads, st.sampled_from([(SHAPE, SHAPE), (SHAPE, None), (None, SHAPE), (None, None)]))
@settings(deadline=None)
def test_what_is_combined_keeps_the_shape(a, b, shapes):
    x, y = ch.HeadSet(a, shapes[0]), ch.HeadSet(b, shapes[1])
    known = SHAPE if SHAPE in shapes else None
    for ours, theirs in ((x & y, a & b), (x | y, a | b), (x - y, a - b), (x ^ y, a ^ b)):
        assert set(ours) == theirs and ours.shape == known and isinstance(ours, ch.HeadSet)
    for ours, theirs in ((x & b, a & b), (a | y, a | b), (a - y, a - b), (x ^ b, a ^ b)):
        assert set(ours) == theirs and ours.shape in shapes


def test_equality_ignores_the_shape():
    plain, shaped = ch.HeadSet([(0, 1)]), ch.HeadSet([(0, 1)], (2, 3))
    assert plain == shaped and hash(plain) == hash(shaped) and shaped != ch.HeadSet([(0, 2)], (2, 3))


def test_shape_gives_the_mask():
    heads = ch.HeadSet([(0, 1)], (2, 3))
    assert heads.shape == (2, 3) and heads.mask().tolist() == [[False, True, False], [False] * 3]
    assert heads.mask((1, 2)).tolist() == [[False, True]]
    with pytest.raises(ValueError, match="know no model: give the shape"):
        ch.HeadSet([(0, 1)]).mask()
    with pytest.raises(ValueError, match=r"head \(0, 1\) is outside a model with 3 x 1 heads"):
        heads.mask((3, 1))


@pytest.mark.parametrize("head", [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_heads_outside_the_shape(head):
    with pytest.raises(ValueError, match=rf"head \({head[0]}, {head[1]}\) is outside a model with 2 x 3 heads"):
        ch.HeadSet([(0, 0), head], (2, 3))
    with pytest.raises(ValueError, match=rf"head \({head[0]}, {head[1]}\) is outside a model with 2 x 3 heads"):
        ch.HeadSet([head]).check((2, 3))


def test_check():
    ch.HeadSet([(1, 2)]).check((2, 3))
    ch.HeadSet([(1, 2)], (2, 3)).check((2, 3))
    with pytest.raises(ValueError, match="no heads: take at least one"):
        ch.HeadSet(shape=(2, 3)).check((2, 3))
    with pytest.raises(
        ValueError, match=r"heads of a model with 8 x 16 heads, but this one has 12 x 16: rank the heads"
    ):
        ch.HeadSet([(1, 2)], (8, 16)).check((12, 16))


def test_sets_of_two_models_do_not_combine():
    a, b = ch.HeadSet([(0, 0)], (2, 3)), ch.HeadSet([(0, 0)], (3, 3))
    for combine in (a.__and__, a.__or__, a.__sub__, a.__xor__):
        with pytest.raises(ValueError, match="a model with 2 x 3 heads and of one with 3 x 3"):
            combine(b)
    with pytest.raises(ValueError, match=r"head \(5, 0\) is outside"):
        a | {(5, 0)}


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.001, 1))
@settings(deadline=None)
def test_top_and_bottom(layers, heads, seed, share):
    values = np.random.default_rng(seed).normal(size=(layers, heads))
    ranking = ch.HeadRanking(values)
    top, bottom = ranking.top(share), ranking.bottom(share)
    assert ranking.shape == top.shape == bottom.shape == (layers, heads)
    assert len(top) == len(bottom) == max(1, int(share * (layers * heads) + 0.5))
    outside = [values[h] for h in ch.HeadSet(ranking.order) - top]
    assert not outside or min(values[h] for h in top) >= max(outside)
    if len(top) <= layers * heads // 2:
        assert not top & bottom


def test_bad_shares_and_scores():
    ranking = ch.HeadRanking(np.eye(3))
    for share in (0, -0.1, 1.1, float("nan")):
        for use in (ranking.top, lambda s: agreement(ranking, ranking, s), lambda s: chance(9, s)):
            with pytest.raises(ValueError, match=r"\(0, 1\]"):
                use(share)
    for values in (np.ones(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite scores"):
            ch.HeadRanking(values)


def test_rho():
    assert ch.heads_for_share(np.ones((2, 5))) == 0.5
    assert ch.heads_for_share(np.eye(10)[:1].reshape(2, 5)) == 0.1
    assert ch.heads_for_share(np.array([[4.0, 1, 1, -9]])) == 0.25
    assert np.isnan(ch.heads_for_share(np.zeros((2, 2))))
    assert ch.heads_for_share(np.stack([np.ones((2, 5)), np.eye(10)[:1].reshape(2, 5)])).tolist() == [0.5, 0.1]


# --- random heads


@given(sets_of_heads, st.integers(0, 2**31), st.sampled_from([None, "layer"]))
@settings(deadline=None)
def test_random_heads_are_others_and_as_many(heads, seed, match):
    assume(1 <= len(heads) <= math.prod(SHAPE) // 2)
    ranking, like = ch.HeadRanking(np.zeros(SHAPE)), ch.HeadSet(heads)
    drawn = random_heads(ranking, like, seed, match)
    assert drawn.isdisjoint(like) and len(drawn) == len(like) and drawn.shape == SHAPE
    assert drawn == random_heads(ranking, like, seed, match)
    wanted, got = like.mask(SHAPE).sum(1), drawn.mask().sum(1)
    room = SHAPE[1] - wanted
    if match == "layer":
        assert (got >= np.minimum(wanted, room)).all()
        if (wanted <= room).all():
            assert (got == wanted).all()
    choice = room.sum() > len(like)
    if match == "layer":
        choice = (wanted <= room).all() and ((wanted > 0) & (wanted < room)).any()
    if choice:  # there are at least two ways to draw: 60 equal draws have a chance of at most 2^-59
        assert len({random_heads(ranking, like, s, match) for s in range(60)}) > 1


def test_what_a_layer_cannot_give_comes_from_the_nearest():
    ranking = ch.HeadRanking(np.zeros((6, 4)))

    def layers(like, seed):
        return random_heads(ranking, ch.HeadSet(like), seed, "layer").mask().sum(1).tolist()

    full = list(itertools.product([2], range(4)))
    drawn = [layers(full, seed) for seed in range(50)]
    assert all(d[0] == d[2] == d[4] == d[5] == 0 for d in drawn)
    assert {d[1] for d in drawn} >= {1, 2, 3}  # layers 1 and 3 are as near
    # layer 1 gives what it owes first, and then has none left for layer 0
    edge = [*itertools.product([0], range(4)), (1, 0), (1, 1)]
    assert [layers(edge, seed) for seed in range(20)] == [[0, 2, 4, 0, 0, 0]] * 20


def test_random_heads_are_uniform():
    ranking, like = ch.HeadRanking(np.zeros((3, 4))), ch.HeadSet([(0, 0), (1, 1)])
    for match, expected in ((None, np.full((3, 4), 2 / 10)), ("layer", np.array([[1 / 3], [1 / 3], [0]]) * np.ones(4))):
        expected[0, 0] = expected[1, 1] = 0
        counts = sum(random_heads(ranking, like, seed, match).mask().astype(int) for seed in range(2000))
        assert (np.abs(counts / 2000 - expected) < 0.05).all() and not counts[expected == 0].any()


def test_bad_random_heads():
    ranking = ch.HeadRanking(np.zeros((2, 3)))
    all_but = ch.HeadSet(ranking.order[2:])
    with pytest.raises(ValueError, match="no heads"):
        random_heads(ranking, ch.HeadSet())
    with pytest.raises(ValueError, match="8 x 16 heads, but this one has 2 x 3"):
        random_heads(ranking, ch.HeadSet([(0, 0)], (8, 16)))
    with pytest.raises(ValueError, match="outside a model with 2 x 3 heads"):
        random_heads(ranking, ch.HeadSet([(2, 0)]))
    with pytest.raises(ValueError, match="4 of 6 heads leave 2 to draw from: take at most half"):
        random_heads(ranking, all_but)
    with pytest.raises(ValueError, match="match='layers': take None or 'layer'"):
        random_heads(ranking, ch.HeadSet([(0, 0)]), match="layers")


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
        assert out["spearman"][i, j] == pytest.approx(spearmanr(x.ravel(), y.ravel()).statistic)
        assert out["kendall"][i, j] == pytest.approx(kendalltau(x.ravel(), y.ravel()).statistic)
        assert out["overlap"][i, j] == common / k
        assert out["jaccard"][i, j] == pytest.approx(common / len(tops[0] | tops[1]))
        assert out["corrected"][i, j] == pytest.approx((common / k - 0.2) / 0.8)
        orders = [list(map(tuple, r.order.tolist())) for r in ranks]
        assert out["rbo"][i, j] == pytest.approx(literal_rbo(*orders, p=1 - 1 / k))
        single = agreement(*ranks, share=0.2)
        assert all(np.ndim(v) == 0 and v == pytest.approx(out[name][i, j]) for name, v in single.items())
        assert agreement(x, xr.DataArray(y), 0.2, persistence=0.3)["rbo"] == pytest.approx(literal_rbo(*orders, p=0.3))


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 2**31), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_agreement_of_a_ranking_with_itself_and_its_reverse(layers, heads, seed, share):
    values = np.random.default_rng(seed).permutation(layers * heads).reshape(layers, heads)
    same, other = agreement(values, 3.0 * values + 1, share), agreement(values, -values, share)
    corrects = ch.HeadRanking(values).count(share) < layers * heads
    for name, value in same.items():
        assert value == pytest.approx(1) if corrects or name != "corrected" else np.isnan(value)
    assert other["spearman"] == pytest.approx(-1) and other["kendall"] == pytest.approx(-1)
    assert 0 < other["rbo"] < 1 and other["overlap"] <= 1


def test_default_persistence_follows_k():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 40))
    for share, p in ((0.5, 0.95), (0.25, 0.9), (0.05, 0.5), (0.025, 0.5)):
        assert agreement(a[None], b[None], share)["rbo"] == agreement(a[None], b[None], share, p)["rbo"]


def test_constant_scores_have_no_correlation():
    out = agreement(np.ones((2, 3)), np.arange(6.0).reshape(2, 3), share=0.34)
    assert np.isnan(out["spearman"]) and np.isnan(out["kendall"]) and out["overlap"] == 0


def test_bad_agreement():
    good = np.arange(6.0).reshape(2, 3)
    for bad in (good[0], np.where(good == 0, np.nan, good)):
        with pytest.raises(ValueError, match=r"finite scores of shape \(\.\.\., layers, heads\)"):
            agreement(good, bad)
    with pytest.raises(ValueError, match="2 x 3 and of 3 x 2 heads"):
        agreement(good, good.T)
    for p in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"persistence=.*\(0, 1\)"):
            agreement(good, good, persistence=p)
    with pytest.raises(ValueError, match="at least 2 heads"):
        chance(1, 0.5)


@pytest.mark.parametrize("share, persistence", [(0.2, None), (0.5, 0.8)])
def test_chance_is_the_mean_over_random_rankings(share, persistence):
    rng, n, repeats = np.random.default_rng(1), 20, 4000
    a, b = rng.random((2, repeats, 4, 5))
    found, expected = agreement(a, b, share, persistence), chance(n, share, persistence)
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
    assert np.isnan(chance(4, 1)["corrected"]) and chance(4, 1)["jaccard"] == pytest.approx(1)


# --- resampling


def test_resample_means_draws_with_replacement():
    n, resamples = 12, 300
    for size in (None, 5):
        # each sample marks its own head, so that the means count how often it was drawn
        draws = size or n
        counts = draws * resample_means(np.eye(n).reshape(n, 3, 4), resamples, 1, size).reshape(resamples, n)
        assert np.allclose(counts, counts.round()) and np.allclose(counts.sum(1), draws)
        assert counts.max() > 1.5 and abs(counts.mean(0) - draws / n).max() < 0.3
    values = np.random.default_rng(0).normal(size=(n, 2, 3))
    means = resample_means(values, 4000)
    assert means.shape == (4000, 2, 3) and np.allclose(means.mean(0), values.mean(0), atol=0.03)
    assert np.allclose(means.std(0), values.std(0) / n**0.5, rtol=0.1)
    assert np.array_equal(means, resample_means(xr.DataArray(values), 4000))
    assert not np.array_equal(means, resample_means(values, 4000, seed=1))


def test_resample_means_draws_whole_groups():
    groups = np.array(list("aabcccdaab"))
    n, resamples = len(groups), 200
    shares = resample_means(np.eye(n)[:, None], resamples, groups=groups)[:, 0]  # (resamples, n)
    members = [groups == g for g in "abcd"]
    for row in shares:
        assert all(np.ptp(row[m]) < 1e-12 for m in members)
        draws = np.array([row[m][0] for m in members])
        draws *= 4 / draws.sum()  # four groups are drawn
        assert np.allclose(draws, draws.round())
    one = resample_means(np.eye(n)[:, None], 50, size=1, groups=groups)[:, 0]
    assert {tuple(np.flatnonzero(row)) for row in one} == {tuple(np.flatnonzero(m)) for m in members}


@given(st.integers(2, 30), st.integers(0, 2**31), st.data())
@settings(deadline=None, max_examples=50)
def test_halves_are_disjoint(n, seed, data):
    size = data.draw(st.none() | st.integers(1, n // 2))
    a, b = split_halves(np.eye(n)[:, None], 20, seed, size)
    size = n // 2 if size is None else size
    assert a.shape == b.shape == (20, 1, n) and np.allclose(a * size, (a * size).round())
    assert np.allclose(a.sum(-1), 1) and np.allclose(b.sum(-1), 1) and not (a * b).any()


def test_halves_are_random():
    values = np.random.default_rng(0).normal(size=(20, 2, 3))
    a, b = split_halves(values)
    assert len(a) == 200 and len(np.unique(a[:, 0, 0])) > 150
    assert np.allclose((a + b) / 2, values.mean(0)) and np.allclose(a.mean(0), values.mean(0), atol=0.1)
    assert np.array_equal(a, split_halves(values)[0]) and not np.array_equal(a, split_halves(values, seed=1)[0])


def test_bad_resampling():
    values = np.random.default_rng(0).normal(size=(10, 2, 3))
    holes = values.copy()
    holes[[1, 4], 0] = np.nan
    for use in (resample_means, split_halves):
        with pytest.raises(ValueError, match=r"too few samples \(1\), take at least 2"):
            use(values[:1])
        with pytest.raises(ValueError, match="2 of 10 samples have NaN or Inf, drop these samples"):
            use(holes)
    with pytest.raises(ValueError, match="one group, take at least 2 groups"):
        resample_means(values, groups=["a"] * 10)
    for labels in ([0, 1], [0, 1] * 4 + [None, 0]):
        with pytest.raises(ValueError, match=r"one label a sample \(10 of them, none missing\)"):
            resample_means(values, groups=labels)
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"size={size}: draw 1 to 10 samples"):
            resample_means(values, size=size)
    with pytest.raises(ValueError, match="size=3: draw 1 to 2 groups"):
        resample_means(values, size=3, groups=[0, 1] * 5)
    with pytest.raises(ValueError, match="size=6: two disjoint subsets would take 12 of 10 samples, take 1 to 5"):
        split_halves(values, size=6)


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
        map(tuple, table[["domains", "layer", "head"]].values), key=lambda r: (-r[0], r[1], r[2])
    )


def test_bad_universal():
    with pytest.raises(ValueError, match="scores of 2 x 3 and 3 x 2 heads: give those of one model"):
        universal({"a": np.zeros((2, 3)), "b": np.zeros((3, 2))}, 0.5)
    with pytest.raises(ValueError, match="scores of no heads"):
        universal({}, 0.5)
