"""The table of all causal LMs: a spread of them is tried here, all of them in a slow test, and the document says what was found."""

from importlib.metadata import version

import pytest

from benchmarks.common.records import FILE, FOLDER, read
from benchmarks.models.measure import KEY
from benchmarks.models.report import SECTIONS, render
from benchmarks.models.tiny import config_types
from benchmarks.models.trial import Outcome, try_type
from tests.benchmarks.test_runner import SOURCE

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
    found = read(FOLDER / "models" / FILE, KEY)
    return {record["kind"]: {name: value for name, value in record.items() if name != "source"} for record in found}


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


def test_every_type_was_tried_and_none_is_wrong():
    found = written()
    assert set(found) == set(config_types())
    verdicts = [one["verdict"] for one in found.values()]
    assert verdicts.count("works") >= 140
    assert not {"wrong", "crash"} & set(verdicts)
    assert f"transformers {version('transformers')}" in SECTIONS[0].path.read_text()


def test_outcomes_become_tables():
    outcomes = [
        Outcome("llama"),
        Outcome("gpt2", verdict="refused", reason="a | b"),
        Outcome("opt", verdict="crash", reason="c"),
    ]
    text = render([{**one.to_dict(), "source": SOURCE} for one in outcomes])
    assert "**1 work, 1 are refused, 0 could not be tried, 1 are wrong or crash**, of 3" in text
    assert "a \\| b" in text
    assert "| `opt` | crash |  | c |" in text
