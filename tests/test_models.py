"""Loading: checkpoints of every family from a folder, and every way in which it can fail."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import FAMILIES, ask, image_part, picture, tiny
from safetensors.torch import load_file, save_file

import corehead as ch
from corehead import models, testbed
from corehead.models import memory


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
    assert (mllm.n_layers, mllm.n_heads, mllm.n_kv_heads, mllm.head_dim) == (2, 6, 2, 8)
    context = ["alpha is 5. "] if family == "llama" else [image_part(picture(60, 90))]
    where = ch.Span("alpha is 5") if family == "llama" else ch.Region(0, (0, 0, 30, 30))
    sample = ask(*context, evidence=[where])
    a, b = (ch.score(m, [sample], progress=False).core("ram") for m in (mllm, before))
    assert abs(a - b).max() < 1e-6 and "2 layers x 6 heads" in repr(mllm)


def test_dtype(saved):
    assert ch.load(saved / "qwen3_vl", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_folder_that_is_not_there_names_the_make_target(tmp_path):
    for name in ("data/testbed/nobody", tmp_path / "nobody", "./nobody", "nobody"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            ch.load(name)
    (tmp_path / "nobody.yaml").write_text("family: qwen3_vl")
    with pytest.raises(FileNotFoundError, match="`make testbed MODELS=nobody` trains it"):
        ch.load(tmp_path / "nobody")


def test_a_hub_id_without_network_names_the_command(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="hf download Qwen/Nobody"):
        ch.load("Qwen/Nobody")


def test_a_corrupt_weight_file_is_an_error(saved, tmp_path):
    for damage in ("cut", "short of a tensor", "another shape"):
        folder = tmp_path / damage
        shutil.copytree(saved / "qwen3_vl", folder)
        file = folder / "model.safetensors"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        else:
            weights = load_file(file)
            name = next(n for n in weights if "q_proj" in n)
            weights[name] = weights[name][:-1].clone()
            if damage == "short of a tensor":
                del weights[name]
            save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"cannot be read|do not fit"):
            ch.load(folder)


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
    return {family: testbed.save(tiny(family), tmp_path, name) for family, name in HUB.items()}


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
    scores = ch.score(mllm, [sample], progress=False)
    assert abs(scores.core("ram") - expected.core("ram")).max() < 1e-6
    assert json.loads(scores.data.provenance)["revision"] == commit
    with pytest.raises(FileNotFoundError, match=f"hf download {HUB[family]} --revision v2"):
        ch.load(HUB[family], revision="v2")


def test_a_piece_that_is_missing_or_cut_is_named(saved, tmp_path):
    source = testbed.save(tiny("qwen3_vl"), tmp_path / "whole")
    piece = sorted(source.glob("*.safetensors"))[1].name
    for damage in ("is missing", "is damaged or cut off"):
        folder = tmp_path / damage
        shutil.copytree(source, folder)
        if damage == "is missing":
            (folder / piece).unlink()
        else:
            (folder / piece).write_bytes((folder / piece).read_bytes()[:-1000])
        with pytest.raises(ValueError, match=rf"{piece} {damage}.*Fetch it again"):
            ch.load(folder)
    (tmp_path / "pickled").mkdir()
    for file in (saved / "qwen3_vl").glob("*.json"):
        shutil.copy(file, tmp_path / "pickled")
    torch.save(tiny("qwen3_vl").model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights alone \(pytorch_model.bin\).*use_safetensors=False"):
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


def test_what_the_hub_refuses_names_the_mend(tmp_path):
    done = subprocess.run([sys.executable, "-c", SERVED, tmp_path], capture_output=True, text=True)
    gated, revision, nobody = done.stdout.splitlines()
    assert "hf auth login" in gated and "hf download org/gated" in gated and "https://huggingface.co/org/gated" in gated
    assert "v9" in revision and "Take a branch, tag or commit" in revision
    assert "hf download org/nobody" in nobody


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_memory_is_counted_from_the_configuration_alone(saved, family):
    mllm = tiny(family)
    own = sum(x.nbytes for x in (*mllm.model.parameters(), *mllm.model.buffers()))
    assert memory(saved / family).weights == own == memory(mllm.model.config, "float32").weights
    assert abs(memory(saved / family, "bfloat16").weights / own - 0.5) < 0.01
    counted = memory(saved / family, tokens=1000)
    assert counted.cache == 2 * 2 * 2 * 8 * 1000 * 4  # keys and values, layers, KV heads, head_dim, tokens, bytes
    assert counted.total == counted.weights + counted.cache + counted.features + counted.work
    assert "GiB (weights" in str(counted)


def test_weights_that_cannot_fit_are_refused_before_they_load(saved, monkeypatch):
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    for device in ("cpu", "auto"):
        with pytest.raises(MemoryError, match=rf"weights take .* in torch.float32, but {device} has .*device='auto'"):
            ch.load(saved / "qwen3_vl", device=device)
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.warns(UserWarning, match="more than the 2 GPUs have free: some layers stay"):
        models._require_room("x", tiny("llama").model.config, "float32", "auto")


def test_an_unsupported_architecture_is_named(saved, tmp_path):
    shutil.copytree(saved / "llama", tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        ch.load(tmp_path / "gpt2")


def test_old_versions_are_named():
    with pytest.raises(ImportError, match=r'pip install "transformers>=99"'):
        ch.check_versions({"transformers": "99"})
    with pytest.raises(ImportError, match="nosuchpackage is not installed"):
        ch.check_versions({"nosuchpackage": "1"})
