"""Law 7: how the work is cut, and who does it, changes no number."""

import pytest
import torch

from tests.cases import FAMILIES, TWO_FAMILIES
from tests.helpers import POLICIES, SMALL, assert_close, gradients, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # Gradients sum over many tokens: in float32 they were off from float64 ones by up to 2.2e-5 of the largest (over the
        # case table), so two of them may differ by twice that.
        assert_close(actual[name] / largest, gradient / largest, scale=5)


@pytest.mark.parametrize("backprop", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, dtype, backprop):
    model = make_pte(family, dtype=dtype, backprop_through_cache=backprop)
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    model.train()
    expected, loss = gradients(model, batch)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    actual, checkpointed_loss = gradients(model, batch)
    assert_close(checkpointed_loss, loss)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize(
    "fields",
    [
        *({"eviction": name} for name in POLICIES[1:]),
        {"cache_window": None},
        {"state_update": "frozen"},
        {"state_address": "value"},
    ],
    ids=str,
)
def test_gradient_checkpointing_of_variants(fields):
    model = make_pte("llama", **fields)
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    model.train()
    expected, _ = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, batch)[0], expected)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_gradient_checkpointing_of_a_partly_adapted_model(family):
    # A layer without adapters below one with: its keys and values need no gradient, but are recomputed all the same.
    model = make_pte(family, layers_to_transform=[2])
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    model.train()
    expected, _ = gradients(model, batch)
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, batch)[0], expected)


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("family", [*TWO_FAMILIES, "gemma3"])
def test_length_of_chunks_and_of_passes(family, piece, eviction):
    model = make_pte(family, eviction=eviction).train()
    batch = roll_out(model.eval(), make_prompts((7, 2, 5)), 3 * WINDOW).truncated(3 * WINDOW)
    expected, loss = gradients(model.train(), batch)
    config = model.peft_config["default"]
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for chunk, segment in ((piece, None), (None, piece), (piece, 5), (100, 100)):
            config.chunk_length, config.segment_length = chunk, segment
            actual, loss_in_pieces = gradients(model, batch)
            assert_close(loss_in_pieces, loss)
            assert_same_gradients(actual, expected)
    with torch.no_grad():
        config.chunk_length, whole = None, thought_logits(model, batch)
        config.chunk_length = piece
        assert_close(thought_logits(model, batch), whole)


@pytest.mark.parametrize(
    ("family", "attention"), [*((name, "eager") for name in FAMILIES), ("llama", "sdpa"), ("gemma3", "sdpa")]
)
def test_length_of_a_segment(family, attention):
    # Several evictions in one pass of the layers, or one; with gradients and without, with completions that end early.
    found = {}
    for length in (1, 2, 6, 8):
        model = make_pte(family, segment_length=length, attn_implementation=attention)
        batch = roll_out(model, make_prompts((7, 2, 5)), 3 * WINDOW + 1).truncated(25, [25, 17, 3])
        with torch.no_grad():
            logits = thought_logits(model, batch)
        real = batch["attention_mask"][:, -logits.shape[1] :].bool()
        found[length] = (*gradients(model.train(), batch), logits[real])
    for length in (1, 6, 8):
        assert_close(found[length][1], found[2][1])
        assert_close(found[length][2], found[2][2])
        assert_same_gradients(found[length][0], found[2][0])


