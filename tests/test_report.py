"""What a reader is told of a cache: `model.report()`, and the figures behind it."""

import pytest
import torch
from transformers import DynamicCache

from peft_pte.passes.modes import as_base, evaluating
from peft_pte.seam import Generation, PromptSpec, Seam
from tests.cases import FAMILIES
from tests.helpers import SMALL, make_prompts, make_pte, roll_out

WINDOW = SMALL["cache_window"]
EOS = 5


def own_cache_bytes(model, sequences, mask):
    """What the base model's own cache holds after it has read ``sequences``."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=sequences, attention_mask=mask, past_key_values=cache, use_cache=True)
    tensors = [part for layer in cache.layers for part in vars(layer).values() if isinstance(part, torch.Tensor)]
    return sum(part.numel() * part.element_size() for part in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_cache_is_as_large_as_the_models_own(family):
    model = make_pte(family)
    prompts = make_prompts((6, 6, 6))
    rollout = roll_out(model, prompts, 3 * WINDOW)
    read = rollout.input_ids[:, :-1]
    figures = Seam.of(model.get_base_model()).statistics.drain()
    assert figures["full_cache_bytes"] == own_cache_bytes(model, read, torch.ones_like(read))
    assert figures["cache_bytes"] == rollout.cache.nbytes < figures["full_cache_bytes"]


def test_what_is_written_is_counted_to_the_ends_of_rows():
    generation = Generation(PromptSpec(), ends=[EOS, 7], given=2)
    sequences = torch.tensor([[1, EOS, 3, EOS, EOS], [1, 2, 3, 4, 6], [0, 2, 7, 0, 0]])
    assert generation.written(sequences) == 2 + 3 + 1
    generation.ends = None
    assert generation.written(sequences) == 9


def test_a_report_is_of_what_ran_since_the_last():
    model = make_pte()
    assert str(model.report()) == "Nothing ran yet."
    rollout = roll_out(model, make_prompts(), 3 * WINDOW)
    report = model.report()
    assert report.evictions_per_sequence == 8
    assert report.state_norms == pytest.approx([1.0] * len(rollout.cache.layers), abs=1e-5)
    assert report.cache_bytes == rollout.cache.nbytes
    assert report.tokens_per_second > 0
    assert report.fidelity == {}
    shown = str(report)
    assert "evictions per sequence  8.0" in shown
    assert f"a full one {report.full_cache_bytes / 1e6:,.2f} MB" in shown
    assert model.report() == type(report)()
    model.generate_batch([[3, 4, 5]], max_new_tokens=2 * WINDOW, min_new_tokens=2 * WINDOW)
    report = model.report()
    assert report.tokens_per_second > 0
    # The last token is not read.
    read = torch.ones(1, 3 + 2 * WINDOW - 1, dtype=torch.long)
    assert report.full_cache_bytes == own_cache_bytes(model, read, torch.ones_like(read))


def test_a_text_is_compared_with_the_full_cache():
    model = make_pte()
    batch = roll_out(model, make_prompts(), 3 * WINDOW).truncated(3 * WINDOW, [3 * WINDOW, 2, WINDOW + 1])
    ids, mask, first = batch["input_ids"], batch["attention_mask"], 6
    model.report()
    figures = model.report(ids, mask, prompt_length=first).fidelity
    with torch.no_grad(), evaluating(model):
        bounded = model(input_ids=ids, attention_mask=mask, prompt_length=first).logits.log_softmax(-1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with model.disable_adapter():
            full = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    divergence = (bounded.exp() * (bounded - full)).sum(-1)[:, :-1]
    chosen = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1]) >= first)
    assert figures["kl"] == pytest.approx(divergence[chosen].mean().item(), rel=1e-4)
    gaps = (bounded - full)[:, :-1].gather(2, ids[:, 1:, None])[..., 0][chosen]
    assert figures["ratio_p5"] == pytest.approx(gaps.quantile(0.05).exp().item(), rel=1e-4)
    assert "KL to the full cache" in str(model.report(ids, mask, prompt_length=first))
    # Asking leaves nothing behind.
    assert str(model.report()) == "Nothing ran yet."


def test_a_text_without_an_end_of_its_prompt_is_refused():
    model = make_pte()
    with pytest.raises(ValueError, match="`prompt_length` must say where thinking starts"):
        model.report(torch.ones(1, 9, dtype=torch.long))


def test_the_base_for_a_while():
    model = make_pte(modules_to_save=["lm_head"])
    base = model.get_base_model()
    ids = make_prompts()["input_ids"]
    next(parameter for parameter in base.parameters() if parameter.requires_grad).requires_grad_(False)
    learning = [parameter.requires_grad for parameter in base.parameters()]
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.add_(1.0)
        adapted = model(ids).logits
        with as_base(base):
            found = base(ids).logits
        assert torch.equal(model(ids).logits, adapted)
        assert [parameter.requires_grad for parameter in base.parameters()] == learning
        with model.disable_adapter():
            assert torch.equal(found, model(ids).logits)
    assert not torch.equal(found, adapted)


def test_nothing_drops_out_for_a_while():
    model = make_pte()
    model.train()
    parts = list(model.modules())
    parts[3].training = False
    modes = [part.training for part in parts]
    with evaluating(model):
        assert not any(part.training for part in parts)
    assert [part.training for part in parts] == modes
