# Linux and macOS. The README gives the plain pip and python commands (Windows has no make).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-deps

.PHONY: setup lock docs site demo test test-browser check

setup: .venv/ready  ## make .venv with the pinned requirements

.venv/ready: requirements.lock requirements-cpu.lock requirements-cuda.lock requirements-demo.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "qalign needs Python 3.11 to 3.13: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "== installing the locked requirements into .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	@command -v nvidia-smi >/dev/null || $(PIP) --require-hashes -r requirements-cpu.lock 2>/dev/null || true
	$(PIP) --require-hashes -r requirements.lock
	@if $(BIN)/python -c 'import importlib.metadata as m; exit("nvidia" not in str(m.requires("torch")))'; then \
		echo "== installing what this build of PyTorch needs for CUDA (3 GB)"; $(PIP) --require-hashes -r requirements-cuda.lock; fi
	$(PIP) --require-hashes -r requirements-demo.txt
	$(PIP) --no-build-isolation -e .
	@touch $@

lock: setup  ## write the lock files anew, after a change of requirements.txt or requirements-gpu.txt
	$(BIN)/python .ci/lock.py

docs: setup  ## write the recipe's reference and its schema anew, after a change of a recipe key, and the version's pins
	$(BIN)/python docs/make_recipe.py
	$(BIN)/python docs/pin_version.py

site: setup  ## the documentation as a site, in site/; a link or an anchor that leads nowhere ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: setup  ## align the small embedded model, then show what changed (about 3 minutes on 2 CPU cores)
	@echo "== teaching SmolLM2-135M 200 dialogues into runs/demo/sft (an older demo run is replaced)"
	$(BIN)/python -m qalign.sft recipes/smollm2_demo.yaml --overwrite
	@echo "== aligning it with 96 preference pairs into runs/demo/dpo"
	$(BIN)/python -m qalign.dpo recipes/smollm2_demo.yaml --overwrite
	@echo "== comparing the base, the SFT model and the aligned model on 72 held-out pairs"
	$(BIN)/python -m qalign.evaluate recipes/smollm2_demo.yaml

test: setup  ## the fast tests
	@echo "== running the tests (those on the true SmolLM2 too: $(BIN)/python -m pytest -m true_model)"
	@command -v chromium >/dev/null && echo "== left out here: the page in a browser (make test-browser)" || \
		echo "== skipped: the page in a browser, as Chromium is missing (apt-get install chromium chromium-driver; make test-browser)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not true_model and not browser and not slow"

test-browser: setup  ## the page in headless Chromium (Debian's chromium and chromium-driver)
	export QALIGN_BROWSER=insist; $(BIN)/python -m pytest -m browser || \
		{ [ $$? -eq 1 ] && echo "== once more: those that failed" && $(BIN)/python -m pytest -m browser --last-failed; }

check: setup site  ## style, imports in one direction, types, the Dockerfile, links of all documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --project pyproject.toml
	$(BIN)/hadolint Dockerfile
