"""Intervals, tests and effect sizes on simulated data of known truth."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t, ttest_1samp, ttest_ind

import corehead as ch
from corehead.stats import (
    METRICS,
    clustered_mean,
    compare,
    contrast,
    correct,
    design_effect,
    groups_of,
    heads_for_share,
    mean_interval,
    normalised_damage,
    paired,
    proportion_interval,
    resample_means,
    rho_interval,
    split_halves,
    summary,
)


def crossed(
    rng,
    context: float,
    item: float,
    simulations: int,
    groups=None,
    *,
    contexts=40,
    items=199,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Normal values (n, simulations) of mean 0 and variance 1, of which contexts and items have a share, and both.

    As in the testbed: 8 questions a picture, each about any of the 199 handwritten digits of the test split.
    """
    if groups is None:
        groups = [np.repeat(np.arange(contexts), 8), rng.integers(items, size=contexts * 8)]
    n = len(groups[0])
    values = (1 - context - item) ** 0.5 * rng.normal(size=(n, simulations))
    for share, labels in zip((context, item), groups):
        values += share**0.5 * rng.normal(size=(labels.max() + 1, simulations))[labels]
    return values, groups


def crossed_pair(rng, shares, simulations: int, correlation: float, groups=None):
    """Two such arrays of values that are correlated, as one digit is hard for every model, and the groups of both."""
    a, groups = crossed(rng, *shares, simulations, groups)
    own, _ = crossed(rng, *shares, simulations, groups)
    return a, correlation * a + (1 - correlation**2) ** 0.5 * own, groups


# Shares of the variance that contexts and items have; the design effect is 1 to 3, of 100 contexts up to 4.4
SHARES = [(0, 0), (0.3, 0), (0, 0.5), (0.2, 0.5)]
every_share = pytest.mark.parametrize("shares", SHARES, ids=str)


def covered(interval, truth) -> float:
    low, high = interval
    return ((low <= truth) & (truth <= high)).mean()


