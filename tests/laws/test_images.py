"""Models around a text model: images in the prompt, whose tokens see each other, and text alone."""

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from benchmarks.models.tiny import tiny_model
from tests.cases import FULL_AND_SLIDING, PAD
from tests.helpers import SMALL, assert_close, gradients, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]
IMAGE, TOKENS = 59, 4
THOUGHTS = 4 * WINDOW


def make_model(attention="sdpa", **fields):
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
    }
    config = Gemma3Config(
        text_config={**FULL_AND_SLIDING, "query_pre_attn_scalar": 8},
        vision_config=vision,
        image_token_index=IMAGE,
        mm_tokens_per_image=TOKENS,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    config._attn_implementation = config.text_config._attn_implementation = attention
    base = Gemma3ForConditionalGeneration(config).eval()
    base.generation_config.eos_token_id = None
    # Zeros as it is made: images would be nothing.
    torch.nn.init.normal_(base.model.multi_modal_projector.mm_input_projection_weight)
    return make_pte(base=base, **fields)


def make_prompts(images=True):
    """Two prompts, the second one padded, each with an image in its middle."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 57, (2, 11), generator=generator)
    if images:
        ids[:, 4 : 4 + TOKENS] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    prompts = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    return {**prompts, **of_images(ids, generator)} if images else prompts


def of_images(ids, generator):
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "token_type_ids": (ids == IMAGE).long(),
    }


def scoring_batch(rollout, prompts, length):
    batch = rollout.truncated(length)
    if "pixel_values" in prompts:
        more = torch.zeros(2, batch["input_ids"].shape[1] - prompts["input_ids"].shape[1], dtype=torch.long)
        types = torch.cat([prompts["token_type_ids"], more], dim=1)
        batch |= {"pixel_values": prompts["pixel_values"], "token_type_ids": types}
    return batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_scoring_equals_the_rollout(attention, images):
    model, prompts = make_model(attention), make_prompts(images)
    rollout = roll_out(model, prompts, THOUGHTS)
    assert rollout.cache.evictions > 10
    batch = scoring_batch(rollout, prompts, THOUGHTS)
    with torch.no_grad():
        assert_close(thought_logits(model, batch), rollout.logits)
        if images:
            # Another image is another prompt, and tokens of one image see each other.
            other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
            assert (thought_logits(model, other) - rollout.logits).abs().max() > 1e-2
            apart = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
            assert (thought_logits(model, apart) - rollout.logits).abs().max() > 1e-2


def test_the_static_form():
    model, prompts = make_model(), make_prompts()
    rollout = roll_out(model, prompts, THOUGHTS)
    assert_close(roll_out(model, prompts, THOUGHTS, cache_implementation="static").logits, rollout.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_within_the_window_a_fresh_adapter_is_the_base_model(attention):
    model, prompts = make_model(attention, init_weights=True), make_prompts()
    rollout = roll_out(model, prompts, WINDOW)
    batch = scoring_batch(rollout, prompts, WINDOW)
    # As `generate` counts them: the model itself numbers padding too.
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = thought_logits(model, batch)
        with model.disable_adapter():
            assert_close(ours, thought_logits(model, batch))


def test_a_marker_is_found_in_tokens_that_the_model_embeds_itself():
    prompts = make_prompts()
    marker = prompts["input_ids"][0, 9:11].tolist()
    prompts["input_ids"][1, 9:11] = prompts["input_ids"][0, 9:11]
    model = make_model(prompt_end=marker)
    rollout = roll_out(model, prompts, THOUGHTS)
    batch = scoring_batch(rollout, prompts, THOUGHTS)
    width = prompts["input_ids"].shape[1]
    del batch["labels"]
    with torch.no_grad():
        assert_close(model(**batch).logits[:, width - 1 : -1], rollout.logits)


def test_rows_that_end_are_padding_from_there_on():
    prompts = make_prompts()
    model = make_model()
    alone = roll_out(model, prompts, THOUGHTS)
    end = int(alone.input_ids[0, prompts["input_ids"].shape[1] + 12])
    torch.manual_seed(2)
    output = model.generate(
        **prompts,
        max_new_tokens=THOUGHTS,
        do_sample=True,
        eos_token_id=end,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    rows = output.past_key_values.rows
    rows.synchronize()
    written = output.sequences[:, prompts["input_ids"].shape[1] : -1]
    ended = (written == end).int().cumsum(dim=1).bool().sum(dim=1) - (written == end).any(dim=1).int()
    assert int(ended[0]) > 0
    assert torch.equal(rows.unused, ended)


def test_gradients_with_and_without_checkpoints():
    model, prompts = make_model().train(), make_prompts()
    batch = scoring_batch(roll_out(model.eval(), prompts, THOUGHTS), prompts, THOUGHTS)
    expected, loss = gradients(model.train(), batch)
    assert all(part.abs().max() > 0 for part in expected.values())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    actual, checkpointed = gradients(model, batch)
    assert_close(checkpointed, loss)
    largest = max(part.abs().max() for part in expected.values())
    for key, part in expected.items():
        assert_close(actual[key] / largest, part / largest, scale=5)


def test_the_vision_tower_is_left_alone():
    model = make_model()
    adapted = [name for name, _ in model.named_modules() if name.endswith("pte_down.default")]
    assert adapted
    assert all(".language_model.layers." in name for name in adapted)


def test_images_in_prompts_that_end_apart_are_refused():
    model, prompts = make_model(), make_prompts()
    labels = prompts["input_ids"].clone()
    labels[0, :9] = labels[1, :8] = -100
    with pytest.raises(NotImplementedError, match="Tokens that see later ones"):
        model(**prompts, labels=labels)


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_through_the_models_inside(images):
    # As trainers with a fused head call it: the model below the causal LM, which hands on what it was not given.
    prompts = make_prompts(images)
    prompts["input_ids"][1, 9:11] = prompts["input_ids"][0, 9:11]
    model = make_model(prompt_end=prompts["input_ids"][0, 9:11].tolist())
    rollout = roll_out(model, prompts, THOUGHTS)
    batch = scoring_batch(rollout, prompts, THOUGHTS)
    del batch["labels"]
    host = model.get_base_model()
    with torch.no_grad():
        expected = model(**batch).logits
        hidden = host.model(**batch, use_cache=False).last_hidden_state
    real = batch["attention_mask"].bool()
    assert_close(host.lm_head(hidden)[real], expected[real])
    width = prompts["input_ids"].shape[1]
    assert_close(expected[:, width - 1 : -1], rollout.logits)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_padding_that_the_model_around_would_count(kind):
    # Between prompt and thoughts: a model that numbers columns itself must not tell the text model so.
    torch.manual_seed(0)
    model = make_pte(base=tiny_model(kind))
    prompts = {"input_ids": torch.randint(3, 57, (1, 6)), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    rollout = roll_out(model, prompts, THOUGHTS)
    batch = rollout.truncated(THOUGHTS)
    apart = {
        name: torch.cat([part[:, :6], torch.full((1, 3), empty), part[:, 6:]], dim=1)
        for (name, part), empty in zip(batch.items(), (PAD, 0, -100), strict=True)
    }
    with torch.no_grad():
        logits = model(**apart).logits
    assert_close(logits[:, 9:-1], rollout.logits[:, 1:])
