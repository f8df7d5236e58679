"""Self-distillation: the teacher is the model itself on its full cache, and nothing of the student is moved by asking it."""

import dataclasses

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM
from trl import DistillationConfig

from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import find_seam
from peft_pte.passes.fidelity import Fidelity, fidelity, logits_of, windows_of
from tests.cases import make_base
from tests.integrations.common import COMPLETION, WINDOW, make_tokenizer, make_trl_base, pte_config
from tests.integrations.trainers import (
    MARKER,
    PROMPTS,
    arguments,
    completion_data,
    completions,
    make_chat_tokenizer,
    prompt_data,
    question_data,
)


def make_trainer(tmp_path, model=None, config=None, data=None, tokenizer=None, **fields):
    fields = {"max_completion_length": COMPLETION, **fields}
    return SelfDistillationTrainer(
        model=make_trl_base() if model is None else model,
        args=arguments(SelfDistillationConfig, tmp_path, **fields),
        train_dataset=data or completion_data(),
        processing_class=tokenizer or make_tokenizer(),
        peft_config=pte_config(prompt_end=[MARKER]) if config is None else config,
    )


def watch(trainer, monkeypatch):
    """Every batch that the loss saw, with the loss."""
    seen = []
    compute = trainer._compute_loss

    def keep(student, inputs, count):
        result = compute(student, inputs, count)
        seen.append(({name: part.clone() for name, part in inputs.items()}, result[0].detach().clone()))
        return result

    monkeypatch.setattr(trainer, "_compute_loss", keep)
    return seen


