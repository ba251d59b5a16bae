"""Sets and rankings of attention heads, and how far two rankings agree."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import hypergeom, kendalltau, rankdata

from .stats import bootstrap_means, checked_samples


class HeadSet(Set):
    """A frozen set of heads, each a pair (layer, head); ``|``, ``&``, ``-``, ``len`` and ``in`` as for any set.

    Parameters
    ----------
    heads : pairs (layer, head).
    shape : (layers, heads) of their model, where it is known. What is combined with this set takes it over; equality
        and hash go by the heads alone.

    Raises
    ------
    ValueError : a head is outside `shape`; two sets of models of different shapes are combined.
    """

    def __init__(self, heads: Iterable[tuple[int, int]] = (), shape: tuple[int, int] | None = None):
        self._heads = frozenset((int(layer), int(head)) for layer, head in heads)
        self.shape = None if shape is None else (int(shape[0]), int(shape[1]))
        if self.shape is not None:
            self._inside(self.shape)

    def __contains__(self, head) -> bool:
        return tuple(head) in self._heads

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(sorted(self._heads))

    def __len__(self) -> int:
        return len(self._heads)

    def __hash__(self) -> int:
        return hash(self._heads)

    def __repr__(self) -> str:
        return f"HeadSet({list(self)})"

    def __and__(self, other) -> HeadSet:
        return Set.__and__(self._beside(other), other)

    def __or__(self, other) -> HeadSet:
        return Set.__or__(self._beside(other), other)

    def __sub__(self, other) -> HeadSet:
        return Set.__sub__(self._beside(other), other)

    def _from_iterable(self, heads) -> HeadSet:
        """What `Set` makes its results with: they keep the shape."""
        return HeadSet(heads, self.shape)

    def _beside(self, other) -> HeadSet:
        """This set, with the shape of the other where it has none itself."""
        theirs = other.shape if isinstance(other, HeadSet) else None
        if theirs is None or theirs == self.shape:
            return self
        if self.shape is None:
            return HeadSet(self, theirs)
        raise ValueError(
            f"heads of a model with {_times(self.shape)} heads and of one with {_times(theirs)}: combine one model's"
        )

    def _inside(self, shape: tuple[int, int]) -> None:
        for layer, head in self:
            if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
                raise ValueError(
                    f"head ({layer}, {head}) is outside a model with {_times(shape)} heads: rank the heads of this one"
                )

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError unless these are heads, at least one, of a model with `shape` (layers, heads)."""
        if not self:
            raise ValueError("no heads: take at least one, such as the top 5 % of a ranking")
        if self.shape is not None and self.shape != tuple(shape):
            raise ValueError(
                f"heads of a model with {_times(self.shape)} heads, but this one has {_times(shape)}: "
                "rank the heads of this model"
            )
        self._inside(shape)

    def mask(self, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Membership as an array (layers, heads) of bool, of the set's own shape where none is given."""
        shape = self.shape if shape is None else shape
        if shape is None:
            raise ValueError("these heads know no model: give the shape (layers, heads) of the mask")
        self._inside(shape)
        out = np.zeros(shape, bool)
        for head in self:
            out[head] = True
        return out

    def query_heads(self, group: int) -> HeadSet:
        """The query heads of these KV heads, `group` for each."""
        shape = None if self.shape is None else (self.shape[0], self.shape[1] * group)
        return HeadSet(((layer, group * head + i) for layer, head in self for i in range(group)), shape)

    def to_duo_attention(self, path: str | Path, kv_heads: int, *, sinks: int, window: int) -> None:
        """Write the heads as a pattern that DuoAttention (arXiv 2410.10819) and kvpress read.

        Parameters
        ----------
        path : a folder; gets full_attention_heads.tsv, (layers, KV heads) with 1 where a query head of the group is in
            the set, and config.json.
        kv_heads : of each layer of the model.
        sinks, window : sink_size and recent_size of the streaming heads.

        Raises
        ------
        ValueError : the set knows no model; its query heads are no multiple of `kv_heads`.
        """
        mask = self.mask()
        if mask.shape[1] % kv_heads:
            raise ValueError(f"kv_heads={kv_heads}: {mask.shape[1]} query heads a layer are no multiple of that")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        groups = mask.reshape(len(mask), kv_heads, -1).any(2)
        np.savetxt(folder / "full_attention_heads.tsv", groups, fmt="%.1f", delimiter="\t")
        (folder / "config.json").write_text(json.dumps({"sink_size": sinks, "recent_size": window}) + "\n")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


class HeadRanking:
    """Heads from highest to lowest score.

    Parameters
    ----------
    values : (layers, heads) finite scores. Equal scores keep the order layer, head.
    name : what they are, for legends and tables.

    Attributes
    ----------
    order : (layers * heads, 2) int64 pairs (layer, head), best first.
    shape : (layers, heads) of the model.
    """

    def __init__(self, values: np.ndarray, name: str = ""):
        self.values, self.name = np.asarray(values, float), name
        if self.values.ndim != 2 or not np.isfinite(self.values).all():
            raise ValueError("a ranking needs finite scores of shape (layers, heads)")
        flat = np.argsort(-self.values, axis=None, kind="stable")
        self.order = np.stack(np.unravel_index(flat, self.values.shape), 1)
        self.shape: tuple[int, int] = self.values.shape

    def top(self, share: float, group: int = 1) -> HeadSet:
        """The best heads: at least one, and `share` of all rounded to the nearest number.

        With `group`, the query heads of a KV head, whole KV groups are taken, by their best head: what hybrid attention
        can keep dense at no more than `share` of the KV cache.
        """
        if group == 1:
            return HeadSet(self.order[: self.count(share)], self.shape)
        return self.groups(group).top(share).query_heads(group)

    def groups(self, group: int) -> HeadRanking:
        """KV heads by the best of their `group` query heads."""
        if self.shape[1] % group:
            raise ValueError(f"group={group}: {self.shape[1]} query heads a layer are no multiple of that")
        return HeadRanking(self.values.reshape(self.shape[0], -1, group).max(2), self.name)

    def bottom(self, share: float) -> HeadSet:
        """The last heads, as many as `top` has."""
        return HeadSet(self.order[len(self.order) - self.count(share) :], self.shape)

    def count(self, share: float) -> int:
        """How many heads a share in (0, 1] is."""
        return _count(share, len(self.order))

    def __repr__(self) -> str:
        return f"HeadRanking({self.name}: {_times(self.shape)} heads)"


def _count(share: float, n: int) -> int:
    """How many of n heads a share is."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: take a number in (0, 1], such as 0.05 for 5 %")
    return max(1, math.floor(share * n + 0.5))


def random_heads(ranking: HeadRanking, like: HeadSet, seed: int = 0, match: str | None = None) -> HeadSet:
    """As many heads as `like` has, drawn at random from the other heads of the model: a control for `like`.

    Parameters
    ----------
    ranking : of the model's heads; only its shape counts.
    like : the heads to stand in for. None of them is drawn.
    seed : of the draw.
    match : "layer" draws as many in each layer as `like` has there, which keeps the depth. What a layer cannot give,
        because `like` has more than half of it, comes from the nearest layers with heads left, ties at random.

    Raises
    ------
    ValueError : `like` is empty, of another model, or more than half of all heads; `match` is unknown.
    """
    if match not in (None, "layer"):
        raise ValueError(f"match={match!r}: take None or 'layer'")
    like.check(ranking.shape)
    inside = like.mask(ranking.shape)
    rng = np.random.default_rng(seed)
    free = rng.permutation(np.argwhere(~inside))  # (others, 2); shuffled, so that the first that fits is a random one
    if len(free) < len(like):
        raise ValueError(f"{len(like)} of {inside.size} heads leave {len(free)} to draw from: take at most half of all")
    if match is None:
        return HeadSet(free[: len(like)], ranking.shape)
    taken, missing = np.zeros(len(free), bool), []
    for layer, wanted in enumerate(inside.sum(1)):
        here = np.flatnonzero(free[:, 0] == layer)[:wanted]
        taken[here] = True
        missing += [layer] * (wanted - len(here))
    for layer in rng.permutation(missing):
        taken[np.where(taken, np.inf, np.abs(free[:, 0] - layer)).argmin()] = True
    return HeadSet(free[taken], ranking.shape)


def heads_for_share(values: np.ndarray, share: float = 0.5) -> float:
    """rho: the smallest share of heads that holds `share` of the positive score mass (arXiv 2605.27243's rho_0.5).

    Parameters
    ----------
    values : (..., layers, heads) scores; negative ones count as zero.
    share : part of the mass, in (0, 1].

    Returns
    -------
    float or array (...), in (0, 1]; NaN where no score is positive
    """
    flat = np.clip(np.asarray(values, float), 0, None)
    flat = -np.sort(-flat.reshape(*flat.shape[:-2], -1), axis=-1)
    total = flat.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        reached = flat.cumsum(-1) / total >= share - 1e-12
    rho = (reached.argmax(-1) + 1) / flat.shape[-1]
    return np.where(total[..., 0] > 0, rho, np.nan)[()]


def agreement(a, b, share: float = 0.05, persistence: float | None = None) -> dict[str, np.ndarray]:
    """How far rankings agree, pair by pair.

    Parameters
    ----------
    a, b : finite scores (..., layers, heads), arrays or HeadRankings; leading axes broadcast. Heads with equal scores
        are ranked in the order layer, head, as HeadRanking does, except in the first two measures, which know ties.
    share : of the heads, in (0, 1]; k heads as in `HeadRanking.count`, n is the number of all.
    persistence : p of the rank-biased overlap, in (0, 1); None takes 1 - 1/k, but at least 0.5. The first k ranks
        then have 85 to 89 % of the weight (69 % where k = 1), so that it looks about as deep as the top-k measures.

    Returns
    -------
    dict of arrays (...), floats where a and b are single rankings:
        spearman : rank correlation over all heads, in [-1, 1]; NaN where the scores of one side are all equal.
        kendall : tau-b over all heads, in [-1, 1]; NaN likewise.
        overlap : |A & B| / k of the two sets of k best heads, in [0, 1].
        jaccard : |A & B| / |A | B|, in [0, 1].
        corrected : (overlap - k/n) / (1 - k/n), 0 by chance and 1 for the same sets, which is Cohen's kappa
            (doi:10.1177/001316446002000104) of the two; NaN where k = n.
        rbo : rank-biased overlap (Webber, Moffat & Zobel 2010, doi:10.1145/1852102.1852106) of the whole rankings,
            (1 - p) * sum over depths d of p^(d-1) |A_d & B_d| / d, in (0, 1]. Beyond depth n both hold all heads and
            agree, which adds p^n.

    Raises
    ------
    ValueError : scores that are not finite or have no two axes, models of different shapes, a bad share or persistence.
    """
    a, b = (np.asarray(getattr(x, "values", x), float) for x in (a, b))
    for values in (a, b):
        if values.ndim < 2 or not np.isfinite(values).all():
            raise ValueError("agreement needs finite scores of shape (..., layers, heads)")
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(f"rankings of {_times(a.shape[-2:])} and of {_times(b.shape[-2:])} heads: compare one model's")
    a, b = (x.reshape(*x.shape[:-2], -1) for x in (a, b))  # (..., n)
    n = a.shape[-1]
    k = _count(share, n)
    centred = [r - r.mean(-1, keepdims=True) for r in (rankdata(x, axis=-1) for x in (a, b))]
    norms = [(r * r).sum(-1) for r in centred]
    # the axis argument of kendalltau is younger than the scipy that pyproject.toml asks for, and loops as well
    pairwise = np.vectorize(_kendall, otypes=[float], signature="(n),(n)->()")
    depth = np.maximum(_places(a), _places(b))  # (..., n): a head is in both sets when they go deeper than this
    overlap = (depth < k).sum(-1) / k
    weights, rest = _rbo_weights(k, n, persistence)
    with np.errstate(invalid="ignore"):
        out = {
            "spearman": (centred[0] * centred[1]).sum(-1) / np.sqrt(norms[0] * norms[1]),
            "kendall": pairwise(a, b),
            "overlap": overlap,
            "jaccard": overlap / (2 - overlap),
            "corrected": (overlap - k / n) / np.float64(1 - k / n),
            "rbo": (weights / np.arange(1, n + 1))[::-1].cumsum()[::-1][depth].sum(-1) + rest,
        }
    return {name: np.asarray(value)[()] for name, value in out.items()}


def _kendall(a: np.ndarray, b: np.ndarray) -> float:
    return kendalltau(a, b, method="asymptotic").statistic


def _places(flat: np.ndarray) -> np.ndarray:
    """Place of every head, 0 the best, (..., n) int, of scores (..., n)."""
    return np.argsort(np.argsort(-flat, axis=-1, kind="stable"), axis=-1)


def _rbo_weights(k: int, n: int, persistence: float | None) -> tuple[np.ndarray, float]:
    """Weights of the agreement at depths 1 to n, (n,), and at all greater ones together."""
    p = max(0.5, 1 - 1 / k) if persistence is None else persistence
    if not 0 < p < 1:
        raise ValueError(f"persistence={p}: take a number in (0, 1), such as 0.9 to look at about ten heads")
    return (1 - p) * p ** np.arange(n), p**n


def chance(n_heads: int, share: float, persistence: float | None = None) -> dict[str, float]:
    """Expected values of `agreement` for two independent random rankings without ties, all exact.

    Parameters
    ----------
    n_heads : number of all heads, at least 2.
    share, persistence : as in `agreement`.

    Returns
    -------
    dict with the keys of `agreement`. The number of heads that two sets of k share is hypergeometric, which gives the
    Jaccard index; at depth d the expected overlap is d / n, which gives rbo.
    """
    if n_heads < 2:
        raise ValueError(f"n_heads={n_heads}: a ranking needs at least 2 heads")
    k = _count(share, n_heads)
    common = np.arange(k + 1)
    weights, rest = _rbo_weights(k, n_heads, persistence)
    return {
        "spearman": 0.0,
        "kendall": 0.0,
        "overlap": k / n_heads,
        "jaccard": float(hypergeom.pmf(common, n_heads, k, k) @ (common / (2 * k - common))),
        "corrected": 0.0 if k < n_heads else math.nan,
        "rbo": float(weights @ np.arange(1, n_heads + 1) / n_heads + rest),
    }


def resample_means(values, resamples: int = 1000, seed: int = 0, size: int | None = None, groups=None) -> np.ndarray:
    """Bootstrap means of scores: what the ranking might have been with other samples.

    Parameters
    ----------
    values : (n, layers, heads) finite scores, a row a sample.
    resamples, seed : of the bootstrap.
    size : draws a resample, 1 to n (of groups, where they are given); None takes n.
    groups : (n,) labels; whole groups are drawn, such as the samples on one context.

    Returns
    -------
    (resamples, layers, heads) means

    Raises
    ------
    ValueError : fewer than 2 samples or groups, scores that are not finite, a bad size.
    """
    values, codes = checked_samples(values, groups)
    most = codes.max() + 1
    if size is not None and not 1 <= size <= most:
        raise ValueError(f"size={size}: draw 1 to {most} {'samples' if groups is None else 'groups'}")
    return bootstrap_means(values, codes, resamples, seed, size)


def split_halves(values, splits: int = 200, seed: int = 0, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Means over two disjoint random subsets of the samples, many times: the agreement of the two is reliability.

    Parameters
    ----------
    values : (n, layers, heads) finite scores, a row a sample.
    splits : number of random splits.
    seed : of the splits.
    size : samples in each subset, 1 to n // 2; None takes n // 2.

    Returns
    -------
    a, b : (splits, layers, heads) means

    Raises
    ------
    ValueError : fewer than 2 samples, scores that are not finite, a bad size.
    """
    values, _ = checked_samples(values)
    n = len(values)
    size = n // 2 if size is None else size
    if not 1 <= size <= n // 2:
        raise ValueError(f"size={size}: two disjoint subsets would take {2 * size} of {n} samples, take 1 to {n // 2}")
    place = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (splits, 1)), axis=1)  # (splits, n)
    flat = values.reshape(n, -1)
    halves = (place < size, (place >= size) & (place < 2 * size))
    a, b = ((half @ flat / size).reshape(splits, *values.shape[1:]) for half in halves)
    return a, b


def universal(cores: Mapping[str, np.ndarray], share: float = 0.05) -> pd.DataFrame:
    """In how many domains each head is among the best.

    Parameters
    ----------
    cores : domain -> scores (layers, heads) of one model.
    share : of the heads, in (0, 1].

    Returns
    -------
    DataFrame, a row for each head that is among the best in at least one domain, those of most domains first and then
    in the order layer, head: ``layer``, ``head``, a column of bool a domain, and ``domains``, their number.
    """
    tops = {name: HeadRanking(values).top(share) for name, values in cores.items()}
    shapes = {top.shape for top in tops.values()}
    if len(shapes) != 1:
        found = " and ".join(_times(shape) for shape in sorted(shapes)) or "no"
        raise ValueError(f"scores of {found} heads: give those of one model, a domain or more")
    masks = {name: top.mask() for name, top in tops.items()}
    heads = np.argwhere(np.any(list(masks.values()), 0))
    table = pd.DataFrame(heads, columns=["layer", "head"])
    for name, mask in masks.items():
        table[name] = mask[tuple(heads.T)]
    table["domains"] = table[list(masks)].sum(axis=1)
    return table.sort_values(["domains", "layer", "head"], ascending=[False, True, True], ignore_index=True)