def clustered(
    rng, n_groups: int, size: int, correlation: float, *columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Normal values (n, *columns) of mean 0 and variance 1, correlated in groups, and the groups (n,)."""
    groups = np.repeat(np.arange(n_groups), size)
    shared = rng.normal(size=(n_groups, *columns))[groups]
    own = rng.normal(size=(n_groups * size, *columns))
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own, groups


# --- intervals


@every_share
@pytest.mark.parametrize("contexts", [40, 100])
def test_intervals_of_means_cover(shares, contexts):
    values, groups = crossed(np.random.default_rng(0), *shares, 4000, contexts=contexts)
    assert 0.93 <= covered(mean_interval(values, groups), 0) <= 0.97
    if shares[1]:
        # by contexts alone, as if no digit came twice
        assert covered(mean_interval(values, groups[0]), 0) < 0.92


@every_share
@pytest.mark.parametrize("contexts", [40, 100])
def test_intervals_of_proportions_cover(shares, contexts):
    values, groups = crossed(np.random.default_rng(1), *shares, 4000, contexts=contexts)
    for share in (0.1, 0.5, 0.8, 0.9, 0.97):
        answers = values < norm.ppf(share)
        assert 0.93 <= covered(mean_interval(answers, groups), share) <= 0.97


def test_intervals_of_proportions_cover_at_the_edge():
    """An error is rare and its digit always read wrong: the design effect comes out too small, 92 % instead of 95 %."""
    rng = np.random.default_rng(2)
    values, groups = crossed(rng, 0, 0.9, 4000)
    assert 0.915 <= covered(mean_interval(values < norm.ppf(0.97), groups), 0.97) <= 0.95
    # independent answers, few of them wrong: all right in one simulation of 25
    values, groups = crossed(rng, 0, 0, 4000)
    assert 0.93 <= covered(mean_interval(values < norm.ppf(0.99), groups), 0.99) <= 0.98


def with_draws(rng, draws: int, main: float, simulations: int):
    """Values (n * draws, simulations) where each sample stands under several draws of heads, and the three factors."""
    values, groups = crossed(rng, 0.2, 0.5, simulations)
    n = len(values)
    groups = [np.repeat(labels, draws) for labels in groups] + [
        np.tile(np.arange(draws), n)
    ]
    # a draw harms all samples alike by `main` of the variance, and each sample besides in its own way
    own = rng.normal(size=(n * draws, simulations))
    harm = rng.normal(size=(draws, simulations))[groups[2]]
    values = (
        (0.8 - main) ** 0.5 * values.repeat(draws, 0) + 0.2**0.5 * own + main**0.5 * harm
    )
    return values, groups


@pytest.mark.parametrize("main", [0, 0.02, 0.1, 0.3])
def test_intervals_over_draws_cover(main):
    values, groups = with_draws(np.random.default_rng(3), 5, main, 2000)
    assert 0.93 <= covered(mean_interval(values, groups), 0) <= 0.97
    assert 0.93 <= covered(mean_interval(values < norm.ppf(0.8), groups), 0.8) <= 0.97
    if main >= 0.1:
        # draws as if there were no others to draw
        assert covered(mean_interval(values, groups[:2]), 0) < 0.85


def test_draws_that_do_nothing_cost_nothing():
    """Five times the same answers are as good as the answers, and no better."""
    values, groups = crossed(np.random.default_rng(0), 0.2, 0.4, 300)
    repeated = [labels.repeat(5) for labels in groups] + [np.tile(np.arange(5), 320)]
    once, often = (
        clustered_mean(values, groups),
        clustered_mean(values.repeat(5, 0), repeated),
    )
    # but for the factor of the fewest groups, which is there for bias
    assert np.median(often.variance / once.variance) == pytest.approx(39 / 40, abs=1e-9)
    assert (often.df > 25).all()


@pytest.mark.parametrize("n_factors", [1, 2, 3])
def test_variance_by_pairs_that_share_a_group(n_factors):
    """Over all pairs of samples that share a group of any factor, the sum of the products of their deviations."""
    rng = np.random.default_rng(n_factors)
    values = rng.normal(size=(60, 3))
    factors = [rng.integers(k, size=60) for k in (6, 20, 4)[:n_factors]]
    for codes in factors:
        values += 2 * rng.normal(size=(20, 3))[codes]
    off = values - values.mean(0)

    def pairs(labels):
        return (
            sum(
                off[i] * off[j]
                for i in range(60)
                for j in range(60)
                if any(codes[i] == codes[j] for codes in labels)
            )
            / 60**2
        )

    counts = [len(set(codes)) for codes in factors]
    alone = [pairs([codes]) * n / (n - 1) for codes, n in zip(factors, counts)]
    together = pairs(factors) * min(counts) / (min(counts) - 1)
    found = clustered_mean(values, factors)
    assert found.variance == pytest.approx(np.maximum(together, np.max(alone, 0)))
    assert (together > np.max(alone, 0)).any() or n_factors == 1
    assert found.fewest == min(counts)
    satterthwaite = found.variance**2 / sum(v**2 / (n - 1) for v, n in zip(alone, counts))
    assert found.df == pytest.approx(np.maximum(satterthwaite, min(counts) - 1))


def test_one_factor_is_the_textbook_and_items_of_their_own_change_nothing():
    values, (contexts, _) = crossed(np.random.default_rng(0), 0.5, 0, 5)
    n = len(values)
    alone = clustered_mean(values)
    assert alone.variance == pytest.approx(values.var(0, ddof=1) / n)
    assert alone.df == pytest.approx(n - 1)
    low, high = mean_interval(values)
    theirs = ttest_1samp(values, 0).confidence_interval()
    assert low == pytest.approx(theirs.low) and high == pytest.approx(theirs.high)
    by_context = clustered_mean(values, contexts)
    means = values.reshape(40, 8, 5).mean(1)
    assert by_context.variance == pytest.approx(means.var(0, ddof=1) / 40)
    assert by_context.df == pytest.approx(39)
    for more in (np.arange(n), contexts):
        both = clustered_mean(values, [contexts, more])
        assert both.variance == pytest.approx(by_context.variance)
        assert both.df == pytest.approx(by_context.df)
    labels = [f"c{c}" for c in contexts]
    assert clustered_mean(values, labels).variance == pytest.approx(by_context.variance)


def test_groups_of_different_sizes_weigh_by_their_samples():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    means = np.where(np.bincount(groups) > 4, 1.0, 0.0)  # large groups have larger values
    truth = np.repeat(
        [1.0, 0.0], [26, 10]
    ).mean()  # sizes 5 + 6 + 7 + 8 against 1 + 2 + 3 + 4
    low, high = mean_interval(means[groups], groups=groups)
    assert low < truth < high and low > means.mean()


def test_effective_size():
    """Each answer five times is as good as once; answers that balance out are no better than independent ones."""
    answers = np.random.default_rng(0).random(60) < 0.7
    often = mean_interval(answers.repeat(5), np.arange(60).repeat(5))
    assert often == pytest.approx(mean_interval(answers), abs=0.005)
    assert mean_interval(answers) == pytest.approx(proportion_interval(answers.mean(), 60))
    balanced, groups = np.tile([0, 1], 20), np.arange(20).repeat(2)
    assert mean_interval(balanced, groups) == pytest.approx(proportion_interval(0.5, 40))


@pytest.mark.filterwarnings("error")
def test_answers_that_are_all_equal_have_a_width():
    """As many as the fewest groups: nothing shows whether the answers of a group are independent."""
    groups = [np.arange(40).repeat(8), np.arange(320) % 50]
    for share in (0, 1):
        for answers in (
            np.full(320, bool(share)),
            np.full(320, share),
            np.full(320, float(share)),
        ):
            assert mean_interval(answers, groups) == proportion_interval(share, 40)
            assert mean_interval(answers, groups[1]) == proportion_interval(share, 50)
            assert mean_interval(answers) == proportion_interval(share, 320)
    low, high = mean_interval(np.column_stack([np.ones(20), np.arange(20) % 2]))
    assert (low[0], high[0]) == proportion_interval(1, 20) and low[1] < 0.5 < high[1]


@pytest.mark.filterwarnings("error")
def test_a_constant_has_an_interval_of_no_width():
    for groups in (None, [0, 0, 0, 1, 1, 2, 2]):
        assert mean_interval(np.full(7, 0.7), groups=groups) == (0.7, 0.7)
    low, high = mean_interval(np.column_stack([np.full(7, 0.1), np.arange(7.0)]))
    assert low[0] == high[0] == 0.1 and low[1] < 3 < high[1]


def test_bad_samples():
    holes = np.array([[1.0, np.nan], [np.inf, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match=r"too few samples \(1\), take at least 2"):
        mean_interval(np.ones((1, 3)))
    with pytest.raises(ValueError, match="values: 2 of 3 samples have NaN or Inf, drop"):
        mean_interval(holes)
    with pytest.raises(
        ValueError,
        match=r"groups of values: give one label a sample \(3 of them, none missing\)",
    ):
        mean_interval(np.arange(3.0), groups=[0, 1])
    with pytest.raises(ValueError, match="none missing"):
        mean_interval(np.arange(3.0), groups=["a", None, "b"])
    with pytest.raises(
        ValueError, match="all 3 samples are in one group, take at least 2 groups"
    ):
        mean_interval(np.arange(3.0), groups=["a"] * 3)
    with pytest.raises(ValueError, match="all 3 samples are in one group"):
        mean_interval(np.arange(3.0), groups=[np.arange(3), np.zeros(3)])
    with pytest.raises(ValueError, match=r"one label a sample \(3 of them"):
        mean_interval(np.arange(3.0), groups=[np.arange(3), np.arange(4)])


def test_wilson_of_published_examples():
    """Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3."""
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert proportion_interval(hits / n, n) == pytest.approx((low, high), abs=5e-5)
        back = proportion_interval(1 - hits / n, n)
        assert back == pytest.approx((1 - high, 1 - low), abs=5e-5)
    shares = np.arange(21) / 20
    theirs = [binomtest(hits, 20).proportion_ci(method="wilson") for hits in range(21)]
    assert np.stack(proportion_interval(shares, 20), 1) == pytest.approx(np.array(theirs))


# --- rho


def test_rho():
    assert heads_for_share(np.ones((2, 5))) == 0.5
    assert heads_for_share(np.eye(10)[:1].reshape(2, 5)) == 0.1
    assert heads_for_share(np.array([[4.0, 1, 1, -9]])) == 0.25
    assert np.isnan(heads_for_share(np.zeros((2, 2))))
    assert heads_for_share(
        np.stack([np.ones((2, 5)), np.eye(10)[:1].reshape(2, 5)])
    ).tolist() == [
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
    n = next(
        k
        for k in range(1, len(best) + 1)
        if sum(best[:k]) >= share * sum(best) * (1 - 1e-9)
    )
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
    assert rho_interval(values, 0.9)[0] > high and rho_interval(
        values, seed=1
    ) == rho_interval(values, seed=1)


# --- paired comparisons


def rejects(p_values) -> float:
    return (np.array(p_values) <= 0.05).mean()


@every_share
def test_paired_tests_keep_their_size(shares):
    a, b, groups = crossed_pair(np.random.default_rng(4), shares, 1000, 0.7)
    a, b = a < norm.ppf(0.85), b < norm.ppf(0.85)
    found = [paired(x, y, groups) for x, y in zip(a.T, b.T)]
    assert 0.03 <= rejects([pair.p for pair in found]) <= 0.07
    assert all((pair.low <= 0 <= pair.high) == (pair.p >= 0.05) for pair in found)
    worse = [paired(x & y, y, groups).p for x, y in zip(a.T[:200], b.T)]
    assert rejects(worse) > 0.99


@every_share
def test_intervals_of_differences_cover(shares):
    """They are `mean_interval` of a - b, which takes all simulations at once."""
    a, b, groups = crossed_pair(np.random.default_rng(6), shares, 4000, 0.7)
    assert 0.93 <= covered(mean_interval(a - b, groups), 0) <= 0.97
    for before, after in ((0.95, 0.6), (0.9, 0.15), (0.97, 0.9), (0.5, 0.5)):
        lost = (a < norm.ppf(before)).astype(float) - (b < norm.ppf(after))
        assert 0.93 <= covered(mean_interval(lost, groups), before - after) <= 0.97


def test_samples_as_independent_would_find_what_is_not_there():
    """Why neither McNemar's test nor contexts alone will do: digits come back."""
    a, b, groups = crossed_pair(np.random.default_rng(0), (0, 0.9), 1000, 0)
    a, b = a < norm.ppf(0.8), b < norm.ppf(0.8)
    mcnemar = [
        binomtest(better, better + worse).pvalue
        for better, worse in zip((a & ~b).sum(0), (b & ~a).sum(0))
    ]
    assert rejects(mcnemar) > 0.12
    assert rejects([paired(x, y, groups[0]).p for x, y in zip(a.T, b.T)]) > 0.12
    assert rejects([paired(x, y, groups).p for x, y in zip(a.T, b.T)]) < 0.07


def test_paired_is_the_t_test_of_the_differences():
    rng = np.random.default_rng(0)
    b = rng.normal(size=400)
    a = b + rng.normal(0.5, 2, size=400)
    found = paired(a, b)
    theirs = ttest_1samp(a - b, 0)
    assert found.difference == pytest.approx((a - b).mean()) and found.p == pytest.approx(
        theirs.pvalue
    )
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    assert found.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    groups = [np.arange(400) // 10, rng.integers(50, size=400)]
    found, back = paired(a, b, groups), paired(b, a, groups)
    mean, variance, df, _ = clustered_mean(a - b, groups)
    assert found.p == pytest.approx(2 * t.sf(abs(mean) / variance**0.5, df))
    assert (found.low, found.high) == mean_interval(a - b, groups)
    assert back[3:] == (found.p, -found.effect) and back.low == -found.high


@pytest.mark.filterwarnings("error")
def test_paired_of_constants():
    zero, one = np.zeros(5), np.ones(5)
    same, apart = paired(one, one), paired(one, zero)
    assert same[:4] == (0, 0, 0, 1) and apart[:4] == (1, 1, 1, 1 / 16)
    assert np.isnan(same.effect) and np.isnan(apart.effect)
    # of bool, others might have been different, as far as the groups can tell
    groups = np.arange(80).repeat(4)
    right, wrong = np.ones(320, bool), np.zeros(320, bool)
    margin = proportion_interval(0, 80)[1]
    assert paired(right, right, groups)[:4] == (0, -margin, margin, 1)
    assert paired(right, wrong, groups)[:3] == (1, 1 - margin, 1)
    assert paired(right, wrong, groups).p == binomtest(80, 80).pvalue


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
    p[:, :4] /= (
        1000  # half of the effects are real: Holm finds more of the others' neighbours
    )
    holm, bonferroni = zip(*(correct(family) for family in p))
    assert (np.array(holm)[:, 4:].min(1) <= 0.05).mean() < 0.06
    assert (np.array(holm) <= 0.05).sum() > (np.array(bonferroni) <= 0.05).sum()


def test_corrections_keep_order_and_shape():
    p = np.random.default_rng(0).random((4, 4, 3)) ** 3
    for family in p:
        holm, bonferroni = correct(family)
        assert holm.shape == bonferroni.shape == family.shape
        assert (
            (family <= holm).all()
            and (holm <= bonferroni).all()
            and (bonferroni <= 1).all()
        )
        assert (holm < bonferroni).any() and np.allclose(
            bonferroni, np.minimum(1, family * 12)
        )
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
    out = contrast(x, y, list("aaabbb"))
    theirs = ttest_ind([2.0, 4.0], y, equal_var=False)
    assert out.difference == pytest.approx(1) and out.p == pytest.approx(theirs.pvalue)
    assert contrast(y, x, None, list("aaabbb")).low == pytest.approx(-out.high)


@every_share
def test_contrasts_keep_their_size_cover_and_have_power(shares):
    rng = np.random.default_rng(0)
    x, groups = crossed(rng, *shares, 1000)
    y, others = crossed(rng, 0, 0.8, 1000, contexts=25, items=40)
    y = 2 * y
    found = [contrast(v, w, groups, others) for v, w in zip(x.T, y.T)]
    assert 0.03 <= rejects([f.p for f in found]) <= 0.07
    assert all((f.low < 0 < f.high) == (f.p > 0.05) for f in found)
    # samples as independent
    assert rejects([contrast(v, w).p for v, w in zip(x.T[:300], y.T)]) > 0.12
    assert (
        rejects([contrast(v + 2, w, groups, others).p for v, w in zip(x.T[:300], y.T)])
        > 0.95
    )


@pytest.mark.filterwarnings("error")
def test_contrasts_of_constants():
    assert contrast(np.full(3, 0.1), np.full(7, 0.1)) == (0, 0, 0, 1)
    # means over groups of different sizes differ by rounding
    assert contrast(np.full(10, 0.1), np.full(7, 0.1), [0] * 3 + [1] * 7).p == 1
    assert contrast(np.full(3, 0.5), np.full(7, 0.25)) == (0.25, 0.25, 0.25, 0.25)
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
    with pytest.raises(
        ValueError, match="groups of second: all 3 samples are in one group"
    ):
        contrast([1.0, 2.0], [1.0, 2.0, 3.0], None, [0, 0, 0])
    with pytest.raises(
        ValueError, match=r"first has shape \(3, 2\): give one number a sample"
    ):
        contrast(np.eye(3, 2), [1.0, 2.0])


# --- design effect


def test_design_effect_by_hand():
    values = np.random.default_rng(0).normal(size=12)
    assert design_effect(values, np.arange(12)) == pytest.approx(1)
    # copies of each value: n / G times the variance, but for degrees of freedom
    assert design_effect(
        np.repeat(values, 5), np.repeat(np.arange(12), 5)
    ) == pytest.approx(59 / 11)
    assert (
        design_effect([0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1]) == 0
    )  # groups that balance out have the same mean
    assert np.isnan(design_effect(np.ones(4), [0, 0, 1, 1]))


def test_design_effect_is_the_ratio_of_variances():
    for context, item in SHARES:
        values, groups = crossed(np.random.default_rng(0), context, item, 4000)
        found = design_effect(values, groups)
        sizes = np.bincount(groups[1])
        # Kish: 1 + (m - 1) rho, of either factor; sizes count by their samples
        truth = 1 + 7 * context + ((sizes**2).sum() / 320 - 1) * item
        assert values.mean(0).var() * 320 == pytest.approx(truth, rel=0.06)
        # where little is shared, the largest of three estimates is a little too large
        assert found.shape == (4000,) and 0.97 * truth < found.mean() < 1.12 * truth


def test_bad_design_effect():
    with pytest.raises(ValueError, match="one group"):
        design_effect([1.0, 2.0], [0, 0])


# --- resampling


def test_resample_means_draws_with_replacement():
    n, resamples = 12, 300
    for size in (None, 5):
        # each sample marks its own head, so that the means count how often it was drawn
        draws = size or n
        counts = draws * resample_means(
            np.eye(n).reshape(n, 3, 4), resamples, 1, size
        ).reshape(resamples, n)
        assert np.allclose(counts, counts.round()) and np.allclose(counts.sum(1), draws)
        assert counts.max() > 1.5 and abs(counts.mean(0) - draws / n).max() < 0.3
    values = np.random.default_rng(0).normal(size=(n, 2, 3))
    means = resample_means(values, 4000)
    assert means.shape == (4000, 2, 3) and np.allclose(
        means.mean(0), values.mean(0), atol=0.03
    )
    assert np.allclose(means.std(0), values.std(0) / n**0.5, rtol=0.1)
    assert np.array_equal(means, resample_means(xr.DataArray(values), 4000))
    assert not np.array_equal(means, resample_means(values, 4000, seed=1))


def test_resample_means_draws_whole_groups():
    groups = np.array(list("aabcccdaab"))
    n, resamples = len(groups), 200
    shares = resample_means(np.eye(n)[:, None], resamples, groups=groups)[
        :, 0
    ]  # (resamples, n)
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
        with pytest.raises(
            ValueError, match="2 of 10 samples have NaN or Inf, drop these samples"
        ):
            use(holes)
    with pytest.raises(ValueError, match="one group, take at least 2 groups"):
        resample_means(values, groups=["a"] * 10)
    for labels in ([0, 1], [0, 1] * 4 + [None, 0]):
        with pytest.raises(
            ValueError, match=r"one label a sample \(10 of them, none missing\)"
        ):
            resample_means(values, groups=labels)
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"size={size}: draw 1 to 10 samples"):
            resample_means(values, size=size)
    with pytest.raises(ValueError, match="size=3: draw 1 to 2 groups"):
        resample_means(values, size=3, groups=[0, 1] * 5)
    with pytest.raises(
        ValueError,
        match="size=6: two disjoint subsets would take 12 of 10 samples, take 1 to 5",
    ):
        split_halves(values, size=6)


# --- tables of answers


def answers_of(
    rng,
    conditions: dict,
    domains=("image", "text"),
    contexts: int = 40,
    size: int = 3,
    **more,
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
                    sample = dict(
                        sample=f"{domain}{i}-{j}", context=f"{domain}{i}", domain=domain
                    )
                    answer = dict(
                        correct=right,
                        logprob=probability + rng.normal(0, 0.3),
                        margin=luck[j],
                    )
                    rows.append(name | sample | answer | more)
    return pd.DataFrame(rows)


def test_what_rows_share():
    answers = pd.DataFrame(
        {"sample": list("abc"), "context": list("xxy"), "draw": [0, 0, 0]}
    )
    assert [list(found) for found in groups_of(answers)] == [list("xxy")]
    answers["item"] = [
        "glyph 7",
        None,
        "glyph 7",
    ]  # a sample of a benchmark among those of the testbed
    answers.loc[2, "draw"] = 1
    assert [list(found) for found in groups_of(answers)] == [
        list("xxy"),
        ["glyph 7", "b", "glyph 7"],
        [0, 0, 1],
    ]


def test_summaries():
    rng = np.random.default_rng(0)
    heads = [{"heads": "top", "share": 0.1}, {"heads": "top", "share": 0.2}]
    rows = [
        h
        | dict(
            sample=f"{i}", context=f"{i // 8}", item=f"glyph {i % 37}", correct=bool(i % 3)
        )
        | dict(logprob=-1.0, margin=rng.normal())
        for h in heads
        for i in range(80)
    ]
    answers = pd.DataFrame(rows)
    table = summary(answers, ["heads", "share"])
    assert list(table.index) == [("top", 0.1), ("top", 0.2)]
    assert (table.n == 80).all() and table.n.dtype == np.int64
    assert (table.logprob_low == -1).all() and (table.logprob_high == -1).all()
    assert {f"{m}{e}" for m in METRICS for e in ("", "_low", "_high")} <= set(table.columns)
    part = answers[answers.share == 0.1]
    for metric in METRICS:
        low, high = mean_interval(part[metric], [part.context, part["item"]])
        found = table.iloc[0][[metric, f"{metric}_low", f"{metric}_high"]].tolist()
        assert found == pytest.approx([part[metric].mean(), low, high])
    alone = summary(answers.drop(columns="item"), "share", ["margin"])
    assert list(alone.columns) == ["n", "margin", "margin_low", "margin_high"]
    low, high = mean_interval(part.margin, part.context)
    assert alone.iloc[0].tolist() == pytest.approx([80, part.margin.mean(), low, high])


def test_summaries_count_draws():
    """Draws that differ widen the interval of "random" alone."""
    rng = np.random.default_rng(0)
    top = answers_of(rng, {"top": 0.4}, ("image",))
    random = [
        answers_of(rng, {"random": 0.3 + 0.2 * d}, ("image",), draw=d) for d in range(3)
    ]
    answers = pd.concat([top.assign(draw=0), *random])
    table = summary(answers, "condition", ["correct"])
    width = table.correct_high - table.correct_low
    part = answers[answers.condition == "random"]
    assert width["random"] > 2 * width["top"] and table.n["random"] == 360
    low, high = mean_interval(part.correct, [part.context, part.draw])
    assert (table.correct_low["random"], table.correct_high["random"]) == (low, high)


def simulated_damage(
    rng, shares, simulations: int, before: float, after: float
) -> pd.DataFrame:
    """A table of intact and damaged answers with the column "seed", one a simulation."""
    intact, damaged, groups = crossed_pair(rng, shares, simulations, 0.6)
    # simulations one after the other
    table = pd.DataFrame(
        {"seed": np.arange(simulations).repeat(len(intact)), "domain": "image"}
    )
    table["sample"] = np.arange(len(table))
    table["context"], table["item"] = (np.tile(labels, simulations) for labels in groups)
    return pd.concat(
        [
            table.assign(condition="intact", correct=(intact < norm.ppf(before)).T.ravel()),
            table.assign(condition="top", correct=(damaged < norm.ppf(after)).T.ravel()),
        ]
    )


@pytest.mark.parametrize(
    "shares, before, after",
    [*[(shares, 0.95, 0.6) for shares in SHARES], (SHARES[-1], 0.9, 0.15)],
    ids=str,
)
def test_intervals_of_damage_cover(shares, before, after):
    answers = simulated_damage(np.random.default_rng(5), shares, 800, before, after)
    found = normalised_damage(answers, ["condition", "seed"], chance=0.1)
    truth = (before - after) / (before - 0.1)
    assert len(found) == 800 and found.damage.mean() == pytest.approx(truth, abs=0.005)
    assert 0.93 <= covered((found.damage_low, found.damage_high), truth) <= 0.97


def test_damage_by_hand():
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"intact": 0.9, "top": 0.3, "random": 0.8})
    answers["answer"] = [str(i % 4) for i in range(len(answers))]
    found = normalised_damage(answers, ["condition", "domain"])
    assert list(found.index) == [
        (c, d) for d in ("image", "text") for c in ("top", "random")
    ]
    assert list(found.columns) == ["n", "damage", "damage_low", "damage_high"]
    accuracy = answers.groupby(["condition", "domain"]).correct.mean()
    commonest = {}
    for domain, part in answers[answers.condition == "intact"].groupby("domain"):
        commonest[domain] = part.answer.value_counts(normalize=True).iloc[0]
    for condition, domain in found.index:
        before, after = accuracy["intact", domain], accuracy[condition, domain]
        share = (before - after) / (before - commonest[domain])
        assert found.damage[condition, domain] == pytest.approx(share)
    assert ((found.damage_low < found.damage) & (found.damage < found.damage_high)).all()
    pd.testing.assert_frame_equal(
        found, normalised_damage(answers, ["condition", "domain"], commonest)
    )
    both = normalised_damage(answers, "condition", commonest)
    before, after = accuracy["intact"].mean(), accuracy["top"].mean()
    level = np.mean(list(commonest.values()))
    assert both.damage["top"] == pytest.approx((before - after) / (before - level))
    curve = answers.rename(columns={"condition": "heads"})
    again = normalised_damage(curve, ["heads", "domain"])
    assert again.to_numpy() == pytest.approx(found.to_numpy())


