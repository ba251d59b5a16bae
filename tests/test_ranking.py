"""Head sets, rankings, rho and intervals against what they must be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import corehead as ch
from corehead.stats import mean_interval, proportion_interval


def test_head_sets_are_sets():
    a, b = ch.HeadSet([(0, 1), (1, 2), (0, 1)]), ch.HeadSet(np.array([[1, 2], [2, 0]]))
    assert len(a) == 2 and (1, 2) in a and np.array([1, 2]) in b
    assert list(a | b) == [(0, 1), (1, 2), (2, 0)] and list(a & b) == [(1, 2)] and list(a - b) == [(0, 1)]
    assert isinstance(a | b, ch.HeadSet) and a == ch.HeadSet([(1, 2), (0, 1)]) and len({a, ch.HeadSet(a)}) == 1
    assert a.mask((2, 3)).tolist() == [[False, True, False], [False, False, True]]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.001, 1))
def test_top_and_bottom(layers, heads, seed, share):
    values = np.random.default_rng(seed).normal(size=(layers, heads))
    ranking = ch.HeadRanking(values)
    top, bottom = ranking.top(share), ranking.bottom(share)
    assert len(top) == len(bottom) == max(1, int(share * layers * heads + 0.5))
    outside = [values[h] for h in ch.HeadSet(ranking.order) - top]
    assert not outside or min(values[h] for h in top) >= max(outside)
    if len(top) <= layers * heads // 2:
        assert not top & bottom


def test_bad_shares_and_scores():
    ranking = ch.HeadRanking(np.eye(3))
    for share in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            ranking.top(share)
    for values in (np.ones(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite scores"):
            ch.HeadRanking(values)


def test_rho():
    assert ch.heads_for_share(np.ones((2, 5))) == 0.5
    assert ch.heads_for_share(np.eye(10)[:1].reshape(2, 5)) == 0.1
    assert ch.heads_for_share(np.array([[4.0, 1, 1, -9]])) == 0.25
    assert np.isnan(ch.heads_for_share(np.zeros((2, 2))))
    assert ch.heads_for_share(np.stack([np.ones((2, 5)), np.eye(10)[:1].reshape(2, 5)])).tolist() == [0.5, 0.1]


def test_intervals_cover():
    """95 % intervals hold the truth about 95 % of the time."""
    rng = np.random.default_rng(0)
    low, high = mean_interval(rng.exponential(size=(100, 400)), resamples=500)
    assert 0.90 <= ((low < 1) & (high > 1)).mean() <= 0.98
    hits = rng.binomial(100, 0.9, size=400)
    inside = [low <= 0.9 <= high for low, high in (proportion_interval(h, 100) for h in hits)]
    assert 0.92 <= np.mean(inside) <= 0.98
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval(np.ones((1, 3)))
