"""What the tests of the operations share."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["reference", "triton"]
# Largest error seen, of the largest entry, over all cases of encode and delta: float32 4e-7 (1.2e-6 under sums of 1000
# tokens), bfloat16 6e-3, float16 8e-4.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_matches(function, oracle, operands, dtype):
    """Outputs and gradients of ``function`` in ``dtype`` against ``oracle`` in float64."""
    exact = [operand.to(dtype).double().requires_grad_() for operand in operands]
    given = [operand.detach().to(dtype).requires_grad_() for operand in exact]
    expected, actual = oracle(*exact), function(*given)
    upstream = torch.randn_like(expected).to(actual.dtype)
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, given, upstream),
        torch.autograd.grad(expected, exact, upstream.double(), materialize_grads=True),
        strict=True,
    )
    for index, (found, wanted) in enumerate(pairs):
        assert found.isfinite().all()
        # With a floor, for gradients that are exactly zero (a state of one column is normalised to +-1).
        largest = max(wanted.abs().max().item(), 0.1)
        error = (found.double() - wanted).abs().max().item() / largest
        assert error < TOLERANCE[dtype], f"operand {index - 1}: {error:.1e}"