@pytest.mark.filterwarnings("error")
def test_damage_without_spread_or_without_a_scale():
    answers = pd.DataFrame({"sample": range(20), "context": range(20), "domain": "image"})
    answers = pd.concat(
        [
            answers.assign(condition="intact", correct=True),
            answers.assign(condition="none", correct=True),
            answers.assign(condition="all", correct=False),
        ]
    )
    found = normalised_damage(answers, "condition", chance=0.2)
    margin = proportion_interval(0, 20)[1] / 0.8
    assert found.loc["none"].tolist() == pytest.approx([20, 0, -margin, margin])
    assert found.loc["all"].tolist() == pytest.approx(
        [20, 1.25, 1.25 - margin, 1.25 + margin]
    )
    found = normalised_damage(answers, "condition", chance=1.0)
    assert (found.n == 20).all() and found.drop(columns="n").isna().all(axis=None)


def test_bad_damage():
    answers = answers_of(np.random.default_rng(0), {"intact": 0.9, "top": 0.3}, ("image",))
    with pytest.raises(ValueError, match="sample 'image0-0' has no answer under 'whole'"):
        normalised_damage(answers, "condition", 0.1, intact="whole")
    with pytest.raises(
        ValueError, match="sample 'image0-0' has several answers under 'intact'"
    ):
        normalised_damage(pd.concat([answers, answers]), "condition", 0.1)
    with pytest.raises(ValueError, match="no chance level for domain 'image'"):
        normalised_damage(answers, "condition", {"text": 0.1})


