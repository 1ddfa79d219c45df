# make docs: the documentation.   make versions: the wheel on the lowest and the newest torch.
# make demo: train a small network and see what the compiler did.   make test: everything is right.
# make bench: the quick table.   make results: all committed results of layers, hours; goes on.
# Each creates .venv with what it needs. Another torch build: make test TORCH_INDEX=<its index URL>
PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
# Without bytecode of all that is installed, which takes longer than what of it is imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: demo test tests lint bench results docs site seen versions
demo: $(VENV)/.demo
	$(BIN)/python -m tnconv demo

test: lint tests

tests: $(VENV)/.test
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
# pictures, and LaTeX sets those of TikZ (where they are: apt-get install chromium texlive-pictures).
docs: site seen

site: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

seen: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/docs/test_in_browser.py \
	  tests/diagrams/test_drawing.py tests/monitor/test_views.py -k "latex or browser"

# The wheel's doctests and the tests on the lowest torch, CI's and the newest: hours, and gigabytes;
# VERSIONS_ARGS="--every 8" runs each eighth test. Results go to docs/versions.md.
versions:
	OMP_NUM_THREADS=1 $(PYTHON) docs/versions.py $(VERSIONS_ARGS)

# torch comes first and alone: later packages then keep the build that is there.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[$*]'
	touch $@
