"""What a user can do wrong and no room has a test of its own for: each raises, and says what to do instead."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    FalconH1Config,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MllamaForCausalLM,
)
from transformers.generation import GenerationMixin
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from peft_pte import Evictions, PTECache, PTEConfig, prompt_end
from peft_pte.cache.store import KeyValue
from peft_pte.host import compat, sites
from peft_pte.method.encoder import Evicted
from peft_pte.ops import compress_
from peft_pte.seam import Seam
from tests.cases import GROUPED, make_base
from tests.helpers import SMALL, make_prompts, make_pte, roll_out
from tests.integrations.common import make_tokenizer
from tests.laws.test_hybrids import SHARED

WINDOW = SMALL["cache_window"]
IDS = torch.ones(2, 6, dtype=torch.long)


def config(**fields):
    return PTEConfig(task_type="CAUSAL_LM", **{**SMALL, **fields})


# Configs and policies ------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_an_eviction_without_a_window():
    with pytest.raises(
        ValueError, match="`cache_window` must be a number of tokens for an eviction to happen, got None"
    ):
        config(cache_window=None).tokens_per_eviction  # noqa: B018


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(
        ValueError, match=r"`tokenizer` must have a chat template, got .* without one. Give the token ids"
    ):
        prompt_end(make_tokenizer())


# Models --------------------------------------------------------------------------------------------------------------------------


def test_a_layer_that_keeps_more_than_keys_and_values():
    with pytest.raises(
        NotImplementedError, match="`cache_window` cannot bound a model whose layer 0 keeps a LinearAttentionAndFull"
    ):
        PTECache(FalconH1Config(num_hidden_layers=2), config())


def test_a_model_that_has_no_cache(monkeypatch):
    def refuse(config):
        raise AttributeError("no layers")

    monkeypatch.setattr(sites, "DynamicCache", refuse)
    with pytest.raises(
        NotImplementedError, match=r"transformers makes no DynamicCache for LlamaConfig \(AttributeError: no layers"
    ):
        get_peft_model(make_base("llama"), config())


def test_a_model_with_a_cache_of_its_own():
    base = MiniMaxForCausalLM(MiniMaxConfig(**{**GROUPED, "num_local_experts": 2, "head_dim": 8}))
    with pytest.raises(NotImplementedError, match="MiniMaxModel cannot be run on transformers' DynamicCache"):
        get_peft_model(base, config())


def test_attention_that_text_does_not_reach():
    base = MllamaForCausalLM(MllamaTextConfig(**{**GROUPED, "cross_attention_layers": [1], "bos_token_id": 1}))
    with pytest.raises(
        NotImplementedError, match=r"hands no keys and values \[B, heads, T, head_dim\] to the layer of the cache"
    ):
        get_peft_model(base, config())


def test_two_attentions_in_a_layer():
    base = make_base("llama")
    found = sites.find_sites(base)
    by_index = found.by_index
    by_index[1].block = by_index[0].block
    with pytest.raises(NotImplementedError, match="has several attention layers in one decoder layer"):
        sites._refuse_shared_layers(base, by_index)


def test_a_layer_of_several_vectors_per_token():
    base = make_base("llama")
    site = sites.find_sites(base).by_index[0]
    site.token_axes = {}
    with pytest.raises(NotImplementedError, match="computes several vectors per token, which cannot be told apart"):
        sites._check_tokens(base, site, base.model.layers[0])


def test_heads_that_choose_beside_layers_that_share_keys():
    base = Gemma4ForCausalLM(Gemma4TextConfig(**SHARED))
    with pytest.raises(
        NotImplementedError, match="`eviction` must be \"sliding_window\" for Gemma4ForCausalLM, got 'key_diff'"
    ):
        get_peft_model(base, config(eviction="key_diff"))


def test_another_version_of_transformers(monkeypatch):
    monkeypatch.delattr(GenerationMixin, compat.CACHE_METHOD)
    with pytest.raises(
        NotImplementedError,
        match=r"GenerationMixin of this transformers version has no `_prepare_cache_for_generation`. Install a version that peft-pte is tested with",
    ):
        compat.check()


def test_a_version_of_transformers_that_calls_a_cache_something_else(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", lambda self, input_ids, memory=None: None)
    with pytest.raises(
        NotImplementedError,
        match="of this transformers version takes no cache by a name that is known, but self, input_ids",
    ):
        compat._name_of_cache()


def test_a_target_outside_of_the_layers():
    base = make_base("llama")
    base.model.extra = torch.nn.Linear(32, 32)
    with pytest.raises(
        ValueError,
        match=r"`target_modules` must lie inside the decoder layers, whose state they read; got `model.extra`",
    ):
        get_peft_model(base, config(target_modules=["q_proj", "extra"]))


def test_a_model_that_carries_no_adapter():
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM carries no PTE adapter. Use get_peft_model\(model"):
        Seam.require(make_base("llama"))


def test_keys_of_another_width_than_was_found():
    encoder = make_pte().base_model.model.model.layers[0].self_attn.thought_encoder
    heads = torch.zeros(1, 2, 2, 4)
    with pytest.raises(
        NotImplementedError, match=r"where widths of 16 and 16 were found. Load the weights of the base"
    ):
        encoder("default", torch.zeros(1, 5, 4), Evicted(heads, heads, torch.zeros(1, 2), None))


def test_a_linear_that_gets_rows_without_their_sequences():
    model = make_pte()
    model.base_model.model.model.layers[0].mlp.up_proj.register_forward_pre_hook(
        lambda module, arguments: (arguments[0].flatten(0, 1)[1:],)
    )
    with pytest.raises(ValueError, match="its rows cannot be told apart by sequence, so it cannot read their states"):
        model(IDS, prompt_length=3)


def test_another_dtype_while_casting_is_off():
    model = make_pte(dtype=torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match=r"must get the dtype of its adapter, torch.float32, while casting is off"):
        model(IDS, prompt_length=3)


# Calls and caches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"cu_seq_lens_q": torch.tensor([0, 6])},
            NotImplementedError,
            "Packed sequences cannot be scored under a bounded cache: each row needs its own window",
        ),
        (
            {"inputs_embeds": torch.zeros(2, 6, 32)},
            ValueError,
            "You must specify exactly one of `input_ids` or `inputs_embeds`",
        ),
        (
            {"position_ids": torch.zeros(3, 2, 6)},
            NotImplementedError,
            r"`position_ids` must be 2D, got shape \(3, 2, 6\)",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_pte().base_model.model.model(input_ids=IDS, **arguments)


def test_an_empty_cache_has_no_positions():
    with pytest.raises(RuntimeError, match="This cache is empty: nothing was written to it yet"):
        make_pte().base_model.new_cache().window_positions(0)


def test_nothing_to_record():
    with pytest.raises(
        ValueError, match='Nothing is chosen with eviction="sliding_window": the oldest leave, and scoring'
    ):
        make_pte().base_model.new_cache().record()


def test_records_of_nothing():
    with pytest.raises(ValueError, match="`parts` must hold the evictions of a row at least, got none"):
        Evictions.join([])


def test_rows_that_cannot_be_replaced():
    model = make_pte()
    cache = roll_out(model, make_prompts(), 3).cache
    with pytest.raises(ValueError, match="`rows` must name 1 different rows of 3, one for each prompt, got"):
        model.replace_rows(cache, [3], IDS[:1])
    with pytest.raises(
        ValueError, match="`other` must be a cache of the same adapter configuration, and both must hold rows"
    ):
        cache.replace_rows([0], model.base_model.new_cache())
    marked = make_pte(prompt_end=[58, 60])
    open_prompt = marked.base_model.new_cache()
    with torch.no_grad():
        marked(IDS, past_key_values=open_prompt)
    with pytest.raises(
        NotImplementedError, match="Rows can be replaced where no layer that is not bounded stands at fixed"
    ):
        open_prompt.replace_rows([0, 1], copy.deepcopy(open_prompt))


def test_a_static_cache_under_attention_that_takes_no_tensor():
    model = make_pte()
    model.get_base_model().set_attn_implementation("flex_attention")
    with pytest.raises(
        NotImplementedError, match='`cache_implementation` must not be "static" with attn_implementation='
    ):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")


def test_options_that_a_batch_of_requests_does_not_know():
    with pytest.raises(
        TypeError, match=r"`generate_batch` got \['pixel_values'\], which are no options of a generation from"
    ):
        make_pte().generate_batch([[1, 2, 3]], pixel_values=None)


def test_a_record_of_other_heads():
    model = make_pte(eviction="head_budget")
    prompts = make_prompts((6, 6))
    output = model.generate(**prompts, max_new_tokens=3 * WINDOW, return_dict_in_generate=True, return_evictions=True)
    record = output.evictions
    other = Evictions(**{**vars(record), "layers": {index: part[:, :, :1] for index, part in record.layers.items()}})
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match=r"`evictions` must be of 2 heads in layer 0, got 1. Hand on what .*, row by row"
        ),
    ):
        model(output.sequences, prompt_length=6, evictions=other)


def test_queries_of_another_width_than_the_keys():
    layer = make_pte(eviction="attention").base_model.new_cache().layers[0]
    window = KeyValue(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))
    observed = torch.zeros(1, 4, 3, 6), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(
        NotImplementedError, match="and this model caches something else than the keys that its queries"
    ):
        layer._seen(window, torch.zeros(1, 2, 8, dtype=torch.long), observed, None, None)


# Operations ----------------------------------------------------------------------------------------------------------------------


def operands():
    """Of `compress_`: one layer, one row, two KV heads of 4 and a window of 4."""
    heads = torch.zeros(1, 1, 2, 4, 4)
    return {
        "state": torch.zeros(1, 1, 3, 3),
        "keys": heads,
        "values": heads.clone(),
        "slots": torch.zeros(1, 2, dtype=torch.long),
        "query": torch.zeros(1, 3, 3),
        "key_projection": torch.zeros(1, 3, 8),
        "value_projection": torch.zeros(1, 3, 8),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(1, 1, 2, 4, 4).mT}, "`keys` must be contiguous along the last axis, got strides"),
        ({"cos": torch.zeros(1, 2, 4)}, "`cos` and `sin` must both be given, or neither"),
        (
            {"cos": torch.zeros(1, 2, 3), "sin": torch.zeros(1, 2, 3)},
            "`cos` must have an even number of columns, at most",
        ),
    ],
)
def test_operands_that_contradict_each_other(change, message):
    with pytest.raises(ValueError, match=message):
        compress_(**{**operands(), **change})