MEASURES = {"accuracy": "correct", "logprob": "logprob"}


def test_compare_is_paired_over_samples():
    """Whatever the order of the rows, each row is what `paired` gives, and the family is the whole table."""
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"intact": 0.95, "top": 0.4, "random": 0.9})
    table = compare(
        answers.sample(frac=1, random_state=1), "top", ["random", "intact"], by="domain"
    )
    assert set(table.index) == {
        (d, c) for d in ("image", "text") for c in ("random", "intact")
    }
    assert table.index.names == ["domain", "control"]
    wide = answers.pivot(index=["domain", "context", "sample"], columns="condition")
    for domain, control in table.index:
        part, row = wide.loc[domain], table.loc[domain, control]
        contexts = part.index.get_level_values("context").to_numpy()
        for measure, column in MEASURES.items():
            one, two = part[column]["top"].to_numpy(), part[column][control].to_numpy()
            if measure == "accuracy":
                one, two = one.astype(bool), two.astype(bool)
            found = row[
                [f"{measure}_{key}" for key in ("difference", "low", "high", "p", "effect")]
            ]
            assert tuple(found) == pytest.approx(paired(one, two, contexts))
        lost = part["correct"]["top"].astype(float) - part["correct"][control]
        assert (
            row.design_effect == pytest.approx(design_effect(lost, contexts))
            and row.n == 120
        )
    p = table[["accuracy_p", "logprob_p"]].to_numpy()
    for found, expected in zip(("holm", "bonferroni"), correct(p)):
        assert np.array_equal(table[[f"accuracy_{found}", f"logprob_{found}"]], expected)
    assert (table.accuracy_difference < -0.3).all() and (table.accuracy_holm < 1e-4).all()


