"""A cache can be kept, moved, reordered, repeated and saved; `generate` does all of it."""

import copy

import pytest
import torch

from peft_pte import PTECache
from peft_pte.host.compat import CACHE, FORMER_CACHE
from tests.cases import TWO_FAMILIES
from tests.helpers import POLICIES, SMALL, assert_close, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]


@pytest.fixture(params=POLICIES)
def decoded(request):
    """A model, a rollout, and a cache that holds all of it but the last eight tokens."""
    model = make_pte(eviction=request.param)
    rollout = roll_out(model, make_prompts(), 4 * WINDOW)
    cache = model.base_model.new_cache()
    columns = rollout.input_ids.shape[1] - 8
    prompt = make_prompts()["input_ids"].shape[1]
    with torch.no_grad():
        for part in (slice(0, prompt), slice(prompt, columns)):
            model(
                input_ids=rollout.input_ids[:, part],
                attention_mask=rollout.attention_mask[:, : part.stop],
                past_key_values=cache,
            )
    return model, rollout, cache


def rest(model, rollout, cache, rows=slice(None)):
    """Logits of the last eight tokens, read from ``cache``."""
    with torch.no_grad():
        return model(
            input_ids=rollout.input_ids[rows, -8:], attention_mask=rollout.attention_mask[rows], past_key_values=cache
        ).logits[:, :-1]


def test_kept(decoded):
    model, rollout, cache = decoded
    assert_close(rest(model, rollout, cache), rollout.logits[:, -7:])


def test_copied(decoded):
    model, rollout, cache = decoded
    twin = copy.deepcopy(cache)
    rest(model, rollout, cache)
    assert_close(rest(model, rollout, twin), rollout.logits[:, -7:])


def test_saved(decoded, tmp_path):
    model, rollout, cache = decoded
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert isinstance(loaded, PTECache)
    assert loaded.nbytes == cache.nbytes
    assert_close(rest(model, rollout, loaded), rollout.logits[:, -7:])


def test_moved(decoded):
    model, rollout, cache = decoded
    assert cache.move_to("cpu") is cache
    assert_close(rest(model, rollout, cache), rollout.logits[:, -7:])
    meta = cache.move_to("meta")
    assert all(tensor.is_meta for tensor in meta.state.tensors())
    assert meta.layers[0].keys.is_meta


def test_reordered(decoded):
    model, rollout, cache = decoded
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    assert_close(rest(model, rollout, cache, order), rollout.logits[order, -7:])


def test_selected(decoded):
    model, rollout, cache = decoded
    cache.batch_select_indices(torch.tensor([1]))
    assert_close(rest(model, rollout, cache, [1]), rollout.logits[[1], -7:])


def test_repeated(decoded):
    model, rollout, cache = decoded
    cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1, 2, 2]
    assert_close(rest(model, rollout, cache, rows), rollout.logits[rows, -7:])


def test_reset(decoded):
    model, rollout, cache = decoded
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        logits = model(**make_prompts(), past_key_values=cache).logits[:, -1]
    assert_close(logits, rollout.logits[:, 0])


def test_counts_are_absolute(decoded):
    _, rollout, cache = decoded
    assert cache.get_seq_length() == rollout.input_ids.shape[1] - 8
    assert cache.layers[0].slots <= make_prompts()["input_ids"].shape[1] + WINDOW
    # What a host makes of it is not used: the masks of bounded layers are made chunk by chunk.
    assert cache.get_mask_sizes(1, 0) == (1, 0)
    assert cache.get_max_length() == -1
    assert "evictions=" in repr(cache)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_beam_search_moves_the_state_with_the_rows(family):
    model = make_pte(family)
    prompts = make_prompts()
    with torch.no_grad():
        output = model.generate(
            **prompts,
            num_beams=3,
            max_new_tokens=3 * WINDOW,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        width = prompts["input_ids"].shape[1]
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(output.sequences[:, width:])], dim=1)
        labels = output.sequences.clone()
        labels[:, :width] = -100
        batch = {"input_ids": output.sequences, "attention_mask": mask, "labels": labels}
        log_probs = thought_logits(model, batch).log_softmax(dim=-1)
    # The score of a beam is the mean log-prob of its tokens: the replay agrees only if states followed their beams.
    picked = log_probs.gather(-1, output.sequences[:, width:, None])[..., 0]
    assert_close(picked.mean(dim=1), output.sequences_scores, scale=5)


