"""What hybrid attention gains: ``python -m corehead.speed`` writes data/results/bench/acceleration-*.csv.

Random weights of a geometry read pages of visual tokens and a question. Side by side in one process and in turn: dense
attention as transformers runs it (SDPA), hybrid attention with a share of KV groups dense, and streaming heads alone.
Prefill and decode apart; medians, after a warm-up. Beside each time stands its *bound*: what the counted FLOPs take at
the rate of a large matrix product, or the counted bytes at the rate at which a large product of one row with a matrix
reads, both measured in the same process.
Random weights serve speed alone. The vision tower, whose work is the same either way, runs before the clock.

*Scoring* (scoring-*.csv), chunk by chunk, beside one plain forward pass over the same pages, both from pixels on: time,
peak memory, and the memory that is counted from the configuration.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import linear
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .acceleration import Acceleration, HybridLayer, Pattern, applied
from .attention import CACHE, HYBRID, attention_forward
from .bench import in_fresh_process, machine, print_peak, write
from .contexts import embedded
from .models import MLLM, load, memory
from .ranking import HeadRanking
from .samples import Pages, Sample
from .scoring import score
from .tagging import Tagged, to_model
from .testbed.generator import samples
from .testbed.tiny import tiny

# decoders as their released configurations have them
_QWEN3 = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, num_hidden_layers=36)
_LONG = dict(max_position_embeddings=262144)
_CPU = dict(  # wide enough for matrix products to be what a layer does, and 32 KV groups to choose from
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
)
GEOMETRIES: dict[str, tuple[str, dict]] = {
    "cpu": ("qwen3_vl", _CPU),
    "qwen3-vl-4b": ("qwen3_vl", _QWEN3 | _LONG | dict(hidden_size=2560, intermediate_size=9728)),
    "qwen3-vl-8b": ("qwen3_vl", _QWEN3 | _LONG | dict(hidden_size=4096, intermediate_size=12288)),
    "internvl3.5-8b": ("internvl", _QWEN3 | _LONG | dict(hidden_size=4096, intermediate_size=12288)),
    "llava-onevision-7b": (
        "llava_onevision",
        _LONG
        | dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
    ),
}
PAGE = {"qwen3_vl": 512, "internvl": 448, "llava_onevision": 384}  # pixels; 256, 256 and 730 tokens
PARTS = ("counted", "prefill", "decode", "scoring", "testbed")
SHARES = (0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Way:
    """How attention runs: `share` of KV groups dense, 0 for streaming heads alone; None as transformers runs it."""

    name: str
    share: float | None

    def condition(self, mllm: MLLM, window: int, sinks: int) -> Acceleration | None:
        if self.share is None:
            return None
        scores = np.random.default_rng(0).random((mllm.n_layers, mllm.n_heads))
        dense = HeadRanking(scores).top(self.share, group=mllm.n_heads // mllm.n_kv_heads) if self.share else ()
        return Acceleration(dense, window, sinks, "group")


def ways(shares: tuple[float, ...] = SHARES) -> list[Way]:
    """Dense first. "whole" is hybrid attention with all groups dense: what is due to the cache's bookkeeping alone."""
    hybrid = [Way(f"hybrid {share:.0%}", share) for share in shares]
    return [Way("dense", None), *hybrid, Way("streaming", 0.0), Way("whole", 1.0)]


