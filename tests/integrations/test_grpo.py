"""TRL's GRPOTrainer, unmodified."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOTrainer

from peft_pte.integrations.trl import PTECallback, find_seam
from peft_pte.passes.fidelity import text_fidelity
from peft_pte.seam import Seam
from tests.helpers import trainable
from tests.integrations.common import (
    COMPLETION,
    WINDOW,
    grpo_config,
    make_prompts_data,
    make_tokenizer,
    make_trl_base,
    pte_config,
    share_of_small_tokens,
)


def make_trainer(tmp_path, model=None, config=None, callbacks=None, reward=share_of_small_tokens, **fields):
    model = make_trl_base() if model is None else model
    torch.manual_seed(5)
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=grpo_config(tmp_path, **fields),
        train_dataset=make_prompts_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
        callbacks=callbacks,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class RecordLogProbs(LogitsProcessor):
    """Sees the distribution that each token is sampled from."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.log_softmax(dim=-1))
        return scores


def first_log_ratio(trainer, monkeypatch):
    """Largest |log ratio| between what the trainer scores and what its rollout sampled from, and the longest completion."""
    recorder, sampled, compared = RecordLogProbs(), {}, []
    host = trainer.model.get_base_model()
    generate = host.generate

    def recorded_generate(*args, **kwargs):
        recorder.steps.clear()
        sequences = generate(*args, logits_processor=LogitsProcessorList([recorder]), **kwargs)
        steps = torch.stack(recorder.steps, dim=1)
        completions = sequences[:, -steps.shape[1] :]
        for tokens, row, log_probs in zip(sequences, completions, steps, strict=True):
            # The trainer shuffles what it generated: find a row again by its tokens, padding apart.
            sampled[tuple(tokens[tokens != 0].tolist())] = log_probs.gather(-1, row[:, None])[:, 0]
        return sequences

    score = trainer._get_per_token_logps_and_entropies

    def recorded_score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        for tokens, mask, log_probs in zip(input_ids, attention_mask.bool(), result[0].detach(), strict=True):
            expected = sampled[tuple(tokens[tokens != 0].tolist())]
            kept = mask[-logits_to_keep:]
            difference = (log_probs - expected[: len(log_probs)])[kept]
            compared.append((difference.abs().max().item(), int(kept.sum())))
        return result

    monkeypatch.setattr(host, "generate", recorded_generate)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", recorded_score)
    trainer.train()
    ratios, lengths = zip(*compared, strict=True)
    return max(ratios), max(lengths)


@pytest.mark.parametrize(
    ("family", "training", "fields"),
    [
        ("llama", {}, {}),
        ("gpt2", {}, {}),
        ("qwen3", {}, {}),
        ("llama", {"cache_implementation": "static"}, {"offload": True}),
        ("qwen3", {"cache_implementation": "static"}, {"recompute_layers": False}),
        ("gpt2", {}, {"state_address": "value"}),
        ("qwen3", {"cache_implementation": "static"}, {"state_address": "value", "offload": True}),
    ],
    ids=str,
)
def test_importance_ratio_is_one_on_the_first_iteration(family, training, fields, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_trl_base(family), pte_config(**fields), max_steps=1, **training)
    ratio, longest = first_log_ratio(trainer, monkeypatch)
    assert longest > 2 * WINDOW
    assert ratio < 1e-4


