"""Policies that choose what leaves: their registry, what they see, what they may not do."""

import copy
import pickle
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model

import peft_pte
from peft_pte import EvictionPolicy, PTEConfig, Window, head_importance, register_eviction
from peft_pte.cache.cache import PTECache
from peft_pte.eviction.budgets import HeadClock, split
from peft_pte.eviction.policies import Attention, KeyDiff, Random
from peft_pte.eviction.policy import POLICIES as REGISTERED
from peft_pte.host.attention import WatchedConfig
from tests.cases import make_base
from tests.helpers import POLICIES, SMALL, assert_close, make_prompts, make_pte, roll_out, same_base, thought_logits

WINDOW = SMALL["cache_window"]


def test_those_that_come_with_the_package():
    assert {name for name in REGISTERED if not name.startswith(("_", "test"))} - {"kvpress", "large_values"} == set(
        POLICIES
    )


# A third party's policy: no line of the package is read, and none is changed.
@register_eviction("test_small_values")
@dataclass(frozen=True)
class SmallValues(EvictionPolicy):
    """Thoughts whose values are small leave, as far as the last queries do not look at them."""

    power: float = 1.0
    queries: int = 2

    @property
    def observed(self):
        return self.queries

    def score(self, window: Window):
        heads = window.keys.shape[1]
        attention = window.attention().unflatten(1, (heads, -1)).mean(dim=(2, 3))
        return window.values.norm(dim=-1) ** self.power * (0.1 + attention)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_policy_of_a_third_party(family, tmp_path):
    fields = {"eviction": "test_small_values", "eviction_options": {"power": 2.0}}
    model = make_pte(family, dtype=torch.float64, **fields)
    rollout = roll_out(model, make_prompts(), 4 * WINDOW)
    with torch.no_grad():
        assert_close(thought_logits(model, rollout.truncated(4 * WINDOW)).float(), rollout.logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_base(family, attn_implementation="sdpa").double(), tmp_path).eval()
    assert loaded.peft_config["default"].eviction_options == {"power": 2.0}
    with torch.no_grad():
        assert_close(
            thought_logits(loaded, rollout.truncated(4 * WINDOW)), thought_logits(model, rollout.truncated(4 * WINDOW))
        )


def test_options_are_saved_with_the_adapter(tmp_path):
    importance = [[1.0, 0.25]] * 3
    model = make_pte(eviction="head_budget", eviction_options={"queries": 2, "importance": importance})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_base(), tmp_path)
    assert loaded.peft_config["default"].eviction_options == {"queries": 2, "importance": importance}


# What a policy sees.


@register_eviction("test_recorder")
@dataclass(frozen=True)
class Recorder(Attention):
    """Keeps what it saw."""

    queries: int = 3
    seen: list = None

    def score(self, window):
        self.seen.append(window)
        return super().score(window)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_bigcode", "qwen3"])
def test_attention_is_that_of_the_model(family, attn_implementation):
    # With windows that hold the whole sequence but the last tokens: the model's own attention of its last queries.
    seen, length = [], 14
    fields = {"cache_window": length, "evict_ratio": 0.1, "eviction": "test_recorder", "init_weights": True}
    model = make_pte(family, eviction_options={"seen": seen}, attn_implementation=attn_implementation, **fields)
    ids = torch.randint(1, 57, (2, 3 + length + 1))
    with torch.no_grad():
        model(ids, prompt_length=3)
        model.get_base_model().set_attn_implementation("eager")
        with model.disable_adapter():
            expected = model(ids[:, :-1], output_attentions=True).attentions
    bounded = [index for index, site in sites(model).items() if site.evicts]
    assert [window.layer for window in seen] == bounded
    for window in seen:
        assert window.queries.shape[2] == 3
        assert torch.equal(window.query_positions, torch.arange(14, 17).expand(2, 3))
        assert torch.equal(window.positions, torch.arange(3, 17).expand_as(window.positions))
        assert_close(window.attention(), expected[window.layer][:, :, -3:, 3:], torch.float32)


