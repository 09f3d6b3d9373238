"""Weights that are tensors made of others, each with other rules, as libraries for quantized weights have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class _Composed(Tensor):
    """parts: the names of its tensors, in order. bias: a number that its values are larger by."""

    parts: tuple[str, ...]

    @staticmethod
    def __new__(cls, *parts, bias=0.0):
        return Tensor._make_wrapper_subclass(cls, cls.shape_of(*parts), dtype=torch.float32, device=parts[0].device)

    def __init__(self, *parts, bias=0.0):
        self.bias = bias
        for name, part in zip(self.parts, parts, strict=True):
            setattr(self, name, part)

    def __tensor_flatten__(self):
        return list(self.parts), self.bias

    @classmethod
    def __tensor_unflatten__(cls, inner, bias, size, stride):
        return cls(*inner.values(), bias=bias)

    def of_parts(self, change):
        return type(self)(*(change(getattr(self, name)) for name in self.parts), bias=self.bias)

    def __repr__(self):
        return type(self).__name__

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.alias.default, aten.t.default, aten.clone.default):
            return args[0].of_parts(func)
        return cls.rule(func, args, kwargs or {})


class Scaled(_Composed):
    """[n, m] of integers, int8, and scales [n, 1] or, transposed, [1, n]. It knows products and how it is added to."""

    parts = ("integers", "scales")

    @staticmethod
    def shape_of(integers, scales):
        return integers.shape

    @classmethod
    def of(cls, x):
        scales = x.abs().amax(1, keepdim=True) / 127
        return cls((x / scales).round().to(torch.int8), scales)

    def dense(self):
        return self.integers.to(torch.float32) * self.scales

    @classmethod
    def rule(cls, func, args, kwargs):
        if func is aten.mul_.Tensor:
            args[0].scales.mul_(args[1])
            return args[0]
        if func in (aten.mm.default, aten.addmm.default, aten._to_copy.default):
            return cls.on_values(func, args, kwargs)
        return NotImplemented

    @classmethod
    def on_values(cls, func, args, kwargs):
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)


class Shifted(Scaled):
    """[n, m] of values, smaller by the bias."""

    parts = ("smaller",)

    @staticmethod
    def shape_of(smaller):
        return smaller.shape

    @classmethod
    def of(cls, x, bias):
        return cls(x - bias, bias=bias)

    def dense(self):
        return self.smaller + self.bias


class Halves(_Composed):
    """Two ``Scaled``, one above the other: [2 n, m], or, transposed, side by side."""

    parts = ("upper", "lower")

    @staticmethod
    def shape_of(upper, lower):
        rows, columns = upper.shape
        return (2 * rows, columns) if upper.scales.shape[1] == 1 else (rows, 2 * columns)

    @classmethod
    def of(cls, x):
        return cls(*map(Scaled.of, x.chunk(2)))

    @classmethod
    def rule(cls, func, args, kwargs):
        *bias, x, weight = args
        biases = [bias[0].chunk(2, -1)] if bias else []
        return torch.cat(
            [func(*(b[i] for b in biases), x, getattr(weight, name)) for i, name in enumerate(cls.parts)], -1
        )


class ByFunction(Scaled):
    """Its rule is for the function, not for the ops that it consists of."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dense(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def rule(cls, func, args, kwargs):
        return NotImplemented


def quantize(module: nn.Module, kind: type) -> nn.Module:
    """``module`` with the weights of its linear layers as a ``kind``, but for the head, which takes a strided input."""
    linear = [m for name, m in module.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for layer in linear:
        layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
    return module
