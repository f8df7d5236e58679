"""The cost of a step and of a token beside LoRA's: what is counted, and how passes are named."""

import pytest
import torch

from benchmarks.common.accounting import Launches
from benchmarks.overhead import token
from benchmarks.overhead.report import render
from benchmarks.overhead.step import PEERS, QUICK, calls, fields_of, launches
from benchmarks.overhead.token import measure
from tests.benchmarks.test_runner import SOURCE, session


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


@pytest.mark.parametrize("batch", [1, 4])
def test_a_token_costs_fewer_launches_than_with_lora_and_few_calls(batch):
    # Counts, which are the same on every machine; neither depends on the batch.
    case = token.TokenCase(batch, shape="tiny")
    models = {"lora": token.build(case, "lora"), "pte": (pte := token.build(case, "pte")), "pte_static": pte}
    launched = {peer: token.launches(model, peer, case) for peer, model in models.items()}
    assert launched["pte"] <= token.AT_MOST["launches"] * launched["lora"]
    assert launched["pte_static"] <= token.AT_MOST["launches"] * launched["lora"]
    assert token.own_calls(pte, "pte", case) <= token.AT_MOST["own_calls"]


def test_tokens_become_a_table():
    records = [{**row, "source": SOURCE} for row in measure(session(peers=("lora", "pte")))]
    assert [row["peer"] for row in records] == ["lora", "pte"]
    assert "| 1 | PTE |" in render(records)
