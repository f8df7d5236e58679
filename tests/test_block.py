"""The wrapped decoder layer: once per pass, whoever hooks, checkpoints, compiles or calls from another thread."""

import copy
import gc
import threading
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_pte import PTECache, PTEConfig
from peft_pte.host.compat import CHECKPOINTED
from peft_pte.passes.block import Pass
from tests.cases import TWO_FAMILIES
from tests.helpers import SMALL, assert_close, gradients, make_prompts, make_pte, roll_out, thought_logits, trainable

WINDOW = SMALL["cache_window"]


def make_case(family="llama", thoughts=4 * WINDOW, **fields):
    model = make_pte(family, attn_implementation="sdpa", **fields)
    rollout = roll_out(model, make_prompts(), thoughts)
    return model, rollout.truncated(thoughts), rollout.logits


def blocks_of(model):
    from peft_pte.seam import Seam

    return [layer for _, layer in Seam.of(model.get_base_model()).blocks]


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_layer_is_called_once_per_pass(family):
    model, batch, expected = make_case(family)
    calls = []
    for layer in blocks_of(model):
        layer.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    with torch.no_grad():
        assert_close(thought_logits(model, batch), expected)
    assert calls == [batch["input_ids"].shape[1]] * len(blocks_of(model))
    calls.clear()
    model.train().gradient_checkpointing_enable()
    model.peft_config["default"].segment_length = 10_000
    gradients(model, batch)
    assert len(calls) == len(blocks_of(model))


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_hooks_that_replace_a_forward(when):
    # As accelerate dispatches weights: before the adapter is injected, or around what is there.
    torch.manual_seed(0)
    from tests.cases import make_base

    seen = []

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    base = make_base("llama", attn_implementation="sdpa")
    if when != "after":
        add_hook_to_module(base.model.layers[1], Watch())
    hooked = base.model.layers[1].__dict__.get("forward")
    model = make_pte(base=base)
    if when != "before":
        add_hook_to_module(base.model.layers[1], Watch(), append=True)
    rollout = roll_out(model, make_prompts(), 3 * WINDOW)
    assert seen
    with torch.no_grad():
        assert_close(thought_logits(model, rollout.truncated(3 * WINDOW)), rollout.logits)
    if when == "after":
        remove_hook_from_module(base.model.layers[1])
        with torch.no_grad():
            assert_close(thought_logits(model, rollout.truncated(3 * WINDOW)), rollout.logits)
    if when == "both":
        remove_hook_from_module(base.model.layers[1])
        with torch.no_grad():
            assert_close(thought_logits(model, rollout.truncated(3 * WINDOW)), rollout.logits)
    unloaded = model.unload()
    if when == "before":
        assert unloaded.model.layers[1].__dict__.get("forward") is hooked
    assert "peft_pte" not in str(unloaded.model.layers[1].__dict__)
    count = len(seen)
    unloaded.generate(**make_prompts(), max_new_tokens=2)
    assert (len(seen) > count) == (when == "before")


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("impl", list(CheckpointImpl), ids=str)
def test_checkpoints_that_others_put_around_layers(impl, use_cache):
    model, batch, logits = make_case()
    model.train().enable_input_require_grads()
    expected, loss = gradients(model, {**batch, "use_cache": use_cache})
    saved = {name: part.clone() for name, part in get_peft_model_state_dict(model).items()}
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=impl)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
    )
    model.zero_grad()
    output = model(**batch, use_cache=use_cache)
    output.loss.backward()
    assert_close(output.loss.detach(), loss)
    actual = {name.replace(CHECKPOINTED, ""): part.grad for name, part in trainable(model).items()}
    largest = max(part.abs().max() for part in expected.values())
    for name, part in expected.items():
        assert_close(actual[name] / largest, part / largest, scale=5)
    model.eval()
    assert_close(roll_out(model, make_prompts(), 4 * WINDOW).logits, logits)
    set_peft_model_state_dict(model, {name: 2 * part for name, part in saved.items()})
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(part, 2 * saved[name]) for name, part in loaded.items())


