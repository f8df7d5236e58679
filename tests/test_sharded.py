"""What a process runs whose weights are shared with others that score longer sequences: all that they run, and as much as alone."""

import pytest
import torch

from peft_pte.method.encoder import PTEEncoder
from peft_pte.passes import run
from peft_pte.seam import Seam
from tests.cases import make_base
from tests.helpers import POLICIES, SMALL, assert_close, gradients, make_prompts, make_pte, roll_out, trainable

WINDOW = SMALL["cache_window"]
LONGEST = 4 * WINDOW


def count_encodings(model):
    """DeepSpeed compares the order of calls between processes."""
    calls = []
    for module in model.modules():
        if isinstance(module, PTEEncoder):
            module.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize(("thoughts", "backprop"), [(WINDOW - 2, True), (WINDOW - 2, False), (2 * WINDOW + 3, False)])
def test_a_process_encodes_where_others_do_and_its_numbers_stay(eviction, thoughts, backprop, monkeypatch):
    model = make_pte(eviction=eviction, backprop_through_cache=backprop)
    rollout = roll_out(model, make_prompts(), LONGEST)
    model.train()
    calls = count_encodings(model)
    gradients(model, rollout.truncated(LONGEST))
    expected_calls = len(calls)
    batch = rollout.truncated(thoughts)
    expected, loss = gradients(model, batch)
    calls.clear()
    monkeypatch.setattr(Seam, "sharded", lambda seam: True)
    monkeypatch.setattr(run, "_widest", lambda device, prompt, columns: (prompt, LONGEST))
    actual, same = gradients(model, batch)
    assert len(calls) == expected_calls > 0
    assert_close(same, loss)
    largest = max(part.abs().max() for part in expected.values())
    for name, part in expected.items():
        assert_close(actual[name] / largest, part / largest)


def test_weights_that_deepspeed_has_not_fetched_are_refused():
    model = make_pte()
    encoder = next(module for module in model.modules() if isinstance(module, PTEEncoder))
    encoder.pte_global_tokens["default"].weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="The weights of adapter 'default' are partitioned"):
        model.generate(**make_prompts(), max_new_tokens=2)


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_partitioned_weights_are_adapted_as_whole_ones(family):
    base, whole = make_base(family), make_pte(family)
    for weight in base.parameters():
        weight.data, weight.ds_shape = torch.empty(0), weight.shape
    model = make_pte(family, base=base)
    assert model.base_model.left_out() == whole.base_model.left_out()
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(whole).items()}
