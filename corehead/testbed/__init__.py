"""Digit-needle data and the tiny MLLMs that are trained on it."""

from .generator import samples

__all__ = ["samples"]
