"""Fixtures: tiny random models of every family, once a session, and pictures of noise."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from functools import cache

import numpy as np
import pytest
from PIL import Image
from summary import pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401

import corehead as ch
from corehead import testbed

FAMILIES = ("qwen3_vl", "internvl", "llava_onevision")
tiny = cache(testbed.tiny)


@pytest.fixture(params=FAMILIES)
def mllm(request) -> ch.MLLM:
    return tiny(request.param)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of noise, so that every pixel counts."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def film(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, 256, (frames, height, width, 3), dtype=np.uint8
    )


def ask(
    *content, question="What is it?", id="s0", evidence=(), answer="7", **more
) -> ch.Sample:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return ch.Sample(id, messages, list(evidence), answer, **more)


def image_part(image) -> dict:
    return {"type": "image", "image": image}


def video_part(video, fps=2.0) -> dict:
    return {"type": "video", "video": video, "fps": fps}
