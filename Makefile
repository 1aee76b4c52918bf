# make demo: the main job end to end. make test: the fast suite and the end-to-end job. Both set themselves up, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCK   ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(LOCK)
UV     := 0.13.9
# One thread a process: on busy cores two OpenMP threads run ten times slower than one.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: setup demo up test test-all chaos gpu lint format bench proofs lock clean

setup: $(STAMP)

$(STAMP): requirements/$(LOCK).txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV)
ifeq ($(LOCK),cpu)
	# pip, for its list of links and its fallback where the index of CPU builds does not answer.
	$(BIN)/python -m pip install --quiet --retries 0 --no-deps "$$(grep '^torch==' requirements/cpu.txt)" \
		--extra-index-url https://download.pytorch.org/whl/cpu
endif
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps -r requirements/$(LOCK).txt
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: setup
	$(BIN)/sedsft demo

up: setup
	$(BIN)/sedsft up

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m "e2e or not (slow or chaos or gpu)"

test-all: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu"

chaos: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m chaos

gpu: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Side by side with peers; bench_sft wants examples/prepare_smollm2.py to have run.
bench: setup
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps -r requirements/bench.txt
	for script in benchmarks/bench_*.py; do $(TEST_ENV) $(BIN)/python $$script || exit 1; done
	$(TEST_ENV) $(BIN)/python benchmarks/bench_head.py --table

# Long runs that show exact resume after kills, the share of masked tokens and the objectives over seeds.
proofs: setup
	$(TEST_ENV) $(BIN)/python -m benchmarks.resume_table
	$(TEST_ENV) $(BIN)/python benchmarks/tau_drift.py
	$(TEST_ENV) $(BIN)/python benchmarks/sync_gaps.py
	$(TEST_ENV) $(BIN)/python -m benchmarks.seeds_table

# Regenerates both locks; run it after changing requirements/*.in and commit the result.
lock: setup
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match \
		--override requirements/cpu-overrides.txt requirements/cpu.in -o requirements/cpu.txt
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
		requirements/gpu.in -o requirements/gpu.txt

clean:
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
