"""Inline PTX of the kernels tuned for NVIDIA GPUs. Each step says what a lane holds; change one and its tests tell."""

CODES = ("none",)
"""The codes of kept elements (``format.CODES``) that it reads and writes."""
