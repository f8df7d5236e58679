"""The runner, its times and its tables, on rows that take no time; `--quick` end to end is slow."""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.common.models import shaped_base
from benchmarks.common.pages import insert, origin
from benchmarks.common.records import FILE, FOLDER, Results, read
from benchmarks.common.session import Session
from benchmarks.common.timing import Budget, Spread, ceilings, compare
from benchmarks.questions import QUESTIONS, module
from benchmarks.speed import compress, decode, delta, report, train
from benchmarks.speed.measure import KEY, PARTS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    shape: str = "tiny"
    batch: int = 1


SOURCE = {"date": "2026-01-01", "command": "c", "commit": "abc", "dirty": False, "cpu": "x", "cores": 2, "gpu": None}
SOURCE |= {"threads": 1, "versions": {"torch": "2"}}


def session(seconds=60.0, peers=None, path=Path("nowhere"), key=KEY):
    options = argparse.Namespace(quick=True, peers=peers, part=None, shapes=None)
    limits = {"bytes_per_second": 1e10, "flop_per_second": 1e11}
    return Session(CPU, torch.float32, options, Results(path, key, SOURCE), Budget(seconds), limits, ("tiny",))


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="`seconds` must hold"):
        Spread.of([])


def test_repeats_end_with_the_budget_and_peers_take_turns():
    calls = []
    found = compare(
        {name: lambda name=name: calls.append(name) for name in "ab"}, CPU, repeats=9, warmup=1, budget=Budget(-1)
    )
    assert calls == ["a", "b", "a", "b"]
    assert found["a"].repeats == 1


@pytest.mark.parametrize("error", [NotImplementedError("no"), ImportError("no"), torch.OutOfMemoryError("no. more")])
def test_what_a_peer_cannot_do_is_a_result(error):
    def refuse():
        raise error

    row = session().attempt("part", Case(), "peer", refuse)
    assert row["peer"] == "peer"
    assert "no" in row["not_available"]


def test_a_fault_is_raised_and_a_used_budget_is_said():
    def fail():
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        session().attempt("part", Case(), "peer", fail)
    assert session(-1).attempt("part", Case(), "peer", fail)["not_available"].startswith("skipped: 0 s left")
    assert "about 99 s needed" in session().attempt("part", Case(), "peer", fail, expected=99)["not_available"]


def test_ceilings_are_measured():
    found = ceilings(CPU, torch.float32)
    assert found["bytes_per_second"] > 1e8
    assert found["flop_per_second"] > 1e8


def small_decode(length=24, **fields):
    return decode.DecodeCase("tiny", 2, length, window=8, prompt=4, rank=4, tokens=6, **fields)


@pytest.mark.parametrize("peer", ["base_dynamic", "base_static", "lora", "pte"])
def test_every_peer_decodes(peer):
    case, given = small_decode(), session()
    model = decode._PEERS[peer][1](shaped_base("tiny", CPU), case)
    row = decode._measure_peer(given, model, peer, case)
    assert row["seconds_per_token"] > 0
    assert row["step_seconds"]["repeats"] >= 2
    # Two goes of six tokens, of which every second evicts.
    assert (row["eviction_seconds"] is not None) == (peer == "pte")


def test_byte_floor_of_decoding():
    base, case = shaped_base("tiny", CPU), small_decode()
    weights = sum(weight.numel() for weight in base.parameters()) * 4
    per_slot = 4 * 2 * 2 * 32 * 4
    assert decode._floor_bytes(base, "base_dynamic", case) == weights + 2 * (4 + 24) * per_slot
    assert decode._floor_bytes(base, "pte", case) == weights + 2 * (4 + 8 - 1) * per_slot


def test_an_eviction_layer_by_layer_is_the_one_over_all_layers():
    compression = pytest.importorskip("peft_pte.ops.compress")
    assert compression
    case = compress.CompressCase("tiny", batch=2, window=16, prompt=3, evict=4, rank=4)
    operands = compress.Operands.draw(session(), case)
    start = operands.state.clone()
    compress._call("encode_reference", operands)()
    expected = operands.state.clone()
    operands.state.copy_(start)
    compress._call("compress_reference", operands)()
    torch.testing.assert_close(operands.state, expected)


