# `make bench` and `make test` do all the set-up. VENV= (empty) takes PYTHON as it is and installs nothing.
PYTHON  ?= python3
VENV    ?= .venv
RESULTS ?= benchmarks/results
# Of make gpu: for all parts together; some of them alone (a,b); BUILD=0 loads what make gpu-bundle has built.
MINUTES ?= 8
PARTS   ?=
BUILD   ?= 1
# Interpreters that make compat and make gpu-bundle look at first; they need Python 3.12 and 3.13.
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

.PHONY: help build test compat bench gmm kernels gpu gpu-bundle lint format clean
.PHONY: $(if $(wildcard pixnorm/_C.*),,$(BUILT))  # with no extension there, the stamp is wrong

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=$(PYTHON)  VENV=$(VENV) (empty: use PYTHON as it is)  RESULTS=$(RESULTS)"

build: $(BUILT)  ## compile the kernels, where they have changed

test: build  ## run the tests
	$(PY) -m pytest tests

compat:  ## build and test with the oldest and the newest PyTorch that pixnorm is for; each has a venv in build/compat
	$(PYTHON) -m compat $(addprefix --python ,$(PYTHONS))

bench: build  ## run the benchmarks; tables, plots and raw numbers go to RESULTS
	$(PY) -m benchmarks --results $(RESULTS)

gmm: build  ## train the GConv paper's toy, eight Gaussians, with plain and generative layers
	$(PY) -m benchmarks.paper.gmm --results $(RESULTS)

kernels: $(READY)  ## compile the kernels for GPUs (none needed) and check what their machine code says
	$(PY) -m benchmarks.kernels

gpu: $(READY)  ## on a machine with a GPU: build, test and measure there; results go to RESULTS
	$(PY) -m benchmarks.gpu --results $(RESULTS) --minutes $(MINUTES) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(filter 0,$(BUILD)),--no-build)

gpu-bundle:  ## build for the stack of the GPU machines, without a GPU, what make gpu BUILD=0 loads there
	$(PYTHON) -m benchmarks.gpu.bundle make

CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
CXX_TESTS = $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

lint: $(READY)  ## check the style of all code
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES) $(CXX_TESTS)

format: $(READY)  ## put all code in that style
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(CXX_FILES) $(CXX_TESTS)

clean:  ## remove what was built (not VENV)
	rm -rf build *.egg-info pixnorm/*.so

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "pixnorm needs Python 3.10 or newer, and $(PYTHON) is not: name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module: install it, or name a Python that has torch with VENV= PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements.txt
	PIXNORM_BUILD=0 $(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $@

$(BUILT): $(READY) setup.py $(CXX_FILES)
	PIXNORM_BUILD=1 $(PY) setup.py build_ext --inplace
	@touch $@
