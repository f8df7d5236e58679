"""Block sizes are looked up, never timed."""

import json

import pytest
import torch

from peft_pte.ops import tune, tuning
from peft_pte.ops.tuning import FIELDS, GUESSES, blocks_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_PTE_TUNING", str(tmp_path / "tuning.json"))
    tuning.read_file.cache_clear()
    yield
    tuning.read_file.cache_clear()


def on(monkeypatch, capability):
    monkeypatch.setattr(tuning, "capability_of", lambda device: capability)


@pytest.mark.parametrize("capability", GUESSES)
def test_tables_are_complete(capability):
    for key, blocks in GUESSES[capability].items():
        assert set(blocks) == FIELDS[key.split("/")[0]]
        for size in ("half", "float32", "float64"):
            operation, shape, _ = key.split("/")
            encodes = operation.startswith("encode")
            assert f"{operation}/{shape}/{size}" in GUESSES[capability] or (encodes and size == "half")


def test_lookup_by_dtype_and_shape():
    assert blocks_for("compress", torch.bfloat16, CPU, "many") == GUESSES["sm_90"]["compress/many/half"]
    assert blocks_for("compress", torch.float16, CPU, "few") == GUESSES["sm_90"]["compress/few/half"]
    assert blocks_for("delta_read", torch.float64, CPU) == GUESSES["sm_90"]["delta_read/all/float64"]
    with pytest.raises(KeyError):
        blocks_for("delta_read", torch.float64, CPU, "decode")


@pytest.mark.parametrize(("capability", "table"), [("sm_100", "sm_90"), ("sm_89", "sm_80"), ("sm_75", "sm_80")])
def test_a_gpu_without_a_table_takes_the_newest_older_one(monkeypatch, capability, table):
    on(monkeypatch, capability)
    monkeypatch.setitem(GUESSES, "sm_80", {"delta_read/all/half": {"b_T": 1}})
    assert blocks_for("delta_read", torch.bfloat16, CPU) == GUESSES[table]["delta_read/all/half"]


def test_a_file_overrides_its_own_gpu_alone(monkeypatch):
    blocks = {"b_T": 128, "b_I": 32, "num_warps": 8, "num_stages": 3}
    tuning.tuning_file().write_text(json.dumps({"blocks": {"sm_90": {"delta_read/all/half": blocks}}}))
    assert blocks_for("delta_read", torch.bfloat16, CPU) == GUESSES["sm_90"]["delta_read/all/half"]
    on(monkeypatch, "sm_90")
    assert blocks_for("delta_read", torch.bfloat16, CPU) == blocks
    assert blocks_for("delta_read", torch.float32, CPU) == GUESSES["sm_90"]["delta_read/all/float32"]


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"blocks": {"sm_90": {"delta_read/all/half": {"b_T": 128}}}}',
        '{"blocks": {"sm_90": {"delta_write/all/half": {}}}}',
        '{"blocks": {"sm_90": {"delta_read/all/half": {"b_T": 100, "b_I": 32, "num_warps": 8, "num_stages": 3}}}}',
    ],
)
def test_a_file_that_is_something_else_is_refused(text):
    tuning.tuning_file().write_text(text)
    with pytest.raises(ValueError, match="`PEFT_PTE_TUNING` must be a file written by"):
        blocks_for("delta_read", torch.bfloat16, CPU)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_PTE_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.tuning_file() == tmp_path / "peft_pte" / "tuning.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tune_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "needs a CUDA device" in capsys.readouterr().err


def test_tune_times_what_the_table_has():
    for operation, shape, _ in tune.workloads(1, CPU):
        assert f"{operation}/{shape}/half" in GUESSES["sm_90"]


@pytest.mark.gpu
def test_workloads_run():
    for _, _, call in tune.workloads(2, torch.device("cuda")):
        call()
