"""The update of the state against a float64 oracle: outputs and every gradient, odd sizes, padding."""

import pytest
import torch

from peft_pte.ops import delta, encode, resolve_impl
from peft_pte.updates import UPDATES, register_update
from tests.helpers import forgotten
from tests.ops.common import DEVICE, IMPLEMENTATIONS, assert_matches

# (B, N, E, D, Q, R)
SIZES = [
    (1, 1, 1, 16, 1, 1),
    (2, 2, 63, 24, 5, 6),
    (3, 5, 7, 100, 32, 32),
    (2, 3, 32, 64, 16, 16),
    (1, 1, 1000, 33, 3, 17),
]


def oracle_encode(state, query, keys, values, key_projection, value_projection, valid, gain, attention):
    """One eviction after the other."""
    states = []
    for part in range(keys.shape[1]):
        operands = (keys[:, part], values[:, part], key_projection, value_projection)
        state = oracle_eviction(state, query, *operands, None if valid is None else valid[:, part], gain, attention)
        states.append(state)
    return torch.stack(states, dim=1)


def oracle_eviction(state, query, keys, values, key_projection, value_projection, valid, gain, attention):
    """Row by row, token by token, as the equations have it."""
    rows = []
    for row in range(len(state)):
        kept = range(keys.shape[1]) if valid is None else valid[row].nonzero()[:, 0].tolist()
        update = torch.zeros_like(state[row])
        if len(kept):
            k = keys[row, kept] @ key_projection.T
            v = values[row, kept] @ value_projection.T
            scores = query @ k.T / query.shape[-1] ** 0.5
            weights = scores.softmax(dim=-1) if attention == "softmax" else scores / len(kept)
            if attention == "slots":
                weights = len(query) * scores.exp() / scores.exp().sum(dim=0) / len(kept)
            update = weights @ v
        total = state[row] + gain * update
        norm = total.norm(dim=-1, keepdim=True)
        rows.append(torch.where(norm > 0, total / norm.clamp(min=1e-300), total))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_encode(impl, size, dtype, attention, padded):
    batch, times, evicted, width, queries, rank = size
    operands = [
        torch.randn(batch, queries, rank, dtype=torch.float64),
        torch.randn(queries, rank, dtype=torch.float64),
        torch.randn(batch, times, evicted, width, dtype=torch.float64),
        torch.randn(batch, times, evicted, width, dtype=torch.float64),
        torch.randn(rank, width, dtype=torch.float64) / width**0.5,
        torch.randn(rank, width, dtype=torch.float64) / width**0.5,
    ]
    operands = [operand.to(DEVICE) for operand in operands]
    valid = None
    if padded:
        valid = torch.rand(batch, times, evicted, device=DEVICE) > 0.4
        valid[-1, -1] = False
        valid[0, 0] = False
    assert_matches(
        lambda *args: encode(*args, valid, gain=0.3, attention=attention, impl=impl),
        lambda *args: oracle_encode(*args, valid, 0.3, attention),
        operands,
        dtype,
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_encode_an_empty_state_stays_empty(impl):
    zero, valid = (
        torch.zeros(2, 3, 4, device=DEVICE, requires_grad=True),
        torch.zeros(2, 2, 5, dtype=torch.bool, device=DEVICE),
    )
    keys, weights = torch.randn(2, 2, 5, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    state = encode(zero, torch.randn(3, 4, device=DEVICE), keys, keys, weights, weights, valid, impl=impl)
    assert torch.equal(state, torch.zeros_like(state))
    (gradient,) = torch.autograd.grad(state[:, -1].sum(), zero)
    assert torch.equal(gradient, torch.ones_like(zero))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_encode_computes_in_float32_under_autocast(impl):
    operands = [
        torch.randn(*shape, device=DEVICE) for shape in ((2, 3, 4), (3, 4), (2, 1, 5, 8), (2, 1, 5, 8), (4, 8), (4, 8))
    ]
    expected = encode(*operands, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(encode(*operands, impl=impl), expected)


@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_evictions_together_are_evictions_one_by_one(impl, attention):
    state, query, wk, wv = (torch.randn(*shape, device=DEVICE) for shape in ((2, 5, 4), (5, 4), (4, 8), (4, 8)))
    # Not contiguous, as slices of a cache are.
    keys, values = torch.randn(2, 8, 15, 2, device=DEVICE).unflatten(2, (5, 3)).permute(4, 0, 2, 3, 1).unbind(0)
    together = encode(state, query, keys, values, wk, wv, attention=attention, impl=impl)
    for part in range(5):
        cut = (keys[:, part : part + 1], values[:, part : part + 1])
        state = encode(state, query, *cut, wk, wv, attention=attention, impl=impl)[:, 0]
        torch.testing.assert_close(together[:, part], state, rtol=0, atol=2e-6)


def test_every_update_has_a_source():
    assert all(update.source for update in UPDATES.values())


def test_a_registered_update():
    def double(scores, valid):
        return 2.0 * scores / (scores.shape[-1] if valid is None else valid.sum(dim=-1)[..., None, None])

    operands = [torch.randn(*shape) for shape in ((2, 3, 4), (3, 4), (2, 1, 5, 8), (2, 1, 5, 8), (4, 8), (4, 8))]
    valid = torch.tensor([True, True, False, True, False]).expand(2, 1, 5)
    with forgotten():
        with pytest.raises(ValueError, match="`encoder_attention` 'linear' is known already"):
            register_update("linear", source="a test")(double)
        for _ in range(2):  # As where a module is loaded again.
            assert register_update("double", source="a test")(double) is double
        found = encode(*operands, valid, attention="double", gain=0.5)
        # What it gives to padding is not used.
        torch.testing.assert_close(found, encode(*operands, valid, attention="linear", gain=1.0))
        with pytest.raises(
            NotImplementedError, match="`impl=\"triton\"` knows the updates 'linear', 'slots', 'softmax'"
        ):
            encode(*operands, attention="double", impl="triton")


def test_auto_is_resolved_and_visible():
    assert resolve_impl("auto", torch.device("cpu"), "encode", torch.float32, 1) == "reference"
    assert resolve_impl("triton", torch.device(DEVICE), "encode", torch.float32, 1) == "triton"
    with pytest.raises(ValueError, match="`impl` must be one of"):
        resolve_impl("cuda", torch.device("cpu"), "encode", torch.float32, 1)


def test_unknown_attention():
    operands = [torch.randn(*shape) for shape in ((2, 3, 4), (3, 4), (2, 1, 5, 8), (2, 1, 5, 8), (4, 8), (4, 8))]
    with pytest.raises(ValueError, match="`attention` must be one of 'linear', 'softmax', 'slots'"):
        encode(*operands, attention="flash")


def test_shapes_are_checked_in_tests():
    with pytest.raises(Exception, match=r"(?i)type-check|shape|dim"):
        delta(torch.randn(2, 3, 4), torch.randn(5, 7), torch.randn(2, 3, 5), torch.randn(6, 3))
