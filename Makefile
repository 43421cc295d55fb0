# Two commands do all the set-up: `make serve` runs the server, `make test` runs its tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUPPLY := .venv-supply
.DEFAULT_GOAL := help

.PHONY: help serve amqp test slow faults lint check docs audit sbom bench lock clean

help:  ## say what each command does
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

serve: $(VENV)/run.stamp  ## run the server on https://127.0.0.1:8443 with a demo device, state under ./data
	@exec $(BIN)/uplinkd serve --demo

amqp: $(VENV)/run.stamp  ## install what the AMQP door needs: compiles for half a minute, with gcc and Python's headers
	@echo "compiling python-qpid-proton (about half a minute) …"
	@$(AMQP) >$(VENV)/amqp.log 2>&1 || { echo "$(NO_AMQP)"; exit 1; }

test: $(VENV)/dev.stamp  ## run all tests but the slow ones
	$(BIN)/python -m pytest -n 4 --dist loadgroup

# What is harmed or measured under load has the machine for itself. What fails is tried once more, by itself: these tests have real
# servers, real time-outs and a machine that may be slow.
ALONE := $(addprefix tests/faults/test_,crashes.py nothing_is_lost.py soak.py surroundings.py workers.py) \
  tests/abuse/test_under_attack.py tests/bench
SLOW := $(BIN)/python -m pytest -m slow --timeout 600 --durations 15
AGAIN := -v --last-failed --last-failed-no-failures none

slow: $(VENV)/dev.stamp  ## run the slow tests: faults under load, large imports
	$(SLOW) -n 3 --dist loadgroup $(ALONE:%=--ignore=%) || $(SLOW) $(AGAIN) $(ALONE:%=--ignore=%)
	$(SLOW) -v $(ALONE) || $(SLOW) $(AGAIN) $(ALONE)

faults: $(VENV)/dev.stamp  ## do to a server all that can happen to it, and say what devices saw: some minutes, best as root
	$(BIN)/python -m pytest -m faults -v --timeout 600

lint: $(VENV)/dev.stamp  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint  ## lint and the fast tests
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests/core tests/http tests/contracts

docs: $(VENV)/dev.stamp  ## write the tables of codes and settings into the documents, and THIRD_PARTY.md
	$(BIN)/python -m docs.generate

audit: $(SUPPLY)/stamp  ## ask whether a locked dependency has a known vulnerability
	@$(SUPPLY)/bin/python docs/audit.py $(SUPPLY)/bin/pip-audit

sbom: $(VENV)/dev.stamp $(SUPPLY)/stamp  ## write what uplinkd is made of to dist/uplinkd.cdx.json (CycloneDX)
	@mkdir -p dist
	@$(SUPPLY)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible $(VENV) >dist/environment.cdx.json
	@$(BIN)/python -m docs.sbom <dist/environment.cdx.json >dist/uplinkd.cdx.json
	@rm dist/environment.cdx.json
	@$(SUPPLY)/bin/python -c "$$VALIDATE" dist/uplinkd.cdx.json

define VALIDATE
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(fault and f"{sys.argv[1]} is no valid CycloneDX: {fault}")
endef
export VALIDATE

bench: $(VENV)/bench.stamp  ## measure against nginx, FastAPI and others in one run (needs nginx and wrk)
	$(BIN)/python -m bench

COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --custom-compile-command "make lock"

lock: $(VENV)/bin/python  ## resolve the dependencies anew into requirements/*.txt
	@$(BIN)/python -m pip install -q uv
	$(COMPILE) --group build -o requirements/build.txt
	$(COMPILE) pyproject.toml -o requirements/run.txt
	$(COMPILE) pyproject.toml --extra amqp -c requirements/run.txt -o requirements/amqp.txt
	$(COMPILE) pyproject.toml --group dev -c requirements/run.txt -o requirements/dev.txt
	$(COMPILE) --group bench -c requirements/dev.txt -o requirements/bench.txt
	$(COMPILE) --group linkkit -o requirements/linkkit.txt
	$(COMPILE) --group recipes -o requirements/recipes.txt
	$(COMPILE) --group supply -o requirements/supply.txt

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "uplinkd needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/run.stamp: requirements/run.txt requirements/build.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing uplinkd into $(VENV) (about half a minute) …"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/run.txt -r requirements/build.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt requirements/amqp.txt $(VENV)/run.stamp
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(AMQP) >$(VENV)/amqp.log 2>&1 || echo "tests of the AMQP door are skipped: $(NO_AMQP)"
	@touch $@

$(VENV)/bench.stamp: requirements/bench.txt $(VENV)/dev.stamp
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@touch $@

$(SUPPLY)/stamp: requirements/supply.txt
	@$(PYTHON) -m venv $(SUPPLY)
	@$(SUPPLY)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/supply.txt
	@touch $@

AMQP := $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/amqp.txt
NO_AMQP := python-qpid-proton could not be compiled; it needs gcc and Python's headers (see $(VENV)/amqp.log)

clean:  ## remove the virtual environment and caches, never ./data
	rm -rf $(VENV) $(SUPPLY) .pytest_cache .mypy_cache .ruff_cache .hypothesis
