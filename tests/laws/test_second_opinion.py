"""A second opinion: the whole method written a second time, slow and plain, from the equations alone.

One row, one token, one layer at a time: no padding, no segments, no cache class, no hooks, nothing of the library but
the config's fields and the weights. Generation, scoring and every gradient must agree with it.
"""

import math

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from peft_pte import PTEConfig

VOCAB, EOS, PAD, LAYERS = 50, 1, 0, 2
PROMPT_LENGTHS = (4, 9, 6)  # of the rows that evict, one is padded and one is not
WINDOW, EVICT_RATIO = 6, 0.4  # m = floor(2.4) = 2
# The last token that is generated is never written: WINDOW + 2 is the first length whose generation evicts.
LENGTHS = {"below": WINDOW - 2, "at": WINDOW, "just_above": WINDOW + 2, "far_above": 5 * WINDOW + 1}

METHODS = [
    pytest.param(
        {
            "state_update": update,
            "encoder_attention": attention,
            "key_rotation": keys,
            "num_global_tokens": tokens,
            "state_address": address,
        },
        id=f"{update}-{attention}-{keys}-{tokens}-{address}",
    )
    for update in ("progressive", "frozen", "off")
    for attention in ("linear", "softmax", "slots")
    for keys in ("removed", "kept")
    for tokens in (0, 5)
    for address in ("value", "key")
    if (update, tokens) != ("off", 0)  # the identity needs rows: refused by PTEConfig
]

# With a host in float64 throughout, library and oracle differ only in the order of their sums: by 4e-14 at most.
EXACT = {"rtol": 0.0, "atol": 2e-13}
# transformers rounds to float32, even in a float64 model: its norms (2e-6 in the logits), and the cos and sin of its
# rotations (6e-7, of which 2e-7 because cos^2 + sin^2 is then not 1, so a rotation that is removed leaves a trace).
STOCK = {"rtol": 0.0, "atol": 5e-6}


