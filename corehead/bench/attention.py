"""What hybrid attention gains in prefill, in decoding and in the cache.

Side by side: full attention as transformers runs it (SDPA), hybrid attention with a share of KV groups full, and
streaming heads alone. Beside each time stands its *bound*: what the counted FLOPs take at the rate of a large matrix
product, or the counted bytes at the rate at which a large product of one row with a matrix reads, both measured in the
same process. The prompt is random hidden states: the vision tower's work is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import linear
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import CACHE  # what this release of transformers calls the cache
from ..hybrid import hybrid_attention
from ..models import MLLM
from ..ranking import HeadRanking, HeadSet
from .measure import MIB, in_turn, peak_memory
from .models import build
from .work import Work

# share of KV groups (of heads, where they are single) that are full; None is attention as transformers runs it. "whole"
# is hybrid attention with all groups full: what is due to its bookkeeping alone
WAYS: dict[str, float | None] = {
    "dense": None,
    "hybrid 5%": 0.05,
    "hybrid 10%": 0.1,
    "hybrid 20%": 0.2,
    "hybrid 50%": 0.5,
    "hybrid 10%, single heads": 0.1,
    "streaming": 0.0,
    "whole": 1.0,
}


@dataclass(frozen=True)
class Setting:
    """What all ways have in common; `steps` tokens are decoded in each of `repeats` rounds."""

    window: int
    sinks: int
    repeats: int = 3
    steps: int = 8


def full_heads(mllm: MLLM, way: str) -> HeadSet:
    """The heads of a way that see all keys: whole KV groups or single heads, at random."""
    shape, share = (mllm.n_layers, mllm.n_heads), WAYS[way]
    if share == 0:  # a ranking's top is never empty
        return HeadSet.of([], shape)
    # which groups they are makes no difference to the work; dense attention is counted as all full
    ranking = HeadRanking(np.random.default_rng(0).random(shape))
    single = way.endswith("single heads")
    return ranking.top(share or 1.0, group=1 if single else mllm.n_heads // mllm.n_kv_heads)


def running(mllm: MLLM, way: str, setting: Setting) -> AbstractContextManager:
    """The context in which a model attends in this way."""
    if WAYS[way] is None:
        return nullcontext()
    return hybrid_attention(mllm, full_heads(mllm, way), setting.window, setting.sinks)


def work(mllm: MLLM, way: str, setting: Setting) -> Work:
    """What a way must do, counted."""
    return Work(mllm, full_heads(mllm, way).mask, setting.window, setting.sinks)


def hidden_states(mllm: MLLM, tokens: int) -> torch.Tensor:
    """A random prompt (1, tokens, hidden size) as the decoder gets it."""
    shape = 1, tokens, mllm.text_config.hidden_size
    return torch.randn(shape, device=mllm.device, dtype=mllm.model.dtype)


@torch.inference_mode()
def prefill(mllm: MLLM, prompt: torch.Tensor) -> Cache:
    """The decoder over a prompt and the last token's logits; its cache."""
    return mllm.model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)[CACHE]


