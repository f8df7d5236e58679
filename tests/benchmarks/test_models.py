"""The table of all causal LMs: a spread of them is tried here, all of them in a slow test, and the document says what was found."""

import json
from importlib.metadata import version

import pytest

from benchmarks.models import __main__ as command
from benchmarks.models.report import render
from benchmarks.models.tiny import config_types
from benchmarks.models.trial import Outcome, try_type

# One of each kind of layer, rotation, cache and wrapper, and those that people train.
SPREAD = [
    "afmoe",
    "bamba",
    "bart",
    "bert",
    "codegen",
    "cohere2",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "doge",
    "exaone4",
    "falcon",
    "gemma2",
    "gemma3",
    "gemma3n_text",
    "gemma4",
    "gpt_neox",
    "gpt_oss",
    "granite_swa",
    "granitemoehybrid",
    "hunyuan_v1_dense",
    "jamba",
    "kimi_linear",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama4",
    "mimo_v2_flash",
    "minicpm3",
    "ministral",
    "modernbert-decoder",
    "moss_transcribe_diarize",
    "nanochat",
    "nemotron_h",
    "olmo_hybrid",
    "opt",
    "phi4_multimodal",
    "qwen3_5",
    "qwen3_moe",
    "roformer",
    "smollm3",
    "vaultgemma",
]
REFUSED = (
    "bloom",
    "falcon_mamba",
    "gpt_neo",
    "hrm_text",
    "longcat_flash",
    "minimax",
    "moshi",
    "prophetnet",
    "recurrent_gemma",
    "zaya",
)


def written():
    return command.read(command.RESULTS)


@pytest.mark.parametrize("kind", SPREAD)
def test_works(kind):
    outcome = try_type(kind)
    assert outcome.verdict == "works", (outcome.where, outcome.reason)
    assert outcome.to_dict() | {"error": 0} == written()[kind] | {"error": 0}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_reason_and_a_remedy(kind):
    outcome = try_type(kind)
    assert outcome.verdict == "refused", outcome.reason
    assert "LoRA" in outcome.reason or "cache_window=None" in outcome.reason
    assert outcome.reason == written()[kind]["reason"]


@pytest.mark.slow
def test_all_of_them():
    for kind in config_types():
        outcome = try_type(kind)
        known = written()[kind]
        assert (outcome.verdict, outcome.reason) == (known["verdict"], known["reason"]), kind
        assert outcome.verdict not in ("wrong", "crash"), (kind, outcome.reason)


def test_the_document_says_what_was_found():
    found = written()
    text = command.DOCUMENT.read_text(encoding="utf-8")
    assert set(found) == set(config_types())
    head, _, tables = render(found).partition("## Works")
    assert text.partition("## Works")[2] == tables
    assert head.splitlines()[0] == text.splitlines()[0]
    assert f"transformers {version('transformers')}" in text
    verdicts = [one["verdict"] for one in found.values()]
    assert verdicts.count("works") >= 140
    assert not {"wrong", "crash"} & set(verdicts)


def test_an_outcome_is_not_lost(tmp_path):
    path = tmp_path / "models.jsonl"
    lines = [Outcome("llama", verdict="crash"), Outcome("llama"), Outcome("gpt2", verdict="refused", reason="a | b")]
    path.write_text("\n".join(json.dumps(one.to_dict()) for one in lines))
    known = command.read(path)
    assert known["llama"]["verdict"] == "works"
    assert "a \\| b" in render(known)
