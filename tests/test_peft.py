"""peft as its users know it."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_pte import PTEConfig, PTEModel
from peft_pte.method.layer import PTELayer, PTELinear
from tests.cases import FAMILIES, TWO_FAMILIES, make_base
from tests.helpers import SMALL, assert_close, make_prompts, make_pte, roll_out, same_base, thought_logits, trainable

WINDOW = SMALL["cache_window"]


def scored(model, seed=2):
    batch = roll_out(model, make_prompts(), 2 * WINDOW, seed=seed).truncated(2 * WINDOW)
    with torch.no_grad():
        return batch, thought_logits(model, batch)


def test_get_peft_model_trains_the_adapter_alone():
    model = make_pte()
    assert isinstance(model.base_model, PTEModel)
    names = trainable(model)
    assert names
    assert all(".pte_" in name and name.endswith(".default.weight") for name in names)
    kinds = {name.split(".pte_")[1].split(".")[0] for name in names}
    assert kinds == {"down", "up", "global_tokens", "query", "key", "value"}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_all_linears_of_the_decoder(family):
    model = make_pte(family)
    base = make_base(family)
    head = base.get_output_embeddings()
    expected = {
        name
        for name, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and module is not head
        # Reads the latents that are cached.
        and not name.endswith("kv_b_proj")
    }
    assert set(model.base_model.targeted_module_names) == expected


def test_print_trainable_parameters(capsys):
    model = make_pte()
    model.print_trainable_parameters()
    count = sum(parameter.numel() for parameter in trainable(model).values())
    assert f"trainable params: {count:,}" in capsys.readouterr().out


def test_nothing_else_is_printed(capfd, recwarn):
    model = make_pte()
    scored(model)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not [warning for warning in recwarn if "peft_pte" in str(warning.filename)]


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_checkpoint_keys_are_the_file_format(family, tmp_path):
    model = make_pte(family)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    block = {"llama": "base_model.model.model.layers.0", "gpt2": "base_model.model.transformer.h.0"}[family]
    attention = {"llama": f"{block}.self_attn", "gpt2": f"{block}.attn"}[family]
    linear = {"llama": f"{block}.mlp.up_proj", "gpt2": f"{block}.mlp.c_fc"}[family]
    assert {key for key in keys if key.startswith(f"{attention}.pte_")} == {
        f"{attention}.pte_{name}.weight" for name in ("global_tokens", "query", "key", "value")
    }
    assert {f"{linear}.pte_down.weight", f"{linear}.pte_up.weight"} <= set(keys)
    assert not any("thought_encoder" in key or "default" in key for key in keys)


def test_auto_model_in_a_fresh_process(tmp_path):
    base = same_base()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = make_pte(base=base)
    batch, expected = scored(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((batch, expected), tmp_path / "expected.pt")
    script = f"""
        import torch, peft_pte
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r}, attn_implementation="eager")
        batch, expected = torch.load({str(tmp_path / "expected.pt")!r})
        logits = model(**batch).logits[:, 5:-1]
        assert torch.allclose(logits, expected, atol=1e-5), (logits - expected).abs().max()
        generated = model.generate(input_ids=batch["input_ids"][:, :6], max_new_tokens=30, return_dict_in_generate=True)
        assert generated.past_key_values.evictions > 5
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_without_the_import_peft_does_not_know_the_method(tmp_path):
    # What the model card and the README warn of.
    make_pte().save_pretrained(tmp_path)
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "KeyError: 'PTE'" in run.stderr
    assert "import peft_pte" in (tmp_path / "README.md").read_text()


def test_model_card_has_the_tags(tmp_path):
    make_pte().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    header = card.split("---")[1]
    assert "peft-pte" in header
    assert "progressive-thought-encoding" in header
    make_pte().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("## How to load this adapter") == 1


def test_config_survives_the_file(tmp_path):
    fields = {"r": 6, "cache_window": 20, "alpha": 3.0, "eviction": "key_diff", "rank_pattern": {"q_proj": 2}}
    make_pte(**fields).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PTE"
    assert "impl" not in stored
    config = PTEConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("address", ["value", "key"])
