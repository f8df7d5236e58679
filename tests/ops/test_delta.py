"""The adapters' reading of the state against a float64 oracle: outputs and every gradient, alone and in groups."""

from functools import partial

import pytest
import torch

from peft_pte.ops import delta, delta_add_, delta_read
from peft_pte.ops.delta.reference import CastProduct
from tests.ops.common import DEVICE, IMPLEMENTATIONS, TOLERANCE, assert_matches

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, T, in, out, Q, R)
SIZES = [(1, 1, 16, 16, 1, 1), (3, 1, 33, 20, 4, 6), (2, 63, 70, 100, 32, 8), (1, 300, 24, 17, 5, 32)]
# (B, in, outs, Q, R)
GROUPS = [
    (1, 16, [8], 1, 1),
    (3, 300, [20, 33, 7], 4, 6),
    (37, 1100, [70, 150], 32, 32),
    (2, 70, [10, 300, 10, 11], 5, 17),
]


def oracle(hidden, down, state, up, *onto, scale=1.7):
    update = torch.stack([x @ (scale * up @ s @ down).T for x, s in zip(hidden, state, strict=True)])
    return update + onto[0] if onto else update


def make_operands(batch, tokens, inner, outer, queries, rank):
    operands = [
        torch.randn(batch, tokens, inner, dtype=torch.float64) / inner**0.5,
        torch.randn(rank, inner, dtype=torch.float64),
        torch.randn(batch, queries, rank, dtype=torch.float64) / rank**0.5,
        torch.randn(outer, queries, dtype=torch.float64) / queries**0.5,
        torch.randn(batch, tokens, outer, dtype=torch.float64),
    ]
    return [operand.to(DEVICE) for operand in operands]


