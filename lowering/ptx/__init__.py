"""Inline PTX of the kernels tuned for NVIDIA GPUs. Each step says what a lane holds; change one and its tests tell."""
