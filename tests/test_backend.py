"""The backend as torch.compile sees it: names, modes, options, and what importing it does."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch

from compilers import without_compiler
from models import BufferModel, TupleModel, hf_model, prompt, run_steps
from mustafar_compile import CompressedWriteError, _compat, backend, explain
from nightly import at_night

pytestmark = pytest.mark.usefixtures("no_grad")


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


def test_the_name_works_without_an_import_and_changes_nothing():
    result = in_fresh_python(
        """
        import sys, torch, torch.nn.functional as F, torch._functorch.config, torch._inductor.config
        def state():
            configs = torch._inductor.config, torch._functorch.config, torch._dynamo.config
            return F.scaled_dot_product_attention, [config.get_config_copy() for config in configs]
        assert "mustafar" in torch._dynamo.list_backends()
        assert "mustafar_compile" not in sys.modules
        before = state()
        compiled = torch.compile(torch.mm, backend="mustafar", options={"cpp_wrapper": False})
        print(compiled(torch.ones(1, 2), torch.ones(2, 1)).tolist())
        import mustafar_compile
        assert state() == before
        assert not torch.cuda.is_initialized()
        """
    )
    assert result.stdout.strip().endswith("[[2.0]]")
    assert "nothing was compiled" not in result.stderr


def test_a_backend_chosen_in_vain_is_noticed():
    """As with torch.compile(model).generate(), which calls the original module."""
    result = in_fresh_python(
        """
        import torch
        model = torch.nn.Linear(2, 2)
        torch.compile(model, backend="mustafar").extra_repr()
        """
    )
    assert "torch.compile(model).generate() calls the original module" in result.stderr


def test_the_public_names_resolve():
    import mustafar_compile

    for name in mustafar_compile.__all__:
        assert getattr(mustafar_compile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mustafar_compile.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"options": {"key_sparsity": 1.0}}, r"key_sparsity=1.0 is not accepted; it must be a number in \[0, 1\)"),
        ({"options": {"window": -3}}, r"window=-3 is not accepted; it must be an integer of at least 1"),
        (
            {"options": {"sparsity": 0.5}},
            r"option 'sparsity' is unknown; accepted are preset, budget, key_sparsity",
        ),
        ({"mode": "fastest"}, r"mode 'fastest' is unknown; accepted are 'default'.*'reduce-overhead'"),
    ],
)
def test_bad_settings_fail_with_one_clear_error(how, message):
    with pytest.raises(Exception, match=message):
        torch.compile(lambda x: x + 1, backend="mustafar", **how)(torch.ones(2))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_reach_inductor(mode, monkeypatch):
    seen = {}

    def spy(gm, example_inputs):
        seen.update({key: getattr(_compat.inductor.config, key) for key in ("max_autotune",)})
        seen["cudagraphs"] = _compat.inductor.config.triton.cudagraphs
        return gm.forward

    monkeypatch.setattr(_compat.inductor, "compile_fx", spy)
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend="mustafar", mode=mode)(torch.ones(2))
    assert seen["max_autotune"] == mode.startswith("max-autotune")
    assert seen["cudagraphs"] == (mode in ("reduce-overhead", "max-autotune"))


def test_inductor_options_hold_for_the_compilation_only(monkeypatch):
    seen = []
    monkeypatch.setattr(
        _compat.inductor, "compile_fx", lambda gm, _: seen.append(_compat.inductor.config.epilogue_fusion) or gm.forward
    )
    torch._dynamo.reset()
    before = _compat.inductor.config.epilogue_fusion
    options = {"epilogue_fusion": not before, "key_sparsity": 0.7}
    torch.compile(lambda x: x + 1, backend="mustafar", options=options)(torch.ones(2))
    assert seen == [not before]
    assert _compat.inductor.config.epilogue_fusion == before


def test_an_unmatched_graph_goes_to_inductor_untouched(monkeypatch):
    seen = []
    monkeypatch.setattr(_compat.inductor, "compile_fx", lambda gm, _: seen.append(gm) or gm.forward)
    torch._dynamo.reset()
    q = torch.randn(1, 2, 3, 8)
    torch.compile(torch.nn.functional.scaled_dot_product_attention, backend="mustafar")(q, q, q)
    targets = {str(node.target) for node in seen[0].graph.nodes if node.op == "call_function"}
    assert not any("aten" in target for target in targets), "this is not Dynamo's graph any more"


def test_two_settings_for_one_function_do_not_mix():
    torch.manual_seed(0)
    model = TupleModel()
    inputs = [torch.randn(2, n, 32) for n in (7, 1, 1)]
    kept = []
    with without_compiler():
        for sparsity in (0.5, 0.0):
            options = {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": 2}
            step = torch.compile(model.step, backend="mustafar", options=options)
            past = None
            for x in inputs:
                _, past = step(x, past)
            kept.append(past[0].format.kept)
    assert kept == [8, 16]


def test_a_cache_of_other_settings_continues_with_its_own():
    """A cache keeps the layout that it was made with; the graph for it is compiled anew."""
    torch.manual_seed(0)
    model = TupleModel()
    with without_compiler():
        loose = torch.compile(model.step, backend="mustafar", options={"key_sparsity": 0.0, "window": 2})
        tight = torch.compile(model.step, backend="mustafar", options={"key_sparsity": 0.5, "window": 2})
        _, past = loose(torch.randn(2, 7, 32), None)
        _, past = tight(torch.randn(2, 1, 32), past)
    assert past[0].format.kept == 16


@pytest.mark.parametrize("around", [torch.enable_grad, *at_night([torch.inference_mode])])
@pytest.mark.parametrize("decorator", [torch.inference_mode, *at_night([torch.no_grad])])
def test_a_step_that_turns_gradients_off_itself(decorator, around):
    """As meta-llama's forward. Where all is made in inference mode, weights and buffers have no version counters."""
    torch.manual_seed(0)
    with around():
        model, inputs = BufferModel(), [torch.randn(2, n, 32) for n in (7, 1, 1, 1)]
        with torch.no_grad():
            expected = run_steps(copy.deepcopy(model), inputs)
        with without_compiler(), explain() as report:
            step = torch.compile(
                decorator()(model.step), backend="mustafar", options={"key_sparsity": 0.0, "value_sparsity": 0.0}
            )
            actual = run_steps(model, inputs, step)
    torch.testing.assert_close(actual, expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert (report.missed, report.calls) == ([], 4)


def test_inference_mode_generates_compressed():
    model = hf_model(num_hidden_layers=1)
    with torch.inference_mode(), without_compiler(), explain() as report:
        model.compile(backend="mustafar")
        model.generate(**prompt(), max_new_tokens=4, do_sample=False)
    assert len(report.matched) == 1


def test_writing_through_a_view_of_a_compressed_cache_is_refused():
    model = hf_model(num_hidden_layers=1)
    with without_compiler():
        model.compile(backend="mustafar")
        result = model.generate(**prompt(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    keys = result.past_key_values.layers[0].keys
    with pytest.raises(CompressedWriteError, match="cannot write into a compressed KV cache"):
        keys[:, :, :2] = 0
    with pytest.raises(CompressedWriteError, match="write through a view"):
        keys[0].zero_()


def test_a_write_in_a_graph_that_cannot_be_followed_is_refused():
    model = hf_model(num_hidden_layers=1)

    def scale(cache):
        cache.mul_(2)
        return torch.softmax(cache, -1)

    with without_compiler():
        model.compile(backend="mustafar")
        how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        result = model.generate(**prompt(), cache_implementation="static", **how)
        with pytest.raises(Exception, match="writes into a compressed KV cache in a way that cannot be followed"):
            torch.compile(scale, backend="mustafar")(result.past_key_values.layers[0].keys)


@pytest.mark.parametrize("form", [BufferModel, TupleModel])
def test_traces_are_let_go(form, monkeypatch):
    """Compiled calls live as long as the model. AOTAutograd keeps the rewritten module, so its nodes forget."""
    traces, kept, run = [], [], backend.Rewriter.run

    def noted(rewriter, matches):
        plan = run(rewriter, matches)
        traces.append(weakref.ref(rewriter.functional.module))
        kept.extend(weakref.ref(module) for module in (plan.module, *(a.position for a in plan.attached)))
        return plan

    monkeypatch.setattr(backend.Rewriter, "run", noted)
    model = form()
    with torch.no_grad(), without_compiler():
        step = torch.compile(model.step, backend="mustafar")  # holds the calls
        run_steps(model, [torch.randn(2, tokens, 32) for tokens in (7, 1, 1)], step)
        gc.collect()
        assert traces
        assert not any(trace() for trace in traces)
        modules = [module for module in (ref() for ref in kept) if module is not None]
        assert not any(node.meta for module in modules for node in module.graph.nodes)


def test_the_report_prints_and_logs(caplog):
    model = hf_model()
    with without_compiler(), explain() as report, caplog.at_level("INFO", logger="mustafar_compile"):
        model.compile(backend="mustafar", options={"skip_layers": [1]})
        model.generate(**prompt(), max_new_tokens=3, do_sample=False)
    text = str(report)
    assert "1 of 2 attention layers compressed" in text
    assert "model.layers.0.self_attn" in text
    assert "layer 1 is listed in skip_layers" in text
    assert "layer 0 model.layers.0.self_attn, cache dynamic (cat): compressed (prefill) by PyTorch" in caplog.messages
    assert report.matched[0].phases == ("prefill", "decode")
    assert report.matched[0].dense_bytes == 2 * (2 * 2 * 11 * 16 * 4), "K and V of 11 tokens"


def test_code_may_depend_on_the_number_of_blocks(monkeypatch):
    """Inductor guards on sizes now and then. The number of blocks, which no input of Dynamo's graph has, is one too."""
    compiled_for = []

    def guarding(gm, inputs):
        blocks = next((x.shape[2] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 5), None)
        if blocks is not None:
            compiled_for.append(bool(blocks == 2))
        return gm.forward

    monkeypatch.setattr(_compat.inductor, "compile_fx", guarding)
    torch._dynamo.reset()
    step = torch.compile(TupleModel().step, backend="mustafar", options={"window": 4})
    _, past = step(torch.randn(2, 20, 32), None)
    for _ in range(60):
        _, past = step(torch.randn(2, 1, 32), past)
    assert past[0].buffers[0].shape[2] > 2
    assert compiled_for == [True, False]
