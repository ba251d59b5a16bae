"""The benches: what they count, and that every table comes out of the one command."""

import gc
import json
from time import perf_counter

import numpy as np
import pandas as pd
import pytest
import torch

import corehead as ch
from corehead.bench import __main__ as command
from corehead.bench import attention, engine, measure, models
from corehead.bench.attention import WAYS, Setting
from corehead.bench.work import Work

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)


@pytest.fixture(autouse=True)
def quick_garbage_collection():
    """All that the tests before have loaded is not looked through between the runs."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def small(monkeypatch):
    """Every geometry, tiny."""
    for name, geometry in models.GEOMETRIES.items():
        head_dim = {} if geometry["family"] == "llava_onevision" else {"head_dim": 8}
        monkeypatch.setitem(models.GEOMETRIES, name, geometry | {"text": SMALL | head_dim})


def tensors(layer) -> list[torch.Tensor]:
    """Keys and values (B, H, N, D) that a cache's layer holds, split or not."""
    if hasattr(layer, "buffers"):
        return [x for buffer in layer.buffers.values() for x in buffer.tensors]
    return [layer.keys, layer.values]


def test_released_geometries_are_counted_without_weights():
    """Parameters as the model cards give them, in billions, of decoder and embeddings."""
    for name, wanted in {
        "qwen3-vl-8b": 8.2,
        "qwen3-vl-4b": 4.4,
        "internvl3.5-8b": 8.2,
        "llava-onevision-7b": 7.6,
    }.items():
        mllm = models.build(name, "meta", torch.bfloat16)
        work = attention.work(mllm, "dense", Setting(2048, 16))
        assert abs((work.weights + 2 * work.output_weights) / 1e9 - wanted) < 0.05, name
    assert (mllm.n_layers, mllm.n_heads, mllm.n_kv_heads, mllm.head_dim) == (28, 28, 4, 128)


@pytest.mark.parametrize("name", models.RELEASED)
def test_weights_are_those_of_the_linear_layers(small, name):
    mllm = models.build(name)
    work = attention.work(mllm, "dense", Setting(2048, 16))
    decoder = mllm.decoder
    assert work.weights == sum(
        m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear)
    )
    assert work.output_weights == mllm.model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("n", [1, 5, 40])
def test_work_is_what_the_masks_say(small, n):
    mllm = models.build("cpu")
    full = np.random.default_rng(0).random((2, 8)) < 0.4
    work = Work(mllm, full, window=7, sinks=3)
    i, j = np.arange(n)[:, None], np.arange(n)
    causal = j <= i
    stream = causal & ((i - j <= 7) | (j < 3))
    edges = full.sum() * causal.sum() + (~full).sum() * stream.sum()
    assert (
        work.attention_flops(n) == 4 * 8 * edges
    )  # a multiplication and an addition for QK and for AV
    weights = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48)
    assert (
        work.weights == weights
        and work.prefill_flops(n) == 2 * (weights * n + work.output_weights) + 4 * 8 * edges
    )


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize(
    "way", [way for way in WAYS if way not in ("hybrid 5%", "hybrid 10%")]
)
def test_counted_caches_are_those_that_are_held(small, n, way):
    mllm, setting = models.build("cpu"), Setting(window=7, sinks=3)
    work = attention.work(mllm, way, setting)
    # two of eight groups, two of sixteen heads
    rounded = {"dense": 1, "hybrid 20%": 0.25, "hybrid 10%, single heads": 0.125}
    assert work.full.mean() == rounded.get(way, WAYS[way])
    with attention.running(mllm, way, setting):
        cache = attention.prefill(mllm, attention.hidden_states(mllm, n))
    # buffers have room for more tokens
    held = [
        [x[:, :, : min(n, x.shape[2])] for x in tensors(layer)] for layer in cache.layers
    ]
    assert work.cache_bytes(n) == sum(x.nbytes for layer in held for x in layer)
    assert (
        work.cache_bytes(n)
        <= attention.cache_bytes(cache)
        == sum(x.nbytes for layer in cache.layers for x in tensors(layer))
    )


def test_prompts_have_the_length_asked_for(small):
    for name, geometry in models.GEOMETRIES.items():
        mllm, page = models.build(name), models.TOKENS[geometry["family"]]
        assert attention.hidden_states(mllm, 2001).shape == (1, 2001, 32)
        asked = models.questions(mllm, 2001, 3)
        found = [mllm.tag(sample) for sample in asked]
        assert (
            len({len(tagged.ids) for tagged in found}) == 1
            and len({sample.id for sample in asked}) == 3
        )
        assert (
            found[0].visual.size == 2001 // page * page
            and 0 < len(found[0].evidence) <= page
        )
        assert mllm.tag(models.questions(mllm, 1)[0]).visual.size == 2 * page