def test_compare_by_any_columns_or_none():
    rng = np.random.default_rng(0)
    one, two = (
        answers_of(rng, {"top": 0.4, "random": 0.9}, model=m) for m in ("small", "large")
    )
    answers = pd.concat([one, two])
    assert list(compare(one, "top", ["random"]).index) == [
        ("image", "random"),
        ("text", "random"),
    ]
    both = compare(answers, "top", ["random"], by=["model", "domain"])
    assert both.index.names == ["model", "domain", "control"] and len(both) == 4
    single = compare(one, "top", ["random"])
    raw = [c for c in single if not c.endswith(("holm", "bonferroni"))]
    pd.testing.assert_frame_equal(
        both.loc["small"][raw], single[raw]
    )  # the family alone is larger
    every = compare(one, "top", ["random"], by=[])
    assert list(every.index) == ["random"] and every.n["random"] == 240
    assert every.accuracy_difference["random"] == pytest.approx(
        single.accuracy_difference.mean()
    )


def test_compare_counts_items():
    """Answers that go with the digit: many samples are few digits."""
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"top": 0.4, "random": 0.9}, ("image",))
    by_context = compare(answers, "top", ["random"]).loc["image", "random"]
    samples = answers["sample"].unique()
    item = pd.Series(rng.integers(12, size=len(samples)), samples)
    answers["item"] = answers["sample"].map(item)
    hard = answers["item"] < 6
    answers["correct"] = np.where(answers.condition == "top", hard, answers.correct)
    row = compare(answers, "top", ["random"]).loc["image", "random"]
    assert row.design_effect > 3 > by_context.design_effect
    top, random = (answers[answers.condition == name] for name in ("top", "random"))
    groups = [top.context.to_numpy(), top["item"].to_numpy()]
    expected = paired(top.correct.to_numpy(), random.correct.to_numpy(), groups)
    assert tuple(row[f"accuracy_{key}"] for key in expected._fields) == pytest.approx(
        expected
    )


