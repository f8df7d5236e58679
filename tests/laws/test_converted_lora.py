"""A converted LoRA computes what the LoRA computed until something leaves the cache, on a full cache always, and is trained on from there."""

import dataclasses

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from peft_pte import PTEConfig, convert_lora
from peft_pte.host.targets import default_targets
from peft_pte.lora_fields import LACKING, RENAMED
from peft_pte.seam import Seam
from peft_pte.tuner import convert
from tests.cases import FAMILIES, make_base
from tests.helpers import assert_close, make_pte

PROMPT, WINDOW = 4, 8
FIELDS = {"cache_window": WINDOW, "prompt_end": PROMPT}
IDS = torch.randint(1, 57, (2, PROMPT + WINDOW), generator=torch.Generator().manual_seed(3))


def targets_of(family):
    """Every linear that PTE would adapt."""
    model = make_pte(family)
    return default_targets(model.base_model.model, Seam.require(model.base_model.model).found, PTEConfig())


def trained_lora(family="llama", dtype=torch.float64, **fields):
    """A tiny model with a random LoRA, in evaluation mode."""
    torch.manual_seed(0)
    base = make_base(family, attn_implementation="eager" if family in ("gemma2",) else "sdpa").to(dtype)
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    }
    model = get_peft_model(base, LoraConfig(**{**config, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_lora_in_every_family(family, dtype):
    lora = trained_lora(family, dtype, target_modules=sorted(targets_of(family)))
    expected = logits(lora)
    with lora.disable_adapter():
        base = logits(lora)
    converted = convert_lora(lora, encoder_attention="slots", **FIELDS).eval()
    # Both compute the same small number in another order, and these weights are large.
    assert_close(logits(converted), expected, scale=5.0)
    with converted.disable_adapter():
        assert torch.equal(logits(converted), base)
    assert (base - expected).abs().max() > 0.1


VARIANTS = [
    {"encoder_attention": "linear"},
    {"encoder_attention": "softmax"},
    {"encoder_attention": "slots"},
    {"encoder_attention": "slots", "state_address": "value"},
    {"encoder_attention": "slots", "r": 6},
    {"encoder_attention": "linear", "r": 6, "num_global_tokens": 9},
    {"encoder_attention": "softmax", "num_global_tokens": 5, "key_rotation": "kept"},
    {"state_update": "frozen"},
    {"state_update": "off"},
    {"eviction": "key_diff"},
]
LORAS = [
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 6, r"layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"down_proj": 20}},
    {"layers_to_transform": [0, 2]},
    {"modules_to_save": ["lm_head", "norm"]},
    {"target_modules": r".*\.(gate|o)_proj", "lora_dropout": 0.3},
    {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    {"r": 12},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("how", LORAS, ids=str)
def test_equals_the_lora_in_every_form(how, fields, tmp_path):
    if "r" in fields:
        fields = fields | {"r": max(fields["r"], how.get("r", 0) + 1)}
    if "num_global_tokens" in fields:
        fields = fields | {"num_global_tokens": max(fields["num_global_tokens"], fields.get("r", 0), how.get("r", 6))}
    lora = trained_lora(**how)
    expected = logits(lora)
    lora.save_pretrained(tmp_path / "lora")
    converted = convert_lora(lora, **fields, **FIELDS).eval()
    assert_close(logits(converted), expected, scale=10.0)
    torch.manual_seed(0)
    base = make_base("llama", attn_implementation="sdpa").double()
    of_folder = convert_lora(tmp_path / "lora", base, **fields, **FIELDS).eval()
    assert_close(logits(of_folder), expected, scale=10.0)
    with of_folder.disable_adapter():
        assert (logits(of_folder) - expected).abs().max() > 0.1
    converted.save_pretrained(tmp_path / "pte")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make_base("llama", attn_implementation="sdpa").double(), tmp_path / "pte")
    assert_close(logits(loaded.eval()), expected, scale=10.0)


def test_an_unbounded_cache_equals_the_lora_at_any_length():
    lora = trained_lora()
    ids = torch.randint(1, 57, (2, 40))
    expected = logits(lora, ids)
    converted = convert_lora(lora, prompt_end=PROMPT, cache_window=None).eval()
    assert_close(logits(converted, ids), expected, scale=10.0)


@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
def test_all_of_it_learns_and_the_state_is_near_at_first(attention):
    lora = trained_lora(dtype=torch.float32, modules_to_save=["lm_head"])
    ids = torch.randint(1, 57, (2, 40))
    converted = convert_lora(lora, encoder_attention=attention, **FIELDS)
    trained = {name: value for name, value in converted.named_parameters() if value.requires_grad}
    assert any("pte_value" in name for name in trained)
    assert any("lm_head" in name for name in trained)
    converted(ids, labels=ids).loss.backward()
    assert not [name for name, value in trained.items() if value.grad is None or not value.grad.any()]
    # A row of every state says something of its own, also where there are more rows than columns.
    for site in Seam.require(converted.base_model.model).sites.values():
        state = site.attention.thought_encoder.initial_state("default")
        assert state.shape == (32, 4)
        assert torch.linalg.cond(state) < 20
        assert (state.norm(dim=1) > 0.99).all()


def test_the_adapter_keeps_its_name_and_the_model_is_freed_of_the_lora():
    torch.manual_seed(0)
    lora = get_peft_model(make_base("llama"), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="chat")
    converted = convert_lora(lora, **FIELDS)
    assert list(converted.peft_config) == ["chat"]
    assert converted.active_adapter == "chat"
    assert not [name for name, _ in converted.named_modules() if "lora" in name]
    assert converted.peft_config["chat"].dropout == 0.0


def test_a_base_that_the_config_names(tmp_path):
    base = make_base("llama", attn_implementation="sdpa")
    base.save_pretrained(tmp_path / "base")
    lora = get_peft_model(
        type(base).from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    lora.save_pretrained(tmp_path / "lora")
    converted = convert_lora(str(tmp_path / "lora"), **FIELDS).eval()
    assert_close(logits(converted), logits(lora))


@pytest.fixture
def cached_repository(tmp_path, monkeypatch):
    """A hub repository of which two revisions, each with a LoRA in ``best``, were fetched earlier; and the models by revision."""
    base = make_base("llama", attn_implementation="sdpa")
    base.save_pretrained(tmp_path / "base")
    repository = tmp_path / "hub" / "models--someone--lora"
    models = {}
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "v2": "b" * 40}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        models[revision] = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config).eval()
        models[revision].save_pretrained(repository / "snapshots" / commit / "best")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return models


def test_a_repository_of_the_hub_with_a_subfolder_and_revisions(cached_repository):
    for revision, lora in cached_repository.items():
        converted = convert_lora("someone/lora", subfolder="best", revision=revision, **FIELDS).eval()
        assert_close(logits(converted), logits(lora))
    expected, other = (logits(lora) for lora in cached_repository.values())
    assert_close(logits(convert_lora("someone/lora", subfolder="best", **FIELDS).eval()), expected)
    assert (expected - other).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"got 'someone/lora' without 'adapter_config.json'. Give `subfolder`"):
        convert_lora("someone/lora", **FIELDS)
    with pytest.raises(OSError, match="specified revision"):
        convert_lora("someone/lora", subfolder="best", revision="v3", **FIELDS)


def test_a_subfolder_of_a_folder(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path / "checkpoint-2")

    def base():
        torch.manual_seed(0)
        return make_base("llama", attn_implementation="sdpa").double()

    converted = convert_lora(tmp_path, base(), subfolder="checkpoint-2", **FIELDS).eval()
    assert_close(logits(converted), logits(lora), scale=10.0)
    with pytest.raises(ValueError, match=r"`source` must hold a saved adapter.*checkpoint-3"):
        convert_lora(tmp_path, base(), subfolder="checkpoint-3", **FIELDS)
    with pytest.raises(ValueError, match="`revision` must be None where `source` is a folder, got 'main'"):
        convert_lora(tmp_path / "checkpoint-2", base(), revision="main", **FIELDS)
    with pytest.raises(ValueError, match="`subfolder` must be None where `source` is a model"):
        convert_lora(lora, subfolder="checkpoint-2", **FIELDS)


def switch_off_a_layer(lora):
    lora.base_model.model.model.layers[1].self_attn.q_proj.enable_adapters(False)


SWITCHED_OFF = {
    "all": lambda lora: lora.base_model.disable_adapter_layers(),
    "one layer": switch_off_a_layer,
    "a module that was trained in full": lambda lora: lora.base_model.model.lm_head.enable_adapters(False),
    "no adapter active": lambda lora: lora.base_model.set_adapter([]),
}


@pytest.mark.parametrize("what", SWITCHED_OFF)
def test_a_lora_that_is_switched_off(what):
    # The PTE adapter would be on, and compute what the model did not.
    lora = trained_lora(modules_to_save=["lm_head"] if "in full" in what else None)
    on = logits(lora)
    SWITCHED_OFF[what](lora)
    expected = logits(lora)
    assert (on - expected).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"`source` must have its LoRA switched on.*enable_adapter_layers"):
        convert_lora(lora, **FIELDS)
    assert torch.equal(logits(lora), expected)
    lora.base_model.enable_adapter_layers()
    lora.set_adapter("default")
    assert_close(logits(convert_lora(lora, **FIELDS).eval()), on, scale=10.0)


def test_embeddings_that_were_resized(tmp_path):
    lora = trained_lora()
    lora.resize_token_embeddings(70)
    expected = logits(lora)
    lora.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.manual_seed(0)
    base = make_base("llama", attn_implementation="sdpa").double()
    with pytest.raises(ValueError, match=r"resize_token_embeddings"):
        convert_lora(tmp_path, base, **FIELDS)
    torch.manual_seed(0)
    base = make_base("llama", attn_implementation="sdpa").double()
    base.resize_token_embeddings(70)
    with pytest.warns(UserWarning, match="save_embedding_layers=True"):
        converted = convert_lora(tmp_path, base, **FIELDS).eval()
    assert_close(logits(converted), expected, scale=10.0)


def test_every_field_of_lora_is_decided_on():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == (set(dir(PTEConfig())) & fields) | set(convert._CARRIED) | set(RENAMED) | set(LACKING) | {"r"}


@pytest.mark.parametrize(
    ("how", "fields", "message"),
    [
        (
            {"use_dora": True},
            {},
            "The LoRA must not have `use_dora`.*to be converted.*weight per sequence cannot be merged",
        ),
        ({"bias": "all"}, {}, "`bias`.*Biases stay frozen"),
        ({"trainable_token_indices": [1]}, {}, "`trainable_token_indices`"),
        ({"init_lora_weights": "olora"}, {}, "changed its base model.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa"}, {}, "changed its base model"),
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "`target_modules` must not name the output head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "on linear layers alone"),
        ({}, {"r": 2}, "`r` must be at least the LoRA's, 4"),
        ({}, {"num_global_tokens": 3}, "`num_global_tokens` must be at least the largest rank, 4, got 3"),
        ({}, {"num_global_tokens": 0}, "`num_global_tokens` must be at least"),
        ({}, {"target_modules": ["q_proj"]}, "`target_modules` must be left out"),
        ({}, {"lora_alpha": 3}, "`lora_alpha` must be left out"),
        ({"r": 20}, {}, "at most the width of what a layer caches, got 20 on `model.layers.0.self_attn.q_proj`"),
    ],
)
def test_what_cannot_be_converted(how, fields, message):
    lora = trained_lora(dtype=torch.float32, **how)
    with pytest.raises(ValueError, match=message):
        convert_lora(lora, **fields, **FIELDS)


