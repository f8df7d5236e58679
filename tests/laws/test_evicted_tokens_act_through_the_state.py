"""Law 5: what was evicted is gone, but for what the state says of it."""

import pytest
import torch

from tests.cases import PAD, VOCABULARY
from tests.helpers import POLICIES, SMALL, assert_close, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]
FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "phi3", "olmo2")
ONE_LAYER = {"gpt2": {"n_layer": 1}}


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_slots_out_of_use_are_never_read(family, eviction):
    model = make_pte(family, eviction=eviction)
    prompts = make_prompts()
    rollout = roll_out(model, prompts, 3 * WINDOW)
    width = prompts["input_ids"].shape[1]
    clean, poisoned = [], []
    for logits, poison in ((clean, False), (poisoned, True)):
        cache = model.base_model.new_cache()
        model(**prompts, past_key_values=cache)
        for step in range(width, rollout.input_ids.shape[1]):
            if poison:
                used = cache.rows.visible_slots(cache.layers[0].keys.shape[2])
                for _, layer in cache.thought_layers:
                    for block in (layer.keys, layer.values):
                        # Attention multiplies what it does not see by zero: a number, however large, and not nan.
                        block.masked_fill_(~used[:, None, :, None], 1e3)
            output = model(
                input_ids=rollout.input_ids[:, step : step + 1],
                attention_mask=rollout.attention_mask[:, : step + 1],
                past_key_values=cache,
            )
            logits.append(output.logits)
    assert cache.evictions > 3
    assert torch.equal(torch.cat(clean), torch.cat(poisoned))


def logits_with_other_first_thought(model):
    """Logits after the eviction of the first thoughts, for two sequences that differ in one of those alone."""
    batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
    other = {name: part.clone() for name, part in batch.items()}
    first = make_prompts()["input_ids"].shape[1]
    for name in ("input_ids", "labels"):
        other[name][:, first] = other[name][:, first] % (VOCABULARY - 1) + 1
    assert (other["input_ids"] != PAD).any()
    with torch.no_grad():
        return [thought_logits(model, part)[:, WINDOW + 1 :] for part in (batch, other)]


@pytest.mark.parametrize("address", ["value", "key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_one_layer_an_evicted_token_changes_what_comes_after(family, address):
    model = make_pte(family, model=ONE_LAYER.get(family, {"num_hidden_layers": 1}), state_address=address)
    one, other = logits_with_other_first_thought(model)
    assert (one - other).abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("state_update", ["frozen", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_one_layer_without_updates_it_changes_nothing(family, state_update):
    layers = ONE_LAYER.get(family, {"num_hidden_layers": 1})
    model = make_pte(family, model=layers, state_update=state_update)
    one, other = logits_with_other_first_thought(model)
    assert_close(one, other)


def test_padding_contributes_exactly_zero():
    model = make_pte("llama", dtype=torch.float64)
    encoder = model.base_model.model.model.layers[0].self_attn.thought_encoder
    from peft_pte.method.state import Evicted

    keys, values = torch.randn(2, 2, 2, 3, 8, dtype=torch.float64)
    positions = torch.arange(3).expand(2, 1, 3)
    state = torch.nn.functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
    valid = torch.tensor([[[True, False, True]], [[False, False, False]]])
    with torch.no_grad():
        clean = encoder("default", state, Evicted(keys, values, positions, valid))[:, 0]
        keys[:, :, 1], values[:, :, 1] = torch.nan, torch.nan
        keys[1], values[1] = torch.nan, torch.nan
        dirty = encoder("default", state, Evicted(keys, values, positions, valid))[:, 0]
        kept = encoder(
            "default",
            state[:1],
            Evicted(keys[:1, :, [0, 2]], values[:1, :, [0, 2]], positions[:1, :, [0, 2]], None),
        )[:, 0]
    assert torch.equal(clean, dirty)
    assert_close(dirty[1], state[1])
    assert_close(dirty[:1], kept)