@pytest.mark.parametrize("prompts", [(4, 4, 4), (7, 2, 5)])
@pytest.mark.parametrize("family", [*TWO_FAMILIES, "gemma3"])
def test_as_many_segments_as_another_process(family, prompts, monkeypatch):
    model = make_pte(family)
    batch = roll_out(model, make_prompts(prompts), 3 * WINDOW).truncated(3 * WINDOW, [24, 20, 3])
    expected, loss = gradients(model.train(), batch)
    monkeypatch.setattr("peft_pte.seam.Seam.sharded", lambda seam: True)
    monkeypatch.setattr("peft_pte.passes.run._widest", lambda device, prompt, thoughts: (prompt + 3, thoughts + 9))
    model.gradient_checkpointing_enable()
    actual, loss_of_more = gradients(model, batch)
    assert_close(loss_of_more, loss)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize(
    "fields",
    [{}, *({"eviction": name} for name in POLICIES[2:]), {"backprop_through_cache": False}, {"state_address": "value"}],
    ids=str,
)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize("family", [*TWO_FAMILIES, "gemma3"])
def test_what_is_kept_for_the_backward_pass(family, recompute_layers, offload, fields):
    model = make_pte(family, recompute_layers=recompute_layers, offload=offload, **fields)
    batch = roll_out(model, make_prompts((7, 2, 5)), 3 * WINDOW).truncated(3 * WINDOW)
    expected, loss = gradients(model.train(), batch)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    actual, checkpointed_loss = gradients(model, batch)
    assert_close(checkpointed_loss, loss)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("address", ["value", "key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_micro_batch_or_several(family, address):
    model = make_pte(family, state_address=address)
    batch = roll_out(model, make_prompts((6, 3, 5, 6)), 3 * WINDOW).truncated(3 * WINDOW)
    expected, _ = gradients(model, batch)
    halves = [gradients(model, {name: part[rows] for name, part in batch.items()})[0] for rows in ([0, 1], [2, 3])]
    assert_same_gradients({name: (halves[0][name] + halves[1][name]) / 2 for name in expected}, expected)


@pytest.mark.parametrize(
    "fields",
    [{}, {"state_address": "value"}, {"encoder_attention": "softmax"}, {"encoder_attention": "slots"}],
    ids=str,
)
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_triton_or_reference(family, fields):
    # Under the interpreter where there is no GPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for impl in ("reference", "triton"):
        model = make_pte(family, impl=impl, **fields).to(device)
        prompts = {name: part.to(device) for name, part in make_prompts((3, 2)).items()}
        torch.manual_seed(3)
        ids = torch.randint(1, 60, (2, 2 * WINDOW), device=device)
        ids = torch.cat([prompts["input_ids"], ids], dim=1)
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, 3:])], dim=1)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=device) < 3, -100)
        results[impl] = gradients(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert_close(results["triton"][1], results["reference"][1])
    assert_same_gradients(results["triton"][0], results["reference"][0])


def test_compiled_or_eager():
    model = make_pte("llama", model={"num_hidden_layers": 1})
    batch = roll_out(model, make_prompts(), WINDOW + 4).truncated(WINDOW + 4)
    with torch.no_grad():
        expected = thought_logits(model, batch)
        # The tracer is what could go wrong; the code generator behind it knows nothing of this package.
        assert_close(thought_logits(torch.compile(model, backend="eager"), batch), expected)


def test_interleaved_generations_do_not_mix():
    model = make_pte("llama")
    one, other = make_prompts(seed=1), make_prompts((4, 4, 2), seed=9)
    expected = [roll_out(model, prompts, 3 * WINDOW).logits for prompts in (one, other)]
    tokens = [roll_out(model, prompts, 3 * WINDOW).input_ids for prompts in (one, other)]
    caches, masks, found = [None, None], [one["attention_mask"], other["attention_mask"]], [[], []]
    for step in range(3 * WINDOW):
        for which, prompts in enumerate((one, other)):
            width = prompts["input_ids"].shape[1]
            ids = prompts["input_ids"] if step == 0 else tokens[which][:, width + step - 1, None]
            with torch.no_grad():
                output = model(
                    input_ids=ids, attention_mask=masks[which], past_key_values=caches[which], use_cache=True
                )
            caches[which] = output.past_key_values
            masks[which] = torch.cat([masks[which], masks[which].new_ones(3, 1)], dim=1)
            found[which].append(output.logits[:, -1])
    for logits, wanted in zip(found, expected, strict=True):
        assert_close(torch.stack(logits, dim=1), wanted)
