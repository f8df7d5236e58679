"""Law 3: each row has its own clock. A row that starts, pauses, ends, turns and is replaced among others equals the same row alone."""

import copy
import functools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from peft_pte import PTECache
from tests.cases import PAD
from tests.helpers import POLICIES, SMALL, assert_close, make_pte

WINDOW = SMALL["cache_window"]
ROWS = 3
TEXT = 12 * WINDOW
"""Tokens of a row, of which a history uses some."""


def make_texts(seed=3, rows=ROWS):
    return torch.randint(1, 57, (rows, TEXT), generator=torch.Generator().manual_seed(seed))


@functools.cache
def alone(model, text, prompt):
    """Logits of a text by itself; asked again by many histories of one model, which stays as it is."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([text]), prompt_length=prompt).logits[0]


@dataclass
class Batch:
    """Rows that are fed together, and what they were told alone."""

    model: object
    prompts: tuple
    static: bool = False
    texts: torch.Tensor = field(default_factory=make_texts)
    rounded_to: torch.dtype = None
    """What the model computes in somewhere, whatever its dtype."""

    def __post_init__(self):
        if self.static and self.model.peft_config["default"].eviction == "head_budget":
            pytest.skip("heads of different lengths have no form at fixed addresses")
        self.cache = PTECache(self.model.config, self.model.peft_config["default"], static=self.static)
        self.fed = [0] * len(self.prompts)
        self.mask = torch.zeros(len(self.prompts), 0, dtype=torch.long)
        self.expected = [self.alone(row) for row in range(len(self.prompts))]

    def alone(self, row):
        return alone(self.model, tuple(self.texts[row].tolist()), self.prompts[row])

    def feed(self, counts, left=True, width=None, **kwargs):
        """The next ``counts[row]`` tokens of each row, padded to the longest; checks what the model says to each."""
        width = width or max(counts)
        ids = torch.full((len(counts), width), PAD)
        mask = torch.zeros_like(ids)
        places = []
        for row, count in enumerate(counts):
            first = width - count if left else 0
            ids[row, first : first + count] = self.texts[row, self.fed[row] : self.fed[row] + count]
            mask[row, first : first + count] = 1
            places.append((row, first, count))
        self.mask = torch.cat([self.mask, mask], dim=1)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, **kwargs).logits
        for row, first, count in places:
            expected = self.expected[row][self.fed[row] : self.fed[row] + count]
            assert_close(logits[row, first : first + count], expected, self.rounded_to)
            self.fed[row] += count

    def start(self):
        self.feed(self.prompts)

    def replace(self, row, prompt):
        """Another text in a row, with a prompt of its own."""
        self.texts = self.texts.clone()
        self.texts[row] = make_texts(seed=int(self.texts.sum()), rows=1)[0]
        self.prompts = (*self.prompts[:row], prompt, *self.prompts[row + 1 :])
        self.expected[row], self.fed[row] = self.alone(row), prompt
        logits = self.model.replace_rows(self.cache, [row], self.texts[row : row + 1, :prompt]).logits
        assert_close(logits[0], self.expected[row][:prompt], self.rounded_to)
        self.mask = torch.nn.functional.pad(self.mask, (self.cache.get_seq_length() - self.mask.shape[1], 0))
        self.mask[row] = 0
        self.mask[row, -prompt:] = 1


VARIANTS = {
    "linear": {},
    "slots": {"encoder_attention": "slots"},
    "softmax by value": {"encoder_attention": "softmax", "state_address": "value"},
    **{name: {"eviction": name} for name in POLICIES[1:]},
    "one at a time": {"evict_ratio": 0.01},
    "all at once": {"evict_ratio": 1.0},
    "five of seven": {"cache_window": 7, "evict_ratio": 0.75},
    "frozen": {"state_update": "frozen"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return make_pte("llama", dtype=torch.float64, attn_implementation="sdpa", **VARIANTS[request.param])


# A call gives each row some tokens, or none.
CALL = st.one_of(
    st.lists(st.integers(0, 1), min_size=ROWS, max_size=ROWS),
    st.lists(st.integers(0, 2 * WINDOW + 3), min_size=ROWS, max_size=ROWS),
    st.just([1] * ROWS),
).filter(any)
REPLACED = st.tuples(st.integers(0, ROWS - 1), st.integers(1, 9))
HISTORIES = st.fixed_dictionaries(
    {
        "prompts": st.tuples(*[st.integers(1, 6)] * ROWS),
        "calls": st.lists(
            st.one_of(st.tuples(CALL, st.booleans(), st.integers(1, 4)), REPLACED), min_size=1, max_size=7
        ),
    }
)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(history=HISTORIES)
def test_a_row_among_others_is_the_row_alone(model, static, history):
    batch = Batch(model, history["prompts"], static)
    batch.start()
    for call in history["calls"]:
        if len(call) == 2:
            batch.replace(*call)
            continue
        counts, left, times = call
        for _ in range(times if max(counts) == 1 else 1):
            if max(fed + count for fed, count in zip(batch.fed, counts, strict=True)) <= TEXT:
                batch.feed(counts, left)
    assert batch.cache.rows.thoughts.tolist() == [
        fed - prompt for fed, prompt in zip(batch.fed, batch.prompts, strict=True)
    ]


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_copied_reordered_and_selected_out_of_step(model, static):
    batch = Batch(model, (5, 2, 4), static)
    batch.start()
    batch.feed([3, 11, 0])
    batch.feed([1, 1, 1])
    other = copy.deepcopy(batch)
    order = torch.tensor([2, 0, 1])
    batch.cache.reorder_cache(order)
    batch.cache.batch_repeat_interleave(2)
    batch.cache.batch_select_indices(torch.tensor([1, 2, 5]))
    rows = order[[0, 1, 2]].tolist()
    for name in ("fed", "expected"):
        setattr(batch, name, [getattr(batch, name)[row] for row in rows])
    batch.texts, batch.mask = batch.texts[rows], batch.mask[rows]
    for part in (batch, other):
        part.feed([1, 0, 1])
        part.feed([9, 4, 13])
        for _ in range(5):
            part.feed([1, 1, 1])


MARKER = [58, 60]


class Force(LogitsProcessor):
    """Lets each row generate its own text; it ends with the token ``END`` where the text says so."""

    def __init__(self, texts, width, done):
        self.texts, self.width, self.done = texts, width, done

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.width
        forced = torch.full_like(scores, -torch.inf)
        for row, done in enumerate(self.done):
            forced[row, self.texts[row][min(done + step, len(self.texts[row]) - 1)]] = 0.0
        return forced


END = 59


@dataclass
class Chat:
    """A batch of conversations: every row has a prompt, thoughts that end on their own, a tool's answer of its own length, and so on."""

    model: object
    turns: tuple
    """By row: lengths of thoughts and answers in turn."""
    prompts: tuple = (7, 4, 5)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(11)
        self.texts = []
        for prompt, turns in zip(self.prompts, self.turns, strict=True):
            text = torch.randint(1, 57, (prompt + sum(turns),), generator=generator)
            text[prompt - 2 : prompt] = torch.tensor(MARKER)
            place = prompt
            for number, length in enumerate(turns):
                place += length
                if number % 2 == 0:
                    text[place - 1] = END
            self.texts.append(text)
        with torch.no_grad():
            self.expected = [self.model(input_ids=text[None]).logits[0].float() for text in self.texts]

    def upto(self, row, turn):
        return self.prompts[row] + sum(self.turns[row][:turn])

    def batch(self, turn):
        """All of the text before ``turn``, padded left."""
        texts = [text[: self.upto(row, turn)] for row, text in enumerate(self.texts)]
        width = max(map(len, texts))
        ids, mask = torch.full((len(texts), width), PAD), torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
        return ids, mask

    def generate(self, ids, mask, turn, **kwargs):
        """Thoughts of ``turn``; checks the logits of each row up to its own end."""
        done = [self.upto(row, turn) for row in range(len(self.texts))]
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(turns[turn] for turns in self.turns),
            logits_processor=LogitsProcessorList([Force(self.texts, ids.shape[1], done)]),
            do_sample=False,
            eos_token_id=END,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        logits = torch.stack(output.logits, dim=1)
        for row, turns in enumerate(self.turns):
            start = done[row] - 1
            assert_close(logits[row, : turns[turn]], self.expected[row][start : start + turns[turn]])
        return output


