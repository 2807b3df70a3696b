# Everything runs from a virtual environment made from hashed requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The suites run small frames in one process: more threads only cost.
export POLARS_MAX_THREADS := 1
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test demo down unit pure simulation hunt component chaos chaos-short e2e lint types imports rules docs lock lock-images compose-env test-compose bench bench-docs bench-setup feast-check clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements/dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

setup: $(STAMP) ## Make the virtual environment

test: lint types imports unit component chaos-short e2e ## The whole suite; starts the servers it needs

demo: $(STAMP) ## Real flights through the whole mesh (DEMO_MONTHS=3, DEMO_EXIT=1, DEMO_KILL=features)
	$(BIN)/python -m examples.flights.demo

down: $(STAMP) ## Stop what `make demo` left running
	$(BIN)/causemesh down

unit: $(STAMP) ## Pure tests and the protocol simulation, side by side
	$(MAKE) --no-print-directory --jobs=2 --output-sync=line pure simulation

pure: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/contract --ignore=tests/unit/simulation

simulation: $(STAMP)
	$(BIN)/python -m pytest tests/unit/simulation -v

hunt: $(STAMP) ## The pure tests on new random examples, not those of every other time
	HYPOTHESIS_PROFILE=hunt $(BIN)/python -m pytest tests/unit tests/contract

component: $(STAMP) ## Tests on real servers from package registries
	$(BIN)/python -m pytest tests/component

chaos-short: $(STAMP) ## A process killed at every step of the protocol
	$(BIN)/python -m pytest tests/chaos/test_fault_points.py -v -s

chaos: $(STAMP) ## That, and the replay under kills, pauses and faults (CHAOS_SEED, CHAOS_KILLS=20)
	$(BIN)/python -m pytest tests/chaos -v -s

e2e: $(STAMP) ## From flights to invoices, with services and servers killed on the way
	$(BIN)/python -m pytest tests/e2e -v

compose-env: ## Write .env and the secrets that docker-compose.yml needs, once
	$(PYTHON) deploy/compose/prepare.py

# Where no registry answers, this folder's scripts build stand-ins for the official images.
COMPOSE_LAB ?= ../shared/compose-lab
test-compose: $(STAMP) ## docker compose up, flights through it from outside, and down; needs Docker
	@if [ -x $(COMPOSE_LAB)/engine.sh ]; then \
	  $(COMPOSE_LAB)/engine.sh && DOCKER_BUILDKIT=0 COMPOSE_LAB=$(COMPOSE_LAB) \
	    $(BIN)/python -m pytest tests/compose -v -s; \
	else \
	  echo "no compose-lab at $(COMPOSE_LAB): using this machine's Docker and its registries"; \
	  $(BIN)/python -m pytest tests/compose -v -s; \
	fi

rules: $(STAMP) ## Alert rules and dashboards; fetches Debian's promtool if there is none
	$(BIN)/python -m pytest tests/contract/test_observability.py -v

lint: $(STAMP) ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Static types
	$(BIN)/mypy causemesh services examples benchmarks deploy/openapi_docs.py

imports: $(STAMP) ## Who may import whom
	$(BIN)/lint-imports

docs: $(STAMP) ## Make docs/topics.md, docs/asyncapi.yaml and docs/openapi from the code
	$(BIN)/python -m causemesh.catalogue_docs > docs/topics.md
	$(BIN)/python -m causemesh.asyncapi > docs/asyncapi.yaml
	$(BIN)/python -m deploy.openapi_docs docs/openapi

BENCH_STAMP := .venv-bench/.installed
BENCH_ROUNDS ?= 5

$(BENCH_STAMP): requirements/bench.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --require-hashes -r requirements/bench.txt
	touch $(BENCH_STAMP)

FEAST_STAMP := .venv-feast/.installed

$(FEAST_STAMP): requirements/feast.txt
	test -x .venv-feast/bin/python || $(PYTHON) -m venv .venv-feast
	.venv-feast/bin/python -m pip install --quiet --require-hashes -r requirements/feast.txt
	touch $(FEAST_STAMP)

feast-check: $(STAMP) $(FEAST_STAMP) ## Views to a real Feast and back, answers compared
	$(BIN)/python -m benchmarks.feast_round_trip

bench-setup: $(STAMP) $(BENCH_STAMP) $(FEAST_STAMP)

bench: bench-setup ## Measure beside peers, about an hour on a quiet machine (BENCH_ROUNDS=5; needs a JDK 17, redis-server)
	$(BIN)/python -m benchmarks.features_vs_peers --rounds $(BENCH_ROUNDS)
	$(BIN)/python -m benchmarks.windows_vs_peers
	$(BIN)/python -m benchmarks.join_vs_feast
	$(BIN)/python -m benchmarks.cost_by_entities
	$(BIN)/python -m benchmarks.feature_checkpoints
	$(BIN)/python -m benchmarks.backfill
	$(BIN)/python -m benchmarks.lake_from_kafka
	$(BIN)/python -m benchmarks.latency_vs_echo
	$(BIN)/python -m benchmarks.predictions_vs_peers --rounds $(BENCH_ROUNDS)
	$(BIN)/python -m benchmarks.usage_vs_postgres --rounds $(BENCH_ROUNDS)
	$(BIN)/python -m benchmarks.transforms_vs_faust
	$(BIN)/python -m benchmarks.mesh_cost_by_work
	$(BIN)/python -m benchmarks.profiles
	$(MAKE) --no-print-directory bench-docs

bench-docs: $(STAMP) ## Make docs/benchmarks.md from the newest results
	$(BIN)/python -m benchmarks.report

LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --no-header --no-emit-index-url --python-version 3.11
# What an image installs is what the tests ran on: the same pins, fewer of them.
IMAGE_LOCK := $(LOCK) --constraint requirements/dev.txt --extra cli --extra pulsar

lock: $(STAMP) ## Pin every dependency with its hashes
	$(LOCK) --extra inference --extra billing --extra pulsar --extra lake --extra transforms --extra local --extra flights \
	  --extra dev pyproject.toml --output-file requirements/dev.txt
	$(LOCK) requirements/bench.in --output-file requirements/bench.txt
	$(LOCK) requirements/feast.in --output-file requirements/feast.txt
	$(MAKE) --no-print-directory lock-images

lock-images: $(STAMP) ## Pin what the images install, to the versions of requirements/dev.txt
	$(IMAGE_LOCK) pyproject.toml --output-file requirements/runtime.txt
	$(IMAGE_LOCK) --extra inference pyproject.toml --output-file requirements/inference.txt
	$(IMAGE_LOCK) --extra billing pyproject.toml --output-file requirements/billing.txt
	$(LOCK) --no-deps --no-annotate --constraint requirements/dev.txt requirements/objects.in \
	  --output-file requirements/objects.txt
	$(LOCK) requirements/build.in --output-file requirements/build.txt
	$(LOCK) --no-deps --no-annotate requirements/triton-image.in --output-file requirements/triton-image.txt

clean: ## Remove the environment and local data
	rm -rf $(VENV) .causemesh .causemesh-test*
