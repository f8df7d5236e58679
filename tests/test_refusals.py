"""What refuses, loudly (the README's table): one test each."""

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraModel, PeftConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    T5Config,
)

from peft_pte import PTECache, PTEConfig, PTEModel
from peft_pte.config import LIVE_FIELDS
from tests.cases import GROUPED, make_base
from tests.helpers import SMALL, assert_close, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]


def config(**fields):
    return PTEConfig(task_type="CAUSAL_LM", **{**SMALL, **fields})


@pytest.mark.parametrize("call", ["merge_adapter", "unmerge_adapter", "merge_and_unload"])
def test_merging(call):
    model = make_pte()
    with pytest.raises(NotImplementedError, match="cannot be merged: its weight `dW = A S B` is different for every"):
        getattr(model, call)()
    # Nothing was lost.
    roll_out(model, make_prompts(), 4)


def test_merging_one_layer():
    layer = make_pte().base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        layer.merge()


def test_generate_batch_of_a_model_that_counts_columns():
    base = RoFormerForCausalLM(RoFormerConfig(**{**GROUPED, "is_decoder": True}))
    with pytest.raises(NotImplementedError, match="`generate_batch` refills rows, and this model"):
        make_pte(base=base).generate_batch([[1, 2, 3]])
    model = make_pte(base=base)
    cache = model.base_model.new_cache()
    model(torch.tensor([[3, 4, 5]]), past_key_values=cache, prompt_length=3)
    with pytest.raises(NotImplementedError, match="number columns, as this one does"):
        model.replace_rows(cache, [0], torch.tensor([[3, 4]]))
    with pytest.raises(NotImplementedError, match="Leave `cache_implementation` unset"):
        make_pte("gemma3").generate_batch([[1, 2, 3]], max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("name", ["quantized", "offloaded", "sliding_window"])
def test_other_cache_implementations(name):
    with pytest.raises(NotImplementedError, match="`cache_implementation` must be unset"):
        make_pte().generate(**make_prompts(), max_new_tokens=4, cache_implementation=name)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {"cache_window": None}, "A static cache needs a bounded window"),
    ],
)
def test_static_cache_of_what_has_no_static_form(family, fields, reason):
    with pytest.raises(NotImplementedError, match=reason):
        make_pte(family, **fields).generate(**make_prompts(), max_new_tokens=4, cache_implementation="static")


def test_gradients_through_a_static_cache():
    model = make_pte()
    cache = PTECache(model.config, model.peft_config["default"], static=True)
    with pytest.raises(NotImplementedError, match="no gradient can flow"):
        model(**make_prompts(), past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"segment_length": 0}, "at least 1"),
        ({"segment_length": 4, "cache_window": None}, "needs a bounded cache"),
    ],
)
def test_segment_length(fields, reason):
    with pytest.raises(ValueError, match=f"`segment_length` .*{reason}"):
        PTEConfig(**{**SMALL, **fields})


def test_chunked_prefill():
    with pytest.raises(NotImplementedError, match="`prefill_chunk_size` must be unset"):
        make_pte().generate(**make_prompts(), max_new_tokens=4, prefill_chunk_size=2)


def test_assisted_decoding_after_an_eviction():
    model, assistant = make_pte(), make_base("llama")
    ids = make_prompts((6,))["input_ids"]
    # Within the window the assistant works, and changes nothing.
    assisted = model.generate(ids, assistant_model=assistant, max_new_tokens=WINDOW - 2, do_sample=False)
    assert torch.equal(assisted, model.generate(ids, max_new_tokens=WINDOW - 2, do_sample=False))
    with pytest.raises(ValueError, match="what was evicted cannot be brought back"):
        model.generate(ids, assistant_model=assistant, max_new_tokens=4 * WINDOW, do_sample=False)


def test_cropping_after_an_eviction():
    model = make_pte()
    cache = roll_out(model, make_prompts(), 2 * WINDOW).cache
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 after an eviction"):
        cache.crop(-1)


