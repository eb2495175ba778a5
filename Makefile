# make demo   trains a small recommender and improves it by RL     make test   runs the tests
# make bench  measures every op against torch                      make lint   ruff and mypy
# Each sets itself up first. ARGS is handed on: make test ARGS="-k trie -x".
# make gpu    on a machine with a GPU, with the torch that is there: builds in place, tests, measures

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

GPU_TESTS = $(wildcard $(patsubst vstar_ops/ops/%,tests/test_%,$(wildcard vstar_ops/ops/[a-z]*.py)))

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.vstar_ops-ready

.PHONY: setup demo test bench lint gpu clean

setup: $(READY)
	@cat $(READY)

demo: setup
	$(PY) -m vstar_ops.train $(or $(ARGS),--test-decoder ved)

test: setup
	$(PY) -m pytest $(ARGS)

bench: setup
	$(PY) -m benchmarks $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Nothing is downloaded or installed: $(PYTHON) has a CUDA torch, Triton, pytest and hypothesis. The measurement
# follows whatever the tests say, and writes benchmarks/results/<gpu>-<date>.json and .md.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m vstar_ops.collect_env
	@failed=0; \
	$(PYTHON) -m pytest -q -k "triton or cuda" tests/test_gpu.py $(GPU_TESTS) || failed=1; \
	if command -v compute-sanitizer > /dev/null; then for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(PYTHON) -m pytest -q -k "cuda and (hand or small)" $(GPU_TESTS) || failed=1; \
	done; fi; \
	$(PYTHON) -m benchmarks.gpu $(ARGS) || failed=1; \
	exit $$failed

# torch comes first and alone; --no-build-isolation then builds against that very torch, where pip
# would otherwise fetch another. The last step records which backends are on, for `setup` to print.
$(READY): setup.py pyproject.toml $(wildcard csrc/*/* csrc/*/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "vstar_ops needs Python 3.10 or newer as $(PYTHON): make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	    || { echo "$(PYTHON) lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -q 'setuptools>=78' ninja
	$(PIP) install -q --no-build-isolation -e '.[dev]'
	@$(PY) -m vstar_ops.collect_env --backends > $@.new
	@mv $@.new $@

clean:
	rm -rf build dist vstar_ops.egg-info vstar_ops/_C*.so $(READY)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
