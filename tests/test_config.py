"""Every wrong value names its field, the requirement, the value and a remedy."""

import pytest

from peft_pte import PTEConfig

WRONG = [
    ({"r": 0}, ValueError, "`r` must be at least 1, got 0"),
    ({"r": 2.5}, TypeError, "`r` must be an integer, got 2.5"),
    ({"cache_window": 2}, ValueError, "`cache_window` must be at least 4, got 2. Use a larger window"),
    ({"cache_window": "big"}, TypeError, "`cache_window` must be an integer, got 'big'"),
    ({"evict_ratio": 0.0}, ValueError, "`evict_ratio` must be above 0 and at most 1, got 0.0"),
    ({"evict_ratio": 1.5}, ValueError, "`evict_ratio` must be above 0 and at most 1, got 1.5"),
    ({"eviction": "random"}, ValueError, "`eviction` must be one of 'sliding_window', 'key_diff', got 'random'"),
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
    ({"rank_pattern": {"q_proj": 0}}, ValueError, "`rank_pattern['q_proj']` must be at least 1, got 0"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values(fields, error, message):
    with pytest.raises(error) as raised:
        PTEConfig(**fields)
    assert str(raised.value).startswith(message)


def test_dropout_warns_that_ratios_will_not_be_one():
    with pytest.warns(UserWarning, match="importance ratios are not 1"):
        PTEConfig(dropout=0.1)


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
