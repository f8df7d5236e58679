"""What the tests share: one place for tolerances, one way to roll out and to score."""

import contextlib
import itertools
from dataclasses import dataclass

import pytest
import torch
from peft import get_peft_model

from peft_pte import PTEConfig
from peft_pte.eviction.policy import POLICIES as REGISTERED
from peft_pte.updates import UPDATES
from tests.cases import EAGER_ONLY, PAD, VOCABULARY, make_base

# Of the largest expected value. Replay against rollout over the whole case table differed by at most 1.3e-6 (float32) and
# 1.4e-3 (float16) on one CPU; other CPUs sum in other orders. bfloat16 did not differ there, at these sizes, and is allowed two
# of its rounding steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 4e-3}

SMALL = {"r": 4, "num_global_tokens": 5, "cache_window": 8, "init_weights": False}
"""A window of 8, of which 2 leave together; adapters that are not the identity."""


def assert_close(actual, expected, dtype=None, scale=1.0):
    """Equal up to what ``dtype`` (default: that of ``expected``) explains."""
    tolerance = TOLERANCE[dtype or expected.dtype] * scale
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * size)


POLICIES = ("sliding_window", "random", "key_diff", "attention", "head_budget")


def policy_options(base, eviction):
    """Options of a policy for a window of 8: some queries, and heads that differ."""
    if eviction == "attention":
        return {"queries": 3}
    if eviction != "head_budget":
        return {}
    with torch.no_grad():
        layers = base(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers
    heads = [part.shape[1] if (part := getattr(layer, "keys", None)) is not None else 0 for layer in layers]
    return {
        "queries": 2,
        "importance": [[float((3 * head + layer) % 5) for head in range(count)] for layer, count in enumerate(heads)],
    }


def make_pte(name="llama", *, dtype=torch.float32, seed=0, base=None, attn_implementation=None, model=None, **fields):
    """A tiny random model of the family ``name`` with a random PTE adapter, in evaluation mode.

    ``model`` overrides fields of the model's config, the other keywords are fields of the PTE config.
    """
    torch.manual_seed(seed)
    # transformers' eager attention takes its softmax in float32, which a float64 mask overflows: 0 / 0 for padding.
    attn_implementation = attn_implementation or ("sdpa" if dtype == torch.float64 else "eager")
    if name == "deepseek_v3" and fields.get("eviction") in ("attention", "head_budget"):
        pytest.skip("latent attention caches something else than the keys that its queries meet")
    if name in EAGER_ONLY and attn_implementation != "eager":
        pytest.skip(f"transformers has no {attn_implementation} attention for {name}")
    base = make_base(name, attn_implementation=attn_implementation, **(model or {})) if base is None else base
    if "eviction_options" not in fields and "eviction" in fields:
        fields["eviction_options"] = policy_options(base.to(dtype), fields["eviction"])
    config = PTEConfig(task_type="CAUSAL_LM", **{**SMALL, **fields})
    adapted = get_peft_model(base.to(dtype), config)
    return adapted.eval()


@contextlib.contextmanager
def forgotten():
    """What is registered within the block is forgotten behind it."""
    before = [(registry, dict(registry)) for registry in (REGISTERED, UPDATES)]
    try:
        yield
    finally:
        for registry, known in before:
            registry.clear()
            registry.update(known)


_STATES = itertools.count(1000)


def same_base(name="llama", **overrides):
    """The base model that :func:`make_pte` adapts, and a state of the generator that nothing else has started from.

    An adapter that is made next is like no other: it equals a saved one only if all of it is loaded.
    """
    torch.manual_seed(0)
    base = make_base(name, **overrides)
    torch.manual_seed(next(_STATES))
    return base


def make_prompts(lengths=(6, 3, 5), seed=1):
    """Left-padded random prompts: ``input_ids`` and ``attention_mask``."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


@dataclass
class Rollout:
    """What a generation produced."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor
    cache: object

    def truncated(self, length, lengths=None):
        """The first ``length`` thoughts, as a scoring batch; row ``i`` ends after ``lengths[i]``."""
        prompt = self.input_ids.shape[1] - self.logits.shape[1]
        columns = slice(0, prompt + length)
        ids, mask, labels = (part[:, columns].clone() for part in (self.input_ids, self.attention_mask, self.labels))
        if lengths is not None:
            over = torch.arange(ids.shape[1])[None] >= prompt + torch.tensor(lengths)[:, None]
            ids, mask, labels = ids.masked_fill(over, PAD), mask.masked_fill(over, 0), labels.masked_fill(over, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def roll_out(model, prompts, new_tokens, seed=2, **generation):
    """Sample ``new_tokens`` and keep the logits they were sampled from; ``generation`` goes to ``generate``."""
    torch.manual_seed(seed)
    output = model.generate(
        **prompts,
        max_new_tokens=new_tokens,
        do_sample=True,
        output_logits=True,
        return_dict_in_generate=True,
        **generation,
    )
    width = prompts["input_ids"].shape[1]
    copies = len(output.sequences) // len(prompts["input_ids"])
    prompt_mask = prompts["attention_mask"].repeat_interleave(copies, dim=0)
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), new_tokens)], 1)
    labels = output.sequences.clone()
    labels[:, :width] = -100
    logits = torch.stack(output.logits, dim=1)
    return Rollout(output.sequences, mask, labels, logits, output.past_key_values)


def thought_logits(model, batch, **kwargs):
    """Logits that predict the thoughts of a left-aligned batch (one prompt width), ``[B, T, vocabulary]``."""
    first = int((batch["labels"] != -100).any(dim=0).nonzero()[0])
    return model(**batch, **kwargs).logits[:, first - 1 : -1]


def log_probs(logits, batch):
    """Log-probs of the thoughts ``[B, T]``, zero where there is no label."""
    first = int((batch["labels"] != -100).any(dim=0).nonzero()[0])
    labels = batch["labels"][:, first:]
    picked = logits.log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0.0)


def trainable(model):
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model, batch):
    """Gradients of the scoring loss by name, and the loss."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}, loss.detach()