def test_lora_with_the_cache_bolted_on_fails_that_test(tmp_path, monkeypatch):
    # What a user would try: plain LoRA, generating with a bounded cache, scored by TRL on the full sequence.
    base = make_trl_base()
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    bolted = get_peft_model(make_trl_base(), pte_config(state_update="off", init_weights=True))
    bolted_host = bolted.get_base_model()
    # LoRA's weights under the bounded cache of the same model: merge them into the copy that generates.
    with torch.no_grad():
        merged = get_peft_model(make_trl_base(), lora)
        merged.load_state_dict(model.state_dict())
        for name, parameter in merged.merge_and_unload().named_parameters():
            target = bolted_host.get_submodule(name.rpartition(".")[0])
            getattr(getattr(target, "base_layer", target), name.rpartition(".")[2]).copy_(parameter)
    model.get_base_model().generate = bolted_host.generate
    trainer = make_trainer(tmp_path, model, max_steps=1)
    ratio, longest = first_log_ratio(trainer, monkeypatch)
    assert longest > 2 * WINDOW
    assert ratio > 1e-2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_checkpointing": False},
        {"beta": 0.1},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {"mask_truncated_completions": True},
        {"loss_type": "grpo", "scale_rewards": "none"},
        {"importance_sampling_level": "sequence"},
    ],
    ids=str,
)
def test_trains(fields, tmp_path):
    trainer = make_trainer(tmp_path, config=pte_config(), **fields)
    before = {name: parameter.detach().clone() for name, parameter in trainable(trainer.model).items()}
    trainer.train()
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))
    changed = [name for name, parameter in trainable(trainer.model).items() if not torch.equal(parameter, before[name])]
    assert {name.split(".pte_")[1].split(".")[0] for name in changed} == {
        "down",
        "up",
        "global_tokens",
        "query",
        "key",
        "value",
    }


def test_ratio_stays_one_with_kept_log_probs(tmp_path):
    # Two iterations on one batch: the first is on-policy, measured by the trainer itself against kept log-probs.
    trainer = make_trainer(tmp_path, config=pte_config(), num_iterations=2, max_steps=2, learning_rate=0.0)
    trainer.train()
    for entry in trainer.state.log_history:
        if "clip_ratio/high_max" in entry:
            assert entry["clip_ratio/high_max"] == 0.0
            assert entry["clip_ratio/low_min"] == 0.0


def test_an_already_wrapped_model_gets_a_reference_adapter(tmp_path):
    model = get_peft_model(make_trl_base(), pte_config())
    trainer = make_trainer(tmp_path, model, beta=0.1)
    assert set(model.peft_config) == {"default", "ref"}
    weights = dict(model.named_parameters())
    copies = {name for name in weights if ".ref." in name}
    assert copies
    assert all(torch.equal(weights[name], weights[name.replace(".ref.", ".default.")]) for name in copies)
    reference = {name: weights[name].detach().clone() for name in copies}
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    # The reference is the policy itself until it moves.
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 0
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], reference[name]) for name in copies)


