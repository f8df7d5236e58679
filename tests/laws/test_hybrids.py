"""Layers that evict nothing beside bounded ones: they run as their host wrote them, and the laws hold."""

import pytest
import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.cases import FULL_AND_SLIDING, GROUPED
from tests.helpers import SMALL, assert_close, gradients, make_prompts, make_pte, roll_out, thought_logits, trainable
from tests.laws.test_rows_alone import Batch

WINDOW = SMALL["cache_window"]
LINEAR = {
    **GROUPED,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 8,
    "num_experts": 0,
    "decoder_sparse_step": 10,
    "mlp_only_layers": [0, 1, 2, 3],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
CONVOLUTION = {
    **GROUPED,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention"] * 2,
    "conv_L_cache": 3,
    "block_ff_dim": 48,
    "block_auto_adjust_ff_dim": False,
}
CHUNKED = {
    **FULL_AND_SLIDING,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "no_rope_layers": [1, 0, 1, 0],
    "attention_chunk_size": 8,
    "num_local_experts": 1,
    "moe_layers": [],
    "intermediate_size_mlp": 48,
}
# The last two layers read the keys and values of the two before them.
SHARED = {
    **FULL_AND_SLIDING,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 61,
    "global_head_dim": 8,
}
HYBRIDS = {
    "convolution": (Lfm2ForCausalLM, Lfm2Config, CONVOLUTION),
    "chunked": (Llama4ForCausalLM, Llama4TextConfig, CHUNKED),
    "shared": (Gemma4ForCausalLM, Gemma4TextConfig, SHARED),
    "sliding": (Olmo3ForCausalLM, Olmo3Config, FULL_AND_SLIDING),
    "linear attention": (Qwen3NextForCausalLM, Qwen3NextConfig, LINEAR),
}
# Rows of one length: a recurrent layer's own decoding differs from its own forward by more where rows are padded.
PROMPTS = (6, 6)


def make_hybrid(name, **fields):
    model_class, config_class, arguments = HYBRIDS[name]
    torch.manual_seed(0)
    config = config_class(**arguments)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    return make_pte(base=model_class(config).eval(), **fields)


def own_error(model, batch, logits):
    """How far the base model's own decoding is from its own forward."""
    with model.disable_adapter():
        rollout = roll_out(model, make_prompts(PROMPTS), 4 * WINDOW)
        with torch.no_grad():
            scored = thought_logits(model, rollout.truncated(4 * WINDOW))
    return (scored - rollout.logits).abs().max()


@pytest.mark.parametrize("attention", ["linear", "slots"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_scoring_equals_the_rollout(name, attention):
    model = make_hybrid(name, encoder_attention=attention)
    rollout = roll_out(model, make_prompts(PROMPTS), 4 * WINDOW)
    assert rollout.cache.evictions > 10
    batch = rollout.truncated(4 * WINDOW)
    with torch.no_grad():
        error = (thought_logits(model, batch) - rollout.logits).abs().max()
    assert error < 1e-4 + 4 * own_error(model, batch, rollout.logits)
    model.peft_config["default"].cache_window = None
    with torch.no_grad():
        assert (thought_logits(model, batch) - rollout.logits).abs().max() > 100 * error


@pytest.mark.parametrize("name", HYBRIDS)
def test_gradients_with_and_without_checkpoints(name):
    # In float64, to float32's tolerance: these models norm in float32, and a softmax over the rows of a state makes more of it.
    model = make_hybrid(name).double()
    batch = roll_out(model, make_prompts(PROMPTS), 4 * WINDOW).truncated(4 * WINDOW)
    expected, loss = gradients(model.train(), batch)
    assert all(part.abs().max() > 0 for part in expected.values())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    largest = max(part.abs().max() for part in expected.values())
    for length in (None, 7, 10_000):
        model.peft_config["default"].segment_length = length
        actual, checkpointed = gradients(model, batch)
        assert_close(checkpointed, loss, torch.float32)
        for key, part in expected.items():
            assert_close(actual[key] / largest, part / largest, torch.float32, scale=5)


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_that_evict_nothing_get_what_the_host_gives_them(name):
    model = make_hybrid(name, init_weights=True)
    host = model.get_base_model()
    own = [index for index, kind in enumerate(host.config.layer_types) if kind != "full_attention"]
    batch = roll_out(model, make_prompts(PROMPTS), WINDOW).truncated(WINDOW)
    seen = []

    def note(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        seen.append((args[0].clone(), None if mask is None else mask.clone(), kwargs["position_ids"].clone()))

    for index in own:
        host.model.layers[index].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
        ours, seen = seen, []
        with model.disable_adapter():
            model(**batch)
    # Within the window a fresh adapter is the base model, so even their inputs are equal.
    for (hidden, mask, positions), (wanted, wanted_mask, wanted_positions) in zip(ours, seen, strict=True):
        assert_close(hidden, wanted)
        assert torch.equal(positions, wanted_positions.expand_as(positions))
        assert (mask is None) == (wanted_mask is None)
        assert mask is None or torch.equal(mask, wanted_mask)


@pytest.mark.parametrize("name", HYBRIDS)
def test_their_adapters_read_the_identity(name):
    model = make_hybrid(name)
    kinds = model.get_base_model().config.layer_types
    encoders = {int(key.split(".layers.")[1].split(".")[0]) for key in trainable(model) if ".thought_encoder." in key}
    own = len(kinds) - getattr(model.get_base_model().config, "num_kv_shared_layers", 0)
    assert encoders == {index for index, kind in enumerate(kinds[:own]) if kind == "full_attention"}
    adapted = {int(key.split(".layers.")[1].split(".")[0]) for key in trainable(model) if ".pte_up." in key}
    assert adapted == set(range(len(kinds)))


def test_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = make_hybrid("linear attention")
    batch = roll_out(model, make_prompts(PROMPTS), 4 * WINDOW).truncated(4 * WINDOW)
    with torch.no_grad():
        expected = thought_logits(model, batch)
    model.save_pretrained(tmp_path)
    base = make_hybrid("linear attention").unload()
    torch.manual_seed(99)
    with torch.no_grad():
        assert_close(thought_logits(PeftModel.from_pretrained(base, tmp_path).eval(), batch), expected)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_row_that_gets_padding_is_refused(name):
    # The model's own layers would count it.
    model = make_hybrid(name)
    cache, ids = model.base_model.new_cache(), torch.randint(1, 57, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    with torch.no_grad():
        model(input_ids=ids[:, :12], prompt_length=5, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="would count the padding"):
            model(input_ids=ids[:, 12:], attention_mask=mask, past_key_values=cache)


class Decoded(Batch):
    """Rows whose tokens come one by one, as they do alone: a recurrent layer's decoding is not, to the last digit, its forward."""

    def alone(self, row):
        prompt, cache = self.prompts[row], self.model.base_model.new_cache()
        found = []
        with torch.no_grad():
            for ids in (self.texts[row, :prompt], *self.texts[row, prompt : 6 * WINDOW].split(1)):
                length = {} if found else {"prompt_length": prompt}
                found.append(self.model(ids[None], past_key_values=cache, **length).logits[0])
        return torch.cat(found)


@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_that_are_replaced_repeated_and_selected(name):
    # The recurrence of linear attention is taken in float32, whatever the dtype of the model.
    rounded_to = torch.float32 if name == "linear attention" else torch.float64
    batch = Decoded(make_hybrid(name, dtype=torch.float64), (4, 4, 4), rounded_to=rounded_to)
    batch.start()
    # A prompt that is longer than what the others have, and some that are shorter.
    for row, prompt in ((None, 0), (1, 15), (0, 3), (2, 1)):
        if row is not None:
            batch.replace(row, prompt)
        for _ in range(WINDOW + 1):
            batch.feed([1, 1, 1])
    batch.cache.batch_repeat_interleave(2)
    batch.cache.batch_select_indices(torch.tensor([5, 0, 2]))
    order = [2, 0, 1]
    batch.mask, batch.texts = batch.mask[order], batch.texts[order]
    batch.expected, batch.fed = [batch.expected[row] for row in order], [batch.fed[row] for row in order]
    for _ in range(3):
        batch.feed([1, 1, 1])
