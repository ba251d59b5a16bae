"""Gates on heads: factors in [0, 1] on what heads write, their gradients, and a set of heads that is learned by them.

Weights stay as they are. Learned gates say how few heads could do what the heads of a ranking do: a bound for any
ranking that is made without training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import xarray as xr
from tqdm.auto import tqdm

from .attention import Call, Hook, hooks
from .batching import Context, batches, embedded, pack
from .models import MLLM
from .samples import Sample

# of the hard concrete distribution (arXiv 1712.01312): temperature, and the ends that a closing is stretched to before
# it is clipped to [0, 1], so that it is often exactly 0 or 1
TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
# of the closings before training: a head is touched in about one draw of five
START = -2.0


class Gate(Hook):
    """Multiplies the outputs of one layer's heads by gates (B, H)."""

    def __init__(self, gates: torch.Tensor):
        self.gates = gates

    def output(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        return out * self.gates[:, None, :, None].to(out)


class GatedBatch:
    """A batch whose media have been read, to be run under any gates.

    Parameters
    ----------
    mllm : MLLM
    batch : list of Context
        With answers.

    Attributes
    ----------
    names : list of str
        Ids of the samples, a batch row each.
    """

    def __init__(self, mllm: MLLM, batch: list[Context]):
        self.mllm = mllm
        # a sequence a row: a cached prefix would cut off the gradient
        self.packed = pack(mllm, batch, alone=True)
        with torch.no_grad():  # gates do not touch the vision tower
            self.feed = embedded(mllm, self.packed.chunk)
        blocks = [block for _, _, block in self.packed.blocks()]
        self.names = [block.tagged.sample.id for block in blocks]
        self.answers = [torch.from_numpy(block.answer) for block in blocks]

    def logprobs(self, gates: torch.Tensor) -> torch.Tensor:
        """Log-probability (B,) of each row's answer under gates (layers, B, heads), which may require gradients."""
        by_layer = {layer: [Gate(gate)] for layer, gate in enumerate(gates)}
        with torch.enable_grad(), hooks(self.mllm, by_layer, self.packed.roles):
            decoder = self.mllm.decoder
            states = decoder(**self.feed, use_cache=False).last_hidden_state
            # padding is on the left, so that answers end together
            longest = max(map(len, self.answers))
            logits = self.mllm.logits(states[:, -longest - 1 : -1]).float()
        totals = []
        for row, answer in zip(logits.log_softmax(-1), self.answers):
            answer = answer.to(row.device)
            # the row in front of a token predicts it
            totals.append(row[-len(answer) :].gather(1, answer[:, None]).sum())
        return torch.stack(totals)


def closings(
    mllm: MLLM,
    samples: Iterable[Sample],
    *,
    penalty: float = 0.05,
    steps: int = 120,
    rate: float = 0.2,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.DataArray:
    r"""Learn which heads to close, so that answers get lost and as few heads as possible are closed.

    The complement of what DuoAttention (arXiv 2410.10819) and causal head gating (arXiv 2505.13737) do, which open few
    heads and keep answers right: those heads would also be what the model needs to do anything at all.

    Minimizes :math:`-\log(1 - p(\text{answer})) + \lambda \, \mathrm{E}[\text{heads that are touched}]` by Adam. The
    gates are 1 less a hard concrete variable, drawn for every sample and step: a plain sigmoid could stay half open,
    which is no set of heads, and where heads stand in for each other it would see no gradient on any single one; random
    gates close the others at times.

    Parameters
    ----------
    mllm : MLLM
    samples : iterable of Sample
        With answers, which the model should know.
    penalty : float
        What a head costs, in nats; above 0.
    steps, rate, seed
        Of Adam, a step a batch; of the draws.
    batch_size, progress
        Contexts at once; a bar.

    Returns
    -------
    DataArray (layer, head)
        How probable it is that a head is touched, in [0, 1]; the ranking takes the closed ones first.

    Raises
    ------
    ValueError
        There are no samples, or the penalty is not above 0.
    SampleError
        A sample cannot be tagged, or has no answer.
    """
    if penalty <= 0:
        raise ValueError(f"penalty={penalty}: above 0, or all heads would be closed")
    found = batches(mllm, samples, batch_size, need_answer=True)
    fed = [GatedBatch(mllm, batch) for batch in found]
    if not fed:
        raise ValueError("no samples: give some")
    # on the CPU, where the same seed draws the same on every machine
    rng = torch.Generator().manual_seed(seed)
    weight = torch.full(mllm.shape, START, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=rate)
    for step in tqdm(range(steps), desc="closing heads", disable=not progress):
        batch = fed[step % len(fed)]
        gates = 1 - _draw(weight, len(batch.names), rng)
        logprobs = batch.logprobs(gates.to(mllm.device))
        # of a wrong answer; log 0, where the right one is certain, is kept off
        wrong = torch.log(-torch.expm1(logprobs.clamp(max=-1e-6)))
        loss = penalty * _touched(weight).sum() - wrong.mean().cpu()
        [weight.grad] = torch.autograd.grad(loss, [weight])
        optimizer.step()
    return xr.DataArray(_touched(weight).detach().numpy(), dims=("layer", "head"))


def _draw(weight: torch.Tensor, rows: int, rng: torch.Generator) -> torch.Tensor:
    """Closings (layers, rows, heads) in [0, 1]."""
    layers, heads = weight.shape
    noise = torch.rand(layers, rows, heads, generator=rng).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((noise.logit() + weight[:, None]) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def _touched(weight: torch.Tensor) -> torch.Tensor:
    """Probability that a closing is above 0."""
    return torch.sigmoid(weight - TEMPERATURE * math.log(-LOW / HIGH))
