"""Every wrong value names its field, the requirement, the value and a remedy."""

import copy
import dataclasses
import inspect
import json
import pickle
import warnings

import pytest
from peft import LoraConfig, PeftConfig

from peft_pte import PTEConfig
from peft_pte.config import LIVE_FIELDS
from peft_pte.lora_fields import LACKING, RENAMED

WRONG = [
    ({"r": 0}, ValueError, "`r` must be at least 1, got 0"),
    ({"r": 2.5}, TypeError, "`r` must be an integer, got 2.5"),
    ({"cache_window": 2}, ValueError, "`cache_window` must be at least 4, got 2. Use a larger window"),
    ({"cache_window": "big"}, TypeError, "`cache_window` must be an integer, got 'big'"),
    ({"evict_ratio": 0.0}, ValueError, "`evict_ratio` must be above 0 and at most 1, got 0.0"),
    ({"evict_ratio": 1.5}, ValueError, "`evict_ratio` must be above 0 and at most 1, got 1.5"),
    ({"eviction": "oldest"}, ValueError, "`eviction` must be one of 'sliding_window', 'random', 'key_diff'"),
    ({"num_global_tokens": -1}, ValueError, "`num_global_tokens` must be at least 0, got -1"),
    ({"encoder_attention": "flash"}, ValueError, "`encoder_attention` must be one of 'linear', 'softmax', 'slots'"),
    ({"update_gain": 0.0}, ValueError, "`update_gain` must be a positive number, got 0.0"),
    ({"update_gain": float("nan")}, ValueError, "`update_gain` must be a positive number"),
    ({"state_update": "none"}, ValueError, "`state_update` must be one of 'progressive', 'frozen', 'off'"),
    ({"state_update": "off", "num_global_tokens": 0}, ValueError, "`num_global_tokens` must be at least 1 with"),
    ({"key_rotation": "both"}, ValueError, "`key_rotation` must be one of 'removed', 'kept'"),
    ({"state_address": "query"}, ValueError, "`state_address` must be one of 'key', 'value'"),
    ({"impl": "cuda"}, ValueError, "`impl` must be one of 'auto', 'reference', 'triton'"),
    ({"alpha": -1.0}, ValueError, "`alpha` must be a positive number or None"),
    ({"dropout": 1.0}, ValueError, "`dropout` must be at least 0 and below 1, got 1.0"),
    ({"target_modules": ["q_proj", "lm_head"]}, ValueError, "`target_modules` must not name the output head"),
    ({"target_modules": ".*", "layers_to_transform": [1]}, ValueError, "`layers_to_transform` must be None when"),
    ({"layers_pattern": "layers"}, ValueError, "`layers_pattern` needs `layers_to_transform`"),
    ({"evict_ratio": "half"}, TypeError, "`evict_ratio` must be a number, got 'half'"),
    ({"alpha": "16"}, TypeError, "`alpha` must be a number, got '16'"),
    ({"offload": "cpu"}, TypeError, "`offload` must be True or False, got 'cpu'"),
    # LoRA's init_lora_weights takes names.
    ({"init_weights": "gaussian"}, TypeError, "`init_weights` must be True or False, got 'gaussian'"),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, "`rank_pattern['q_proj']` must be at least 1, got 0"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values(fields, error, message):
    with pytest.raises(error) as raised:
        PTEConfig(**fields)
    assert str(raised.value).startswith(message)


def test_dropout_warns_that_ratios_will_not_be_one():
    with pytest.warns(UserWarning, match="importance ratios are not 1") as warned:
        PTEConfig(dropout=0.1)
    assert warned[0].filename == __file__
    config = PTEConfig()
    with pytest.warns(UserWarning, match="importance ratios are not 1") as warned:
        config.dropout = 0.1
    assert warned[0].filename == __file__


def test_defaults_are_the_papers():
    config = PTEConfig()
    assert (config.r, config.num_global_tokens, config.evict_ratio) == (32, 32, 0.25)
    assert config.scale(config.r) == 2.0
    assert config.tokens_per_eviction == config.cache_window // 4


@pytest.mark.parametrize(
    ("window", "ratio", "expected"), [(8, 0.25, 2), (8, 0.01, 1), (7, 0.5, 3), (5, 1.0, 5), (1024, 0.25, 256)]
)
def test_tokens_per_eviction(window, ratio, expected):
    assert PTEConfig(cache_window=window, evict_ratio=ratio).tokens_per_eviction == expected


def test_scale():
    assert PTEConfig(r=16).scale(16) == 2.0
    assert PTEConfig(r=16).scale(4) == 2.0
    assert PTEConfig(r=16, alpha=8.0).scale(4) == 2.0
    assert PTEConfig(r=16, alpha=8.0, use_rslora=True).scale(16) == 2.0
    assert PTEConfig(r=16).scale(4, alpha=1.0) == 0.25


def names_of(config_class):
    return {field.name for field in dataclasses.fields(config_class)}


def test_every_field_of_lora_is_known_or_explained():
    assert names_of(LoraConfig) - names_of(PTEConfig) == RENAMED.keys() | LACKING.keys()
    assert set(RENAMED.values()) <= names_of(PTEConfig)
    assert not (RENAMED.keys() | LACKING.keys()) & names_of(PTEConfig)


@pytest.mark.parametrize(("name", "ours"), RENAMED.items(), ids=str)
def test_names_that_lora_spells_otherwise(name, ours):
    with pytest.raises(TypeError, match=f"`{name}` must be given as `{ours}`, got .*16.* Use {ours}=16"):
        PTEConfig(**{name: 16})


@pytest.mark.parametrize("name", LACKING)
def test_fields_of_lora_that_are_lacking(name):
    with pytest.raises(TypeError, match=f"`{name}` must be left out, got .*'x'.*PTE lacks it. [A-Z].*") as raised:
        PTEConfig(**{name: "x"})
    assert LACKING[name] in str(raised.value)


def test_biases_stay_frozen():
    with pytest.raises(TypeError, match=r"Biases stay frozen.*modules_to_save"):
        PTEConfig(bias="none")


@pytest.mark.parametrize("name", ["lora_alpha", "trainable_token_indices"])
def test_fields_of_lora_as_attributes(name):
    # TRL reads `peft_config.trainable_token_indices` where a chat template adds tokens.
    config = PTEConfig()
    reason = (
        "must be read and set as `alpha` in"
        if name == "lora_alpha"
        else "is a field of LoRA that PTE lacks.*modules_to_save"
    )
    with pytest.raises(AttributeError, match=reason):
        getattr(config, name)
    with pytest.raises(AttributeError, match=reason):
        setattr(config, name, 3)
    assert not hasattr(config, name)
    assert getattr(config, "bias", "none") == "none"
    with pytest.raises(AttributeError, match="'PTEConfig' object has no attribute 'windw'"):
        config.windw  # noqa: B018


def test_the_constructor_looks_as_it_did():
    parameters = inspect.signature(PTEConfig).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(PTEConfig) if field.init]
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'"):
        PTEConfig(windw=3)
    assert PTEConfig(r=3, cache_window=12) == PTEConfig(cache_window=12, r=3)