@pytest.mark.parametrize(
    ("how", "fields"),
    [
        ({"r": 20}, {}),
        ({"target_modules": r".*\.(q_proj|lm_head)|lm_head"}, {}),
        ({}, {"eviction": "head_budget", "eviction_options": {"importance": [[1.0, 2.0]]}}),
        ({"modules_to_save": ["lm_head"], "r": 20}, {}),
    ],
    ids=str,
)
def test_after_an_error_the_lora_is_there_still(how, fields):
    lora = trained_lora(dtype=torch.float32, **how)
    expected = logits(lora)
    with pytest.raises((ValueError, NotImplementedError)):
        convert_lora(lora, **fields, **FIELDS)
    assert torch.equal(logits(lora), expected)
    assert not [name for name, _ in lora.named_modules() if "pte" in name or "thought" in name]
    assert any(value.requires_grad for name, value in lora.named_parameters() if "lora_A" in name)


def test_a_base_that_was_given_is_as_it_was_after_an_error(tmp_path):
    lora = trained_lora(r=20)
    lora.save_pretrained(tmp_path)
    base = make_base("llama", attn_implementation="sdpa").double()
    expected = logits(base)
    with pytest.raises(ValueError, match="at most the width"):
        convert_lora(tmp_path, base, **FIELDS)
    assert torch.equal(logits(base), expected)
    assert not [name for name, _ in base.named_modules() if "pte" in name or "thought" in name]


