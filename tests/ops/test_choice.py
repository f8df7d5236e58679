"""``impl="auto"`` on a GPU, with a stubbed clock: timed once, remembered, said once."""

import logging

import pytest
import torch

from peft_pte.ops import choice, choices, implementation, resolve_impl
from peft_pte.ops.tune import call_of
from tests.ops.common import DEVICE

CUDA = torch.device("cuda", 0)
NUMBERS = torch.arange(1.0, 5.0)


@pytest.fixture
def race(monkeypatch):
    """A race whose times, results and errors are made up; notes what was timed."""

    class Race:
        def __init__(self):
            self.times = {"reference": 1.0, "triton": 2.0}
            self.results = {"reference": NUMBERS, "triton": NUMBERS}
            self.error, self.timed = None, []

        def call_of(self, operation, dtype, shape, device, impl):
            def call():
                if impl == "triton" and self.error is not None:
                    raise self.error
                return self.results[impl]

            call.impl = impl
            return call

        def milliseconds(self, call):
            self.timed = [*self.timed, call.impl]
            return self.times[call.impl]

    made = Race()
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "milliseconds", made.milliseconds)
    monkeypatch.setattr("peft_pte.ops.tune.call_of", made.call_of)
    monkeypatch.setattr(implementation, "triton_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def resolve(rows=1, dtype=torch.bfloat16, operation="delta_token"):
    return resolve_impl("auto", CUDA, operation, dtype, rows)


@pytest.mark.parametrize("faster", ["reference", "triton"])
def test_the_faster_one_is_taken_timed_once_and_said_once(race, caplog, faster):
    race.times = {impl: 1.0 if impl == faster else 2.0 for impl in race.times}
    with caplog.at_level(logging.INFO, logger="peft_pte"):
        assert [resolve(), resolve(), resolve(rows=15)] == [faster] * 3
    assert race.timed == ["reference", "triton"]
    assert len(caplog.records) == 1
    assert f"delta_token takes {faster} for few rows" in caplog.text
    ((case, found),) = choices().items()
    assert case == ("delta_token", torch.bfloat16, "few", CUDA)
    assert found == (faster, race.times)


def test_each_operation_dtype_and_shape_class_has_its_own(race):
    resolve()
    resolve(rows=16)
    resolve(dtype=torch.float32)
    resolve(operation="encode")
    assert len(choices()) == 4
    assert len(race.timed) == 8


@pytest.mark.parametrize(
    ("error", "result"), [(RuntimeError("no such GPU"), NUMBERS), (None, NUMBERS + 1), (None, NUMBERS * torch.nan)]
)
def test_a_kernel_that_fails_or_is_wrong_is_not_taken_and_that_is_said(race, caplog, error, result):
    race.times = {"reference": 2.0, "triton": 1.0}
    race.error, race.results = error, {"reference": NUMBERS, "triton": result}
    assert resolve(dtype=torch.float32) == "reference"
    assert "delta_token is taken from the reference" in caplog.text


def test_nothing_is_timed_in_a_graph(race, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    race.times = {"reference": 2.0, "triton": 1.0}
    assert resolve() == "reference"
    assert not choices()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert resolve() == "triton"


def test_other_devices_take_the_reference_and_time_nothing(race):
    assert resolve_impl("auto", torch.device("cpu"), "delta", torch.float32, 1) == "reference"
    assert not race.timed


@pytest.mark.parametrize("operation", ["compress", "delta_token", "encode"])
def test_the_kernels_themselves_run_in_it_whatever_the_caller_is_in_the_middle_of(monkeypatch, caplog, operation):
    # Under the interpreter where there is no GPU.
    monkeypatch.setattr(choice, "milliseconds", lambda call: call() is None)
    with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = choice._race(choice.Case(operation, torch.float32, "few", torch.device(DEVICE)))
    assert set(found.milliseconds) == {"reference", "triton"}, caplog.text


@pytest.mark.parametrize("operation", ["compress", "delta", "delta_token", "encode"])
def test_what_is_timed_runs_and_gives_the_same_twice(operation):
    call = call_of(operation, torch.float32, "few", torch.device("cpu"), "reference")
    assert torch.equal(call(), call())
