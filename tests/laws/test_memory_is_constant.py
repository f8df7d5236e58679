"""Law 4: from the first eviction on, the cache holds the same bytes for ever."""

import pytest
import torch

from tests.cases import FAMILIES
from tests.helpers import POLICIES, SMALL, make_prompts, make_pte

WINDOW = SMALL["cache_window"]


def storage_bytes(cache):
    """Bytes of the storages behind everything the cache refers to, views and slack included."""
    storages = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith(("peft_pte", "transformers.cache_utils")):
            visit(vars(value))

    visit(vars(cache))
    return sum(storages.values())


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bytes_do_not_change_after_the_first_eviction(family, eviction):
    model = make_pte(family, eviction=eviction)
    prompts = make_prompts()
    mask, ids, cache = prompts["attention_mask"], prompts["input_ids"], model.base_model.new_cache()
    counted, stored, shapes = [], [], set()
    for _ in range(5 * WINDOW):
        ids = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if cache.evictions:
            counted.append(cache.nbytes)
            # A sliding layer of the model's own is a slice of the tensor it was cut from; it settles in one step.
            stored.append(storage_bytes(cache))
            shapes.add(tuple(layer.slots for _, layer in cache.thought_layers))
    assert cache.evictions > 5
    assert len(set(counted)) == 1
    assert len(set(stored[1:])) == 1
    assert all(slots <= prompts["input_ids"].shape[1] + WINDOW for layers in shapes for slots in layers)


def test_a_longer_generation_holds_no_more():
    model = make_pte("llama")
    short, long = (
        model.generate(**make_prompts(), max_new_tokens=length, return_dict_in_generate=True, do_sample=False)
        for length in (2 * WINDOW, 20 * WINDOW)
    )
    assert short.past_key_values.nbytes == long.past_key_values.nbytes
    assert long.past_key_values.evictions > 9 * short.past_key_values.evictions


@pytest.mark.parametrize("eviction", POLICIES)
@torch.no_grad()
def test_positions_that_are_a_view_do_not_stay_alive(eviction):
    # Whoever decodes by hand counts all columns, and hands out the last of what it counted.
    model = make_pte(eviction=eviction)
    prompts = make_prompts()
    mask, ids, cache = prompts["attention_mask"], prompts["input_ids"], model.base_model.new_cache()
    stored = []
    for _ in range(6 * WINDOW):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        ids = torch.ones(len(mask), 1, dtype=torch.long)
        mask = torch.cat([mask, ids], dim=1)
        stored.append(storage_bytes(cache))
    step = cache.tokens_per_eviction
    assert stored[3 * WINDOW : 3 * WINDOW + step] == stored[5 * WINDOW : 5 * WINDOW + step]