def oracle(model, prompt, thoughts):
    """The logits after each token of one row, prompt first: ``[P + T, vocab]``."""
    host, pte = model.get_base_model().config, model.peft_config["default"]
    weights = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    heads, groups, R = host.num_attention_heads, host.num_key_value_heads, pte.r
    head_dim = host.hidden_size // heads
    frequency = host.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def rms_norm(x, name):
        return weights[f"{name}.weight"] * x / (x.pow(2).mean() + host.rms_norm_eps).sqrt()

    def rotate(x, position):
        left, right = x.chunk(2, dim=-1)
        cos, sin = (position * frequency).cos(), (position * frequency).sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def linear(x, name, S):
        A, B = weights[f"{name}.pte_up.default.weight"], weights[f"{name}.pte_down.default.weight"]
        return weights[f"{name}.base_layer.weight"] @ x + (pte.alpha / R) * (
            A @ ((S if pte.state_address == "value" else S.T) @ (B @ x))
        )

    def encode(layer, keys, values):
        h_g, W_Q, W_K, W_V = (
            weights[f"model.layers.{layer}.self_attn.thought_encoder.pte_{name}.default.weight"]
            for name in ("global_tokens", "query", "key", "value")
        )
        keys, values = (h_g, h_g) if keys is None else (keys, values)
        scores = (h_g @ W_Q.T) @ (keys @ W_K.T).T / math.sqrt(R)
        if pte.encoder_attention == "slots":
            scores = len(scores) * scores.exp() / scores.exp().sum(dim=0)
        scores = scores.softmax(dim=-1) if pte.encoder_attention == "softmax" else scores / len(keys)
        return scores @ (values @ W_V.T)

    def normalise(S):
        return S / S.norm(dim=-1, keepdim=True)

    def initial(layer):
        if pte.state_update == "off":
            return torch.eye(pte.num_global_tokens, R, dtype=torch.float64)
        if pte.num_global_tokens == 0:
            return torch.zeros(R, R, dtype=torch.float64)
        return normalise(encode(layer, None, None))

    def evict(layer):
        left = []
        for head, here in enumerate(held[layer]):
            # A head that is to hold fewer than it does loses more, one that is to hold more loses none.
            count = m if pte.eviction != "head_budget" else max(0, len(here) - budgets(pte, layer, W, m)[head] + m)
            order = sorted(here, key=scores(layer, head).__getitem__)[:count]
            left.append(sorted(order))
            held[layer][head] = [number for number in here if number not in order]
        if pte.state_update != "progressive":
            return
        longest = max(map(len, left))
        zero = torch.zeros(head_dim, dtype=torch.float64)

        def stacked(part):
            heads = [
                [zero] * (longest - len(numbers)) + [thought[layer][n][part][head] for n in numbers]
                for head, numbers in enumerate(left)
            ]
            return torch.stack([torch.stack(head) for head in heads], dim=1)

        keys, values = stacked(0 if pte.key_rotation == "kept" else 2), stacked(1)
        state[layer] = normalise(state[layer] + pte.update_gain * encode(layer, keys.flatten(1), values.flatten(1)))

    def scores(layer, head):
        """What the thoughts of a head are worth, by number; equal ones leave from the oldest on."""
        here = held[layer][head]
        if pte.eviction == "sliding_window":
            return {number: number for number in here}
        if pte.eviction == "random":
            first = len(prompt)
            mixed = {n: mix(mix(mix(head + 1009 * layer) + first + max(here)) + first + n) for n in here}
            return {number: value & 0xFFFFFF for number, value in mixed.items()}
        keys = {number: thought[layer][number][0][head] for number in here}
        if pte.eviction == "key_diff":
            mean = torch.stack([key / key.norm() for key in keys.values()]).mean(dim=0)
            return {number: -(key @ mean / key.norm() / mean.norm()).item() for number, key in keys.items()}
        total, seen = dict.fromkeys(here, 0.0), dict.fromkeys(here, 0)
        for number in list(range(len(thought[layer])))[-pte.eviction_options["queries"] :]:
            visible = [other for other in here if other <= number]
            columns = torch.stack([entry[0][head] for entry in prompted[layer]] + [keys[other] for other in visible])
            for query in queried[layer][number].chunk(groups)[head]:
                weights = (columns @ query / math.sqrt(head_dim)).softmax(dim=0)[len(prompt) :]
                for other, weight in zip(visible, weights, strict=True):
                    total[other] += weight.item()
                    seen[other] += 1
        return {number: total[number] / max(1, seen[number]) for number in here}

    W = math.inf if pte.cache_window is None else pte.cache_window
    m = None if pte.cache_window is None else max(1, math.floor(pte.evict_ratio * W))
    state = [initial(layer) for layer in range(host.num_hidden_layers)]
    prompted = [[] for _ in state]  # per layer, a list of (rotated key, value, unrotated key)
    thought = [[] for _ in state]
    queried = [[] for _ in state]
    held = [[[] for _ in range(groups)] for _ in state]  # per layer and head, the numbers of the thoughts in the cache
    logits = []
    for position, token in enumerate(prompt + thoughts):
        written = prompted if position < len(prompt) else thought
        if written is thought and len(thought[0]) >= W and (len(thought[0]) - W) % m == 0:
            for layer in range(host.num_hidden_layers):
                evict(layer)
        x = weights["model.embed_tokens.weight"][token]
        for layer, S in enumerate(state):
            here = f"model.layers.{layer}"
            h = rms_norm(x, f"{here}.input_layernorm")
            q, k, v = (linear(h, f"{here}.self_attn.{name}_proj", S).view(-1, head_dim) for name in "qkv")
            written[layer].append((rotate(k, position), v, k))
            q = rotate(q, position)
            if written is thought:
                queried[layer].append(q)
                for here_too in held[layer]:
                    here_too.append(len(thought[layer]) - 1)
            mixed = []
            for head, query in enumerate(q):
                group = head // (heads // groups)
                entries = prompted[layer] + [thought[layer][number] for number in held[layer][group]]
                keys, values = (torch.stack([entry[i][group] for entry in entries]) for i in (0, 1))
                mixed.append((keys @ query / math.sqrt(head_dim)).softmax(dim=0) @ values)
            mixed = torch.cat(mixed)
            x = x + linear(mixed, f"{here}.self_attn.o_proj", S)
            h = rms_norm(x, f"{here}.post_attention_layernorm")
            gate, up = (linear(h, f"{here}.mlp.{name}_proj", S) for name in ("gate", "up"))
            x = x + linear(gate * gate.sigmoid() * up, f"{here}.mlp.down_proj", S)
        logits.append(weights["lm_head.weight"] @ rms_norm(x, "model.norm"))
    return torch.stack(logits)


