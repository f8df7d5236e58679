"""What one causal LM does with LoRA and with PTE: the same questions to every type."""

from __future__ import annotations

import inspect
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from peft_pte import PTEConfig

from .tiny import VOCABULARY, tiny_model

WINDOW, NEW, PROMPTS = 8, 30, (6, 3)
ADAPTER: dict[str, Any] = {"r": 4, "num_global_tokens": 5, "cache_window": WINDOW, "init_weights": False}
TOLERANCE = 1e-4
"""Of the largest logit, in float32, beside four times what the base model's own decoding differs from its own forward."""


class WrongError(Exception):
    """A number is not what it has to be."""


@dataclass
class Outcome:
    """What became of one type."""

    kind: str
    lora: str = "works"
    """``"works"``, or why it does not."""
    verdict: str = "works"
    """``"works"``, ``"refused"``, ``"wrong"``, ``"crash"`` or ``"not tried"``."""
    reason: str = ""
    where: str = ""
    """The question at which it ended."""
    static: str = "works"
    """``"works"``, or why there is no static form."""
    refilled: str = "works"
    """``"works"``, or why `generate_batch` does not refill rows."""
    layers: str = ""
    """Kinds of cache layers."""
    left_out: list[str] = field(default_factory=list)
    """What of the decoder layers is not adapted."""
    error: float = 0.0
    """Largest difference of a scored and a sampled logit, as a share of the largest logit."""

    still: set[str] = field(default_factory=set)
    """Linears to which LoRA's loss gives no gradient either."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if name != "still"}


def prompts(lengths: tuple[int, ...] = PROMPTS) -> dict[str, Tensor]:
    """Left-padded prompts."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY - 1, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def roll_out(
    model: Any, batch: dict[str, Tensor], new: int = NEW, **generation: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Sampled tokens as a scoring batch, and the logits they were sampled from."""
    torch.manual_seed(2)
    output = model.generate(
        **batch,
        max_new_tokens=new,
        do_sample=True,
        top_k=0,
        output_logits=True,
        return_dict_in_generate=True,
        **generation,
    )
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(output.sequences), new)], dim=1)
    labels = output.sequences.clone()
    labels[:, : batch["input_ids"].shape[1]] = -100
    return {"input_ids": output.sequences, "attention_mask": mask, "labels": labels}, torch.stack(output.logits, dim=1)


def score(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the tokens that carry labels; positions are those that `generate` gives."""
    first = int((batch["labels"] != -100).any(dim=0).nonzero()[0])
    if "position_ids" in inspect.signature(type(model.get_base_model()).forward).parameters:
        batch = {**batch, "position_ids": (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(**batch).logits[:, first - 1 : -1]


def difference(left: Tensor, right: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        return float("inf")
    return float((left - right).abs().max() / right.abs().max().clamp(min=1.0))


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the scoring loss, by name of the parameter."""
    model.zero_grad()
    model(**batch).loss.backward()
    found = {name: part.grad for name, part in model.named_parameters() if part.requires_grad}
    return {name: torch.zeros(()) if grad is None else grad.clone() for name, grad in found.items()}


def control(kind: str) -> tuple[str, set[str]]:
    """Whether LoRA works on a type (``"works"``, or why it does not), and linears to which its loss gives no gradient."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    try:
        model = get_peft_model(tiny_model(kind), lora)
        batch, _ = roll_out(model, prompts(), NEW)
        found = gradients(model.train(), batch)
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}", set()
    return "works", {name.partition(".lora_")[0] for name, grad in found.items() if not float(grad.abs().max()) > 0}


def try_type(kind: str, **fields: Any) -> Outcome:
    """Ask everything of one type."""
    outcome = Outcome(kind)
    with _quiet():
        try:
            tiny_model(kind)
        except Exception as error:
            outcome.verdict, outcome.reason = "not tried", f"{type(error).__name__}: {_line(error)}"
            return outcome
        outcome.lora, outcome.still = control(kind)
        try:
            for name, question in _questions(kind, outcome, fields):
                outcome.where = name
                question()
            outcome.where = ""
        except NotImplementedError as error:
            outcome.verdict, outcome.reason = "refused", _line(error)
            if "cache_window=None" in outcome.reason:
                _try_remedy(kind, outcome)
        except WrongError as error:
            outcome.verdict, outcome.reason = "wrong", _line(error)
        except Exception as error:
            if outcome.lora != "works":
                outcome.verdict, outcome.reason = "not tried", outcome.lora
                return outcome
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
            outcome.verdict, outcome.reason = "crash", f"{type(error).__name__} at {place}: {_line(error)}"
    return outcome


def _try_remedy(kind: str, outcome: Outcome) -> None:
    """Whether an unbounded cache, where a refusal names it, does work."""
    try:
        config = PTEConfig(task_type="CAUSAL_LM", **{**ADAPTER, "cache_window": None})
        model = get_peft_model(tiny_model(kind), config).eval()
        batch, logits = roll_out(model, prompts())
        error = difference(score(model, batch), logits)
        with model.disable_adapter():
            batch, logits = roll_out(model, prompts())
            own = difference(score(model, batch), logits)
    except Exception as error:
        outcome.verdict, outcome.reason = (
            "crash",
            f"the remedy fails ({type(error).__name__}: {_line(error)}): {outcome.reason}",
        )
        return
    if not error <= TOLERANCE + 4 * own:
        outcome.verdict, outcome.reason = "wrong", f"the remedy is wrong by {error:.1e}: {outcome.reason}"


def _questions(kind: str, outcome: Outcome, fields: dict[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    made: dict[str, Any] = {}

    def adapted(**more: Any) -> Any:
        base = tiny_model(kind)
        torch.manual_seed(1)
        return get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **{**ADAPTER, **fields, **more})).eval()

    def inject() -> None:
        made["model"] = model = adapted()
        outcome.left_out = [f"{name}: {part.reason}" for name, part in model.base_model.left_out().items()]
        kinds = [type(layer).__name__ for layer in model.base_model.new_cache().layers]
        outcome.layers = ", ".join(f"{kinds.count(name)} {name}" for name in dict.fromkeys(kinds))

    def generation() -> None:
        made["batch"], made["logits"] = roll_out(made["model"], prompts())

    def scoring() -> None:
        model, batch = made["model"], made["batch"]
        with model.disable_adapter():
            own_batch, own_logits = roll_out(model, prompts())
            own = difference(score(model, own_batch), own_logits)
        # The host's own error with the adapter: where nothing is bounded, only its two ways of computing differ.
        model.peft_config["default"].cache_window = None
        free_batch, free_logits = roll_out(model, prompts())
        own = max(own, difference(score(model, free_batch), free_logits))
        model.peft_config["default"].cache_window = WINDOW
        made["own"] = own
        outcome.error = error = difference(score(model, batch), made["logits"])
        if not error <= TOLERANCE + 4 * own:
            raise WrongError(
                f"scored logits differ from the rollout's by {error:.1e} of the largest; without a window by {own:.1e}"
            )

    def eviction() -> None:
        model = made["model"]
        model.peft_config["default"].cache_window = None
        unbounded = difference(score(model, made["batch"]), made["logits"])
        model.peft_config["default"].cache_window = WINDOW
        if not unbounded > max(1e-3, 10 * outcome.error):
            raise WrongError(f"the window makes no difference to logits ({unbounded:.1e})")

    def fresh() -> None:
        model = adapted(init_weights=True)
        # Without padding: some models number the columns of their inputs.
        batch, _ = roll_out(model, prompts((6, 6)), WINDOW - 1)
        with model.disable_adapter():
            wanted = score(model, batch)
        error = difference(score(model, batch), wanted)
        if not error <= TOLERANCE:
            raise WrongError(f"a fresh adapter within its window differs from the base model by {error:.1e}")

    def backward() -> None:
        model, batch = made["model"].train(), made["batch"]
        expected = gradients(model, batch)
        largest = max(float(grad.abs().max()) for grad in expected.values())
        still = [name for name, grad in expected.items() if not float(grad.abs().max()) > 0]
        still = [name for name in still if ".experts." not in name and name.partition(".pte_")[0] not in outcome.still]
        if still:
            raise WrongError(f"{len(still)} of {len(expected)} parameters get no gradient, `{still[0]}` is the first")
        if not model.get_base_model().supports_gradient_checkpointing:
            return
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        actual = gradients(model, batch)
        error = max(float((actual[name] - grad).abs().max()) for name, grad in expected.items()) / largest
        model.gradient_checkpointing_disable()
        model.eval()
        if not error <= 10 * TOLERANCE:
            raise WrongError(f"gradients with checkpointing differ by {error:.1e} of the largest")

    def static() -> None:
        try:
            _, logits = roll_out(made["model"], prompts(), cache_implementation="static")
        except NotImplementedError as error:
            outcome.static = _line(error)
            return
        error = difference(logits, made["logits"])
        if not error <= TOLERANCE:
            raise WrongError(f"the static form differs by {error:.1e}")

    def refilling() -> None:
        model = made["model"]
        lengths = (6, 3, 5)
        ids = [row[-length:].tolist() for row, length in zip(prompts(lengths)["input_ids"], lengths, strict=True)]
        batching = ContinuousBatchingConfig(max_requests_per_batch=2, return_logprobs=True, seed=1)
        config = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=0)
        try:
            outputs = model.generate_batch(ids, config, batching)
        except NotImplementedError as error:
            outcome.refilled = _line(error)
            return
        for output in outputs.values():
            tokens = torch.tensor([[*output.prompt_ids, *output.generated_tokens]])
            start = len(output.prompt_ids)
            labels = tokens.clone()
            labels[:, :start] = -100
            logits = score(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
            scored = logits.log_softmax(dim=-1)[0].gather(-1, tokens[0, start:, None])[:, 0]
            error = float((scored - torch.tensor(output.logprobs)).abs().max() / logits.abs().max().clamp(min=1.0))
            if not error <= 2 * TOLERANCE + 8 * made["own"]:
                raise WrongError(f"log-probs of a row that was refilled differ from the scored ones by {error:.1e}")

    def saving() -> None:
        wanted = score(made["model"], made["batch"])
        with tempfile.TemporaryDirectory() as folder:
            made["model"].save_pretrained(folder)
            torch.manual_seed(99)
            loaded = PeftModel.from_pretrained(tiny_model(kind), folder).eval()
        error = difference(score(loaded, made["batch"]), wanted)
        if not error <= TOLERANCE:
            raise WrongError(f"a saved adapter scores otherwise when loaded, by {error:.1e}")

    yield "injection", inject
    yield "generation", generation
    yield "scoring", scoring
    yield "eviction", eviction
    yield "fresh adapter", fresh
    yield "gradients", backward
    yield "static form", static
    yield "generate_batch", refilling
    yield "saving and loading", saving


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:600]
    # Sets come in any order.
    return re.sub(r"\{('[^{}]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", text)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
