"""A state walked through permutations: the task, its verifier, the window of an evaluation."""

import pytest
import torch
from peft import get_peft_model

from benchmarks.common.intervals import clustered_share, share
from benchmarks.learning.arms import Settings
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.tasks import permutation as task
from benchmarks.learning.tasks.task import EVALUATION_SEED, evict_of, gone, window_of
from peft_pte.cache.store import ThoughtLayer
from tests.cases import make_base

SMALL = {"r": 4, "num_global_tokens": 4, "cache_window": 8, "prompt_end": None}


def adapted(arm="linear"):
    torch.manual_seed(0)
    return get_peft_model(
        make_base("llama"), Settings("permutation", arm, (), overrides=SMALL).config(TASKS["permutation"])
    )


def problems(batch=8, steps=6, asked=3, seed=0):
    return task.make_problems(batch, steps, asked, torch.Generator().manual_seed(seed))


def test_operations_are_permutations():
    assert torch.equal(task.TABLE.sort(dim=1).values, torch.arange(len(task.STATES)).expand(len(task.OPERATIONS), -1))


def test_solutions_follow_the_prompt():
    made = problems()
    for prompt, completion, asked in zip(
        made.prompt_ids.tolist(), made.completion_ids.tolist(), made.asked.tolist(), strict=True
    ):
        given, _, questions = task.words(prompt).partition(" ask ")
        _, state, *pairs = given.split()
        trace, _, answers = task.words(completion).partition(" answer ")
        steps = [trace.split()[start : start + task.STEP] for start in range(0, len(trace.split()), task.STEP)]
        assert [word for step in steps for word in step[:2]] == pairs
        for _, operation, after in steps:
            state = task.STATES[task.TABLE[task.OPERATIONS.index(operation), task.STATES.index(state)]]
            assert after == state
        assert questions.split() == [steps[step][0] for step in asked] + ["think"]
        assert answers.split() == [word for step in asked for word in (steps[step][0], steps[step][2])] + ["<eos>"]


def test_columns_point_at_states_and_at_what_recalls_them():
    made = problems()
    stated = made.completion_ids.gather(1, made.stated)
    assert torch.equal(stated, made.completion_ids[:, made.recalled + 1])
    assert bool((made.recalled > made.stated).all())
    # The word before an answer, and the one that opens the step that states it, are the same index.
    assert torch.equal(made.completion_ids[:, made.recalled], made.completion_ids.gather(1, made.stated - 2))


def test_what_the_window_holds_is_what_a_cache_holds():
    made, window, prompt = problems(batch=1, steps=10, asked=10), 8, 5
    evict = evict_of(window)
    model = adapted()
    cache, held = model.base_model.new_cache(), {}
    tokens = torch.randint(3, 20, (1, prompt + made.completion_ids.shape[1]))
    with torch.no_grad():
        model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True)
        for thought in range(tokens.shape[1] - prompt):
            column = tokens[:, prompt + thought, None]
            cache = model(input_ids=column, past_key_values=cache, use_cache=True).past_key_values
            held[thought] = {place - prompt for place in cache.window_positions(0)[0, 0].tolist() if place >= 0}
            assert int(gone(torch.tensor(thought), window, evict)) == min(held[thought])
    expected = [[int(s) in held[int(r)] for s, r in zip(made.stated[0], made.recalled, strict=True)]]
    assert made.held(window, evict).tolist() == expected
    assert made.held(None, 0).all()


def test_the_tokenizer_gives_words_back():
    tokenizer, made = TASKS["permutation"].tokenizer(), problems()
    for ids in (made.prompt_ids, made.completion_ids):
        for row in ids.tolist():
            assert tokenizer(task.words(row))["input_ids"] == row
    assert tokenizer.decode(made.completion_ids[0], skip_special_tokens=True) == task.words(
        made.completion_ids[0, :-1].tolist()
    )


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("1 a A 2 b B answer 2 B 1 A <eos>", [True, True]),
        ("answer 2 B 1 A", [True, True]),
        ("1 a A 2 b B answer 2 B 1 C <eos>", [True, False]),
        ("answer 1 A 2 B <eos>", [False, False]),
        ("answer 2 B <eos> 1 A", [True, False]),
        ("answer 2 B 1", [True, False]),
        ("answer answer 2 B 1 A", [False, False]),
        ("2 B 1 A <eos>", [False, False]),
        ("", [False, False]),
    ],
)
def test_grades(completion, right):
    solution = "1 a A 2 b B answer 2 B 1 A <eos>"
    assert task.grade(completion, solution) == right
    assert task.exact([completion], [solution]) == [float(all(right))]


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="`steps` must be from 1 to 24, got 25"):
        problems(steps=25)
    with pytest.raises(ValueError, match="`asked` must be from 1 to the number of steps, 3, got 4"):
        problems(steps=3, asked=4)


@pytest.mark.parametrize("arm", ["lora", "global-only", "linear"])
def test_the_window_of_an_evaluation_bounds_its_cache(arm, monkeypatch):
    model = adapted(arm)
    before = model.peft_config["default"]
    sizes = []
    original = ThoughtLayer.lose
    monkeypatch.setattr(ThoughtLayer, "lose", lambda self, *args: (sizes.append(self.window), original(self, *args))[1])
    prompt = torch.randint(3, 20, (2, 5))
    generate = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    for window in (12, None):
        sizes.clear()
        with window_of(model, window):
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **generate)
        assert set(sizes) == ({12} if window else set())
    assert model.peft_config["default"] is before


def test_intervals_count_problems():
    right = torch.tensor([[True, True], [False, False], [True, True], [False, False]])
    found = clustered_share(right, torch.ones_like(right))
    assert found["n"] == 8
    assert found["accuracy"] == 0.5
    assert found["low"] < 0.05
    assert found["high"] > 0.95
    # Answers that are independent: the interval of a binomial share, which Wilson's is near where there are many.
    right = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    found, expected = clustered_share(right, chosen), share(right[chosen])
    assert found["n"] == expected["n"]
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["high"] - found["low"] == pytest.approx(expected["high"] - expected["low"], rel=0.05)
    assert clustered_share(right, torch.zeros_like(chosen))["accuracy"] is None


def test_no_seed_of_a_training_comes_near_that_of_the_evaluation():
    assert EVALUATION_SEED > 100_000