def budgets(pte, layer, window, step):
    """The window of a layer, split: what all heads get, then half of the rest alike and half by importance, whole thoughts."""
    importance, least = pte.eviction_options["importance"][layer], max(step, pte.eviction_options["queries"])
    rest = len(importance) * (window - least)
    shares = [rest * (0.5 / len(importance) + 0.5 * number / sum(importance)) for number in importance]
    whole = [math.floor(share) for share in shares]
    for head in sorted(range(len(whole)), key=lambda head: whole[head] - shares[head])[: rest - sum(whole)]:
        whole[head] += 1
    return [least + number for number in whole]


def mix(number):
    """64 bits for 64 bits, signed."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        number = ((number ^ ((number >> 33) & 0x7FFFFFFF)) * factor + 2**63) % 2**64 - 2**63
    return number ^ ((number >> 33) & 0x7FFFFFFF)


POLICIES = [
    {"eviction": "random"},
    {"eviction": "key_diff"},
    {"eviction": "attention", "eviction_options": {"queries": 1}},
    {"eviction": "attention", "eviction_options": {"queries": 3}},
    {"eviction": "head_budget", "eviction_options": {"queries": 1, "importance": [[1.0, 0.0], [0.2, 0.9]]}},
    {"eviction": "head_budget", "eviction_options": {"queries": 2, "importance": [[0.0, 5.0], [1.0, 1.0]]}},
]


@pytest.fixture
def float64_host(monkeypatch):
    """A Llama that keeps its norms and rotations in float64, as transformers' own does not."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        head_dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        angles = position_ids[..., None] * theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)


def build(**choices):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # far from uniform attention and logits, so that an error shows
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    choices = {"cache_window": WINDOW, "evict_ratio": EVICT_RATIO, "num_global_tokens": 5, **choices}
    pte = PTEConfig(task_type="CAUSAL_LM", r=4, alpha=6.0, init_weights=False, **choices)
    return get_peft_model(LlamaForCausalLM(config).double(), pte).eval()


