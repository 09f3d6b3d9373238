"""What becomes of each architecture of transformers: a table, made with tiny random models.

``python tests/architectures.py`` prints an outcome for each architecture, attention and cache; ``--write FILE`` also
writes them as tables, ``--only NAME ...`` leaves the others out, ``--workers N`` measures with N processes. A table of
which nothing is measured stays as it is in the file. A name with " int8" behind it is that with weights of torchao.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from architectures_page import ATTENTIONS, CACHES, INT8, Outcome, Row, changes, rewritten
from compilers import without_compiler
from models import prompt
from mustafar_compile import explain
from mustafar_compile.lowering import builds
from reference import pruned_generation

WINDOW, NEW_TOKENS = 4, 8
TOLERANCE = 1e-3  # of logits, in their standard deviations

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
_NO_STOP = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_COMMON = {
    **_SIZES, **_NO_STOP, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256,
}  # fmt: skip
_ABSENT = object()  # takes an entry of _COMMON away
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED_CACHES = {
    "sliding_window": 6, "layer_types": 2 * _SLIDING["layer_types"], "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 100,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_EXPERT = _EXPERTS | {"shared_expert_intermediate_size": 32}
_LATENT = {
    **_EXPERTS, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_ENCODER_DECODER = {
    **_NO_STOP, "vocab_size": 100, "max_position_embeddings": 256, "d_model": 64, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": _EXPERTS,
    "qwen2": {},
    "qwen2_moe": _SHARED_EXPERT,
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {
        **_SHARED_EXPERT, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "gemma": {},
    "gemma2": _SLIDING,
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3n_text": {**_SHARED_CACHES, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_SHARED_CACHES, "global_head_dim": 32, "num_global_key_value_heads": 2},
    "phi": {},
    "phi3": {"sliding_window": None},
    "phimoe": _EXPERTS,
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_bigcode": {},
    "gpt_oss": {**_SLIDING, **_EXPERTS},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "bloom": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "use_cache": True},
    "falcon": {"head_dim": _ABSENT},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": _EXPERTS,
    "granite": {},
    "granitemoehybrid": {
        **_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64,
    },
    "cohere": {},
    "cohere2": _SLIDING,
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "nemotron": {},
    "persimmon": {},
    "xglm": {"d_model": 64, "ffn_dim": 64, "attention_heads": 4, "num_layers": 2},
    "biogpt": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "llama4_text": {
        **_EXPERTS, "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 6,
        "intermediate_size_mlp": 64, "no_rope_layers": [1, 0],
    },
    "smollm3": {},
    "exaone4": _SLIDING,
    "ernie4_5": {},
    "helium": {},
    "seed_oss": {},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 2,
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 6},
    "mamba2": {"num_heads": 8, "expand": 2, "head_dim": 16, "n_groups": 1, "state_size": 16},
}  # fmt: skip
TEXT_TO_TEXT: dict[str, dict[str, Any]] = {
    "t5": {**_NO_STOP, "vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0},
    "bart": _ENCODER_DECODER,
}  # fmt: skip
SPEECH_TO_TEXT: dict[str, dict[str, Any]] = {
    "whisper": {**_ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
                "begin_suppress_tokens": None, "suppress_tokens": None},
}  # fmt: skip
ARCHITECTURES = CAUSAL | TEXT_TO_TEXT | SPEECH_TO_TEXT
QUANTIZED = [name + INT8 for name in ("llama", "mistral", "mixtral", "qwen3", "gemma3_text")]


@dataclass(frozen=True)
class Generated:
    """tokens [B, NEW_TOKENS] and the logits [B, NEW_TOKENS, V] that they were chosen by."""

    tokens: Tensor
    logits: Tensor

    def agrees(self, other: Generated) -> bool:
        """Whether all logits agree up to where the tokens part, so that they part at a tie only."""
        same = (self.tokens == other.tokens).long().cumprod(dim=1)
        reached = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1).bool()
        error = (self.logits - other.logits).abs().amax(-1)
        return bool((error[reached] < TOLERANCE * other.logits.std()).all())


def build(name: str, attention: str):
    """A tiny random model in eval mode. Its weights are large enough for attention, so pruning, to matter."""
    if name in QUANTIZED:
        return _quantized(build(name.removesuffix(INT8), attention))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    changes = _COMMON | CAUSAL[name] if name in CAUSAL else ARCHITECTURES[name]
    config = AutoConfig.for_model(name, **{key: value for key, value in changes.items() if value is not _ABSENT})
    factory = {**dict.fromkeys(TEXT_TO_TEXT, AutoModelForSeq2SeqLM), "whisper": AutoModelForSpeechSeq2Seq}
    torch.manual_seed(0)
    model = factory.get(name, AutoModelForCausalLM).from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    model.generation_config.eos_token_id = None
    return model.eval()


def _quantized(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def generate(model, **how) -> Generated:
    """Greedy generation; a causal model gets a batch of two prompts, one of them padded."""
    speech = model.config.model_type in SPEECH_TO_TEXT
    inputs = {"input_features": torch.linspace(-1, 1, 640).view(2, 8, 40)} if speech else prompt(padded=True)
    how |= {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers talks about tiny configs
        out = model.generate(**inputs, **how)
    return Generated(out.sequences[:, -NEW_TOKENS:], torch.stack(out.logits, dim=1))


def measure(name: str, attention: str, cache: str) -> Outcome:
    """Generate with eager code, the oracle and the backend. Run it under ``torch.no_grad()``."""
    how = {"cache_implementation": "static"} if cache == "static" else {}
    try:
        dense = generate(build(name, attention), **how)
        growing = generate(build(name, attention)) if how else dense
    except Exception as error:  # whatever transformers cannot do is its row's outcome
        return Outcome(error=_first_sentence(error))
    if not dense.agrees(growing):
        return Outcome(error="eager code generates something else with a static cache than with a dynamic one")
    try:
        exact, _ = _compiled(name, attention, 0.0, how)
        pruned, report = _compiled(name, attention, 0.5, how)
    except Exception as error:  # a bug of the backend, shown as such
        return Outcome(reasons=(f"{type(error).__name__}: {_first_sentence(error)}",))
    layers = {entry.layer for entry in (*report.matched, *report.missed) if "decode" in entry.phases}
    with pruned_generation(0.5, 0.5, WINDOW, layers):
        expected = generate(build(name, attention))
    found = len(report.matched) + len(report.missed)
    reasons = tuple(dict.fromkeys(entry.reason for entry in report.missed)) if found else ("no attention was found",)
    return Outcome(found, len(report.matched), exact.agrees(dense), pruned.agrees(expected), reasons)


def _compiled(name: str, attention: str, sparsity: float, how: dict[str, Any]):
    model = build(name, attention)
    options = {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options)
        return generate(model, **how), report


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)])[.:] ", text)[0]


def measure_all(names: list[str], workers: int) -> list[Row]:
    """All rows of ``names``, printed as they come."""
    rows = []
    with ProcessPoolExecutor(workers, initializer=_without_native) as pool:
        for row in pool.map(_row, *zip(*product(names, ATTENTIONS, CACHES), strict=True)):
            print(*row, flush=True)
            rows.append(row)
    return rows


def _without_native() -> None:
    """C++ would be built for the dtype, head dims and group of each architecture."""
    builds.why_not = lambda: "the table asks for PyTorch"  # type: ignore[assignment]


def _row(name: str, attention: str, cache: str) -> Row:
    with torch.no_grad():
        return name, attention, cache, measure(name, attention, cache)


def main(given: list[str] | None = None) -> None:
    names = [*ARCHITECTURES, *QUANTIZED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write the tables")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="tables that must say the same")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help='such as llama "llama int8"')
    parser.add_argument("--workers", type=int, metavar="N", default=1, help="processes to measure with")
    arguments = parser.parse_args(given)
    if not _has_torchao():
        needed = f"torchao is not installed, which {', '.join(QUANTIZED)} need: pip install '.[architectures]'"
        if set(arguments.only or ()) & set(QUANTIZED):
            parser.error(needed)
        if not arguments.only:
            print(f"left out: {needed}")
            names = list(ARCHITECTURES)
    _report(measure_all(arguments.only or names, arguments.workers), arguments.write, arguments.compare)


def _has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def _report(rows: list[Row], write: Path | None, compare: Path | None) -> None:
    """Write the tables and end with what is wrong in them or not as in others."""
    if write:
        write.write_text(rewritten(write.read_text() if write.exists() else "", rows))
    problems = [f"wrong: {' '.join(row[:3])}" for row in rows if row[3].is_wrong]
    if compare:
        changed = changes(rewritten("", rows), compare.read_text(), {row[0] for row in rows})
        problems += [f"not as in {compare}: {change}" for change in changed]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
