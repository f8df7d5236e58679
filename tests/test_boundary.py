"""Where prompts end: the rule against a plain search, and what happens where it has nothing to go by."""

import random
import warnings
from functools import partial

import pytest
import torch

from peft_pte import PTEConfig
from peft_pte.passes.boundary import Columns, PromptSpec, find_prompt_ends
from tests.cases import VOCABULARY, make_base
from tests.helpers import SMALL, assert_close, make_prompts, make_pte, roll_out, trainable

IGNORE = -100
WINDOW = SMALL["cache_window"]
MARKER = [58, 60]


def columns_of(ids, mask=None, seen=0):
    ids = torch.tensor(ids)
    mask = None if mask is None else torch.tensor(mask).bool()
    return Columns(ids, mask, tuple(ids.shape), ids.device, seen)


def shown(labels=None, mask=None, rule=None, **fields):
    rows = labels if labels is not None else fields["shift_labels"]
    fields = {name: torch.tensor(part) if name == "shift_labels" else part for name, part in fields.items()}
    spec = PromptSpec(labels=None if labels is None else torch.tensor(labels), **fields)
    ends = find_prompt_ends(rule, spec, columns_of([[1] * len(row) for row in rows], mask), None)
    return ends.first.tolist(), ends.unseen.tolist()


def test_first_label_starts_the_thoughts():
    assert shown([[IGNORE, IGNORE, 5, 6], [IGNORE, 5, IGNORE, 6]]) == ([2, 1], [False, False])


def test_shifted_labels_start_one_later():
    assert shown(shift_labels=[[IGNORE, 5, 6, IGNORE]]) == ([2], [False])


def test_a_label_on_the_first_token_shows_nothing():
    labels = [[5, 6, 7], [IGNORE, 6, 7], [IGNORE, 6, 7]]
    assert shown(labels, mask=[[1, 1, 1], [0, 1, 1], [1, 1, 1]]) == ([3, 3, 1], [True, True, False])
    # Shifted, a prompt of one token looks like none.
    assert shown(shift_labels=[[6, 7, IGNORE]]) == ([3], [True])


def test_a_row_without_labels_is_prompt_to_its_end():
    labels = [[IGNORE] * 4, [IGNORE, IGNORE, 3, 3]]
    assert shown(labels, mask=[[0, 1, 1, 0], [1, 1, 1, 1]]) == ([3, 2], [False, False])


def test_an_explicit_length_overrides():
    assert shown([[IGNORE, 5, 6]], length=2) == ([2], [False])
    assert shown([[5, 5, 6], [IGNORE, 5, 6]], length=torch.tensor([2, 0]), rule=[1]) == ([2, 0], [False, False])


def test_a_marker_overrides_labels():
    assert shown([[IGNORE, IGNORE, IGNORE, 1]], rule=[1, 1])[0] == [2]


def test_nothing_shown():
    ends = find_prompt_ends(None, PromptSpec(), columns_of([[1, 2], [3, 4]]), None)
    assert ends.first is None
    assert ends.unseen.all()


def plain_search(row, marker):
    """Real tokens of the prompt of a row of real tokens, and whether it ended."""
    for end in range(len(marker), len(row) + 1):
        if row[end - len(marker) : end] == marker:
            return end, True
    return len(row), False


@pytest.mark.parametrize("rule", [[1], [1, 2], [1, 1], [1, 2, 1], [2, 1, 2, 1], 1, 3, 40], ids=str)
def test_the_rule_against_a_plain_search_however_the_columns_are_cut(rule):
    # Three letters, so that markers and halves of them abound; padding anywhere.
    rng = random.Random(0)
    for _ in range(150):
        rows, width = rng.randint(1, 4), rng.randint(1, 14)
        ids = [[rng.randint(0, 2) for _ in range(width)] for _ in range(rows)]
        mask = [[int(rng.random() < 0.8) for _ in range(width)] for _ in range(rows)]
        cuts = sorted(rng.sample(range(1, width), rng.randint(0, min(3, width - 1)))) if width > 1 else []
        before, found = None, [None] * rows
        for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
            part = columns_of([row[start:stop] for row in ids], [row[start:stop] for row in mask], start)
            ends = find_prompt_ends(rule, PromptSpec(), part, before)
            for row in range(rows):
                was_open = before is None or bool(before.rows[row])
                if not was_open:
                    assert ends.first[row] == 0
                elif not ends.open.rows[row]:
                    found[row] = start + int(ends.first[row])
                else:
                    assert ends.first[row] == stop - start
            before = ends.open
        for row in range(rows):
            real = [token for token, kept in zip(ids[row], mask[row], strict=True) if kept]
            place = [column for column, kept in enumerate(mask[row]) if kept]
            prompt, ended = (
                (min(rule, len(real)), len(real) >= rule) if isinstance(rule, int) else plain_search(real, rule)
            )
            assert bool(before.rows[row]) != ended
            if ended:
                # All of the prompt lies before the boundary, and all of the thoughts behind it.
                assert all(column < found[row] for column in place[:prompt])
                assert all(column >= found[row] for column in place[prompt:])