def roll_out(model, length, **sampling):
    """Generate on a left-padded batch; rows end early by the rule below. Tokens per row, and the logits of each step."""
    torch.manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (P,)).tolist() for P in PROMPT_LENGTHS]
    P = max(PROMPT_LENGTHS)
    stops = [P + length, P + math.ceil(0.6 * length), P + 1]  # column of the row's EOS: never, midway, second thought

    def allowed(row, ids):
        return [EOS] if len(ids) == stops[row] else list(range(2, VOCAB))

    out = model.generate(
        input_ids=torch.tensor([[PAD] * (P - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        max_new_tokens=length,
        prefix_allowed_tokens_fn=allowed,
        output_logits=True,
        return_dict_in_generate=True,
        **(sampling or {"do_sample": True}),
    )
    assert out.sequences.shape[1] == P + length
    thoughts = [row[P : stop + 1].tolist() for row, stop in zip(out.sequences, stops, strict=True)]
    assert [EOS in row for row in thoughts] == [False, True, True]
    return prompts, thoughts, torch.stack(out.logits, dim=1)


def scoring_batch(prompts, thoughts, aligned=True):
    """Completions padded on the right; prompts padded on the left if ``aligned``, so that all end in one column."""
    ids, mask, labels = [], [], []
    P, T = max(map(len, prompts)), max(map(len, thoughts))
    for prompt, row in zip(prompts, thoughts, strict=True):
        left = P - len(prompt) if aligned else 0
        right = P + T - left - len(prompt) - len(row)
        ids.append([PAD] * left + prompt + row + [PAD] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(row)) + [0] * right)
        labels.append([-100] * (left + len(prompt)) + row + [-100] * right)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def assert_agrees(model, length, tolerance, **sampling):
    prompts, thoughts, generated = roll_out(model, length, **sampling)
    batches = [scoring_batch(prompts, thoughts, aligned) for aligned in (True, False)]
    with torch.no_grad():
        scored = [model(**batch).logits for batch in batches]
        for row, (prompt, tokens) in enumerate(zip(prompts, thoughts, strict=True)):
            expected = oracle(model, prompt, tokens)
            for batch, logits in zip(batches, scored, strict=True):
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(logits[row, real], expected, **tolerance)
            # `generate` hands its logits out in float32, whatever the model: one rounding is allowed on top.
            rounded = {"rtol": 2.0**-23, "atol": tolerance["atol"]}
            expected = expected[len(prompt) - 1 : -1].float()
            torch.testing.assert_close(generated[row, : len(tokens)], expected, **rounded)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_generation_and_scoring_agree_with_the_oracle(float64_host, method, length):
    assert_agrees(build(**method), length, EXACT)


@pytest.mark.parametrize(("window", "ratio"), [(4, 0.1), (5, 1.0), (7, 0.5), (None, 0.25)])
def test_other_windows(float64_host, window, ratio):
    assert_agrees(build(cache_window=window, evict_ratio=ratio), LENGTHS["far_above"], EXACT, do_sample=False)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_that_look(float64_host, policy, length):
    assert_agrees(build(**policy), length, EXACT)


@pytest.mark.parametrize(
    "method", [{"encoder_attention": "slots"}, {"encoder_attention": "softmax"}, {"state_update": "off"}], ids=str
)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_and_encoders(float64_host, policy, method):
    assert_agrees(build(**policy, **method, cache_window=11, evict_ratio=0.3), 50, EXACT)


@pytest.mark.parametrize("keys", ["removed", "kept"])
def test_transformers_own_llama(keys):
    assert_agrees(build(key_rotation=keys), LENGTHS["far_above"], STOCK)


@pytest.mark.parametrize("method", METHODS + POLICIES, ids=lambda method: str(method) if "eviction" in method else None)
def test_every_gradient_agrees_with_autograd_through_the_oracle(float64_host, method):
    method = {"state_update": "progressive", **method}
    model = build(**method, backprop_through_cache=True).train()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, VOCAB, (P,), generator=generator).tolist() for P in PROMPT_LENGTHS]
    thoughts = [torch.randint(2, VOCAB, (T,), generator=generator).tolist() for T in (3 * WINDOW, 2 * WINDOW, 2)]
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(".pte_" in name for name in trained)

    def loss(logits):  # in float64: the model's own `.loss` is computed in float32, whatever the model
        return cross_entropy(torch.cat(logits), torch.tensor([token for row in thoughts for token in row]))

    P = max(PROMPT_LENGTHS)
    scored = model(**scoring_batch(prompts, thoughts)).logits
    actual = loss([scored[row, P - 1 : P - 1 + len(tokens)] for row, tokens in enumerate(thoughts)])
    rows = zip(prompts, thoughts, strict=True)
    expected = loss([oracle(model, prompt, tokens)[len(prompt) - 1 : -1] for prompt, tokens in rows])
    torch.testing.assert_close(actual, expected, **EXACT)

    actual, expected = (torch.autograd.grad(x, trained.values(), allow_unused=True) for x in (actual, expected))
    for (name, weight), got, want in zip(trained.items(), actual, expected, strict=True):
        assert method["state_update"] != "progressive" or want.abs().max() > 1e-5, f"{name} is not tested"
        got, want = (torch.zeros_like(weight) if grad is None else grad for grad in (got, want))
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
