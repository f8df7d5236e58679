"""What `generate_batch` takes, what it gives back, and what it refuses."""

import logging
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.generation.continuous_batching.requests import RequestStatus

from peft_pte.rollout.choice import sample
from peft_pte.rollout.memory import free_memory, row_bytes, rows_that_fit
from peft_pte.seam import Seam
from tests.cases import PAD, VOCABULARY
from tests.helpers import SMALL, make_pte
from tests.laws.test_generate_batch import MARKER, alone, make_requests, options, rows, tokens

WINDOW = SMALL["cache_window"]


@pytest.fixture(scope="module")
def model():
    return make_pte(dtype=torch.float64)


class Forbid(LogitsProcessor):
    """Keeps a state: forbids what it has seen a sequence choose, and counts the calls."""

    def __init__(self):
        self.seen, self.calls = [], 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls > 1:
            self.seen.append(input_ids[0, -1].item())
        scores[:, self.seen] = -torch.inf
        return scores


class StopAtCall(StoppingCriteria):
    """Keeps a state: stops at its fifth call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls == 5)


PROCESSING = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "ngrams": {"no_repeat_ngram_size": 2, "bad_words_ids": [[3], [5, 9]]},
    "new_tokens": {"min_new_tokens": 9, "begin_suppress_tokens": [4, 30, 34], "eos_token_id": 22},
    "length": {"min_length": 14, "exponential_decay_length_penalty": (6, 1.05)},
    "total": {"max_new_tokens": None, "max_length": 20, "forced_eos_token_id": 7},
    "encoder": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},
    "scores": {"suppress_tokens": [1, 2], "sequence_bias": [[[9], 3.0], [[4, 5], -4.0]]},
    "guidance": {"guidance_scale": 1.4},
}


@pytest.mark.parametrize("name", PROCESSING)
def test_processors_see_a_request_alone(model, name):
    config = options(2 * WINDOW, **PROCESSING[name])
    requests = make_requests((3, 6, 2, 8, 5))
    expected = [alone(model, request, config) for request in requests]
    assert expected != [alone(model, request, options(2 * WINDOW)) for request in requests]
    for number in (2, 5):
        assert tokens(model.generate_batch(requests, config, rows(number))) == expected


def test_processors_and_criteria_that_keep_a_state_keep_one_of_each_request(model):
    requests, config = make_requests((3, 6, 2, 8, 5)), options(eos_token_id=None)
    processor, criterion = Forbid(), StopAtCall()
    expected = [alone(model, request, config, logits_processor=[Forbid()]) for request in requests]
    assert tokens(model.generate_batch(requests, config, rows(2), logits_processor=[processor])) == expected
    found = tokens(model.generate_batch(requests, config, rows(2), stopping_criteria=[criterion]))
    assert [len(row) for row in found] == [5] * 5
    assert processor.calls == criterion.calls == 0


def test_one_that_is_to_be_shared_can_be(model):
    class Counter(StopAtCall):
        def __call__(self, input_ids, scores, **kwargs):
            return super().__call__(input_ids, scores) & False

        def __deepcopy__(self, memo):
            return self

    criterion = Counter()
    model.generate_batch(make_requests((3, 2)), options(4, eos_token_id=None), rows(2), stopping_criteria=[criterion])
    assert criterion.calls == 8


def test_allowed_tokens_by_the_place_of_a_request(model):
    def allowed(number, ids):
        return [number + 20, number + 30]

    found = tokens(
        model.generate_batch(
            make_requests((3, 6, 2)),
            options(5, eos_token_id=None, num_return_sequences=2, do_sample=True),
            rows(2),
            prefix_allowed_tokens_fn=allowed,
        )
    )
    assert [{token % 10 for token in row} for row in found] == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_stop_strings(model):
    # A token a letter.
    letters = dict(zip("?" + string.ascii_letters + string.digits, range(VOCABULARY), strict=False))
    backend = Tokenizer(models.WordLevel(letters, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    requests = make_requests((3, 6, 2))
    plain = [alone(model, request, options(eos_token_id=None)) for request in requests]
    stops = [tokenizer.decode(plain[0][3:5]), tokenizer.decode(plain[2][8:11])]
    config = options(eos_token_id=None, stop_strings=stops)
    expected = [alone(model, request, config, tokenizer=tokenizer) for request in requests]
    assert len(expected[0]) <= 5
    assert tokens(model.generate_batch(requests, config, rows(2), tokenizer=tokenizer)) == expected
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate_batch(requests, config, rows(2))


def test_max_time(model):
    config = options(10_000, eos_token_id=None, max_time=0.2)
    outputs = list(model.generate_batch(make_requests((3, 2, 4)), config, rows(2)).values())
    assert all(0 < len(output.generated_tokens) < 9_999 for output in outputs[:2])
    assert outputs[2].status == RequestStatus.FAILED
    assert "before a row was free" in outputs[2].error


def test_sampling_is_by_the_distribution():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    draws = torch.rand(20_000, dtype=torch.float64, generator=generator)
    found = sample(probabilities.expand(20_000, -1), draws).bincount(minlength=6) / 20_000
    torch.testing.assert_close(found, probabilities[0], rtol=0.0, atol=0.015)
    assert found[[0, 2, 5]].sum() == 0
    # The ends of what can be drawn, where a sum is not exactly one.
    uneven = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.0]]).expand(2, -1)
    last = torch.tensor([0.0, 1.0], dtype=torch.float64).nextafter(torch.zeros(2, dtype=torch.float64)).clamp(min=0.0)
    assert sample(uneven, last).tolist() == [1, 3]
    wide = torch.rand(3, 150_000, generator=generator)
    assert sample(wide, torch.full((3,), 1 - 2**-53, dtype=torch.float64)).tolist() == [149_999] * 3


def test_the_result_is_that_of_transformers(model):
    requests = make_requests((3, 6, 3))
    outputs = model.generate_batch(
        requests,
        options(6, eos_token_id=None, num_return_sequences=3, do_sample=True),
        rows(4, return_logprobs=True),
        record_timestamps=True,
    )
    assert list(outputs) == [
        name for number in range(3) for name in (f"req_{number}__child#0", f"req_{number}__child#1", f"req_{number}")
    ]
    for name, output in outputs.items():
        assert output.request_id == name
        assert output.prompt_ids == requests[int(name[4])]
        assert output.is_finished()
        assert output.error is None
        assert len(output.generated_tokens) == len(output.logprobs) == len(output.timestamps) == 6
        assert output.timestamps == sorted(output.timestamps)
        start, end = output.lifespan
        assert output.created_time <= start <= output.timestamps[0] <= output.timestamps[-1] <= end
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) > 6
    assert model.generate_batch([]) == {}
    quiet = model.generate_batch(requests, options(2))["req_0"]
    assert quiet.logprobs == []
    assert quiet.timestamps is None


def test_a_bar_is_shown_where_asked_for(model, capsys):
    model.generate_batch(make_requests((3, 6, 2)), options(3), rows(2))
    assert "Solving" not in capsys.readouterr().err
    model.generate_batch(make_requests((3, 6, 2)), options(3), rows(2), progress_bar=True)
    shown = capsys.readouterr().err
    assert "Solving 3 requests" in shown
    assert "3/3" in shown


def test_prompts_that_are_equal_are_read_once(model, monkeypatch):
    seen = []
    forward = type(model.get_base_model()).forward

    def counted(self, input_ids, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    counted.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(type(model.get_base_model()), "forward", counted)
    config = options(3, eos_token_id=None, do_sample=True, num_return_sequences=4)
    shared = tokens(model.generate_batch(make_requests((3, 6)), config, rows(8, seed=1)))
    assert seen[0] == (2, 6)
    apart = tokens(model.generate_batch(make_requests((3, 6)), config, rows(8, seed=1, allow_block_sharing=False)))
    assert (8, 6) in seen
    assert shared == apart


# Errors of one request.


def test_a_request_that_fails_frees_its_row(model, caplog):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids[0, 0] == 41 and input_ids.shape[1] == 7:
                raise RuntimeError("so it was wanted")
            return torch.tensor([False])

    requests = [*make_requests((3, 6)), [41, 2, 3, 4], *make_requests((5, 2), seed=3)]
    config = options(eos_token_id=None)
    expected = tokens(model.generate_batch(requests, config, rows(5)))
    for fails in ({"stopping_criteria": [Fails()]}, {"logits_processor": [FailsToo()]}):
        with caplog.at_level(logging.ERROR):
            outputs = list(model.generate_batch(requests, config, rows(2), **fails).values())
        assert [output.error for output in outputs] == [None, None, "RuntimeError: so it was wanted", None, None]
        assert [output.status for output in outputs][2:4] == [RequestStatus.FAILED, RequestStatus.FINISHED]
        assert outputs[2].generated_tokens == expected[2][:3]
        assert [output.generated_tokens for number, output in enumerate(outputs) if number != 2] == [
            row for number, row in enumerate(expected) if number != 2
        ]
        assert "Request req_2 failed: so it was wanted" in caplog.text


@pytest.mark.parametrize("fields", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf], ids=str)
def test_a_request_without_a_next_token(model, fields, value):
    # `torch.multinomial` would say so of the whole batch; the likeliest of nothing is token 0.
    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids[0, 0] == 41 and input_ids.shape[1] == 7:
                scores[:] = value
                scores[:, :3] = 0.0 if torch.tensor(value).isnan() else value
            return scores

    if value == torch.inf and not fields:
        pytest.skip("of infinite scores the first is the greatest, as in `generate`")
    requests, config = [[41, 2, 3, 4], *make_requests((5, 2))], options(eos_token_id=None, **fields)
    expected = tokens(model.generate_batch(requests, config, rows(2, seed=4)))
    outputs = list(model.generate_batch(requests, config, rows(2, seed=4), logits_processor=[Breaks()]).values())
    assert "There is no next token" in outputs[0].error
    assert outputs[0].generated_tokens == expected[0][:3]
    assert [output.generated_tokens for output in outputs[1:]] == expected[1:]


class FailsToo(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids[0, 0] == 41 and input_ids.shape[1] == 7:
            raise RuntimeError("so it was wanted")
        return scores


BAD = {
    "empty": ([], "must have tokens"),
    "beyond the vocabulary": ([3, VOCABULARY], f"from 0 to {VOCABULARY - 1}"),
    "negative": ([3, -1], f"from 0 to {VOCABULARY - 1}"),
    "no numbers": (["a"], "TypeError"),
    "halves": ([1.5], "TypeError"),
    "too long": ([3] * 513, "positions for 512"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_written(model, name):
    request, reason = BAD[name]
    outputs = model.generate_batch([[3, 4], request, [5]], options(4), rows(1))
    assert reason in outputs["req_1"].error
    assert outputs["req_1"].generated_tokens == []
    assert outputs["req_0"].error is outputs["req_2"].error is None
    with pytest.raises((TypeError, ValueError)):
        model.generate_batch([request], options(4))


def test_a_prompt_without_its_marker():
    model = make_pte(prompt_end=MARKER)
    outputs = model.generate_batch([[3, *MARKER], [3, 4], [*MARKER, 5]], options(4), rows(2))
    assert [output.error is None for output in outputs.values()] == [True, False, True]
    assert "without its marker" in outputs["req_1"].error
    with pytest.raises(ValueError, match="without its marker"):
        model.generate_batch([[3, 4], [5]], options(4))
    assert all(output.error is None for output in model.generate_batch([[3, 4]], options(4), prompt_length=1).values())


def test_learned_positions_end_with_the_request_that_uses_them_up():
    model = make_pte("gpt2", dtype=torch.float64, model={"max_position_embeddings": 40})
    requests, config = make_requests((30, 3, 20, 5, 36)), options(30, eos_token_id=None)
    outputs = list(model.generate_batch(requests, config, rows(2)).values())
    assert [len(output.generated_tokens) for output in outputs] == [11, 30, 21, 30, 5]
    assert ["positions for 40" in (output.error or "") for output in outputs] == [True, False, True, False, True]
    for request, output in zip(requests, outputs, strict=True):
        count = len(output.generated_tokens)
        assert output.generated_tokens == alone(model, request, options(count, eos_token_id=None))
    # A row of little length is no longer than it is, however long others were.
    many = tokens(model.generate_batch(make_requests((3,) * 6), options(30, eos_token_id=None), rows(1)))
    assert [len(row) for row in many] == [30] * 6


def test_a_row_that_nobody_has_stands_still():
    # Three of four rows go on, so it is not dropped; were it fed, it would run out of positions, and take the call with it.
    class StopsFirst(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([bool(input_ids[0, 0] == 41) and input_ids.shape[1] == 38])

    model = make_pte("gpt2", dtype=torch.float64, model={"max_position_embeddings": 40})
    requests = [[41] + [5] * 35, *make_requests((3, 4, 2))]
    config = options(30, eos_token_id=None)
    outputs = model.generate_batch(requests, config, rows(4), stopping_criteria=[StopsFirst()])
    assert [len(row) for row in tokens(outputs)] == [2, 30, 30, 30]
    assert tokens(outputs)[1:] == [alone(model, request, config) for request in requests[1:]]


# What is refused.

REFUSED = {
    "num_beams": ({"num_beams": 2}, {}, NotImplementedError, "greedily or samples"),
    "output_scores": ({"output_scores": True}, {}, NotImplementedError, "`output_scores`"),
    "cache": ({"cache_implementation": "paged"}, {}, NotImplementedError, "`cache_implementation`"),
    "chunks": ({"prefill_chunk_size": 4}, {}, NotImplementedError, "`prefill_chunk_size`"),
    "unknown": ({}, {"pixel_values": 1}, TypeError, "pixel_values"),
    "no rows": ({}, {"rows": 0}, ValueError, "at least 1, got 0"),
    "lengths": ({}, {"prompt_length": [1, 2, 3]}, ValueError, "one for each of 2 requests, got 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model, name):
    config, arguments, error, match = REFUSED[name]
    arguments = dict(arguments)
    with pytest.raises(error, match=match):
        model.generate_batch(make_requests((3, 2)), options(4, **config), rows(arguments.pop("rows", 1)), **arguments)


def test_where_no_window_bounds_a_row():
    with pytest.raises(NotImplementedError, match="rows of constant size"):
        make_pte(cache_window=None).generate_batch([[1, 2]], options(4))


def test_sharded_weights(model, monkeypatch):
    monkeypatch.setattr(Seam, "sharded", lambda self: True)
    with pytest.raises(NotImplementedError, match="spread over processes"):
        model.generate_batch([[1, 2]], options(4))


def test_transformers_own_manager(model):
    with pytest.raises(NotImplementedError, match=r"`model\.generate_batch`"):
        model.init_continuous_batching()
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache_implementation="paged")


def test_the_base_model_keeps_its_own(model, monkeypatch):
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        monkeypatch.setattr(GenerationMixin, name, lambda self, *args, name=name, **kwargs: (name, args, kwargs))
        monkeypatch.setattr(type(model.get_base_model()), name, getattr(GenerationMixin, name), raising=False)
        with model.disable_adapter():
            assert getattr(model, name)([[1]], progress_bar=True) == (name, ([[1]],), {"progress_bar": True})


def test_the_model_is_left_as_it_was():
    model = make_pte(dropout=0.5).train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    expected = tokens(model.generate_batch(make_requests(), options(), rows(3)))
    assert [module.training for module in model.modules()] == modes
    assert tokens(model.eval().generate_batch(make_requests(), options(), rows(3))) == expected
    seam = Seam.of(model.get_base_model())
    assert not seam.calls.generations

    def broken(self, input_ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train().generate_batch(
            make_requests(),
            options(),
            rows(3),
            logits_processor=[type("Broken", (LogitsProcessor,), {"__call__": broken})()],
        )
    assert not seam.calls.generations
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_trainable_weights_that_were_cast_are_told_of(recwarn):
    model = make_pte()
    model.generate_batch(make_requests((3, 2)), options(2))
    assert not [one for one in recwarn if "rounds small updates" in str(one.message)]
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"torch\.bfloat16, which rounds small updates away. TRL"):
            model.to(torch.bfloat16).generate_batch(make_requests((3, 2)), options(2))
    model.requires_grad_(False)
    recwarn.clear()
    model.generate_batch(make_requests((3, 2)), options(2))
    assert not [one for one in recwarn if "rounds small updates" in str(one.message)]


# Rows.


def test_as_many_rows_as_fit(model, monkeypatch):
    seam = Seam.of(model.get_base_model())
    each = row_bytes(seam, "default", 10, 40, static=False)
    monkeypatch.setattr("peft_pte.rollout.memory.free_memory", lambda device: 10 * each)
    assert rows_that_fit(seam, "default", 10, 40, None, None, static=False) == 9
    assert rows_that_fit(seam, "default", 10, 40, None, 0.5, static=False) == 5
    assert rows_that_fit(seam, "default", 10, 40, 3, 0.5, static=False) == 3
    assert rows_that_fit(seam, "default", 10, 40, None, 0.01, static=False) == 1
    with pytest.raises(ValueError, match="`max_requests_per_batch` must be at least 1"):
        rows_that_fit(seam, "default", 10, 40, 0, None, static=False)


def test_bytes_of_a_row_are_those_of_its_cache(model):
    # Of the cache alone: beside it a row has logits and tokens.
    seam = Seam.of(model.get_base_model())
    cache = seam.new_cache("default")
    with torch.no_grad():
        model(torch.ones(1, 10, dtype=torch.long), past_key_values=cache, prompt_length=10)
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    beside = VOCABULARY * 4 * 6 + 40 * 20
    held = row_bytes(seam, "default", 10, 40, static=False) - beside
    assert held == pytest.approx(cache.nbytes, rel=0.1)


def test_free_memory():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**45


def test_options_of_the_model_are_those_of_generate():
    model = make_pte(dtype=torch.float64)
    model.generation_config.max_new_tokens = 7
    requests = make_requests((3, 2))
    assert [len(row) for row in tokens(model.generate_batch(requests))] == [7, 7]
    assert [len(row) for row in tokens(model.generate_batch(requests, max_new_tokens=3))] == [3, 3]
    model.generation_config.max_new_tokens = None
    assert [len(row) for row in tokens(model.generate_batch(requests))] == [20, 20]
    assert [len(row) for row in tokens(model.generate_batch(requests, max_length=9))] == [6, 7]
    assert "`max_length` must be above" in model.generate_batch([[3, 4], [5]], max_length=2)["req_0"].error
    config = GenerationConfig(max_new_tokens=4, pad_token_id=PAD)
    assert [len(row) for row in tokens(model.generate_batch(requests, config, ContinuousBatchingConfig()))] == [4, 4]