def go_on(chat, output, mask, turn, width, hidden=()):
    """All of the text so far and the answers of ``turn``, padded left to ``width``; the mask shows what was generated, but for ``hidden`` rows."""
    rows, answers = len(chat.texts), torch.full((len(chat.texts), width), PAD)
    more = torch.zeros(rows, output.sequences.shape[1] - mask.shape[1] + width, dtype=torch.long)
    for row, turns in enumerate(chat.turns):
        more[row, : turns[turn - 1] if row in hidden else more.shape[1] - width] = 1
        answers[row, width - turns[turn] :] = chat.texts[row][chat.upto(row, turn) : chat.upto(row, turn + 1)]
        more[row, more.shape[1] - turns[turn] :] = 1
    return torch.cat([output.sequences, answers], dim=1), torch.cat([mask, more], dim=1)


@pytest.mark.parametrize("hidden", [(), (1,)], ids=["all shown", "one hidden"])
@pytest.mark.parametrize("prompts", [(6, 6, 6), (7, 4, 5)], ids=["a mask of ones", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_many_turns_whose_masks_show_what_was_generated(family, static, prompts, hidden):
    # `generate` drops a mask of ones, and leaves its last column unfed in every turn.
    model = make_pte(family, attn_implementation="sdpa", prompt_end=MARKER)
    chat = Chat(model, ((4, 3, 9, 3, 5), (12, 3, 2, 3, 9), (6, 3, 6, 3, 3)), prompts)
    cache = model.base_model.new_cache(static=static)
    ids, mask = chat.batch(0)
    for turn in (0, 2, 4):
        output = chat.generate(ids, mask, turn, past_key_values=cache)
        if turn < 4:
            ids, mask = go_on(chat, output, mask, turn + 1, 3, hidden)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_single_tokens_with_padding_behind(model, static):
    batch = Batch(model, (4, 4, 4), static)
    batch.start()
    batch.feed([11, 8, 9], left=False)
    for counts in ([1, 1, 1], [1, 0, 1], [0, 1, 1]):
        batch.feed(counts, left=False, width=4)
    batch.feed([1, 1, 1])


def test_few_thoughts_in_another_phase():
    # Seven slots of which five leave: no row is far enough for its block to have begun with an eviction.
    model = make_pte("llama", dtype=torch.float64, attn_implementation="sdpa", cache_window=7, evict_ratio=0.75)
    batch = Batch(model, (3, 3, 3))
    batch.start()
    batch.feed([1, 0, 0])
    batch.feed([13, 15, 2])
    batch.feed([1, 1, 1])


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_row_that_ends_while_the_prompt_of_another_goes_on(static):
    model = make_pte("llama", attn_implementation="sdpa", prompt_end=4)
    ids, mask = torch.randint(1, 57, (2, 6)), torch.tensor([[1] * 6, [0] * 5 + [1]])
    first = [torch.tensor([9, END]), torch.randint(1, 57, (12,))]
    cache = model.base_model.new_cache(static=static)
    settings = {"do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True, "past_key_values": cache}
    force = LogitsProcessorList([Force(first, 6, [0, 0])])
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, eos_token_id=END, logits_processor=force, **settings
    )
    turn = torch.randint(1, 57, (2, 3))
    ids = torch.cat([output.sequences, turn], dim=1)
    mask = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], dim=1)
    again = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, output_logits=True, **settings)
    for row, (start, thoughts) in enumerate(((0, 2), (5, 12))):
        text = torch.cat([ids[row, start : 6 + thoughts], turn[row], again.sequences[row, -10:]])
        with torch.no_grad():
            alone = model(input_ids=text[None], prompt_length=4).logits[0, -11:-1]
        assert_close(torch.stack(again.logits, dim=1)[row], alone)


