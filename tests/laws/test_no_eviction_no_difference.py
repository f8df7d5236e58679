"""Law 2: until something is evicted, the bounded cache changes nothing; a fresh adapter changes nothing at all."""

import pytest
import torch

from tests.cases import FAMILIES
from tests.helpers import SMALL, assert_close, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_adapter_on_an_unbounded_cache(family, dtype, length):
    model = make_pte(family, dtype=dtype)
    batch = roll_out(model, make_prompts(), length).truncated(length)
    with torch.no_grad():
        bounded = thought_logits(model, batch)
        model.peft_config["default"].cache_window = None
        assert_close(bounded, thought_logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_model(family, dtype):
    model = make_pte(family, dtype=dtype, init_weights=True)
    batch = roll_out(model, make_prompts(), WINDOW).truncated(WINDOW)
    # Without an adapter nothing gives the base model the positions of a padded batch.
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        adapted = thought_logits(model, batch)
        with model.disable_adapter():
            assert_close(adapted, thought_logits(model, batch, position_ids=positions))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_more_thought_makes_a_difference(family):
    model = make_pte(family)
    rollout = roll_out(model, make_prompts(), WINDOW + 2)
    batch = rollout.truncated(WINDOW + 2)
    with torch.no_grad():
        bounded = thought_logits(model, batch)
        model.peft_config["default"].cache_window = None
        unbounded = thought_logits(model, batch)
    # The logits that predict thought W + 2 are the first to come after the eviction.
    assert_close(bounded[:, : WINDOW + 1], unbounded[:, : WINDOW + 1])
    assert (bounded[:, WINDOW + 1] - unbounded[:, WINDOW + 1]).abs().max() > 1e-3


def test_disabled_adapter_is_the_base_model_on_its_own_cache():
    model = make_pte("llama")
    prompts = make_prompts()
    with model.disable_adapter():
        disabled = model.generate(**prompts, max_new_tokens=3 * WINDOW, do_sample=False)
    base = model.unload()
    assert torch.equal(disabled, base.generate(**prompts, max_new_tokens=3 * WINDOW, do_sample=False))