def joined(batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, mask


def divergence(beta, student, teacher):
    """``[..., V]`` log-probs -> ``[...]``: arXiv 2306.13649, as TRL defines its ends."""

    def kl(of, to):
        return (of.exp() * (of - to)).sum(dim=-1)

    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loss_is_the_divergence_to_the_base_on_its_full_cache(family, beta, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_trl_base(family), beta=beta, learning_rate=0.0)
    alone = make_trl_base(family).eval()
    seen = watch(trainer, monkeypatch)
    trainer.train()
    ((batch, loss),) = seen
    ids, mask = joined(batch)
    columns = batch["completion_ids"].shape[1]
    with torch.no_grad():
        teacher = alone(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        student = trainer.model(input_ids=ids, attention_mask=mask).logits
    student, teacher = (logits[:, -columns - 1 : -1].float().log_softmax(dim=-1) for logits in (student, teacher))
    chosen = batch["completion_mask"].bool()
    assert mask.sum(dim=1).unique().numel() > 1
    expected = divergence(beta, student, teacher)[chosen].mean()
    assert expected > 0.05
    torch.testing.assert_close(loss, expected, atol=2e-5, rtol=1e-4)


def test_the_teacher_owns_nothing_and_moves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    before = {name: part.clone() for name, part in trainer.model.named_parameters()}
    flags = {name: part.requires_grad for name, part in trainer.model.named_parameters()}
    assert list(trainer.teacher_model.parameters()) == list(trainer.teacher_model.modules())[1:] == []
    modes = {name: part.training for name, part in trainer.model.named_modules()}
    with trainer.teacher_model.in_place():
        assert find_seam(trainer.model).active_adapter() is None
        assert not any(part.training for part in find_seam(trainer.model).model.modules())
    assert find_seam(trainer.model).active_adapter() == "default"
    assert modes == {name: part.training for name, part in trainer.model.named_modules()}
    trainer.train()
    for name, part in trainer.model.named_parameters():
        assert part.requires_grad == flags[name]
        assert torch.equal(part, before[name]) != part.requires_grad, name


def test_a_fresh_adapter_that_evicts_nothing_is_its_teacher(tmp_path, monkeypatch):
    config = pte_config(prompt_end=[MARKER], cache_window=2 * COMPLETION, init_weights=True)
    trainer = make_trainer(tmp_path, config=config)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    assert abs(float(seen[0][1])) < 1e-6
    (entry,) = (row for row in trainer.state.log_history if "loss" in row)
    assert entry["pte/ratio_p5"] == pytest.approx(1.0, abs=1e-5)
    assert entry["pte/kl"] == pytest.approx(0.0, abs=1e-6)
    assert entry["pte/kl_to_2w"] is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_the_divergence(checkpointing, tmp_path, monkeypatch):
    # With checkpoints the student is recomputed after the teacher was asked: the adapter must be back by then.
    trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing, max_grad_norm=1e9, learning_rate=0.0)
    seen = watch(trainer, monkeypatch)
    gradients = {}
    step = trainer.create_optimizer()

    def keep(*args, **kwargs):
        gradients.update(
            {name: part.grad.clone() for name, part in trainer.model.named_parameters() if part.requires_grad}
        )

    monkeypatch.setattr(step, "step", keep)
    trainer.train()
    ids, mask = joined(seen[0][0])
    columns = seen[0][0]["completion_ids"].shape[1]
    with torch.no_grad():
        teacher = make_trl_base()(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    student = trainer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    student, teacher = (logits[:, -columns - 1 : -1].log_softmax(dim=-1) for logits in (student, teacher))
    trainer.model.zero_grad()
    divergence(1.0, student, teacher)[seen[0][0]["completion_mask"].bool()].mean().backward()
    assert len(gradients) > 10
    for name, part in trainer.model.named_parameters():
        if part.requires_grad:
            torch.testing.assert_close(
                gradients[name], part.grad, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_student_writes_under_its_window(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, generation_kwargs={"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
    )
    seen = watch(trainer, monkeypatch)
    trainer.train()
    assert rows_of(seen[0][0]) != written(make_trl_base().eval())


def rows_of(batch):
    return {
        tuple(prompt[shown.bool()].tolist()): completion[kept.bool()].tolist()
        for prompt, shown, completion, kept in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        )
    }


def written(model):
    """What a model writes greedily, by prompt."""
    found, tokenizer = {}, make_tokenizer()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COMPLETION, do_sample=False)
        found[tuple(ids[0].tolist())] = rows[0, ids.shape[1] :].tolist()
    return found


def test_the_teacher_writes_on_its_full_cache(tmp_path, monkeypatch):
    greedy = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
    trainer = make_trainer(tmp_path, data=prompt_data(), lmbda=0.0, seq_kd=True, generation_kwargs=greedy)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    assert rows_of(seen[0][0]) == written(make_trl_base().eval())


def test_given_text_is_learned_from(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, lmbda=0.0, max_completion_length=COMPLETION + 2)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    tokenizer = make_tokenizer()
    expected = {
        tuple(tokenizer(prompt).input_ids): [*tokenizer(text).input_ids, tokenizer.eos_token_id][: COMPLETION + 2]
        for prompt, text in zip(PROMPTS, completions(7), strict=True)
    }
    assert sorted({len(ids) for ids in expected.values()}) == [COMPLETION + 1, COMPLETION + 2]
    assert rows_of(seen[0][0]) == expected


def test_given_messages_are_learned_from(tmp_path, monkeypatch):
    data = question_data().add_column(
        "completion", [[{"role": "assistant", "content": text}] for text in completions(7)]
    )
    trainer = make_trainer(tmp_path, data=data, tokenizer=make_chat_tokenizer(), lmbda=0.0, max_completion_length=64)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    tokenizer = make_tokenizer()
    # The template opens a turn with its marker, and ends an answer.
    expected = {
        tuple(tokenizer(f"w58 {prompt}").input_ids): [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        for prompt, text in zip(PROMPTS, completions(7), strict=True)
    }
    assert rows_of(seen[0][0]) == expected


def test_a_template_that_renders_prompts_otherwise_is_refused(tmp_path):
    data = question_data().add_column(
        "completion", [[{"role": "assistant", "content": text}] for text in completions(7)]
    )
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = "{% if messages[-1].role == 'assistant' %}w55 {% endif %}" + tokenizer.chat_template
    trainer = make_trainer(tmp_path, data=data, tokenizer=tokenizer, lmbda=0.0)
    with pytest.raises(ValueError, match="otherwise once it is answered"):
        trainer.train()


def test_what_a_template_puts_behind_an_answer_is_not_learned(tmp_path, monkeypatch):
    data = question_data().add_column(
        "completion", [[{"role": "assistant", "content": text}] for text in completions(7)]
    )
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos> ", "<eos> w55 ")
    trainer = make_trainer(tmp_path, data=data, tokenizer=tokenizer, lmbda=0.0, max_completion_length=64)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    assert all(ids[-1] == tokenizer.eos_token_id for ids in rows_of(seen[0][0]).values())
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 0


def test_a_template_that_drops_thinking_is_refused(tmp_path):
    data = question_data().add_column(
        "completion", [[{"role": "assistant", "content": text}] for text in completions(7)]
    )
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }} {% endgeneration %}", "{{ message.content[-3:] }} {% endgeneration %}"
    )
    trainer = make_trainer(tmp_path, data=data, tokenizer=tokenizer, lmbda=0.0)
    with pytest.raises(ValueError, match="leaves out a part of a `completion`"):
        trainer.train()


