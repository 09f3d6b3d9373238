"""Models of transformers with live caches under the compiler, each beside the oracle of every layer."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from histories import History
from live_caches import Shape
from live_models import Live
from models import hf_model

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma2", "gpt_oss", "mistral")
CACHES = ("DynamicCache", "StaticCache", "StaticCache of the caller")
RESET_EMPTIES = "reset" in vars(DynamicLayer)
"""Whether a reset of a dynamic cache drops its tokens. Older transformers make zeros of them."""


class _Counted(DynamicLayer):
    """Tells how many tokens there are, and hands new ones on to the attention below."""

    def __init__(self, history: History, eager: bool) -> None:
        super().__init__()
        self.history, self.eager, self.tokens = history, eager, history.tokens

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.tokens


_layers: list[_Counted] = []
"""Those of the model that an oracle runs now."""


def _attend(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
    layer = _layers[module.layer_idx]
    how = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    result = layer.history.attend(query, [key, value], layer.tokens, mask, layer.eager, **how)
    return result.transpose(1, 2), None


AttentionInterface.register("oracle", _attend)
AttentionMaskInterface.register("oracle", sdpa_mask)


def _attentions(model) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def _with_input(x, module, args, kwargs):
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


class TransformersModel:
    """A tiny model of transformers under the compiler, and its twin, whose attention is the oracle."""

    tokens_dim = 2

    def __init__(self, choose: random.Random, shape: Shape, form: str) -> None:
        self.family = choose.choice(FAMILIES)
        self.shape = replace(shape, value_dim=shape.key_dim, group=1 if self.family == "gpt_neox" else shape.group)
        self.form, self.room = form, None if form == "DynamicCache" else choose.choice([48, 72])
        self.padded = choose.random() < 0.5
        self.model = self._model(choose)
        self.twin = copy.deepcopy(self.model)
        self.twin.set_attn_implementation("oracle")
        self.passed: list[tuple[Tensor, Tensor]] = []
        for attention in _attentions(self.model):  # a hook behind it that takes keywords is a press to the backend
            attention.register_forward_pre_hook(self._note, with_kwargs=True)
            attention.register_forward_hook(self._note_result)

    def _model(self, choose: random.Random):
        shape, layers = self.shape, choose.choice([1, 1, 2])
        heads = shape.heads * shape.group
        changes = {"hidden_size": heads * shape.key_dim, "num_attention_heads": heads, "num_hidden_layers": layers}
        attention = choose.choice(["sdpa", "eager"])
        if self.family != "gpt_neox":
            changes |= {"num_key_value_heads": shape.heads, "head_dim": shape.key_dim}
        if self.family in ("gemma2", "gpt_oss"):
            attention = "eager"
            changes["layer_types"] = ["full_attention"] * layers
        if self.family == "gpt_oss":
            changes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
        return hf_model(self.family, attention=attention, **changes).to(shape.dtype)

    def _note(self, module, args, kwargs) -> None:
        self.passed.append(args[0] if args else kwargs["hidden_states"])

    def _note_result(self, module, args, output) -> None:
        self.passed[-1] = (self.passed[-1], output[0])

    def compile(self, **how) -> None:
        self.step = torch.compile(self._run, backend="mustafar", **how)

    def _run(self, ids, cache, mask):
        self.passed.clear()
        logits = self.model(input_ids=ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits
        return logits, list(self.passed)

    def fresh(self, batch: int, spare: int = 0) -> Live:
        """An empty cache; a static one has so many slots more than ``room``."""
        shape, config, room = self.shape, self.model.config, None if self.room is None else self.room + spare
        cache = StaticCache(config=config, max_cache_len=room) if room else DynamicCache(config=config)
        of_caller = self.form == "StaticCache of the caller"
        if of_caller:
            cache.early_initialization(batch, shape.heads, shape.key_dim, shape.dtype, torch.device("cpu"))
        histories = [History.empty(shape, batch, room, of_caller) for _ in _attentions(self.twin)]
        return Live.empty(cache, histories)

    def call(self, live: Live, count: int, at: int, seed: int, eager: bool) -> list[tuple[Tensor, Tensor]]:
        """So many new tokens at ``at``: what attention gave in each layer, and what its oracle gives."""
        if at < live.tokens:
            live.crop(at)
            for layer in live.cache.layers:
                layer.cumulative_length.fill_(at)
        for history in live.histories:
            history.of_caller = history.of_caller or (eager and self.room is not None)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 100, (live.batch, count), generator=generator)
        kept = torch.rand(live.batch, count, generator=generator) < (0.7 if self.padded else 1)
        live.kept = torch.cat([live.kept, kept], dim=1)
        mask = live.kept.long() if self.padded else None
        _, passed = (self._run if eager else self.step)(ids, live.cache, mask)
        expected = self._expected(live, ids, mask, [taken for taken, _ in passed], eager)
        return [(given[kept], y[kept]) for (_, given), y in zip(passed, expected, strict=True)]

    def _expected(self, live: Live, ids: Tensor, mask: Tensor | None, taken: list[Tensor], eager: bool) -> list[Tensor]:
        _layers[:] = [_Counted(history, eager) for history in live.histories]
        expected: list[Tensor] = []
        handles = []
        for attention, x in zip(_attentions(self.twin), taken, strict=True):
            handles += [
                attention.register_forward_pre_hook(functools.partial(_with_input, x), with_kwargs=True),
                attention.register_forward_hook(lambda module, args, output: expected.append(output[0])),
            ]
        self.twin(input_ids=ids, past_key_values=Cache(layers=list(_layers)), attention_mask=mask, use_cache=True)
        for handle in handles:
            handle.remove()
        return expected

    def tensors(self, live: Live) -> list:
        """K and V of each layer."""
        return [(layer.keys, layer.values) for layer in live.cache.layers if layer.is_initialized]

    def crop(self, live: Live, tokens: int) -> None:
        live.cache.crop(tokens - live.tokens)
        live.crop(tokens)

    def select(self, live: Live, picks: list[int], how: str) -> None:
        if self.room is not None or how == "reorder":
            live.cache.reorder_cache(torch.tensor(picks))
        elif how == "repeat":
            live.cache.batch_repeat_interleave(len(picks))
            picks = [row for row in range(live.batch) for _ in picks]
        else:
            live.cache.batch_select_indices(torch.tensor(picks))
        live.select(picks)

    def reset(self, live: Live) -> None:
        if self.room is None and not RESET_EMPTIES:
            return
        live.cache.reset()
        live.kept = live.kept[:, :0]
        for history in live.histories:
            history.reset()