def test_compare_reads_the_columns_of_a_curve():
    """heads, share and draw in place of condition; each draw of one side is paired with each of the other."""
    rng = np.random.default_rng(0)
    answers = []
    for name, draws in {
        "top": [0],
        "random": [0, 1, 2],
        "layer": [0, 1],
        "bottom": [0],
    }.items():
        for draw in draws:
            once = {"once": 0.4 if name == "top" else 0.8}
            table = answers_of(np.random.default_rng(7), once, ("image",)).drop(
                columns="condition"
            )
            table["correct"] ^= rng.random(len(table)) < 0.1
            answers.append(table.assign(heads=name, share=0.05, draw=draw))
    answers = pd.concat(answers, ignore_index=True)
    found = compare(answers, "top", ["random", "layer", "bottom"])
    assert (found.n == 120).all()
    top, random = answers[answers["heads"] == "top"], answers[answers["heads"] == "random"]
    # the rows of each draw stand in the order of the samples
    one = np.tile(top.correct, 3)
    expected = paired(one, random.correct.to_numpy(), [random.context, random.draw])
    row = found.loc["image", "random"]
    assert tuple(row[f"accuracy_{key}"] for key in expected._fields) == pytest.approx(
        expected
    )
    nats = np.tile(top.logprob, 3) - random.logprob
    assert row.logprob_difference == pytest.approx(nats.mean())
    bottom = answers[answers["heads"] == "bottom"]
    expected = paired(top.correct.to_numpy(), bottom.correct.to_numpy(), top.context)
    assert found.loc["image", "bottom"].accuracy_p == pytest.approx(expected.p)
    # several draws on both sides
    both = compare(answers, "random", ["layer"]).loc["image", "layer"]
    layer = answers[answers["heads"] == "layer"]
    assert both.n == 120 and both.accuracy_difference == pytest.approx(
        random.correct.mean() - layer.correct.mean()
    )
    assert (
        compare(answers[answers.draw == 0], "random", ["layer"])
        .loc["image", "layer"]
        .accuracy_p
        != both.accuracy_p
    )