bfloat16 = pytest.mark.slow("released geometries in bfloat16, in which CPUs are slow")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=bfloat16)])
def test_the_command_runs_with_tiny_shapes(small, device, tmp_path, monkeypatch):
    """`make bench` and, its device replaced, `make bench-gpu`."""
    monkeypatch.setattr(
        attention, "rates", lambda mllm: (1e10, 1e10)
    )  # large products, once a length
    ways = list(WAYS) if device == "cpu" else ["dense", "hybrid 10%", "streaming"]
    monkeypatch.setattr(attention, "WAYS", {way: WAYS[way] for way in ways})
    monkeypatch.setitem(command.WINDOW, device, 64)
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
        for module in (attention, measure):
            monkeypatch.setattr(module, "timer", perf_counter)
        build = models.build
        monkeypatch.setattr(
            command, "build", lambda geometry, device, dtype: build(geometry, "cpu", dtype)
        )
    given = [
        "--out",
        str(tmp_path),
        "--device",
        device,
        "--repeats",
        "1",
        "--lengths",
        "200",
    ]
    command.main([*given, "--only", "scoring", "attention", "costs"])
    names = models.RELEASED if device == "cuda" else ["cpu"]
    for part in ("prefill", "decode"):
        table = pd.read_csv(tmp_path / f"acceleration-{device}-{part}.csv")
        assert list(table.way) == ways * len(names) and set(table.geometry) == set(names)
        assert (table["speed-up"] > 0).all() and table["speed-up"][0] == 1
        assert (
            table["cache MiB"][table.way == "streaming"]
            < table["cache MiB"][table.way == "dense"].min()
        ).all()
        card = json.loads((tmp_path / f"acceleration-{device}-{part}.json").read_text())
        assert card["weights"].startswith("random") and card["window"] == 64
    assert (
        pd.read_csv(tmp_path / f"acceleration-{device}-prefill.csv")["peak MiB"] >= 0
    ).all()
    table = pd.read_csv(
        tmp_path / ("scoring.csv" if device == "cpu" else "scoring-cuda.csv")
    )
    names = models.RELEASED if device == "cuda" else ["small"]
    assert list(table.way) == ["plain", "score 1", "score 8", "eager"] * len(names)
    assert (
        (table.seconds > 0).all()
        and (table["counted MiB"] > 0).all()
        and (table["peak MiB"] >= 0).all()
    )
    assert set(pd.read_csv(tmp_path / "costs-qwen3-vl-8b.csv").contexts) == {
        5023,
        4610,
        313,
        135,
        2175,
    }


def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda", "--out", str(tmp_path)])
    assert "no CUDA device" in capsys.readouterr().err


def test_help_names_the_parts_and_the_goals_on_a_gpu(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert (
        "2.1x at 64k" in text
        and "85 % of its bound" in text
        and all(part in text for part in command.PARTS)
    )


def test_peak_memory_is_that_of_the_call_alone():
    held = np.ones(2**24)  # 128 MiB that were there before
    for _ in range(2):  # what the first call freed is no free gift to the second
        assert measure.peak_memory(lambda: np.ones(2**23).sum(), "cpu") == pytest.approx(
            64, abs=4
        )
    assert held.sum()


def test_ways_run_in_turn_and_the_first_round_does_not_count():
    order = []

    def way(name, numbers):
        return lambda: order.append(name) or {"seconds": numbers.pop(0)}

    results = measure.in_turn(
        {"a": way("a", [99, 1, 4]), "b": way("b", [99, 2, 2])}, repeats=2
    )
    assert order == list("ababab") and results["a"].seconds.tolist() == [1, 4]

    def too_much():
        raise torch.OutOfMemoryError

    results = measure.in_turn(
        {"fits": lambda: {"seconds": 1.0}, "does not": too_much}, repeats=2
    )
    assert results["does not"].seconds.isna().all() and len(results["does not"]) == 2


def test_attention_is_clocked_and_the_library_is_left_as_it_was(small):
    mllm, before = models.build("cpu"), dict(attention.ALL_ATTENTION_FUNCTIONS)
    for way in ("dense", "hybrid 50%"):
        with (
            attention.running(mllm, way, Setting(7, 3)),
            attention.attention_clock() as spent,
        ):
            attention.prefill(mllm, attention.hidden_states(mllm, 40))
        assert len(spent) == mllm.n_layers and min(spent) > 0
    assert dict(attention.ALL_ATTENTION_FUNCTIONS) == before


def test_counted_gains(small):
    rows = pd.DataFrame(attention.counted_rows("qwen3-vl-8b", [1024, 8192], Setting(64, 4)))
    long = rows[rows.tokens == 8192].set_index("way")
    assert (
        long["prefill speed-up"].loc["streaming"]
        > long["prefill speed-up"].loc["hybrid 10%"]
        > 1
    )
    assert (long.loc["whole", ["prefill speed-up", "decode speed-up", "cache"]] == 1).all()
    assert (
        rows[rows.tokens == 1024].set_index("way")["prefill speed-up"]
        < long["prefill speed-up"] + 1e-9
    ).all()


def test_testbed_documents_are_timed(monkeypatch):
    monkeypatch.setattr(
        attention,
        "WAYS",
        {way: WAYS[way] for way in ("dense", "hybrid 10%", "streaming", "whole")},
    )
    mllm = ch.load("data/testbed/qwen3vl-s")
    rows, decodes = attention.attention_rows(mllm, 200, Setting(16, 2, repeats=1, steps=0))
    assert [row["way"] for row in rows] == [
        "dense",
        "hybrid 10%",
        "streaming",
        "whole",
    ] and not decodes
    assert rows[0]["speed-up"] == 1 and all(
        0 < row["attention seconds"] < row["seconds"] for row in rows
    )


def test_sharing_and_ablation_are_timed(small):
    mllm = models.build("small")
    rows = engine.sharing_rows(mllm, 128, (1, 2), repeats=1)
    assert [row["questions"] for row in rows] == [1, 1, 2, 2] and all(
        row["time / together"] > 0 for row in rows
    )
    rows = engine.ablation_rows(
        "tiny", mllm, models.questions(mllm, 128, 4), conditions=2, repeats=1
    )
    assert [row["way"] for row in rows] == ["together", "one by one", "nothing shared"] * 3
    assert all(row["time / together"] > 0 and row["conditions / s"] > 0 for row in rows)


def test_stores_are_timed():
    rows = engine.store_rows([200, 300])
    assert [(row["table"], row["rows"]) for row in rows] == [
        (t, n) for t in ("answers", "scores") for n in (200, 300)
    ]
    assert all(
        row["appended / s"] > 0 and row["read / s"] > 0 and row["bytes / row"] > 0
        for row in rows
    )
