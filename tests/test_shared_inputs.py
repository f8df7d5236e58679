"""Linears that read the same tensor share one product down at one token per row: found, never taken for granted, never stale."""

import copy
import io

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from peft_pte.method.layer import PTELinear
from peft_pte.method.stacks import Stacks
from peft_pte.method.state import Reading, bind
from peft_pte.seam import Seam
from tests.helpers import assert_close, make_prompts, make_pte, roll_out, thought_logits

WINDOW = 8


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PTELinear)}


def downs(model):
    return [parameter for name, parameter in model.named_parameters() if "pte_down" in name]


def seam_of(model):
    return Seam.require(model.get_base_model())


@torch.no_grad()
def decode(model, change=None, tokens=3):
    """Logits of tokens before and after a ``change`` of the model, on one cache."""
    cache = model.base_model.new_cache()
    model(**make_prompts((6, 6)), past_key_values=cache)
    found = []
    for number in range(2 * tokens):
        if number == tokens and change is not None:
            change(model)
        found.append(model(input_ids=torch.full((2, 1), 3 + number), past_key_values=cache).logits)
    return torch.cat(found, dim=1)


@pytest.fixture
def sharing(monkeypatch):
    """Turns sharing off."""

    def off():
        monkeypatch.setattr(Stacks, "of", lambda *args: {})

    return off


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]), ("gpt2", [])],
)
def test_which_read_the_same_is_found(family, expected):
    groups = seam_of(make_pte(family)).groups
    assert len(groups) > 1
    for index, found in groups.items():
        assert [[linear.name.rpartition(".")[2] for linear in group] for group in found] == expected
        assert all(linear.layer_index == index for group in found for linear in group)


def test_only_adapted_linears_share():
    groups = seam_of(make_pte("llama", target_modules=["q_proj", "v_proj", "up_proj"])).groups
    names = [[linear.name.rpartition(".")[2] for linear in group] for group in groups[0]]
    assert names == [["q_proj", "v_proj"]]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"state_address": "value"},
        {"rank_pattern": {"k_proj": 2, "up_proj": 3}},
        {"rank_pattern": {"q_proj": 2}, "state_address": "value"},
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"state_update": "frozen"},
        {"dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_numbers_as_one_by_one_and_as_scored(sharing, fields, dtype):
    model = make_pte("llama", dtype=dtype, **fields)
    found = roll_out(model, make_prompts((6, 3)), 2 * WINDOW)
    assert seam_of(model).stacks._copies
    with torch.no_grad():
        assert_close(found.logits.to(dtype), thought_logits(model, found.truncated(2 * WINDOW)), torch.float32)
    sharing()
    assert_close(found.logits, roll_out(model, make_prompts((6, 3)), 2 * WINDOW).logits)


@pytest.mark.parametrize("training", [False, True])
def test_one_product_for_all_that_share(training):
    model = make_pte("llama")
    model.train(training)
    seam, seen = seam_of(model), []
    original = torch.nn.functional.linear

    def spy(x, weight, *args):
        seen.append(weight.shape[0])
        return original(x, weight, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        decode(model, tokens=1)
    rows = model.peft_config["default"].num_queries
    for rows_of_group in (3 * rows, 2 * rows):
        assert seen.count(rows_of_group) >= 2 * len(seam.sites)


def in_place(model):
    for weight in downs(model):
        weight.mul_(-1.5)


def fused_step(model):
    with torch.enable_grad():
        model(**make_prompts((6, 6)), labels=make_prompts((6, 6))["input_ids"], prompt_length=3).loss.backward()
    decode(model, tokens=1)
    torch.optim.AdamW(downs(model), lr=0.5, fused=True).step()
    model.zero_grad()


def fused_step_on_one_token(model):
    cache = model.base_model.new_cache()
    model(**make_prompts((6, 6)), past_key_values=cache)
    model(input_ids=torch.full((2, 1), 3), past_key_values=cache)
    with torch.enable_grad():
        model(input_ids=torch.full((2, 1), 4), past_key_values=cache).logits.sum().backward()
    torch.optim.AdamW(downs(model), lr=0.5, fused=True).step()
    model.zero_grad()


def step_with_gradients_kept(model):
    for weight in downs(model):
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(downs(model), lr=0.1, fused=True).step()


def other_data(model):
    for weight in downs(model):
        weight.data = weight.data * -1.5


def other_parameters(model):
    for linear in linears(model).values():
        down = linear.pte_down["default"]
        down.weight = torch.nn.Parameter(down.weight * -1.5)


def there_and_back(model):
    for linear in linears(model).values():
        linear.pte_down.to(torch.bfloat16).to(torch.float32)


def loaded(model):
    set_peft_model_state_dict(model, {name: -1.5 * part for name, part in get_peft_model_state_dict(model).items()})


def no_longer_adapted(model):
    for linear in linears(model).values():
        if linear.name.endswith("k_proj"):
            linear.enable_adapters(False)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        fused_step,
        fused_step_on_one_token,
        step_with_gradients_kept,
        other_data,
        other_parameters,
        there_and_back,
        loaded,
        no_longer_adapted,
    ],
    ids=lambda change: change.__name__,
)
def test_no_weight_is_stale(sharing, change):
    model = make_pte("llama")
    twin, same = copy.deepcopy(model), copy.deepcopy(model)
    found = decode(model, change)
    sharing()
    expected = decode(twin, change)
    assert_close(found, expected)
    # And it is a change.
    assert (decode(same) - expected)[:, 3:].abs().max() > 1e-3


