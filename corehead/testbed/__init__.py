"""Digit-needle data, the small MLLMs that are trained on it, and tiny random ones of every family."""

from .models import save, tiny
from .scenes import samples

__all__ = ["samples", "save", "tiny"]
