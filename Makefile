# Every target makes its environment when it is missing or older than what it is made of.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= pixels:digits
PART ?= 1/5

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REQUIREMENTS = requirements/$$($(PYTHON) -c \
    'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt

.PHONY: install train test check part reproduce bench compiled plan package lint clean

install: $(INSTALLED)

train: $(INSTALLED)
	$(BIN)/python -m train.main --config $(CONFIG)

# Tests in minutes; `check` adds those that take longer.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: test
	$(BIN)/python -m pytest -n 2 -m slow

# One of N parts of the slow tests, as `make part PART=2/5`; a test stays in its part.
part: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow --part $(PART)

# Trains what docs/results.md reports, three seeds each, and rewrites its table.
reproduce: $(INSTALLED)
	$(BIN)/python -m train.reproduce

# Speed and memory of kernels, layers and training steps on this machine.
bench: $(INSTALLED)
	$(BIN)/python -m kernels.bench
	$(BIN)/python -m train.bench

# What the compilers of accelerators that need not be here say of every kernel, each
# target in at most an hour: kernels/results/compiled. The CUDA wheels are gigabytes.
compiled: .venv-tpu/.installed .venv-cuda/.installed
	.venv-tpu/bin/python -m kernels.check --compile tpu:v5e tpu:v6e
	.venv-cuda/bin/python -m kernels.check --compile gpu:h100 gpu:h200

# What published models need on the machines of docs/plan.md: its tables.
plan: .venv-tpu/.installed .venv-cuda/.installed
	.venv-tpu/bin/python -m train.plan --table
	.venv-cuda/bin/python -m train.plan --table

.venv-tpu/.installed .venv-cuda/.installed: pyproject.toml requirements/py311.txt requirements/py312.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c $(REQUIREMENTS) \
	    -e '.[train,data,$(if $(findstring tpu,$@),tpu,gpu)]' triton
	touch $@

# The wheel, dist/ssmax-*.whl, installed with its dependencies beside a user's code.
package:
	rm -rf dist
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install --quiet \
	    "$$(ls dist/ssmax-*.whl)[train,data]"
	cd dist && ../.venv-wheel/bin/python -m ssmax.kernels.check --quick --op linear_scan
	cd dist && ../.venv-wheel/bin/python -m ssmax.layers.laws --layer s5
	cd dist && ../.venv-wheel/bin/python -m ssmax.train.main --config pixels:digits \
	    --config.train.steps=20 --workdir run

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-* dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml requirements/py311.txt requirements/py312.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ssmax needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	         "name one with 'make PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r \
	    $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
