"""To the hub and back: pushes go to a stubbed API that keeps what it is given in a folder, and are loaded from there."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_pte import PTEConfig
from peft_pte.config import FORMAT_VERSION
from peft_pte.integrations.distillation import SelfDistillationConfig, SelfDistillationTrainer
from peft_pte.integrations.trl import PTECallback
from tests.cases import make_base
from tests.helpers import SMALL, assert_close, make_prompts, make_pte, roll_out, same_base, thought_logits
from tests.integrations.common import make_tokenizer, make_trl_base, pte_config

REPOSITORY = "someone/thinker"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder in which the repository lies after a push."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        assert repo_id == REPOSITORY
        for operation in operations:
            assert isinstance(operation, CommitOperationAdd)
            target = folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            source = operation.path_or_fileobj
            target.write_bytes(source if isinstance(source, bytes) else Path(source).read_bytes())

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
        assert repo_id == REPOSITORY
        shutil.copytree(folder_path, folder, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True)

    def nothing_there(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    for name, stub in (
        ("create_repo", create_repo),
        ("create_commit", create_commit),
        ("upload_folder", upload_folder),
    ):
        monkeypatch.setattr(HfApi, name, stub)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", _load_card(nothing_there))
    return folder


def _load_card(otherwise):
    from huggingface_hub import ModelCard

    load = ModelCard.load

    def load_card(path, *args, **kwargs):
        return load(path, *args, **kwargs) if Path(path).is_file() else otherwise()

    return staticmethod(load_card)


@pytest.fixture
def base_folder(tmp_path):
    """A base model that an adapter's config can name."""
    torch.manual_seed(0)
    make_base("llama", attn_implementation="eager").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_model_is_pushed_and_comes_back(hub, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    model = make_pte(base=base, prompt_end=4, eviction="key_diff")
    batch = roll_out(model, make_prompts(), 20).truncated(20)
    with torch.no_grad():
        expected = thought_logits(model, batch)
    model.push_to_hub(REPOSITORY)
    assert {path.name for path in hub.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(hub, attn_implementation="eager"),
        PeftModel.from_pretrained(same_base("llama", attn_implementation="eager"), hub),
        AutoModelForCausalLM.from_pretrained(hub, attn_implementation="eager"),
    ):
        with torch.no_grad():
            assert_close(thought_logits(loaded.eval(), batch), expected)


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        (
            {"prompt_end": [7, 8], "cache_window": 12},
            [
                "the prompt and 12 tokens after it; 3 leave at a time, chosen by `sliding_window`",
                "after the tokens `[7, 8]`",
            ],
        ),
        ({"prompt_end": 4, "eviction": "random"}, ["after its first 4 tokens", "chosen by `random`"]),
        ({"encoder_attention": "slots"}, ["what each call shows", "5 x 4 per sequence", "written by `slots`"]),
        ({"cache_window": None}, ["unbounded"]),
        ({"state_update": "off"}, ["LoRA under a bounded cache"]),
        ({"state_update": "frozen"}, ["Global-Only"]),
    ],
)
def test_the_card_says_what_the_adapter_is(fields, sentences, tmp_path):
    model = make_pte(**fields)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for sentence in [*sentences, "import peft_pte", "python -m peft_pte lm_eval run", f"files | {FORMAT_VERSION} |"]:
        assert card.count(sentence) >= 1, sentence
    assert card.count("## Progressive Thought Encoding") == 1


def test_a_card_follows_its_adapter(tmp_path):
    model = make_pte(cache_window=8)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    model.peft_config["default"].cache_window = 16
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert "the prompt and 16 tokens" in text
    assert "the prompt and 8 tokens" not in text
    assert text.count("My own words.") == 1


def sft(output_dir):
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["w3 w4"] * 2, "completion": ["w5 w6 w7"] * 2})
    arguments = SFTConfig(str(output_dir), max_steps=1, report_to=[], use_cpu=True, bf16=False, hub_model_id=REPOSITORY)
    return SFTTrainer(
        model=make_trl_base("llama"),
        peft_config=pte_config(),
        train_dataset=data,
        processing_class=make_tokenizer(),
        args=arguments,
    )


def distillation(output_dir):
    from datasets import Dataset

    arguments = SelfDistillationConfig(
        str(output_dir),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        hub_model_id=REPOSITORY,
        max_completion_length=4,
    )
    return SelfDistillationTrainer(
        model=make_trl_base("llama"),
        peft_config=pte_config(prompt_end=2),
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4"] * 8}),
        processing_class=make_tokenizer(),
        args=arguments,
    )


@pytest.mark.parametrize("make", [sft, distillation])
def test_a_trainer_pushes(make, hub, tmp_path):
    trainer = make(tmp_path / "run")
    if make is sft:
        PTECallback.attach(PTECallback.attach(trainer) and trainer)
    trainer.train()
    trainer.push_to_hub()
    card = (hub / "README.md").read_text()
    assert card.count("## Progressive Thought Encoding") == 1
    assert "import peft_pte" in card
    assert "trl" in card.split("---")[1]
    assert "peft-pte" in card.split("---")[1]
    fresh = make_trl_base("llama")
    loaded = PeftModel.from_pretrained(fresh, hub)
    trained = {name: value for name, value in trainer.model.state_dict().items() if ".pte_" in name}
    found = loaded.state_dict()
    assert trained
    assert all(torch.equal(found[name], value) for name, value in trained.items())


def stored(folder, change):
    """``folder`` with ``change`` made to its config."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def test_a_newer_adapter_is_refused(tmp_path):
    make_pte().save_pretrained(tmp_path)

    def newer(config):
        config.update(format_version=FORMAT_VERSION + 1, thought_gate="learned")

    stored(tmp_path, newer)
    for load in (
        lambda: PeftConfig.from_pretrained(tmp_path),
        lambda: PeftModel.from_pretrained(same_base(), tmp_path),
        lambda: same_base().load_adapter(tmp_path),
    ):
        with (
            pytest.warns(UserWarning, match="Unexpected keyword arguments"),
            pytest.raises(ValueError, match=r"saved by a newer peft_pte.*Upgrade peft_pte"),
        ):
            load()


def test_an_adapter_from_before_formats_were_numbered(tmp_path):
    # States were read by value alone then, and the file did not say so.
    model = make_pte(r=4, num_global_tokens=4, state_address="value")
    batch = roll_out(model, make_prompts(), 20).truncated(20)
    with torch.no_grad():
        expected = thought_logits(model, batch)
    model.save_pretrained(tmp_path)

    def older(config):
        for name in ("format_version", "state_address", "prompt_end", "eviction_options"):
            del config[name]

    loaded = PeftModel.from_pretrained(same_base("llama", attn_implementation="eager"), stored(tmp_path, older)).eval()
    assert loaded.peft_config["default"].state_address == "value"
    with torch.no_grad():
        assert torch.equal(thought_logits(loaded, batch), expected)
    assert PTEConfig(**SMALL).state_address == "key"


def test_a_format_is_a_number():
    with pytest.raises(TypeError, match="`format_version` must be an integer"):
        PTEConfig(format_version="1")


def test_an_adapter_of_another_name_has_its_card(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(make_base("llama"), PTEConfig(task_type="CAUSAL_LM", **SMALL), adapter_name="chat")
    (tmp_path / "README.md").write_text("# Somebody's project\n")
    model.save_pretrained(tmp_path / "saved")
    assert "## Progressive Thought Encoding" in (tmp_path / "saved" / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == "# Somebody's project\n"