def test_threads_do_not_disturb_each_other():
    model, batch, expected = make_case()
    model.gradient_checkpointing_enable()
    model.train()
    wanted, _ = gradients(model, batch)
    failures, stop = [], threading.Event()

    def decode():
        try:
            while not stop.is_set():
                found = model.generate(
                    **make_prompts(),
                    max_new_tokens=3 * WINDOW,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                with torch.no_grad():
                    ids = found.sequences
                    mask = torch.cat([make_prompts()["attention_mask"], torch.ones(3, 3 * WINDOW, dtype=torch.long)], 1)
                    labels = ids.clone()
                    labels[:, :6] = -100
                    scored = model(input_ids=ids, attention_mask=mask, labels=labels).logits[:, 5:-1]
                assert_close(scored, torch.stack(found.logits, dim=1))
        except BaseException as error:  # Shown by the test, whose thread this is not.
            failures.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        for _ in range(6):
            found, _ = gradients(model, batch)
            for name, part in wanted.items():
                assert_close(found[name], part, scale=5)
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]
    with torch.no_grad():
        assert_close(thought_logits(model, batch), expected)


def test_compiled_steps_compile_a_layer_once():
    model, batch, expected = make_case(thoughts=WINDOW + 4)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), backend=counter)
    frames = []
    for _ in range(3):
        output = compiled(**batch)
        output.loss.backward()
        assert_close(output.logits[:, 5:-1].detach(), expected)
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert frames[0] == frames[1] == frames[2]


def test_an_input_whose_tokens_cannot_be_told_apart():
    from peft_pte.seam import Seam

    model, batch, _ = make_case()
    seam = Seam.of(model.get_base_model())
    layer = blocks_of(model)[0]
    original = layer.forward

    def with_more(*args, **kwargs):
        return original(*args, **kwargs, per_token_bias=torch.zeros(1, batch["input_ids"].shape[1]))

    layer.forward = with_more
    with pytest.raises(NotImplementedError, match="takes `per_token_bias` of shape"):
        model(**batch)
    layer.forward = original
    assert seam.active_adapter() == "default"


def test_a_copy_runs_its_own_layers():
    model, batch, expected = make_case()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.zero_()
        assert_close(thought_logits(twin, batch), expected)
    assert all(one.forward.args[0].module is one for one in blocks_of(twin))


def test_private_names_of_transformers_are_there():
    # compat alone names them.
    from peft_pte.host import compat

    compat.check()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_another_adapter_between_forward_and_backward(checkpointing):
    model, batch, _ = make_case()
    torch.manual_seed(5)
    model.add_adapter("other", PTEConfig(task_type="CAUSAL_LM", **SMALL))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    expected, _ = gradients(model, batch)
    model.zero_grad()
    loss = model(**batch).loss
    model.base_model.set_adapter("other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in expected)
    loss.backward()
    for name, part in expected.items():
        assert_close(model.get_parameter(name).grad, part)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_pass_outlives_its_backward(checkpointing):
    model, batch, _ = make_case()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    gradients(model, batch)
    gc.collect()
    # A test that failed before keeps what it held.
    before = {id(part) for part in gc.get_objects() if isinstance(part, (Pass, PTECache))}
    gc.disable()
    try:
        gradients(model, batch)
        parts = [part for part in gc.get_objects() if isinstance(part, (Pass, PTECache))]
        alive = [type(part).__name__ for part in parts if id(part) not in before]
    finally:
        gc.enable()
    assert not alive


def test_no_token_hands_the_host_more_than_the_one_before_it(monkeypatch):
    from peft_pte.seam import Seam

    widths, inner = [], Seam.inner

    def noting(self, *args, **kwargs):
        mask = kwargs["attention_mask"]
        widths.append(0 if mask is None else mask.shape[1])
        return inner(self, *args, **kwargs)

    model = make_pte()
    monkeypatch.setattr(Seam, "inner", noting)
    rollout = roll_out(model, make_prompts(), 3 * WINDOW)
    assert rollout.cache.evictions > 5
    assert widths == [make_prompts()["input_ids"].shape[1], *[1] * (3 * WINDOW - 1)]
