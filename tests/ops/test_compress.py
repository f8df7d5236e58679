"""The cache-compression step against an oracle in float64 that goes token by token, pair by pair."""

import numpy as np
import pytest
import torch

from peft_pte.ops import compress_, encode
from tests.ops.common import DEVICE, IMPLEMENTATIONS

# Largest error seen over all cases below: 2e-7 of rows of norm 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def make_case(
    L=2,
    B=3,
    G=2,
    C=11,
    head_dim=20,
    E=5,
    Q=5,
    R=6,
    rotary_dim=None,
    padded=False,
    dtype=torch.float32,
    seed=0,
    due=None,
):
    """Random operands; slots that do not leave, padded ones, and those of rows that are not ``due`` (None: all are), hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    D = G * head_dim
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    rows = list(range(B)) if due is None else due
    slots = torch.stack([torch.randperm(C, generator=generator)[:E] for _ in rows])
    valid = None
    if padded:
        valid = torch.rand(len(rows), E, generator=generator) > 0.4
        valid[-1] = False
    keys, values = randn(L, B, G, C, head_dim), randn(L, B, G, C, head_dim)
    dead = torch.ones(B, C, dtype=torch.bool)
    dead[rows] = dead[rows].scatter(1, slots, torch.zeros_like(slots, dtype=torch.bool) if valid is None else ~valid)
    keys.masked_fill_(dead[None, :, None, :, None], torch.nan)
    values.masked_fill_(dead[None, :, None, :, None], torch.nan)
    cos = sin = None
    if rotary_dim:
        angles = randn(len(rows), E, rotary_dim // 2) * 3
        cos, sin = angles.cos() / 1.1, -angles.sin() / 1.1
        if valid is not None:
            cos, sin = (part.masked_fill(~valid[..., None], torch.nan) for part in (cos, sin))
    case = {
        "state": randn(L, B, Q, R),
        "keys": keys.to(dtype),
        "values": values.to(dtype),
        "slots": slots,
        "query": randn(L, Q, R),
        "key_projection": randn(L, R, D) / D**0.5,
        "value_projection": randn(L, R, D) / D**0.5,
        "cos": cos,
        "sin": sin,
        "valid": valid,
        "rows": None if due is None else torch.tensor(due),
    }
    floats = {"state", "query", "key_projection", "value_projection", "cos", "sin"}
    case = {name: part.to(kept) if name in floats and part is not None else part for name, part in case.items()}
    return {name: None if part is None else part.to(DEVICE) for name, part in case.items()}


def repeated(case, style):
    """``case`` with each cosine and sine once per dimension, in the order of ``style``."""
    if case["cos"] is None:
        return case
    spread = (
        (lambda part: part.repeat_interleave(2, dim=-1))
        if style == "interleaved"
        else (lambda part: part.repeat(1, 1, 2))
    )
    return {**case, "cos": spread(case["cos"]), "sin": spread(case["sin"])}


def oracle(case, gain, attention, style):
    case = {name: None if part is None else part.detach().cpu() for name, part in case.items()}
    case = {
        name: part.double() if part is not None and part.is_floating_point() else part for name, part in case.items()
    }
    out = case["state"].clone()
    layers, batch = case["keys"].shape[:2]
    due = list(range(batch)) if case["rows"] is None else case["rows"].tolist()
    for layer in range(layers):
        for place, row in enumerate(due):
            slots = case["slots"][place]
            tokens = [e for e in range(len(slots)) if case["valid"] is None or case["valid"][place, e]]
            scores, rows = [], []
            for e in tokens:
                key = case["keys"][layer, row, :, slots[e]].clone()
                if case["cos"] is not None:
                    half = case["cos"].shape[-1]
                    for pair in range(half):
                        one, two = (2 * pair, 2 * pair + 1) if style == "interleaved" else (pair, pair + half)
                        cos, sin = case["cos"][place, e, pair], case["sin"][place, e, pair]
                        first, second = key[:, one].clone(), key[:, two].clone()
                        key[:, one], key[:, two] = first * cos - second * sin, second * cos + first * sin
                projected = case["key_projection"][layer] @ key.flatten()
                scores.append(case["query"][layer] @ projected / case["query"].shape[-1] ** 0.5)
                rows.append(case["value_projection"][layer] @ case["values"][layer, row, :, slots[e]].flatten())
            total = case["state"][layer, row].clone()
            if tokens:
                scores = torch.stack(scores, dim=-1)
                weights = scores.softmax(dim=-1) if attention == "softmax" else scores / len(tokens)
                if attention == "slots":
                    weights = len(scores) * scores.exp() / scores.exp().sum(dim=0) / len(tokens)
                total += gain * weights @ torch.stack(rows)
            norm = total.norm(dim=-1, keepdim=True)
            out[layer, row] = torch.where(norm > 0, total / norm, total)
    return out


def assert_compresses(case, impl, attention="linear", style="half", gain=0.7):
    expected = oracle(case, gain, attention, style)
    given = repeated(case, style)
    compress_(**given, gain=gain, attention=attention, rotary_style=style, impl=impl)
    found = given["state"]
    assert found.isfinite().all()
    error = (found.cpu().double() - expected).abs().max().item()
    assert error < TOLERANCE[found.dtype], f"{error:.1e}"


SHAPES = {
    "one of everything": {"L": 1, "B": 1, "G": 1, "C": 1, "E": 1, "Q": 1, "R": 1, "head_dim": 2, "rotary_dim": 2},
    "odd": {"head_dim": 20, "rotary_dim": 20, "E": 7, "padded": True},
    "part of a head rotated": {"head_dim": 40, "rotary_dim": 12, "padded": True},
    "no rotation": {"head_dim": 33, "padded": True},
    "80": {"L": 1, "B": 2, "G": 3, "head_dim": 80, "rotary_dim": 80, "E": 9, "R": 17},
    "96": {"L": 1, "B": 1, "head_dim": 96, "rotary_dim": 96},
    "128": {"L": 1, "B": 1, "head_dim": 128, "rotary_dim": 128, "Q": 32, "R": 32},
    "256": {"L": 1, "B": 1, "G": 1, "head_dim": 256, "rotary_dim": 256},
    "split over the evicted": {
        "L": 1,
        "B": 2,
        "G": 1,
        "C": 300,
        "E": 250,
        "head_dim": 16,
        "rotary_dim": 16,
        "padded": True,
    },
    "enough programs not to split": {
        "L": 4,
        "B": 4,
        "G": 1,
        "C": 50,
        "E": 40,
        "head_dim": 16,
        "rotary_dim": 8,
        "padded": True,
    },
}


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compress(impl, shape, attention, style):
    assert_compresses(make_case(**SHAPES[shape]), impl, attention, style)


@pytest.mark.parametrize("sizes", [{}, {"C": 300, "E": 250, "head_dim": 16}], ids=["whole", "split"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("due", [[2], [3, 0], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_that_are_due_and_no_others(impl, due, padded, sizes):
    case = make_case(B=4, rotary_dim=16, padded=padded, due=due, **sizes)
    assert_compresses(case, impl, "softmax")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slots_of_another_number_of_rows(impl):
    case = make_case(due=[0, 1])
    with pytest.raises(ValueError, match="one row for each of the 3 rows that are due, got 2"):
        compress_(**{**case, "rows": None}, impl=impl)


@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dtypes(impl, dtype, attention):
    assert_compresses(make_case(head_dim=24, rotary_dim=16, padded=True, dtype=dtype), impl, attention)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_operands(impl):
    # As caches lay them out: tokens before heads, layers innermost but one, keys and values side by side.
    case = make_case(head_dim=20, rotary_dim=20, padded=True)
    both = torch.stack([case["keys"], case["values"]]).permute(2, 4, 1, 3, 0, 5).contiguous()
    case["keys"], case["values"] = both.permute(4, 2, 0, 3, 1, 5)
    wide = torch.full((3, 2, 6, 2 * 5), torch.nan, device=DEVICE)[..., ::2].permute(1, 0, 3, 2)
    case["state"] = wide.copy_(case["state"])
    case["valid"] = case["valid"].T.contiguous().T
    case["cos"], case["sin"] = torch.cat([case["cos"], case["sin"]], dim=-1).chunk(2, dim=-1)
    assert_compresses(case, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_projections_in_another_dtype_under_autocast(impl):
    case = make_case(rotary_dim=20)
    for name in ("query", "key_projection", "value_projection"):
        case[name] = case[name].bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_compresses(case, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_empty_state_stays_empty(impl):
    case = make_case(padded=True)
    case["state"], case["valid"] = torch.zeros_like(case["state"]), torch.zeros_like(case["valid"])
    compress_(**case, impl=impl)
    assert torch.equal(case["state"], torch.zeros_like(case["state"]))


@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_encode_layer_by_layer(impl, attention):
    case = make_case(head_dim=24)
    index = case["slots"][None, :, None, :, None].expand(2, -1, 2, -1, 24)
    rows = [case[name].gather(3, index).transpose(2, 3).flatten(3) for name in ("keys", "values")]
    projections = [case[name] for name in ("key_projection", "value_projection")]
    layers = zip(case["state"].clone(), case["query"], *rows, *projections, strict=True)
    expected = torch.stack(
        [
            encode(state, query, keys[:, None], values[:, None], *rest, gain=0.5, attention=attention, impl=impl)[:, 0]
            for state, query, keys, values, *rest in layers
        ]
    )
    compress_(**case, gain=0.5, attention=attention, impl=impl)
    torch.testing.assert_close(case["state"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", ["layer", "row", "head", "slot"])
def test_offsets_beyond_32_bits(axis, monkeypatch):
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        # The interpreter copies every storage back onto itself, which would touch all of this one.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    case = make_case(L=3, B=3, G=3, C=3, E=3, head_dim=16, rotary_dim=16, dtype=torch.float16)
    # Entry 2 of one axis starts 2**31 elements in; of 4 GB of memory, the pages that hold an entry are used.
    storage = torch.from_numpy(np.zeros(2**31 + 2**20, dtype=np.float16)) if DEVICE == "cpu" else None
    storage = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=DEVICE) if storage is None else storage
    strides = [16 * 3**place for place in range(4)]
    strides[["layer", "row", "head", "slot"].index(axis)] = 2**30
    far = storage.as_strided((3, 3, 3, 3, 16), (*strides, 1), 7)
    case["keys"] = far.copy_(case["keys"])
    case["values"] = far
    assert_compresses(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize(("layers", "heads"), [(36, 2), (28, 4), (32, 8)], ids=["Qwen2.5-3B", "Qwen2.5-7B", "Llama-8B"])
def test_true_shapes(layers, heads, batch, attention):
    sizes = {
        "L": layers,
        "B": batch,
        "G": heads,
        "C": 288,
        "E": 256,
        "Q": 32,
        "R": 32,
        "head_dim": 128,
        "rotary_dim": 128,
    }
    case = repeated(make_case(**sizes, dtype=torch.bfloat16), "half")
    exact = case["state"].double()
    doubled = {
        name: part.double() if part is not None and part.is_floating_point() else part for name, part in case.items()
    }
    compress_(**{**doubled, "state": exact}, attention=attention, impl="reference")
    compress_(**case, attention=attention, impl="triton")
    torch.testing.assert_close(case["state"].double(), exact, rtol=0, atol=1e-5)