def sites(model):
    return peft_pte.seam.Seam.require(model.get_base_model()).sites


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
def test_what_leaves_under_every_attention(attn_implementation):
    torch.manual_seed(0)
    held = {}
    for kind in {"eager", attn_implementation}:
        model = make_pte(eviction="attention", attn_implementation=kind)
        cache = model.base_model.new_cache()
        with torch.no_grad():
            model(torch.arange(1, 41).expand(2, -1), past_key_values=cache, prompt_length=3)
        held[kind] = [cache.window_positions(index) for index, _ in cache.thought_layers]
    assert all(map(torch.equal, held["eager"], held[attn_implementation]))
    assert not torch.equal(held["eager"][0][:, 0], held["eager"][0][:, 1])


def test_prompts_never_leave_and_heads_differ():
    for eviction in POLICIES[1:]:
        model = make_pte(eviction=eviction)
        rollout = roll_out(model, make_prompts((6, 3, 5)), 5 * WINDOW)
        lengths = torch.tensor([6, 3, 5])[:, None, None]
        for index, _ in rollout.cache.thought_layers:
            held = rollout.cache.window_positions(index)
            assert (held[held >= 0] >= 0).all()
            assert ((held >= lengths) | (held < 0)).all()
            for row in held.flatten(0, 1):
                there = row[row >= 0]
                assert len(there.unique()) == len(there)
        assert any((a[:, 0] != a[:, 1]).any() for a in map(rollout.cache.window_positions, range(3)))


@pytest.mark.parametrize("eviction", ["attention", "head_budget"])
def test_queries_are_forgotten_but_the_last(eviction):
    model = make_pte(eviction=eviction)
    rollout = roll_out(model, make_prompts(), 5 * WINDOW)
    for _, layer in rollout.cache.thought_layers:
        assert layer.observed.length == layer.policy.observed
        assert layer.recent_observed is None


def test_heads_hold_their_budgets():
    options = {"queries": 1, "importance": [[1.0, 0.0], [1.0, 1.0], [0.2, 0.8]]}
    model = make_pte(eviction="head_budget", eviction_options=options)
    rollout = roll_out(model, make_prompts(), 6 * WINDOW + 1)
    held = [(rollout.cache.window_positions(index) >= 0).sum(dim=-1) for index in range(3)]
    # Six windows of thoughts were written, the last block of two is full.
    budgets = [split(part, WINDOW, 2, 0.5) for part in options["importance"]]
    assert [part[0].tolist() for part in held] == [list(budget) for budget in budgets]
    assert all(sum(budget) == 2 * WINDOW for budget in budgets)
    assert budgets[0] == (11, 5)
    assert len({layer.line.keys.shape for _, layer in rollout.cache.thought_layers}) == 1
    assert rollout.cache.layers[0].line.keys.shape[1] == 2 * WINDOW + 1