def test_compare_of_draws_that_go_with_the_data():
    """Each seed of the data has its own draw of heads: one pair a sample, and three draws."""
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
    top, random = answers[answers["heads"] == "top"], answers[answers["heads"] == "random"]
    expected = paired(
        top.correct.to_numpy(), random.correct.to_numpy(), [random.context, random.draw]
    )
    assert row.n == 360 and row.accuracy_p == pytest.approx(expected.p)


def test_what_cannot_be_compared():
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"top": 0.4, "random": 0.9}, ("image",), contexts=4)
    lacking = answers[
        ~((answers["sample"] == "image2-1") & (answers.condition == "random"))
    ]
    with pytest.raises(
        ValueError,
        match=r"sample 'image2-1' has no answer under 'random': evaluate both on the same",
    ):
        compare(lacking, "top", ["random"])
    with pytest.raises(
        ValueError, match="no condition 'rnadom': there are 'top', 'random'"
    ):
        compare(answers, "top", ["rnadom"])
    curve = answers.rename(columns={"condition": "heads"})
    shares = pd.concat([curve.assign(share=0.05), curve.assign(share=0.1)])
    with pytest.raises(
        ValueError,
        match=r"sample 'image0-0' has several answers under 'top': keep one share",
    ):
        compare(shares, "top", ["random"])
    assert len(compare(shares, "top", ["random"], by=["domain", "share"])) == 2
    with pytest.raises(ValueError, match="1 of 12 samples have NaN or Inf"):
        compare(
            answers.assign(logprob=answers.logprob.where(answers.index > 0)),
            "top",
            ["random"],
        )
    with pytest.raises(ValueError, match="in one group"):
        compare(answers.assign(context="c"), "top", ["random"])


