"""`generate_batch`: a request gets what `generate` gives it alone, whatever rows there are, and whoever had them before."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from peft_pte.rollout import batch as batches
from tests.cases import FAMILIES, PAD, TWO_FAMILIES, VOCABULARY
from tests.helpers import POLICIES, SMALL, assert_close, make_pte
from tests.laws.test_hybrids import HYBRIDS, make_hybrid

WINDOW = SMALL["cache_window"]
MARKER = [58, 60]
# Of a random model's tokens about one in twenty: most requests end before their last token, some at once.
ENDS = [7, 11, 13]
LENGTHS = (3, 6, 2, 8, 5, 1, 4, 7, 2, 6)


def make_requests(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 57, (length,), generator=generator).tolist() for length in lengths]


def options(new_tokens=4 * WINDOW, **fields):
    return GenerationConfig(
        **{"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": PAD, **fields}
    )


def rows(number, **fields):
    return ContinuousBatchingConfig(max_requests_per_batch=number, **fields)


def alone(model, request, config, **arguments):
    """What `generate` writes for one request."""
    found = model.generate(torch.tensor([request]), generation_config=config, **arguments)
    return found[0, len(request) :].tolist()


def tokens(outputs):
    assert all(output.error is None for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


def cut(row, ends):
    """What comes of a row that ends with any of ``ends``."""
    return next((row[: place + 1] for place, token in enumerate(row) if token in ends), row)


STATIC = {"cache_implementation": "static"}
FORMS = [(family, torch.float64, {}) for family in FAMILIES]
FORMS += [
    ("llama", torch.float32, {}),
    *((family, torch.float64, STATIC) for family in ("llama", "gpt2", "deepseek_v3")),
]


@pytest.mark.parametrize(("family", "dtype", "form"), FORMS, ids=str)
def test_greedy_tokens_are_those_of_generate(family, dtype, form):
    model = make_pte(family, dtype=dtype)
    check_against_generate(model, form)


@pytest.mark.parametrize("prompt_end", [None, MARKER], ids=["prompts", "thoughts too"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_beside_layers_that_evict_nothing(name, prompt_end):
    model = make_hybrid(name, dtype=torch.float64, prompt_end=prompt_end)
    requests = make_requests(LENGTHS[:6])
    if prompt_end is not None:
        requests = [[*row[:2], *MARKER, *row[2:]] for row in requests]
        # Rows that start alike and rows that do not, in one prefill.
        requests[3] = requests[1][:4] + requests[3][-4:]
    check_against_generate(model, {}, requests)


def check_against_generate(model, form, requests=None):
    requests = make_requests(LENGTHS[:6]) if requests is None else requests
    expected = [alone(model, request, options(3 * WINDOW, eos_token_id=None)) for request in requests]
    # The end that its rows come to at the most different times.
    ends = [max(range(VOCABULARY), key=lambda token: len({len(cut(row, [token])) for row in expected}))]
    expected = [cut(row, ends) for row in expected]
    assert len(set(map(len, expected))) > 1
    assert max(map(len, expected)) > WINDOW
    for number in (2, 3):
        found = tokens(model.generate_batch(requests, options(3 * WINDOW, eos_token_id=ends, **form), rows(number)))
        assert found == expected, number


@pytest.mark.parametrize("family", TWO_FAMILIES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_seed_gives_the_same_whatever_rows_there_are(family, static):
    model = make_pte(family, dtype=torch.float64)
    config = options(do_sample=True, temperature=0.7, top_p=0.9, **(STATIC if static else {}))
    requests = make_requests()
    expected = tokens(model.generate_batch(requests, config, rows(10, seed=5)))
    for number in (1, 3):
        assert tokens(model.generate_batch(requests, config, rows(number, seed=5))) == expected
    assert tokens(model.generate_batch(requests, config, rows(10, seed=6))) != expected
    torch.manual_seed(3)
    by_torch = tokens(model.generate_batch(requests, config, rows(2)))
    torch.manual_seed(3)
    assert tokens(model.generate_batch(requests, config, rows(4))) == by_torch


def test_a_request_does_not_know_what_others_draw():
    # Not even how long they are, or that they fail: its seed is that of its place.
    model = make_pte(dtype=torch.float64)
    config = options(do_sample=True)
    requests = make_requests()
    expected = tokens(model.generate_batch(requests, config, rows(3, seed=5)))
    others = [request if number == 6 else [1 + number, 2] for number, request in enumerate(requests)]
    others[2] = []
    found = list(model.generate_batch(others, config, rows(2, seed=5)).values())
    assert found[6].generated_tokens == expected[6]
    assert found[2].error


@pytest.mark.parametrize("encoder_attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("eviction", POLICIES)
def test_scored_log_probs_are_those_returned(eviction, encoder_attention):
    model = make_pte(dtype=torch.float64, encoder_attention=encoder_attention, eviction=eviction)
    outputs = model.generate_batch(
        make_requests(), options(do_sample=True, top_k=0), rows(3, return_logprobs=True, seed=2)
    )
    assert max(len(output.generated_tokens) for output in outputs.values()) > 3 * WINDOW
    for output in outputs.values():
        ids = torch.tensor([[*output.prompt_ids, *output.generated_tokens]])
        start = len(output.prompt_ids)
        logits = model(ids, prompt_length=start).logits[0, start - 1 : -1]
        scored = logits.log_softmax(dim=-1).gather(-1, ids[0, start:, None])[:, 0]
        # Logits are taken in float32, as `generate` does.
        assert_close(torch.tensor(output.logprobs, dtype=torch.float64), scored.detach(), torch.float32)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_requests_that_hold_thoughts_already(family):
    # Tool results and longer turns: what stands behind the first marker has been evicted as if it had been written here.
    model = make_pte(family, dtype=torch.float64, prompt_end=MARKER)
    requests = []
    for number, request in enumerate(make_requests((3, 30, 12, 1, 17, 9))):
        at = min(number, len(request))
        requests.append([*request[:at], *MARKER, *request[at:]])
    with pytest.warns(UserWarning, match="more than the window"):
        expected = [alone(model, request, options()) for request in requests]
    for number in (1, 2, 6):
        assert tokens(model.generate_batch(requests, options(), rows(number))) == expected


def test_prompt_length_of_each_request():
    model = make_pte(dtype=torch.float64)
    requests, lengths = make_requests((12, 9, 20, 5)), [2, 9, 1, 4]
    expected = [
        alone(model, request, options(), prompt_length=length)
        for request, length in zip(requests, lengths, strict=True)
    ]
    assert tokens(model.generate_batch(requests, options(), rows(2), prompt_length=lengths)) == expected
    assert tokens(model.generate_batch(requests[:1] * 3, options(), rows(2), prompt_length=2)) == expected[:1] * 3


def heavy_tailed(number, seed=0):
    """Lengths of which most are short and some many times as long."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(number, generator=generator).mul(1.2).exp() * WINDOW).long().clamp(1, 12 * WINDOW).tolist()


