# Everything happens inside .venv, which `setup` makes. Works with GNU make 3.81, which macOS has.
#   make lab ARGS="--no-browser --port=9999"      more arguments for JupyterLab
#   make test ARGS="-k chunks"                    more arguments for pytest
#   make setup PYTHON=/path/to/python3.12         another Python than the first one that fits

PYTHON ?=
ARGS   ?=

BIN := .venv/bin
# Any Python can start the set-up, which then looks for one that is new enough.
ANY_PYTHON := $(or $(PYTHON),$(shell for p in python3 python python3.13 python3.12 python3.11; do \
	$$p -c '' 2>/dev/null && echo $$p && break; done),python3)

# Jupyter refuses to run as root unless told; without a screen there is no browser to open, only a URL to print.
LAB_FLAGS := $(shell [ "$$(id -u)" != 0 ] || echo --allow-root) \
	$(shell [ "$$(uname)" != Linux ] || [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || echo --no-browser)

.DEFAULT_GOAL := help
.PHONY: help setup lab check quick test soak bench browser binder lint format notebooks pins clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Create or refresh .venv (quick when nothing changed)
	@$(ANY_PYTHON) tools/setup_environment.py $(if $(PYTHON),--python "$(PYTHON)")

# On loopback only, with Jupyter's token. The notebook is given as the default URL, not as an argument, so that the
# printed URL opens it too. PATH and the preference keep `!pip` and the kernel inside .venv; exec lets Jupyter itself get
# the signal when somebody ends make.
lab: setup ## Open the first notebook in JupyterLab
	@exec env PATH="$(CURDIR)/$(BIN):$$PATH" JUPYTER_PREFER_ENV_PATH=1 \
		$(BIN)/python -m jupyterlab --ip=127.0.0.1 $(LAB_FLAGS) \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

check: setup ## Check style and types, and run the tests that need no cluster, browser or notebook
	@$(MAKE) --no-print-directory -j2 lint quick

quick: setup
	@$(BIN)/python tools/run_tests.py --quick $(ARGS)

test: setup ## Check style and types, then run all tests
	@$(MAKE) --no-print-directory -j2 browser lint
	@$(BIN)/python tools/run_tests.py $(ARGS)

soak: setup ## Let 200 random faults happen to real runs (ARGS: --faults 50 --seed 1)
	@$(BIN)/python -m tests.soak $(ARGS)

bench: setup ## Time parakit against its rivals, and what else it costs (ARGS: --quick, --markdown FILE)
	@$(BIN)/python -m tests.benchmarks $(ARGS)

browser: setup
	@$(BIN)/python tools/browser.py

binder: setup ## Try the Binder configuration in a clean virtual environment
	@$(BIN)/python -m tests.binder_startup

lint: setup ## Check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: setup ## Put the code into the common format
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

notebooks: setup ## Execute the notebooks in place, ready to commit (ARGS: some of them)
	@$(BIN)/python tools/execute_notebooks.py $(ARGS)

pins: setup ## Renew the requirements.txt here and in binder/ with the newest versions
	@$(BIN)/python tools/pin_requirements.py

clean: ## Remove .venv and all caches
	rm -rf .venv dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
