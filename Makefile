# Every target makes its environment when it is missing or older than what it is made of.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/pixels.py:digits

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Large arrays otherwise go back to the system after every operation, and the page faults
# of the next one cost more than its arithmetic: a training step on a CPU becomes 1.2 to
# 1.4 times faster. The price is memory that is kept. Read by glibc, ignored elsewhere.
train reproduce bench: export MALLOC_ARENA_MAX = 1
train reproduce bench: export MALLOC_MMAP_THRESHOLD_ = 4294967296
train reproduce bench: export MALLOC_TRIM_THRESHOLD_ = 34359738368

.PHONY: install train test check reproduce bench lint clean

install: $(INSTALLED)

train: $(INSTALLED)
	$(BIN)/python -m train.main --config $(CONFIG)

# Tests in minutes; `check` adds those that take longer.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: test
	$(BIN)/python -m pytest -n 2 -m slow

# Trains what docs/results.md reports, three seeds each, and rewrites its table.
reproduce: $(INSTALLED)
	$(BIN)/python -m train.reproduce

# Speed and memory of kernels, layers and training steps on this machine.
bench: $(INSTALLED)
	$(BIN)/python -m kernels.bench
	$(BIN)/python -m train.bench

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml requirements/py311.txt requirements/py312.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ssmax needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	         "name one with 'make PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r \
	    requirements/$$($(PYTHON) -c \
	    'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