class StopAfter:
    """Ends each request after a number of tokens of its own, which its first token tells."""

    def __init__(self, lengths, prompts):
        self.lengths = {tuple(prompt): length for prompt, length in zip(prompts, lengths, strict=True)}

    def __call__(self, input_ids, scores, **kwargs):
        prompt = tuple(input_ids[0, :2].tolist())
        return torch.tensor([input_ids.shape[1] - 2 >= self.lengths[prompt]])


def test_a_soak_loses_and_mixes_none(monkeypatch):
    model = make_pte(dtype=torch.float64)
    lengths = heavy_tailed(200)
    prompts = [[1 + number // 50, 1 + number % 50] for number in range(200)]
    held = []
    step = batches.Batch.step
    monkeypatch.setattr(
        batches.Batch, "step", lambda self: (held.append((len(self.requests), self.cache.nbytes)), step(self))[1]
    )
    found = tokens(
        model.generate_batch(
            prompts,
            options(12 * WINDOW, eos_token_id=None),
            rows(8),
            stopping_criteria=[StopAfter(lengths, prompts)],
        )
    )
    assert [len(row) for row in found] == lengths
    some = range(0, 200, 9)
    for number in some:
        expected = alone(model, prompts[number], options(lengths[number], eos_token_id=None))
        assert found[number] == expected
    # The bytes of eight rows are the same for all the time that there are eight, but for a mask of prompts and what rows came to.
    full = [nbytes for size, nbytes in held if size == 8]
    assert len(full) > sum(lengths) // 8 * 0.7
    assert len(set(full[2 * WINDOW :])) == 1
    assert sorted({size for size, _ in held}) == [1, 2, 4, 8]
    assert held[-1][1] < full[-1] / 4


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_look_that_comes_a_step_late_changes_nothing(monkeypatch, static):
    # On an accelerator the host sees which rows have ended when the next step is under way.
    model = make_pte(dtype=torch.float64)
    requests = make_requests()
    config = options(do_sample=True, **(STATIC if static else {}))
    batching = rows(3, seed=5, return_logprobs=True)
    expected = model.generate_batch(requests, config, batching)
    begin = batches.Batch.__init__

    def late(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._ahead = 1

    monkeypatch.setattr(batches.Batch, "__init__", late)
    found = model.generate_batch(requests, config, batching)
    assert tokens(found) == tokens(expected)
    assert [output.logprobs for output in found.values()] == [output.logprobs for output in expected.values()]


def test_rows_in_any_order_share_one_graph_for_each_number_of_them():
    from tests.test_static_cache import compiling

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_pte(dtype=torch.float64)
    requests = make_requests()
    expected = tokens(model.generate_batch(requests, options(), rows(4)))
    counters.clear()
    found = tokens(model.generate_batch(requests, options(**compiling()), rows(4)))
    assert found == expected
    assert not counters["graph_break"]
    # Of four rows, of two, and of one.
    assert counters["stats"]["unique_graphs"] <= 3
    again = tokens(model.generate_batch(requests[::-1], options(**compiling()), rows(4)))
    assert again == expected[::-1]
    assert counters["stats"]["unique_graphs"] <= 3


def test_columns_of_rows_that_are_gone_are_forgotten(monkeypatch):
    # Layers of the model's own see a mask over columns: it is as wide as the longest row, however many there were before.
    model = make_hybrid("sliding", dtype=torch.float64)
    widths, step = [], batches.Batch.step
    monkeypatch.setattr(batches.Batch, "step", lambda self: (widths.append(self.cache.get_seq_length()), step(self))[1])
    found = tokens(model.generate_batch([[3, 4]] * 30, options(WINDOW, eos_token_id=None), rows(2)))
    assert len(set(map(tuple, found))) == 1
    assert max(widths) <= WINDOW + 2
    assert len(widths) == 15 * (WINDOW - 1)


def test_more_rows_than_tokens_of_a_prefill():
    model = make_pte(dtype=torch.float64)
    requests = [*make_requests(), *make_requests()]
    expected = tokens(model.generate_batch(requests, options(), rows(20)))
    for fields in ({"max_batch_tokens": 1}, {"max_batch_tokens": 9}, {"allow_block_sharing": False}):
        assert tokens(model.generate_batch(requests, options(), rows(20, **fields))) == expected