def test_a_replaced_row_may_start_with_the_padding_token():
    model = make_pte("llama", attn_implementation="sdpa", prompt_end=MARKER)
    chat = Chat(model, ((3,), (9,), (5,)))
    cache = model.base_model.new_cache()
    chat.generate(*chat.batch(0), 0, past_key_values=cache)
    model.replace_rows(cache, [0], torch.tensor([[5, 6, *MARKER]]))
    columns = cache.get_seq_length()
    mask = torch.zeros(3, columns + 1, dtype=torch.long)
    for row, length in enumerate(cache.rows.lengths.tolist()):
        mask[row, columns - length :] = 1
    with torch.no_grad():
        model(input_ids=torch.full((3, 1), PAD), attention_mask=mask, past_key_values=cache)
    assert cache.rows.thoughts[0] == 1


def test_a_turn_of_generate_that_ends_in_padding():
    model = make_pte("llama", attn_implementation="sdpa", prompt_end=MARKER)
    chat = Chat(model, ((3,), (9,), (5,)))
    cache = model.base_model.new_cache()
    ids, mask = chat.batch(0)
    output = chat.generate(ids, mask, 0, past_key_values=cache)
    mask = torch.nn.functional.pad(mask, (0, output.sequences.shape[1] - ids.shape[1]), value=1)
    with pytest.raises(ValueError, match=r"is padding in rows \[0, 2\] of this turn"):
        model.generate(output.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="once rows have ended"):
        cache.crop(-1)


TURNS = ((WINDOW + 3, 4, 11), (3, 6, 2 * WINDOW), (2 * WINDOW + 1, 1, 5))


