"""The cost of a step beside LoRA's: what is counted, and how passes are named."""

import torch

from benchmarks.accounting import Launches
from benchmarks.cost import PEERS, QUICK, calls, fields_of, launches


def test_views_are_no_launches():
    rows = torch.ones(4, 4)
    with Launches() as found:
        rows.view(16)[2:].reshape(2, 7).transpose(0, 1)
    assert found.number == 0
    with Launches() as found:
        rows @ rows + 1
    assert found.number == 2


def test_a_layer_is_called_once_per_scoring_call_and_longer_passes_launch_less():
    figure = QUICK[0]
    assert calls(figure, "default") == 1
    found = {peer: launches(figure, peer) for peer in ("lora", "one_pass", "quarter_window")}
    assert found["lora"] < found["one_pass"] < found["quarter_window"]


def test_passes_by_name():
    assert fields_of("lora", 8) is None
    assert fields_of("default", 8) == {"offload": False}
    assert fields_of("offload", 8) == {"offload": True}
    assert fields_of("half_window_offload", 8) == {"offload": True, "segment_length": 4}
    assert all(fields_of(peer, 8) is not None for peer in PEERS[1:])
