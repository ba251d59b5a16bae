"""Layers on several devices: weights that are offloaded, and two GPUs that are pretended."""

import copy

import accelerate
import numpy as np
import pytest
import torch
from conftest import FAMILIES, ask, image_part, picture, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import corehead as ch
from corehead import testbed
from corehead.ablation import Outputs, Reference
from corehead.attention import Reader, hooks
from corehead.hybrid import stream_chunked
from corehead.scoring import mass_on

HEADS = ch.HeadSet.of([(0, 1), (1, 3)], (2, 6))


def questions(n: int = 3) -> list[ch.Sample]:
    page = picture(60, 90)
    return [
        ask(
            image_part(page),
            id=f"q{i}",
            question=f"What is {i}?",
            evidence=[ch.Region(0, (0, 0, 40, 40))],
        )
        for i in range(n)
    ]


def offloaded(family: str, where: str, folder) -> ch.MLLM:
    """A model whose weights are not where it computes: all in host memory, or the second layer's on disk."""
    mllm = tiny(family)
    model = copy.deepcopy(mllm.model)
    if where == "memory":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        parts = {
            name: "cpu"
            for name, module in model.named_modules()
            if name and not [*module.children()]
        }
        layer = mllm.decoder.layers[1]
        [second] = [name for name, module in mllm.model.named_modules() if module is layer]
        owned = {name: "disk" if name.startswith(f"{second}.") else "cpu" for name in parts}
        owned |= {
            name: "cpu"
            for name, _ in model.named_parameters()
            if name.rpartition(".")[0] not in owned
        }
        model = accelerate.dispatch_model(
            model, owned, main_device="cpu", offload_dir=folder
        )
    assert any(p.is_meta for p in model.parameters())
    return ch.MLLM(model, mllm.processor, source=mllm.source)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights_score_ablate_and_accelerate_alike(family, where, tmp_path):
    whole, parts = tiny(family), offloaded(family, where, tmp_path)
    assert parts.device == torch.device("cpu")
    a, b = (ch.score(m, questions(), progress=False) for m in (whole, parts))
    for name in a.data.data_vars:
        np.testing.assert_allclose(a.data[name], b.data[name], atol=1e-5)

    def answers(mllm):
        reference = Reference(mllm, questions(2))
        modes = {
            mode: ch.Ablation(HEADS, mode, reference=reference)
            for mode in ("mean", "resample")
        }
        modes |= {mode: ch.Ablation(HEADS, mode) for mode in ("zero", "knockout")}
        # a run of its own, which passes over the first layer
        modes["last layer"] = ch.Ablation(
            HEADS - ch.HeadSet.of([(0, 1)], (2, 6)), phase="prefill"
        )
        groups = ch.HeadSet.of(
            [(layer, head) for layer in (0, 1) for head in (0, 1, 2)], (2, 6)
        )
        fast = {
            "whole groups": ch.HybridAttention(groups, 9, 2),
            "single heads": ch.HybridAttention(HEADS, 9, 2),
        }
        return ch.evaluate(
            mllm, questions(), {"intact": None} | modes | fast, progress=False
        )

    a, b = answers(whole), answers(parts)
    np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)
    assert a.logprob.round(4).nunique() > 10


@pytest.fixture
def two_gpus():
    """A model with its second layer on another GPU: tensors have shapes and devices, and devices must agree."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        mllm = testbed.tiny("llama")
        for module in mllm.model.modules():
            for kind in (module._parameters, module._buffers):
                for name, x in ((k, v) for k, v in kind.items() if v is not None):
                    second = any(
                        module is part for part in mllm.model.model.layers[1].modules()
                    )
                    moved = x.to(f"cuda:{int(second)}")
                    kind[name] = (
                        torch.nn.Parameter(moved) if kind is module._parameters else moved
                    )

        def bring(device):
            def move(module, args, kwargs):
                return accelerate.utils.send_to_device(
                    args, device
                ), accelerate.utils.send_to_device(kwargs, device)

            return move

        mllm.model.model.layers[1].register_forward_pre_hook(
            bring("cuda:1"), with_kwargs=True
        )
        mllm.model.model.norm.register_forward_pre_hook(bring("cuda:0"), with_kwargs=True)
        yield mllm


def reference_of(mllm: ch.MLLM) -> Reference:
    """Outputs of two samples, each layer's where the layer is."""
    ids = np.arange(12)
    tagged = ch.TaggedSample(
        {"input_ids": torch.from_numpy(ids)[None]}, ids[:0], ids[:0], ids[:0], ids[:0], 11
    )
    reference = Reference(mllm, [tagged, tagged])
    reference.__dict__["means"] = torch.ones(2, 6, 8)
    for layer in (0, 1):
        values = torch.ones(12, 6, 8, device=f"cuda:{layer}")
        reference._outputs[layer, "prefill"] = [Outputs(torch.arange(12), values)] * 2
    return reference


@pytest.mark.parametrize(
    "mode", ["zero", "mean", "resample", "whole groups", "single heads"]
)
def test_what_corehead_makes_follows_the_layers(two_gpus, mode, monkeypatch):
    mllm = two_gpus
    assert mllm.device == torch.device("cuda:0")
    monkeypatch.setattr(
        "corehead.hybrid.stream_flex", stream_chunked
    )  # a kernel that must be compiled
    if mode == "whole groups":
        edit = ch.hybrid_attention(
            mllm, [(layer, head) for layer in (0, 1) for head in (0, 1, 2)], 5, 2
        )
    elif mode == "single heads":
        edit = ch.hybrid_attention(mllm, HEADS, 5, 2)
    else:
        edit = ch.ablate(mllm, HEADS, mode, "prefill", reference=reference_of(mllm))
    ids = torch.arange(12, device=mllm.device)[None]
    reader = Reader(np.array([9, 11]), mass_on(torch.ones(1, 12, 2)))
    with edit, hooks(mllm, reader.everywhere(mllm)):
        # without a cache, transformers looks for packed sequences, which a fake tensor cannot tell
        out = mllm.model(input_ids=ids, use_cache=True)
    assert (
        reader.measured[1][0].shape == (1, 2, 6, 3) and str(out.logits.device) == "cuda:0"
    )
