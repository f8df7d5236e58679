"""Quantised bases, LoRA beside them: scoring agrees with the rollout as far as the base's own rounding lets it, adapters learn, are saved and loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from trl import GRPOConfig, GRPOTrainer

from peft_pte import PTEConfig, convert_lora
from tests.cases import make_base
from tests.helpers import SMALL, make_prompts, roll_out, thought_logits
from tests.integrations.common import make_tokenizer, pte_config
from tests.integrations.trainers import make_chat_tokenizer

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-pte[quantized]'")
pytest.importorskip("optimum.quanto", reason="needs quanto: pip install 'peft-pte[quantized]'")
torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'peft-pte[quantized]'")

WIDE = {"hidden_size": 64, "intermediate_size": 128}
HOW = {
    "bitsandbytes-nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bitsandbytes-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao-int8-activations": lambda: TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()),
    "quanto-int8": lambda: QuantoConfig(weights="int8"),
    "quanto-int4": lambda: QuantoConfig(weights="int4"),
}
EXACT = ("torchao-int8", "quanto-int8", "quanto-int4")
"""Weights alone are rounded. Elsewhere activations are too (bitsandbytes' kernel for 4 bits on a CPU takes them in bfloat16), so that numbers that
differ in the last digit can end a step apart."""
STEP = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model to quantise as it is loaded."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    make_base("llama", **WIDE).save_pretrained(folder)
    return folder


def load(folder, how):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HOW[how](), dtype=torch.float32, device_map="cpu"
    )


def adapted(base, **fields):
    torch.manual_seed(5)
    return get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **{**SMALL, **fields})).eval()


def disagreement(model):
    """Largest difference of a log-prob between rollout and scoring. No padding, as LoRA's rows need none either."""
    rollout = roll_out(model, make_prompts((6, 6, 6)), 40)
    with torch.no_grad():
        scored = thought_logits(model, rollout.truncated(40)).log_softmax(dim=-1)
    return float((scored - rollout.logits.log_softmax(dim=-1)).abs().max())


@pytest.mark.parametrize("how", HOW)
def test_scoring_agrees_with_the_rollout_as_under_lora(how, folder):
    torch.manual_seed(5)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    expected = disagreement(get_peft_model(load(folder, how), lora).eval())
    found = disagreement(adapted(load(folder, how)))
    # One draw of each: twice is not another order.
    assert found < 3 * expected + 1e-4
    assert (expected < 1e-3) == (how in EXACT)


@pytest.mark.parametrize("how", HOW)
def test_an_adapter_is_saved_and_loaded(how, folder, tmp_path):
    model = adapted(load(folder, how))
    batch = roll_out(model, make_prompts(), 30).truncated(30)
    with torch.no_grad():
        expected = thought_logits(model, batch)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(load(folder, how), tmp_path).eval()
    held = {name: value for name, value in model.state_dict().items() if ".pte_" in name}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in held.items())
    # bitsandbytes packs weights anew at the first token that is decoded on a CPU, and rounds otherwise from then on.
    roll_out(loaded, make_prompts(), 30)
    with torch.no_grad():
        assert torch.equal(thought_logits(loaded, batch), expected)


@pytest.mark.parametrize("how", HOW)
def test_a_lora_on_it_is_converted(how, folder):
    torch.manual_seed(5)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(load(folder, how), lora).eval()
    ids = torch.randint(1, 57, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
        converted = convert_lora(model, cache_window=8, prompt_end=4).eval()
        difference = (converted(ids).logits - expected).abs().max()
    assert difference < (1e-3 if how in EXACT else STEP)


@pytest.mark.parametrize("how", HOW)
def test_grpo_learns_on_it(how, folder, tmp_path):
    def reward(completion_ids, **kwargs):
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=load(folder, how),
        peft_config=pte_config(prompt_end=2),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4"] * 4}),
        processing_class=make_tokenizer(),
        args=GRPOConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=24,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert before
    assert all(torch.isfinite(after[name]).all() for name in before)
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) > len(before) / 2


def test_the_same_base_without_quantisation_agrees(folder):
    assert disagreement(adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))) < 1e-3


def test_the_example_runs(tmp_path):
    tokenizer = make_chat_tokenizer()
    torch.manual_seed(0)
    base = make_base("llama", **WIDE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = Path(__file__).resolve().parents[2] / "examples" / "qlora.py"
    command = [sys.executable, str(script), str(tmp_path / "model")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "pte/tokens_per_second" in run.stdout
    assert (tmp_path / "adapter-4bit" / "adapter_model.safetensors").exists()
