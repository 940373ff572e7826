# Everything a new machine needs: Python 3.11 or newer, git and make.
#   make demo            the main job on four synthetic hospitals, under five minutes on two cores
#   make test            the tests that need neither a GPU nor minutes (what CI runs)
#   make test-services   PostgreSQL and Chromium, which some tests need (Debian, as root)
#   make test-slow       the tests on real Flower processes, long kills and, where there is one, a GPU
#   make check           formatter, linter, types, import rules
#   make wheelhouse      a folder from which fedcomet is installed without a network (docs/deploy.md)
#   make proto           the Python of federation/control.proto, which is kept beside it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch goes first and alone, so that nothing that depends on it can choose another build. A machine with its own
# preferred build (CPU only, a certain CUDA) installs that into $(VENV) before; a version that fits is left alone.
TORCH := $(shell grep '^torch==' requirements.lock)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location

.PHONY: demo install install-dev test test-services test-slow check proto wheelhouse clean

demo: install
	$(BIN)/fedcomet simulate examples/demo.toml

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedcomet needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies into $(VENV) (about two minutes the first time) ..."
	@$(PIP) $(TORCH)
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	@$(PIP) -r requirements-dev.lock
	@touch $@

test: install-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-services:
	@sh tests/services.sh

test-slow: install-dev
	$(BIN)/python -m pytest -m 'slow or gpu'

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: install-dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. federation/control.proto

# WHEELS says what more pip is told, such as WHEELS="--extra-index-url URL" for another build of PyTorch.
wheelhouse: install
	$(BIN)/python deploy/wheelhouse.py wheelhouse $(shell grep '^psycopg' requirements-dev.lock) $(WHEELS)

clean:
	rm -rf $(VENV) demo
