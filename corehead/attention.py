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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .models import MLLM

NAME = "corehead"
# attention weights (float32) held at once while rows are read: what stays in a CPU's cache, what keeps a GPU busy
BLOCK = {"cpu": 2**18, "cuda": 2**26}


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
    hkv, n, g = *key.shape[1:3], groups.shape[-1]
    q = (query.float() * scaling).reshape(b, hkv, h // hkv, r, d)
    k = key.float().transpose(-1, -2)  # (B, Hkv, D, N)
    columns = torch.cat([groups, torch.ones_like(groups[..., :1])], -1)  # the last column sums the whole row
    sums = torch.empty(b, hkv, h // hkv, r, g + 1, device=query.device)
    entropy = torch.empty(b, hkv, h // hkv, r, device=query.device)
    step = max(1, BLOCK.get(query.device.type, 2**24) // (b * h * n))
    for i in range(0, r, step):
        rows = slice(i, i + step)
        logits = (q[:, :, :, rows].reshape(b, hkv, -1, d) @ k).view(b, hkv, h // hkv, -1, n)
        # finite, so that a masked key adds exactly 0 to the entropy: 0 * -1e30, where 0 * -inf is NaN
        logits.masked_fill_(~mask[:, None, None, rows], -1e30)
        logits -= logits.amax(-1, keepdim=True)
        weights = logits.exp()
        part = (weights.flatten(1, 3) @ columns).view(*weights.shape[:-1], g + 1)
        total = part[..., -1]  # partition function Z of each row
        sums[:, :, :, rows] = part / total[..., None]
        entropy[:, :, :, rows] = total.log() - weights.mul_(logits).sum(-1) / total
    return sums[..., :g].flatten(1, 2).transpose(1, 2), entropy.flatten(1, 2).transpose(1, 2)


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
    if attention_mask is not None and attention_mask.shape[1] == 1 and query.shape[2] < key.shape[2]:
        # a short chunk behind a cache: the query heads of a KV head become rows, so that the cache is not repeated
        b, h, r, d = query.shape
        packed = query.reshape(b, key.shape[1], -1, d)
        mask = attention_mask[..., : key.shape[2]].repeat(1, 1, h // key.shape[1], 1)
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return out.view(b, h, r, -1).transpose(1, 2).contiguous(), None
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