def test_the_grpo_loss_is_the_policy_gradient_on_policy():
    log_probs = torch.randn(2, 5, requires_grad=True)
    train.grpo_loss(log_probs).backward()
    assert torch.equal(log_probs.grad, torch.tensor([[0.1] * 5, [-0.1] * 5]))


def test_fields_that_a_version_lacks_are_said():
    case = train.ScoringCase("tiny", 1, 8, 4, 4, 4)
    with pytest.raises(NotImplementedError, match="`no_such_field`"):
        train.pte_fields(case, no_such_field=True)


def test_results_become_tables(tmp_path):
    given = session(peers=("base_linear", "lora"), path=tmp_path / FILE)
    for record in delta.measure(given):
        given.results.append(record)
    records = read(tmp_path / FILE)
    assert len(records) == 2 * len(delta.cases(given))
    text = report.render(records)
    assert report.NOTHING in text
    assert "| tiny | up_proj | 1 | 1 | 1.00 |" in text
    assert "microseconds" not in text  # Times of a CPU are ratios.


def test_a_run_goes_on_where_it_was_and_tries_again_what_was_left(tmp_path):
    first = session(path=tmp_path / FILE)
    rows = list(delta.measure(first))
    first.results.append(rows[0])
    first.results.append({**rows[1], "not_available": "skipped: 0 s left"})
    again = session(path=tmp_path / FILE)
    assert [row["peer"] for row in delta.measure(again)] == [row["peer"] for row in rows[1:]]
    again.results.append(rows[1])
    assert "not_available" not in read(tmp_path / FILE, KEY)[1]
    assert not Results(tmp_path / FILE, KEY, SOURCE, fresh=True).has(rows[0])


def test_what_a_gpu_timed_stands_for_itself():
    limits = {"bytes_per_second": 1e12, "flop_per_second": 1e15}
    rows = []
    for peer, seconds in (("base_dynamic", 0.01), ("lora", 0.02)):
        row = {"part": "decode", **small_decode().__dict__, "peer": peer, "device": "G", "source": SOURCE}
        rows.append({**row, "seconds_per_token": seconds, "share_of_floor": 0.5, "ceilings": limits})
        rows.append({**row, "peer": "pte", "not_available": "why"})
    text = report.render(rows)
    assert report.NOTHING not in text
    assert "| tiny | 2 | 24 | 10.00 (50%) | 20.00 (50%) |" in text
    assert "* pte (2 cases, the first tiny/2/24): why" in text
    assert "1,000 GB/s" in text


SECTIONS = [(name, section) for name in QUESTIONS for section in module(name, "report").SECTIONS]


@pytest.mark.parametrize(("name", "section"), SECTIONS, ids=[section.marker for _, section in SECTIONS])
def test_pages_say_what_the_results_say(name, section):
    text = section.path.read_text()
    assert insert(text, section.block(FOLDER / name), section.marker) == text, f"run python -m benchmarks report {name}"


def test_every_record_says_where_it_comes_from():
    for path in FOLDER.rglob("*.jsonl"):
        for record in read(path):
            assert {"date", "command", "commit", "cpu", "gpu", "versions"} <= set(record["source"]), path


def test_an_origin_names_every_machine_and_commit():
    other = {**SOURCE, "date": "2026-01-03T00:00", "commit": "b" * 40, "dirty": True}
    assert origin([{"source": SOURCE}, {"source": other}], commands=False) == (
        f"*2 runs; 2026-01-01 to 2026-01-03; x, 2 cores, 1 in use, no GPU; torch 2; commit abc, {'b' * 12} with uncommitted changes.*"
    )


def run_module(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT,
        env={**os.environ, "PEFT_PTE_CHECK_SHAPES": "0", "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_question_they_are_listed():
    done = run_module()
    assert done.returncode == 0
    assert all(name in done.stdout for name in QUESTIONS)
    assert run_module("run", "unknown").returncode == 1


@pytest.mark.slow
def test_quick_end_to_end(tmp_path):
    done = run_module("run", "speed", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    records = read(tmp_path / "speed" / FILE)
    assert {record["part"] for record in records} == set(PARTS)
    assert records[0]["source"]["command"] == "python -m benchmarks run speed --quick"
    shown = run_module("report", "speed", "--results", str(tmp_path), "--stdout")
    assert "relative to the base model" in shown.stdout
