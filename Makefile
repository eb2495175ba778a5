# make demo   trains a small recommender and improves it by RL     make test   runs the tests
# make bench  measures every op against torch                      make lint   ruff and mypy
# Each sets itself up first. ARGS is handed on: make test ARGS="-k trie -x".

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.vstar_ops-ready

.PHONY: setup demo test bench lint clean

setup: $(READY)
	@cat $(READY)

demo: setup
	$(PY) -m vstar_ops.train $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

bench: setup
	$(PY) -m benchmarks $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torch comes first and alone; --no-build-isolation then builds against that very torch, where pip
# would otherwise fetch another. The last step records which backends are on, for `setup` to print.
$(READY): setup.py pyproject.toml $(wildcard csrc/*/*)
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
