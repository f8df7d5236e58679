"""A machine with two devices, on a CPU: tensors that know where they are, and operations that refuse operands from both.

Everything computes on the CPU; a ``Placed`` tensor holds an ordinary one and says which of two devices it is on. What a machine with two
accelerators would refuse raises here. Registering devices cannot be undone, so ``python -m tests.integrations.devices FILE`` tries what is
listed in ``TRIALS`` in a process of its own, and writes what went wrong.
"""

import json
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers.generation import ContinuousBatchingConfig

from peft_pte import PTEConfig, convert_lora
from tests.cases import EAGER_ONLY, make_base
from tests.helpers import SMALL, assert_close, make_prompts, policy_options

NAME = "twin"
_MOVES = ("_to_copy", "copy_")
_TAKES_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")


class ElsewhereError(RuntimeError):
    """Operands are on different devices."""


class _Event:
    """Of a device that does everything at once."""

    def __init__(self, device):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


class _Backend(_DummyBackendModule):
    def device_count(self):
        return 2

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class Placed(Tensor):
    """A tensor on one of the two devices."""

    @staticmethod
    def __new__(cls, held, device):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device, **layout)

    def __init__(self, held, device):
        self.held = held

    def __repr__(self):
        return f"{self.held!r} on {self.device}"

    def tolist(self):
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [part for part in _pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    placed = [part for part in tensors if isinstance(part, Placed)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not placed and (asked is None or asked.type != NAME):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if name not in _MOVES:
        _check(name, tensors)
    device = (tensors[0] if name == "copy_" else placed[0]).device if asked is None else asked
    args, kwargs = _pytree.tree_map(lambda part: part.held if isinstance(part, Placed) else part, (args, kwargs))
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    # What is written in place stays the tensor that it was.
    known = {id(part.held): part for part in placed}

    def place(part):
        if not isinstance(part, Tensor) or device.type != NAME:
            return part
        return known[id(part)] if id(part) in known else Placed(part, torch.device(NAME, device.index or 0))

    return _pytree.tree_map(place, func(*args, **kwargs))


def _check(name, tensors):
    """Refuse what accelerators refuse: two devices, except for single numbers, and for indices on the CPU."""
    places = {part.device for part in tensors if isinstance(part, Placed) or part.ndim}
    if name in _TAKES_INDICES and all(part.device.type == "cpu" for part in tensors[1:2]):
        places.discard(torch.device("cpu"))
    if len(places) > 1:
        raise ElsewhereError(f"{name} of tensors on {sorted(map(str, places))}")


class _Operations(TorchDispatchMode):
    """Makes and moves tensors: those calls hold none that is placed yet."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _indices(index):
    """``index`` with tensors for lists."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Literals(TorchFunctionMode):
    """Makes tensors of numbers, which torch does below all operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def two_devices():
    """Within the block, ``twin:0`` and ``twin:1`` are devices."""
    # The engine knows how many devices of this kind there are by itself, and counts one; its threads are per device.
    with _Operations(), _Literals(), torch.autograd.set_multithreading_enabled(False):
        yield


def spread(base, main):
    """``base`` with its first decoder layer on one device and the others on the second, as ``device_map`` of transformers does it.

    Inputs are sent to the device ``main`` first.
    """
    places = {}
    backbone = base.base_model
    prefix = base.base_model_prefix
    for name, child in backbone.named_children():
        if isinstance(child, torch.nn.ModuleList):
            places |= {f"{prefix}.{name}.{index}": f"{NAME}:{min(index, 1)}" for index in range(len(child))}
        else:
            places[f"{prefix}.{name}"] = f"{NAME}:{int('norm' in name or name == 'ln_f')}"
    tied = base.config.get_text_config().tie_word_embeddings
    for name, child in base.named_children():
        if child is not backbone:
            places[name] = f"{NAME}:{int(not tied)}"
    return dispatch_model(base, places, main_device=main, skip_keys=base._skip_keys_device_placement)


class Machine:
    """Where a trial is run: on the CPU, or on two devices, of which ``main`` gets the inputs."""

    def __init__(self, family, main=None):
        self.family, self.main = family, main

    def base(self, **model):
        torch.manual_seed(0)
        attention = "eager" if self.family in EAGER_ONLY else "sdpa"
        base = make_base(self.family, attn_implementation=attention, **model)
        return base if self.main is None else spread(base, self.main)

    def pte(self, **fields):
        if "eviction" in fields:
            torch.manual_seed(0)
            fields["eviction_options"] = policy_options(make_base(self.family), fields["eviction"])
        base = self.base()
        torch.manual_seed(5)
        return get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **{**SMALL, **fields})).eval()

    def batch(self, columns=30, lengths=(6, 3, 5)):
        """Rows with prompts of different lengths, padded in front, all of which evict."""
        prompts = make_prompts(lengths)
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(1, 57, (len(lengths), columns), generator=generator)
        width = prompts["input_ids"].shape[1]
        labels = torch.cat([torch.full((len(lengths), width), -100), ids], dim=1)
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids)], dim=1)
        ids = torch.cat([prompts["input_ids"], ids], dim=1)
        return self.placed({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def prompts(self, **options):
        return self.placed(make_prompts(**options))

    def placed(self, batch):
        return batch if self.main is None else {name: part.to(f"{NAME}:0") for name, part in batch.items()}


def score(machine, checkpointing=False, **fields):
    model, batch = machine.pte(**fields).train(), machine.batch()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(**batch, output_hidden_states=not checkpointing)
    output.loss.backward()
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    return [output.loss, output.logits, *(output.hidden_states or ()), *gradients]


def generate(machine, fields=None, **options):
    model, prompts = machine.pte(**(fields or {})), machine.prompts()
    with torch.no_grad():
        return [model.generate(**prompts, max_new_tokens=30, do_sample=False, **options)]


def record(machine, eviction):
    """Decode, and score with what left."""
    model, prompts = machine.pte(eviction=eviction).train(), machine.prompts()
    with torch.no_grad():
        output = model.generate(
            **prompts, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, return_evictions=True
        )
    width = prompts["input_ids"].shape[1]
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(output.sequences[:, width:])], dim=1)
    labels = output.sequences.clone()
    labels[:, :width] = -100
    scored = model(output.sequences, mask, labels=labels, evictions=output.evictions)
    scored.loss.backward()
    return [output.sequences, scored.logits]


def turns(machine, **fields):
    """A cache that is kept, continued by turns of different lengths, and one of whose rows starts again."""
    model, first = machine.pte(**fields), machine.prompts()
    cache, found = model.base_model.new_cache(), []
    mask = first["attention_mask"]
    with torch.no_grad():
        found.append(model(**first, past_key_values=cache, prompt_length=first["input_ids"].shape[1]).logits)
        for seed, lengths in enumerate(((9, 4, 12), (1, 1, 1), (3, 20, 5))):
            turn = machine.prompts(lengths=lengths, seed=10 + seed)
            mask = torch.cat([mask, turn["attention_mask"]], dim=1)
            found.append(model(turn["input_ids"], mask, past_key_values=cache).logits)
        fresh = machine.prompts(lengths=(4,), seed=20)
        found.append(model.base_model.replace_rows(cache, [1], **fresh, prompt_length=4).logits)
    return found


def requests(machine, cache_implementation=None, **fields):
    """Requests in rows that are refilled."""
    model = machine.pte(prompt_end=2, **fields)
    prompts = [[3 + index, 4, 5, 6 + index][: 3 + index % 2] for index in range(5)]
    options = {} if cache_implementation is None else {"cache_implementation": cache_implementation}
    rows = ContinuousBatchingConfig(max_requests_per_batch=2)
    found = model.generate_batch(
        prompts, continuous_batching_config=rows, max_new_tokens=20, do_sample=False, **options
    )
    return [torch.tensor(output.generated_tokens) for output in found.values()]


def save_and_load(machine):
    with TemporaryDirectory() as folder:
        # Files are written from memory, which placed tensors have none of.
        Machine(machine.family).pte().save_pretrained(folder)
        torch.manual_seed(99)
        loaded = PeftModel.from_pretrained(machine.base(), folder).eval()
    with torch.no_grad():
        return [loaded(**machine.batch()).logits]


def convert(machine):
    base = machine.base()
    torch.manual_seed(5)
    lora = get_peft_model(
        base,
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    batch = machine.batch(columns=6)
    with torch.no_grad():
        expected = lora(**batch).logits
        converted = convert_lora(lora, cache_window=8, prompt_end=4).eval()
        found = converted(**batch).logits
    assert_close(_held(found), _held(expected), scale=10.0)
    return [expected]


def mix(machine):
    parts = [torch.ones(2), torch.ones(2)]
    if machine.main is not None:
        parts = [part.to(f"{NAME}:{place}") for place, part in enumerate(parts)]
    return [parts[0] + parts[1]]


POLICIES = ("random", "key_diff", "attention", "head_budget")
TRIALS = {
    **{f"score {family}": (family, score, {}) for family in ("llama", "gpt2", "gemma2", "deepseek_v3", "smollm3")},
    **{f"generate {family}": (family, generate, {}) for family in ("llama", "gpt2", "gemma2", "deepseek_v3", "opt")},
    "score, checkpointed": ("llama", score, {"checkpointing": True}),
    "score, layers recomputed": ("llama", score, {"checkpointing": True, "recompute_layers": True}),
    "score, offloaded": ("llama", score, {"checkpointing": True, "recompute_layers": True, "offload": True}),
    "score, one after the other": ("llama", score, {"encoder_attention": "linear", "backprop_through_cache": False}),
    **{f"score, {policy}": ("llama", score, {"eviction": policy}) for policy in POLICIES},
    **{f"generate, {policy}": ("llama", generate, {"fields": {"eviction": policy}}) for policy in POLICIES},
    **{f"record, {policy}": ("llama", record, {"eviction": policy}) for policy in POLICIES},
    **{f"turns, {policy}": ("llama", turns, {"eviction": policy}) for policy in ("sliding_window", *POLICIES)},
    "generate by a marker": ("llama", generate, {"fields": {"prompt_end": 3}}),
    "generate at fixed addresses": ("llama", generate, {"cache_implementation": "static"}),
    "generate at fixed addresses gpt2": ("gpt2", generate, {"cache_implementation": "static"}),
    "generate at fixed addresses, attention": (
        "llama",
        generate,
        {"fields": {"eviction": "attention"}, "cache_implementation": "static"},
    ),
    "beams": ("llama", generate, {"num_beams": 3}),
    "requests": ("llama", requests, {}),
    "requests, key_diff": ("llama", requests, {"eviction": "key_diff"}),
    "requests gemma2": ("gemma2", requests, {}),
    "requests at fixed addresses": ("llama", requests, {"cache_implementation": "static"}),
    "beams gemma2": ("gemma2", generate, {"num_beams": 3}),
    "score qwen2_moe": ("qwen2_moe", score, {}),
    "save and load": ("llama", save_and_load, {}),
    "unbounded": ("llama", score, {"cache_window": None}),
    "convert a LoRA": ("llama", convert, {}),
}
# Where the inputs are is not where the model wants them.
TRIALS |= {
    f"{name}, inputs elsewhere": (*TRIALS[name], f"{NAME}:1")
    for name in (
        "score llama",
        "generate llama",
        "generate gpt2",
        "score, checkpointed",
        "generate by a marker",
        "generate, attention",
        "generate at fixed addresses",
        "generate at fixed addresses gpt2",
        "generate at fixed addresses, attention",
        "turns, sliding_window",
        "turns, key_diff",
        "record, attention",
        "beams",
        "requests",
        "requests gemma2",
    )
}


def _held(part):
    return part.held if isinstance(part, Placed) else part


def attempt(family, trial, options, main="twin:0"):
    """What is wrong with a trial on two devices; empty: nothing."""
    expected = trial(Machine(family), **options)
    try:
        with two_devices():
            found = trial(Machine(family, main), **options)
            found = [_held(part.detach()) for part in found]
        for mine, theirs in zip(found, expected, strict=True):
            if theirs.is_floating_point():
                assert_close(mine, theirs.detach(), scale=10.0)
            elif not torch.equal(mine, theirs):
                return "other tokens"
    except Exception:  # Whatever it is, the test shows it.
        return traceback.format_exc()
    return ""


def main():
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    torch.Event = _Event
    names = sys.argv[2:] or TRIALS
    found = {}
    for name in names:
        found[name] = attempt(*{**TRIALS, "a mix of devices": ("llama", mix, {})}[name])
        print(name, "FAILED" if found[name] else "")
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
