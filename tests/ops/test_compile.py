"""Dynamo traces every operation without a graph break, and what it traced computes the same."""

import pytest
import torch

from peft_pte.ops import compress_, delta, delta_add_, delta_read, encode
from tests.ops.common import DEVICE, IMPLEMENTATIONS
from tests.ops.test_compress import make_case, repeated


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def run(function, *operands):
    """Results and gradients of every operand."""
    operands = [operand.detach().clone().requires_grad_(operand.is_floating_point()) for operand in operands]
    result = function(*operands)
    floats = [operand for operand in operands if operand.requires_grad]
    return [result, *torch.autograd.grad(result.square().sum(), floats)]


def assert_compiles(function, *operands):
    expected = run(function, *operands)
    # aot_eager: everything but code generation, which needs a C++ compiler here and would not change the kernels.
    found = run(torch.compile(function, fullgraph=True, backend="aot_eager"), *operands)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["linear", "softmax", "slots"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_encode(impl, attention):
    shapes = ((2, 3, 4), (3, 4), (2, 2, 5, 8), (2, 2, 5, 8), (4, 8), (4, 8))
    operands = [torch.randn(*shape, device=DEVICE) for shape in shapes]
    valid = torch.tensor([[[True] * 5, [True, False] * 2 + [True]]] * 2, device=DEVICE)
    assert_compiles(lambda *args: encode(*args, attention=attention, impl=impl), *operands, valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_delta(impl, dtype):
    shapes = ((2, 7, 12), (5, 12), (2, 4, 5), (9, 4), (2, 7, 9))
    hidden, *operands = [torch.randn(*shape, device=DEVICE) for shape in shapes]
    operands = [hidden.to(dtype), *operands]
    assert_compiles(lambda *args: delta(*args[:4], onto=args[4], scale=1.7, impl=impl), *operands)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_delta_group(impl):
    hidden, down, state = (torch.randn(*shape, device=DEVICE) for shape in ((3, 1, 12), (10, 12), (3, 4, 5)))
    ups = [torch.randn(outer, 4, device=DEVICE) for outer in (9, 6)]
    weights = [torch.randn(outer, 12, device=DEVICE) for outer in (9, 6)]

    def linears(hidden):
        bases = [hidden[:, 0] @ weight.T for weight in weights]
        reads = delta_read(hidden, down, state, impl=impl)
        for base, read, up, scale in zip(bases, reads, ups, (1.7, 0.3), strict=True):
            delta_add_(base, read, up, scale=scale, impl=impl)
        return torch.cat(bases, dim=-1)

    with torch.no_grad():
        compiled = torch.compile(linears, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden), linears(hidden))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compress(impl):
    case = repeated(make_case(head_dim=20, rotary_dim=20, padded=True), "half")
    eager = {**case, "state": case["state"].clone()}
    compress_(**eager, impl=impl)
    torch.compile(lambda: compress_(**case, impl=impl), fullgraph=True, backend="aot_eager")()
    assert torch.equal(case["state"], eager["state"])


def test_operations_are_declared_as_they_behave():
    from peft_pte.ops.compress.triton import _compress
    from peft_pte.ops.delta.triton import _add, _read
    from peft_pte.ops.delta.triton import _forward as delta_forward
    from peft_pte.ops.encode.triton import _recur, _updates

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    floats = [torch.randn(*shape, device=DEVICE) for shape in ((3, 4), (2, 5, 8), (2, 5, 8), (4, 8), (4, 8))]
    torch.library.opcheck(_updates, (*floats, None, "softmax"), test_utils=checks)
    torch.library.opcheck(
        _recur, (*(torch.randn(*s, device=DEVICE) for s in ((2, 3, 4), (2, 5, 3, 4))), 0.3), test_utils=checks
    )
    hidden, down, state, up, onto = (
        torch.randn(*shape, device=DEVICE) for shape in ((2, 7, 12), (5, 12), (2, 4, 5), (9, 4), (2, 7, 9))
    )
    torch.library.opcheck(delta_forward, (hidden, down, state, up, onto, 1.7), test_utils=checks)
    torch.library.opcheck(_read, (hidden[:, :1], down, state), test_utils=checks)
    torch.library.opcheck(_add, (onto[:, 0], torch.randn(3, 2, 4, device=DEVICE), up, 1.7), test_utils=checks)
    case = make_case(padded=True)
    folded = torch.randn(2, 5, 40, device=DEVICE)
    cached = (case["state"], case["keys"].nan_to_num(), case["values"].nan_to_num(), case["slots"], folded)
    rest = (case["value_projection"], None, None, case["valid"], None, 0.3, "linear", False)
    torch.library.opcheck(_compress, (*cached, *rest), test_utils=checks)


@pytest.mark.gpu
def test_graph_capture():
    case = repeated(make_case(head_dim=64, rotary_dim=64, padded=True), "half")
    expected = {**case, "state": case["state"].clone()}
    start = case["state"].clone()
    for _ in range(2):  # The kernel is compiled outside the capture.
        compress_(**case, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compress_(**case, impl="triton")
    case["state"].copy_(start)
    graph.replay()
    compress_(**expected, impl="triton")
    assert torch.equal(case["state"], expected["state"])
