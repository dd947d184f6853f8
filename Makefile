# make demo | make test: each creates .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint format bench inspect install clean

install: $(VENV)/.installed

# Without isolation, so that the extension is built against the torch that will load it.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja numpy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python -m lora_kernels.cli demo

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

bench: install
	$(BIN)/python -m benchmarks

inspect: install
	$(BIN)/python -m lora_kernels.cli inspect

clean:
	rm -rf $(VENV) build *.egg-info lora_kernels/_C*.so demo_output