@pytest.mark.parametrize("completion", [None, "", []])
def test_text_that_is_not_there_is_refused(completion, tmp_path):
    trainer = make_trainer(tmp_path, data=prompt_data(completion=[completion] * 4), lmbda=0.0)
    with pytest.raises(ValueError, match="`completion` must be text, as `prompt` is"):
        trainer.train()


def test_messages_and_text_do_not_mix(tmp_path):
    data = question_data().add_column("completion", completions(7))
    trainer = make_trainer(tmp_path, data=data, tokenizer=make_chat_tokenizer(), lmbda=0.0)
    with pytest.raises(ValueError, match="`completion` must be messages, as `prompt` is"):
        trainer.train()


def test_a_stream_is_learned_from(tmp_path):
    rows = list(completion_data())
    stream = IterableDataset.from_generator(lambda: iter(rows * 2))
    trainer = make_trainer(tmp_path, data=stream, lmbda=0.0)
    trainer.train()
    assert "loss" in trainer.state.log_history[0]


def test_a_share_of_batches_is_written(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, lmbda=0.5, max_steps=12)
    seen = watch(trainer, monkeypatch)
    trainer.train()
    given = {tuple([*make_tokenizer()(text).input_ids, 1][:COMPLETION]) for text in completions(7)}
    shares = [sum(tuple(row) in given for row in rows_of(batch).values()) / 4 for batch, _ in seen]
    assert set(shares) == {0.0, 1.0}
    again = make_trainer(tmp_path, lmbda=0.5, max_steps=12)
    repeated = watch(again, monkeypatch)
    again.train()
    assert [rows_of(batch) for batch, _ in seen] == [rows_of(batch) for batch, _ in repeated]


def test_it_learns(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30, learning_rate=3e-3)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert sum(row["pte/kl"] for row in logs[-5:]) < 0.9 * sum(row["pte/kl"] for row in logs[:5])
    # With a rate of learning that falls, and one measured batch to a log, both say the same.
    assert logs[-1]["pte/kl"] == pytest.approx(logs[-1]["loss"], abs=1e-3)


