"""Digit-needle data, the small MLLMs that are trained on it, and tiny random ones of every family."""

from .models import save, tiny
from .scenes import counterfactuals, samples

__all__ = ["counterfactuals", "samples", "save", "tiny"]
