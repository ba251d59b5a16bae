"""The benchmark of hybrid attention: what it counts, and that its commands run."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import corehead as ch
from corehead import speed
from corehead.speed import Way, Work, build, prompt, ways, work_of

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def small(monkeypatch):
    """Every geometry, tiny."""
    tiny = {name: (family, SMALL | dict(head_dim=8)) for name, (family, _) in speed.GEOMETRIES.items()}
    tiny["llava-onevision-7b"] = ("llava_onevision", SMALL)
    monkeypatch.setattr(speed, "GEOMETRIES", tiny)


def test_released_geometries_are_counted_without_weights():
    """Parameters as the model cards give them, in billions, of decoder and embeddings."""
    for name, wanted in {
        "qwen3-vl-8b": 8.2,
        "qwen3-vl-4b": 4.4,
        "internvl3.5-8b": 8.2,
        "llava-onevision-7b": 7.6,
    }.items():
        mllm = build(name, "meta", torch.bfloat16)
        work = work_of(mllm, Way("dense", None), 2048, 16)
        assert abs((work.weights + 2 * work.head) / 1e9 - wanted) < 0.05, name
    assert (mllm.n_layers, mllm.n_heads, mllm.n_kv_heads, mllm.head_dim) == (28, 28, 4, 128)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_work_is_what_the_masks_say(small, n):
    mllm = build("cpu")
    dense = np.random.default_rng(0).random((2, 8)) < 0.4
    work = Work(mllm, dense, window=7, sinks=3)
    i, j = np.arange(n)[:, None], np.arange(n)
    causal = j <= i
    stream = causal & ((i - j < 7) | (j < 3))
    edges = dense.sum() * causal.sum() + (~dense).sum() * stream.sum()
    assert work.attention_flops(n) == 4 * 8 * edges  # a multiplication and an addition for QK and for AV
    weights = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48)
    assert work.weights == weights and work.prefill_flops(n) == 2 * (weights * n + work.head) + 4 * 8 * edges
    for share in (0.0, 0.25, 1.0):
        way = Way("x", share)
        work = work_of(mllm, way, 7, 3)
        with speed._under(mllm, way, 7, 3) as patterns, torch.inference_mode():
            cache = mllm.model(input_ids=torch.ones(1, n).long(), use_cache=True).past_key_values
        held = [x[:, :, : min(n, x.shape[2])] for layer in cache.layers for x in layer._tensors()]
        assert len(patterns) == 2 and work.cache_bytes(n) == sum(x.nbytes for x in held)
        assert work.dense.mean() == share


def test_prompts_have_the_length_asked_for(small):
    for name in speed.GEOMETRIES:
        mllm = build(name)
        feed = prompt(mllm, 2001)
        assert feed["inputs_embeds"].shape == (1, 2001, 32)
        with pytest.raises(ValueError, match="take at least as many"):
            prompt(mllm, 30)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_commands_run_with_tiny_shapes(small, device, tmp_path, monkeypatch, capsys):
    """`make bench` and, its device and clock replaced, `make bench-gpu`."""
    monkeypatch.setattr(speed, "counted_rows", lambda *given: [dict(geometry=given[0])])
    monkeypatch.setattr(speed, "cpu_peak", lambda *given: 1.0)  # a process of its own for each
    monkeypatch.setattr(speed, "in_fresh_process", lambda code: 1.0)
    arguments = ["--out", str(tmp_path), "--device", device, "--repeats", "1", "--window", "64", "--sinks", "4"]
    if device == "cuda":
        monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(speed.torch.cuda, "get_device_name", lambda: "none")
        monkeypatch.setattr(speed, "rates", lambda mllm: (1e10, 1e10))  # large products, twice a geometry
        original = speed.build
        monkeypatch.setattr(speed, "build", lambda geometry, device, dtype: original(geometry, "cpu", dtype))
    speed.main([*arguments, "--only", "counted", "prefill", "decode", "scoring", "--lengths", "1500"])
    names = ["cpu"] if device == "cpu" else [n for n in speed.GEOMETRIES if n != "cpu"]
    for part in ("prefill", "decode"):
        table = pd.read_csv(tmp_path / f"acceleration-{device}-{part}.csv")
        assert len(table) == len(names) * len(ways()) and set(table.geometry) == set(names)
        assert (table.groupby("way")["speed-up"].first() > 0).all() and table["speed-up"][0] == 1
        assert (table["cache MiB"][table.way == "streaming"] < table["cache MiB"][table.way == "dense"].min()).all()
        card = json.loads((tmp_path / f"acceleration-{device}-{part}.json").read_text())
        assert card["weights"].startswith("random") and card["window"] == 64
    table = pd.read_csv(tmp_path / f"scoring-{device}.csv")
    assert list(table.way) == ["plain", "score"] * len(names) and set(table.tokens) == {1500}
    assert (table.seconds > 0).all() and (table["counted MiB"] > 0).all()


def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        speed.main(["--device", "cuda", "--out", str(tmp_path)])
    assert "no CUDA device" in capsys.readouterr().err


def test_peak_memory_is_that_of_a_process_of_its_own():
    assert 1 < speed.cpu_peak("cpu", 600, Way("hybrid 10%", 0.1), 64, 4) < 1000


def test_counted_gains(small):
    rows = pd.DataFrame(speed.counted_rows("qwen3-vl-8b", [1024, 8192], ways(), 64, 4))
    long = rows[rows.tokens == 8192].set_index("way")
    assert long["prefill speed-up"].loc["streaming"] > long["prefill speed-up"].loc["hybrid 10%"] > 1
    assert (long.loc["whole", ["prefill speed-up", "decode speed-up", "cache"]] == 1).all()
    assert (rows[rows.tokens == 1024].set_index("way")["prefill speed-up"] < long["prefill speed-up"] + 1e-9).all()


def test_testbed_documents_are_timed(monkeypatch):
    mllm = ch.load("data/testbed/qwen3vl-s")
    rows = speed.prefill_rows(mllm, speed.document(mllm, 8), ways((0.1,)), 16, 2, repeats=1)
    assert [row["way"] for row in rows] == ["dense", "hybrid 10%", "streaming", "whole"]
    assert rows[0]["speed-up"] == 1 and all(0 < row["attention seconds"] < row["seconds"] * 2 for row in rows)
