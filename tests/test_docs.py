"""The README is short, links lead somewhere, code blocks are Python, and the minimal examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integrations.trainers import make_chat_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/**/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
    if "outputs" not in path.parts
)


def name_of(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """Of the headings of a page, as hosts of Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{name_of(page)} links to {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_are_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        compile(block, name_of(page), "exec")


def test_every_page_is_reached_from_the_readme():
    reached, front = set(), {ROOT / "README.md"}
    while front:
        page = front.pop()
        reached.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text()):
            place = (page.parent / target).resolve()
            if place.exists() and place not in reached:
                front.add(place)
    assert not [name_of(page) for page in PAGES if page not in reached and page.parent == ROOT / "docs"]


def run(*arguments, folder):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_minimal_examples_run(tmp_path):
    assert len((ROOT / "examples" / "minimal_grpo.py").read_text().splitlines()) <= 30
    tokenizer = make_chat_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(ROOT / "examples" / "minimal_grpo.py", tmp_path / "model", folder=tmp_path)
    assert "MiB hold" in run(ROOT / "examples" / "minimal_generate.py", folder=tmp_path)