def test_cropping_the_prompt():
    cache = roll_out(make_pte(), make_prompts(), 3).cache
    assert cache.is_croppable
    with pytest.raises(ValueError, match="leave the prompt alone"):
        cache.crop(-5)


def test_encoder_decoder_models():
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        get_peft_model(t5, PTEConfig(task_type="SEQ_2_SEQ_LM", **SMALL))


def bert():
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: LlamaForSequenceClassification(make_base("llama").config), "SEQ_CLS"),
        (lambda: LlamaForTokenClassification(make_base("llama").config), "TOKEN_CLS"),
        (lambda: LlamaModel(make_base("llama").config), "FEATURE_EXTRACTION"),
        (bert, "SEQ_CLS"),
    ],
    ids=["reward", "tokens", "embeddings", "encoder"],
)
def test_models_that_do_not_generate(make, task):
    model = make()
    modules, attributes = dict(model.named_modules()), set(vars(model))
    with pytest.raises(
        NotImplementedError, match=f"must have `generate`, got {type(model).__name__},.*nothing thinks.* Use LoRA"
    ):
        get_peft_model(model, PTEConfig(task_type=task, **SMALL))
    # Refused before anything was changed.
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert not model._forward_pre_hooks


def test_a_causal_lm_without_the_hook_of_generate(monkeypatch):
    model = make_base("llama")
    # As in a version of transformers to come.
    monkeypatch.delattr("transformers.generation.GenerationMixin._prepare_cache_for_generation")
    with pytest.raises(NotImplementedError, match=r"transformers version .*Install a transformers version"):
        get_peft_model(model, config())


def test_positions_from_the_attention_mask():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(
        NotImplementedError, match=r"BloomForCausalLM derives positions from the attention mask \(ALiBi and its kin\)"
    ):
        get_peft_model(bloom, config())


def test_models_without_a_growing_layer():
    model = MistralForCausalLM(MistralConfig(**{**GROUPED, "sliding_window": 16}))
    with pytest.raises(NotImplementedError, match="`cache_window` has nothing to bound"):
        get_peft_model(model, config())


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length(rope_type):
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type == "longrope":
        parameters.update(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=128)
    model = make_base("llama", rope_parameters=parameters)
    with pytest.raises(NotImplementedError, match=f"rope_type='{rope_type}'"):
        get_peft_model(model, config())


NAMES = ["default", "__base__", "default"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_an_adapter_per_row(argument, task):
    model = get_peft_model(make_base("llama"), PTEConfig(task_type=task, **SMALL)).eval()
    prompts, value = make_prompts(), NAMES if argument == "adapter_names" else [1, 1, 1]
    match = f"`{argument}` must be None with a PTE adapter, got "
    remedy = "one adapter per call" if argument == "adapter_names" else "Leave it out"
    for call in (model, model.base_model, model.get_base_model()):
        with pytest.raises(NotImplementedError, match=match + ".*" + remedy):
            call(**prompts, **{argument: value})
        expected = call(**prompts).logits
        assert torch.equal(call(**prompts, **{argument: None}).logits, expected)
    with pytest.raises(NotImplementedError, match=match + ".*" + remedy):
        model.generate(**prompts, max_new_tokens=2, **{argument: value})
    expected = model.generate(**prompts, max_new_tokens=2, do_sample=False)
    assert torch.equal(model.generate(**prompts, max_new_tokens=2, do_sample=False, **{argument: None}), expected)
    # transformers' own generate knows no such argument.
    with pytest.raises(ValueError, match=argument):
        model.get_base_model().generate(**prompts, max_new_tokens=2, **{argument: value})


def test_a_mix_of_adapters():
    model = make_pte()
    model.add_adapter("other", config())
    with pytest.raises(NotImplementedError, match=r"`add_weighted_adapter` cannot mix PTE adapters: .*set_adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", combination_type="linear")
    assert set(model.peft_config) == {"default", "other"}


def test_subtracting_an_initialization():
    with pytest.raises(NotImplementedError, match="`subtract_mutated_init` has nothing to subtract"):
        make_pte().subtract_mutated_init({}, "default")


def test_the_weight_of_an_adapter():
    with pytest.raises(NotImplementedError, match="different for every sequence"):
        make_pte().base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")


def test_no_public_method_of_lora_is_missing_without_a_word():
    def public(cls):
        return {name for name in vars(cls) if not name.startswith("_") and callable(getattr(cls, name))}

    assert not {name for name in public(LoraModel) if not hasattr(PTEModel, name)}
    layer = make_pte().base_model.model.model.layers[0].mlp.up_proj
    # Initializations of LoRA's matrices, which its own constructor calls.
    initializations = {name for name in public(LoraLayer) if name.endswith("_init")}
    missing = {name for name in public(LoraLayer) - initializations if not hasattr(layer, name)}
    assert missing <= {"reset_lora_parameters", "resolve_lora_variant"}


def test_scales_of_lora_layers_alone():
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(make_pte(), 0.5),
    ):
        pass


