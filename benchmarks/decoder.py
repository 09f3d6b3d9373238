"""A decode step of Llama built by hand, over a dense cache or a compressed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from llama import compressed_cache, heads_here
from timing import DEVICE, free, graphed, operations
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.tensor import DTensor

from mustafar_compile.lowering.decode_step import DecodeStep


@dataclass
class Layer:
    """Weights of one layer. qkv and gate_up: matrices that read the same input, as one."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def taken_from(cls, layer: Any) -> Layer:
        """The weights of an HF layer, which loses those that are joined: they would take the memory twice."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([_here(m.weight) for m in (attention.q_proj, attention.k_proj, attention.v_proj)])
        gate_up = torch.cat([_here(mlp.gate_proj.weight), _here(mlp.up_proj.weight)])
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        norms = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
        return cls(norms[0], qkv, _here(attention.o_proj.weight), norms[1], gate_up, _here(mlp.down_proj.weight))


def _here(weight: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight.data


def _alone(x: Tensor) -> Tensor:
    return x


def _over_ranks(x: Tensor) -> Tensor:
    return all_reduce(x, "sum", dist.group.WORLD)


class Dims(NamedTuple):
    """What the functions of a step go by. heads: of the query. summed: what sums up the parts of a product."""

    head_dim: int
    heads: int
    epsilon: float
    summed: Callable[[Tensor], Tensor]


class Decoder:
    """The decode step that a careful engineer would write: no mask, no repeated heads, few and fused kernels.

    What stands between two attentions is one compiled function that serves all layers, and the whole step is one CUDA
    graph. It takes the weights out of ``model``, which is of no use afterwards. Subclasses keep the cache.
    """

    def __init__(self, model: Any, batch: int, context: int) -> None:
        config = model.config
        self.ranks, (heads, self.kv_heads) = model.tp_size or 1, heads_here(model)
        self.dims = Dims(config.head_dim, heads, config.rms_norm_eps, _over_ranks if self.ranks > 1 else _alone)
        embedding, self.head = model.model.embed_tokens.weight.data, _here(model.lm_head.weight)
        self.embedding = embedding.full_tensor() if isinstance(embedding, DTensor) else embedding
        self.norm = model.model.norm.weight.data
        self.layers = [Layer.taken_from(layer) for layer in model.model.layers]
        free()  # pieces of what was joined, too small for a cache
        position = torch.full((batch, 1), context - 1, device=DEVICE)
        self.rotation = model.model.rotary_emb(self.embedding, position)  # from the position alone: made once
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
        how: dict[str, Any] = {"options": {"shape_padding": False}}  # trying that out takes a second head's memory
        self.enter, self.between, self.finish = (
            torch.compile(f, dynamic=False, fullgraph=True, **how) for f in (_enter, _between, _finish)
        )

    def step(self) -> Tensor:
        """Logits of the next token [B, 1, vocabulary]. The token's keys and values go to the last slot."""
        x = F.embedding(self.ids, self.embedding)
        query = self.enter(x, self.layers[0], self.slot(0), self.rotation, self.dims)
        for i, after in enumerate(self.layers[1:]):
            attended = self.attend(query, i)
            x, query = self.between(attended, x, self.layers[i], after, self.slot(i + 1), self.rotation, self.dims)
        attended = self.attend(query, len(self.layers) - 1)
        logits = self.finish(attended, x, self.layers[-1], self.norm, self.head, self.dims)
        return logits if self.ranks == 1 else self._joined(logits)

    def _joined(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary, [ranks * B, 1, share of the vocabulary]."""
        joined = logits.new_empty(self.ranks * logits.shape[0], *logits.shape[1:])
        dist.all_gather_into_tensor(joined, logits)
        return joined

    def graphed(self) -> Callable[[], None]:
        """The step as a CUDA graph."""
        self.step()  # compiles
        return graphed(self.step)

    def slot(self, i: int) -> Tensor:
        """Where layer ``i`` is to write the key and the value of the new token, [2, B, KV heads, 1, D]."""
        raise NotImplementedError

    def attend(self, query: Tensor, i: int) -> Tensor:
        """Attention of layer ``i``, the new token included: [B, heads, 1, D] -> the same."""
        raise NotImplementedError


class DenseDecoder(Decoder):
    """Attention reads buffers of just the right length."""

    def __init__(self, model: Any, batch: int, context: int, attention: Callable[..., Tensor]) -> None:
        super().__init__(model, batch, context)
        shape = (2, batch, self.kv_heads, context, model.config.head_dim)
        self.attention = attention
        self.caches = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in self.layers]

    def slot(self, i: int) -> Tensor:
        return self.caches[i][:, :, :, -1:]

    def attend(self, query: Tensor, i: int) -> Tensor:
        key, value = self.caches[i]
        return self.attention(query, key, value)


class CompressedDecoder(Decoder):
    """The same with compressed caches in place of the buffers."""

    def __init__(self, model: Any, batch: int, context: int, options: Mapping[str, Any]) -> None:
        super().__init__(model, batch, context)
        cache = compressed_cache(model, batch, context, options)
        self.caches = [(layer.keys, layer.values) for layer in cache.layers]
        self.stored_bytes = sum(x.stored_bytes for layer in cache.layers for x in (layer.keys, layer.values))
        config = model.config
        shape = (2, batch, self.kv_heads, 1, config.head_dim)
        self.row = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)  # one will do: layers run one by one
        self.position = torch.tensor([context - 1], device=DEVICE)
        self.scale = config.head_dim**-0.5

    def slot(self, i: int) -> Tensor:
        return self.row

    def attend(self, query: Tensor, i: int) -> Tensor:
        how = {"position": self.position, "mask": None, "sinks": None, "scale": self.scale}
        key, value = self.caches[i]
        caches = key.buffers, value.buffers, key.format, value.format
        return operations().decode_attention(DecodeStep(query, *self.row, *caches, **how))


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _enter(x: Tensor, layer: Layer, slot: Tensor, rotation: tuple[Tensor, Tensor], dims: Dims) -> Tensor:
    """From a layer's input to its query [B, heads, 1, D]; keys and values go to ``slot`` [2, B, KV heads, 1, D]."""
    kv_heads = slot.shape[2]
    joined = F.linear(_rms(x, layer.norm, dims.epsilon), layer.qkv).unflatten(-1, (-1, dims.head_dim)).transpose(1, 2)
    query, key, value = joined.split([dims.heads, kv_heads, kv_heads], dim=1)
    cos, sin = (r.unsqueeze(1) for r in rotation)
    slot[0].copy_(_rotated(key, cos, sin))
    slot[1].copy_(value)
    return _rotated(query, cos, sin)


def _leave(attended: Tensor, x: Tensor, layer: Layer, dims: Dims) -> Tensor:
    """From the result of attention to the layer's output."""
    x = x + dims.summed(F.linear(attended.transpose(1, 2).flatten(2), layer.out))
    gate, up = F.linear(_rms(x, layer.mlp_norm, dims.epsilon), layer.gate_up).chunk(2, -1)
    return x + dims.summed(F.linear(F.silu(gate) * up, layer.down))


def _between(
    attended: Tensor, x: Tensor, layer: Layer, after: Layer, slot: Tensor, rotation: tuple[Tensor, Tensor], dims: Dims
) -> tuple[Tensor, Tensor]:
    x = _leave(attended, x, layer, dims)
    return x, _enter(x, after, slot, rotation, dims)


def _finish(attended: Tensor, x: Tensor, layer: Layer, norm: Tensor, head: Tensor, dims: Dims) -> Tensor:
    return F.linear(_rms(_leave(attended, x, layer, dims), norm, dims.epsilon), head)