def build(geometry: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MLLM:
    """Random weights of a geometry; "meta" as the device gives shapes alone."""
    family, text = GEOMETRIES[geometry]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return tiny(family, real_tiles=True, text=text)
    finally:
        torch.set_default_dtype(before)


def pages(mllm: MLLM, tokens: int) -> Tagged:
    """A question on pages, `tokens` tokens in all; the first page is the evidence."""
    side = PAGE[mllm.family.name]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))

    def read(pages: int, letters: int) -> Tagged:
        texts = [{"type": "text", "text": text} for text in ("." * letters, "Which page is it?")]
        content = [{"type": "image", "image": picture}] * pages + texts
        return mllm.tag(Sample("pages", [{"role": "user", "content": content}], [Pages([0])]))

    two, three = (len(read(n, 1).ids) for n in (2, 3))
    count = max(2, 2 + (tokens - two) // (three - two))
    fill = 1 + tokens - two - (count - 2) * (three - two)  # a token a letter
    if fill < 1:
        raise ValueError(f"tokens={tokens}: two pages and a question have {two}, so take at least as many")
    return read(count, fill)


@torch.inference_mode()
def prompt(mllm: MLLM, tokens: int) -> dict:
    """The decoder's inputs for pages and a question of `tokens` tokens in all, the vision tower's features in them."""
    return embedded(mllm, to_model(pages(mllm, tokens).inputs, mllm))


def seconds(run: Callable[[], object], device: str) -> float:
    """Time that a call takes on its device."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


@contextmanager
def attention_clock(device: str) -> Iterator[list[float]]:
    """Collect the time of every call of the attention functions: no projections, but heads' selection and cache."""
    spent: list[float] = []

    def timed(function):
        def run(*args, **kwargs):
            found = []
            spent.append(seconds(lambda: found.append(function(*args, **kwargs)), device))
            return found[0]

        return run

    functions = {"sdpa": sdpa_attention_forward, HYBRID: attention_forward}
    for name, function in functions.items():
        AttentionInterface.register(name, timed(function))
    try:
        yield spent
    finally:
        for name, function in functions.items():
            AttentionInterface.register(name, function)


def rates(mllm: MLLM) -> tuple[float, float]:
    """FLOP/s of a large matrix product; bytes/s read by a product of one row with a matrix larger than any cache.

    The best of several, in the model's dtype: what prefill and decoding could reach if they were that alone.
    """
    device, dtype = mllm.device, mllm.model.dtype
    rows, width, tall = (2048, 2048, 2**15) if device.type == "cpu" else (16384, 8192, 2**16)
    a, b, c = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width, tall))
    product = min(seconds(lambda: linear(a, b), device.type) for _ in range(12))
    reading = min(seconds(lambda: linear(a[:1], c), device.type) for _ in range(12))
    return 2 * rows * width * width / product, c.nbytes / reading


@dataclass(frozen=True)
class Work:
    """What a model must do, counted.

    Parameters
    ----------
    mllm : its shapes count, not its weights.
    dense : (layers, heads) bool, the dense query heads.
    window, sinks : of the others.
    """

    mllm: MLLM
    dense: np.ndarray
    window: int
    sinks: int

    @property
    def weights(self) -> int:
        """Parameters of the decoder's linear layers."""
        decoder = self.mllm.family.decoder(self.mllm.model)
        return sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))

    @property
    def head(self) -> int:
        """Parameters of the output embedding."""
        return self.mllm.model.get_output_embeddings().weight.numel()

    def seen(self, n: int) -> tuple[float, float]:
        """Keys that a dense and a streaming head see in all n rows together."""
        full, stream = n * (n + 1) / 2, np.minimum(np.arange(1, n + 1), self.window + self.sinks).sum()
        return full, float(stream)

    def attention_flops(self, n: int) -> float:
        """Of QK and AV over a prompt of n tokens."""
        full, stream = self.seen(n)
        return 4 * self.mllm.head_dim * (self.dense.sum() * full + (~self.dense).sum() * stream)

    def prefill_flops(self, n: int) -> float:
        """Of the decoder and the last token's logits."""
        return 2 * (self.weights * n + self.head) + self.attention_flops(n)

    def cache_bytes(self, n: int) -> float:
        """Of the keys and values that must be kept after n tokens."""
        groups = self.dense.reshape(len(self.dense), self.mllm.n_kv_heads, -1).any(2)
        kept = groups.sum() * n + (~groups).sum() * min(n, self.window + self.sinks)
        return float(2 * kept * self.mllm.head_dim * self.mllm.model.dtype.itemsize)

    def step_bytes(self, n: int) -> float:
        """Read to decode one token behind n."""
        return (self.weights + self.head) * self.mllm.model.dtype.itemsize + self.cache_bytes(n)


def work_of(mllm: MLLM, way: Way, window: int, sinks: int) -> Work:
    condition = way.condition(mllm, window, sinks)
    shape = mllm.n_layers, mllm.n_heads
    return Work(mllm, np.ones(shape, bool) if condition is None else condition.heads(mllm), window, sinks)


def _under(mllm: MLLM, way: Way, window: int, sinks: int):
    condition = way.condition(mllm, window, sinks)
    return nullcontext() if condition is None else applied(mllm, condition)