@pytest.mark.parametrize("window", [8, 11, 64])
@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("equal", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("importance", [[1.0], [1.0, 0.0], [3.0, 1.0, 1.0], [0.0] * 4, [1.0, 2.0, 3.0, 100.0]])
def test_a_window_is_split_whole(importance, equal, step, window):
    budgets = split(importance, window, step, equal)
    heads = len(importance)
    assert sum(budgets) == heads * window
    assert min(budgets) >= step
    pairs = list(zip(budgets, importance, strict=True))
    assert all(a >= b for a, x in pairs for b, y in pairs if x > y)
    clock = HeadClock(budgets, window, step)
    held = [window] * heads
    for number in range(200):
        lost, after = clock.table[min(number, len(clock.table) - 1)]
        if number < len(clock.table):
            assert list(after) == [size - gone for size, gone in zip(held, lost, strict=True)]
        held = [size - gone + step for size, gone in zip(held, lost, strict=True)]
        assert min(held) >= step
        assert sum(held) <= heads * window
    assert held == list(budgets)


def test_random_is_a_function_of_positions_head_layer_and_seed():
    positions = torch.arange(10, 74).expand(2, 3, -1)
    keys = torch.zeros(2, 3, 64, 4)
    score = lambda seed=0, layer=0, shift=0: Random(seed).score(Window(keys, keys, positions + shift, layer))  # noqa: E731
    first = score()
    assert torch.equal(first[0], first[1])
    for other in (score(seed=1), score(layer=1), score(shift=1), first.roll(1, dims=1)):
        assert (first.argsort() != other.argsort()).float().mean() > 0.8
    many = torch.stack([score(shift=shift) for shift in range(400)])
    assert abs(many.mean() - 0.5) < 0.01
    assert (many.mean(dim=0) - 0.5).abs().max() < 0.1


def test_key_diff_and_attention_choose_what_they_say():
    keys = torch.randn(1, 1, 6, 4)
    keys[0, 0, 2] = keys[0, 0].mean(dim=0) * 3
    window = Window(keys, keys, torch.arange(6).expand(1, 1, -1), 0)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    closest = (unit @ unit.mean(dim=2, keepdim=True).transpose(2, 3)).argmax()
    assert KeyDiff().chosen(window, 1).flatten().nonzero().item() == closest
    queries = keys[:, :, 4:5] * 10
    window = Window(
        keys,
        keys,
        window.positions,
        0,
        queries=queries,
        query_positions=torch.tensor([[5]]),
        prompt_keys=keys[:, :, :0],
    )
    order = (keys[0, 0] @ queries[0, 0, 0]).argsort()
    assert set(Attention(1).chosen(window, 3).flatten().nonzero().flatten().tolist()) == set(order[:3].tolist())


# Bad input.


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"eviction": "oldest"},
            "`eviction` must be one of 'sliding_window', 'random'.* got 'oldest'. A policy of your own",
        ),
        (
            {"eviction_options": {"seed": 1}},
            "`eviction_options` must be options of 'sliding_window', which has none, got 'seed'",
        ),
        ({"eviction": "random", "eviction_options": {"sead": 1}}, "which has 'seed', got 'sead'"),
        (
            {"eviction": "random", "eviction_options": {"seed": -1}},
            "`seed` of `eviction_options` must be an integer of at least 0",
        ),
        (
            {"eviction": "attention", "eviction_options": {"queries": 0}},
            "`queries` of `eviction_options` must be an integer",
        ),
        (
            {"eviction": "attention", "cache_window": 6},
            "`cache_window` must be at least 8 for Attention, which looks at the queries of as many thoughts, got 6",
        ),
        ({"eviction": "head_budget"}, "must hold 'importance' for 'head_budget'.*head_importance"),
        (
            {"eviction": "head_budget", "eviction_options": {"importance": [[-1.0]]}},
            "`importance` must be made of numbers of at least 0",
        ),
        (
            {"eviction": "head_budget", "eviction_options": {"importance": [[1e308, 1e308]]}},
            "whose sums are finite",
        ),
        (
            {"eviction": "head_budget", "cache_window": 8, "eviction_options": {"importance": [[9.0, 0.0]]}},
            "`cache_window` must be above 8 for HeadBudget, got 8",
        ),
        (
            {"eviction": "head_budget", "eviction_options": {"importance": [[1.0]], "equal": 2.0}},
            "`equal` must be from 0 to 1",
        ),
    ],
    ids=str,
)
def test_wrong_policies(fields, match):
    with pytest.raises(ValueError, match=match):
        PTEConfig(**{"cache_window": 16, **fields})


def test_options_are_a_dictionary():
    with pytest.raises(TypeError, match="`eviction_options` must be a dictionary"):
        PTEConfig(eviction="random", eviction_options=[1])


def test_options_are_live():
    model = make_pte(eviction="random")
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW)
    with torch.no_grad():
        before = thought_logits(model, batch)
        model.peft_config["default"].eviction_options = {"seed": 3}
        assert (thought_logits(model, batch) - before).abs().max() > 1e-3
        with pytest.raises(ValueError, match="which has 'seed'"):
            model.peft_config["default"].eviction_options = {"queries": 3}
        model.peft_config["default"].eviction_options = {}
        assert torch.equal(thought_logits(model, batch), before)


