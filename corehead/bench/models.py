"""Random weights of released geometries, and questions for them. Such weights serve speed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from ..models import MLLM
from ..samples import Pages, Sample
from ..testbed import tiny

GEOMETRIES: dict[str, dict] = yaml.safe_load(
    Path(__file__).with_name("geometries.yaml").read_text()
)
RELEASED = ("qwen3-vl-4b", "qwen3-vl-8b", "internvl3.5-8b", "llava-onevision-7b")
SIDE = {"qwen3_vl": 512, "internvl": 448, "llava_onevision": 384}  # of a page, in pixels
TOKENS = {"qwen3_vl": 256, "internvl": 256, "llava_onevision": 730}  # that such a page has


def build(geometry: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MLLM:
    """Random weights of a geometry; on the device "meta", shapes alone."""
    # made on the device and in the dtype at once: 8 billion weights in float32 on the CPU first might not fit
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return tiny(
                GEOMETRIES[geometry]["family"],
                real_tiles=True,
                text=GEOMETRIES[geometry]["text"],
            )
    finally:
        torch.set_default_dtype(before)


def questions(mllm: MLLM, tokens: int, n: int = 1) -> list[Sample]:
    """`n` questions on the same pages, as many as `tokens` visual tokens are enough for, but at least two."""
    family = mllm.family.name
    shape = SIDE[family], SIDE[family], 3
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    # two at least: a single picture LLaVA-OneVision would also cut into crops
    pages = [{"type": "image", "image": Image.fromarray(noise)}] * max(
        2, tokens // TOKENS[family]
    )
    samples = []
    for i in range(n):
        # a token a byte makes 15 of it, as many as a question has in a real vocabulary
        asked = {"type": "text", "text": f"Sum of row {i:03}?"}
        messages = [{"role": "user", "content": [*pages, asked]}]
        samples.append(Sample(f"q{i}", messages, [Pages([i % len(pages)])], "ninety"))
    return samples
