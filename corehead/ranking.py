"""Sets and rankings of attention heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set

import numpy as np


class HeadSet(Set):
    """A frozen set of heads, each a pair (layer, head); ``|``, ``&``, ``-``, ``len`` and ``in`` as for any set."""

    def __init__(self, heads: Iterable[tuple[int, int]] = ()):
        self._heads = frozenset((int(layer), int(head)) for layer, head in heads)

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

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        """Membership as an array (layers, heads) of bool."""
        out = np.zeros(shape, bool)
        for head in self:
            out[head] = True
        return out


class HeadRanking:
    """Heads from highest to lowest score.

    Parameters
    ----------
    values : (layers, heads) finite scores. Equal scores keep the order layer, head.
    name : what they are, for legends and tables.

    Attributes
    ----------
    order : (layers * heads, 2) int64 pairs (layer, head), best first.
    """

    def __init__(self, values: np.ndarray, name: str = ""):
        self.values, self.name = np.asarray(values, float), name
        if self.values.ndim != 2 or not np.isfinite(self.values).all():
            raise ValueError("a ranking needs finite scores of shape (layers, heads)")
        flat = np.argsort(-self.values, axis=None, kind="stable")
        self.order = np.stack(np.unravel_index(flat, self.values.shape), 1)

    def top(self, share: float) -> HeadSet:
        """The best heads: at least one, and `share` of all rounded to the nearest number."""
        return HeadSet(self.order[: self.count(share)])

    def bottom(self, share: float) -> HeadSet:
        """The last heads, as many as `top` has."""
        return HeadSet(self.order[len(self.order) - self.count(share) :])

    def count(self, share: float) -> int:
        """How many heads a share in (0, 1] is."""
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: take a number in (0, 1], such as 0.05 for 5 %")
        return max(1, math.floor(share * len(self.order) + 0.5))

    def __repr__(self) -> str:
        layers, heads = self.values.shape
        return f"HeadRanking({self.name}: {layers} x {heads} heads)"


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
