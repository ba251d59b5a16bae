"""Intervals, tests and effect sizes on simulated data of known truth."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, ttest_ind

import corehead as ch
from corehead.stats import (
    METRICS,
    accuracy,
    compare,
    contrast,
    correct,
    design_effect,
    heads_for_share,
    mean_interval,
    paired,
    proportion_interval,
    resample_means,
    rho_interval,
    split_halves,
    summary,
)


def clustered(
    rng, n_groups: int, size: int, correlation: float, *columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Normal values (n, *columns) of mean 0 and variance 1, correlated in groups, and the groups (n,)."""
    groups = np.repeat(np.arange(n_groups), size)
    shared = rng.normal(size=(n_groups, *columns))[groups]
    own = rng.normal(size=(n_groups * size, *columns))
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own, groups


# --- intervals


def test_intervals_cover():
    """95 % intervals hold the truth about 95 % of the time."""
    rng = np.random.default_rng(0)
    low, high = mean_interval(rng.exponential(size=(100, 400)), resamples=500)
    assert 0.90 <= ((low < 1) & (high > 1)).mean() <= 0.98
    hits = rng.binomial(100, 0.9, size=400)
    inside = [low <= 0.9 <= high for low, high in (proportion_interval(h, 100) for h in hits)]
    assert 0.92 <= np.mean(inside) <= 0.98


def test_clustered_intervals_cover_by_groups_alone():
    values, groups = clustered(np.random.default_rng(0), 50, 6, 0.5, 600)
    low, high = mean_interval(values, groups=groups)
    assert 0.92 <= ((low < 0) & (high > 0)).mean() <= 0.97
    low, high = mean_interval(values)
    assert ((low < 0) & (high > 0)).mean() < 0.8  # six correlated samples are not six samples


def test_groups_of_different_sizes_weigh_by_their_samples():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    means = np.where(np.bincount(groups) > 4, 1.0, 0.0)  # large groups have larger values
    truth = np.repeat([1.0, 0.0], [26, 10]).mean()  # sizes 5 + 6 + 7 + 8 against 1 + 2 + 3 + 4
    low, high = mean_interval(means[groups], groups=groups)
    assert low < truth < high and low > means.mean()


def test_without_groups_it_is_the_bootstrap_of_scipy():
    values = np.random.default_rng(0).gamma(2, size=(30, 2, 3))
    rng = np.random.default_rng(5)
    theirs = bootstrap((values,), np.mean, axis=0, method="percentile", n_resamples=500, rng=rng)
    ours = mean_interval(values, resamples=500, seed=5)
    np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=1e-12)
    np.testing.assert_allclose(
        ours, mean_interval(values, 500, 5, groups=[f"s{i}" for i in range(30)])
    )


@pytest.mark.filterwarnings("error")
def test_a_constant_has_an_interval_of_no_width():
    for groups in (None, [0, 0, 0, 1, 1, 2, 2]):
        low, high = mean_interval(np.full(7, 0.7), groups=groups)
        assert low == high == np.full(7, 0.7).mean()
    low, high = mean_interval(np.column_stack([np.full(7, 0.1), np.arange(7.0)]))
    assert low[0] == high[0] == pytest.approx(0.1) and low[1] < 3 < high[1]