@pytest.mark.parametrize("unknown", ["thought_speed", "use_dora"])
def test_a_file_of_a_newer_version(unknown, tmp_path):
    PTEConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), unknown: 2}))
    for config_class in (PTEConfig, PeftConfig):
        with pytest.warns(UserWarning, match=f"Unexpected keyword arguments .*{unknown}"):
            assert config_class.from_pretrained(tmp_path).r == 3


WAYS_TO_COPY = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "replace": dataclasses.replace,
    "to_dict": lambda config: PeftConfig.from_peft_type(**config.to_dict()),
}


@pytest.mark.parametrize("way", WAYS_TO_COPY)
def test_copies(way):
    config = PTEConfig(r=3, target_modules=["q_proj"], cache_window=12)
    twin = WAYS_TO_COPY[way](config)
    assert twin == config
    twin.r = 5
    assert config.r == 3
    with pytest.raises(ValueError, match="`r` must be at least 1"):
        twin.r = 0


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_set_later(fields, error, message):
    # What makes the last one wrong is set first.
    *others, (name, value) = reversed(fields.items())
    config = PTEConfig(**dict(others))
    before = getattr(config, name)
    with pytest.raises(error) as raised:
        setattr(config, name, value)
    assert str(raised.value).startswith(message)
    assert getattr(config, name) == before


def test_values_set_later_are_checked_together():
    config = PTEConfig(cache_window=16, segment_length=8)
    with pytest.raises(ValueError, match="`segment_length` needs a bounded cache"):
        config.cache_window = None
    config.segment_length, config.chunk_length = None, 4
    with pytest.raises(ValueError, match="`chunk_length` needs a bounded cache"):
        config.cache_window = None
    config.eviction = "key_diff"
    config.target_modules = ["q_proj"]
    assert config.target_modules == {"q_proj"}


def test_the_fields_that_act_on_what_exists():
    # All others are refused there (tests/test_refusals.py).
    assert set(LIVE_FIELDS) < names_of(PTEConfig) - names_of(PeftConfig)


def test_a_fresh_config_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PTEConfig(target_modules=["q_proj"], alpha=3, evict_ratio=1)


def test_the_paper_s_preset():
    config = PTEConfig.paper(task_type="CAUSAL_LM", cache_window=768)
    assert (config.r, config.num_global_tokens, config.evict_ratio, config.cache_window) == (32, 32, 0.25, 768)
    assert (config.encoder_attention, config.state_update, config.eviction) == (
        "linear",
        "progressive",
        "sliding_window",
    )
    assert PTEConfig.paper(state_update="frozen", r=8).state_update == "frozen"
    with pytest.raises(ValueError, match="`cache_window` must be"):
        PTEConfig.paper(cache_window=1)
    with pytest.raises(TypeError, match="lora_alpha"):
        PTEConfig.paper(lora_alpha=3)