@torch.inference_mode()
def prefill(mllm: MLLM, feed: dict):
    """The decoder over a prompt and the last token's logits; its cache."""
    cache = DynamicCache(config=mllm.text_config)
    out = mllm.family.decoder(mllm.model)(**feed, **{CACHE: cache}, use_cache=True)
    mllm.model.get_output_embeddings()(out.last_hidden_state[:, -1:])
    return cache


def cache_bytes(cache) -> int:
    """Bytes of keys and values that a cache holds."""
    return sum(
        layer.nbytes if isinstance(layer, HybridLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


def in_turn(runs: dict[Way, Callable[[], dict]], repeats: int) -> dict[Way, list[dict]]:
    """What every run measures, in turn, `repeats` times after a warm-up."""
    found: dict[Way, list[dict]] = {way: [] for way in runs}
    for i in range(repeats + 1):
        for way, run in runs.items():
            result = run()
            if i:
                found[way].append(result)
            gc.collect()
    return found


def _median(results: list[dict], name: str) -> float:
    return statistics.median(r[name] for r in results)


def _gain(results: dict[Way, list[dict]], way: Way, base: Way, name: str) -> float:
    """Median of the ratios base / way, pair by pair."""
    return statistics.median(a[name] / b[name] for a, b in zip(results[base], results[way]))


def prefill_rows(mllm: MLLM, feed: dict, which: list[Way], window: int, sinks: int, repeats: int) -> list[dict]:
    """Time, attention's part of it, memory and cache of a prompt, for every way."""
    device, tokens = mllm.device.type, feed["inputs_embeds"].shape[1]
    flops_rate, _ = rates(mllm)

    def run(way: Way) -> dict:
        with _under(mllm, way, window, sinks):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            kept = []
            with attention_clock(device) if device == "cpu" else nullcontext() as spent:
                result = {"seconds": seconds(lambda: kept.append(prefill(mllm, feed)), device)}
            result["cache MiB"] = cache_bytes(kept.pop()) / 2**20
            if device != "cpu":
                result["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                with attention_clock(device) as spent:  # its waiting would slow a GPU down
                    prefill(mllm, feed)
            return result | {"attention": sum(spent)}

    results = in_turn({way: lambda way=way: run(way) for way in which}, repeats)
    rows = []
    for way in which:
        work = work_of(mllm, way, window, sinks)
        bound, part = work.prefill_flops(tokens) / flops_rate, work.attention_flops(tokens) / flops_rate
        taken = _median(results[way], "seconds")
        rows.append(
            {
                "tokens": tokens,
                "way": way.name,
                "share": work.dense.mean(),
                "seconds": taken,
                "speed-up": _gain(results, way, which[0], "seconds"),
                "bound": bound,
                "bound / seconds": bound / taken,
                "attention seconds": _median(results[way], "attention"),
                "attention speed-up": _gain(results, way, which[0], "attention"),
                "attention bound": part,
                "cache MiB": _median(results[way], "cache MiB"),
                "repeats": repeats,
            }
            | ({"peak MiB": _median(results[way], "peak MiB")} if device != "cpu" else {})
        )
    return rows


@torch.inference_mode()
def filled(mllm: MLLM, patterns: list[Pattern] | None, n: int):
    """A cache of n random tokens, as transformers makes it or of patterns."""
    cache = DynamicCache(config=mllm.text_config)
    if patterns is not None:
        cache.layers, cache.layer_class_to_replicate = [HybridLayer(p) for p in patterns], None
    shape = 1, mllm.n_kv_heads, n, mllm.head_dim
    for layer in cache.layers:
        k, v = (torch.randn(shape, device=mllm.device, dtype=mllm.model.dtype) for _ in range(2))
        if patterns is None:
            layer.update(k, v)
        else:
            layer.append(k, v, None)
    return cache


@torch.inference_mode()
def decode_rows(mllm: MLLM, tokens: int, which: list[Way], window: int, sinks: int, repeats: int, steps: int = 8):
    """Time of one new token behind `tokens`, for every way; the caches hold random keys and values."""
    device = mllm.device.type
    _, bandwidth = rates(mllm)
    decoder = mllm.family.decoder(mllm.model)
    shape = 1, 1, mllm.text_config.hidden_size
    token = torch.randn(shape, device=mllm.device, dtype=mllm.model.dtype)
    place = torch.full((1, 1), tokens, device=mllm.device)
    place = place.expand(3, 1, 1) if mllm.family.name == "qwen3_vl" else place

    def run(way: Way) -> dict:
        with _under(mllm, way, window, sinks) as patterns:
            cache = filled(mllm, patterns, tokens)

            def step():
                out = decoder(inputs_embeds=token, position_ids=place, use_cache=True, **{CACHE: cache})
                mllm.model.get_output_embeddings()(out.last_hidden_state)

            step()
            times = [seconds(step, device) for _ in range(steps)]
            return {"seconds": statistics.median(times), "cache MiB": cache_bytes(cache) / 2**20}

    results = in_turn({way: lambda way=way: run(way) for way in which}, repeats)
    rows = []
    for way in which:
        work = work_of(mllm, way, window, sinks)
        bound, taken = work.step_bytes(tokens) / bandwidth, _median(results[way], "seconds")
        rows.append(
            {
                "tokens": tokens,
                "way": way.name,
                "share": work.dense.mean(),
                "milliseconds": 1000 * taken,
                "speed-up": _gain(results, way, which[0], "seconds"),
                "bound": 1000 * bound,
                "bound / milliseconds": bound / taken,
                "cache MiB": _median(results[way], "cache MiB"),
                "repeats": repeats * steps,
            }
        )
    return rows


@torch.inference_mode()
def read_plainly(mllm: MLLM, tagged: Tagged) -> None:
    """One forward pass over the whole prompt, as transformers runs it, with its cache."""
    mllm.model(**to_model(tagged.inputs, mllm), use_cache=True, logits_to_keep=1)


def read_rows(mllm: MLLM, tagged: Tagged) -> None:
    """Score the question; no null question, so that the prompt runs once."""
    score(mllm, [tagged], null=False, progress=False, on_error="raise")


READERS = {"plain": read_plainly, "score": read_rows}


def scoring_rows(mllm: MLLM, tagged: Tagged, repeats: int) -> list[dict]:
    """Time and memory of scoring beside a plain forward pass, both from pixels on; NaN where memory does not suffice.

    "counted MiB" is what `corehead.models.memory` says of scoring, weights left out.
    """
    device = mllm.device.type

    def run(way: str) -> dict:
        if device == "cpu":
            return {"seconds": seconds(lambda: READERS[way](mllm, tagged), device)}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            taken = seconds(lambda: READERS[way](mllm, tagged), device)
        except torch.OutOfMemoryError:
            return {"seconds": float("nan"), "peak MiB": float("nan")}
        return {"seconds": taken, "peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}

    results = in_turn({way: lambda way=way: run(way) for way in READERS}, repeats)
    need = memory(mllm.model.config, mllm.model.dtype, tokens=len(tagged.ids))
    rows = []
    for way in READERS:
        row = {"tokens": len(tagged.ids), "way": way, "seconds": _median(results[way], "seconds")}
        row["time / plain"] = statistics.median(
            a["seconds"] / b["seconds"] for a, b in zip(results[way], results["plain"])
        )
        if device != "cpu":
            row["peak MiB"] = _median(results[way], "peak MiB")
        rows.append(row | {"counted MiB": (need.total - need.weights) / 2**20, "repeats": repeats})
    return rows


def print_reader_memory(geometry: str, tokens: int, way: str) -> None:
    """Print the peak in MiB of one way of `scoring_rows`."""
    mllm = build(geometry)
    tagged = pages(mllm, tokens)
    print_peak(lambda: READERS[way](mllm, tagged))


def cpu_peak(geometry: str, tokens: int, way: Way, window: int, sinks: int) -> float:
    """Peak memory in MiB of a prompt above the loaded model and its input, in a fresh process; Linux."""
    given = geometry, tokens, way.name, way.share, window, sinks
    return in_fresh_process(f"from corehead import speed; speed.print_memory(*{given!r})")


def print_memory(geometry: str, tokens: int, name: str, share: float | None, window: int, sinks: int) -> None:
    """Print the peak in MiB."""
    mllm = build(geometry)
    feed = prompt(mllm, tokens)
    with _under(mllm, Way(name, share), window, sinks):
        print_peak(lambda: prefill(mllm, feed))


def counted_rows(geometry: str, lengths: list[int], which: list[Way], window: int, sinks: int) -> list[dict]:
    """What counting alone predicts: ratios of FLOPs (prefill) and bytes (decode, cache) to dense attention's."""
    mllm, rows = build(geometry, "meta", torch.bfloat16), []
    for n in lengths:
        base = work_of(mllm, which[0], window, sinks)
        for way in which[1:]:
            work = work_of(mllm, way, window, sinks)
            rows.append(
                {
                    "geometry": geometry,
                    "tokens": n,
                    "way": way.name,
                    "share": work.dense.mean(),
                    "prefill speed-up": base.prefill_flops(n) / work.prefill_flops(n),
                    "attention speed-up": base.attention_flops(n) / work.attention_flops(n),
                    "decode speed-up": base.step_bytes(n) / work.step_bytes(n),
                    "cache": work.cache_bytes(n) / base.cache_bytes(n),
                }
            )
    return rows


def document(mllm: MLLM, hay: int) -> dict:
    """The decoder's inputs for a testbed document with `hay` pages that hold nothing."""
    [sample] = samples("document", "validation", 1, hay=hay)
    return embedded(mllm, to_model(mllm.tag(sample).inputs, mllm))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="data/results/bench")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, help="cpu on a CPU, the released ones on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens")
    parser.add_argument("--window", type=int, help="256 on a CPU, 2048 on a GPU")
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--testbed", default="data/testbed/qwen3vl-s-long")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="all; without scoring on a CPU, which bench.py times")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand: leave --device out to time the CPU")
    out, cpu = Path(options.out), options.device == "cpu"
    out.mkdir(parents=True, exist_ok=True)
    only = options.only or [part for part in PARTS if not (cpu and part == "scoring")]
    window = options.window or (256 if cpu else 2048)
    lengths = options.lengths or [2**i for i in (range(10, 15) if cpu else range(13, 18))]
    released = [name for name in GEOMETRIES if name != "cpu"]
    given = window, options.sinks, options.repeats
    card = dict(
        machine=machine() if cpu else torch.cuda.get_device_name(),
        torch=torch.__version__,
        weights="random: they serve speed alone",
        window=window,
        sinks=options.sinks,
    )

    if "counted" in only:
        rows = [row for g in released for row in counted_rows(g, [2**i for i in range(13, 18)], ways(), 2048, 16)]
        more = dict(machine="none: counted", window=2048, sinks=16)
        write(out, "acceleration-counted", rows, card | more | dict(geometries={g: GEOMETRIES[g] for g in released}))
    geometries = options.geometry or (["cpu"] if cpu else released)
    tables: dict[str, list[dict]] = {"prefill": [], "decode": [], "scoring": []}
    for geometry in geometries:
        if set(tables) & set(only):
            mllm = build(geometry, options.device, torch.float32 if cpu else torch.bfloat16)
        for tokens in lengths:
            for name, rows in tables.items():
                if name not in only:
                    continue
                if name == "prefill":
                    found = prefill_rows(mllm, prompt(mllm, tokens), ways(), *given)
                elif name == "decode":
                    found = decode_rows(mllm, tokens, ways(), *given)
                else:
                    found = scoring_rows(mllm, pages(mllm, tokens), options.repeats)
                if cpu and name == "scoring":
                    for row in found:
                        code = (
                            f"from corehead import speed; speed.print_reader_memory{(geometry, tokens, row['way'])!r}"
                        )
                        row["peak MiB"] = in_fresh_process(code)
                if cpu and name == "prefill":
                    for row, way in zip(found, ways()):
                        if way.name in ("dense", "hybrid 10%", "streaming"):
                            row["peak MiB"] = cpu_peak(geometry, tokens, way, *given[:2])
                rows += [{"geometry": geometry} | row for row in found]
                print(pd.DataFrame(found).round(3).to_string(), flush=True)
                more = dict(geometries={g: GEOMETRIES[g] for g in geometries})
                table = f"scoring-{options.device}" if name == "scoring" else f"acceleration-{options.device}-{name}"
                write(out, table, rows, card | more)
        mllm = None  # free it before the next is built
    if "testbed" in only and cpu:
        mllm, rows = load(options.testbed), []
        for hay in (164, 340):
            rows += prefill_rows(mllm, document(mllm, hay), ways(), 64, 4, options.repeats)
        write(out, "acceleration-testbed", rows, card | dict(weights="trained", window=64, sinks=4))


if __name__ == "__main__":
    main()
