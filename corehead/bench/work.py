"""What a decoder must do and hold, counted from its shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models import MLLM


def layer_parameters(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Weights of one decoder layer: four projections of attention and the three matrices of a gated MLP."""
    return 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * intermediate


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of hybrid attention; a multiplication and an addition are two FLOPs.

    Parameters
    ----------
    mllm : MLLM
        Its shape and dtype count, not its weights.
    full : ndarray of bool, (layers, heads)
        The query heads that see all keys; the others stream.
    window, sinks : int
        Of the streaming heads: the query at i sees [i - window, i] and the first `sinks` keys.
    """

    mllm: MLLM
    full: np.ndarray
    window: int
    sinks: int

    @property
    def weights(self) -> int:
        """Parameters of the decoder's layers that every token passes."""
        m = self.mllm
        config = m.text_config
        sizes = (
            config.hidden_size,
            config.intermediate_size,
            m.n_heads,
            m.n_kv_heads,
            m.head_dim,
        )
        return m.n_layers * layer_parameters(*sizes)

    @property
    def output_weights(self) -> int:
        """Parameters of the output embedding."""
        config = self.mllm.text_config
        return config.hidden_size * config.vocab_size

    @property
    def streaming_keys(self) -> int:
        """Keys that a streaming head sees at most: window, own position, sinks."""
        return self.window + 1 + self.sinks

    def attention_flops(self, n: int) -> float:
        """FLOPs of Q K^T and A V over a causal prompt of n tokens."""
        full = n * (n + 1) / 2  # keys that a full head sees in all rows together
        # early rows have fewer keys in front of them
        streaming = float(np.minimum(np.arange(1, n + 1), self.streaming_keys).sum())
        return (
            4
            * self.mllm.head_dim
            * (self.full.sum() * full + (~self.full).sum() * streaming)
        )

    def prefill_flops(self, n: int) -> float:
        """FLOPs of the decoder over n tokens and of the last one's logits."""
        return 2 * (self.weights * n + self.output_weights) + self.attention_flops(n)

    def cache_bytes(self, n: int) -> float:
        """Bytes of the keys and values that are kept of n tokens: all in full groups and in layers with mixed ones."""
        by_group = self.full.reshape(len(self.full), self.mllm.n_kv_heads, -1)
        mixed = by_group.any(2) & ~by_group.all(2)
        kept = by_group.any(2) | mixed.any(1, keepdims=True)  # (L, Hkv)
        tokens = kept.sum() * n + (~kept).sum() * min(n, self.streaming_keys)
        # keys and values
        return float(2 * tokens * self.mllm.head_dim * self.mllm.model.dtype.itemsize)

    def step_bytes(self, n: int) -> float:
        """Bytes that are read to decode one token behind n."""
        weights = self.weights + self.output_weights  # all of them, for a single token
        return weights * self.mllm.model.dtype.itemsize + self.cache_bytes(n)