def test_two_active_adapters():
    model = make_pte()
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="At most one PTE adapter can be active"):
        model.base_model.set_adapter(["default", "other"])


def test_prompt_beyond_the_positions():
    model = make_pte(model={"max_position_embeddings": 16})
    with pytest.raises(ValueError, match="The input is 20 tokens long, and the model has positions for 16"):
        model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=2)


def test_learned_positions_end():
    model = make_pte("gpt2", model={"n_positions": 32, "max_position_embeddings": 32})
    with pytest.raises(ValueError, match="the model has positions for 32"):
        model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("targets", [".*(q_proj|lm_head)", "all"], ids=str)
def test_adapted_output_head(targets):
    fields = {"target_modules": targets if targets != "all" else r".*(proj|head)"}
    with pytest.raises(ValueError, match="must not reach the output head, got `lm_head`"):
        get_peft_model(make_base("llama"), config(**fields))


def test_targets_that_are_no_linear_layers():
    with pytest.raises(TypeError, match=r"must name nn\.Linear or transformers' Conv1D layers, got LlamaRMSNorm"):
        get_peft_model(make_base("llama"), config(target_modules=["input_layernorm"]))


@pytest.mark.parametrize("name", ["self_attn", "layers", "model"])
def test_attention_layers_that_are_trained_in_full(name):
    base = make_base("llama")
    with pytest.raises(ValueError, match="`modules_to_save` must not hold attention layers"):
        get_peft_model(base, config(modules_to_save=[name]))
    get_peft_model(base, config(modules_to_save=["mlp", "lm_head"], target_modules=["q_proj"]))


def test_a_model_that_could_not_be_adapted_is_as_it_was():
    base = make_base("llama")
    ids = torch.arange(1, 9)[None]
    expected = base(ids).logits
    for _ in range(2):
        with pytest.raises(ValueError, match="must not reach the output head"):
            get_peft_model(base, config(target_modules=r".*q_proj|lm_head"))
        assert torch.equal(base(ids).logits, expected)
        assert not [name for name, _ in base.named_modules() if "pte" in name or "thought" in name]


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("how", ["get_peft_model", "from_pretrained"])
def test_offloaded_weights(place, how, tmp_path):
    make_pte().save_pretrained(tmp_path / "adapter")
    base = make_base("llama")
    if place == "disk":
        base = disk_offload(base, tmp_path / "offload", execution_device="cpu")
    else:
        base = cpu_offload(base, execution_device="cpu")
    make = {
        "get_peft_model": lambda: get_peft_model(base, PTEConfig()),
        "from_pretrained": lambda: PeftModel.from_pretrained(base, tmp_path / "adapter"),
    }
    with pytest.raises(NotImplementedError, match=r"Weights of the base model are offloaded.*device_map"):
        make[how]()


