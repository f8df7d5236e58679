"""What a checkpoint keeps, and where."""

import gc
import weakref

import pytest
import torch

from peft_pte.cache.store import ThoughtLayer
from peft_pte.passes import recompute
from tests.helpers import SMALL, make_prompts, make_pte, roll_out

WINDOW = SMALL["cache_window"]


@pytest.fixture
def parked(monkeypatch):
    """Every tensor that was kept on the CPU."""
    seen = []
    original = recompute._Parked.__init__

    def init(self, values, device):
        seen.append(values)
        original(self, values, device)

    monkeypatch.setattr(recompute._Parked, "__init__", init)
    return seen


def test_views_of_one_storage_are_copied_once(parked):
    offload = recompute.Offload()
    whole = torch.randn(2, 3, 8, 4)
    parts = [whole, whole[:, :, 2:5], whole[:, :, 4:]]
    kept = [offload._pack(part) for part in parts]
    for part, each in zip(parts, kept, strict=True):
        assert torch.equal(recompute._unpack(each), part)
        assert recompute._unpack(each).data_ptr() != part.data_ptr()
    assert len({values.untyped_storage().data_ptr() for values in parked}) == 1


def test_a_storage_in_the_place_of_a_freed_one_is_not_taken_for_it():
    offload = recompute.Offload()
    for value in range(50):
        tensor = torch.full((2, 2, 4, 4), float(value))
        assert torch.equal(recompute._unpack(offload._pack(tensor)), tensor)
        del tensor


def test_small_things_and_weights_stay():
    offload = recompute.Offload()
    for tensor in (torch.ones(3, 3), torch.ones(2, 2, 2, dtype=torch.long), torch.nn.Parameter(torch.ones(2, 2, 2))):
        assert offload._pack(tensor) is tensor


@pytest.mark.parametrize("recompute_layers", [False, True])
def test_offloading_lets_go_of_keys_and_values_that_left_the_window(recompute_layers, parked, monkeypatch):
    model = make_pte("llama", offload=True, recompute_layers=recompute_layers, segment_length=2)
    batch = roll_out(model, make_prompts(), 4 * WINDOW).truncated(4 * WINDOW)
    made = []
    original = ThoughtLayer.update

    def update(self, *args, **kwargs):
        seen = original(self, *args, **kwargs)
        made.append(weakref.ref((self.recent or self.prompt)[-1].keys))
        return seen

    monkeypatch.setattr(ThoughtLayer, "update", update)
    model.train().gradient_checkpointing_enable()
    loss = model(**batch).loss
    gc.collect()
    alive = sum(reference() is not None for reference in made)
    # Nothing is left of the first segments while the graph waits for its backward pass: all are on the CPU.
    assert alive == 0
    assert len(made) > 30
    assert parked
    loss.backward()


def test_without_offloading_they_wait():
    model = make_pte("llama", segment_length=2).train()
    model.gradient_checkpointing_enable()
    batch = roll_out(model.eval(), make_prompts(), 4 * WINDOW).truncated(4 * WINDOW)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.ndim) or tensor, lambda tensor: tensor
    ):
        model.train()(**batch).loss.backward()
    assert kept.count(4) > 0
