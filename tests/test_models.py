"""Loading: checkpoints of every family from a folder, and every way in which it can fail."""

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import FAMILIES, ask, image_part, picture, tiny
from safetensors.torch import load_file, save_file

import corehead as ch
from corehead import controls, hybrid, models, testbed
from corehead.attention import Call, hooks
from corehead.models import memory
from corehead.runs import provenance


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint of each family in the layout of the hub."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in (*FAMILIES, "llama"):
        mllm = tiny(family)
        mllm.model.save_pretrained(root / family)
        mllm.processor.save_pretrained(root / family)
    return root


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_saved_checkpoint_tags_and_scores_as_before(saved, family):
    mllm, before = ch.load(saved / family), tiny(family)
    assert mllm.family.name == before.family.name and not mllm.model.training
    assert mllm.shape == (mllm.n_layers, mllm.n_heads) == (2, 6) and (
        mllm.n_kv_heads,
        mllm.head_dim,
    ) == (2, 8)
    context = ["alpha is 5. "] if family == "llama" else [image_part(picture(60, 90))]
    where = ch.Span("alpha is 5") if family == "llama" else ch.Region(0, (0, 0, 30, 30))
    sample = ask(*context, evidence=[where])
    a, b = (ch.score(m, [sample], progress=False).mean("ram") for m in (mllm, before))
    assert abs(a - b).max() < 1e-6 and "2 layers x 6 heads" in repr(mllm)


def dtypes(mllm) -> set:
    return {p.dtype for p in mllm.model.parameters()}


def test_dtype(saved):
    assert dtypes(ch.load(saved / "qwen3_vl", dtype="bfloat16")) == {torch.bfloat16}
    assert dtypes(ch.load(saved / "qwen3_vl", dtype=torch.float16)) == {torch.float16}


def test_the_fastest_dtype_is_bfloat16_where_there_are_units_for_it(saved, monkeypatch):
    for units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda units=units: units)
        mllm = ch.load(saved / "llama", dtype="fastest")
        assert dtypes(mllm) == {dtype}
        assert repr(mllm).endswith(f"parameters in {str(dtype).removeprefix('torch.')})")
    assert models._dtype(mllm.model.config, "fastest", "cuda") == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp16", "half precision", "int8", "Tensor", 16, None])
