"""Loading: checkpoints of every family from a folder, and every way in which it can fail."""

import json
import shutil

import pytest
import torch
from conftest import FAMILIES, ask, image_part, picture, tiny
from safetensors.torch import load_file, save_file

import corehead as ch


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
