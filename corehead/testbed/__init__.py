"""Digit-needle data, the tiny MLLMs that are trained on it, and random ones of every family."""

from .generator import samples
from .tiny import save, tiny

__all__ = ["samples", "save", "tiny"]
