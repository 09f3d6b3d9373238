"""lm-evaluation-harness: any checkpoint with our settings as ``--model_args``.

    python -m mustafar_compile.integrations.lm_eval run --model mustafar \\
        --model_args pretrained=NAME,key_sparsity=0.7,value_sparsity=0.7 --tasks TASK

The harness looks for models in its own list only, so this module is run in place of ``lm_eval``: the same commands, and
one model more.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hugging_face import prepare
from ..settings import read_options, setting_names
from .teacher_forced import teacher_forced

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        "mustafar_compile.integrations.lm_eval needs lm-evaluation-harness: pip install 'lm_eval[hf]>=0.4.13'"
    ) from error


@register_model("mustafar")
class MustafarLM(HFLM):
    """The harness's model of transformers, its KV cache compressed.

    Text is generated as ``prepare`` has it. Log-likelihoods come from one forward, which has no decode steps, so there
    each token attends as it would in a step of its own (``teacher_forced``). Arguments are those of ``HFLM``,
    ``preset``, and fields of ``Settings``, of which ``strict`` is on by default. Raises ValueError for a setting that
    is out of range and for an encoder-decoder.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        names = [name for name in ("preset", *setting_names()) if name in arguments]
        ours = {"strict": True, **{name: arguments.pop(name) for name in names}}
        self.settings, _ = read_options(None, ours)
        super().__init__(pretrained, **arguments)
        if self.backend != "causal":
            raise ValueError(f"--model mustafar takes decoders; {pretrained} is an encoder-decoder")
        prepare(self.model, options=ours)

    @torch.no_grad()
    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits [B, T, vocabulary] of token ids [B, T], which the harness pads on the right."""
        dtype = self.mixed_precision_dtype
        with (
            teacher_forced(self.model, self.settings),
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
        ):
            return self.model(inps, use_cache=False).logits


if __name__ == "__main__":
    cli_evaluate()
