# The course's commands; `make` alone lists them. Each builds what it needs into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
BASE := $(VENV)/base.stamp
DEV := $(VENV)/dev.stamp
RAY := $(VENV)/ray.stamp
# Tests run in two processes; one thread each, unless told otherwise.
WORKERS ?= 2
NBVAL := --nbval --nbval-sanitize-with tools/nbval.cfg --nbval-cell-timeout 60 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check fuzz faults sync plain lab bench train student clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(BASE) ## the shipped model captions a picture and writes demo.png
	@$(BIN)/python -m paligemma.inference --prompt "caption en" \
		--image_file_path paligemma/assets/pictures/scene.png --output demo.png

test: $(DEV) $(RAY) ## everything that CI checks: style, freshness, tests, every notebook run
	@export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; start=$$(date +%s); failed=""; \
	step() { echo "== $$1"; shift; "$$@" || failed="$$failed '$$*'"; }; \
	step "style" $(BIN)/ruff check --quiet .; \
	step "format" $(BIN)/ruff format --quiet --check .; \
	step "types" $(BIN)/pyright --pythonpath $(BIN)/python; \
	step "freshness" $(BIN)/python tools/sync.py --check; \
	step "tests" $(BIN)/python -m pytest -q -n $(WORKERS) tests; \
	step "notebooks" $(BIN)/python -m pytest -q -n $(WORKERS) $(NBVAL) notebooks; \
	seconds=$$(( $$(date +%s) - start )); \
	if [ -n "$$failed" ]; then echo "FAILED after $$seconds s:$$failed"; exit 1; fi; \
	echo "All passed in $$seconds s."

check: $(DEV) ## fast: style, types, and notebooks = pairs = modules
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/python tools/sync.py --check

fuzz: $(DEV) ## minutes: 10,400 hostile files, texts and arguments; a table of what became of them
	@$(BIN)/python tests/fuzz/run.py --output tests/fuzz/table.json

faults: $(DEV) ## minutes: saves and trainings killed, starved and locked out; a table of what survived
	@$(BIN)/python tests/faults/run.py --output tests/faults/table.json

sync: $(DEV) ## bring notebooks, pairs, modules and the README's table into step
	@$(BIN)/python tools/sync.py

plain: $(DEV) ## every notebook run without this processor's vector instructions
	@cache=$$(mktemp -d); trap 'rm -rf $$cache' EXIT; \
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default TORCHINDUCTOR_CACHE_DIR=$$cache \
	$(BIN)/python -m pytest -q -n $(WORKERS) $(NBVAL) --nbval-cell-timeout 300 notebooks

lab: $(DEV) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=.

bench: $(DEV) ## time the shipped model beside transformers
	@$(BIN)/python tools/bench.py --dtype float32 --quantize

train: $(DEV) ## train the shipped model again; Ctrl-C and the same command go on
	@$(BIN)/torchrun --standalone --nproc-per-node 2 tools/train_tiny.py \
		--config paligemma/assets/tiny/recipe.json --work runs/tiny

student: $(DEV) ## the lessons without solutions, in student/
	@$(BIN)/jupyter nbconvert --log-level WARN --to notebook --output-dir student \
		--TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_cell_tags solution notebooks/*.ipynb
	@cp -r notebooks/reference student/
	@echo "student/ holds the lessons with stubs, checks and hints."

clean: ## remove what these commands wrote, but not .venv
	@rm -rf demo.png student build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find paligemma tests tools notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: install Python 3.10 or newer, \
	or say where it is: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is \
	$$($(PYTHON) --version), this needs 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making the environment in $(VENV) (once; torch is large) ..."
	@$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) --editable ".[dev,reference]"
	@touch $(BASE) $@

# Half a gigabyte more, for one test: the other commands do without.
$(RAY): pyproject.toml constraints.txt | $(DEV)
	@$(PIP) --editable ".[dev,reference,distributed]"
	@touch $@