def test_not_a_transformers_model():
    with pytest.raises(TypeError, match="Pass a PreTrainedModel"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), PTEConfig(target_modules=["0"]))


def test_choosing_by_keys_in_half_precision_warns():
    with pytest.warns(UserWarning, match="choose differently in a rollout and in its replay"):
        make_pte(dtype=torch.bfloat16, eviction="key_diff")


def test_cache_of_another_configuration():
    model = make_pte()
    cache = PTECache(model.config, config(cache_window=2 * WINDOW))
    with pytest.raises(ValueError, match="`past_key_values` was built for another adapter configuration"):
        model.generate(**make_prompts(), max_new_tokens=2, past_key_values=cache)


def test_cache_of_another_adapter():
    model = make_pte()
    cache = roll_out(model, make_prompts(), 3).cache
    model.add_adapter("other", config())
    model.set_adapter("other")
    with pytest.raises(ValueError, match="holds thoughts of the adapter 'default', got the adapter 'other' now"):
        model(
            input_ids=torch.ones(3, 1, dtype=torch.long),
            attention_mask=torch.ones(3, 9, dtype=torch.long),
            past_key_values=cache,
        )


def test_cache_of_another_class():
    model = make_pte()
    with pytest.raises(TypeError, match="`past_key_values` must be a PTECache"):
        model(**make_prompts(), past_key_values=DynamicCache(config=model.config))


def test_bounded_cache_without_an_adapter():
    model = make_pte()
    cache = roll_out(model, make_prompts(), 3).cache
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="`past_key_values` is a PTECache, but no PTE adapter is active"),
    ):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


def test_packed_sequences():
    model = make_pte()
    ids = torch.ones(1, 8, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(
        NotImplementedError, match="`position_ids` start again within a row, so the row holds several sequences"
    ):
        model(input_ids=ids, position_ids=positions, labels=ids)


def test_a_mask_that_is_no_padding_mask():
    model = make_pte()
    with pytest.raises(NotImplementedError, match="`attention_mask` must be a 2D padding mask"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4), use_cache=True)


def test_a_mask_that_forgets_what_was_seen():
    model = make_pte()
    cache = roll_out(model, make_prompts(), 3).cache
    with pytest.raises(ValueError, match="`attention_mask` must cover the 8 tokens seen and the 1 new ones"):
        model(
            input_ids=torch.ones(3, 1, dtype=torch.long),
            attention_mask=torch.ones(3, 1, dtype=torch.long),
            past_key_values=cache,
        )


def test_attentions_over_segments():
    model = make_pte()
    batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
    with pytest.raises(NotImplementedError, match="`output_attentions` cannot be joined"):
        model(**batch, output_attentions=True)


def test_an_interrupted_call_leaves_nothing_behind():
    # always_call hooks do not run on KeyboardInterrupt.
    model = make_pte()
    batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
    backbone = model.base_model.model.model
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = backbone(**plain).last_hidden_state

        def interrupt(*args):
            raise KeyboardInterrupt

        hook = backbone.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        assert torch.equal(backbone(**plain).last_hidden_state, expected)