def test_names_of_policies_are_taken_once():
    with pytest.raises(ValueError, match=r"'random' is Random already. Choose another name"):
        register_eviction("random")(SmallValues)
    with pytest.raises(TypeError, match=r"must extend peft_pte\.EvictionPolicy"):
        register_eviction("test_nothing")(dict)
    assert register_eviction("random")(Random) is Random


@dataclass(frozen=True)
class Wrong(EvictionPolicy):
    """Does as its option says."""

    how: str = "few"

    def score(self, window):
        return window.keys.new_zeros(2) if self.how == "shape" else window.positions.float()

    def leaving(self, window, evict):
        if self.how == "shape":
            return super().leaving(window, evict)
        shape = window.positions.shape[:2]
        indices = {"few": [0], "twice": [1, 1], "beyond": [0, WINDOW], "negative": [-1, 0]}[self.how]
        return torch.tensor(indices).expand(*shape, -1)

    def budgets(self, layer, window, evict):
        return (window, window - 1) if self.how == "budgets" else None


register_eviction("test_wrong")(Wrong)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("few", r"Wrong.leaving must name 2 thoughts for each head, \(1, 2, 2\), got \(1, 2, 1\)"),
        ("twice", "2 different thoughts from 0 to 7 for each head; one was named twice"),
        ("beyond", "from 0 to 7"),
        ("negative", "from 0 to 7"),
        ("shape", r"Wrong.score must return one score for each thought and head, \(1, 2, 8\), got \(2,\)"),
    ],
)
def test_policies_that_choose_wrong(how, match):
    model = make_pte(eviction="test_wrong", eviction_options={"how": how})
    ids = torch.arange(1, 20)[None]
    with pytest.raises(ValueError, match=match), torch.no_grad():
        model(ids, prompt_length=3)
    with pytest.raises(ValueError, match=match):
        model.generate(ids[:, :3], max_new_tokens=20, min_new_tokens=20)


def test_budgets_that_are_no_window():
    with pytest.raises(
        ValueError,
        match=r"Wrong.budgets must give each head of layer 0 at least 2 thoughts, and 8 on average, got \(8, 7\)",
    ):
        make_pte(eviction="test_wrong", eviction_options={"how": "budgets"})


def test_importance_of_another_model():
    with pytest.raises(ValueError, match="`importance` must hold numbers for each layer, and has none for layer 1"):
        make_pte(eviction="head_budget", eviction_options={"queries": 2, "importance": [[1.0, 2.0]]})
    # Also where all would get the same.
    for wrong in ([[1.0, 2.0, 3.0, 4.0]] * 3, [[1.0]] * 3):
        with pytest.raises(ValueError, match="`importance` must hold 2 numbers for layer 0, one for each KV head, got"):
            make_pte(eviction="head_budget", eviction_options={"queries": 2, "importance": wrong})
    with pytest.raises(ValueError, match="has none for layer 1"):
        make_pte(eviction="head_budget", eviction_options={"queries": 2, "importance": [[1.0, 2.0], [], [1.0, 2.0]]})


def test_heads_of_different_lengths_need_masks_of_their_own():
    base = make_base("llama", attn_implementation="flex_attention")
    options = {"queries": 2, "importance": [[1.0, 2.0]] * 3}
    with pytest.raises(NotImplementedError, match="with attn_implementation='flex_attention'"):
        get_peft_model(base, PTEConfig(eviction="head_budget", eviction_options=options, cache_window=8))
    model = make_pte(eviction="head_budget")
    with pytest.raises(NotImplementedError, match="A static cache has heads of one length"):
        model.generate(**make_prompts(), cache_implementation="static", max_new_tokens=2)


def test_what_looks_at_queries_takes_nothing_back():
    model = make_pte(eviction="attention")
    cache = model.base_model.new_cache()
    with torch.no_grad():
        model(torch.arange(1, 9)[None], past_key_values=cache, prompt_length=4)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="must be 0 with a policy that looks at queries"):
        cache.crop(-1)


