"""Law 1, any cut: the same tokens give the same log-probs however they reach the model, once a rule on tokens says where thinking starts."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from peft_pte import PTECache
from tests.cases import PAD
from tests.helpers import SMALL, TOLERANCE, assert_close, gradients, make_pte, trainable

WINDOW = SMALL["cache_window"]
MARKER = [58, 60]
PROMPTS = (9, 6)
WIDTH = max(PROMPTS)
THOUGHTS = 4 * WINDOW
FAMILIES = ("llama", "qwen2", "gpt2")
KINDS = ("eager", "static")


def make_text(seed=1):
    """Rows whose prompts hold halves of the marker before it, and whose thoughts hold it again: ids and mask, left-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 57, (len(PROMPTS), WIDTH + THOUGHTS), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(PROMPTS):
        ids[row, WIDTH - length : WIDTH - length + 3] = torch.tensor([60, 58, 58])
        mask[row, : WIDTH - length] = 0
    ids[:, WIDTH - 2 : WIDTH] = torch.tensor(MARKER)
    ids[:, WIDTH + 11 : WIDTH + 13] = torch.tensor(MARKER)
    return ids.masked_fill(mask == 0, PAD), mask


class Force(LogitsProcessor):
    """Lets nothing but the next token of the text be generated."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.ids[:, input_ids.shape[1], None], 0.0)


class Case:
    def __init__(self, family, attention="linear", dtype=torch.float32, **fields):
        fields = {"prompt_end": MARKER, "encoder_attention": attention, **fields}
        self.model = make_pte(family, dtype=dtype, attn_implementation="sdpa", **fields)
        self.ids, self.mask = make_text()
        self.labels = self.ids.clone()
        self.labels[:, :WIDTH] = -100
        # The reference is told by labels and by nothing else.
        rule, self.config.prompt_end = self.config.prompt_end, None
        with torch.no_grad():
            self.expected = self.score(labels=self.labels)
        self.config.prompt_end = rule

    @property
    def config(self):
        return self.model.peft_config["default"]

    def score(self, start=0, **kwargs):
        """Logits that predict the thoughts."""
        logits = self.model(input_ids=self.ids[:, start:], attention_mask=self.mask[:, start:], **kwargs).logits
        return logits[:, WIDTH - start - 1 : -1]

    def generate(self, stop, first=None, **kwargs):
        """Generate the text up to column ``stop`` from its first ``first`` columns: the logits, and the cache."""
        first = WIDTH if first is None else first
        output = self.model.generate(
            input_ids=self.ids[:, :first],
            attention_mask=self.mask[:, :first],
            max_new_tokens=stop - first,
            logits_processor=LogitsProcessorList([Force(self.ids)]),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        assert torch.equal(output.sequences, self.ids[:, :stop])
        return torch.stack(output.logits, dim=1), output.past_key_values

    def feed(self, cache, start, stop):
        with torch.no_grad():
            return self.model(
                input_ids=self.ids[:, start:stop], attention_mask=self.mask[:, :stop], past_key_values=cache
            ).logits

    def new_cache(self, kind):
        return PTECache(self.model.config, self.config, static=kind == "static")


def check(case, logits, first_thought):
    """``logits`` predict the thoughts from ``first_thought`` on, without a gap."""
    expected = case.expected[:, first_thought : first_thought + logits.shape[1]]
    assert expected.shape == logits.shape
    # Logits of a generation come in float32 whatever the model computes in.
    assert_close(logits, expected.to(logits.dtype))


@pytest.fixture(params=[(family, attention) for family in FAMILIES for attention in ("linear", "slots")], ids=str)
def case(request):
    return Case(*request.param)


def test_a_full_cache_gives_something_else(case):
    case.config.cache_window = None
    with torch.no_grad():
        assert (case.score() - case.expected).abs().max() > 1e3 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_one_generate(case, kind):
    logits, cache = case.generate(WIDTH + THOUGHTS, **({"cache_implementation": "static"} if kind == "static" else {}))
    assert cache.static == (kind == "static")
    assert cache.evictions > 8
    check(case, logits, 0)


@pytest.mark.parametrize("cut", [1, WINDOW, 2 * WINDOW + 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_again_on_all_of_it(case, kind, cut):
    # TRL's tool loop, budget forcing: prompt, thoughts and what was appended are the input of another generation.
    static = {"cache_implementation": "static"} if kind == "static" else {}
    _, before = case.generate(WIDTH + THOUGHTS, **static)
    logits, after = case.generate(WIDTH + THOUGHTS, first=WIDTH + cut, **static)
    check(case, logits, cut)
    assert after.nbytes == before.nbytes
    assert after.evictions == before.evictions


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_cache_turn_by_turn(case, kind):
    cache = case.new_cache(kind)
    done = 0
    for cut, appended in ((5, 3), (WINDOW, 1), (2, WINDOW - 1)):
        logits, _ = case.generate(WIDTH + done + cut, first=WIDTH + done, past_key_values=cache)
        check(case, logits, done)
        done += cut + appended
    logits, _ = case.generate(WIDTH + THOUGHTS, first=WIDTH + done, past_key_values=cache)
    check(case, logits, done)


@pytest.mark.parametrize("prefix", [4, WIDTH - 1, WIDTH, WIDTH + WINDOW + 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_copied_for_each_question(case, kind, prefix):
    # The marker lies behind the prefix, across its end, or in it.
    shared = case.new_cache(kind)
    case.feed(shared, 0, prefix)
    first = max(WIDTH, prefix + 1)
    for _ in range(2):
        logits, _ = case.generate(WIDTH + THOUGHTS, first=first, past_key_values=copy.deepcopy(shared))
        check(case, logits, first - WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_from_the_first(case, kind):
    cache = case.new_cache(kind)
    logits = [case.feed(cache, column, column + 1) for column in range(WIDTH + THOUGHTS)]
    check(case, torch.cat(logits, dim=1)[:, WIDTH - 1 : -1], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_prefix_repeated_and_selected(case, kind):
    cache = case.new_cache(kind)
    case.feed(cache, 0, WIDTH - 1)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    logits, _ = case.generate(WIDTH + THOUGHTS, first=WIDTH, past_key_values=cache)
    check(case, logits, 0)


LABELS = {
    "none": lambda labels: None,
    "everywhere": lambda labels: labels,
    "three columns": lambda labels: torch.full_like(labels, -100).index_copy(
        1, torch.tensor([WIDTH + 20, WIDTH + 24, WIDTH + 25]), labels[:, [WIDTH + 20, WIDTH + 24, WIDTH + 25]]
    ),
    "spans": lambda labels: labels.masked_fill((torch.arange(labels.shape[1]) // 7) % 2 == 0, -100),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_whatever_carries_labels(case, name, checkpointing):
    labels = LABELS[name](case.ids.masked_fill(case.mask == 0, -100) if name == "everywhere" else case.labels)
    with torch.no_grad():
        check(case, case.score(labels=labels), 0)
    case.model.train()
    if checkpointing:
        case.model.gradient_checkpointing_enable()
        case.model.enable_input_require_grads()
    logits = case.score(labels=labels)
    check(case, logits.detach(), 0)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable(case.model).values())


def test_gradients_do_not_know_who_carries_labels(case):
    # The same loss, once with labels in the call and once computed outside of it.
    case.model.train()
    with_labels, loss = gradients(
        case.model, {"input_ids": case.ids, "attention_mask": case.mask, "labels": case.labels}
    )
    case.model.zero_grad()
    outside = torch.nn.functional.cross_entropy(case.score().flatten(0, 1), case.ids[:, WIDTH:].flatten())
    outside.backward()
    assert_close(outside.detach(), loss)
    for name, parameter in trainable(case.model).items():
        assert_close(parameter.grad, with_labels[name])


@pytest.mark.parametrize("training", [False, True])
def test_the_backbone_alone(case, training):
    # TRL's fused head calls it so.
    case.model.train(training)
    host = case.model.get_base_model()
    with torch.set_grad_enabled(training):
        hidden = host.base_model(input_ids=case.ids, attention_mask=case.mask, use_cache=False).last_hidden_state
        check(case, host.get_output_embeddings()(hidden)[:, WIDTH - 1 : -1].detach(), 0)


def test_padded_right(case):
    ids, mask = torch.zeros_like(case.ids), torch.zeros_like(case.mask)
    for row, length in enumerate(PROMPTS):
        end = length + THOUGHTS
        ids[row, :end], mask[row, :end] = case.ids[row, WIDTH - length :], 1
    with torch.no_grad():
        logits = case.model(input_ids=ids, attention_mask=mask).logits
    rows = [logits[row, length - 1 : length + THOUGHTS - 1] for row, length in enumerate(PROMPTS)]
    check(case, torch.stack(rows), 0)


def test_a_row_alone_without_a_mask(case):
    with torch.no_grad():
        logits = case.model(input_ids=case.ids[:1, WIDTH - PROMPTS[0] :]).logits
    assert_close(logits[:, PROMPTS[0] - 1 : -1], case.expected[:1])


@pytest.mark.parametrize("length", [WIDTH, torch.tensor([WIDTH, WIDTH]), [WIDTH, WIDTH]], ids=str)
def test_prompt_length_says_the_same(case, length):
    case.config.prompt_end = None
    with torch.no_grad():
        check(case, case.score(prompt_length=length), 0)
    case.model.train()
    check(case, case.score(prompt_length=length).detach(), 0)
    case.model.eval()
    cut = WINDOW + 3
    logits, cache = case.generate(WIDTH + cut, prompt_length=length)
    check(case, logits, 0)
    logits, _ = case.generate(WIDTH + THOUGHTS, first=WIDTH + cut, prompt_length=length)
    check(case, logits, cut)
    logits, _ = case.generate(
        WIDTH + THOUGHTS, first=WIDTH + cut, prompt_length=length, past_key_values=copy.deepcopy(cache)
    )
    check(case, logits, cut)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_length_of_a_cached_prefix(case, kind):
    # The prefix alone showed nothing, so it counts as prompt to its end until a call says more.
    case.config.prompt_end = None
    cache = case.new_cache(kind)
    case.feed(cache, 0, 4)
    logits, _ = case.generate(WIDTH + THOUGHTS, first=WIDTH + 2, past_key_values=cache, prompt_length=WIDTH)
    check(case, logits, 2)


def test_prompt_length_overrides_the_marker(case):
    length = WIDTH + 5
    labels = case.labels.clone()
    labels[:, :length] = -100
    with torch.no_grad():
        told = case.score(prompt_length=length)
        case.config.prompt_end = None
        assert_close(told, case.score(labels=labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_precisions(dtype, kind):
    case = Case("llama", "slots", dtype)
    cache, logits = case.new_cache(kind), []
    for start, stop in (
        (0, 4),
        (4, WIDTH - 1),
        (WIDTH - 1, WIDTH + 3),
        (WIDTH + 3, WIDTH + 20),
        (WIDTH + 20, WIDTH + THOUGHTS),
    ):
        logits.append(case.feed(cache, start, stop))
    logits = torch.cat(logits, dim=1)[:, WIDTH - 1 : -1]
    assert logits.dtype == dtype
    check(case, logits, 0)
    with torch.no_grad():
        check(case, case.score(), 0)


class TestTheFirstTokens:
    """``prompt_end=n``: plain text, the first n real tokens of every row."""

    LENGTH = 4

    def reference(self, case, row, prompt):
        """Logits of a row of plain text, told by ``prompt_length``."""
        with torch.no_grad():
            return case.model(input_ids=row, prompt_length=prompt).logits

    @pytest.fixture(params=FAMILIES)
    def case(self, request):
        return Case(request.param, prompt_end=self.LENGTH)

    @pytest.mark.parametrize("given", [1, 3, 4, 5, 4 + 2 * WINDOW])
    @pytest.mark.parametrize("kind", KINDS)
    def test_generation(self, case, kind, given):
        # An input shorter than n: the first tokens that are generated are prompt still.
        case.ids, case.mask = case.ids[:, WIDTH:], case.mask[:, WIDTH:]
        expected = self.reference(case, case.ids, self.LENGTH)
        static = {"cache_implementation": "static"} if kind == "static" else {}
        logits, cache = case.generate(THOUGHTS, first=given, **static)
        assert_close(logits, expected[:, given - 1 : -1])
        assert cache.evictions > 7
        assert cache.prompt_length == self.LENGTH

    @pytest.mark.parametrize("training", [False, True])
    def test_scoring_rows_of_any_padding(self, case, training):
        lengths = (THOUGHTS, 2 * WINDOW + 3, 3)
        columns = max(lengths) + 5
        text = case.ids[0, WIDTH:]
        ids, mask = torch.zeros(3, columns, dtype=torch.long), torch.zeros(3, columns, dtype=torch.long)
        for row, (length, start) in enumerate(zip(lengths, (5, 2, 0), strict=True)):
            ids[row, start : start + length], mask[row, start : start + length] = text[:length], 1
        case.model.train(training)
        with torch.set_grad_enabled(training):
            labels = ids.masked_fill(mask == 0, -100)
            logits = case.model(input_ids=ids, attention_mask=mask, labels=labels).logits.detach()
        case.model.eval()
        for row, (length, start) in enumerate(zip(lengths, (5, 2, 0), strict=True)):
            alone = self.reference(case, text[None, :length], min(self.LENGTH, length))
            assert_close(logits[row, start : start + length], alone[0])
