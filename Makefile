# One word a task. Each makes and reuses .venv by itself; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A module is compiled when it is first imported, and kept: most of torch's never are, and to compile all of them is a
# third of what an installation computes.
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=

# Freed memory is kept for the next tensor (returning and asking for it again is a tenth of the suite's time).
KEEP := MALLOC_TRIM_THRESHOLD_=536870912 MALLOC_MMAP_THRESHOLD_=536870912

.PHONY: demo test test-typed test-device test-slow fuzz lint bench recipes notebooks docs crosscheck wild browser outgoing clean

demo: $(VENV)/.base  ## train, attack and report on embedded real digits; prints the report's path
	$(BIN)/robustmoe demo

test: $(VENV)/.dev  ## the whole test suite, two processes of one thread; shapes checked in the first call of each function in a test
	$(KEEP) $(BIN)/python -m pytest -n 2 --dist worksteal

test-typed: $(VENV)/.dev  ## the same with the shapes of every call checked
	$(KEEP) $(BIN)/python -m pytest -n 2 --dist worksteal --check-every-call

test-device: $(VENV)/.dev  ## what a GPU has to give as the CPU does, on every CUDA device there is; skipped where there is none
	$(BIN)/python -m pytest -m device tests/test_device.py

test-slow: $(VENV)/.dev  ## claims about training, means over several seeds: minutes
	$(BIN)/python -m pytest -m slow

# make fuzz SCALE=10: ten times as many cases.
SCALE ?= 1

fuzz: $(VENV)/.dev  ## 1,900 spoilt files, specs, flags and arrays, each in its own process: one line or taken; minutes
	$(BIN)/python tests/fuzz --scale $(SCALE)

lint: $(VENV)/.dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.base  ## speed, as ratios measured interleaved in one run
	$(BIN)/python benchmarks/speed.py  # each lever beside the work without it; peers where `make crosscheck` has installed them
	$(BIN)/python benchmarks/suites.py  # AutoAttack beside its peer, where it is installed
	$(BIN)/python benchmarks/steps.py  # training steps, each way in its own process
	$(BIN)/python benchmarks/aims.py  # one table of it all, beside what was aimed at
	$(BIN)/python benchmarks/sparse_dispatch.py
	$(BIN)/python benchmarks/pathway_inference.py --repeats 5 --steps 0
	$(BIN)/python benchmarks/ensemble_step.py --width 16 --batch 32 --steps 2 --memory  # small; the issue's size: no flags

recipes: $(VENV)/.dev  ## two training steps of every distinct recipe, its networks at true size (tiny: `make test`)
	$(KEEP) $(BIN)/python -m pytest -n 2 --dist worksteal -m recipes tests/test_recipes_vit_moe.py tests/test_recipes_dual.py tests/test_recipes_advmoe.py tests/test_recipes_series.py tests/test_pages.py

notebooks: $(VENV)/.dev  ## the notebooks, and blocks of code in the docs that take seconds each (the others: `make test`)
	$(INSTALL) -e '.[notebooks]'
	$(KEEP) $(BIN)/python -m pytest -n 2 --dist worksteal -m notebooks tests/test_notebooks.py tests/test_blocks.py

docs: $(VENV)/.dev  ## the documentation site, site/index.html; a dead link or a page left out is an error
	$(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # not --quiet: it would not see the warnings that --strict counts
	! grep -rlE '<(script|link|img)[^>]* (src|href)="?https?:' site --include='*.html'  # nothing is loaded from the network

crosscheck: $(VENV)/.dev  ## our models and attacks against pyautoattack, foolbox and torchattacks; ONNX graphs against torch; figures as PNG and PDF
	$(INSTALL) -e '.[crosscheck,onnx,figures]'
	$(INSTALL) --no-deps torchattacks==3.5.1
	$(BIN)/python -m pytest -m crosscheck

browser: $(VENV)/.dev  ## the report in Chromium or Chrome (which must be there): by pointer, by keys, printed, read by axe-core
	$(INSTALL) -e '.[browser]'
	$(BIN)/python -m pytest -m browser

wild: $(VENV)/.dev  ## wrapping the routed layers of real packages
	$(INSTALL) -e '.[wild]'
	$(INSTALL) --no-deps timm==1.0.31
	$(BIN)/python -m pytest -m wild

outgoing: $(VENV)/.dev  ## runs sent to TensorBoard, MLflow and Weights & Biases, read back by their own readers; runs on a stand-in of the hub
	$(INSTALL) -e '.[tensorboard,mlflow,wandb,hub]'
	$(BIN)/python -m pytest -m outgoing

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.base $@

clean:
	rm -rf $(VENV)