@pytest.mark.parametrize("eviction", ["attention", "head_budget"])
def test_queries_behind_a_hidden_end(eviction):
    # A later mask hides the last tokens: what is left of their queries must be gone before it is looked at.
    model = make_pte(dtype=torch.float64, eviction=eviction)
    ids = torch.randint(1, 57, (1, 40))
    found_out: Counter[str] = Counter()
    reasons = ("queries of the last", "cached as real and cannot be taken back")
    for thoughts in range(2, 16):
        for back in (1, 2):
            cache, kept = model.base_model.new_cache(), 6 + thoughts - back
            mask = torch.ones(1, 6 + thoughts + 12, dtype=torch.long)
            mask[:, kept : 6 + thoughts] = 0
            with torch.no_grad():
                model(ids[:, : 6 + thoughts], past_key_values=cache, prompt_length=6)
                try:
                    found = model(ids[:, 20:32], attention_mask=mask, past_key_values=cache).logits
                except ValueError as error:
                    found_out.update(reason for reason in reasons if reason in str(error))
                    continue
                expected = model(torch.cat([ids[:, :kept], ids[:, 20:32]], dim=1), prompt_length=6).logits
            assert_close(found, expected[:, -12:])
            found_out["taken"] += 1
    # What evicted says that first, so that fewer rows of a larger budget are left for the other reason.
    assert found_out["taken"] > 5
    assert all(found_out[reason] > 3 for reason in reasons)
    assert found_out.total() == 28


def test_models_without_the_attention_interface_are_refused(monkeypatch):
    monkeypatch.setattr("peft_pte.host.sites.can_be_watched", lambda attention: False)
    with pytest.raises(NotImplementedError, match="LlamaAttention does not go through the attention interface"):
        make_pte(eviction="attention")
    make_pte(eviction="key_diff")


def test_latent_attention_has_no_keys_to_compare():
    config = PTEConfig(eviction="attention", eviction_options={"queries": 2}, cache_window=8)
    with pytest.raises(
        NotImplementedError,
        match=r"`eviction` must not be 'attention' for .*: its DeepseekV3Attention caches something else than the keys that its queries meet",
    ):
        get_peft_model(make_base("deepseek_v3"), config)


def test_attention_that_does_not_ask_is_noticed(monkeypatch):
    model = make_pte(eviction="attention")
    for site in sites(model).values():
        site.attention.config = site.attention.config.host
    with pytest.raises(NotImplementedError, match="went 0 times through transformers' attention interface"):
        model(torch.arange(1, 30)[None], prompt_length=2)


# What is put on the model, and taken away.


def test_the_config_of_attention_is_the_models_own():
    model = make_pte(eviction="attention", attn_implementation="sdpa")
    attention = sites(model)[0].attention
    assert isinstance(attention.config, WatchedConfig)
    assert attention.config._attn_implementation == "sdpa"
    assert attention.config.hidden_size == 32
    model.get_base_model().set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    attention.config.marked = 5
    assert model.config.marked == 5
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_base_model()))):
        inner = copied.get_base_model() if isinstance(copied, PeftModel) else copied
        assert inner.model.layers[0].self_attn.config.host is not attention.config.host
        ids = torch.arange(1, 30)[None]
        with torch.no_grad():
            assert_close(copied(ids, prompt_length=2).logits, model(ids, prompt_length=2).logits)
    base = model.unload()
    assert not any(isinstance(getattr(module, "config", None), WatchedConfig) for module in base.modules())


def test_sliding_windows_are_watched_by_nobody():
    model = make_pte(eviction="key_diff")
    assert not isinstance(sites(model)[0].attention.config, WatchedConfig)
    model.peft_config["default"].eviction_options = {}
    model.peft_config["default"].eviction = "random"
    assert not isinstance(sites(model)[0].attention.config, WatchedConfig)
    config = model.peft_config["default"]
    config.cache_window = 16
    config.eviction = "attention"
    assert isinstance(sites(model)[0].attention.config, WatchedConfig)