def test_generation_from_embeddings():
    model = make_pte()
    ids = torch.randint(1, 61, (2, 14))
    embeddings = model.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    from_ids = model.generate(ids, **options)
    from_embeddings = model.generate(inputs_embeds=embeddings, **options)
    assert from_embeddings.past_key_values.prompt_length == 14
    assert_close(torch.stack(from_embeddings.logits), torch.stack(from_ids.logits))


def test_a_reset_cache_knows_nothing_of_its_first_prompt():
    model = make_pte()
    first = model.generate(**make_prompts((4, 4)), max_new_tokens=20, return_dict_in_generate=True, do_sample=False)
    cache = first.past_key_values
    cache.reset()
    prompts = make_prompts((12, 12), seed=5)
    again = model.generate(**prompts, max_new_tokens=20, past_key_values=cache, do_sample=False)
    assert cache.prompt_length == 12
    assert torch.equal(again, model.generate(**prompts, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
@pytest.mark.parametrize("name", sorted({CACHE, FORMER_CACHE}))
def test_a_cache_by_each_name_that_transformers_takes(name, static):
    model, prompts = make_pte(), make_prompts()
    host, mask = model.get_base_model(), prompts["attention_mask"]
    expected = model.generate(**prompts, max_new_tokens=2 * WINDOW, do_sample=False)

    def new():
        return PTECache(model.config, model.peft_config["default"], static=static)

    assert torch.equal(model.generate(**prompts, max_new_tokens=2 * WINDOW, do_sample=False, **{name: new()}), expected)
    # By hand: the causal LM, the backbone, and a step that is prepared as `generate` prepares it.
    called, inner, prepared = new(), new(), new()
    with torch.no_grad():
        for column in range(prompts["input_ids"].shape[1], expected.shape[1]):
            ids = prompts["input_ids"] if called.get_seq_length() == 0 else expected[:, column - 1 : column]
            logits = model(input_ids=ids, attention_mask=mask, **{name: called}).logits[:, -1]
            assert torch.equal(logits.argmax(dim=-1), expected[:, column])
            hidden = host.model(input_ids=ids, attention_mask=mask, **{name: inner}).last_hidden_state[:, -1]
            assert_close(host.lm_head(hidden), logits)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs = host.prepare_inputs_for_generation(
                ids, attention_mask=mask, position_ids=positions, **{name: prepared}
            )
            inputs[name] = inputs.pop(CACHE)
            assert_close(host(**inputs, use_cache=True).logits[:, -1], logits)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert called.evictions == inner.evictions == prepared.evictions > 2
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="`past_key_values` is a PTECache, but no PTE adapter is active"),
    ):
        model(input_ids=ids, **{name: called})


def test_an_assistant_with_a_cache_of_the_users_own():
    from tests.cases import make_base

    model = make_pte()
    ids = make_prompts((6,))["input_ids"]
    cache = model.base_model.new_cache()
    options = {"max_new_tokens": WINDOW - 2, "do_sample": False}
    assisted = model.generate(ids, assistant_model=make_base("llama"), past_key_values=cache, **options)
    assert torch.equal(assisted, model.generate(ids, **options))


def test_positions_as_generate_makes_them():
    model = make_pte()
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW, [3 * WINDOW, 4, 12])
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        assert_close(
            thought_logits(model, batch, position_ids=positions)[mask[:, 6:].bool()],
            thought_logits(model, batch)[mask[:, 6:].bool()],
        )