@pytest.fixture(params=[("llama", "linear"), ("llama", "slots"), ("gpt2", "linear")], ids=str)
def chat(request):
    family, attention = request.param
    model = make_pte(family, attn_implementation="sdpa", prompt_end=MARKER, encoder_attention=attention)
    return Chat(model, TURNS)


STATIC = [{}, {"cache_implementation": "static"}]


@pytest.mark.parametrize("static", STATIC, ids=["eager", "static"])
def test_tool_results_of_different_lengths(chat, static):
    # TRL's tool loop: the second generation gets prompt, thoughts and tool result of each row, padded left.
    chat.generate(*chat.batch(0), 0, **static)
    output = chat.generate(*chat.batch(2), 2, **static)
    assert len(set(output.past_key_values.rows.bound)) > 1


@pytest.mark.parametrize("hidden", [False, True], ids=["ends shown", "ends hidden"])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_kept_cache_goes_on_from_the_end_of_each_row(chat, static, hidden):
    cache = chat.model.base_model.new_cache(static=static)
    ids, mask = chat.batch(0)
    output = chat.generate(ids, mask, 0, past_key_values=cache)
    longest = max(turns[0] for turns in chat.turns)
    width = max(turns[1] for turns in chat.turns)
    more = torch.zeros(3, longest + width, dtype=torch.long)
    answers = torch.full((3, width), PAD)
    for row, turns in enumerate(chat.turns):
        more[row, : turns[0] if hidden else longest] = 1
        answers[row, width - turns[1] :] = chat.texts[row][chat.upto(row, 1) : chat.upto(row, 2)]
        more[row, longest + width - turns[1] :] = 1
    ids, mask = torch.cat([output.sequences, answers], dim=1), torch.cat([mask, more], dim=1)
    again = chat.generate(ids, mask, 2, past_key_values=cache)
    assert again.past_key_values is cache


def test_prompts_that_end_at_different_steps():
    # The first four tokens are prompt: one row has them all, the others think later.
    model = make_pte("llama", attn_implementation="sdpa", prompt_end=4)
    ids = torch.randint(1, 57, (3, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4 * WINDOW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        text = output.sequences[row : row + 1, 6 - length :]
        with torch.no_grad():
            alone = model(input_ids=text, prompt_length=4).logits[0, length - 1 : -1]
        assert_close(torch.stack(output.logits, dim=1)[row], alone)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_row_that_ended_by_another_rule_is_told_by_the_mask(model, static):
    batch = Batch(model, (5, 2, 4), static)
    batch.start()
    batch.feed([4, 4, 4])
    # Three columns more, which two of the rows were not to have.
    ids = torch.full((3, 3), 7)
    ids[0] = batch.texts[0, 9:12]
    shown = torch.cat([batch.mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=shown, past_key_values=batch.cache)
    batch.mask = shown.clone()
    batch.mask[1, -3:] = 0
    batch.mask[2, -2:] = 0
    batch.fed = [12, 6, 8]
    batch.texts[2, 8] = 7
    batch.expected[2] = batch.alone(2)
    batch.fed[2] = 9
    batch.feed([1, 1, 1])
    batch.feed([9, 2, 12])


def test_what_evicted_is_not_taken_back(model):
    batch = Batch(model, (5, 2, 4))
    batch.start()
    batch.feed([WINDOW + 1] * 3)
    mask = torch.cat([batch.mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    mask[1, -4:-1] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be taken back"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), attention_mask=mask, past_key_values=batch.cache)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_ten_thousand_tokens_of_replaced_rows_hold_the_same_bytes(static):
    model = make_pte("llama", attn_implementation="sdpa", model={"num_hidden_layers": 1})
    generator = torch.Generator().manual_seed(5)
    cache = model.base_model.new_cache(static=static)
    rows = 64
    with torch.no_grad():
        model(input_ids=torch.randint(1, 57, (rows, 6), generator=generator), past_key_values=cache)
        counts, held, tokens = torch.randint(3, 4 * WINDOW, (rows,), generator=generator), set(), 0
        for step in range(160):
            over = (counts == 0).nonzero()[:, 0].tolist()
            if over:
                prompts = torch.randint(1, 57, (len(over), 6), generator=generator)
                model.replace_rows(cache, over, prompts)
                counts[over] = torch.randint(3, 4 * WINDOW, (len(over),), generator=generator)
            ids = torch.randint(1, 57, (rows, 1), generator=generator)
            model(input_ids=ids, past_key_values=cache, position_ids=cache.rows.lengths[:, None])
            counts, tokens = counts - 1, tokens + rows
            if step > WINDOW:
                held.add(cache.nbytes)
    assert tokens > 10_000
    assert len(held) == 1
