"""Whatever opens an adapter opens all of it, or fails and changes nothing."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.peft import PeftAdapterMixin

from peft_pte import PTEConfig
from peft_pte.host.compat import LOADER_METHOD
from peft_pte.seam import Seam
from tests.cases import TWO_FAMILIES
from tests.helpers import SMALL, make_prompts, make_pte, roll_out, same_base, thought_logits, trainable

WINDOW = SMALL["cache_window"]
WEIGHTS = "adapter_model.safetensors"


def tensors_of(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def snapshot(model):
    """Every parameter by the name it has in the base model, and whether it is trained."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): (parameter.clone(), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def assert_untouched(model, before, new=""):
    """All that was there is as it was; ``new`` may have been added."""
    after = {name: value for name, value in snapshot(model).items() if not new or f".{new}." not in name}
    assert after.keys() == before.keys()
    for name, (value, trained) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1] == trained, name


@pytest.fixture
def saved(tmp_path):
    """An adapter in a folder, its base model in another one, and the adapter's tensors."""
    base = same_base()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = make_pte(base=base)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tensors_of(model)


def add_and_save(folder, tmp_path):
    """An adapter of a model that transformers itself adapts and saves, made from the one in ``folder``."""
    model = same_base()
    model.add_adapter(PTEConfig(task_type="CAUSAL_LM", **SMALL))
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    model.save_pretrained(tmp_path / "again")
    return tmp_path / "again"


def loaded_by_transformers(folder, **kwargs):
    base = same_base()
    base.load_adapter(str(folder), **kwargs)
    return base


LOADERS = {
    "PeftModel.from_pretrained": lambda folder: PeftModel.from_pretrained(same_base(), folder),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(same_base(), folder, low_cpu_mem_usage=True),
    "torch_device": lambda folder: PeftModel.from_pretrained(same_base(), folder, torch_device="cpu"),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained,
    "load_adapter": loaded_by_transformers,
    "load_adapter, trainable": lambda folder: loaded_by_transformers(folder, is_trainable=True),
    "load_adapter, low_cpu_mem_usage": lambda folder: loaded_by_transformers(folder, low_cpu_mem_usage=True),
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "from_pretrained, device_map": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, device_map={"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "": "cpu"}
    ),
}


@pytest.mark.parametrize("again", [False, True], ids=["peft's folder", "transformers' folder"])
@pytest.mark.parametrize("loader", LOADERS)
def test_all_of_it_is_loaded(loader, again, saved, tmp_path):
    folder, expected = saved
    if again:
        folder = add_and_save(folder, tmp_path)
        if "Auto" in loader or "from_pretrained" in loader:
            # transformers writes the name of the base model that it knows: none here.
            (folder / "adapter_config.json").write_text((saved[0] / "adapter_config.json").read_text())
    model = LOADERS[loader](folder)
    assert_same(tensors_of(model), expected)
    assert bool(trainable(model)) == ("trainable" in loader)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("how", ["peft", "low_cpu_mem_usage", "transformers"])
@pytest.mark.parametrize("address", ["value", "key"])
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_loaded_adapter_computes_what_the_saved_one_did(family, address, how, tmp_path):
    model = make_pte(family, state_address=address)
    batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
    with torch.no_grad():
        expected = thought_logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = same_base(family)
    if how == "transformers":
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = PeftModel.from_pretrained(loaded, tmp_path, low_cpu_mem_usage=how == "low_cpu_mem_usage")
    assert not trainable(loaded)
    for parameter in loaded.parameters():
        # Weights in a mapped file are not aligned as others are, and products round differently there.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(thought_logits(loaded, batch), expected)


def test_loaded_as_trainable(saved):
    loaded = PeftModel.from_pretrained(same_base(), saved[0], is_trainable=True)
    assert trainable(loaded).keys() == trainable(make_pte()).keys()