@torch.inference_mode()
def decode(mllm: MLLM, cache: Cache, steps: int) -> list[float]:
    """Seconds of each of `steps` new tokens behind a cache, after one that warms up."""
    token = hidden_states(mllm, 1)  # the same each time: what it is does not matter
    times = []
    for _ in range(steps + 1):
        begin = timer()
        mllm.model(inputs_embeds=token, use_cache=True, **{CACHE: cache})
        times.append(timer() - begin)
    return times[1:]


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values that a cache holds; layers that keep no plain `keys` have `nbytes`."""
    return sum(
        layer.nbytes
        if hasattr(layer, "nbytes")
        else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


@contextmanager
def attention_clock() -> Iterator[list[float]]:
    """Collect the seconds of every call of an attention function: no projections, but choice of heads and cache."""
    spent: list[float] = []
    inside = False

    def clocked(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal inside
            if inside:  # one attention function may hand over to another
                return function(*args, **kwargs)
            inside = True
            begin = timer()
            result = function(*args, **kwargs)
            spent.append(timer() - begin)  # torch's timer waits until a GPU is done
            inside = False
            return result

        return call

    functions = dict(ALL_ATTENTION_FUNCTIONS)
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS[name] = clocked(function)
    try:
        yield spent
    finally:
        for name in functions:
            del ALL_ATTENTION_FUNCTIONS[name]  # the library's own shows again


def rates(mllm: MLLM) -> tuple[float, float]:
    """What prefill and decoding could reach, in the model's dtype: the best of several runs.

    Returns
    -------
    tuple of float
        FLOP/s of a large matrix product; bytes/s read by a product of one row with a matrix larger than any cache.
    """
    options = dict(device=mllm.device, dtype=mllm.model.dtype)
    # large enough for the device to be busy, and `long` for no cache to hold it
    rows, width, tall = (
        (2048, 2048, 2**15) if mllm.device.type == "cpu" else (16384, 8192, 2**16)
    )
    x, square, long = (torch.randn(n, width, **options) for n in (rows, width, tall))

    def best(a: torch.Tensor, b: torch.Tensor) -> float:
        # one thread is the timer's default, the model has all
        threads = torch.get_num_threads()
        clock = Timer("f(a, b)", globals=dict(f=linear, a=a, b=b), num_threads=threads)
        # the best, as these are bounds: nothing may be faster
        return min(clock.blocked_autorange(min_run_time=1).times)

    # a product of one row reads each weight for one multiplication, as decoding does
    return 2 * rows * width * width / best(x, square), long.nbytes / best(x[:1], long)


def measured(
    mllm: MLLM, prompt: torch.Tensor, way: str, setting: Setting
) -> dict[str, float]:
    """One run of a way: prefill, attention's part of it, and decoding behind it."""
    with running(mllm, way, setting):
        with attention_clock() as spent:
            begin = timer()
            cache = prefill(mllm, prompt)
            taken = timer() - begin
        if prompt.is_cuda:  # waiting for every call of attention slowed it down
            del cache
            begin = timer()
            cache = prefill(mllm, prompt)
            taken = timer() - begin
        numbers = {
            "seconds": taken,
            "attention": sum(spent),
            "cache": cache_bytes(cache) / MIB,
        }
        if setting.steps:
            # the median: single steps are late for many reasons
            numbers["step"] = float(np.median(decode(mllm, cache, setting.steps)))
    return numbers


def _peak(mllm: MLLM, prompt: torch.Tensor, way: str, setting: Setting) -> float:
    with running(mllm, way, setting):
        return peak_memory(lambda: prefill(mllm, prompt), mllm.device.type)


def attention_rows(
    mllm: MLLM, tokens: int, setting: Setting
) -> tuple[list[dict], list[dict]]:
    """The rows of all ways, dense first, in the tables of prefill and of decoding."""
    flop_rate, byte_rate = rates(mllm)
    prompt = hidden_states(mllm, tokens)
    runs = {way: partial(measured, mllm, prompt, way, setting) for way in WAYS}
    results = in_turn(runs, setting.repeats)
    prefills, decodes = [], []
    for way, result in results.items():
        taken = result.median()
        gain = (results["dense"] / result).median()  # of the ratios in each round
        counted = work(mllm, way, setting)
        head = {"tokens": tokens, "way": way, "share": counted.full.mean()}
        bound = counted.prefill_flops(tokens) / flop_rate
        row = {
            "seconds": taken.seconds,
            "speed-up": gain.seconds,
            "bound": bound,
            "bound / seconds": bound / taken.seconds,
            "attention seconds": taken.attention,
            "attention speed-up": gain.attention,
            "attention bound": counted.attention_flops(tokens) / flop_rate,
            "cache MiB": taken.cache,
            "repeats": setting.repeats,
            "peak MiB": _peak(mllm, prompt, way, setting),
        }
        prefills.append(head | row)
        if setting.steps:
            # a step computes little, and reads all weights and the cache
            bound = counted.step_bytes(tokens) / byte_rate
            row = {
                "milliseconds": 1000 * taken.step,
                "speed-up": gain.step,
                "bound": 1000 * bound,
                "bound / milliseconds": bound / taken.step,
                "cache MiB": taken.cache,
            }
            decodes.append(head | row | {"repeats": setting.repeats * setting.steps})
    return prefills, decodes


def counted_rows(geometry: str, lengths: list[int], setting: Setting) -> list[dict]:
    """What counting alone predicts: ratios of FLOPs (prefill) and bytes (decode, cache) to dense attention's."""
    mllm = build(
        geometry, "meta", torch.bfloat16
    )  # shapes alone: nothing runs, nothing is held
    rows = []
    dense = work(mllm, "dense", setting)
    for n in lengths:
        for way in list(WAYS)[1:]:
            counted = work(mllm, way, setting)
            row = {
                "geometry": geometry,
                "tokens": n,
                "way": way,
                "share": counted.full.mean(),
            }
            row["prefill speed-up"] = dense.prefill_flops(n) / counted.prefill_flops(n)
            row["attention speed-up"] = dense.attention_flops(n) / counted.attention_flops(
                n
            )
            row["decode speed-up"] = dense.step_bytes(n) / counted.step_bytes(n)
            row["cache"] = counted.cache_bytes(n) / dense.cache_bytes(n)
            rows.append(row)
    return rows
