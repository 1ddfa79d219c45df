# make docs: the documentation.   make versions: tests on the lowest and the newest torch.
# make demo: train a small network and see what the compiler did.   make test: everything is right.
# make bench: the quick table.   make results: all committed results of layers, hours; goes on.
# Each creates .venv with what it needs. Another torch build: make test TORCH_INDEX=<its index URL>
PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: demo test lint bench results docs versions
demo: $(VENV)/.demo
	$(BIN)/python -m tnconv demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.peers $(VENV)/.demo
	$(BIN)/python -m benchmarks.layers --quick

results: $(VENV)/.peers $(VENV)/.demo $(VENV)/.plots
	$(BIN)/python -m benchmarks.all

# The documentation, with no broken reference: docs/_build/index.html. A browser then finds its
# pictures (where there is one: apt-get install chromium).
docs: $(VENV)/.docs $(VENV)/.test
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
	$(BIN)/python -m pytest -q -rs tests/docs/test_in_browser.py

# The tests of what depends on torch's version, on the lowest and the newest one.
versions:
	for torch in 2.9.* 2.*; do \
	  $(PYTHON) -m venv .venv-versions && \
	  .venv-versions/bin/python -m pip install -q "torch==$$torch" && \
	  .venv-versions/bin/python -m pip install -q -e '.[test]' && \
	  OMP_NUM_THREADS=1 .venv-versions/bin/python -m pytest -q tests/nn tests/functional \
	    tests/test_nn.py tests/test_functional.py tests/optim || exit 1; done

# torch comes first and alone: later packages then keep the build that is there.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[$*]'
	touch $@
