# `make bench` and `make test` do all the set-up. VENV= (empty) uses PYTHON as it is and installs nothing.
PYTHON  ?= python3
VENV    ?= .venv
RESULTS ?= benchmarks/results
# For make gpu: time for all parts together; only these parts (a,b); BUILD=0 loads the build of make gpu-bundle.
MINUTES ?= 8
PARTS   ?=
BUILD   ?= 1
# Interpreters that make compat and make gpu-bundle try first; they need Python 3.12 and 3.13.
PYTHONS ?=

ifneq ($(VENV),)
BIN   := $(VENV)/bin/
PY    := $(BIN)python
READY := $(VENV)/.ready
# The build looks for ninja on the path.
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN):$(PATH)
else
PY := $(PYTHON)
endif
BUILT := build/$(subst /,-,$(PY)).built

.PHONY: help build test compat bench gmm masks train-demo kernels gpu gpu-bundle lint format clean
.PHONY: $(if $(wildcard pixnorm/_C.*),,$(BUILT))  # without an extension, the stamp is wrong

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=$(PYTHON)  VENV=$(VENV) (empty: use PYTHON as it is)  RESULTS=$(RESULTS)"

build: $(BUILT)  ## compile the kernels that have changed

test: build  ## run the tests
	$(PY) -m pytest tests

compat:  ## build and test with the oldest and the newest supported PyTorch, each in a venv in build/compat
	$(PYTHON) -m compat $(addprefix --python ,$(PYTHONS))

bench: build  ## run the benchmarks; tables, plots and raw numbers go to RESULTS
	$(PY) -m benchmarks --results $(RESULTS)

gmm: build  ## train the GConv paper's toy example, eight Gaussians, with plain and generative layers
	$(PY) -m benchmarks.paper.gmm --results $(RESULTS)

masks: build  ## train a small generator on digits for a minute, and draw the SPN paper's Fig. 2, its masks
	$(PY) -m benchmarks.paper.masks --results $(RESULTS)

train-demo: build  ## train small generators with each norm, fused and plain, in an hour; goes on where it was stopped
	$(PY) -m benchmarks.paper.training --results $(RESULTS)

kernels: $(READY)  ## compile the kernels for GPUs (none needed) and check their machine code
	$(PY) -m benchmarks.kernels

gpu: $(READY)  ## on a machine with a GPU: build, test and measure there; results go to RESULTS
	$(PY) -m benchmarks.gpu --results $(RESULTS) --minutes $(MINUTES) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(filter 0,$(BUILD)),--no-build)

gpu-bundle:  ## build without a GPU, for the GPU machines' versions; make gpu BUILD=0 loads it there
	$(PYTHON) -m benchmarks.gpu.bundle make

CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
CXX_TESTS = $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

lint: $(READY)  ## check the style of all code
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES) $(CXX_TESTS)

format: $(READY)  ## reformat all code
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(CXX_FILES) $(CXX_TESTS)

clean:  ## remove build products (not VENV)
	rm -rf build *.egg-info pixnorm/*.so

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "pixnorm needs Python 3.10 or newer, and $(PYTHON) is older or missing: set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module: install it, or use a Python that has torch: VENV= PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements.txt
	PIXNORM_BUILD=0 $(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $@

$(BUILT): $(READY) setup.py $(CXX_FILES)
	PIXNORM_BUILD=1 $(PY) setup.py build_ext --inplace
	@touch $@