@pytest.mark.parametrize("door", ["peft", "transformers"])
def test_modules_to_save(door, tmp_path):
    model = make_pte(modules_to_save=["lm_head"])
    assert any("lm_head.modules_to_save" in name for name in trainable(model))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    model.save_pretrained(tmp_path)
    base = same_base()
    if door == "peft":
        base = PeftModel.from_pretrained(base, tmp_path)
    else:
        base.load_adapter(str(tmp_path))
    assert_same(tensors_of(base), tensors_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transformers_loads_into_the_dtype_of_the_base(dtype, saved):
    folder, expected = saved
    model = same_base().to(dtype)
    model.load_adapter(str(folder))
    assert_same(tensors_of(model), {name: tensor.to(dtype) for name, tensor in expected.items()})
    roll_out(model, make_prompts(), 2 * WINDOW)


def test_adapter_state_dict(saved):
    folder, expected = saved
    base = same_base()
    config = PTEConfig.from_pretrained(folder)
    base.load_adapter(peft_config=config, adapter_state_dict=load_file(folder / WEIGHTS), adapter_name="given")
    assert_same(tensors_of(base, "given"), expected)


def test_several_adapters_by_transformers(saved, tmp_path):
    folder, first = saved
    torch.manual_seed(7)
    other = make_pte(seed=7)
    second = tensors_of(other)
    other.save_pretrained(tmp_path / "other")
    model = same_base()
    model.load_adapter(str(folder), adapter_name="first")
    model.load_adapter(str(tmp_path / "other"), adapter_name="model")  # a name that other names contain
    assert_same(tensors_of(model, "first"), first)
    assert_same(tensors_of(model, "model"), second)
    model.set_adapter("model")
    model.save_pretrained(tmp_path / "again")
    assert_same(tensors_of(PeftModel.from_pretrained(same_base(), tmp_path / "again")), second)


def test_several_adapters_by_peft(saved, tmp_path):
    folder, first = saved
    model = make_pte(base=same_base(), seed=3)
    model.load_adapter(folder, "other")
    assert_same(tensors_of(model, "other"), first)
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(same_base(), tmp_path / "both" / "other", adapter_name="one")
    again.load_adapter(tmp_path / "both", "rest")
    assert_same(tensors_of(again, "one"), first)
    assert_same(tensors_of(again, "rest"), tensors_of(model))


@pytest.mark.parametrize("name", ["0", "mlp", "weight", "pte", "thought_encoder"])
def test_an_adapter_with_the_name_of_something_else(name, saved):
    folder, expected = saved
    assert_same(tensors_of(PeftModel.from_pretrained(same_base(), folder, adapter_name=name), name), expected)
    assert_same(tensors_of(loaded_by_transformers(folder, adapter_name=name), name), expected)


def test_the_file_of_torch(saved):
    folder, expected = saved
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert_same(tensors_of(LOADERS["PeftModel.from_pretrained"](folder)), expected)
    assert_same(tensors_of(loaded_by_transformers(folder, use_safetensors=False)), expected)
    # transformers 5.23 does not look for it in a local folder unless it is told to.
    base = same_base()
    before = snapshot(base)
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        base.load_adapter(str(folder))
    assert_untouched(base, before)


def test_a_subfolder(saved):
    folder, expected = saved
    root, name = str(folder.parent), folder.name
    assert_same(tensors_of(PeftModel.from_pretrained(same_base(), root, subfolder=name)), expected)
    assert_same(tensors_of(loaded_by_transformers(root, adapter_kwargs={"subfolder": name})), expected)


def test_a_snapshot_of_the_hub(saved, tmp_path):
    folder, _ = saved
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--user--x"
    snapshot = repo / "snapshots" / commit
    (snapshot / "sub").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name in ("adapter_config.json", WEIGHTS):
        (repo / "blobs" / name).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(repo / "blobs" / name)
        (snapshot / "sub" / name).symlink_to(repo / "blobs" / name)
    script = f"""
        import torch, peft_pte
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        expected = load_file({str(folder / WEIGHTS)!r})
        base = lambda: AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
        by_transformers, in_subfolder = base(), base()
        by_transformers.load_adapter("user/x")
        in_subfolder.load_adapter("user/x", adapter_kwargs={{"subfolder": "sub"}})
        for model in (
            PeftModel.from_pretrained(base(), "user/x"),
            by_transformers,
            in_subfolder,
            AutoModelForCausalLM.from_pretrained("user/x"),
        ):
            found = {{key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}}
            assert len(found) == len(expected)
            assert all(torch.equal(found[key.removeprefix("base_model.model.")], value) for key, value in expected.items())
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)


@pytest.mark.parametrize("index", ["model", "adapter_model"])
def test_no_loader_reads_a_sharded_adapter_and_each_says_so(index, saved, tmp_path):
    # transformers writes them if it is asked to; peft 0.21 and transformers 5.23 look for one file.
    model = loaded_by_transformers(saved[0])
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="2KB")
    (folder / "model.safetensors.index.json").rename(folder / f"{index}.safetensors.index.json")
    (folder / "adapter_config.json").write_text((saved[0] / "adapter_config.json").read_text())
    with pytest.raises((OSError, ValueError)):
        PeftModel.from_pretrained(same_base(), folder)
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        AutoModelForCausalLM.from_pretrained(folder)
    base = same_base()
    before = snapshot(base)
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        base.load_adapter(str(folder))
    assert_untouched(base, before)


def drop(tensors, name):
    del tensors[name]


def reshape(tensors, name):
    tensors[name] = torch.zeros(2, 3)


def spoil(tensors, name):
    tensors[name][-1, -1] = torch.nan


def of_another_layer(tensors, name):
    tensors[name] = torch.zeros(4, 16)


def of_the_base(tensors, name):
    tensors[name] = torch.zeros(32)


PREFIX = "base_model.model.model."
DAMAGES = {
    "encoder tensor missing": (drop, f"{PREFIX}layers.1.self_attn.pte_query.weight", "is missing"),
    "linear tensor missing": (drop, f"{PREFIX}layers.1.mlp.up_proj.pte_up.weight", "is missing"),
    "encoder shape": (reshape, f"{PREFIX}layers.0.self_attn.pte_global_tokens.weight", "has another shape"),
    "linear shape": (reshape, f"{PREFIX}layers.0.mlp.up_proj.pte_down.weight", "has another shape"),
    "encoder nan": (spoil, f"{PREFIX}layers.2.self_attn.pte_value.weight", "is not finite"),
    "linear nan": (spoil, f"{PREFIX}layers.2.mlp.up_proj.pte_up.weight", "is not finite"),
    "extra encoder": (of_another_layer, f"{PREFIX}layers.7.self_attn.pte_key.weight", "is in the file and not in"),
    "extra linear": (of_another_layer, f"{PREFIX}layers.0.mlp.x_proj.pte_up.weight", "is in the file and not in"),
    "extra of any kind": (of_another_layer, f"{PREFIX}layers.0.mlp.x_proj.lora_A.weight", "is in the file and not in"),
    "a weight of the base": (of_the_base, f"{PREFIX}norm.weight", "belongs to the base model"),
}


def raises(damage):
    _, name, what = DAMAGES[damage]
    parts = [part for part in name.removeprefix(PREFIX).removesuffix(".weight").split(".") if part != "self_attn"]
    return pytest.raises(ValueError, match="no weight was changed: .*" + ".*".join(parts) + f".*{what}")


@pytest.fixture(params=DAMAGES)
def damaged(request, saved):
    folder, _ = saved
    apply, name, _ = DAMAGES[request.param]
    tensors = load_file(folder / WEIGHTS)
    apply(tensors, name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder, request.param


def test_damage_through_peft(damaged):
    folder, damage = damaged
    base = same_base()
    before = snapshot(base)
    with raises(damage):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base.requires_grad_(True), before, new="default")


def test_damage_through_peft_into_an_adapter(damaged):
    # What a Trainer does that resumes or loads its best model.
    folder, damage = damaged
    model = make_pte(base=same_base())
    before = snapshot(model)
    with raises(damage):
        model.load_adapter(folder, "default", is_trainable=True)
    with raises(damage):
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    assert_untouched(model, before)
    with raises(damage):
        model.load_adapter(folder, "new")
    assert_untouched(model, before, new="new")
    assert model.active_adapter == "default"


def test_damage_through_load_adapter(damaged):
    folder, damage = damaged
    base = same_base()
    before, attributes = snapshot(base), set(vars(base))
    kinds = {name: type(module) for name, module in base.named_modules()}
    with raises(damage):
        base.load_adapter(str(folder))
    assert_untouched(base, before)
    assert {name: type(module) for name, module in base.named_modules()} == kinds
    assert Seam.of(base) is None
    assert not base._hf_peft_config_loaded
    assert not {name for name in set(vars(base)) - attributes if name not in ("_hf_peft_config_loaded", "model_tags")}


def test_damage_through_load_adapter_beside_others(damaged, saved, tmp_path):
    folder, damage = damaged
    other = make_pte(base=same_base())
    other.save_pretrained(tmp_path / "good")
    model = loaded_by_transformers(tmp_path / "good", adapter_name="one")
    model.load_adapter(str(tmp_path / "good"), adapter_name="two", is_trainable=True)
    before = snapshot(model)
    with raises(damage):
        model.load_adapter(str(folder), adapter_name="three")
    assert_untouched(model, before)
    assert model.active_adapters() == ["two"]
    assert list(model.peft_config) == ["one", "two"]
    # The name is free, and the model works.
    model.load_adapter(str(tmp_path / "good"), adapter_name="three")
    assert_same(tensors_of(model, "three"), tensors_of(other))
    roll_out(model, make_prompts(), 2 * WINDOW)


def test_damage_through_from_pretrained(damaged):
    folder, damage = damaged
    with raises(damage):
        AutoModelForCausalLM.from_pretrained(folder)
    with raises(damage):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_truncated_file_through_load_adapter(saved):
    path = saved[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    base = same_base()
    before = snapshot(base)
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        base.load_adapter(str(saved[0]))
    assert_untouched(base, before)


def test_part_of_a_state_dict_is_refused(saved):
    model = make_pte(base=same_base())
    before = snapshot(model)
    part = {name: tensor for name, tensor in load_file(saved[0] / WEIGHTS).items() if ".mlp." in name}
    with pytest.raises(ValueError, match=r"no weight was changed: .* is missing"):
        set_peft_model_state_dict(model, part)
    assert_untouched(model, before)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_come_with_the_adapter(tied, tmp_path):
    model = make_pte(model={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    expected = model.get_input_embeddings().weight
    for door in ("peft", "transformers"):
        base = same_base(tie_word_embeddings=tied)
        with torch.no_grad():
            base.get_input_embeddings().weight.zero_()
        if door == "peft":
            base = PeftModel.from_pretrained(base, tmp_path)
        else:
            base.load_adapter(str(tmp_path))
        assert torch.equal(base.get_input_embeddings().weight, expected)
        assert_same(tensors_of(base), tensors_of(model))


def test_how_the_base_model_is_saved_is_left_alone(saved, tmp_path):
    # transformers would put the renamings of the adapter in the place of the base model's.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = base._weight_conversions
    base.load_adapter(str(saved[0]))
    assert base._weight_conversions is before


def test_hotswapping_is_refused(saved):
    folder, expected = saved
    model = same_base()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(folder), adapter_name="default")
    for hotswap in (True, "auto"):
        with pytest.raises(ValueError, match="only supported for LoRA"):
            model.load_adapter(str(folder), adapter_name="default", hotswap=hotswap)
    assert_same(tensors_of(model), expected)
    model = make_pte(base=same_base())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .* but PTE was passed"):
        hotswap_adapter(model, str(folder), "default")
    assert_untouched(model, before)


@pytest.mark.parametrize("mixed", [True, False])
def test_peft_refuses_another_method_beside_it(mixed):
    for first, second in (PTEConfig(prompt_end=2), LoraConfig()), (LoraConfig(), PTEConfig(prompt_end=2)):
        with pytest.raises(ValueError, match=r"is not compatible with|Cannot combine adapters"):
            get_peft_model(same_base(), first, mixed=mixed).add_adapter("second", second)


def test_another_method_beside_it_is_refused_where_transformers_lets_it_in():
    # Each wraps the linears of the one before, whose weights are then saved under other names.
    model = same_base()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    ids = torch.arange(3, 40)[None]
    before, tensors = model(input_ids=ids).logits, tensors_of(model, "lora")
    with pytest.raises(ValueError, match=r"must not carry those of other methods, got 'lora' \(LORA\)"):
        model.add_adapter(PTEConfig(prompt_end=2), "thinks")
    assert list(model.peft_config) == ["lora"]
    assert_same(tensors_of(model, "lora"), tensors)
    assert torch.equal(model(input_ids=ids).logits, before)

    model = same_base()
    model.add_adapter(PTEConfig(prompt_end=2, init_weights=False), "thinks")
    before = model(input_ids=ids).logits
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    for call in lambda: model(input_ids=ids), lambda: model.generate(input_ids=ids, max_new_tokens=2):
        for active in "thinks", "lora":
            model.set_adapter(active)
            with pytest.raises(ValueError, match=r"must not carry those of other methods, got 'lora' \(LORA\)"):
                call()
    model.delete_adapter("lora")
    model.set_adapter("thinks")
    assert torch.equal(model(input_ids=ids).logits, before)


def test_transformers_still_loads_by_the_method_that_is_watched():
    assert LOADER_METHOD in PeftAdapterMixin.load_adapter.__code__.co_names


def arguments(folder, **fields):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "max_steps": 4,
            "save_steps": 2,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **fields,
        }
    )


def sequences():
    ids = torch.randint(3, 60, (8, 3 * WINDOW), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[:, :4] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def trainer_of(model, folder, **fields):
    return Trainer(model=model, args=arguments(folder, **fields), train_dataset=sequences(), eval_dataset=sequences())


def test_trainer_resumes(tmp_path):
    whole = make_pte(base=same_base())
    trainer_of(whole, tmp_path).train()
    halfway = tmp_path / "checkpoint-2"
    resumed = get_peft_model(same_base(), PTEConfig(task_type="CAUSAL_LM", **SMALL))
    trainer_of(resumed, tmp_path / "again").train(resume_from_checkpoint=str(halfway))
    assert_same(tensors_of(resumed), tensors_of(whole))
    assert all(
        not torch.equal(value, tensors_of(whole)[name.removeprefix("base_model.model.")])
        for name, value in load_file(halfway / WEIGHTS).items()
        if "pte_up" in name
    )


def test_trainer_resumes_several_adapters(tmp_path):
    def make():
        model = get_peft_model(same_base(), PTEConfig(task_type="CAUSAL_LM", **SMALL), adapter_name="mine")
        model.add_adapter("other", PTEConfig(task_type="CAUSAL_LM", **SMALL))
        return model

    whole = make()
    trainer_of(whole, tmp_path).train()
    resumed = make()
    trainer_of(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for adapter in ("mine", "other"):
        assert_same(tensors_of(resumed, adapter), tensors_of(whole, adapter))
    assert resumed.active_adapter == "mine"


def test_trainer_refuses_a_damaged_checkpoint(tmp_path):
    trainer_of(make_pte(base=same_base()), tmp_path).train()
    path = tmp_path / "checkpoint-2" / WEIGHTS
    tensors = load_file(path)
    del tensors[f"{PREFIX}layers.0.self_attn.pte_key.weight"]
    save_file(tensors, path)
    model = make_pte(base=same_base())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no weight was changed: .*pte_key.* is missing"):
        trainer_of(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_untouched(model, before)


def test_trainer_loads_its_best_model(tmp_path):
    model = make_pte(base=same_base())
    # The best is the worst here, so that it is not the last.
    best_first = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, **best_first)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-4")
    file = load_file(os.path.join(best, WEIGHTS))
    assert_same(tensors_of(model), {name.removeprefix("base_model.model."): tensor for name, tensor in file.items()})
