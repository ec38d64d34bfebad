# What people and CI both run. The first use of a target sets up .venv; a change of pyproject.toml or constraints.txt
# renews it. Arguments: make serve MODEL=Qwen/Qwen3-0.6B PORT=8000, and all others in ARGS="--quantization int4"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
MODEL :=
PORT :=
JOBS ?= 3
BIN := $(VENV)/bin
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
CLIENTS := $(VENV)/.installed-clients
DOCS := $(VENV)/.installed-docs
BROWSER := $(VENV)/.installed-browser
APART := $(wildcard tests/clients/apart/*.txt)

# .venv is ours to write to: without its bytecode, each of the many processes compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve chat doctor bench test test-all test-clients test-faults test-browser test-cluster page wheel soak sanitize lint format docs docs-site links audit clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST)

INSTALL := tools/install $(BIN)/python -c constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "minisgl needs Python 3.10 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@tools/patiently "making $(VENV)" $(PYTHON) -m venv $(VENV)

# uv installs in a small part of pip's time. Where there is no NVIDIA GPU, torch's CPU build is enough: a small part of
# the download, and uv knows where it is. What uv cannot get, pip takes from where it does. TORCH=default: always that.
TORCH ?= $(shell [ "$$(uname -sm)" != 'Linux x86_64' ] || ls /dev/nvidiactl /dev/dxg 2>/dev/null | grep -q . || echo cpu)
$(CORE) $(DEV) $(CLIENTS) $(BROWSER): $(VENV)/.torch
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@tools/patiently "installing uv" $(INSTALL) uv || echo "uv cannot be had: pip installs, and takes longer"
ifeq ($(TORCH),cpu)
	@tools/patiently "installing torch for CPUs: 200 MB" $(INSTALL) --torch-backend cpu --no-deps torch
endif
	@touch $@

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@tools/patiently "installing minisgl into $(VENV)" $(INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@tools/patiently "installing minisgl and what its tests need into $(VENV)" $(INSTALL) -e '.[dev]'
	@touch $(CORE) $@

$(BROWSER): pyproject.toml constraints.txt
	@tools/patiently "installing what drives a browser" $(INSTALL) -e '.[dev,browser]'
	@touch $(CORE) $(DEV) $@

$(DOCS): pyproject.toml constraints.txt | $(CORE)
	@tools/patiently "installing what the site is built with" $(INSTALL) -e '.[docs]'
	@touch $@

$(CLIENTS): pyproject.toml constraints.txt $(APART) | $(BIN)/python
	@tools/patiently "installing the clients of the tests" $(INSTALL) -e '.[dev,clients]'
	rm -rf $(VENV)/apart
	set -e; for list in $(APART); do \
	    tools/patiently "installing those of $$list" tools/install $(BIN)/python --no-deps \
	        --target $(VENV)/apart/$$(basename $$list .txt) -r $$list; \
	done
	@touch $(CORE) $(DEV) $@

serve: $(CORE)  ## Serve the OpenAI-compatible API on 127.0.0.1:1919
	$(BIN)/python -m minisgl serve $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--port '$(PORT)') $(ARGS)

chat: $(CORE)  ## Chat in the terminal
	$(BIN)/python -m minisgl chat $(if $(MODEL),--model '$(MODEL)') $(ARGS)

doctor: $(CORE)  ## Check this machine: one table, and how to mend what fails
	$(BIN)/python -m minisgl doctor $(ARGS)

bench: $(CORE)  ## Measure the engine in this process; for a running server: minisgl bench serve
	$(BIN)/python -m minisgl bench offline $(ARGS)

TESTS ?= tests/unit tests/integration tests/gpu tests/e2e
# More workers than two cores: much of what they do is waiting for servers. In which order: tests/order.py.
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile
test: $(DEV)  ## Run the tests: units, integration, end to end
	$(PYTEST) $(TESTS) $(ARGS)

test-all: $(CLIENTS) $(BROWSER)  ## Run all tests but those of clusters in one go
	$(PYTEST) $(TESTS) tests/faults tests/soak tests/clients tests/browser $(ARGS)

test-clients: $(CLIENTS)  ## Run the tests with the programs that people call the server with
	$(PYTEST) tests/clients $(ARGS)

test-faults: $(DEV)  ## Run the tests of what fails: workers, clients, memory, time; and everything at once
	$(PYTEST) tests/faults tests/soak $(ARGS)

test-cluster: $(DEV)  ## Run the tests of several replicas, on a real Ray
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/cluster $(ARGS)

test-browser: $(BROWSER)  ## Run the tests of the page, in Chromium
	$(PYTEST) tests/browser $(ARGS)

page:  ## Make the page of its sources in page/ (needs node 20)
	npm ci --prefix page && npm run build --prefix page

wheel: $(DEV)  ## Build the wheel, install it elsewhere, and chat with what is in it
	$(BIN)/python tools/check_wheel.py

soak: $(CLIENTS)  ## Half an hour of everything at once against one server (for a nightly run)
	MINISGL_SOAK_SECONDS=$${MINISGL_SOAK_SECONDS:-1800} $(BIN)/python -m pytest -s tests/soak $(ARGS)

SANITIZE := c++ -std=gnu++20 -O1 -g -march=native -pthread -fno-sanitize-recover=all -Ipython/minisgl/kernel/csrc/include \
    python/minisgl/kernel/csrc/src/cpu.cc tests/native/cpu_kernels.cc
sanitize:  ## Run the CPU kernels under the sanitizers of addresses, undefined behaviour and threads (for a nightly run)
	@mkdir -p build
	$(SANITIZE) -fsanitize=address,undefined -o build/kernels-address && build/kernels-address
	$(SANITIZE) -fsanitize=thread -o build/kernels-thread && build/kernels-thread

lint: $(DEV)  ## Check format, style, types, layers and size
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_size.py

format: $(DEV)  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV)  ## Check that every file and link that the documents name exists
	$(BIN)/python tools/check_docs.py

links: $(DEV)  ## Ask each address that the documents link to (for a nightly run, with a network)
	$(BIN)/python tools/check_links.py

build/mermaid.min.js: tools/mermaid.py | $(CORE)
	$(BIN)/python tools/mermaid.py $@

docs-site: $(DOCS) build/mermaid.min.js  ## Build the documentation site, strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

audit: $(DEV)  ## Scan what the server needs for published weaknesses; says so where nothing can be scanned
	$(BIN)/python tools/audit.py $(ARGS)

clean:  ## Remove .venv and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis python/*.egg-info
