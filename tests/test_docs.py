"""The README is short, links lead somewhere, every code block runs, commands name what is there, and pictures are what their scripts draw."""

import contextlib
import importlib.util
import inspect
import io
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

import peft_pte
from peft_pte import PTEConfig
from peft_pte.integrations import distillation, kvpress
from peft_pte.integrations import trl as trl_integration
from tests.helpers import SMALL, assert_close, forgotten, make_prompts, make_pte, roll_out, thought_logits
from tests.integrations.trainers import make_chat_tokenizer, small_words

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/**/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
    if "outputs" not in path.parts
)
DOCS = [path for path in PAGES if (path.name == "README.md" and path.parent == ROOT) or path.parent == ROOT / "docs"]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE
)


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks_of(page, *kinds):
    """The code blocks of a page in order: kind, code, why it is not run."""
    found = [(match["kind"], match["code"], match["why"]) for match in BLOCK.finditer(page.read_text())]
    return [block for block in found if block[0] in kinds]


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


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in PAGES if path.parent == ROOT / "docs")


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


def public_names():
    """What users import: of the package, of each public module the functions and classes that it defines."""
    yield from (f"peft_pte.{name}" for name in peft_pte.__all__ if name != "__version__")
    yield from peft_pte.ops.__all__
    for module in (distillation, kvpress, trl_integration):
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and (inspect.isclass(thing) or inspect.isfunction(thing)):
                yield f"{module.__name__}.{name}"


INTERNAL = {
    "peft_pte.integrations.kvpress.make_press",
    "peft_pte.integrations.trl.active_config",
    "peft_pte.integrations.trl.find_seam",
}
"""Of modules that users import, what is there for other modules."""


def test_the_reference_has_every_public_name():
    pages = "\n".join(path.read_text() for path in DOCS)
    told = set(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE))
    last = {name.rpartition(".")[2] for name in told}
    missing = [name for name in public_names() if name not in told and ("." in name or name not in last)]
    assert set(missing) == INTERNAL


# Code blocks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page not in DOCS], ids=name_of)
def test_code_blocks_are_python(page):
    for _, code, _ in blocks_of(page, "python"):
        compile(code, name_of(page), "exec")


QUESTIONS = ["w3 w4 w5", "w7", "w9 w10", "w11 w12 w13 w14"]
ANSWERS = [f"w{20 + row} w8 w9 w30 w31 w32 w33 w34 w35 w36 w37" for row in range(len(QUESTIONS))]


def turns(role, texts):
    return [[{"role": role, "content": text}] for text in texts]


DATA = {
    "prompts": {"prompt": turns("user", QUESTIONS)},
    "sft.md": {"prompt": turns("user", QUESTIONS), "completion": turns("assistant", ANSWERS)},
    "dpo.md": {
        "prompt": turns("user", QUESTIONS),
        "chosen": turns("assistant", ANSWERS),
        "rejected": turns("assistant", QUESTIONS),
    },
}
"""What `train_dataset` is, by page."""

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What a page may name; here the tiny model takes its place."""

SHORT = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "max_completion_length": 12,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""What the arguments of every trainer become: one small step on the CPU."""