# The importance of heads.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_importance_is_measured_and_the_model_given_back(family):
    base = make_base(family).train()
    still = next(module for module in base.modules() if not list(module.children())).eval()
    frozen = next(base.parameters()).requires_grad_(False)
    before = {name: part.clone() for name, part in base.state_dict().items()}
    ids = torch.randint(1, 57, (3, 60))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    measured = head_importance(base, ids, mask, cache_window=16, queries=4)
    assert base.training
    assert not still.training
    assert not frozen.requires_grad
    assert sum(not part.requires_grad for part in base.parameters()) == 1
    assert set(base.state_dict()) == set(before)
    assert not hasattr(base, "peft_config")
    heads = [site_heads(base, index) for index in range(len(measured))]
    assert [len(part) for part in measured] == heads
    assert all(0 < number < 1 for layer in measured for number in layer)
    assert measured == head_importance(base, ids, mask, cache_window=16, queries=4)
    model = get_peft_model(
        base,
        PTEConfig(
            task_type="CAUSAL_LM", cache_window=16, eviction="head_budget", eviction_options={"importance": measured}
        ),
    ).eval()
    model.generate(ids[:, :5], max_new_tokens=60, min_new_tokens=60)


def site_heads(base, index):
    layer = base(torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers[index]
    return 0 if getattr(layer, "is_sliding", False) else layer.keys.shape[1]


def test_importance_needs_a_base_model_and_long_texts():
    with pytest.raises(TypeError, match="must be a base model without adapters"):
        head_importance(make_pte(), torch.ones(1, 60, dtype=torch.long), cache_window=16)
    with pytest.raises(ValueError, match="must hold a text of more than 20 tokens"):
        head_importance(make_base("llama"), torch.ones(1, 18, dtype=torch.long), cache_window=16)


def test_looks_back_as_far_as_it_attends():
    # A head whose queries are zero attends to all alike, others to what they like.
    base = make_base("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight[:16].zero_()
    measured = head_importance(base, torch.randint(1, 57, (2, 80)), cache_window=16, queries=4)
    # Of 4 prompt tokens and 16 thoughts, 4 are about to leave; a query before the last sees fewer.
    assert all(0.19 < layer[0] < 0.24 for layer in measured)


# A score of kvpress.


def test_scores_of_kvpress(monkeypatch):
    import sys
    import types

    from peft_pte.integrations import kvpress  # noqa: F401

    class KnormPress:
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return -keys.norm(dim=-1)

    class RandomPress:
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return torch.rand(keys.shape[:3])

    class SnapKVPress:
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return module.head_dim * keys

    monkeypatch.setitem(
        sys.modules,
        "kvpress",
        types.SimpleNamespace(KnormPress=KnormPress, RandomPress=RandomPress, SnapKVPress=SnapKVPress, other=3),
    )
    model = make_pte(dtype=torch.float64, eviction="kvpress", eviction_options={"press": "KnormPress"})
    rollout = roll_out(model, make_prompts(), 4 * WINDOW)
    with torch.no_grad():
        assert_close(thought_logits(model, rollout.truncated(4 * WINDOW)).float(), rollout.logits)
    model = make_pte(eviction="kvpress", eviction_options={"press": "SnapKVPress"})
    with pytest.raises(NotImplementedError, match="SnapKVPress needs more than keys and values"):
        model(torch.arange(1, 30)[None], prompt_length=2)
    with pytest.raises(ValueError, match=r'and RandomPress does not.*eviction="random"'):
        PTEConfig(eviction="kvpress", eviction_options={"press": "RandomPress"})
    with pytest.raises(ValueError, match="`press` must name a class of kvpress that scores tokens, got 'other'"):
        PTEConfig(eviction="kvpress", eviction_options={"press": "other"})
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match="pip install kvpress"):
        PTEConfig(eviction="kvpress")


def test_a_cache_is_made_by_its_options():
    model = make_pte(eviction="random")
    other = PTEConfig(**{**SMALL, "eviction": "random", "eviction_options": {"seed": 4}})
    cache = PTECache(model.config, other)
    with pytest.raises(ValueError, match="another adapter configuration"):
        model(torch.arange(1, 9)[None], past_key_values=cache)