def continuing(model, columns):
    """A cache that saw seven columns, and a mask for ``columns`` more."""
    ids = torch.randint(1, 61, (2, 7 + columns))
    cache = model.base_model.new_cache()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        model(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        model(input_ids=ids[:, 5:7], attention_mask=mask[:, :7], past_key_values=cache)
    return {"input_ids": ids[:, 7:], "attention_mask": mask, "past_key_values": cache}


def test_hiding_what_was_cached():
    model = make_pte()
    call = continuing(model, 5)
    call["attention_mask"][0, 5] = 0
    with pytest.raises(ValueError, match="hides tokens that were cached as real"):
        model(**call)


def test_forgetting_the_mask():
    model = make_pte()
    cache = roll_out(model, make_prompts(), 3).cache
    with pytest.raises(ValueError, match="must go on covering the 8 tokens seen"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


def test_data_parallel():
    from peft_pte.tuner.install import _enter_call

    model = make_pte().get_base_model()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(NotImplementedError, match="accelerate launch"):
        _enter_call(replica, (), {})


def test_routers_that_return_more_than_a_tensor():
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = get_peft_model(make_base("llama"), config(target_modules=["up_proj"]))
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer = Router(32, 48)
    with pytest.raises(NotImplementedError, match="returns more than one tensor"):
        model(**make_prompts())


def test_layers_called_alone():
    model = make_pte()
    with pytest.raises(RuntimeError, match="outside its model's forward pass"):
        model.base_model.model.model.layers[0].mlp(torch.zeros(1, 2, 32))


def test_explicit_triton_where_it_cannot_run(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this machine")
    model = make_pte(impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(NotImplementedError, match='`impl="triton"` needs a CUDA device'):
        model(**make_prompts())


def weights(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def saved(tmp_path):
    make_pte().save_pretrained(tmp_path)
    return tmp_path


def test_adapter_on_a_base_of_other_shapes(saved):
    with pytest.raises(
        ValueError, match=r"no weight was changed: .* has another shape. The adapter was made for a base"
    ):
        PeftModel.from_pretrained(make_base("llama", hidden_size=64), saved)


def test_adapter_on_a_base_of_more_layers(saved):
    with pytest.raises(ValueError, match=r"is missing\. The file is incomplete, or of another configuration"):
        PeftModel.from_pretrained(make_base("llama", num_hidden_layers=4), saved)


def test_adapter_on_a_base_of_fewer_layers(saved):
    with pytest.raises(ValueError, match="is in the file and not in the model"):
        PeftModel.from_pretrained(make_base("llama", num_hidden_layers=2), saved)


def test_truncated_adapter_file(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    base = make_base("llama")
    before = weights(base)
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        PeftModel.from_pretrained(base, saved)
    assert all(
        torch.equal(before[name.replace(".base_layer", "")], value)
        for name, value in weights(base).items()
        if "pte_" not in name
    )


CHANGED = {
    "r": 5,
    "target_modules": ["q_proj"],
    "exclude_modules": ["q_proj"],
    "alpha": 3.0,
    "dropout": 0.5,
    "fan_in_fan_out": True,
    "use_rslora": True,
    "init_weights": True,
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2.0},
    "modules_to_save": ["lm_head"],
    "num_global_tokens": 7,
    "encoder_attention": "softmax",
    "update_gain": 0.5,
    "state_update": "frozen",
    "state_address": "value",
    "key_rotation": "kept",
    "impl": "reference",
    "format_version": 2,
}
OWN = {field.name for field in dataclasses.fields(PTEConfig)} - {field.name for field in dataclasses.fields(PeftConfig)}


@pytest.fixture(scope="module")
def live():
    return make_pte()


@pytest.mark.parametrize("name", sorted(OWN - set(LIVE_FIELDS)))
def test_changing_what_was_built_in(name, live):
    adapted = live.peft_config["default"]
    before = getattr(adapted, name)
    with pytest.raises(
        ValueError, match=rf"`{name}` must stay .*, got .*dataclasses\.replace.*from_pretrained.*add_adapter"
    ):
        setattr(adapted, name, CHANGED[name])
    assert getattr(adapted, name) == before
    # The same value is no change.
    setattr(adapted, name, copy.deepcopy(before))
    if isinstance(before, set):
        setattr(adapted, name, sorted(before))
    assert getattr(adapted, name) == before


def test_what_peft_sets_stays_free(live):
    adapted = live.peft_config["default"]
    for name in ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type", "peft_version"):
        before = getattr(adapted, name)
        changed = "CAUSAL_LM" if name == "task_type" else "x"
        setattr(adapted, name, changed)
        assert getattr(adapted, name) == changed
        setattr(adapted, name, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("update_gain", 0.5),
        ("encoder_attention", "softmax"),
        ("alpha", 1.0),
        ("key_rotation", "kept"),
        ("impl", "reference"),
    ],
    ids=str,
)
def test_loading_with_a_changed_config(name, value, tmp_path):
    # The remedy that the sentence names works, and is what the field meant all along.
    model = make_pte()
    model.save_pretrained(tmp_path)
    batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
    changed = dataclasses.replace(model.peft_config["default"], **{name: value})
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path, config=changed)
    with torch.no_grad():
        expected = thought_logits(make_pte(**{name: value}), batch)
        assert_close(thought_logits(loaded, batch), expected)
        assert (name == "impl") == bool((expected - thought_logits(model, batch)).abs().max() < 1e-4)
    # A second adapter of the same model may have it too.
    changed.inference_mode = False
    model.add_adapter("other", dataclasses.replace(changed, init_weights=True))
    assert getattr(model.peft_config["other"], name) == value


def test_a_wrong_value_on_a_live_config(live):
    adapted = live.peft_config["default"]
    with pytest.raises(ValueError, match="`cache_window` must be at least 4, got 2"):
        adapted.cache_window = 2
    with pytest.raises(ValueError, match="`segment_length` must be at least 1"):
        adapted.segment_length = 0
    assert (adapted.cache_window, adapted.segment_length) == (WINDOW, None)


def test_a_live_value_that_the_model_cannot_have():
    base = make_base("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    model = make_pte(base=base, cache_window=None)
    with pytest.raises(NotImplementedError, match="`cache_window` cannot bound a model with rope_type='dynamic'"):
        model.peft_config["default"].cache_window = WINDOW
    assert model.peft_config["default"].cache_window is None


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_window": 12},
        {"evict_ratio": 0.5},
        {"eviction": "key_diff"},
        {"segment_length": 2},
        {"recompute_layers": False},
        {"offload": True},
        {"backprop_through_cache": False},
    ],
    ids=str,
)
def test_live_values_act(fields):
    model = make_pte()
    for name, value in fields.items():
        setattr(model.peft_config["default"], name, value)
    fresh = make_pte(**fields)
    for adapted in (model, fresh):
        adapted.gradient_checkpointing_enable()
        adapted.train()
    batch = roll_out(fresh, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    losses = []
    for adapted in (model, fresh):
        adapted(**batch).loss.backward()
        weight = adapted.base_model.model.model.layers[0].self_attn.thought_encoder.pte_key["default"].weight
        losses.append(weight.grad)
    assert_close(losses[0], losses[1])
    assert set(fields) <= set(LIVE_FIELDS)


def make_injected(how):
    if how == "get_peft_model":
        return make_pte()
    base = make_base("llama")
    base.add_adapter(config(), "default")
    return base


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_the_config_of_a_copied_model(way, how):
    model = make_injected(how)
    twin = way(model)
    assert twin.peft_config["default"] is not model.peft_config["default"]
    for adapted in (model, twin):
        with pytest.raises(ValueError, match="`update_gain` must stay"):
            adapted.peft_config["default"].update_gain = 0.5
        adapted.peft_config["default"].cache_window = 12
    # A copy of the config alone is free.
    free = way(model.peft_config["default"])
    free.update_gain = 0.5
    assert model.peft_config["default"].update_gain == 1.0


def test_one_config_for_several_adapters_and_models():
    shared = config()
    first = make_pte(base=make_base("llama"))
    first.add_adapter("one", shared)
    # As TRL makes its reference adapter.
    first.add_adapter("ref", first.peft_config["one"])
    second = get_peft_model(make_base("llama"), shared)
    with pytest.raises(ValueError, match="`r` must stay 4, got 5"):
        shared.r = 5
    first.delete_adapter("one")
    second.unload()
    with pytest.raises(ValueError, match="`r` must stay 4, got 5"):
        shared.r = 5
    first.delete_adapter("ref")
    # No adapter is left that was built from it.
    shared.r = 5
    third = get_peft_model(make_base("llama"), shared)
    del third
    gc.collect()
    shared.r = 6
