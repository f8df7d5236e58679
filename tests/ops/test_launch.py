"""Kernels are launched on the device of their operands, whichever device is current."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'peft-pte[triton]'")

from peft_pte.ops import compress_, delta, encode
from peft_pte.ops.compress import triton as compress_kernels
from peft_pte.ops.delta import triton as delta_kernels
from peft_pte.ops.encode import triton as encode_kernels
from peft_pte.ops.kernels import Kernel
from tests.ops.common import DEVICE
from tests.ops.test_compress import make_case
from tests.ops.test_lowering import KERNELS


@pytest.fixture
def launches(monkeypatch):
    """By kernel: the tensor whose device was current, and the first operand."""
    current, found = [], {}

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Spy:
        def __init__(self, name, jitted):
            self.name, self.jitted = name, jitted

        def __getitem__(self, grid):
            def launch(first, *operands, **constants):
                found[self.name] = (current[-1] if current else None, first)
                self.jitted[grid](first, *operands, **constants)

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (compress_kernels, delta_kernels, encode_kernels):
        for name, part in vars(module).items():
            if isinstance(part, Kernel):
                monkeypatch.setattr(part, "jitted", Spy(name, part.jitted))
    return found


def test_every_kernel_is_launched_where_its_operands_are(launches):
    def randn(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    delta(randn(2, 5, 32), randn(4, 32), randn(2, 6, 4), randn(24, 6), impl="triton").sum().backward()
    with torch.no_grad():
        read = delta_kernels.read_triton(randn(2, 1, 32), randn(4, 32), randn(2, 6, 4))[0]
        delta_kernels.add_triton_(randn(2, 24), read, randn(24, 6).mT, alpha=1.0)
    rows = randn(2, 3, 5, 8), randn(2, 3, 5, 8)
    encode(randn(2, 6, 4), randn(6, 4), *rows, randn(4, 8), randn(4, 8), impl="triton").sum().backward()
    # One row, so that its tokens are split and put together again.
    compress_(**make_case(L=1, B=1, E=40, C=50), impl="triton")
    assert set(launches) == KERNELS
    for name, (current, first) in launches.items():
        assert current is first, name