def scoring(length, seed=3, marker=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 57, (2, length), generator=generator)
    if marker:
        ids[:, 2:4] = torch.tensor(MARKER)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NOTHING = {
    "no labels": (None, lambda ids: None, "shows no end of its prompt"),
    "labels from the first token": (None, lambda ids: ids.clone(), "`labels` start with the first token of a row"),
    "no marker": (MARKER, lambda ids: None, r"`prompt_end` \[58, 60\] does not occur in rows \[0, 1\]"),
    "no marker, labels": (MARKER, lambda ids: ids.where(torch.arange(ids.shape[1]) > 3, IGNORE), "does not occur"),
}


@pytest.mark.parametrize("through", ["model", "backbone"])
@pytest.mark.parametrize("name", NOTHING)
class TestNeverInSilence:
    def call(self, model, name, length, through):
        _, make_labels, _ = NOTHING[name]
        batch = scoring(length)
        if through == "backbone":
            # Labels stop at the causal LM.
            return model.get_base_model().base_model(**batch, use_cache=False)
        return model(**batch, labels=make_labels(batch["input_ids"]))

    def text(self, name, through):
        return NOTHING["no labels" if through == "backbone" and NOTHING[name][0] is None else name][2]

    def test_training_beyond_a_window_is_refused(self, name, through):
        model = make_pte(prompt_end=NOTHING[name][0]).train()
        before = {key: part.clone() for key, part in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused = f"This call trains on more than a window of {WINDOW} tokens as if they were prompt.*{self.text(name, through)}"
            with pytest.raises(ValueError, match=refused) as raised:
                self.call(model, name, WINDOW + 1, through)
        for way in (
            "PTEConfig(prompt_end=peft_pte.prompt_end(tokenizer))",
            "prompt_end=4",
            "prompt_length=P",
            "labels=labels",
        ):
            assert way in str(raised.value)
        assert all(torch.equal(before[key], part) for key, part in model.state_dict().items())
        # Nothing was left behind.
        batch = scoring(3 * WINDOW, marker=True)
        model(**batch, prompt_length=4)

    def test_training_within_a_window_warns_once(self, name, through):
        model = make_pte(prompt_end=NOTHING[name][0]).train()
        warned = f"All tokens count as prompt and none is evicted: .*{self.text(name, through)}"
        with pytest.warns(UserWarning, match=warned):
            self.call(model, name, WINDOW, through)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.call(model, name, WINDOW, through)

    def test_scoring_beyond_a_window_warns_once(self, name, through):
        model = make_pte(prompt_end=NOTHING[name][0])
        with torch.no_grad():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.call(model, name, WINDOW, through)
            with pytest.warns(UserWarning, match=self.text(name, through)):
                self.call(model, name, 2 * WINDOW, through)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.call(model, name, 2 * WINDOW, through)
        # In training it is an error all the same.
        with pytest.raises(ValueError, match=self.text(name, through)):
            self.call(model.train(), name, 2 * WINDOW, through)


@pytest.mark.parametrize("fields", [{"cache_window": None}, {"prompt_end": 4}, {"prompt_end": MARKER}], ids=str)
def test_no_false_alarm(fields):
    model = make_pte(**fields)
    batch = scoring(4 * WINDOW, marker=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for training in (False, True):
            model.train(training)
            model(**batch)
            model(**batch, labels=batch["input_ids"])
            # A row without labels, and one that is all padding, take no part.
            labels = batch["input_ids"].clone()
            labels[0], labels[1, :6] = IGNORE, IGNORE
            model(**batch, labels=labels)
            model(batch["input_ids"], batch["attention_mask"].index_fill(0, torch.tensor([0]), 0), labels=labels)
        model.eval().generate(**make_prompts_with_marker((6, 6)), max_new_tokens=2 * WINDOW)
        with model.disable_adapter():
            model.train()(**batch)


def make_prompts_with_marker(lengths=(6, 4, 5)):
    prompts = make_prompts(lengths)
    prompts["input_ids"][:, -2:] = torch.tensor(MARKER)
    return prompts


def test_rows_that_take_no_part_in_the_loss_may_lack_the_marker():
    model = make_pte(prompt_end=MARKER).train()
    batch = scoring(3 * WINDOW, marker=True)
    batch["input_ids"][1, 3] = 1
    labels = batch["input_ids"].clone()
    labels[1] = IGNORE
    model(**batch, labels=labels).loss.backward()
    with pytest.raises(ValueError, match=r"does not occur in rows \[1\]"):
        model(**batch)


def test_generate_refuses_a_prompt_without_its_marker():
    model = make_pte(prompt_end=MARKER)
    prompts = make_prompts_with_marker()
    prompts["input_ids"][1, -1] = 1
    with pytest.raises(ValueError, match=r"without its marker in rows \[1\].*Apply the chat template.*prompt_length="):
        model.generate(**prompts, max_new_tokens=4)
    # One of the ways out.
    model.generate(**prompts, max_new_tokens=4, prompt_length=prompts["input_ids"].shape[1])


def test_nothing_is_lost_where_generate_refuses():
    model = make_pte(prompt_end=MARKER)
    prompts = make_prompts_with_marker((6, 6))
    ids = prompts["input_ids"]
    cache = model.base_model.new_cache()
    with torch.no_grad():
        model(input_ids=ids[:, :3], past_key_values=cache)
    wrong = ids.clone()
    wrong[0, -1] = 1
    with pytest.raises(ValueError, match="without its marker"):
        model.generate(wrong, past_key_values=cache, max_new_tokens=4)
    kept = model.generate(ids, past_key_values=cache, max_new_tokens=3 * WINDOW, do_sample=False)
    assert torch.equal(kept, model.generate(ids, max_new_tokens=3 * WINDOW, do_sample=False))


def test_a_prefill_that_evicts_warns_once():
    model = make_pte(prompt_end=MARKER)
    ids = torch.cat([make_prompts_with_marker((6,))["input_ids"], torch.randint(1, 57, (1, 2 * WINDOW))], dim=1)
    with pytest.warns(UserWarning, match=r"holds 16 tokens after the first marker.*prompt_length=input_ids.shape\[1\]"):
        model.generate(ids, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=2)
    other = make_pte(prompt_end=MARKER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.generate(ids, max_new_tokens=2, prompt_length=ids.shape[1])


@pytest.mark.parametrize(
    ("length", "error", "text"),
    [
        (-1, ValueError, "must be between 0 and 6 columns, got -1"),
        (7, ValueError, "must be between 0 and 6 columns, got 7"),
        ([3, 9], ValueError, r"must be between 0 and 6 columns, got \[3, 9\]"),
        ([1, 2, 3], ValueError, "must be one number, or one for each of 2 rows, got"),
        ([], ValueError, "must be one number, or one for each of 2 rows, got"),
        ([[1, 2]], ValueError, "must be one number, or one for each of 2 rows, got"),
        (2.5, TypeError, "must be an integer or one per row"),
        (True, TypeError, "must be an integer or one per row"),
        ("2", TypeError, "must be an integer or one per row"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["scoring", "training", "generate"])
def test_bad_prompt_lengths(call, length, error, text):
    model = make_pte(prompt_end=4).train(call == "training")
    ids = torch.ones(2, 6, dtype=torch.long)
    run = partial(model.generate, max_new_tokens=2) if call == "generate" else model
    with pytest.raises(error, match=f"`prompt_length` {text}"):
        run(input_ids=ids, prompt_length=length)
    # The next call is not told.
    model(input_ids=ids)


def test_a_prompt_length_that_contradicts_the_cache():
    model = make_pte()
    cache = model.base_model.new_cache()
    ids = model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=6, past_key_values=cache)
    with pytest.raises(ValueError, match="`prompt_length` must be 5 for this cache"):
        model.generate(ids, max_new_tokens=2, past_key_values=cache, prompt_length=4)
    model.generate(ids, max_new_tokens=2, past_key_values=cache, prompt_length=5)


@pytest.mark.parametrize(
    ("prompt_end", "error", "text"),
    [
        ([], ValueError, "must hold at least one token id"),
        ([-3], ValueError, "must be at least 0, got -3"),
        ([1.5], TypeError, "must be an integer"),
        ([True], TypeError, "must be an integer"),
        ("<think>", TypeError, "must be a list of token ids or a number of tokens, got '<think>'"),
        (0, ValueError, "must be at least 1, got 0"),
        (True, TypeError, "must be a list of token ids or a number"),
        (2.0, TypeError, "must be a list of token ids or a number"),
    ],
    ids=str,
)
def test_bad_markers(prompt_end, error, text):
    with pytest.raises(error, match=rf"`prompt_end` {text}.*peft_pte.prompt_end\(tokenizer\)"):
        PTEConfig(prompt_end=prompt_end)


def test_a_marker_outside_the_vocabulary():
    from peft import get_peft_model

    base = make_base("llama")
    with pytest.raises(ValueError, match=rf"`prompt_end` must hold ids below {VOCABULARY}.*got {VOCABULARY}"):
        get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", prompt_end=[3, VOCABULARY], **SMALL))
    assert not hasattr(base, "_pte_seam")


def test_a_marker_is_part_of_the_adapter(tmp_path):
    from peft import PeftModel

    model = make_pte(prompt_end=tuple(MARKER))
    batch = scoring(4 * WINDOW, marker=True)
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert PTEConfig.from_pretrained(tmp_path).prompt_end == MARKER
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path)
    with torch.no_grad():
        assert_close(loaded(**batch).logits, expected)
    # And of what a cache is for.
    cache = model.base_model.new_cache()
    model.peft_config["default"].prompt_end = [1]
    with pytest.raises(ValueError, match="prompt end"):
        model(**batch, past_key_values=cache)


def test_embeddings_have_no_tokens():
    # What the caller shows decides, or what the call says.
    model = make_pte(prompt_end=MARKER)
    batch = scoring(4 * WINDOW)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    labels = batch["input_ids"].clone()
    labels[:, :5] = IGNORE
    with torch.no_grad():
        told = model(**batch, prompt_length=5).logits
        assert_close(model(inputs_embeds=embeds, labels=labels).logits, told)
        assert_close(model(inputs_embeds=embeds, prompt_length=5).logits, told)
        model.peft_config["default"].prompt_end = 5
        assert_close(model(inputs_embeds=embeds).logits, told)
    model.peft_config["default"].prompt_end = MARKER
    with pytest.raises(ValueError, match="shows no end of its prompt"):
        model.train()(inputs_embeds=embeds)


def test_prompt_length_reaches_each_copy_of_a_row():
    model = make_pte()
    ids = make_prompts((9, 9))["input_ids"]
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "return_dict_in_generate": True}
    one = model.generate(ids, prompt_length=[4, 4], **options)
    for copies in ({"num_return_sequences": 2, "num_beams": 2}, {"num_beams": 3}):
        many = model.generate(ids, prompt_length=[4, 4], **{**options, **copies})
        assert many.past_key_values.prompt_length == one.past_key_values.prompt_length == 4


@pytest.mark.parametrize("window", [WINDOW, None])
def test_generation_without_a_cache_uses_it_all_the_same(window):
    # Trainers that checkpoint gradients turn the cache off for their rollouts: the policy is the same, and its states are in the cache.
    from transformers import GenerationConfig

    model = make_pte(cache_window=window)
    prompts = make_prompts()
    expected = model.generate(**prompts, max_new_tokens=3 * WINDOW, do_sample=False)
    for kwargs in (
        {"use_cache": False, "max_new_tokens": 3 * WINDOW, "do_sample": False},
        {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=3 * WINDOW, do_sample=False)},
    ):
        output = model.generate(**prompts, return_dict_in_generate=True, **kwargs)
        assert torch.equal(output.sequences, expected)
        assert (output.past_key_values.evictions > 4) == (window is not None)


def test_an_assistant_proposes_thoughts():
    # Its first candidates come along with the prompt.
    model = make_pte(prompt_end=MARKER)
    ids = make_prompts_with_marker((6,))["input_ids"]
    options = {"max_new_tokens": WINDOW - 2, "do_sample": False}
    assert torch.equal(
        model.generate(ids, assistant_model=make_base("llama"), **options), model.generate(ids, **options)
    )


def test_calls_on_other_threads_and_models_do_not_mix():
    # An adapter of its own rule on each of two models; one generates inside the other's logits processor.
    outer, inner = make_pte(prompt_end=MARKER), make_pte(seed=1)
    prompts = make_prompts_with_marker((6, 6))
    expected = outer.generate(**prompts, max_new_tokens=2 * WINDOW, do_sample=False)

    def meddle(input_ids, scores):
        inner.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
        with torch.no_grad():
            outer(input_ids=input_ids)
        return scores

    meddled = outer.generate(**prompts, max_new_tokens=2 * WINDOW, do_sample=False, logits_processor=[meddle])
    assert torch.equal(meddled, expected)


def test_a_static_cache_takes_no_mask_of_the_callers():
    # It would be taken for the package's own, and a slot overwritten.
    model = make_pte(attn_implementation="sdpa")
    rollout = roll_out(model, make_prompts(), 3, cache_implementation="static")
    cache = rollout.cache
    before = cache.layers[0].keys.clone()
    step = {"input_ids": torch.ones(3, 1, dtype=torch.long), "past_key_values": cache}
    with torch.no_grad(), pytest.raises(NotImplementedError, match="must be a 2D padding mask"):
        model(**step, attention_mask=torch.zeros(3, 1, 1, cache.layers[0].keys.shape[2]))
    assert torch.equal(cache.layers[0].keys, before)
    batch = rollout.truncated(3)
    with torch.no_grad():
        mask = torch.cat([rollout.attention_mask[:, :-1], torch.ones(3, 1, dtype=torch.long)], dim=1)
        step["input_ids"] = rollout.input_ids[:, -1:]
        assert_close(model(**step, attention_mask=mask).logits[:, 0], full_next(model, batch))


def full_next(model, batch):
    return model(**batch).logits[:, -1]


def test_every_parameter_learns_without_a_label():
    model = make_pte(prompt_end=MARKER).train()
    model(**scoring(3 * WINDOW, marker=True)).logits[:, 4:].logsumexp(-1).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trainable(model).items() if "lm_head" not in name)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompts_of_a_cached_prefix_that_end_in_different_columns(family):
    # Right where every layer is bounded; a sliding layer would count the padding between prefix and rest.
    model = make_pte(family, dtype=torch.float64, prompt_end=MARKER)
    ids = torch.randint(1, 57, (2, 29), generator=torch.Generator().manual_seed(3))
    ids[0, 7:9], ids[1, 4:6] = torch.tensor(MARKER), torch.tensor(MARKER)
    mask = torch.ones_like(ids)
    mask[1, 26:] = 0
    cache = model.base_model.new_cache()
    with torch.no_grad():
        model(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
        if family == "gemma3":
            with pytest.raises(NotImplementedError, match="would count the padding"):
                model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
            return
        rest = model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache).logits
        assert_close(rest[1, :23], model(input_ids=ids[1:, :26]).logits[0, 3:])


def test_an_interrupted_call_leaves_no_cache_to_go_on_with():
    model = make_pte()
    ids = torch.randint(1, 57, (2, 30))
    cache = model.base_model.new_cache()
    layer = model.get_base_model().model.layers[1]

    def interrupt(*args):
        raise MemoryError

    with torch.no_grad():
        model(input_ids=ids[:, :20], past_key_values=cache, prompt_length=5)
        hook = layer.register_forward_hook(interrupt)
        with pytest.raises(MemoryError):
            model(input_ids=ids[:, 20:21], past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match="was interrupted, so its layers hold different tokens"):
            model(input_ids=ids[:, 20:21], past_key_values=cache)
        cache.reset()
        model(input_ids=ids, past_key_values=cache, prompt_length=5)


def test_a_mask_without_padding_may_be_left_out_later():
    model = make_pte()
    ids = torch.randint(1, 57, (2, 12))
    cache = model.base_model.new_cache()
    with torch.no_grad():
        model(input_ids=ids[:, :5], attention_mask=torch.ones(2, 5), past_key_values=cache)
        last = model(input_ids=ids[:, 5:], past_key_values=cache).logits
        assert_close(last, model(input_ids=ids, prompt_length=5).logits[:, 5:])