def test_an_evaluation_is_measured(tmp_path):
    trainer = make_trainer(tmp_path, eval_on_start=True, lmbda=0.0)
    trainer.eval_dataset = completion_data()
    metrics = trainer.evaluate()
    trainer.log(metrics)
    assert any("eval_pte/ratio_p5" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_figures_are_those_of_the_whole_batch(micro_batch, tmp_path):
    # The four completions are of different lengths, and so are their tokens' places in the order.
    fields = {"lmbda": 0.0, "learning_rate": 0.0, "max_completion_length": COMPLETION + 4}
    whole = make_trainer(tmp_path / "whole", data=uneven_data(), **fields)
    split = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 4 // micro_batch}
    parts = make_trainer(tmp_path / "parts", data=uneven_data(), **fields, **split)
    logs = []
    for trainer in (whole, parts):
        trainer.train()
        logs.append({name: value for name, value in trainer.state.log_history[0].items() if name.startswith("pte/")})
    assert set(logs[0]) == {
        "pte/ratio_p5",
        "pte/kl",
        *(f"pte/kl_{name}" for name in ("to_1w", "to_2w", "to_4w", "beyond")),
    }
    for name, value in logs[0].items():
        assert logs[1][name] == (None if value is None else pytest.approx(value, rel=1e-4)), name
    assert logs[0]["pte/kl"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-4)


def uneven_data():
    texts = ["w9", "w5 w6", *completions(7)[2:]]
    return prompt_data(completion=[f" {text}" for text in texts])


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "epoch"}, [1, 2, 3, 4]),
    ],
    ids=str,
)
def test_whatever_is_logged_is_measured(fields, measured, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, **fields)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "pte/kl" in row] == measured
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == measured


def test_other_processes_are_gathered():
    mine = Fidelity(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.0]))
    both = mine.gathered(lambda rows: torch.cat([rows, torch.full((2, 3), torch.nan), torch.tensor([[3.0, 4.0, 0.5]])]))
    assert [part.tolist() for part in (both.log_ratio, both.kl, both.windows)] == [[1.0, 3.0], [2.0, 4.0], [0.0, 0.5]]


def test_frozen_parameters_stay_frozen(tmp_path):
    trainer = make_trainer(tmp_path)
    first = next(part for part in trainer.model.parameters() if part.requires_grad)
    first.requires_grad_(False)
    trainer.train()
    assert not first.requires_grad
    assert first.grad is None
    assert any(part.requires_grad for part in trainer.model.parameters())


def test_a_wrapped_model_is_taken(tmp_path, monkeypatch):
    model = get_peft_model(make_trl_base(), pte_config(prompt_end=[MARKER]))
    args = arguments(SelfDistillationConfig, tmp_path, max_completion_length=COMPLETION)
    trainer = SelfDistillationTrainer(
        model=model, args=args, train_dataset=prompt_data(), processing_class=make_tokenizer()
    )
    trainer.train()
    assert "loss" in trainer.state.log_history[0]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`lmbda` must be from 0 to 1"):
        arguments(SelfDistillationConfig, tmp_path, lmbda=1.5)
    with pytest.raises(ValueError, match="`use_vllm` must be False"):
        arguments(SelfDistillationConfig, tmp_path, use_vllm=True)
    with pytest.raises(ValueError, match="must have a column `completion`"):
        make_trainer(tmp_path, data=prompt_data(), lmbda=0.5)
    with pytest.raises(ValueError, match="`prompt_end` of the adapter's config"):
        make_trainer(tmp_path, config=pte_config())
    with pytest.raises(TypeError, match="`args` must be a SelfDistillationConfig, got DistillationConfig"):
        SelfDistillationTrainer(make_trl_base(), arguments(DistillationConfig, tmp_path), completion_data())
    frozen = get_peft_model(make_trl_base(), pte_config(prompt_end=[MARKER]))
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        SelfDistillationTrainer(
            frozen, arguments(SelfDistillationConfig, tmp_path), completion_data(), None, make_tokenizer()
        )
    disabled = get_peft_model(make_trl_base(), pte_config(prompt_end=[MARKER]))
    disabled.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="must be active, and is disabled"):
        SelfDistillationTrainer(
            disabled, arguments(SelfDistillationConfig, tmp_path), completion_data(), None, make_tokenizer()
        )
    injected = make_trl_base()
    injected.add_adapter(pte_config(prompt_end=[MARKER]))
    with pytest.raises(ValueError, match="must be a PeftModel, got LlamaForCausalLM"):
        SelfDistillationTrainer(
            injected, arguments(SelfDistillationConfig, tmp_path), completion_data(), None, make_tokenizer()
        )
    with pytest.raises(ValueError, match="must carry a PTE adapter"):
        make_trainer(tmp_path, config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    args = arguments(SelfDistillationConfig, tmp_path, lmbda=0.5)
    with pytest.raises(ValueError, match="`tools` would be called"):
        SelfDistillationTrainer(
            make_trl_base(), args, completion_data(), None, make_tokenizer(), peft_config=pte_config(), tools=[len]
        )


# Fidelity ----------------------------------------------------------------------------------------------------------------------


def test_figures_by_distance():
    log_ratio = torch.tensor([0.0, -1.0, -2.0, -3.0])
    kl, windows = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 1.5, 9.0])
    figures = Fidelity(log_ratio, kl, windows).figures()
    assert figures["kl"] == 2.5
    assert [figures[f"kl_{name}"].item() for name in ("to_1w", "to_2w", "beyond")] == [1.5, 3.0, 4.0]
    assert figures["kl_to_4w"].isnan()
    # Linear between the two lowest of four: at 0.15 of the way.
    assert figures["ratio_p5"].item() == pytest.approx(torch.tensor(-3.0 + 0.15).exp().item())


