"""The floors of CONTRIBUTING.md, and what importing the package may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_pte
from peft_pte.config import EVICTION_POLICIES
from peft_pte.eviction import POLICIES

PACKAGE = Path(peft_pte.__file__).parent
# Lower floors never import upper ones; within a floor, imports may not form a circle.
FLOORS = [
    {"shapes", "_peft_type", "lora_fields", "config", "state", "boundary", "chat"},
    {"ops"},
    {"eviction", "rotary", "layer", "encoder", "slots", "layout"},
    {"thought_layer", "cache", "static_cache", "statistics"},
    {"checkpoints", "sites", "recompute", "decode", "replay", "seam", "model"},
    {"__init__"},
    {"integrations"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path):
    """Units of this package that ``path`` imports at run time (imports for type checkers alone do not count)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level == 0 and parts[:1] == ["peft_pte"]:
                parts = parts[1:]
            elif node.level != depth:
                continue  # another package, or a neighbour within the unit
            for name in [parts[0]] if parts else [alias.name for alias in node.names]:
                yield name if name in FLOOR_OF else "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("peft_pte."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_floor_imports_a_higher_one(path):
    floor = FLOOR_OF[unit_of(path)]
    for unit in imported_units(path):
        assert FLOOR_OF[unit] <= floor, f"{path.name} (floor {floor}) imports {unit} (floor {FLOOR_OF[unit]})"


def test_imports_form_no_circle():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        unit = unit_of(path)
        graph.setdefault(unit, set()).update(set(imported_units(path)) - {unit})
    done = set()

    def visit(unit, trail):
        assert unit not in trail, f"circle: {' -> '.join([*trail, unit])}"
        if unit not in done:
            for other in graph.get(unit, ()):
                visit(other, [*trail, unit])
            done.add(unit)

    for unit in graph:
        visit(unit, [])


@pytest.mark.parametrize("operation", ["compress", "encode", "delta"])
def test_reference_and_kernel_do_not_import_each_other(operation):
    folder = PACKAGE / "ops" / operation
    assert "triton" not in (folder / "reference.py").read_text().replace("torch", "")
    assert "reference" not in "".join(
        line for line in (folder / "triton.py").read_text().splitlines() if "import" in line
    )


def test_eviction_policies_are_those_the_config_knows():
    assert set(POLICIES) == set(EVICTION_POLICIES)


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
    assert set(peft_pte.__all__) == {"PTECache", "PTEConfig", "PTEModel", "StaticPTECache", "__version__", "prompt_end"}
    assert all(hasattr(peft_pte, name) for name in peft_pte.__all__)
