"""SmolLM2 on sums: tasks, verifier, estimator and table alone; a whole run on a tiny random model, left to `slow`."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common.intervals import bootstrap, wilson
from benchmarks.learning import report
from benchmarks.learning.arms import Settings, Stage
from benchmarks.learning.measure import run
from benchmarks.learning.tasks import SUMS, TASKS
from benchmarks.learning.tasks.sums import BARE, draw, identity, pass_at_k, solved
from benchmarks.learning.watch import Watch, peak_bytes, reset_peak
from examples.common import extract_answer
from tests.benchmarks.test_runner import SOURCE

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("name", SUMS)
def test_no_problem_is_in_both_splits_and_none_twice_in_the_evaluation(name):
    held_out, training = TASKS[name].held_out(), draw(name, 10_000, 200, 24)
    asked = [identity(entry["question"]) for entry in held_out.entries]
    assert len(set(asked)) == len(asked) == 24
    assert len(training) == 200
    assert not {identity(entry["question"]) for entry in training.entries} & set(asked)
    assert training.entries != draw(name, 10_001, 200, 24).entries


def test_too_many_problems_are_refused():
    with pytest.raises(ValueError, match="`count` must be at most"):
        draw("products", 777, 3000)


@pytest.mark.parametrize("name", SUMS)
def test_verifier_takes_the_answer_and_nothing_else(name):
    problems = draw(name, 777, 8)
    for index, entry in enumerate(problems.entries):
        answer = int(entry["answer"])
        assert problems.right(index, f"It is 3 and so on.\nAnswer: {answer}.")
        assert problems.right(index, f"5 and then {answer}")
        assert not problems.right(index, f"{answer}, or rather {answer + 1}")
        # The floor that a wrong answer gets from reasoning-gym is not a mark here.
        assert not problems.right(index, "I do not know.")
        assert BARE not in problems.prompt(index)[0]["content"]
    assert extract_answer("no digits") is None


def test_reward_wants_a_right_answer_after_enough_thought(monkeypatch):
    task = dataclasses.replace(TASKS["products"], min_thought=10)
    model = LlamaForCausalLM(tiny_config())

    class Words:
        def apply_chat_template(self, prompts, **kwargs):
            return {"input_ids": [[1] * 5 for _ in prompts]}

    monkeypatch.setattr(type(task), "tokenizer", lambda self: Words())
    rows = task.data(1, torch.Generator().manual_seed(3000))
    problems = draw("products", rows[0]["drawn"], len(rows), task.count)
    assert rows[3]["prompt"] == problems.prompt(3)
    logged, answer = {}, problems.entries[0]["answer"]
    texts = [f"Answer: {answer}", f"Answer: {answer}", "Answer: 1000"]
    found = task.reward(model)(
        prompts=[problems.prompt(0)] * 3,
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[1] * 10, [1] * 9, [1] * 12],
        problem=[0, 0, 0],
        drawn=[rows[0]["drawn"]] * 3,
        log_metric=logged.__setitem__,
    )
    assert found == [1.0, 0.0, 0.0]
    assert logged["right"] == pytest.approx(2 / 3)
    # 5 + 12 - 1 columns of 2 layers, keys and values, 2 heads of 8, float32, 3 rows.
    assert logged["full_cache_bytes"] == 3 * 16 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(("samples", "right", "k"), [(8, 3, 1), (8, 3, 4), (8, 0, 8), (8, 1, 8), (6, 5, 2), (5, 2, 5)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(samples, right, k):
    subsets = list(itertools.combinations(range(samples), k))
    share = sum(any(index < right for index in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(samples, right, k) == pytest.approx(share)


def test_pass_at_k_wants_enough_samples():
    with pytest.raises(ValueError, match="`k` must be between 1 and the 4 samples"):
        pass_at_k(4, 1, 8)
    with pytest.raises(ValueError, match="`right` must be between"):
        pass_at_k(4, 5, 2)


def test_intervals():
    # Wilson's own numbers for 8 of 10, to three digits.
    assert wilson(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    low, high = wilson(1.0, 20)
    assert low < 0.9
    assert high == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(400, generator=generator)
    mean, half = float(values.mean()), 1.96 * float(values.std()) / 400**0.5
    assert bootstrap(values.tolist()) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_only_long_enough_samples_are_solved():
    assert solved([[True, True], [False, True]], [[40, 20], [50, 36]], 36) == [[True, False], [False, True]]


def test_thoughts_outgrow_the_window():
    for task in (TASKS[name] for name in TASKS if name.startswith(SUMS)):
        leave = Settings(task.name, "slots", ()).config(task).tokens_per_eviction
        assert task.min_thought > task.window + leave
        assert task.samples >= report.K
        assert task.prompts * task.generations % task.score_together == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process its peak")
def test_peak_of_memory_is_counted_anew():
    device = torch.device("cpu")
    reset_peak(device)
    start = peak_bytes(device)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 60e6 < peak_bytes(device) - start < 90e6
    del block
    reset_peak(device)
    assert peak_bytes(device) - start < 30e6


def result(arm, seed=0, right=(4, 6)):
    """A record as a run writes it; half the samples are right before, three quarters after."""
    task = TASKS["products"]

    def evaluation(number):
        return {"right": [[i < number for i in range(8)]] * task.count, "lengths": [[40] * 8] * task.count}

    step = {"reward": 0.5, "tokens": 100, "seconds": 4.0, "rollout_seconds": 2.0, "max_log_ratio": 3e-6}
    held = {"full_cache_bytes": 7e6} if arm == "lora-full" else {"full_cache_bytes": 7e6, "pte/cache_bytes": 5e6}
    settings = Settings("products", arm, (Stage("grpo", 12, 3e-4, schedule="constant"),))
    stage = {"logs": [{**step, **held}] * 4, "peak_bytes": 2_500_000_000, "after": evaluation(right[1])}
    return {
        "name": settings.name,
        "task": "products",
        "arm": arm,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "sizes": dataclasses.asdict(task),
        "config": {"cache_window": None if arm == "lora-full" else task.window, "evict_ratio": 0.25},
        "before": evaluation(right[0]),
        "stages": [stage],
        "wall_seconds": 90.0,
        "source": SOURCE,
    }


def test_report():
    text = report.sums([result(arm) for arm in ("lora-full", "lora", "global-only", "linear")])
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    row = dict(zip(table[0], table[-1], strict=True))
    assert row["arm"] == "PTE, linear"
    assert row["pass@1 before"] == "50.0 (50.0 to 50.0)"
    assert row["gain"] == "+25.0 (+25.0 to +25.0)"
    assert row["pass@8 after"].startswith("100.0 (86")
    # Window of 24, of which 6 leave: the 25th token makes the first six leave, the 31st and the 37th the next.
    assert row["evictions"] == "3.0"
    assert row["tokens/s rollout / step"] == "50 / 25"
    assert row["cache MB"] == "5.0"
    assert row["max abs log ratio"] == "3e-06"


def test_report_takes_the_mean_over_seeds():
    text = report.sums([result("linear"), result("linear", seed=1, right=(4, 4))])
    assert "| 0, 1 |" in text
    assert "+12.5 (+12.5 to +12.5)" in text


def watched(scored):
    """A row of a watch of one completion of two tokens, sampled with log-probs of log 1/2 and scored with ``scored``."""
    watch = Watch()
    ids, mask = torch.tensor([[5, 7, 8]]), torch.ones(1, 3, dtype=torch.long)
    watch._sampled = {(5, 7, 8): torch.full((2,), 0.5).log()}
    watch._scoring(lambda *args: (scored, None))(torch.nn.Identity(), ids, mask, 2)
    return watch._row


def test_the_watch_sees_what_is_off_policy():
    on_policy = torch.full((1, 2), 0.5).log()
    assert watched(on_policy) == {"max_log_ratio": 0.0, "compared": 2}
    shifted = on_policy + torch.tensor([[0.0, -0.25]])
    assert watched(shifted)["max_log_ratio"] == pytest.approx(0.25)
    with pytest.raises(FloatingPointError, match="log ratio of sampled tokens is nan"):
        watched(on_policy * torch.nan)


def tiny_config():
    return LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random model of two layers that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("reasoning") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: index + 2 for index, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_arms_run_on_a_real_tokenizer(tiny_model, monkeypatch):
    small = {"max_completion": 48, "min_thought": 24, "prompts": 1, "count": 4, "model": str(tiny_model)}
    monkeypatch.setitem(TASKS, "products", dataclasses.replace(TASKS["products"], **small))
    found = {}
    for arm in ("lora-full", "lora", "slots"):
        record = run(Settings("products", arm, (Stage("grpo", 2, 3e-4, schedule="constant"),)), 0, 0)
        found[arm] = {**record, "source": SOURCE}
        (stage,) = record["stages"]
        assert [step["step"] for step in stage["logs"]] == [1, 2]
        for step in stage["logs"]:
            assert step["compared"] == step["tokens"] > 0
            assert step["max_log_ratio"] < 1e-4
            assert step["seconds"] >= step["rollout_seconds"] > 0
        for evaluation in (record["before"], stage["after"]):
            assert [len(row) for row in evaluation["right"]] == [8] * 4
    assert found["slots"]["before"]["lengths"] == found["lora"]["before"]["lengths"]
    assert [found[arm]["config"]["cache_window"] for arm in found] == [None, 24, 24]
    assert "LoRA, full cache" in report.sums(list(found.values()))