def test_what_compare_cannot_find_it_names():
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"top": 0.2, "intact": 0.9})
    for against, problem in (
        ("intact", "against='intact': give a list"),
        ([], "one control or more"),
        (["intakt"], "no condition 'intakt': there are 'top', 'intact'"),
    ):
        with pytest.raises(ValueError, match=problem):
            compare(answers, "top", against)
    with pytest.raises(ValueError, match="no condition 'topp'"):
        compare(answers, "topp", ["intact"])
    with pytest.raises(ValueError, match="no column 'domain' to compare by"):
        compare(answers.drop(columns="domain"), "top", ["intact"])


def test_rows_without_a_group_are_one():
    rng = np.random.default_rng(0)
    answers = answers_of(rng, {"top": 0.2, "intact": 0.9})
    answers["domain"] = answers.domain.where(answers.domain == "image")
    table = summary(answers, ["condition", "domain"], ["correct"])
    assert len(table) == 4 and table.n.sum() == len(answers)
    assert list(compare(answers, "top", ["intact"]).n) == [120, 120]


@pytest.mark.parametrize("share", [0, -1, 50])
def test_a_share_of_the_mass_is_a_share(share):
    with pytest.raises(ValueError, match=f"share={share}"):
        heads_for_share(np.ones((2, 3)), share)
