"""The floors of CONTRIBUTING.md, and what importing the package may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_pte

PACKAGE = Path(peft_pte.__file__).parent
# Lower rooms never import upper ones; no import of a module forms a circle.
FLOORS = [
    {"shapes", "_peft_type", "lora_fields", "eviction", "card", "config", "chat", "updates"},
    {"ops"},
    {"method"},
    {"cache"},
    {"host"},
    {"passes", "seam"},
    {"rollout"},
    {"tuner"},
    {"__init__"},
    {"integrations", "__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported_modules(path):
    """Modules of this package that ``path`` imports, by their names below it, for type checkers alone too."""
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = inside[: len(inside) - node.level]
            elif module.split(".")[0] == "peft_pte":
                base, module = (), module.partition(".")[2]
            else:
                continue
            parts = (*base, *(part for part in module.split(".") if part))
            for alias in node.names:
                whole = (*parts, alias.name)
                known = PACKAGE.joinpath(*whole).with_suffix(".py").exists() or PACKAGE.joinpath(*whole).is_dir()
                yield ".".join(whole if known else parts) or "__init__"
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("peft_pte."))


def room_of(module):
    return module.split(".")[0]


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_a_higher_one(path):
    floor = FLOOR_OF[room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))]
    for module in imported_modules(path):
        assert FLOOR_OF[room_of(module)] <= floor, f"{path.name} (floor {floor}) imports {module}"


def test_imports_form_no_circle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[name] = {module for module in imported_modules(path) if module != name}
    done = set()

    def visit(module, trail):
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("operation", ["compress", "encode", "delta"])
def test_reference_and_kernel_do_not_import_each_other(operation):
    folder = PACKAGE / "ops" / operation
    assert "triton" not in (folder / "reference.py").read_text().replace("torch", "")
    assert "reference" not in "".join(
        line for line in (folder / "triton.py").read_text().splitlines() if "import" in line
    )


def run_python(script):
    environment = {**os.environ, "PEFT_PTE_CHECK_SHAPES": "0"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
"""


def test_the_reference_runs_with_torch_alone():
    # In a fresh process, with the optional packages out of reach.
    script = BLOCK.format(blocked=("triton", "trl", "datasets", "beartype", "matplotlib", "gguf", "reasoning_gym")) + (
        "import torch, peft_pte\n"
        "from peft import get_peft_model\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))\n"
        "model = get_peft_model(base, peft_pte.PTEConfig(task_type='CAUSAL_LM', r=2, cache_window=4))\n"
        "out = model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=12, min_new_tokens=12)\n"
        "model(input_ids=out, labels=out.clone(), prompt_length=3).loss.backward()\n"
        "print('ran', out.shape[1])\n"
    )
    run = run_python(script)
    assert run.returncode == 0, run.stderr
    assert "ran 15" in run.stdout


def test_import_takes_no_noticeable_time_beyond_peft():
    script = (
        "import time, peft, transformers.cache_utils, transformers.masking_utils, transformers.modeling_utils\n"
        "import transformers.pytorch_utils, torch.utils.checkpoint\n"
        "start = time.perf_counter(); import peft_pte; print(time.perf_counter() - start)"
    )
    seconds = min(float(run_python(script).stdout) for _ in range(3))
    assert seconds < 0.5


def test_importing_twice_registers_once():
    script = (
        "import peft_pte, importlib; importlib.reload(peft_pte); from peft import PeftType; print(PeftType.PTE.value)"
    )
    run = run_python(script)
    assert run.stdout.strip() == "PTE", run.stderr


def test_public_names():
    assert set(peft_pte.__all__) == {
        "EvictionPolicy",
        "Evictions",
        "PTECache",
        "PTEConfig",
        "PTEModel",
        "Window",
        "__version__",
        "convert_lora",
        "head_importance",
        "prompt_end",
        "register_eviction",
        "register_update",
    }
    assert all(hasattr(peft_pte, name) for name in peft_pte.__all__)
