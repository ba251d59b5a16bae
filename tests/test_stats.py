"""Intervals, tests and effect sizes on simulated data of known truth."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, ttest_ind

from corehead.stats import contrast, correct, design_effect, mean_interval, paired, proportion_interval


def clustered(rng, n_groups: int, size: int, correlation: float, *columns: int) -> tuple[np.ndarray, np.ndarray]:
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
    theirs = bootstrap((values,), np.mean, axis=0, confidence_level=0.9, method="percentile", n_resamples=500, rng=rng)
    ours = mean_interval(values, confidence=0.9, resamples=500, seed=5)
    np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=1e-12)
    np.testing.assert_allclose(ours, mean_interval(values, 0.9, 500, 5, groups=[f"s{i}" for i in range(30)]))


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
    with pytest.raises(ValueError, match=r"groups of values: give one label a sample \(3 of them, none missing\)"):
        mean_interval(np.arange(3.0), groups=[0, 1])
    with pytest.raises(ValueError, match="none missing"):
        mean_interval(np.arange(3.0), groups=["a", None, "b"])
    with pytest.raises(ValueError, match="all 3 samples are in one group, take at least 2 groups"):
        mean_interval(np.arange(3.0), groups=["a"] * 3)


# --- paired comparisons


def rejects(p_values) -> float:
    return (np.array(p_values) <= 0.05).mean()


def test_mcnemar_is_the_binomial_test_of_what_differs():
    a = np.repeat([True, True, False, False], [40, 9, 2, 10])
    b = np.repeat([True, False, True, False], [40, 9, 2, 10])
    out = paired(a, b)
    assert out.p == pytest.approx(binomtest(2, 11).pvalue) and out.effect == pytest.approx(9 / 11 - 0.5)
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
    assert 0.03 < rejects([paired(v + w, w, groups, resamples=199).p for v, w in zip(values, b)]) < 0.08
    assert rejects([paired(v + w, w, resamples=199).p for v, w in zip(values, b)]) > 0.15  # samples as independent
    assert rejects([paired(v + 0.5, np.zeros(len(v)), groups, resamples=199).p for v in values]) > 0.95


def test_paired_interval_effect_and_p():
    rng = np.random.default_rng(0)
    b = rng.normal(size=400)
    a = b + rng.normal(0.5, 2, size=400)
    out = paired(a, b)
    assert out.difference == pytest.approx((a - b).mean()) and out.effect == pytest.approx(0.25, abs=0.15)
    assert out.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    half = 1.96 * (a - b).std() / 20
    assert (out.low, out.high) == pytest.approx((out.difference - half, out.difference + half), abs=0.03)
    assert out.p == pytest.approx(1 / 10_001) and paired(a, b, resamples=99).p == pytest.approx(0.01)
    assert (out.low, out.high) == pytest.approx(tuple(map(float, mean_interval(a - b, resamples=10_000))))
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
    assert holm == pytest.approx([0.03, 0.06, 0.06]) and bonferroni == pytest.approx([0.03, 0.12, 0.09])


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
    out, theirs = contrast(x, y, confidence=0.9), ttest_ind(x, y, equal_var=False)
    assert out.difference == pytest.approx(x.mean() - y.mean()) and out.p == pytest.approx(theirs.pvalue)
    assert (out.low, out.high) == pytest.approx(tuple(theirs.confidence_interval(0.9)))


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
    assert out.difference == -2 and out.low < -2 < out.high and out.p == pytest.approx(0.0742, abs=1e-4)


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
    assert design_effect(np.repeat(values, 5), np.repeat(np.arange(12), 5)) == pytest.approx(59 / 11)
    assert design_effect([0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1]) == 0  # groups that balance out have the same mean
    assert np.isnan(design_effect(np.ones(4), [0, 0, 1, 1]))


def test_design_effect_is_the_ratio_of_variances():
    rng = np.random.default_rng(0)
    values, groups = clustered(rng, 40, 5, 0.3, 600)
    found = np.mean([design_effect(v, groups) for v in values.T])
    assert found == pytest.approx(1 + 4 * 0.3, abs=0.1)  # Kish: 1 + (m - 1) rho
    assert found == pytest.approx(values.mean(0).var() * 200, abs=0.3)  # over many data sets, of variance 1


def test_bad_design_effect():
    with pytest.raises(ValueError, match="one group"):
        design_effect([1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match=r"values has shape \(2, 2\)"):
        design_effect(np.eye(2), [0, 1])