def test_several_adapters(address, tmp_path):
    model = make_pte()
    batch, first = scored(model)
    torch.manual_seed(7)
    model.add_adapter("other", PTEConfig(task_type="CAUSAL_LM", **SMALL, state_address=address))
    with torch.no_grad():
        assert torch.equal(thought_logits(model, batch), first)
        model.set_adapter("other")
        second = thought_logits(model, batch)
        assert (second - first).abs().max() > 1e-2
        assert all(".other." in name for name in trainable(model))
        model.set_adapter("default")
        assert torch.equal(thought_logits(model, batch), first)
        with model.disable_adapter():
            disabled = thought_logits(model, batch)
        model.save_pretrained(tmp_path)
        model.delete_adapter("default")
        assert list(model.peft_config) == ["other"]
        model.set_adapter("other")
        assert torch.equal(thought_logits(model, batch), second)
        assert not any(".default." in name for name, _ in model.named_parameters())
        model.load_adapter(tmp_path / "default" if (tmp_path / "default").exists() else tmp_path, "again")
        model.set_adapter("again")
        assert torch.equal(thought_logits(model, batch), first)
        base = same_base()
        with torch.no_grad():
            assert_close(disabled, base(**batch).logits[:, 5:-1])


@pytest.mark.parametrize("address", ["value", "key"])
def test_adapters_may_have_other_settings(address):
    model = make_pte()
    wide = {"r": 6, "num_global_tokens": 3, "cache_window": 12, "state_address": address}
    model.add_adapter("wide", PTEConfig(task_type="CAUSAL_LM", **wide))
    model.set_adapter("wide")
    rollout = roll_out(model, make_prompts(), 30)
    batch = rollout.truncated(30)
    with torch.no_grad():
        assert_close(thought_logits(model, batch), rollout.logits)


def test_a_second_adapter_is_not_trained_until_it_is_active():
    model = make_pte()
    before = set(trainable(model))
    model.add_adapter("other", PTEConfig(task_type="CAUSAL_LM", **SMALL))
    assert set(trainable(model)) == before