def shorten(monkeypatch, kind):
    original = kind.__post_init__

    def post_init(self):
        for name, value in SHORT.items():
            if hasattr(self, name):
                setattr(self, name, value)
        original(self)

    monkeypatch.setattr(kind, "__post_init__", post_init)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a tiny chat model that samples, so that it ends its answers; an adapter; a LoRA."""
    folder, tokenizer = tmp_path_factory.mktemp("shelf"), make_chat_tokenizer()
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    base.generation_config.update(do_sample=True)
    for part in (base, tokenizer):
        part.save_pretrained(folder / "model")
    marker = peft_pte.prompt_end(tokenizer)
    config = PTEConfig(task_type="CAUSAL_LM", r=4, cache_window=8, prompt_end=marker, init_weights=False)
    for name, adapter in (("adapter", config), ("my-lora", LoraConfig(task_type="CAUSAL_LM", r=4))):
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        get_peft_model(model, adapter).save_pretrained(folder / name)
    return folder


@pytest.fixture
def names(shelf, monkeypatch, request):
    """What the blocks of a page may take for granted, in a folder where `adapter` and `my-lora` lie."""
    page, tokenizer = request.node.callspec.params["page"], make_chat_tokenizer()
    monkeypatch.chdir(shelf)
    for kind in (TrainingArguments, trl.GRPOConfig, trl.SFTConfig, trl.DPOConfig, distillation.SelfDistillationConfig):
        shorten(monkeypatch, kind)
    base = AutoModelForCausalLM.from_pretrained(shelf / "model")
    batch = tokenizer.apply_chat_template(
        turns("user", QUESTIONS), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    given = {
        "__name__": f"page_{page.stem}",
        "torch": torch,
        "peft_pte": peft_pte,
        "PTEConfig": PTEConfig,
        "model_id": str(shelf / "model"),
        "base": base,
        "tokenizer": tokenizer,
        "train_dataset": Dataset.from_dict(DATA.get(page.name, DATA["prompts"])),
        "reward_funcs": small_words,
        "batch": {name: batch[name] for name in ("input_ids", "attention_mask")},
    }
    with forgotten():
        yield given


@pytest.mark.parametrize("page", [page for page in DOCS if blocks_of(page, "python")], ids=name_of)
def test_code_blocks_run(page, names):
    # In order, each on what those before have made; a block of text behind one is what it prints.
    printed = None
    for kind, code, why in blocks_of(page, "python", "text"):
        if kind == "text":
            assert printed is None or code.strip() == printed.strip()
            continue
        made = compile(code.replace(HUB, names["model_id"]), name_of(page), "exec")
        if why:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(made, names)
        printed = out.getvalue()


EXTENSIONS = {"register_eviction": {"eviction": "large_values"}, "register_update": {"encoder_attention": "sigmoid"}}


@pytest.mark.parametrize("how", EXTENSIONS)
def test_extensions_are_short_and_keep_the_promise(how):
    blocks = blocks_of(ROOT / "docs" / "extending.md", "python")
    code = next(code for _, code, _ in blocks if how in code).partition("\nconfig = ")[0]
    assert len(code.strip().splitlines()) <= 20
    with forgotten():
        exec(compile(code, how, "exec"), {"__name__": "extension"})
        model = make_pte(dtype=torch.float64, **EXTENSIONS[how])
        length = 4 * SMALL["cache_window"]
        rollout = roll_out(model, make_prompts(), length)
        with torch.no_grad():
            assert_close(thought_logits(model, rollout.truncated(length)).float(), rollout.logits)
        static = roll_out(model, make_prompts(), length, cache_implementation="static")
    assert_close(static.logits, rollout.logits)
    # It is not what comes with the package.
    other = roll_out(make_pte(dtype=torch.float64), make_prompts(), length)
    assert (other.logits - rollout.logits).abs().max() > 1e-3


def test_few_blocks_are_not_run():
    assert sum(bool(why) for page in DOCS for _, _, why in blocks_of(page, "python")) <= 3


def commands():
    for page in PAGES:
        for _, code, _ in blocks_of(page, "bash"):
            for line in re.sub(r"\\\n\s*", " ", code).splitlines():
                command = line.partition("#")[0].strip()
                if command:
                    yield page, command


def check_command(page, command):
    words = command.split()
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets for word in words[1:] if "=" not in word)
        return
    for extras in re.findall(r"\.\[([\w,]+)\]", command):
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras.split(","))
    for place, word in enumerate(words):
        if word.endswith((".py", ".yaml")):
            assert (ROOT / word).is_file() or (page.parent / word).is_file()
        if word == "-m" and "pytest" not in words[:place]:
            assert importlib.util.find_spec(words[place + 1])
        if word == "peft_pte" and words[place - 1] == "-m":
            assert entry_points(group="console_scripts", name=words[place + 1])


def test_commands_name_what_is_there():
    seen = 0
    for page, command in commands():
        try:
            check_command(page, command)
        except AssertionError as error:
            raise AssertionError(f"{name_of(page)}: {command}") from error
        seen += 1
    assert seen > 20


def run(*arguments, folder):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_pictures_are_what_their_script_draws(tmp_path):
    folder = ROOT / "docs" / "pictures"
    run(folder / "eviction.py", tmp_path, folder=ROOT)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in folder.glob("*.svg"))
    pinned = re.search(r"^matplotlib==(\S+?);?\s", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[
        1
    ].rstrip(";")
    if version("matplotlib") != pinned:
        pytest.skip(f"another matplotlib than {pinned} draws other paths")
    for name in drawn:
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_the_minimal_examples_run(tmp_path, shelf):
    assert len((ROOT / "examples" / "minimal_grpo.py").read_text().splitlines()) <= 30
    run(ROOT / "examples" / "minimal_grpo.py", shelf / "model", folder=tmp_path)
    assert "MiB hold" in run(ROOT / "examples" / "minimal_generate.py", folder=tmp_path)