def test_inference_tensors_are_read_one_by_one(sharing):
    model = make_pte("llama")
    with torch.inference_mode():
        other_parameters(model)
        found = decode(model, in_place)
    assert not seam_of(model).stacks._copies
    sharing()
    twin = make_pte("llama")
    with torch.no_grad():
        other_parameters(twin)
    assert_close(found, decode(twin, in_place))


def test_another_adapter_has_weights_of_its_own(sharing):
    model = make_pte("llama")
    model.add_adapter("other", model.peft_config["default"])
    first = decode(model)
    model.set_adapter("other")
    other = decode(model)
    model.set_adapter("default")
    assert_close(decode(model), first)
    sharing()
    model.set_adapter("other")
    assert_close(decode(model), other)
    assert (first - other).abs().max() > 1e-3


def test_copies_are_nobody_elses():
    model = make_pte("llama")
    keys, file = set(model.state_dict()), io.BytesIO()
    decode(model)
    seam = seam_of(model)
    assert seam.stacks._copies
    assert set(model.state_dict()) == keys
    assert not seam_of(copy.deepcopy(model)).stacks._copies
    torch.save(seam.stacks, file)
    assert not torch.load(io.BytesIO(file.getvalue()), weights_only=False)._copies
    # A call of several tokens ends them.
    with torch.no_grad():
        model(**make_prompts((6, 6)))
    assert not seam.stacks._copies


def test_who_gets_another_input_reads_that():
    model = make_pte("llama")
    seam = seam_of(model)
    query, key, value = seam.groups[0][0]
    x, other = torch.randn(2, 1, query.in_features), torch.randn(2, 1, query.in_features)
    state = torch.randn(2, 5, 4)
    with torch.no_grad():
        shared = Reading(state, 2, 1, "default", read={}, downs=seam.stacks.of(seam.groups[0], "default"))
        plain = Reading(state, 2, 1, "default")
        order = [(query, x), (key, other), (value, x), (key, x), (query, other), (value, other), (value, other)]
        for linear, given in order:
            with bind(plain):
                expected = linear(given)
            with bind(shared):
                assert_close(linear(given), expected)


def test_autocast_is_as_it_is_one_by_one(sharing):
    model = make_pte("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decode(model)
        sharing()
        assert torch.equal(found, decode(model))


def test_adapters_wider_than_their_base():
    model = make_pte("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "pte_" in name:
            parameter.data = parameter.data.float()
    found = roll_out(model, make_prompts((6, 3)), 2 * WINDOW)
    assert seam_of(model).stacks._copies
    with torch.no_grad():
        expected = thought_logits(model, found.truncated(2 * WINDOW))
    assert_close(found.logits.bfloat16(), expected)
