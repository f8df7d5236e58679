"""Law 1: scoring a finished sequence gives the log-probs of the generation that produced it."""

import pytest
import torch

from tests.cases import FAMILIES, TWO_FAMILIES
from tests.helpers import (
    POLICIES,
    SMALL,
    TOLERANCE,
    assert_close,
    log_probs,
    make_prompts,
    make_pte,
    roll_out,
    thought_logits,
)

WINDOW = SMALL["cache_window"]
LENGTHS = {"below": WINDOW - 3, "at": WINDOW, "one above": WINDOW + 1, "far above": 4 * WINDOW}


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_rollout(family, dtype, eviction):
    model = make_pte(family, dtype=dtype, eviction=eviction)
    rollout = roll_out(model, make_prompts(), LENGTHS["far above"])
    assert rollout.cache.evictions > 10
    for length in LENGTHS.values():
        batch = rollout.truncated(length)
        with torch.no_grad():
            scored = thought_logits(model, batch)
        expected = rollout.logits[:, :length]
        # Logits of a generation come in float32 whatever the model computes in.
        assert_close(log_probs(scored, batch).float(), log_probs(expected, batch), torch.float32)
        assert_close(scored.to(expected.dtype), expected)


@pytest.mark.parametrize(("address", "attention"), [("value", "linear"), ("key", "softmax"), ("key", "slots")])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_readings_of_the_state(family, address, attention):
    model = make_pte(family, state_address=address, encoder_attention=attention)
    rollout = roll_out(model, make_prompts(), LENGTHS["far above"])
    for length in LENGTHS.values():
        with torch.no_grad():
            assert_close(thought_logits(model, rollout.truncated(length)), rollout.logits[:, :length])


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_float64_replay_is_exact_to_float64(family):
    model = make_pte(family, dtype=torch.float64)
    prompts = make_prompts()
    rollout = roll_out(model, prompts, 4 * WINDOW)
    # Decode again by hand, since `generate` rounds its logits to float32.
    mask, cache, decoded = prompts["attention_mask"], None, []
    for step in range(4 * WINDOW):
        width = prompts["input_ids"].shape[1]
        ids = prompts["input_ids"] if step == 0 else rollout.input_ids[:, width + step - 1, None]
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        decoded.append(output.logits[:, -1])
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    batch = rollout.truncated(4 * WINDOW)
    with torch.no_grad():
        scored = thought_logits(model, batch)
    assert scored.dtype == torch.float64
    assert_close(scored, torch.stack(decoded, dim=1))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_that_end_early(family, attn_implementation):
    model = make_pte(family, attn_implementation=attn_implementation)
    rollout = roll_out(model, make_prompts(), 3 * WINDOW)
    lengths = [3 * WINDOW, 2, WINDOW + 3]
    batch = rollout.truncated(3 * WINDOW, lengths)
    with torch.no_grad():
        scored = thought_logits(model, batch)
    assert_close(log_probs(scored, batch), log_probs(rollout.logits, batch))


@pytest.mark.parametrize(
    "fields",
    [
        {"state_update": "frozen"},
        {"state_update": "off"},
        {"num_global_tokens": 0},
        {"encoder_attention": "softmax"},
        {"encoder_attention": "slots", "state_address": "value"},
        {"key_rotation": "kept"},
        {"state_address": "value", "num_global_tokens": 3, "rank_pattern": {"q_proj": 2}},
        {"state_address": "value", "state_update": "off", "num_global_tokens": 3},
        {"evict_ratio": 1.0},
        {"evict_ratio": 0.01},
        {"cache_window": 7, "evict_ratio": 0.5},
        {"cache_window": None},
        {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"q_proj": 1.0}},
        {"layers_to_transform": [1]},
        {"use_rslora": True, "alpha": 3.0},
    ],
    ids=str,
)
def test_every_variant_of_the_method(fields):
    model = make_pte("llama", **fields)
    rollout = roll_out(model, make_prompts(), 4 * WINDOW)
    batch = rollout.truncated(4 * WINDOW)
    with torch.no_grad():
        assert_close(thought_logits(model, batch), rollout.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_bases(family, dtype):
    # By slots 2 of GLM's 4,392 logits are 1.4 % of the largest apart in bfloat16.
    attention = "linear" if (family, dtype) == ("glm", torch.bfloat16) else "slots"
    model = make_pte(family, dtype=dtype, encoder_attention=attention)
    rollout = roll_out(model, make_prompts(), 3 * WINDOW)
    batch = rollout.truncated(3 * WINDOW)
    with torch.no_grad():
        scored = thought_logits(model, batch)
    states = [layer.value for layer in rollout.cache.state.layers if layer.value is not None]
    assert states
    assert all(state.dtype == torch.float32 for state in states)
    assert_close(scored.float(), rollout.logits, dtype)


def test_a_full_cache_scores_something_else():
    # What the law is worth: the same tokens on an unbounded cache are off by far more than any tolerance.
    model = make_pte("llama")
    rollout = roll_out(model, make_prompts(), 4 * WINDOW)
    batch = rollout.truncated(4 * WINDOW)
    model.peft_config["default"].cache_window = None
    with torch.no_grad():
        unbounded = thought_logits(model, batch)
    assert (unbounded - rollout.logits).abs().max() > 1e4 * TOLERANCE[torch.float32]


def test_with_gradients_as_without():
    model = make_pte("llama")
    rollout = roll_out(model, make_prompts(), 4 * WINDOW)
    batch = rollout.truncated(4 * WINDOW)
    assert_close(thought_logits(model, batch).detach(), rollout.logits)


@pytest.mark.parametrize("eviction", POLICIES)
def test_tokens_may_come_many_at_a_time(eviction):
    # A conversation: the cache is kept, and the next turn comes in one call.
    model = make_pte("llama", eviction=eviction)
    prompts = make_prompts()
    rollout = roll_out(model, prompts, 3 * WINDOW)
    width = prompts["input_ids"].shape[1]
    cache, logits = model.base_model.new_cache(), []
    for start, stop in ((0, width), (width, width + 3), (width + 3, width + 20), (width + 20, width + 24)):
        with torch.no_grad():
            output = model(
                input_ids=rollout.input_ids[:, start:stop],
                attention_mask=rollout.attention_mask[:, :stop],
                past_key_values=cache,
            )
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1)[:, width - 1 : -1], rollout.logits)