@pytest.mark.parametrize("added", [False, True], ids=["alone", "onto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_delta(impl, size, dtype, added):
    def call(hidden, down, state, up, *onto):
        return delta(hidden, down, state, up, scale=1.7, onto=onto[0] if onto else None, impl=impl)

    operands = make_operands(*size)
    assert_matches(call, oracle, operands if added else operands[:4], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_state_read_from_its_other_side(impl, dtype):
    def call(hidden, down, state, up):
        return delta(hidden, down, state.mT, up, scale=1.7, impl=impl)

    def exact(hidden, down, state, up):
        return oracle(hidden, down, state.mT, up)

    hidden, down, state, up, _ = make_operands(3, 9, 33, 20, 4, 6)
    assert_matches(call, exact, [hidden, down, state.mT.contiguous(), up], dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_adapter_in_float32_onto_a_linear_in_bfloat16(impl, autocast):
    *operands, onto = [operand.float() for operand in make_operands(2, 9, 24, 30, 5, 6)]
    operands = [operand.requires_grad_() for operand in operands]
    onto = onto.bfloat16().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        actual = delta(*operands, scale=1.7, onto=onto, impl=impl)
    exact = [operand.detach().double().requires_grad_() for operand in (*operands, onto)]
    expected = oracle(*exact)
    assert actual.dtype == torch.bfloat16
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(actual, (*operands, onto), upstream.bfloat16())
    wanted = torch.autograd.grad(expected, exact, upstream.bfloat16().double())
    for index, (one, other) in enumerate(zip((actual, *found), (expected, *wanted), strict=True)):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < TOLERANCE[torch.bfloat16], f"operand {index - 1}: {error:.1e}"
    assert [gradient.dtype for gradient in found] == [torch.float32] * 4 + [torch.bfloat16]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_onto_keeps_its_precision_under_autocast(impl):
    operands = [operand.float() for operand in make_operands(2, 3, 24, 30, 5, 6)]
    operands[3].zero_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(delta(*operands[:4], onto=operands[4], impl=impl), operands[4])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_operands(impl):
    hidden, down, state, up, onto = (operand.float() for operand in make_operands(3, 4, 24, 30, 5, 6))
    wide = torch.full((3, 5, 8), torch.nan, device=DEVICE)
    wide[..., :6] = state
    moved = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    onto = onto.mT.contiguous().mT
    actual = delta(moved, down.T.contiguous().T, wide[..., :6], up.T.contiguous().T, onto=onto, scale=1.7, impl=impl)
    torch.testing.assert_close(actual, oracle(hidden, down, state, up, onto), rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_saves_no_wide_tensor_beside_the_input(impl):
    operands = [operand.float().requires_grad_() for operand in make_operands(2, 50, 24, 200, 5, 6)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        delta(*operands[:4], onto=operands[4], impl=impl)
    tokens = [tensor for tensor in saved if tensor.numel() >= 2 * 50 * 5 and tensor.shape[-1] not in (5, 6)]
    assert {tensor.shape[-1] for tensor in tokens if tensor.shape[0] in (2, 100)} <= {24}


@pytest.mark.parametrize("wanted", [False, True], ids=["adapter", "all"])
@pytest.mark.parametrize(
    ("given", "dtype", "autocast"),
    [
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, None),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, None),
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_input_of_another_dtype_is_cast_and_kept_as_it_came(impl, given, dtype, autocast, wanted):
    hidden, *adapter, onto = (operand.to(dtype) for operand in make_operands(2, 50, 24, 200, 5, 6))
    hidden, onto = hidden.to(given), onto.to(given)
    upstream = torch.randn_like(onto)
    found, kept = [], []
    for x in (hidden, hidden.to(dtype)):
        leaf = hidden.clone().requires_grad_(wanted)
        x = leaf if x is hidden else leaf.to(dtype)
        operands = [operand.clone().requires_grad_() for operand in adapter]
        saved = []
        note = partial(lambda saved, tensor: saved.append(tensor) or tensor, saved)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None),
        ):
            out = delta(x, *operands, scale=1.7, onto=onto, impl=impl)
        wide = [tensor for tensor in saved if tensor.numel() == hidden.numel() and tensor.shape[-1] == 24]
        kept.append({(tensor.dtype, tensor.data_ptr() == leaf.data_ptr()) for tensor in wide})
        found.append((out, *torch.autograd.grad(out, [leaf, *operands] if wanted else operands, upstream)))
    assert kept[0] == {(given, True)}
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_gradients_of_the_cast_product():
    hidden, down, *_ = (operand.requires_grad_() for operand in make_operands(2, 3, 5, 4, 3, 2))
    assert torch.autograd.gradcheck(lambda *args: CastProduct.apply(*args, torch.float64), (hidden, down))
    assert torch.autograd.gradgradcheck(lambda *args: CastProduct.apply(*args, torch.float64), (hidden, down))


def make_group(batch, inner, outs, queries, rank):
    hidden, _, state, _, _ = make_operands(batch, 1, inner, 1, queries, rank)
    down = torch.randn(len(outs) * rank, inner, dtype=torch.float64, device=DEVICE)
    ups = [torch.randn(outer, queries, dtype=torch.float64, device=DEVICE) / queries**0.5 for outer in outs]
    bases = [torch.randn(batch, outer, dtype=torch.float64, device=DEVICE) for outer in outs]
    return hidden, down, state, ups, bases, [1.7 / (index + 1) for index in range(len(outs))]


def expected_group(hidden, down, state, ups, bases, scales):
    parts = zip(down.chunk(len(ups)), ups, bases, scales, strict=True)
    return [oracle(hidden, part, state, up, base[:, None], scale=scale)[:, 0] for part, up, base, scale in parts]


def add_group_(bases, hidden, down, state, ups, scales, impl):
    for base, read, up, scale in zip(bases, delta_read(hidden, down, state, impl=impl), ups, scales, strict=True):
        delta_add_(base, read, up, scale=scale, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GROUPS, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_group(impl, size, dtype):
    hidden, down, state, ups, bases, scales = make_group(*size)
    hidden, down, ups, bases = (
        hidden.to(dtype),
        down.to(dtype),
        [up.to(dtype) for up in ups],
        [b.to(dtype) for b in bases],
    )
    state = state.to(torch.float64 if dtype == torch.float64 else torch.float32)
    given = (hidden.double(), down.double(), state.double(), [up.double() for up in ups], [b.double() for b in bases])
    expected = expected_group(*given, scales)
    add_group_(bases, hidden, down, state, ups, scales, impl)
    for found, wanted in zip(bases, expected, strict=True):
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype], f"{error:.1e}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_group_of_mixed_dtypes_and_strides(impl):
    hidden, down, state, ups, bases, scales = make_group(3, 40, [20, 33, 7], 4, 6)
    expected = expected_group(hidden, down, state, ups, bases, scales)
    # The state as a part of a wider one, and the outputs side by side as a fused linear gives them.
    views = list(torch.cat(bases, dim=-1).float().split([20, 33, 7], dim=-1))
    views[1] = views[1].bfloat16()
    wide = torch.full((3, 9, 4), torch.nan, device=DEVICE)
    wide[:, :6] = state.float().mT
    add_group_(views, hidden.float(), down.float(), wide[:, :6].mT, [up.float() for up in ups], scales, impl)
    for found, wanted, tolerance in zip(views, expected, (4e-6, 2e-2, 4e-6), strict=True):
        assert (found.double() - wanted).abs().max() / wanted.abs().max() < tolerance


def test_group_refuses_what_it_cannot_read_or_write():
    hidden, down, state, ups, bases, _ = make_group(3, 8, [6, 6], 4, 5)
    with pytest.raises(ValueError, match="`down` must have a multiple of 5 rows"):
        delta_read(hidden, down[1:], state)
    with pytest.raises(ValueError, match=r"`base` must be contiguous along the last axis.*Make it contiguous"):
        delta_add_(bases[0].T.contiguous().T, delta_read(hidden, down, state)[0], ups[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(4, 256, 2048, 2048, 32, 32), (4, 256, 4096, 14336, 32, 32)], ids=str)
def test_true_shapes(size, dtype):
    operands = make_operands(*size)
    assert_matches(lambda *args: delta(*args[:4], onto=args[4], scale=1.7, impl="triton"), oracle, operands, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64, 256])
@pytest.mark.parametrize(
    ("inner", "outs"),
    [(2048, [2048, 256, 256]), (3584, [18944, 18944]), (14336, [4096])],
    ids=["3B qkv", "7B mlp", "8B down"],
)
def test_group_at_true_shapes(inner, outs, batch):
    test_group("triton", (batch, inner, outs, 32, 32), torch.bfloat16)
