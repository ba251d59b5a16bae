"""The one attention function that corehead registers with transformers: it runs SDPA and reads rows on the side.

Rows are read where the queries and the keys are at hand, after norm and rotary embedding: for the chosen query rows
alone, in float32, grouped over the KV heads, and reduced at once to sums over token groups. Nothing of size N x N
exists at any time; reading |Q| rows of H heads over N keys takes O(H |Q| N) memory, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .models import MLLM

NAME = "corehead"
BLOCK = 2**24  # attention weights (float32) held at once while rows are read


@dataclass
class RowReader:
    """What is read from every layer in one forward pass.

    Parameters
    ----------
    rows : (R,) int64, query rows of the present chunk to read.
    groups : (B, N, G) float32, membership of each key in each of G token groups.

    Attributes
    ----------
    sums : one (B, R, H, G) float32 tensor a layer: attention mass of each row on each group.
    entropy : one (B, R, H) float32 tensor a layer: entropy of each row in nats.
    """

    rows: torch.Tensor
    groups: torch.Tensor
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    entropy: dict[int, torch.Tensor] = field(default_factory=dict)


_READERS: dict[int, RowReader] = {}  # by id of the attention module


def row_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    groups: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of query rows on groups of keys, and the rows' entropy, without a full attention matrix.

    Parameters
    ----------
    query : (B, H, R, D), after norm and rotary embedding.
    key : (B, Hkv, N, D), not repeated; H is a multiple of Hkv.
    groups : (B, N, G) float32.
    mask : (B or 1, R, N) bool, True where a row may attend.
    scaling : factor on the dot products.

    Returns
    -------
    sums : (B, R, H, G) float32, softmax weights summed over each group.
    entropy : (B, R, H) float32, nats.
    """
    b, h, r, d = query.shape
    hkv, n = key.shape[1:3]
    q = query.float().reshape(b, hkv, h // hkv, r, d)
    k = key.float().transpose(-1, -2)  # (B, Hkv, D, N)
    sums = torch.empty(b, hkv, h // hkv, r, groups.shape[-1], device=query.device)
    entropy = torch.empty(b, hkv, h // hkv, r, device=query.device)
    step = max(1, BLOCK // (b * h * n))
    for i in range(0, r, step):
        rows = slice(i, i + step)
        part = q[:, :, :, rows].reshape(b, hkv, -1, d)
        logits = (part @ k).view(b, hkv, h // hkv, -1, n).mul_(scaling)
        hidden = ~mask[:, None, None, rows]
        logits.masked_fill_(hidden, -torch.inf)
        logits -= logits.amax(-1, keepdim=True)
        total = logits.logsumexp(-1)
        weights = (logits - total[..., None]).exp_()
        sums[:, :, :, rows] = (weights.flatten(1, 3) @ groups).view(*weights.shape[:-1], -1)
        # entropy = log Z - sum p * logit; a masked key has p = 0 and must not give 0 * -inf
        entropy[:, :, :, rows] = total - (weights * logits.masked_fill_(hidden, 0.0)).sum(-1)
    return sums.flatten(1, 2).transpose(1, 2), entropy.flatten(1, 2).transpose(1, 2)


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA, as transformers runs it; where a reader waits for this module, its rows are read first."""
    reader = _READERS.get(id(module))
    if reader is not None:
        rows, n, length = reader.rows, key.shape[2], query.shape[2]
        if attention_mask is None:
            mask = torch.arange(n, device=query.device) <= (n - length + rows)[:, None]
            mask = mask[None]
        else:
            mask = attention_mask[:, 0, rows, :n]
            mask = mask if mask.dtype == torch.bool else mask == 0
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sums, entropy = row_sums(query[:, :, rows], key, reader.groups, mask, scale)
        reader.sums[module.layer_idx], reader.entropy[module.layer_idx] = sums, entropy
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def own_attention(mllm: MLLM) -> Iterator[None]:
    """Run the decoder of a model by corehead's attention function; the vision tower keeps its own.

    On exit, also by an exception, the model has the implementation that it had.
    """
    config = mllm.text_config
    before = config._attn_implementation
    if before == NAME:  # nested
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def reading(mllm: MLLM, rows: torch.Tensor, groups: torch.Tensor) -> Iterator[RowReader]:
    """Read rows in every decoder layer during the forward pass inside.

    Parameters
    ----------
    mllm : the model that will run.
    rows : (R,) int64, rows of the chunk that is fed, counted from its first token.
    groups : (B, N, G) float32 over all keys, the cached ones first.

    Yields
    ------
    RowReader, filled once the model has run
    """
    reader = RowReader(rows, groups)
    modules = mllm.attentions
    with own_attention(mllm):
        for module in modules:
            _READERS[id(module)] = reader
        try:
            yield reader
        finally:
            for module in modules:
                del _READERS[id(module)]