def test_a_few_tokens_at_once_are_all_tokens(monkeypatch):
    torch.manual_seed(0)
    base = make_base("llama").float()
    head, width, count = base.get_output_embeddings(), base.config.hidden_size, 23
    hidden = (torch.randn(count, width), torch.randn(count, width))
    tokens = torch.randint(base.config.vocab_size, (count,))
    whole = fidelity(hidden, (head, head), tokens, torch.zeros(count), base.config, 0.7)
    monkeypatch.setattr("peft_pte.passes.fidelity._LOGITS_AT_ONCE", 5 * base.config.vocab_size)
    parts = fidelity(hidden, (head, head), tokens, torch.zeros(count), base.config, 0.7)
    logs = [(head(rows) / 0.7).log_softmax(dim=-1) for rows in hidden]
    for found in (whole, parts):
        torch.testing.assert_close(found.kl, divergence(1.0, *logs))
        at = tokens[:, None]
        torch.testing.assert_close(found.log_ratio, (logs[0].gather(1, at) - logs[1].gather(1, at))[:, 0])
    assert (
        len(fidelity(tuple(rows[:0] for rows in hidden), (head, head), tokens[:0], torch.zeros(0), base.config).kl) == 0
    )


def make_cohere():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CohereForCausalLM(CohereConfig(vocab_size=60, logit_scale=0.25, **sizes)).eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2"])
def test_logits_are_those_of_the_model(family):
    torch.manual_seed(0)
    base = make_cohere() if family == "cohere" else make_base(family).eval()
    ids = torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        output = base(input_ids=ids, output_hidden_states=True)
        hidden = base.base_model(input_ids=ids).last_hidden_state
        logits = logits_of(base.get_output_embeddings(), hidden, base.config.get_text_config())
    torch.testing.assert_close(logits, output.logits.float(), atol=1e-5, rtol=1e-5)


def test_windows_are_counted_from_where_thinking_starts():
    ids = torch.tensor([[0, 0, 5, MARKER, 7, 8, 9], [5, MARKER, 7, 8, 9, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    config = pte_config(prompt_end=[MARKER], cache_window=WINDOW)
    found = windows_of(config, ids, mask, 4) * WINDOW
    assert found[0].tolist() == [0, 1, 2, 3]
    assert found[1, 0].tolist() == 2
    assert windows_of(dataclasses.replace(config, cache_window=None), ids, mask, 4).tolist() == [[0.0] * 4] * 2
    assert (windows_of(pte_config(prompt_end=1), ids, mask, 4) * WINDOW)[0].tolist() == [1, 2, 3, 4]


def test_columns_of_images_are_left_to_trl(tmp_path):
    trainer = make_trainer(tmp_path, data=Dataset.from_dict({"prompt": PROMPTS, "other": [1, 2, 3, 4]}))
    trainer._set_signature_columns_if_needed()
    assert set(trainer._signature_columns) == {"prompt", "image", "images", "completion"}
