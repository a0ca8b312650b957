# Everything here works from a fresh clone with Python 3.11 and make; each command sets up what it needs.
SHELL := /bin/sh
# The first interpreter that is a 3.11 and can make virtual environments; `make PYTHON=...` names another.
PYTHON ?= $(shell for p in python3.11 /usr/bin/python3.11 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done)
PY := .venv/bin/python
SERVERS := $(PY) -m sandbox.servers run
WORKERS ?= 2

export NUMBA_CACHE_DIR := $(CURDIR)/.numba
export DEVELOPMENT ?= 1

.PHONY: help setup run test test-full smoke sim-market soak-power bench lint format openapi reset

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## .venv with the pinned packages (again only when the pins change)
	@[ -n "$(PYTHON)" ] || { echo "setup: Python 3.11 with venv is needed and was not found (Debian, Ubuntu: apt-get install" \
		"python3.11 python3.11-venv; else make PYTHON=/path/to/python3.11)" >&2; exit 78; }
	@$(PYTHON) sandbox/bootstrap.py

run: setup ## the whole company on this machine, with a demo market; Ctrl-C ends it, the data stays
	@$(PY) -m scheduler.core.warm && $(PY) -m sandbox.run

reset: setup ## forget the data of `make run`
	@$(PY) -m sandbox.run --reset

test: setup ## the suite (at most 10 minutes on 2 cores)
	@$(PY) -m scheduler.core.warm
	@HYPOTHESIS_PROFILE=ci $(SERVERS) --unsafe-fast --owner -- $(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not full" $(ARGS)

test-full: setup ## with the sweeps: every seed, theme and width, long simulations
	@$(PY) -m scheduler.core.warm
	@HYPOTHESIS_PROFILE=full $(SERVERS) --unsafe-fast --owner -- $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

smoke: setup ## the main job, headless, through public interfaces only; a report
	@$(PY) -m scheduler.core.warm && $(PY) -m sandbox.smoke $(ARGS)

sim-market: setup ## a seeded quarter of the market with everything that goes wrong, audited; ARGS='--seed N --days N --scale N'
	@$(PY) -m scheduler.core.warm && $(SERVERS) --unsafe-fast --owner -- $(PY) -m sandbox.market $(ARGS)

soak-power: setup ## ten minutes of a site under every fault of the failure table; ARGS='--seed N --minutes N | --hours N'
	@$(PY) -m scheduler.core.warm && $(SERVERS) --unsafe-fast --owner -- $(PY) -m sandbox.soak $(ARGS)

bench: setup ## every claim of the README beside its peer, into benchmarks/results/ and the README's table
	@$(PY) -m benchmarks all --out benchmarks/results $(ARGS); status=$$?; $(PY) -m benchmarks table && exit $$status

lint: setup ## ruff, types, import contracts, migrations, OpenAPI drift, templates
	@.ci/lint

format: setup ## ruff's formatter and its safe fixes
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

openapi: setup ## write docs/openapi.yaml anew
	@$(SERVERS) --unsafe-fast --owner -- $(PY) manage.py spectacular --validate --fail-on-warn --file docs/openapi.yaml
