"""What left when a sequence was written leaves again when it is scored: whatever the policy would choose then."""

from dataclasses import dataclass, replace

import pytest
import torch

from peft_pte import EvictionPolicy, Evictions, PTEConfig, register_eviction
from peft_pte.eviction.records import EvictionMemory
from peft_pte.seam import Seam
from tests.helpers import POLICIES, SMALL, assert_close, gradients, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]
CHOOSING = POLICIES[1:]


@register_eviction("test_moody")
@dataclass(frozen=True)
class Moody(EvictionPolicy):
    """Chooses otherwise every time, as rounding would."""

    def score(self, window):
        return torch.rand(window.positions.shape, dtype=torch.float64)


def rolled_out(model, length=4 * WINDOW, prompts=None, **generation):
    rollout = roll_out(model, prompts or make_prompts(), length, return_evictions=True, **generation)
    return rollout, rollout.cache.evicted


def test_without_the_record_moods_differ():
    model = make_pte(eviction="test_moody")
    rollout, evictions = rolled_out(model)
    batch = rollout.truncated(4 * WINDOW)
    with torch.no_grad():
        assert (thought_logits(model, batch) - rollout.logits).abs().max() > 0.1
        assert_close(thought_logits(model, batch, evictions=evictions), rollout.logits)


@pytest.mark.parametrize("eviction", CHOOSING)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_scored_by_the_record_of_another_policy(family, eviction):
    # What was recorded leaves, and not what the policy that scores would give up.
    model = make_pte(family, dtype=torch.float64, eviction=eviction)
    rollout, evictions = rolled_out(model, prompts=make_prompts((5, 5, 5)))
    batch = rollout.truncated(4 * WINDOW)
    config = model.peft_config["default"]
    if eviction != "head_budget":
        config.eviction_options = {}
        config.eviction = "test_moody"
    with torch.no_grad():
        assert_close(thought_logits(model, batch, evictions=evictions).float(), rollout.logits)
    other = evictions.rows([0, 0, 2])
    # Random choices are those of positions, which are the same in all rows here.
    if eviction != "random":
        with torch.no_grad():
            assert (thought_logits(model, batch, evictions=other)[1].float() - rollout.logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eviction", ["key_diff", "attention", "head_budget"])
def test_half_precision(eviction, dtype):
    with pytest.warns(UserWarning, match="rounding can make it choose differently.*RecordedEvictions"):
        model = make_pte(dtype=dtype, eviction=eviction)
    for seed in range(3):
        rollout, evictions = rolled_out(model, prompts=make_prompts(seed=seed))
        batch = rollout.truncated(4 * WINDOW)
        with torch.no_grad():
            scored = thought_logits(model, batch, evictions=evictions)
        assert_close(scored.float(), rollout.logits, dtype, scale=2.0)


def test_exact_policies_are_not_warned_of(recwarn):
    make_pte(dtype=torch.bfloat16, eviction="random")
    assert not [warning for warning in recwarn if "rounding can make it" in str(warning.message)]


@pytest.mark.parametrize("eviction", ["test_moody", "head_budget"])
def test_gradients_chunks_and_checkpoints(eviction):
    model = make_pte(eviction=eviction)
    rollout, evictions = rolled_out(model)
    batch = {**rollout.truncated(4 * WINDOW), "evictions": evictions}
    expected, loss = gradients(model.train(), batch)
    model.gradient_checkpointing_enable()
    model.peft_config["default"].segment_length = 5
    actual, checkpointed = gradients(model, batch)
    assert_close(checkpointed, loss)
    for name, part in expected.items():
        assert_close(actual[name], part, scale=10.0)


@pytest.mark.parametrize("lengths", [[4 * WINDOW, 9, 3 * WINDOW], [WINDOW, 4 * WINDOW, 2]])
def test_rows_that_end_early_and_are_moved(lengths):
    model = make_pte(eviction="test_moody")
    rollout, evictions = rolled_out(model)
    batch = rollout.truncated(4 * WINDOW, lengths)
    # Padded on the right in front of the thoughts: rows are laid side by side again.
    with torch.no_grad():
        scored = thought_logits(model, batch, evictions=evictions)
        order = [2, 0, 1]
        shuffled = {name: part[order] for name, part in batch.items()}
        again = thought_logits(model, shuffled, evictions=evictions.rows(order))
    for row, length in enumerate(lengths):
        assert_close(scored[row, :length], rollout.logits[row, :length])
        assert_close(again[order.index(row), :length], rollout.logits[row, :length])


def test_rows_in_any_phase():
    # Rows evict at different steps of one `generate`, and some end before others.
    model = make_pte(eviction="test_moody", prompt_end=[58, 60])
    ids = make_prompts((17, 17, 17, 17))["input_ids"] % 57 + 1
    for row, column in enumerate((15, 2, 9, 6)):
        ids[row, column : column + 2] = torch.tensor([58, 60])
    settings = {"max_new_tokens": 6 * WINDOW, "do_sample": True, "eos_token_id": 7, "pad_token_id": 0}
    torch.manual_seed(3)
    output = model.generate(ids, **settings, return_dict_in_generate=True, return_evictions=True, output_logits=True)
    logits = torch.stack(output.logits, dim=1)
    assert len(set(output.evictions.counts.tolist())) > 1
    for row in range(4):
        tokens = output.sequences[row : row + 1]
        real = (tokens == 7).cumsum(dim=1) - (tokens == 7).long() == 0
        count = int(real[0, 17:].sum())
        with torch.no_grad():
            scored = model(tokens[:, : 17 + count], evictions=output.evictions.rows([row])).logits
        assert_close(scored[0, 16:-1], logits[row, :count])


def test_several_answers():
    model = make_pte(eviction="test_moody")
    prompts = make_prompts((4, 4))
    torch.manual_seed(0)
    output = model.generate(
        **prompts,
        num_return_sequences=3,
        do_sample=True,
        max_new_tokens=3 * WINDOW,
        output_logits=True,
        return_dict_in_generate=True,
        return_evictions=True,
    )
    with torch.no_grad():
        scored = model(output.sequences, prompt_length=4, evictions=output.evictions).logits[:, 3:-1]
    assert_close(scored, torch.stack(output.logits, dim=1))


def test_beams_are_put_together_from_rows_that_are_gone():
    model = make_pte(eviction="key_diff")
    settings = {"num_beams": 3, "max_new_tokens": 3 * WINDOW, "return_dict_in_generate": True}
    with pytest.raises(NotImplementedError, match=r"cannot be had with beam_search.*Use num_beams=1"):
        model.generate(**make_prompts(), **settings, return_evictions=True)
    # Where a trainer remembers, an evaluation by beams is none of its business.
    seam = Seam.require(model.get_base_model())
    seam.memory = EvictionMemory(6)
    model.train()
    model.generate(**make_prompts(), **settings)
    assert len(seam.memory) == 0


@pytest.mark.parametrize("end", [7, 8, 9, 12])
def test_turns_of_rows_that_end_apart(end):
    # What is noted of a row behind its own end is no eviction of its next turn.
    model = make_pte(dtype=torch.float64, eviction="key_diff", prompt_end=4)
    ids = torch.randint(1, 57, (2, 4), generator=torch.Generator().manual_seed(1))
    over = 59
    settings = {
        "prefix_allowed_tokens_fn": lambda row, sofar: (
            [over] if row == 0 and len(sofar) == 3 + end else list(range(1, 57))
        ),
        "eos_token_id": over,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "return_evictions": True,
    }
    cache = model.base_model.new_cache()
    first = model.generate(ids, max_new_tokens=20, past_key_values=cache, **settings)
    assert first.evictions.counts.tolist() == [max(0, (end - 1 - WINDOW) // 2 + 1), 6]
    mask = torch.ones(2, 24 + 3, dtype=torch.long)
    mask[0, 4 + end : 24] = 0
    more = torch.cat([first.sequences, torch.tensor([[3, 4, 5], [6, 7, 8]])], dim=1)
    second = model.generate(more, attention_mask=mask, max_new_tokens=15, past_key_values=cache, **settings)
    rows = [torch.cat([second.sequences[0, : 4 + end], second.sequences[0, 24:]]), second.sequences[1]]
    for row, tokens in enumerate(rows):
        own = model.base_model.new_cache()
        own.record()
        with torch.no_grad():
            expected = model(tokens[None, :-1], past_key_values=own).logits
            scored = model(tokens[None, :-1], evictions=second.evictions.rows([row])).logits
        assert_close(scored, expected)
        assert second.evictions.counts[row] == own.evicted.counts[0]
        for layer, part in own.evicted.layers.items():
            assert torch.equal(
                second.evictions.layers[layer][row, : part.shape[1]].sort(dim=-1).values, part[0].sort(dim=-1).values
            )


def test_calls_with_gradients_note_nothing():
    model = make_pte(eviction="key_diff")
    cache = model.base_model.new_cache()
    cache.record()
    model(torch.arange(1, 25)[None], past_key_values=cache, prompt_length=4)
    with pytest.raises(ValueError, match="calls with gradients note none"):
        _ = cache.evicted
    cache = model.base_model.new_cache()
    cache.record()
    model(torch.arange(1, 4 + WINDOW + 1)[None], past_key_values=cache, prompt_length=4)
    with torch.no_grad():
        for token in (5, 6, 7):
            model(torch.tensor([[token]]), past_key_values=cache)
    assert cache.evicted.counts.tolist() == [2]


def test_replaced_rows_bring_their_records():
    model = make_pte(eviction="key_diff")
    cache = model.base_model.new_cache()
    cache.record()
    with torch.no_grad():
        model(torch.arange(1, 41).view(2, 20), past_key_values=cache, prompt_length=4)
        model.base_model.replace_rows(cache, [1], torch.arange(3, 33)[None], prompt_length=4)
        assert cache.evicted.counts.tolist() == [4, 9]
        other = model.base_model.new_cache()
        model(torch.arange(1, 21)[None], past_key_values=other, prompt_length=4)
        with pytest.raises(ValueError, match="`other` has evicted thoughts without a record"):
            cache.replace_rows([0], other)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_generate_batch(static):
    model = make_pte(dtype=torch.float64, eviction="test_moody")
    generator = torch.Generator().manual_seed(0)
    requests = [torch.randint(1, 57, (n,), generator=generator).tolist() for n in (3, 8, 1, 5, 4, 6, 2)]
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    outputs = model.generate_batch(
        requests,
        continuous_batching_config=ContinuousBatchingConfig(
            max_requests_per_batch=3, return_logprobs=True, seed=1, allow_block_sharing=False
        ),
        max_new_tokens=4 * WINDOW,
        eos_token_id=7,
        do_sample=True,
        top_k=0,
        return_evictions=True,
        **({"cache_implementation": "static"} if static else {}),
    )
    assert max(int(output.evictions.counts) for output in outputs.values()) > 8
    for output in outputs.values():
        start = len(output.prompt_ids)
        ids = torch.tensor([[*output.prompt_ids, *output.generated_tokens]])
        with torch.no_grad():
            logits = model(ids, prompt_length=start, evictions=output.evictions).logits[0, start - 1 : -1]
        scored = logits.log_softmax(dim=-1).gather(-1, ids[0, start:, None])[:, 0]
        assert_close(torch.tensor(output.logprobs, dtype=torch.float64), scored, torch.float32)


def test_a_row_of_nothing_chooses_for_itself():
    model = make_pte(eviction="key_diff")
    rollout, evictions = rolled_out(model)
    batch = rollout.truncated(4 * WINDOW)
    joined = Evictions.join([evictions.rows([0]), None, evictions.rows([2])])
    assert joined.counts.tolist()[1] == 0
    with torch.no_grad():
        assert_close(thought_logits(model, batch, evictions=joined), rollout.logits)


# What cannot be so.


def changed(evictions, change):
    layers = {index: part.clone() for index, part in evictions.layers.items()}
    return replace(evictions, layers=change(layers) or layers)


def twice(layers):
    layers[1][2, 3, 0, 0] = layers[1][2, 1, 0, 1]


def a_hole(layers):
    layers[2][1, 2, 1, 0] = -1


def not_written(layers):
    layers[0][0, 0] += WINDOW + 2


def of_the_prompt(layers):
    layers[0][1, 0, 0, 0] = 0


WRONG = [
    (lambda layers: {0: layers[0]}, r"`evictions` must be of the layers \[0, 1, 2\], got those of \[0\]"),
    (
        lambda layers: {index: part[:2] for index, part in layers.items()},
        "`evictions` must be of 3 rows, got 2. Hand on what `generate` returned for these very sequences, row by row",
    ),
    (
        lambda layers: {index: part[..., :1] for index, part in layers.items()},
        "hold what each head loses at an eviction",
    ),
    (lambda layers: {index: part[:, :, :1] for index, part in layers.items()}, "must be of 2 heads in layer 0, got 1"),
    (
        lambda layers: {index: part[:, :-3] for index, part in layers.items()},
        r"must hold the 12 evictions of the 32 thoughts of row 0, got 9",
    ),
    (twice, "name a thought twice in a head, or one that is not written by then"),
    (a_hole, "hold what each head loses at an eviction"),
    (not_written, "name a thought twice in a head, or one that is not written by then"),
    (of_the_prompt, "name a thought twice in a head, or one that is not written by then"),
]


@pytest.mark.parametrize(("change", "match"), WRONG, ids=[match[:40] for _, match in WRONG])
def test_records_of_something_else(change, match):
    model = make_pte(eviction="key_diff")
    rollout, evictions = rolled_out(model)
    batch = rollout.truncated(4 * WINDOW)
    with pytest.raises(ValueError, match=match), torch.no_grad():
        model(**batch, evictions=changed(evictions, change))


def test_a_record_of_another_window():
    model = make_pte(eviction="key_diff")
    rollout, evictions = rolled_out(model)
    model.peft_config["default"].cache_window = 10
    with pytest.raises(
        ValueError, match="must be those of a window of 10 thoughts of which 2 leave together, got 8 and 2"
    ):
        model(**rollout.truncated(4 * WINDOW), evictions=evictions)
    with pytest.raises(ValueError, match="must be of one window"):
        Evictions.join([evictions, replace(evictions, window=9)])


def test_a_record_is_never_dropped():
    model = make_pte(eviction="key_diff", dtype=torch.float64)
    rollout, evictions = rolled_out(model, prompts=make_prompts((6, 6, 6)))
    ids = rollout.input_ids
    with torch.no_grad():
        # Through the backbone alone, as fused heads call it.
        backbone = model.base_model.model.model
        hidden = backbone(input_ids=ids, prompt_length=6, evictions=evictions.rows([0, 1, 2])).last_hidden_state
        expected = model(ids, prompt_length=6, output_hidden_states=True).hidden_states[-1]
        assert_close(hidden, expected)
        with pytest.raises(TypeError, match=r"must be peft_pte.Evictions.*got str"):
            backbone(input_ids=ids, evictions="nothing")
        with pytest.raises(TypeError, match=r"must be peft_pte.Evictions.*got str"):
            model(ids, evictions="nothing")
        with model.disable_adapter(), pytest.raises(ValueError, match="need an active adapter"):
            model(ids, evictions=evictions)
        cache = model.base_model.new_cache()
        model(ids[:, :10], prompt_length=6, past_key_values=cache)
        for columns in (1, 2):
            with pytest.raises(NotImplementedError, match="cannot be scored on with a cache"):
                model(ids[:, 10 : 10 + columns], past_key_values=cache, evictions=evictions)
        # Nothing but prompts: nothing leaves.
        assert_close(
            model(ids[:, :6], prompt_length=6, evictions=evictions).logits, model(ids[:, :6], prompt_length=6).logits
        )


def test_a_prefix_is_scored_by_the_same_record():
    model = make_pte(eviction="test_moody")
    rollout, evictions = rolled_out(model)
    for length in (3, WINDOW, WINDOW + 1, 2 * WINDOW + 3):
        with torch.no_grad():
            scored = thought_logits(model, rollout.truncated(length), evictions=evictions)
        assert_close(scored, rollout.logits[:, :length])


def test_where_nothing_is_chosen():
    model = make_pte()
    with pytest.raises(
        ValueError, match="`return_evictions` needs an active adapter with a bounded window whose heads choose"
    ):
        model.generate(**make_prompts(), max_new_tokens=3, return_evictions=True, return_dict_in_generate=True)
    other, evictions = rolled_out(make_pte(eviction="random"))
    with pytest.raises(ValueError, match="for a bounded cache whose heads choose what leaves"):
        model(**other.truncated(20), evictions=evictions)
    model = make_pte(eviction="random")
    with pytest.raises(ValueError, match="needs `return_dict_in_generate=True`"):
        model.generate(**make_prompts(), max_new_tokens=3, return_evictions=True)
    with pytest.raises(ValueError, match="Nothing was recorded"):
        _ = other.cache.fork() and make_pte(eviction="random").base_model.new_cache().evicted
    with pytest.raises(NotImplementedError, match="cannot be scored on with a cache"), torch.no_grad():
        model(**other.truncated(20), evictions=evictions, past_key_values=model.base_model.new_cache())
    cache = model.base_model.new_cache()
    with torch.no_grad():
        model(torch.arange(1, 30)[None], past_key_values=cache, prompt_length=2)
    with pytest.raises(ValueError, match="Thoughts have left this cache before"):
        cache.record()


# Found by their tokens.


def test_rows_are_remembered_by_their_tokens():
    model = make_pte(eviction="test_moody", eviction_options={})
    model.generation_config.eos_token_id = 7
    seam = Seam.require(model.get_base_model())
    seam.memory = EvictionMemory(6)
    torch.manual_seed(0)
    # An evaluation is not remembered.
    model.generate(**make_prompts(), max_new_tokens=4 * WINDOW)
    assert len(seam.memory) == 0
    model.train()
    output = model.generate(
        **make_prompts(), max_new_tokens=4 * WINDOW, do_sample=True, output_logits=True, return_dict_in_generate=True
    )
    logits = torch.stack(output.logits, dim=1)
    assert len(seam.memory) == 3
    for row in (2, 0, 1):
        tokens = output.sequences[row]
        thoughts = tokens[6:]
        ends = (thoughts == 7).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(thoughts)
        prompt = tokens[:6][make_prompts()["attention_mask"][row].bool()]
        ids = torch.cat([prompt, thoughts[:count]])[None]
        with torch.no_grad():
            scored = model(ids, prompt_length=len(prompt)).logits[0, len(prompt) - 1 : -1]
        assert_close(scored, logits[row, :count])
    assert (seam.memory.asked, seam.memory.found) == (3, 3)
    with torch.no_grad():
        model(torch.arange(1, 30)[None], prompt_length=2)
    assert (seam.memory.asked, seam.memory.found) == (4, 3)
    # Another adapter, or the same in another window, chooses for itself.
    ids = output.sequences[2:3]
    model.add_adapter("plain", PTEConfig(task_type="CAUSAL_LM", cache_window=WINDOW, r=4))
    model.set_adapter("plain")
    with torch.no_grad():
        model(ids, prompt_length=6)
    assert (seam.memory.asked, seam.memory.found) == (4, 3)
    model.set_adapter("default")
    model.peft_config["default"].cache_window = 12
    with torch.no_grad():
        model(ids, prompt_length=6)
    assert (seam.memory.asked, seam.memory.found) == (4, 3)


def test_the_oldest_rows_are_forgotten():
    memory = EvictionMemory(2)
    record = Evictions({0: torch.arange(6, dtype=torch.int32).view(3, 1, 1, 2)}, WINDOW, 2)
    memory.note("me", [[1, 2], [3], [4, 5]], record)
    assert len(memory) == 2
    assert memory.recall("me", torch.tensor([[1, 2]]), None) is None
    found = memory.recall("me", torch.tensor([[0, 3], [4, 5], [9, 9]]), torch.tensor([[0, 1], [1, 1], [1, 1]]))
    assert found.layers[0][:, 0, 0].tolist() == [[2, 3], [4, 5], [-1, -1]]
    assert memory.recall("you", torch.tensor([[4, 5]]), None) is None
