"""What is found out about a model by trying it: who writes to its cache, how wide, how rotated, and which linears compute features."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from benchmarks.models.tiny import tiny_model
from peft_pte import PTEConfig
from peft_pte.host.rotations import find_rotation, guess_rotation
from peft_pte.host.sites import find_sites
from peft_pte.host.trial import try_out
from peft_pte.method.encoder import PTEEncoder
from peft_pte.method.state import Evicted
from peft_pte.seam import Seam
from tests.cases import MODELS, make_base
from tests.helpers import SMALL, assert_close, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]
UNROTATED = ("gpt2", "opt", "gpt_bigcode")


def bounded(model):
    return [site for site in find_sites(model).by_index.values() if site.evicts]


@pytest.mark.parametrize(
    "name", [*sorted(set(MODELS) - set(UNROTATED)), "gptj", "codegen", "llama4", "gpt_oss", "roformer"]
)
def test_what_is_removed_makes_keys_equal_at_all_positions(name):
    # Inside the attention, by complex numbers, by half of the cosines: whatever a model calls it.
    model = make_base(name) if name in MODELS else tiny_model(name)
    sites = bounded(model)
    backbone = find_sites(model).backbone
    trial = try_out(backbone, {site.index: [site.attention] for site in sites}, [])
    turned = 0
    for site in sites:
        cached = trial.cached[site.index]
        for heads, rotation in ((cached.keys, site.key_rotation), (cached.values, site.value_rotation)):
            if rotation is None:
                assert_close(heads[0], heads[1])
                continue
            turned += 1
            assert (heads[0] - heads[1]).abs().max() > 0.1 * heads[0].abs().max()
            plain = [
                rotation.remove(part, torch.tensor([[[position]]]))
                for part, position in zip(heads, cached.positions, strict=True)
            ]
            # Cosines of a thousand radians are good to 1e-4 in float32.
            assert_close(plain[0], plain[1], scale=20)
            if rotation.source.scaling == 1.0:
                assert_close(plain[0].norm(), heads[0].norm())
    assert turned


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "lfm2"])
def test_what_takes_a_cache_and_keeps_no_keys_in_it_is_no_attention(name):
    # From transformers 5.24 on mixers and convolutions are called with a cache by the same name as attention.
    found = find_sites(tiny_model(name)).by_index.values()
    assert {site.evicts for site in found} == {True, False}
    assert all((site.attention_name == site.block) != site.evicts for site in found)


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(UNROTATED) - {"deepseek_v3"}))
def test_structure_tells_the_same_where_there_are_no_numbers(name):
    model = make_base(name)
    found = find_sites(model)
    for site in found.by_index.values():
        if site.evicts:
            assert guess_rotation(found.backbone, site.attention, site.layer_type) == site.key_rotation


@pytest.mark.parametrize("name", ["llama", "glm", "deepseek_v3", "gptj", "llama4", "gpt_oss", "smollm3", "gpt2"])
def test_weights_of_zeros_tell_the_same(name):
    # As the processes beside the first hold while a model is loaded for sharding.
    model = make_base(name) if name in MODELS else tiny_model(name)
    expected = [(site.key_width, site.value_width, site.key_rotation, site.value_rotation) for site in bounded(model)]
    for parameter in model.parameters():
        parameter.data.zero_()
    actual = [(site.key_width, site.value_width, site.key_rotation, site.value_rotation) for site in bounded(model)]
    assert actual == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_found_in_half_precision_at_the_size_of_a_head(dtype, rope):
    parameters = {"rope_type": rope, "rope_theta": 500000.0}
    if rope != "default":
        parameters |= {"factor": 8.0, "original_max_position_embeddings": 512}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    (one, two) = (site.key_rotation for site in bounded(model))
    assert one == two
    assert (one.style, one.start, one.direction, one.laid_out) == ("half", 0, 1, "half")


def test_a_trial_leaves_the_model_alone():
    model = make_base("llama").train()
    model.model.layers[1].eval()
    training = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    find_sites(model)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def rotation_that_is_not_one(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + q.flip(-1) * sin.abs(), k * cos + k.flip(-1) * sin.abs()


def test_keys_that_cannot_be_unrotated_are_kept_and_said(monkeypatch, tmp_path):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotation_that_is_not_one)
    base = make_base("llama")
    with pytest.warns(UserWarning, match='`key_rotation` is "kept" for this model: no rotation that LlamaModel'):
        model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **SMALL)).eval()
    assert model.peft_config["default"].key_rotation == "kept"
    rollout = roll_out(model, make_prompts(), 2 * WINDOW)
    with torch.no_grad():
        assert_close(thought_logits(model, rollout.truncated(2 * WINDOW)), rollout.logits)
    model.save_pretrained(tmp_path)
    assert PTEConfig.from_pretrained(tmp_path).key_rotation == "kept"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(make_base("llama"), PTEConfig(task_type="CAUSAL_LM", key_rotation="kept", **SMALL))


def adapted(model):
    return {
        name.removesuffix(".pte_down.default")
        for name, _ in model.named_modules()
        if name.endswith(".pte_down.default")
    }


def make(kind, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(tiny_model(kind), PTEConfig(task_type="CAUSAL_LM", **{**SMALL, **fields})).eval()


@pytest.mark.parametrize(
    ("kind", "absent", "present"),
    [
        ("deepseek_v3", "kv_b_proj", "kv_a_proj_with_mqa"),
        ("doge", "dt_proj", "k_proj"),
        ("jamba", "dt_proj", "x_proj"),
        ("bamba", "out_proj", "in_proj"),
        ("bart", "encoder_attn.k_proj", "self_attn.k_proj"),
        ("jetmoe", "router.layer", "kv_proj"),
    ],
)
def test_linears_that_compute_no_features_of_their_tokens(kind, absent, present):
    model = make(kind)
    names = adapted(model)
    assert any(name.endswith(present) for name in names)
    assert not any(name.endswith(absent) for name in names)
    told = model.base_model.left_out()
    assert any(absent in name for name in told)
    with pytest.raises(ValueError, match=r"`target_modules` must not reach `.*Exclude it with `exclude_modules`"):
        make(kind, target_modules=[absent.rpartition(".")[2], present.rpartition(".")[2]])


def test_what_is_left_out_is_said_once_and_can_be_asked_for():
    with pytest.warns(UserWarning, match="are left as they are") as told:
        model = get_peft_model(tiny_model("mixtral"), PTEConfig(task_type="CAUSAL_LM", **SMALL))
    assert len([one for one in told if "are left as they are" in str(one.message)]) == 1
    found = model.base_model.left_out()
    assert "experts" in found["mlp.experts.gate_up_proj"].reason
    inside = [part for name, part in model.get_base_model().named_parameters() if ".experts.gate_up_proj" in name]
    assert found["mlp.experts.gate_up_proj"].parameters == sum(part.numel() for part in inside)
    assert make("llama").base_model.left_out() == {}


def test_nothing_is_said_where_targets_were_chosen():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_model("mixtral"), PTEConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **SMALL))


@pytest.mark.parametrize("kind", ["gemma3", "moss_transcribe_diarize", "phi4_multimodal", "ctrl"])
def test_only_decoder_layers_are_adapted(kind):
    model = make(kind)
    seam = Seam.require(model.get_base_model())
    layers = tuple(f"base_model.model.{site.block}." for site in seam.sites.values())
    assert adapted(model)
    assert all(name.startswith(layers) for name in adapted(model))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_default_targets_of_some_layers(kind):
    model = make(kind, layers_to_transform=[1])
    assert adapted(model)
    assert all(".layers.1." in name for name in adapted(model))


def test_saved_beside_a_tower_of_the_same_names(tmp_path):
    model = make("gemma3", init_weights=False)
    rollout = roll_out(model, make_prompts(), 2 * WINDOW)
    batch = rollout.truncated(2 * WINDOW)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(tiny_model("gemma3"), tmp_path).eval()
    with torch.no_grad():
        assert_close(thought_logits(loaded, batch), thought_logits(model, batch))
    assert adapted(loaded) == adapted(model)


def test_two_widths_are_what_they_say():
    # S' = mean over evicted tokens of (W_Q h) (W_K k) / sqrt(R) times W_V v, with W_K and W_V of their own widths.
    torch.manual_seed(0)
    beside = torch.nn.Linear(3, 3).double()
    encoder = PTEEncoder(beside, (6, 2), (None, None))
    fields = {"r": 4, "num_global_tokens": 5, "cache_window": 8, "init_weights": False, "encoder_attention": "linear"}
    encoder.update_layer("default", PTEConfig(**fields), 4)
    key, value = encoder.pte_key["default"].weight, encoder.pte_value["default"].weight
    assert (key.shape, value.shape) == ((4, 6), (4, 2))
    tokens = encoder.pte_global_tokens["default"].weight
    assert tokens.shape == (5, 6)
    query = tokens @ encoder.pte_query["default"].weight.T

    def norm(state):
        return state / state.norm(dim=-1, keepdim=True)

    start = norm(query @ (tokens @ key.T).T / 2 @ (tokens[:, :2] @ value.T) / 5)
    assert_close(encoder.initial_state("default"), start)
    keys, values = torch.randn(1, 1, 3, 6).double(), torch.randn(1, 1, 3, 2).double()
    update = query @ (keys[0, 0] @ key.T).T / 2 @ (values[0, 0] @ value.T) / 3
    evicted = Evicted(keys, values, torch.zeros(1, 1, 3, dtype=torch.long), None)
    after = encoder("default", start[None], evicted)
    assert_close(after[0, 0], norm(start + update))
    after.sum().backward()
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in (key, value, tokens))


def test_a_rotation_is_looked_for_among_those_of_the_model_alone():
    model = make_base("llama")
    attention = model.model.layers[0].self_attn
    heads = torch.randn(2, 1, 2, 1, 8)
    with pytest.raises(LookupError, match="no rotation that LlamaModel is known to have"):
        find_rotation(model.model, attention, None, (heads[0], heads[1]), (3, 1000))


def test_lora_sits_beside():
    # Injected by others before: their linears are adapted, not what is inside of them.
    base = make_base("llama")
    names = set(get_peft_model(make_base("llama"), LoraConfig(target_modules="all-linear")).targeted_module_names)
    model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **SMALL))
    assert {name.removeprefix("base_model.model.") for name in adapted(model)} == names


def test_pte_equals_itself_whatever_the_targets_are_called():
    # Names that are spelled out reach the same linears as their last parts.
    model = make_pte("llama")
    spelled = {name.removeprefix("base_model.model.") for name in adapted(model)}
    other = make_pte("llama", target_modules=sorted(spelled))
    batch = roll_out(model, make_prompts(), 2 * WINDOW).truncated(2 * WINDOW)
    with torch.no_grad():
        assert_close(thought_logits(other, batch), thought_logits(model, batch))


def test_a_window_that_comes_later_reads_no_rotated_keys_in_silence(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotation_that_is_not_one)
    with pytest.warns(UserWarning, match='`key_rotation` is "kept"'):
        model = get_peft_model(make_base("llama"), PTEConfig(task_type="CAUSAL_LM", **{**SMALL, "cache_window": None}))
    model.peft_config["default"].cache_window = WINDOW
    assert model.peft_config["default"].key_rotation == "kept"


@pytest.mark.parametrize("name", ["llama", "glm", "phi", "smollm3", "deepseek_v3", "gpt_oss", "codegen", "llama4"])
def test_what_is_encoded_does_not_know_where_it_stood(name):
    # A rotation tells how far apart tokens are: later by the same number, all of them attend alike, and nothing else may know.
    def scored(by, **fields):
        torch.manual_seed(0)
        base = make_base(name) if name in MODELS else tiny_model(name)
        model = make_pte(base=base, **fields)
        batch = roll_out(model, make_prompts((6, 6)), 3 * WINDOW).truncated(3 * WINDOW)
        where = torch.arange(batch["input_ids"].shape[1])[None] + by
        with torch.no_grad():
            return thought_logits(model, batch, position_ids=where)

    # Cosines of larger angles are rounded more.
    assert_close(scored(100), scored(0), scale=20)
    kept = [scored(by, key_rotation="kept") for by in (0, 100)]
    assert (kept[0] - kept[1]).abs().max() > 1e-2