def test_a_lora_of_another_base(tmp_path):
    trained_lora().save_pretrained(tmp_path)
    base = make_base("llama", attn_implementation="sdpa", intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"`model.layers.0.mlp.down_proj` must be of the base model's size.*another base model"
    ):
        convert_lora(tmp_path, base, **FIELDS)


def test_a_base_that_has_an_adapter_keeps_it(tmp_path):
    trained_lora().save_pretrained(tmp_path)
    model = make_pte(dtype=torch.float64, prompt_end=PROMPT)
    expected = logits(model)
    with pytest.raises(ValueError, match="`base` must have no PTE adapter yet"):
        convert_lora(tmp_path, model.base_model.model, **FIELDS)
    assert torch.equal(logits(model), expected)


def test_the_mode_is_kept():
    for training in (True, False):
        assert convert_lora(trained_lora().train(training), **FIELDS).training is training


def test_a_scale_that_was_changed_counts():
    lora = trained_lora()
    for module in lora.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    expected = logits(lora)
    assert_close(logits(convert_lora(lora, **FIELDS).eval()), expected, scale=10.0)


def test_sources_that_are_no_lora(tmp_path):
    base = make_base("llama")
    with pytest.raises(TypeError, match="must be a PeftModel or the folder of a saved LoRA, got LlamaForCausalLM"):
        convert_lora(base)
    with pytest.raises(TypeError, match=r"must hold a LoRA, got .*IA3"):
        convert_lora(get_peft_model(base, IA3Config(target_modules=["k_proj"], feedforward_modules=[])))
    lora = trained_lora()
    with pytest.raises(ValueError, match="`base` must be None where `source` is a model"):
        convert_lora(lora, base)
    lora.merge_adapter()
    with pytest.raises(ValueError, match="must not be merged"):
        convert_lora(lora)
    lora.unmerge_adapter()
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"must have one adapter, got \['default', 'other'\]"):
        convert_lora(lora)
    lora = trained_lora()
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no base model"):
        convert_lora(tmp_path)
    with pytest.raises(ValueError, match="that only one of them has"):
        convert_lora(tmp_path, make_base("llama", num_hidden_layers=2))