def test_bad_samples():
    holes = np.array([[1.0, np.nan], [np.inf, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match=r"too few samples \(1\), take at least 2"):
        mean_interval(np.ones((1, 3)))
    with pytest.raises(ValueError, match="values: 2 of 3 samples have NaN or Inf, drop"):
        mean_interval(holes)
    with pytest.raises(
        ValueError, match=r"groups of values: give one label a sample \(3 of them, none missing\)"
    ):
        mean_interval(np.arange(3.0), groups=[0, 1])
    with pytest.raises(ValueError, match="none missing"):
        mean_interval(np.arange(3.0), groups=["a", None, "b"])
    with pytest.raises(ValueError, match="all 3 samples are in one group, take at least 2 groups"):
        mean_interval(np.arange(3.0), groups=["a"] * 3)


def test_wilson_of_published_examples():
    """Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3."""
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert proportion_interval(hits, n) == pytest.approx((low, high), abs=5e-5)
        back = proportion_interval(n - hits, n)
        assert back == pytest.approx((1 - high, 1 - low), abs=5e-5)


# --- rho


def test_rho():
    assert heads_for_share(np.ones((2, 5))) == 0.5
    assert heads_for_share(np.eye(10)[:1].reshape(2, 5)) == 0.1
    assert heads_for_share(np.array([[4.0, 1, 1, -9]])) == 0.25
    assert np.isnan(heads_for_share(np.zeros((2, 2))))
    assert heads_for_share(np.stack([np.ones((2, 5)), np.eye(10)[:1].reshape(2, 5)])).tolist() == [
        0.5,
        0.1,
    ]
    assert ch.heads_for_share is heads_for_share


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_rho_by_adding_heads_one_by_one(layers, heads, seed, share):
    values = np.random.default_rng(seed).normal(0.3, 1, size=(layers, heads))
    best = sorted((max(v, 0.0) for v in values.ravel()), reverse=True)
    if not sum(best):
        assert np.isnan(heads_for_share(values, share))
        return
    n = next(k for k in range(1, len(best) + 1) if sum(best[:k]) >= share * sum(best) * (1 - 1e-9))
    assert heads_for_share(values, share) == pytest.approx(n / len(best))


def test_the_interval_of_rho():
    rng = np.random.default_rng(0)
    truth = np.linspace(1, 0, 20).reshape(4, 5) ** 3
    values = truth + rng.normal(0, 0.2, size=(60, 4, 5))
    low, high = rho_interval(values)
    rho = heads_for_share(resample_means(values, 500))
    assert (low, high) == pytest.approx(tuple(np.percentile(rho, [2.5, 97.5])))
    assert 0 < low <= heads_for_share(values.mean(0)) <= high < 1
    assert rho_interval(np.repeat(truth[None], 9, 0)) == (
        heads_for_share(truth),
        heads_for_share(truth),
    )
    groups = np.repeat(np.arange(10), 6)
    shared = truth + rng.normal(0, 0.5, size=(10, 4, 5))[groups]  # ten samples in truth
    (low, high), (few, many) = rho_interval(shared), rho_interval(shared, groups=groups)
    assert many - few >= high - low > 0
    assert rho_interval(values, 0.9)[0] > high and rho_interval(values, seed=1) == rho_interval(
        values, seed=1
    )


# --- paired comparisons


def rejects(p_values) -> float:
    return (np.array(p_values) <= 0.05).mean()


def test_mcnemar_is_the_binomial_test_of_what_differs():
    a = np.repeat([True, True, False, False], [40, 9, 2, 10])
    b = np.repeat([True, False, True, False], [40, 9, 2, 10])
    out = paired(a, b)
    assert out.p == pytest.approx(binomtest(2, 11).pvalue) and out.effect == pytest.approx(
        9 / 11 - 0.5
    )
    assert out.difference == pytest.approx(7 / 61) and 0 < out.low < 7 / 61 < out.high
    back = paired(b, a)
    assert back[3:] == pytest.approx((out.p, -out.effect)) and back.difference == -out.difference
    same = paired(a, a)
    assert same[:4] == (0, 0, 0, 1) and np.isnan(same.effect)


def test_mcnemar_keeps_its_size_and_has_power():
    rng = np.random.default_rng(0)
    b = rng.random((800, 120)) < 0.6
    a = b ^ (rng.random(b.shape) < 0.3)
    swap = rng.random(b.shape) < 0.5  # under the null which is which is a coin toss
    a, c = np.where(swap, b, a), np.where(swap, a, b)
    assert 0.005 < rejects([paired(x, y, resamples=2).p for x, y in zip(a, c)]) < 0.06
    worse = b & (rng.random(b.shape) < 0.8)
    assert rejects([paired(x, y, resamples=2).p for x, y in zip(worse, b)]) > 0.95


def test_the_paired_bootstrap_keeps_its_size_and_has_power():
    rng = np.random.default_rng(0)
    values, groups = clustered(rng, 40, 4, 0.6, 500)
    values = values.T
    b = rng.normal(size=values.shape) * 10  # what a and b have in common does not count
    assert (
        0.03
        < rejects([paired(v + w, w, groups, resamples=199).p for v, w in zip(values, b)])
        < 0.08
    )
    assert (
        rejects([paired(v + w, w, resamples=199).p for v, w in zip(values, b)]) > 0.15
    )  # samples as independent
    assert (
        rejects([paired(v + 0.5, np.zeros(len(v)), groups, resamples=199).p for v in values]) > 0.95
    )


def test_paired_interval_effect_and_p():
    rng = np.random.default_rng(0)
    b = rng.normal(size=400)
    a = b + rng.normal(0.5, 2, size=400)
    out = paired(a, b)
    assert out.difference == pytest.approx((a - b).mean()) and out.effect == pytest.approx(
        0.25, abs=0.15
    )
    assert out.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    half = 1.96 * (a - b).std() / 20
    assert (out.low, out.high) == pytest.approx(
        (out.difference - half, out.difference + half), abs=0.03
    )
    assert out.p == pytest.approx(1 / 10_001) and paired(a, b, resamples=99).p == pytest.approx(
        0.01
    )
    assert (out.low, out.high) == pytest.approx(
        tuple(map(float, mean_interval(a - b, resamples=10_000)))
    )
    assert out == paired(a, b) and out != paired(a, b, seed=1)


def test_paired_p_by_counting_resamples():
    """Two groups: half of the resamples draw one of them twice, and these are as far from the mean as it from 0."""
    a, b = np.array([2.0, 2.0, 0.0, 0.0]), np.zeros(4)
    assert paired(a, b, ["x", "x", "y", "y"]).p == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("error")
def test_paired_of_constants():
    zero, one = np.zeros(5), np.ones(5)
    same, apart = paired(one, one), paired(one, zero, resamples=99)
    assert same[:4] == (0, 0, 0, 1) and apart[:3] == (1, 1, 1) and apart.p == 0.01
    assert np.isnan(same.effect) and np.isnan(apart.effect)


def test_bad_pairs():
    with pytest.raises(ValueError, match=r"a has shape \(3,\) and b \(2,\)"):
        paired(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\).*one number a sample"):
        paired(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"a - b: too few samples \(1\)"):
        paired([1.0], [2.0])
    with pytest.raises(ValueError, match="a - b: 2 of 3 samples have NaN or Inf"):
        paired([1.0, np.nan, 1.0], [np.nan, 2.0, 3.0])
    with pytest.raises(ValueError, match="groups of a - b: give one label"):
        paired(np.ones(3), np.zeros(3), groups=[1, 2])


# --- many tests


def test_corrections_by_hand():
    holm, bonferroni = correct([0.01, 0.04, 0.03])
    assert holm == pytest.approx([0.03, 0.06, 0.06]) and bonferroni == pytest.approx(
        [0.03, 0.12, 0.09]
    )


def test_holm_step_by_step():
    holm, bonferroni = correct([0.005, 0.011, 0.02, 0.04, 0.13])
    assert holm == pytest.approx([0.025, 0.044, 0.06, 0.08, 0.13])
    assert bonferroni == pytest.approx([0.025, 0.055, 0.1, 0.2, 0.65])
    assert correct([0.02, 0.04, 0.8, 0.02])[0] == pytest.approx(
        [0.08, 0.08, 0.8, 0.08]
    )  # ties, and never above 1
    assert [p.tolist() for p in correct([0.5, 0.6, 1.0])] == [[1, 1, 1]] * 2


def test_corrections_hold_the_familywise_error():
    p = np.random.default_rng(0).random((2000, 8))
    for corrected in zip(*(correct(family) for family in p)):
        assert 0.035 < (np.min(corrected, 1) <= 0.05).mean() < 0.065
    p[:, :4] /= 1000  # half of the effects are real: Holm finds more of the others' neighbours
    holm, bonferroni = zip(*(correct(family) for family in p))
    assert (np.array(holm)[:, 4:].min(1) <= 0.05).mean() < 0.06
    assert (np.array(holm) <= 0.05).sum() > (np.array(bonferroni) <= 0.05).sum()


def test_corrections_keep_order_and_shape():
    p = np.random.default_rng(0).random((4, 4, 3)) ** 3
    for family in p:
        holm, bonferroni = correct(family)
        assert holm.shape == bonferroni.shape == family.shape
        assert (family <= holm).all() and (holm <= bonferroni).all() and (bonferroni <= 1).all()
        assert (holm < bonferroni).any() and np.allclose(bonferroni, np.minimum(1, family * 12))
        assert (np.diff(holm.ravel()[family.ravel().argsort()]) >= 0).all()
    assert [x.shape for x in correct([])] == [(0,), (0,)]
    assert [x.item() for x in correct(0.2)] == [0.2, 0.2] and correct(0.2)[0].shape == ()


@pytest.mark.parametrize("p", [[0.1, np.nan], [0.5, 1.1], [-0.1]])
def test_bad_p_values(p):
    with pytest.raises(ValueError, match=r"p-values are in \[0, 1\]"):
        correct(p)


# --- contrasts


def test_contrast_without_groups_is_welchs_test():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 30), rng.normal(0.5, 3, 50)
    out, theirs = contrast(x, y), ttest_ind(x, y, equal_var=False)
    assert out.difference == pytest.approx(x.mean() - y.mean()) and out.p == pytest.approx(
        theirs.pvalue
    )
    assert (out.low, out.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_the_unit_of_a_contrast_is_the_group():
    x, y = np.array([0.0, 2, 4, 4, 4, 4]), np.array([1.0, 2, 3])
    out = contrast(x, y, list("aabbbb"))
    theirs = ttest_ind([1.0, 4.0], y, equal_var=False)
    assert out.difference == pytest.approx(0.5) and out.p == pytest.approx(theirs.pvalue)
    assert contrast(y, x, None, list("aabbbb")).low == pytest.approx(-out.high)


def test_contrasts_keep_their_size_cover_and_have_power():
    rng = np.random.default_rng(0)
    x, groups = clustered(rng, 25, 4, 0.5, 500)
    y = 3 * rng.normal(size=(500, 60))
    found = [contrast(v, w, groups) for v, w in zip(x.T, y)]
    assert 0.03 < rejects([f.p for f in found]) < 0.07
    assert all((f.low < 0 < f.high) == (f.p > 0.05) for f in found)
    z, others = clustered(rng, 25, 4, 0.5, 500)
    assert rejects([contrast(v, w).p for v, w in zip(x.T, z.T)]) > 0.12  # samples as independent
    assert rejects([contrast(v + 1, w, groups, others).p for v, w in zip(x.T, z.T)]) > 0.95


@pytest.mark.filterwarnings("error")
def test_contrasts_of_constants():
    assert contrast(np.full(3, 0.1), np.full(7, 0.1)) == (0, 0, 0, 1)
    # means over groups of different sizes differ by rounding
    assert contrast(np.full(10, 0.1), np.full(7, 0.1), [0] * 3 + [1] * 7).p == 1
    assert contrast(np.full(3, 0.5), np.full(7, 0.25)) == (0.25, 0.25, 0.25, 0)
    out = contrast(np.zeros(9), [1.0, 2.0, 3.0])
    assert (
        out.difference == -2
        and out.low < -2 < out.high
        and out.p == pytest.approx(0.0742, abs=1e-4)
    )


def test_bad_contrasts():
    with pytest.raises(ValueError, match=r"first: too few samples \(1\)"):
        contrast([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="second: 1 of 2 samples have NaN or Inf"):
        contrast([1.0, 2.0], [1.0, np.nan])
    with pytest.raises(ValueError, match="groups of second: all 3 samples are in one group"):
        contrast([1.0, 2.0], [1.0, 2.0, 3.0], None, [0, 0, 0])
    with pytest.raises(ValueError, match=r"first has shape \(3, 2\): give one number a sample"):
        contrast(np.eye(3, 2), [1.0, 2.0])


# --- design effect


def test_design_effect_by_hand():
    values = np.random.default_rng(0).normal(size=12)
    assert design_effect(values, np.arange(12)) == pytest.approx(1)
    # copies of each value: n / G times the variance, but for degrees of freedom
    assert design_effect(np.repeat(values, 5), np.repeat(np.arange(12), 5)) == pytest.approx(
        59 / 11
    )
    assert (
        design_effect([0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1]) == 0
    )  # groups that balance out have the same mean
    assert np.isnan(design_effect(np.ones(4), [0, 0, 1, 1]))


def test_design_effect_is_the_ratio_of_variances():
    rng = np.random.default_rng(0)
    values, groups = clustered(rng, 40, 5, 0.3, 600)
    found = np.mean([design_effect(v, groups) for v in values.T])
    assert found == pytest.approx(1 + 4 * 0.3, abs=0.1)  # Kish: 1 + (m - 1) rho
    assert found == pytest.approx(
        values.mean(0).var() * 200, abs=0.3
    )  # over many data sets, of variance 1


def test_bad_design_effect():
    with pytest.raises(ValueError, match="one group"):
        design_effect([1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match=r"values has shape \(2, 2\)"):
        design_effect(np.eye(2), [0, 1])


# --- resampling


def test_resample_means_draws_with_replacement():
    n, resamples = 12, 300
    for size in (None, 5):
        # each sample marks its own head, so that the means count how often it was drawn
        draws = size or n
        counts = draws * resample_means(np.eye(n).reshape(n, 3, 4), resamples, 1, size).reshape(
            resamples, n
        )
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
    assert {tuple(np.flatnonzero(row)) for row in one} == {
        tuple(np.flatnonzero(m)) for m in members
    }


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
    assert np.allclose((a + b) / 2, values.mean(0)) and np.allclose(
        a.mean(0), values.mean(0), atol=0.1
    )
    assert np.array_equal(a, split_halves(values)[0]) and not np.array_equal(
        a, split_halves(values, seed=1)[0]
    )


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
    with pytest.raises(
        ValueError, match="size=6: two disjoint subsets would take 12 of 10 samples, take 1 to 5"
    ):
        split_halves(values, size=6)


# --- tables of answers


def answers_of(
    rng, conditions: dict, domains=("image", "text"), contexts: int = 40, size: int = 3, **more
):
    """A table as `evaluate` gives it: condition -> probability to be right; questions on one context agree."""
    rows = []
    for domain in domains:
        for i in range(contexts):
            luck = rng.random(size) * 0.5 + rng.random() * 0.5
            for name, probability in conditions.items():
                name = name if isinstance(name, dict) else {"condition": name}
                for j in range(size):
                    right = bool(luck[j] < probability)
                    sample = dict(sample=f"{domain}{i}-{j}", context=f"{domain}{i}", domain=domain)
                    answer = dict(
                        correct=right, logprob=probability + rng.normal(0, 0.3), margin=luck[j]
                    )
                    rows.append(name | sample | answer | more)
    return pd.DataFrame(rows)


def test_accuracy():
    answers = pd.DataFrame(
        {
            "heads": list("bbbaaaa"),
            "domain": list("xxyxxyy"),
            "correct": [True, False, True, True, True, False, False],
        }
    )
    table = accuracy(answers, ["heads", "domain"])
    assert list(table.index) == [("b", "x"), ("b", "y"), ("a", "x"), ("a", "y")]
    assert list(table.columns) == ["n", "accuracy", "low", "high"] and table.n.dtype == np.int64
    assert table.n.tolist() == [2, 1, 2, 2] and table.accuracy.tolist() == [0.5, 1, 1, 0]
    for row, hits in zip(table.itertuples(), (1, 1, 2, 0)):
        assert (row.low, row.high) == pytest.approx(proportion_interval(hits, row.n))
    alone = accuracy(answers, "heads")
    assert (
        alone.index.tolist() == ["b", "a"]
        and alone.index.name == "heads"
        and alone.accuracy["a"] == 0.5
    )


def test_summaries_resample_contexts():
    rng = np.random.default_rng(0)
    heads = [{"heads": "top", "share": 0.1}, {"heads": "top", "share": 0.2}]
    rows = [
        h
        | dict(
            sample=f"{i}", context=f"{i // 8}", correct=rng.random() < 0.5, logprob=-1.0, margin=0.0
        )
        for h in heads
        for i in range(80)
    ]
    answers = pd.DataFrame(rows)
    table = summary(answers, ["heads", "share"])
    assert (
        list(table.index) == [("top", 0.1), ("top", 0.2)]
        and (table.n == 80).all()
        and table.n.dtype == np.int64
    )
    assert ((table.correct_low < table.correct) & (table.correct < table.correct_high)).all()
    assert (table.logprob_low == -1).all() and (table.logprob_high == -1).all()
    assert {f"{m}{e}" for m in METRICS for e in ("", "_low", "_high")} <= set(table.columns)
    part = answers[answers.share == 0.1]
    low, high = mean_interval(part.correct, groups=part.context)
    assert table.iloc[0][["correct", "correct_low", "correct_high"]].tolist() == [
        part.correct.mean(),
        low,
        high,
    ]
    assert list(summary(answers, "share", ["margin"]).columns) == [
        "n",
        "margin",
        "margin_low",
        "margin_high",
    ]


MEASURES = {"accuracy": "correct", "logprob": "logprob"}


def test_compare_is_paired_over_samples():
    """Whatever the order of the rows, each row is what `paired` gives, and the family is the whole table."""
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"intact": 0.95, "top": 0.4, "random": 0.9})
    table = compare(
        answers.sample(frac=1, random_state=1), "top", ["random", "intact"], by="domain"
    )
    assert set(table.index) == {(d, c) for d in ("image", "text") for c in ("random", "intact")}
    assert table.index.names == ["domain", "control"]
    wide = answers.pivot(index=["domain", "context", "sample"], columns="condition")
    for domain, control in table.index:
        part, row = wide.loc[domain], table.loc[domain, control]
        contexts = part.index.get_level_values("context")
        for measure, column in MEASURES.items():
            one, two = part[column]["top"].to_numpy(), part[column][control].to_numpy()
            if measure == "accuracy":
                one, two = one.astype(bool), two.astype(bool)
            found = row[
                [f"{measure}_{key}" for key in ("difference", "low", "high", "p", "effect")]
            ]
            assert tuple(found) == paired(one, two, contexts)
        lost = part["correct"]["top"].astype(float) - part["correct"][control]
        assert row.design_effect == design_effect(lost, contexts) and row.n == 120
    p = table[["accuracy_p", "logprob_p"]].to_numpy()
    for found, expected in zip(("holm", "bonferroni"), correct(p)):
        assert np.array_equal(table[[f"accuracy_{found}", f"logprob_{found}"]], expected)
    assert (table.accuracy_difference < -0.3).all() and (table.accuracy_holm < 1e-4).all()


def test_compare_by_any_columns_or_none():
    rng = np.random.default_rng(0)
    one, two = (answers_of(rng, {"top": 0.4, "random": 0.9}, model=m) for m in ("small", "large"))
    answers = pd.concat([one, two])
    assert list(compare(one, "top", ["random"]).index) == [("image", "random"), ("text", "random")]
    both = compare(answers, "top", ["random"], by=["model", "domain"])
    assert both.index.names == ["model", "domain", "control"] and len(both) == 4
    single = compare(one, "top", ["random"])
    raw = [c for c in single if not c.endswith(("holm", "bonferroni"))]
    pd.testing.assert_frame_equal(both.loc["small"][raw], single[raw])  # the family alone is larger
    every = compare(one, "top", ["random"], by=[])
    assert list(every.index) == ["random"] and every.n["random"] == 240
    assert every.accuracy_difference["random"] == pytest.approx(single.accuracy_difference.mean())


def test_compare_reads_the_columns_of_a_curve():
    """heads, share and draw in place of condition; draws of a control are averaged for each sample."""
    rng = np.random.default_rng(0)
    conditions = {"top": [0], "random": [0, 1, 2], "layer": [4]}
    draws = {
        name: [{"heads": name, "share": 0.05, "draw": d} for d in seeds]
        for name, seeds in conditions.items()
    }
    tables = [
        answers_of(
            np.random.default_rng(7), {"once": 0.4 if name == "top" else 0.8}, ("image",)
        ).drop(columns="condition")
        for name in draws
        for _ in draws[name]
    ]
    labels = [label for name in draws for label in draws[name]]
    for table, label in zip(tables, labels):
        table["correct"] ^= rng.random(len(table)) < 0.1
        for key, value in label.items():
            table[key] = value
    answers = pd.concat(tables, ignore_index=True)
    found = compare(answers, "top", ["random", "layer"])
    top, random = tables[0], tables[1:4]
    mean = np.mean([t.correct for t in random], 0)
    nats = np.mean([t.logprob for t in random], 0)
    row = found.loc["image", "random"]
    order = np.lexsort([top["sample"], top.context])
    expected = paired(
        top.correct.to_numpy(float)[order], mean[order], top.context.to_numpy()[order]
    )
    assert tuple(row[f"accuracy_{key}"] for key in expected._fields) == pytest.approx(expected)
    assert row.logprob_difference == pytest.approx((top.logprob - nats).mean()) and row.n == len(
        top
    )
    # a control of a single draw keeps McNemar's test beside one of several
    layer = paired(
        top.correct.to_numpy()[order],
        tables[4].correct.to_numpy()[order],
        top.context.to_numpy()[order],
    )
    assert found.loc["image", "layer"].accuracy_p == layer.p


def test_compare_of_draws_that_go_with_the_data():
    """Each seed of the data has its own draw of heads: every sample was answered once, and McNemar's test stays."""
    rng = np.random.default_rng(0)
    tables = []
    for seed in range(3):
        one = answers_of(rng, {"top": 0.4, "random": 0.8}, ("image",)).rename(
            columns={"condition": "heads"}
        )
        one[["sample", "context"]] += f"/{seed}"
        one["draw"] = np.where(one["heads"] == "random", seed, 0)
        tables.append(one)
    answers = pd.concat(tables)
    row = compare(answers, "top", ["random"]).loc["image", "random"]
    wide = answers.pivot(index="sample", columns="heads", values="correct")
    better, worse = (wide["top"] & ~wide["random"]).sum(), (wide["random"] & ~wide["top"]).sum()
    assert row.accuracy_p == pytest.approx(binomtest(better, better + worse).pvalue)
    assert row.n == 360 and row.accuracy_effect == pytest.approx(better / (better + worse) - 0.5)


def test_what_cannot_be_compared():
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"top": 0.4, "random": 0.9}, ("image",), contexts=4)
    lacking = answers[~((answers["sample"] == "image2-1") & (answers.condition == "random"))]
    with pytest.raises(
        ValueError,
        match=r"sample 'image2-1' has no answer under 'random': evaluate both on the same",
    ):
        compare(lacking, "top", ["random"])
    with pytest.raises(ValueError, match=r"sample 'image0-0' has no answer under 'rnadom'"):
        compare(answers, "top", ["rnadom"])
    curve = answers.rename(columns={"condition": "heads"})
    shares = pd.concat([curve.assign(share=0.05), curve.assign(share=0.1)])
    with pytest.raises(
        ValueError, match=r"sample 'image0-0' has several answers under 'top': keep one share"
    ):
        compare(shares, "top", ["random"])
    assert len(compare(shares, "top", ["random"], by=["domain", "share"])) == 2
    with pytest.raises(ValueError, match="1 of 12 samples have NaN or Inf"):
        compare(answers.assign(logprob=answers.logprob.where(answers.index > 0)), "top", ["random"])
    with pytest.raises(ValueError, match="in one group"):
        compare(answers.assign(context="c"), "top", ["random"])
