"""A decode step on the GPU that what the device asserts ends. ``test_gpu.py`` runs this in a process of its own.

python tests/failing_steps.py nothing | position | mask: what is bad.
"""

from __future__ import annotations

import sys

import torch

from cases import make_case

LENGTH = 64


def step(bad):
    """A step of a static cache through the op."""
    case = make_case(tokens=40, head_dim=64, value_dim=64, dtype=torch.bfloat16, device="cuda")
    case.mask = torch.arange(LENGTH, device="cuda") < case.tokens + (bad == "mask")
    position = torch.tensor([case.written + (bad == "position")], device="cuda")
    case.step(position=position, length=LENGTH)
    torch.cuda.synchronize()


if __name__ == "__main__":
    step(sys.argv[1])