@pytest.mark.parametrize("address", ["value", "key"])
def test_resumed_run_equals_the_uninterrupted_one(address, tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = make_trainer(tmp_path / "whole", config=pte_config(state_address=address), **fields)
    whole.train()
    torch.manual_seed(97)  # An adapter that equals the other one only if it is loaded.
    model = get_peft_model(make_trl_base(), pte_config(state_address=address))
    resumed = make_trainer(tmp_path / "whole", model, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4, abs=1e-7)
    for name, parameter in trainable(whole.model).items():
        torch.testing.assert_close(dict(resumed.model.named_parameters())[name], parameter, rtol=1e-4, atol=1e-6)


def test_resumed_with_its_reference_adapter(tmp_path):
    def trainer_of(seed, folder):
        base = make_trl_base()
        torch.manual_seed(seed)
        return make_trainer(folder, get_peft_model(base, pte_config()), beta=0.1, save_strategy="steps", save_steps=2)

    whole = trainer_of(91, tmp_path / "whole")
    whole.train()
    resumed = trainer_of(92, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for adapter in ("default", "ref"):
        tensors = get_peft_model_state_dict(resumed.model, adapter_name=adapter)
        for name, expected in get_peft_model_state_dict(whole.model, adapter_name=adapter).items():
            assert torch.equal(tensors[name], expected), (adapter, name)
    assert set(trainable(resumed.model)) == set(trainable(whole.model))


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    found = []
    for checkpointing in (True, False):
        trainer = make_trainer(
            tmp_path, config=pte_config(), gradient_checkpointing=checkpointing, max_steps=3, learning_rate=1e-3
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)


def test_reward_goes_up(tmp_path):
    trainer = make_trainer(
        tmp_path,
        config=pte_config(init_weights=True),
        max_steps=60,
        per_device_train_batch_size=16,
        num_generations=16,
        learning_rate=2e-2,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_rollouts_use_the_bounded_cache(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, config=pte_config(), max_steps=1)
    seen = []
    original = Seam.observe

    def counting(self, cache, *arguments, **named):
        seen.append(cache.evictions)
        return original(self, cache, *arguments, **named)

    monkeypatch.setattr(Seam, "observe", counting)
    trainer.train()
    assert max(seen) >= (COMPLETION - WINDOW) // 2 - 2


def test_callback_logs(tmp_path):
    trainer = make_trainer(tmp_path, config=pte_config(), callbacks=[PTECallback()])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries
    for entry in entries:
        assert 0 < entry["pte/evictions_per_sequence"] <= (COMPLETION - WINDOW) / 2
        assert entry["pte/state_norm"] == pytest.approx(1.0, abs=1e-4)
        assert 0 < entry["pte/cache_bytes"] < entry["pte/full_cache_bytes"]
        assert entry["pte/tokens_per_second"] > 0
        assert "pte/kl" not in entry
    json.dumps(entries)


def test_callback_logs_the_distance_to_the_full_cache(tmp_path):
    trainer = make_trainer(tmp_path, config=pte_config())
    PTECallback.attach(trainer, full_cache_kl=True)
    seam = find_seam(trainer.model)
    texts = []

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            texts.append(seam.statistics.text)

    trainer.add_callback(Keeps())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(texts) == len(entries) > 0
    # The first log is of the adapter after its first step; the last, of the one that there is now.
    tokens = text_fidelity(seam, texts[-1])
    assert entries[-1]["pte/kl"] == pytest.approx(tokens.kl.mean().item(), rel=1e-4)
    assert all(entry["pte/kl"] > 0 and 0 < entry["pte/ratio_p5"] <= 1 for entry in entries)
    assert seam.statistics.text is None
    assert not seam.statistics.keep_text


def test_attached_callback_is_seen_by_reporters(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    reporter = Reporter()
    trainer = make_trainer(tmp_path, config=pte_config(), callbacks=[reporter])
    PTECallback.attach(trainer)
    trainer.train()
    assert any("pte/cache_bytes" in logs for logs in reporter.seen)


def test_saved_adapter_is_reloaded(tmp_path):
    from peft import PeftModel

    trainer = make_trainer(tmp_path, config=pte_config())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make_trl_base(), tmp_path / "saved")
    for name, parameter in trainable(trainer.model).items():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)


def test_vllm_sync_would_be_refused(tmp_path):
    # TRL pushes merged weights to vLLM; this is the call it makes.
    trainer = make_trainer(tmp_path, config=pte_config())
    with pytest.raises(NotImplementedError, match="use_vllm=False"):
        trainer.model.merge_adapter()


@pytest.mark.parametrize("form", [None, "static"])
def test_continuous_batching_trains_on_what_it_wrote(form, tmp_path, monkeypatch):
    # More requests than rows, and old log-probs of a step that is taken twice.
    trainer = make_trainer(
        tmp_path,
        config=pte_config(),
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"max_requests_per_batch": 3, "return_logprobs": True},
        cache_implementation=form,
        per_device_train_batch_size=8,
        max_steps=2,
    )
    host, written, compared = trainer.model.get_base_model(), {}, []
    generate_batch, score = host.generate_batch, trainer._get_per_token_logps_and_entropies

    def recorded(*args, **kwargs):
        outputs = generate_batch(*args, **kwargs)
        for output in outputs.values():
            written[(*output.prompt_ids, *output.generated_tokens)] = torch.tensor(output.logprobs)
        return outputs

    def recorded_score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        for tokens, mask, log_probs in zip(input_ids, attention_mask.bool(), result[0].detach(), strict=True):
            expected = written[tuple(tokens[mask].tolist())]
            compared.append((log_probs[mask[-logits_to_keep:]] - expected).abs().max().item())
        return result

    monkeypatch.setattr(host, "generate_batch", recorded)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", recorded_score)
    before = {name: parameter.detach().clone() for name, parameter in trainable(trainer.model).items()}
    trainer.train()
    assert len(compared) >= 16
    assert max(compared) < 1e-4
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trainable(trainer.model).items())
