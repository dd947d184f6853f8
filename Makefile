# make demo | make test: each creates .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := $(shell find csrc tests/csrc -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py pyproject.toml constraints.txt $(filter csrc/%,$(NATIVE))
# What clang-tidy reads: the sources with no torch header, which take seconds.
TIDY := $(wildcard csrc/cpu/*_pass.cpp) $(wildcard tests/csrc/*.cpp)

.PHONY: demo test test-all test-avx2 lint format docs docs-site bench bench-avx2 inspect plans install wheel walkthrough sanitize clean

install: $(VENV)/.installed

# Without isolation, so that the extension is built against the torch that will load it.
define install_with
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja numpy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[$(1)]'
endef

$(VENV)/.installed: $(SOURCES)
	$(call install_with,dev)
	touch $(VENV)/.demo $@

# The demo waits for no tool of the developers.
$(VENV)/.demo: $(SOURCES)
	$(call install_with,demo)
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m lora_kernels.cli demo

# The suite, and with it the rest of its matrices: every variant of every kernel compiled, and the like.
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

# The suite as on a processor without AVX-512, on one that has it: no library sees it.
HIDING = hidden=$$($(BIN)/python tests/csrc/without_avx512.py build/hiding) && env $$hidden

test-avx2: install
	$(HIDING) $(BIN)/python -m pytest -n 2 --dist worksteal

# `make bench-avx2 ARGS='--suite dora_linear'`.
bench-avx2: install
	$(HIDING) $(BIN)/python -m benchmarks --device cpu $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/clang-tidy --quiet $(TIDY) -- -std=c++20
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# What is made of lora_kernels/methods.py, docs/methods.md and the README's table; and the README's picture. docs/peft.md is
# made of what accelerate knows.
docs: install
	$(BIN)/python -m lora_kernels.cli methods --write
	$(BIN)/python -m lora_kernels.cli peft --write
	$(BIN)/python -m benchmarks.picture

# The pages of docs/ as a site, in build/site; a link that leads nowhere is an error.
docs-site: install
	$(PIP) 'lora-kernels[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet

bench: install
	$(BIN)/python -m benchmarks

inspect: install
	$(BIN)/python -m lora_kernels.cli inspect

# A wheel, in a virtual environment that has nothing else but sees this one's torch.
wheel: install
	rm -rf build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" LORA_KERNELS_FORCE_BUILD=1 \
		$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --no-deps build/wheel/*.whl
	$(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])" \
		> "$$(echo build/wheel/venv/lib/python*/site-packages)/torch.pth"
	cd build/wheel && venv/bin/python ../../tests/wheel_check.py

# docs/walkthrough.md word for word: that wheel in an empty environment, TRL, a served adapter.
walkthrough: wheel
	$(BIN)/python -m pytest -n 0 -m "" tests/test_walkthrough.py

# The C++ code under AddressSanitizer and UBSan: the op tests on its backend, and the decode kernels' loops;
# those also under ThreadSanitizer, which sees a barrier that is missing. Python has no libstdc++ of its own,
# whose exceptions the sanitizer wants to know of from the start.
SANITIZED := build/sanitized
SIMULATION := tests/csrc/decode_race_check.cpp tests/csrc/decode_simulation.cpp
SANITIZE_SIMULATION := -std=c++20 -O1 -g -pthread -Wall -Wextra -Werror -Wno-tsan -fno-sanitize-recover=all
sanitize: install
	mkdir -p $(SANITIZED)
	$(CXX) $(SANITIZE_SIMULATION) -fsanitize=thread $(SIMULATION) -o $(SANITIZED)/race_check
	$(SANITIZED)/race_check
	$(CXX) $(SANITIZE_SIMULATION) -fsanitize=address,undefined $(SIMULATION) -o $(SANITIZED)/memory_check
	$(SANITIZED)/memory_check
	PATH="$(CURDIR)/$(BIN):$$PATH" LORA_KERNELS_FORCE_BUILD=1 LORA_KERNELS_SANITIZE=1 \
		$(BIN)/python setup.py -q build --build-base $(SANITIZED)/objects --build-lib $(SANITIZED)/package
	cd $(SANITIZED)/package && export \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
		$(CURDIR)/$(BIN)/python -c "from lora_kernels import _extension as e; exit(e.load())" && \
		$(CURDIR)/$(BIN)/python -m pytest -p no:xdist -k "cpp or cpu" $(CURDIR)/tests/ops

# The tables of plans that ship, predicted from byte counts; `lora-kernels tune` measures better ones.
PLAN_SHAPES := $(foreach m,1 16 64 512 2048 8192,$(foreach s,4096x4096 4096x1024 4096x14336 14336x4096 8192x8192,--shape $(m)x$(s)))

plans: install
	for card in sm_80 sm_90; do $(BIN)/python -m lora_kernels.cli tune --predict $$card $(PLAN_SHAPES) \
	  --rank 16 --rank 64 --dropout 0.1 --output lora_kernels/plans/$$card.json; done

clean:
	rm -rf $(VENV) build *.egg-info lora_kernels/_C*.so demo_output
