"""Law 6: the gradient of the segmented replay is the gradient of what it computes.

The gradient of one unsegmented reference computation is compared in ``test_second_opinion.py``.
"""

import pytest
import torch

from tests.cases import TWO_FAMILIES
from tests.helpers import POLICIES, SMALL, assert_close, gradients, make_prompts, make_pte, roll_out, trainable

WINDOW = SMALL["cache_window"]
# Rotary and learned positions, in models that compute in float64 throughout: the RMS norm of Llama and its kin is taken
# in float32, whose rounding drowns a finite difference.
TINY = {
    "gpt_neox": {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 8, "n_head": 2, "n_layer": 2},
}


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("family", TINY)
def test_gradcheck(family, eviction):
    model = make_pte(
        family,
        dtype=torch.float64,
        model=TINY[family],
        eviction=eviction,
        r=2,
        num_global_tokens=2,
        cache_window=4,
        evict_ratio=0.5,
    )
    batch = roll_out(model, make_prompts((3, 2)), 10).truncated(10)
    parameters = trainable(model)
    # One of each kind, in the first and the last layer, keeps the finite differences short.
    names = [
        name
        for name in parameters
        if (".0." in name or ".1." in name)
        and any(
            kind in name for kind in ("global_tokens", "pte_query", "pte_key", "pte_value", "query_key_value", "c_attn")
        )
    ]
    chosen = [parameters[name] for name in names]

    def loss(*values):
        # Not the model's own loss, which rounds logits to float32.
        logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), batch)["logits"]
        return logits[:, -8:].square().mean()

    torch.autograd.gradcheck(loss, chosen, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_every_trained_parameter_gets_a_gradient(family):
    for fields in (
        {},
        {"state_address": "value"},
        {"encoder_attention": "slots"},
        {"num_global_tokens": 0},
        {"state_update": "frozen"},
        {"state_update": "off"},
    ):
        model = make_pte(family, **fields)
        batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
        found, _ = gradients(model, batch)
        assert found
        assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_without_an_eviction_no_parameter_is_left_out():
    # DistributedDataParallel waits for ever for a parameter that is not in the graph.
    model = make_pte("llama", num_global_tokens=0)
    model(**roll_out(model, make_prompts(), 3).truncated(3)).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def embedding_gradients(backprop, eviction="sliding_window"):
    """Gradient of the loss of the last thoughts with respect to every input embedding, and the encoders' gradients."""
    model = make_pte("llama", dtype=torch.float64, backprop_through_cache=backprop, eviction=eviction)
    batch = roll_out(model, make_prompts((4, 4)), 3 * WINDOW).truncated(3 * WINDOW)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    output = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"])
    output.logits[:, -2:].square().sum().backward()
    encoders = {n: p.grad for n, p in trainable(model).items() if "thought_encoder" in n}
    return embeddings.grad.abs().sum(dim=(0, 2)), encoders


@pytest.mark.parametrize("eviction", POLICIES)
def test_detached_keys_and_values_stop_the_gradient_at_an_eviction(eviction):
    exact, _ = embedding_gradients(True, eviction)
    detached, encoders = embedding_gradients(False, eviction)
    # 24 thoughts after 4 prompt tokens: the last segment holds the last two of them.
    assert (exact[4:] > 0).all()
    assert (detached[:-2] == 0).all()
    assert (detached[-2:] > 0).all()
    # The recurrence of the states and the encoders still learn.
    assert all(gradient.abs().max() > 0 for gradient in encoders.values())


def test_detached_recurrence_matches_exact_when_no_key_or_value_is_adapted():
    found = {}
    for backprop in (True, False):
        model = make_pte(
            "llama",
            dtype=torch.float64,
            backprop_through_cache=backprop,
            model={"num_hidden_layers": 1},
            target_modules=["q_proj", "o_proj", "up_proj", "down_proj"],
        )
        batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
        found[backprop], _ = gradients(model, batch)
    # With one layer whose keys and values are the base model's, there is nothing that detaching could cut.
    for name, gradient in found[True].items():
        assert_close(found[False][name], gradient)


def test_a_kept_cache_is_not_written_where_views_of_it_are_saved():
    # The keys of the first layer need no gradient here, and its slots are read by every pass.
    model = make_pte("llama", attn_implementation="sdpa", target_modules=["down_proj"], segment_length=3)
    ids = torch.randint(1, 57, (2, 40))
    found = {}
    for checkpointing in (False, True):
        cache = model.base_model.new_cache()
        with torch.no_grad():
            model.eval()(input_ids=ids[:, :16], prompt_length=4, past_key_values=cache)
        model.train()
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.zero_grad()
        model(input_ids=ids[:, 16:], past_key_values=cache).logits.square().mean().backward()
        found[checkpointing] = {name: part.grad.clone() for name, part in trainable(model).items()}
    for name, part in found[False].items():
        assert_close(found[True][name], part)