def test_a_cache_comes_back_whatever_the_padding():
    model = make_pte()
    rollout = roll_out(model, make_prompts(), 3 * WINDOW)
    lengths, padded = (11, 3, WINDOW + 6), (0, 3, 1)
    batch = rollout.truncated(20, lengths)
    batch = {
        name: torch.stack([row.roll(-left) for row, left in zip(part, padded, strict=True)])
        for name, part in batch.items()
    }
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        turn = torch.stack([rollout.input_ids[row, 6 + length : 12 + length] for row, length in enumerate(lengths)])
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)], dim=1)
        logits = model(input_ids=turn, attention_mask=mask, past_key_values=cache).logits
    for row, length in enumerate(lengths):
        assert_close(logits[row, :-1], rollout.logits[row, length + 1 : length + 6])


def test_num_return_sequences():
    model = make_pte()
    torch.manual_seed(4)
    output = model.generate(
        **make_prompts(),
        num_return_sequences=2,
        max_new_tokens=2 * WINDOW,
        do_sample=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    width = make_prompts()["input_ids"].shape[1]
    mask = make_prompts()["attention_mask"].repeat_interleave(2, dim=0)
    mask = torch.cat([mask, torch.ones_like(output.sequences[:, width:])], dim=1)
    labels = output.sequences.clone()
    labels[:, :width] = -100
    with torch.no_grad():
        scored = thought_logits(model, {"input_ids": output.sequences, "attention_mask": mask, "labels": labels})
    assert_close(scored, torch.stack(output.logits, dim=1))


def test_generation_goes_on_from_a_kept_cache():
    model = make_pte()
    ids = make_prompts((6,))["input_ids"]
    whole = model.generate(ids, max_new_tokens=30, do_sample=False)
    first = model.generate(ids, max_new_tokens=17, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences,
        # Or `generate` takes every token that happens to be the padding token for padding.
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=13,
        do_sample=False,
    )
    assert torch.equal(second, whole)


def test_a_cache_given_to_generate_is_used():
    model = make_pte()
    cache = PTECache(model.config, model.peft_config["default"])
    model.generate(**make_prompts(), past_key_values=cache, max_new_tokens=2 * WINDOW, do_sample=False)
    assert cache.evictions > 2


def test_prompt_length_says_where_the_prompt_ends():
    model = make_pte()
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    with torch.no_grad():
        expected = model(**batch).logits
        labels = batch.pop("labels")
        assert_close(model(**batch, prompt_length=6).logits, expected)
        # Without a word about it the whole input is prompt, and nothing is evicted.
        whole = model(**batch).logits
        assert (whole - expected).abs().max() > 1e-2
        model.peft_config["default"].cache_window = None
        real = batch["attention_mask"].bool()
        assert_close(whole[real], model(**batch, labels=labels).logits[real])


@pytest.mark.parametrize("generation", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_statistics(generation):
    from peft_pte.seam import Seam

    model = make_pte()
    seam = Seam.of(model.get_base_model())
    rollout = roll_out(model, make_prompts(), 3 * WINDOW, **generation)
    batch = rollout.truncated(3 * WINDOW, [3 * WINDOW, 2, WINDOW + 1])
    figures = seam.statistics.drain()
    assert figures["evictions_per_sequence"] == 8  # The last token sampled is not written.
    assert figures["state_norm"] == pytest.approx(1.0, abs=1e-5)
    assert figures["cache_bytes"] == rollout.cache.nbytes
    with torch.no_grad():
        model(**batch)
    figures = seam.statistics.drain()
    assert figures["evictions_per_sequence"] == pytest.approx((8 + 0 + 1) / 3)
    assert seam.statistics.drain() == {}


def test_a_state_that_all_rows_share_is_counted_once():
    frozen, progressive = (
        roll_out(make_pte("llama", state_update=update), make_prompts(), 2 * WINDOW).cache
        for update in ("frozen", "progressive")
    )
    layers, rows = len(progressive.layers), len(make_prompts()["input_ids"])
    state = SMALL["num_global_tokens"] * SMALL["r"] * 4
    assert progressive.nbytes - frozen.nbytes == layers * (rows - 1) * state
