"""The cache at fixed addresses: the same policy, one graph for ever, nothing that waits for a device."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CompileConfig

from peft_pte import PTECache, PTEConfig
from tests.cases import FAMILIES, TWO_FAMILIES
from tests.helpers import POLICIES, SMALL, assert_close, log_probs, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]
STATIC = {"cache_implementation": "static"}
# The interpreter is slow.
TWO_LAYERS = {"gpt2": {"n_layer": 2}}


def compiling(backend="aot_eager"):
    """Settings with which ``generate`` compiles on any device, and refuses to break the graph."""
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


@pytest.fixture
def counters():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def addresses(cache):
    """Where everything is that a step reads or writes."""
    tensors = list(cache.fixed.states.values())
    for _, layer in cache.thought_layers:
        tensors += [layer.keys, layer.values, layer.write]
    return [tensor.data_ptr() for tensor in tensors]


def decode(model, cache, ids, mask, steps):
    """Greedy steps by hand; returns logits ``[B, steps, vocabulary]`` and what to go on with."""
    found = []
    for _ in range(steps):
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
        ids = found[-1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(found, dim=1), ids, mask


def make_cache(model, static=True):
    return PTECache(model.config, model.peft_config["default"], static=static)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_rollout(family, dtype, attention):
    if dtype == torch.float64 and attention == "eager":
        pytest.skip("transformers' eager attention takes its softmax in float32, which a float64 mask overflows")
    model = make_pte(family, dtype=dtype, attn_implementation=attention)
    rollout = roll_out(model, make_prompts((7, 2, 5)), 3 * WINDOW + 1, **STATIC)
    batch = rollout.truncated(3 * WINDOW + 1)
    with torch.no_grad():
        scored = thought_logits(model, batch)
    # Logits of a generation come in float32 whatever the model computes in.
    expected = log_probs(rollout.logits, batch)
    assert_close(log_probs(scored.float(), batch), expected)


@pytest.mark.parametrize("evict_ratio", [0.1, 0.25, 0.4, 1.0])
@pytest.mark.parametrize(
    "fields", [{}, {"state_update": "frozen"}, {"state_update": "off"}, {"num_global_tokens": 0}], ids=str
)
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_same_as_the_form_that_is_not_static(family, fields, evict_ratio):
    # Also where the evicted tokens wrap around the end of the ring.
    model = make_pte(family, evict_ratio=evict_ratio, **fields)
    expected = roll_out(model, make_prompts((7, 2, 5)), 5 * WINDOW)
    found = roll_out(model, make_prompts((7, 2, 5)), 5 * WINDOW, **STATIC)
    assert_close(found.logits, expected.logits)
    assert found.cache.evictions == expected.cache.evictions


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"key_rotation": "kept", "encoder_attention": "softmax"}),
        ("llama", {"encoder_attention": "slots"}),
        ("llama", {"state_address": "value", "num_global_tokens": 3}),
        ("glm", {}),
        ("gpt2", {}),
        # Not one launch: layers that are not side by side, of different ranks, without an update.
        ("llama", {"layers_to_transform": [0, 2]}),
        ("llama", {"rank_pattern": {"layers.1.*": 2}}),
        ("llama", {"state_update": "frozen"}),
    ],
    ids=str,
)
def test_kernels_in_place_of_the_reference(family, fields):
    # Under the interpreter where there is no GPU. The second eviction wraps around the end of the ring.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = {name: part.to(device) for name, part in make_prompts((7, 2)).items()}
    found = {}
    for impl in ("reference", "triton"):
        layers = {"num_hidden_layers": 3} if "layers_to_transform" in fields else {"num_hidden_layers": 2}
        layers = TWO_LAYERS.get(family, layers)
        model = make_pte(family, impl=impl, cache_window=4, evict_ratio=0.7, model=layers, **fields).to(device)
        found[impl] = roll_out(model, prompts, 9, **STATIC)
    assert found["triton"].cache.evictions == 2
    assert_close(found["triton"].logits, found["reference"].logits)
    for index, read in found["reference"].cache.fixed.states.items():
        assert_close(found["triton"].cache.fixed.states[index], read)


def test_one_launch_for_all_layers(monkeypatch):
    calls = []
    import peft_pte.passes.token

    original = peft_pte.passes.token.compress_
    monkeypatch.setattr(
        "peft_pte.passes.token.compress_", lambda *args, **kwargs: calls.append(original(*args, **kwargs))
    )
    model = make_pte("llama", impl="triton", evict_ratio=0.5)
    rollout = roll_out(model, make_prompts((3, 2)), WINDOW + 6, **STATIC)
    assert len(calls) == rollout.cache.evictions == 2


def test_adapters_in_another_dtype_than_their_base():
    # As TRL has them: the state is read in the adapters' dtype, in a rollout and in its replay.
    model = make_pte("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "pte_" in name:
            parameter.data = parameter.data.float()
    rollout = roll_out(model, make_prompts(), 2 * WINDOW, **STATIC)
    assert {part.dtype for part in rollout.cache.fixed.states.values()} == {torch.float32}


def test_early_finishers_and_several_answers_to_a_prompt():
    model = make_pte("llama")
    model.generation_config.eos_token_id = 7
    settings = {"num_return_sequences": 3, "max_new_tokens": 5 * WINDOW, "do_sample": True}
    found = {}
    for static in (False, True):
        torch.manual_seed(5)
        found[static] = model.generate(**make_prompts((7, 2, 5)), **settings, **(STATIC if static else {}))
    assert torch.equal(found[True], found[False])
    assert (found[True] == 7).any()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_one_graph_for_any_number_of_evictions(family, batch, counters):
    model = make_pte(family)
    prompts = make_prompts((7, 2, 5, 1)[:batch])
    expected = roll_out(model, prompts, 10 * WINDOW)
    found = roll_out(model, prompts, 10 * WINDOW, **compiling())
    assert found.cache.evictions > 30
    assert_close(found.logits, expected.logits)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_beside_sliding_layers_of_the_models_own(counters):
    # They are as static as the host makes them: its own branch for a full window is one more graph.
    model = make_pte("gemma3")
    expected = roll_out(model, make_prompts((7, 2)), 6 * WINDOW)
    found = roll_out(model, make_prompts((7, 2)), 6 * WINDOW, **compiling())
    assert_close(found.logits, expected.logits)
    assert found.cache.evictions > 15
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3


def test_one_graph_for_rows_in_any_phase(counters):
    # Rows that hold different numbers of thoughts evict at different steps, and some end before others.
    model = make_pte("llama", prompt_end=[58, 60])
    ids = make_prompts((17, 17, 17, 17))["input_ids"] % 57 + 1
    for row, column in enumerate((15, 2, 9, 6)):
        ids[row, column : column + 2] = torch.tensor([58, 60])
    settings = {"max_new_tokens": 6 * WINDOW, "do_sample": False, "eos_token_id": 7, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    counters.clear()
    found = model.generate(ids, **settings, **compiling(), return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert len(set(found.past_key_values.rows.bound)) == 4
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_made_once_and_used_again(counters):
    model = make_pte("llama")
    cache, places = make_cache(model), []
    for seed, lengths in ((1, (7, 2, 5)), (2, (6, 6, 1)), (3, (7, 7, 7))):
        prompts = make_prompts(lengths, seed=seed)
        expected = roll_out(model, prompts, 3 * WINDOW)
        cache.reset()
        found = roll_out(
            model, prompts, 3 * WINDOW, compile_config=compiling()["compile_config"], past_key_values=cache
        )
        assert found.cache is cache
        assert_close(found.logits, expected.logits)
        places.append(addresses(cache))
    assert places[0] == places[1] == places[2]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]


def test_one_compression_for_rows_out_of_phase(monkeypatch):
    # An eviction of some rows is one launch for all layers, and it reads those rows alone.
    calls = []
    import peft_pte.passes.token

    original = peft_pte.passes.token.compress_

    def compress(*args, rows, **kwargs):
        calls.append(None if rows is None else rows.tolist())
        original(*args, rows=rows, **kwargs)

    model = make_pte("llama", impl="triton", evict_ratio=0.5, prompt_end=[58, 60])
    ids = make_prompts((9, 9))["input_ids"] % 57 + 1
    for row, column in enumerate((7, 4)):
        ids[row, column : column + 2] = torch.tensor([58, 60])
    expected = model.generate(ids, max_new_tokens=WINDOW + 3, do_sample=False)
    monkeypatch.setattr("peft_pte.passes.token.compress_", compress)
    found = model.generate(ids, max_new_tokens=WINDOW + 3, do_sample=False, **STATIC)
    assert torch.equal(found, expected)
    assert calls == [[1], [0], [1]]


def test_next_generation_is_not_compiled_again(counters):
    model = make_pte("llama")
    for seed, length in ((1, 2), (2, 4), (3, 3)):
        roll_out(model, make_prompts((7, 2, 5), seed=seed), length * WINDOW, **compiling("eager"))
    assert counters["stats"]["unique_graphs"] == 1


def test_addresses_and_bytes_do_not_change():
    model = make_pte("llama")
    prompts, cache = make_prompts((7, 2, 5)), make_cache(model)
    _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], 2)
    before, held = addresses(cache), cache.nbytes
    for _ in range(4):
        _, ids, mask = decode(model, cache, ids, mask, WINDOW)
        assert addresses(cache) == before
        assert cache.nbytes == held
    assert cache.evictions > 10


def test_an_evicted_token_acts_through_the_state_only():
    model = make_pte("llama", model={"num_hidden_layers": 1})
    prompts, cache = make_prompts((7, 2, 5)), make_cache(model)
    _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], WINDOW + 2)
    assert cache.evictions == 1
    # The slots that the first eviction emptied and nothing has filled yet.
    empty = (~cache.rows.visible_slots(cache.layers[0].keys.shape[2])[0]).nonzero()[:, 0]
    other = copy.deepcopy(cache)
    for part in other.layers[0].block:
        part[:, :, empty] = 1e3
    expected, _, _ = decode(model, cache, ids, mask, 3)
    found, _, _ = decode(model, other, ids, mask, 3)
    assert torch.equal(found, expected)


def test_a_later_turn():
    model = make_pte("llama")
    prompts = make_prompts((5, 5, 5))
    found = {}
    for static in (False, True):
        cache = make_cache(model, static)
        _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], WINDOW + 3)
        turn = torch.cat([ids, make_prompts((6, 6, 6), seed=4)["input_ids"]], dim=1)
        mask = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
        found[static], _, _ = decode(model, cache, turn, mask, WINDOW)
    assert_close(found[True], found[False])


def test_rows_can_be_reordered_repeated_and_selected():
    model = make_pte("llama")
    prompts = make_prompts((7, 2, 5))
    found = {}
    for static in (False, True):
        cache = make_cache(model, static)
        _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], 2 * WINDOW)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        ids, mask = ids[[2, 0, 1]], mask[[2, 0, 1]]
        first, ids, mask = decode(model, cache, ids, mask, WINDOW)
        cache.batch_repeat_interleave(2)
        ids, mask = ids.repeat_interleave(2, dim=0), mask.repeat_interleave(2, dim=0)
        cache.batch_select_indices(torch.tensor([0, 3, 4]))
        ids, mask = ids[[0, 3, 4]], mask[[0, 3, 4]]
        second, _, _ = decode(model, cache, ids, mask, WINDOW)
        found[static] = torch.cat([first, second], dim=1)
    assert_close(found[True], found[False])


def test_reset_starts_again():
    model = make_pte("llama")
    prompts, cache = make_prompts((7, 2, 5)), make_cache(model)
    expected, _, _ = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], 2 * WINDOW)
    cache.reset()
    found, _, _ = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], 2 * WINDOW)
    assert torch.equal(found, expected)


def test_a_disabled_adapter_refuses_the_cache():
    model = make_pte("llama")
    prompts, cache = make_prompts((7, 2, 5)), make_cache(model)
    _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], 2)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="`past_key_values` is a PTECache, but no PTE adapter is active"),
    ):
        decode(model, cache, ids, mask, 1)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_step_never_looks_at_a_value(family):
    # What looks at a value of a tensor waits for its device; a fake tensor has none and says so.
    model = make_pte(family, attn_implementation="sdpa")
    mode = FakeTensorMode()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(weight.detach()), weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    cache, host = make_cache(model), model.get_base_model()
    with mode, torch.no_grad():
        ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
        for _ in range(3 * WINDOW):
            inputs = host.prepare_inputs_for_generation(ids, past_key_values=cache, attention_mask=mask)
            ids = host(**inputs, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    assert cache.evictions > 3


@pytest.mark.gpu
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_captured_in_a_graph_without_waiting_for_the_device(family):
    model = make_pte(family, dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    prompts = {name: part.cuda() for name, part in make_prompts((7, 2, 5)).items()}
    rollout = roll_out(model, prompts, 5 * WINDOW, **STATIC)
    batch = rollout.truncated(5 * WINDOW)
    with torch.no_grad():
        scored = thought_logits(model, batch)
    assert_close(log_probs(scored.double(), batch), log_probs(rollout.logits.double(), batch), torch.bfloat16)
    cache = make_cache(model)
    _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(model, cache, ids, mask, 3 * WINDOW)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_adapters_on_different_layers():
    model = make_pte("llama", layers_to_transform=[0])
    other = PTEConfig(task_type="CAUSAL_LM", **{**SMALL, "layers_to_transform": [1, 2]})
    model.add_adapter("other", other)
    model.set_adapter("other")
    found = [roll_out(model, make_prompts(), 4 * WINDOW, **options) for options in ({}, STATIC)]
    assert_close(found[1].logits, found[0].logits)


def test_labels_say_where_the_prompt_ends():
    model = make_pte("llama")
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    with torch.no_grad():
        expected = thought_logits(model, batch)
        assert_close(thought_logits(model, batch, past_key_values=make_cache(model)), expected)


def test_learned_positions_end():
    model = make_pte("gpt2", model={"n_positions": 32, "max_position_embeddings": 32})
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model.generate(**make_prompts(), max_new_tokens=40, **STATIC)


def test_moved_between_steps():
    model = make_pte("llama")
    prompts = make_prompts((7, 2, 5))
    found = []
    for move in (False, True):
        cache = make_cache(model)
        _, ids, mask = decode(model, cache, prompts["input_ids"], prompts["attention_mask"], WINDOW + 3)
        if move:
            cache.move_to("cpu")
            assert all(layer.write.device == layer.keys.device for _, layer in cache.thought_layers)
        found.append(decode(model, cache, ids, mask, WINDOW)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("eviction", POLICIES[1:4])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_policies_that_look_in_one_graph(family, eviction, counters):
    # Queries are seen inside of the graph, and remembered at fixed addresses.
    model = make_pte(family, eviction=eviction)
    expected = roll_out(model, make_prompts((7, 2, 5)), 6 * WINDOW)
    found = roll_out(model, make_prompts((7, 2, 5)), 6 * WINDOW, **compiling())
    assert_close(found.logits, expected.logits)
    for index, _ in expected.cache.thought_layers:
        held = [run.cache.window_positions(index).sort(dim=-1).values for run in (expected, found)]
        assert torch.equal(*held)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