def test_dtypes_that_are_none_are_refused(saved, dtype):
    with pytest.raises(
        ValueError, match=f"dtype={dtype!r}: take 'auto', 'fastest', 'float32'"
    ):
        ch.load(saved / "llama", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", None, "xpu:7"])
def test_devices_that_are_not_there_are_refused(saved, device):
    with pytest.raises(
        ValueError, match=rf"device={device!r} is not there \(.+\): take 'cpu'"
    ):
        ch.load(saved / "llama", device=device)


def test_quantised_checkpoints_are_wrapped_and_not_loaded(saved, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(saved / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"quantised \(bitsandbytes\).*corehead\.MLLM\(model"
    ):
        ch.load(folder)


class Adapter(torch.nn.Module):
    """Beside a linear layer, as PEFT puts it: another class, with the layer's weight."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.linear = linear

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return 2 * self.linear(x)


class Wrapped(torch.nn.Module):
    """What PEFT makes of a model, as far as anybody sees: a tuner between, and the model behind both."""

    def __init__(self, model: torch.nn.Module, prompt: bool = False):
        super().__init__()
        self.base_model = model if prompt else torch.nn.Module()
        self.base_model.model = model.model if prompt else model
        self.prompt = prompt

    @property
    def config(self):
        return self.get_base_model().config

    def get_base_model(self):
        return self.base_model if self.prompt else self.base_model.model


def some_samples() -> list[ch.Sample]:
    evidence = [ch.Region(0, (0, 0, 30, 30))]
    image = image_part(picture(60, 90))
    return [ask(image, question=q, id=q, evidence=evidence) for q in ("What?", "Where?")]


def answers_of(mllm) -> tuple:
    """RAM, and what is said intact and without some heads."""
    heads = ch.HeadSet.of([(0, 0), (1, 3)], mllm.shape)
    conditions = {"intact": None, "without": ch.Ablation(heads)}
    options = dict(new_tokens=2, progress=False)
    answers = ch.evaluate(mllm, some_samples(), conditions, **options)
    ram = ch.score(mllm, some_samples(), progress=False).mean("ram").values
    return ram, answers[["logprob", "margin"]].to_numpy(), answers.written.tolist()


def compiled_layers(model):
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    return model


STATES = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled layers": compiled_layers,
    "wrapped": Wrapped,
    "wrapped and compiled": lambda model: torch.compile(Wrapped(model), backend="eager"),
    "eager": lambda model: (model.set_attn_implementation("eager"), model)[1],
    "training": lambda model: model.train(),
    "checkpointing": lambda model: (model.train().gradient_checkpointing_enable(), model)[
        1
    ],
    "no cache": lambda model: (setattr(model.config, "use_cache", False), model)[1],
}


@pytest.mark.parametrize("state", STATES)
def test_a_model_in_any_state_gives_the_same(state):
    plain = tiny("qwen3_vl")
    model = copy.deepcopy(plain.model)
    model.config.get_text_config().attention_dropout = 0.5  # of training alone
    for attention in model.get_decoder().layers:
        attention.self_attn.attention_dropout = 0.5
    mllm = ch.MLLM(STATES[state](model), plain.processor)
    assert (
        mllm.model is model and provenance(mllm)["weights"] == provenance(plain)["weights"]
    )
    for found, expected in zip(answers_of(mllm), answers_of(plain)):
        if isinstance(found, list):
            assert found == expected
        else:
            assert np.allclose(found, expected, atol=1e-5, equal_nan=True)


def test_a_compiled_model_is_ablated_after_its_first_run():
    """A graph without hooks must not go on to run where there are some."""
    plain = tiny("llama")
    model = copy.deepcopy(plain.model)
    mllm = ch.MLLM(model, plain.processor)
    mllm.attentions[0].compile(backend="eager")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        intact = model(ids).logits
        for heads in (
            ch.HeadSet.of([(0, 0)], mllm.shape),
            ~ch.HeadSet.of([(1, 1)], mllm.shape),
        ):
            with ch.ablate(mllm, heads):
                found = model(ids).logits
            with ch.ablate(plain, heads):
                expected = plain.model(ids).logits
            assert torch.allclose(found, expected, atol=1e-5)
            assert not torch.allclose(found, intact, atol=1e-3)
        assert torch.allclose(model(ids).logits, intact, atol=1e-5)


def test_the_fused_kernel_is_compiled_where_nothing_else_is(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    kernel = torch.compile(lambda query, *_, **__: query * 1, backend=backend)
    monkeypatch.setattr(hybrid, "_compiled", lambda: kernel)
    states = [torch.rand(1, 2, 300, 8) for _ in range(3)]
    call = Call(0, *states, scaling=1.0, first=0, attention_mask=None)
    with hooks(tiny("llama")):
        torch.compile(torch.sin, backend=backend)(states[0])
        assert not compiled
        out = hybrid.stream_flex(call, sinks=4, recent=64)
    assert len(compiled) == 1 and torch.equal(out, states[0].transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_score_about_the_same(dtype):
    plain = tiny("qwen3_vl")
    half = ch.MLLM(copy.deepcopy(plain.model).to(dtype), plain.processor)
    found, expected = (ch.score(m, some_samples(), progress=False) for m in (half, plain))
    assert np.allclose(found.mean("ram"), expected.mean("ram"), atol=2e-3)


def test_what_cannot_be_seen_is_an_error():
    plain = tiny("qwen3_vl")
    model = copy.deepcopy(plain.model)
    with pytest.raises(ValueError, match="learned prompt"):
        ch.MLLM(Wrapped(model, prompt=True))
    mllm = ch.MLLM(model, plain.processor)
    model.train()
    with pytest.raises(ValueError, match=r"training mode: call mllm\.model\.eval"):
        ch.score(mllm, some_samples(), progress=False)
    model.eval()
    mllm.attentions[1].o_proj = Adapter(mllm.attentions[1].o_proj)
    assert len(ch.score(mllm, some_samples(), progress=False).data.sample) == 2
    for control in (controls.output_norm, controls.value_norm):
        with pytest.raises(ValueError, match="layer 1 is a Adapter: merge adapters"):
            control(mllm, some_samples(), progress=False)


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_float16_checkpoints_are_float32_on_a_cpu(saved, tmp_path, family, monkeypatch):
    half = copy.deepcopy(tiny(family).model).half()
    half.save_pretrained(tmp_path)
    tiny(family).processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    mllm = ch.load(tmp_path)
    assert dtypes(mllm) == {torch.float32} == dtypes(ch.load(tmp_path, device="auto"))
    for name, weight in half.named_parameters():
        assert torch.equal(mllm.model.get_parameter(name), weight.float())
    assert dtypes(ch.load(tmp_path, dtype="float16")) == {torch.float16}
    assert (
        memory(tmp_path).weights < 0.6 * memory(tmp_path, "float32").weights
    )  # as it is on disk
    with monkeypatch.context() as patch:  # there must be room for what it becomes
        patch.setattr(
            models.psutil,
            "virtual_memory",
            lambda: SimpleNamespace(available=memory(tmp_path).weights),
        )
        with pytest.raises(MemoryError, match="float32"):
            ch.load(tmp_path)
    assert models._dtype(half.config, "auto", "cuda") == torch.float16
    half.bfloat16().save_pretrained(tmp_path)
    assert dtypes(ch.load(tmp_path)) == {torch.bfloat16}


def test_a_folder_that_is_not_there_names_the_make_target(tmp_path):
    for name in ("data/testbed/nobody", tmp_path / "nobody", "./nobody", "nobody"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            ch.load(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it"):
        ch.load(tmp_path / "empty")
    (tmp_path / "nobody.yaml").write_text("family: qwen3_vl")
    with pytest.raises(FileNotFoundError, match="`make testbed MODELS=nobody` trains it"):
        ch.load(tmp_path / "nobody")


def test_a_hub_id_without_network_names_the_command(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match=r"hf download Qwen/Nobody.*without one, give the folder"
    ):
        ch.load("Qwen/Nobody")
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        ch.load("Qwen/no body")


def test_a_corrupt_weight_file_is_an_error(saved, tmp_path):
    name_of_the_problem = {
        "cut": "model.safetensors is damaged or cut off",
        "short of a tensor": "q_proj",
        "another shape": "q_proj",
        "a tensor too many": "stranger",
        "gone": "model.safetensors",
    }
    for damage in name_of_the_problem:
        folder = tmp_path / damage
        shutil.copytree(saved / "qwen3_vl", folder)
        file = folder / "model.safetensors"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        elif damage == "gone":
            file.unlink()
        else:
            weights = load_file(file)
            name = next(n for n in weights if "q_proj" in n)
            if damage == "another shape":
                weights[name] = weights[name][:-1].clone()
            elif damage == "short of a tensor":
                del weights[name]
            else:
                weights["stranger"] = weights[name].clone()
            save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"cannot be read|do not fit") as caught:
            ch.load(folder)
        assert name_of_the_problem[damage] in str(caught.value)


HUB = {
    "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
    "internvl": "OpenGVLab/InternVL3_5-8B-HF",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline cache of the hub with a tiny checkpoint of each family; gives the commits."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return {
        family: testbed.save(tiny(family), tmp_path, name) for family, name in HUB.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offline_hub_cache_loads_by_id_at_its_commit(hub, family):
    names = {path.name for path in hub[family].iterdir()}
    pieces = [name for name in names if name.endswith(".safetensors")]
    assert len(pieces) > 1 and "model.safetensors" not in pieces
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= names
    sample = ask(image_part(picture(60, 90)), evidence=[ch.Region(0, (0, 0, 30, 30))])
    expected = ch.score(tiny(family), [sample], progress=False)
    commit = hub[family].name
    for revision in (None, "main", commit):
        mllm = ch.load(HUB[family], revision=revision, device="auto")
        assert mllm.revision == commit and mllm.source == HUB[family]
    with pytest.raises(ValueError, match=r"'main': .* is a folder"):
        ch.load(hub[family], revision="main")
    scores = ch.score(mllm, [sample], progress=False)
    assert abs(scores.mean("ram") - expected.mean("ram")).max() < 1e-6
    assert json.loads(scores.data.provenance)["revision"] == commit
    with pytest.raises(FileNotFoundError, match=f"hf download {HUB[family]} --revision v2"):
        ch.load(HUB[family], revision="v2")


def test_a_piece_that_is_missing_or_cut_is_named(saved, tmp_path):
    source = testbed.save(tiny("qwen3_vl"), tmp_path / "whole")
    piece = sorted(source.glob("*.safetensors"))[1].name
    for damage in (
        "",
        " is damaged or cut off",
    ):  # transformers names a file that is missing
        folder = tmp_path / f"copy{damage}"
        shutil.copytree(source, folder)
        if not damage:
            (folder / piece).unlink()
        else:
            (folder / piece).write_bytes((folder / piece).read_bytes()[:-1000])
        with pytest.raises(ValueError, match=rf"{piece}{damage}.*Fetch"):
            ch.load(folder)
    (tmp_path / "pickled").mkdir()
    for file in (saved / "qwen3_vl").glob("*.json"):
        shutil.copy(file, tmp_path / "pickled")
    torch.save(
        tiny("qwen3_vl").model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin"
    )
    with pytest.raises(
        ValueError,
        match=r"pickled weights alone \(pytorch_model.bin\).*use_safetensors=False",
    ):
        ch.load(tmp_path / "pickled")


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_checkpoint_is_not_run(saved, tmp_path, known):
    """Whether transformers knows the architecture itself or not."""
    folder, trace = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(saved / "qwen3_vl", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "own.Qwen3VLConfig",
        "AutoModelForImageTextToText": "own.Qwen3VLForConditionalGeneration",
    }
    config |= {} if known else {"model_type": "internvl_chat"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration\n"
    )
    if known:
        assert ch.load(folder).family.name == "qwen3_vl"
    else:
        with pytest.raises(ValueError, match=r"not supported.*is not run.*-HF"):
            ch.load(folder)
    assert not trace.exists()


SERVED = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        code = 401 if "gated" in self.path else 404
        name = "GatedRepo" if "gated" in self.path else "RevisionNotFound" if "known" in self.path else "RepoNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *given): pass

server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ |= dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_HOME=sys.argv[1])
import corehead as ch
for name, revision in ("org/gated", None), ("org/known", "v9"), ("org/nobody", None):
    try:
        ch.load(name, revision=revision)
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.slow("another process imports torch and transformers without a network")
def test_what_the_hub_refuses_names_the_fix(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SERVED, tmp_path], capture_output=True, text=True
    )
    gated, revision, nobody = done.stdout.splitlines()
    assert (
        "hf auth login" in gated
        and "hf download org/gated" in gated
        and "https://huggingface.co/org/gated" in gated
    )
    assert "v9" in revision and "Take a branch, tag or commit" in revision
    assert "hf download org/nobody" in nobody


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_memory_is_counted_from_the_configuration_alone(saved, family):
    mllm = tiny(family)
    own = sum(x.nbytes for x in (*mllm.model.parameters(), *mllm.model.buffers()))
    assert (
        memory(saved / family).weights
        == own
        == memory(mllm.model.config, "float32").weights
    )
    assert abs(memory(saved / family, "bfloat16").weights / own - 0.5) < 0.01
    counted = memory(saved / family, tokens=1000)
    assert (
        counted.cache == 2 * 2 * 2 * 8 * 1000 * 4
    )  # keys and values, layers, KV heads, head_dim, tokens, bytes
    assert counted.total == counted.weights + counted.cache + counted.work
    assert counted.weights == own and counted.work > 1000 * 48 * 4  # embeddings alone
    assert "GiB (weights" in str(counted)


def test_weights_that_cannot_fit_are_refused_before_they_load(saved, monkeypatch):
    monkeypatch.setattr(
        models.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000)
    )
    for device in ("cpu", "auto"):
        with pytest.raises(
            MemoryError,
            match=rf"weights take .* in torch.float32, but {device} has .*device='auto'",
        ):
            ch.load(saved / "qwen3_vl", device=device)


def test_an_unsupported_architecture_is_named(saved, tmp_path):
    shutil.copytree(saved / "llama", tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(
        json.dumps(config | {"model_type": "gpt2"})
    )
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        ch.load(tmp_path / "gpt2")
