# Everything bootstraps itself on a bare machine: Python 3.11+, pip, make and git are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests of one file stay together, since they share a server; two at once keep two cores busy. The folders come one after
# the other: a browser's event loop and a Prefect server's settings must not meet tests that know nothing of them.
TEST_WORKERS ?= 2
SIDE_BY_SIDE = -n $(TEST_WORKERS) --dist loadfile --durations=10

# Tests and runs start hundreds of processes; where the surroundings forbid bytecode, each would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test unit coverage chaos chaos-short check docs bench stack stack-status stack-down lock clean

install: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip sync --quiet requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $(STAMP)

demo: install
	$(BIN)/leukoflow sample demo-out/archive --images 96 --seed 7
	$(BIN)/leukoflow run demo-out/archive/smears.zip --out demo-out --run-id demo --manifest demo-out/archive/manifest.csv --shard-size 32

test: install
	for folder in unit integration web; do $(BIN)/python -m pytest -m "not chaos" $(SIDE_BY_SIDE) tests/$$folder || exit 1; done

# For every save: no servers, no browser, nothing slow; about 90 s on two idle cores.
unit: install
	$(BIN)/python -m pytest -m "not chaos and not slow" -p no:schemathesis $(SIDE_BY_SIDE) tests/unit

coverage: install
	$(BIN)/python -m pytest -m "not chaos" -n $(TEST_WORKERS) --dist loadfile --cov=leukoflow --cov-report=term:skip-covered --cov-report=html:coverage tests/unit

# Kills, frozen processes, poisonous images, full disks, stores and servers that go away: an hour, so not part of every
# change. LEUKOFLOW_CHAOS_SEED draws other faults at other moments.
chaos: install
	$(BIN)/python -m pytest -m chaos

# Most of it is waiting, so three at once keep two cores busy.
chaos-short: install
	$(BIN)/python -m pytest -m chaos_short -n 3 --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site in docs-out/; needs no network, and a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir docs-out

bench: install
	$(BIN)/python -m pytest benchmarks -q -s -o python_files='bench_*.py'

# The whole of production as plain processes on this machine: Postgres, Prefect server and worker, reverse proxy, Dask,
# object store. Needs no containers; data, logs and generated passwords are in stack-out (LEUKOFLOW_STACK).
stack: install
	$(BIN)/python -m infra.stack up

stack-status:
	$(BIN)/python -m infra.stack status

stack-down:
	$(BIN)/python -m infra.stack down

# Only maintainers run this: pins the versions that were tested, without naming any index.
lock:
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --all-extras --group dev pyproject.toml --python-version 3.11 --universal -o requirements.lock

clean:
	rm -rf $(VENV) demo-out docs-out coverage