@pytest.mark.parametrize("how", ["inject_adapter_in_model", "add_adapter"])
def test_without_a_peft_model(how):
    expected_model = make_pte()
    batch, expected = scored(expected_model)
    base = same_base()
    config = PTEConfig(task_type="CAUSAL_LM", **SMALL)
    if how == "add_adapter":
        base.add_adapter(config)
    else:
        base = inject_adapter_in_model(config, base)
    weights = get_peft_model_state_dict(expected_model)
    set_peft_model_state_dict(base, weights)
    base.eval()
    rollout = roll_out(base, make_prompts(), 2 * WINDOW)
    with torch.no_grad():
        assert_close(thought_logits(base, batch), expected)
        assert_close(thought_logits(base, rollout.truncated(2 * WINDOW)), rollout.logits)
        if how == "add_adapter":
            base.disable_adapters()
            assert_close(base(**batch).logits, same_base()(**batch).logits)
            base.enable_adapters()
            assert_close(thought_logits(base, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_unload_gives_the_base_model_back(family):
    base = same_base(family)
    before = dict(vars(base)), dict(vars(base.base_model))
    attributes = [set(part) for part in before]
    modules = {name: type(module) for name, module in base.named_modules()}
    model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **SMALL))
    unloaded = model.unload()
    assert unloaded is base
    assert {name: type(module) for name, module in base.named_modules()} == modules
    # peft and transformers leave marks of their own; ours are gone.
    left = [set(vars(part)) - kept for part, kept in zip((base, base.base_model), attributes, strict=True)]
    assert not {name for names in left for name in names if "pte" in name or name in ("forward", "generate_batch")}
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    prompts = make_prompts()
    assert torch.equal(
        base.generate(**prompts, max_new_tokens=20, do_sample=False),
        same_base(family).generate(**prompts, max_new_tokens=20, do_sample=False),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_weights_are_float32_on_half_precision_bases(dtype):
    model = make_pte(dtype=dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    config = PTEConfig(task_type="CAUSAL_LM", **SMALL)
    model = get_peft_model(make_base("llama").to(dtype), config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in trainable(model).values()} == {dtype}
    rollout = roll_out(model.eval(), make_prompts(), 2 * WINDOW)
    with torch.no_grad():
        logits = thought_logits(model, rollout.truncated(2 * WINDOW))
    assert_close(logits.float(), rollout.logits, dtype)


def test_layers_to_transform():
    model = make_pte(layers_to_transform=[1])
    adapted = {name for name, module in model.named_modules() if isinstance(module, PTELayer)}
    assert adapted
    assert all(".layers.1." in name for name in adapted)


def test_exclude_modules():
    model = make_pte(exclude_modules=["down_proj"])
    assert not any("down_proj" in name for name in trainable(model))


def test_a_deep_copy_is_a_model_of_its_own():
    import copy

    model = make_pte()
    batch, expected = scored(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.zero_()
        assert torch.equal(thought_logits(twin, batch), expected)


def test_a_pickled_model_is_adapted_still(tmp_path):
    model = make_pte()
    batch, expected = scored(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(thought_logits(loaded, batch), expected)
    rollout = roll_out(loaded, make_prompts(), 2 * WINDOW)
    assert rollout.cache.evictions > 3


def test_low_rank_matches_the_fields_of_the_config():
    model = make_pte(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1.0})
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.pte_up["default"].weight.shape[1] == 2
    assert attention.q_proj.scale["default"] == 2.0
    assert attention.v_proj.scale["default"] == 1.0 / SMALL["r"]
    assert attention.k_proj.pte_down["default"].weight.shape == (SMALL["num_global_tokens"], 32)


def test_status():
    model = make_pte()
    model.add_adapter("other", PTEConfig(task_type="CAUSAL_LM", **SMALL))
    layers = [module for module in model.modules() if isinstance(module, PTELayer)]
    for of in (model, model.get_base_model()):
        status = get_model_status(of)
        assert status.num_adapter_layers == len(get_layer_status(of)) == len(layers)
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.available_adapters == ["default", "other"]
        assert status.requires_grad == {"default": True, "other": False}
        assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert get_model_status(model).peft_types == {"default": "PTE", "other": "PTE"}
    with model.disable_adapter():
        assert not get_model_status(model).enabled


def test_set_requires_grad():
    model = make_pte()
    names = set(trainable(model))
    model.add_adapter("other", PTEConfig(task_type="CAUSAL_LM", **SMALL))
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad(["default", "other"])
    assert set(trainable(model)) == names | {name.replace(".default.", ".other.") for name in names}


def test_deleting_the_last_adapter():
    model = make_pte()
    model.delete_adapter("default")
    assert not model.peft_config
    # peft's own wrapper asks for the config of the adapter that is gone, as with LoRA.
    base, prompts = model.base_model.model, make_prompts()
    with torch.no_grad():
        assert_close(base(**prompts).logits, same_base()(**prompts).logits)


def test_input_dtype_casting_can_be_switched_off():
    model = make_pte()
    batch, expected = scored(model)
    with disable_input_dtype_casting(model), torch.no_grad():
        assert torch.equal(thought_logits(model, batch), expected)
    half = make_pte(dtype=torch.bfloat16)
    with disable_input_dtype_casting(half), pytest.raises(RuntimeError, match="dtype"):
        half(**make_prompts())


def test_scaling_layers():
    # Rollout and scoring read the scale that stands.
    model = make_pte()
    linears = [module for module in model.modules() if isinstance(module, PTELinear)]
    initial = linears[0].scale["default"]
    for linear in linears:
        linear.scale_layer(0.5)
    assert linears[0].scale["default"] == 0.5 * initial
    rollout = roll_out(model, make_prompts(), 2 * WINDOW)
    with torch.no_grad():
        scaled = thought_logits(model, rollout.truncated(2 * WINDOW))
        assert_close(scaled, rollout.logits)
        assert_close(scaled, thought_logits(make_pte(alpha=SMALL["r"] * 0.5 * initial), rollout.truncated(2 * WINDOW)))
    for linear in linears:
        linear.unscale_layer(0.25)
        assert linear.scale["default"] == 2 * initial
        linear.set_scale("default", 3.0)
        linear.set_scale("unknown", 3.0)
        assert linear.scale == {"default": 3 * initial}
        linear.unscale_layer()
        assert linear.scale["default"] == initial
