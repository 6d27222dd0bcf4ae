# make demo | test | test-fast | test-backends | test-cuda | soak | lint | format | clean
# Needs a C++ compiler, make, Python 3.10 or later with venv; everything else is installed into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# The installation is editable: only what goes into libllama, or names a dependency, makes it stale.
NATIVE := pyproject.toml CMakeLists.txt $(wildcard cmake/*.* native/*.cpp native/*.h patches/*) native patches
# Building without isolation, in .venv, keeps include paths and so the compiled objects between builds. The build
# requirements are the strings of pyproject.toml's first table; jieba, which has no wheel, is built with setuptools.
BUILD_REQUIRES = $(shell sed -n '/^\[build-system\]/,/^]/s/^ *\("[^"]*"\),$$/\1/p' pyproject.toml) cmake ninja \
  "setuptools>=70.1"

.PHONY: demo test test-fast test-backends test-cuda soak lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo
	@$(BIN)/adaskip-cpp demo

# Tiny models compute on one thread each, so two tests run side by side; real models have the machine for themselves.
test: test-fast
	@$(BIN)/python -m pytest -m "model or slow"

test-fast: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n 2 -m "not model and not slow"

# Needs Vulkan's headers, a shader compiler and a device (Debian: libvulkan-dev glslc spirv-headers, and in software
# mesa-vulkan-drivers, which ggml uses when told to). llama-cpp-python with its shaders compiles for 10 minutes on 2 cores.
test-backends: $(VENV)-backends/installed
	@GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES:-0} \
	  $(VENV)-backends/bin/python -m pytest -n 2 tests/test_backends.py

# Needs CUDA's toolkit, but no device: ggml is compiled for CUDA, and our libllama, beside it, runs on the CPU; where there
# is a device, on that too. CUDA says how: for one architecture, on a machine without a driver with -DGGML_CUDA_NO_VMM=ON,
# for which no libcuda.so.1 is needed, and in less time with -DGGML_CUDA_FA=OFF. It compiles for an hour on 2 cores.
CUDA ?= -DCMAKE_CUDA_ARCHITECTURES=86
test-cuda: $(VENV)-cuda/installed
	@$(VENV)-cuda/bin/python -c 'import adaskip_cpp, llama_cpp; info = llama_cpp.llama_print_system_info().decode(); \
	  print(f"{info}\nhas a device: {llama_cpp.llama_supports_gpu_offload()}"); exit("CUDA : " not in info)'
	@$(VENV)-cuda/bin/python -m pytest -n 2 tests/test_skip.py tests/test_backends.py

# Drawn sequences of calls on models that stay open, with the process's memory at the end; any number of operations.
soak: $(VENV)/installed-dev
	@$(BIN)/python tests/soak.py --operations $(or $(OPERATIONS),100000) $(if $(SEED),--seed $(SEED))

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(wildcard native/*.cpp native/*.h)

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard native/*.cpp native/*.h)

clean:
	rm -rf $(VENV) $(VENV)-backends $(VENV)-cuda build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/installed-%: $(VENV)/build-tools $(NATIVE)
	$(PIP) install --quiet --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)-backends/installed: $(VENV)/build-tools $(NATIVE)
	@$(PYTHON) -m venv $(VENV)-backends
	@# pip would keep what it built, and take it for a llama-cpp-python of any kind.
	CMAKE_ARGS="-DGGML_VULKAN=ON" $(VENV)-backends/bin/pip install --quiet --no-cache-dir --no-binary llama-cpp-python \
	  $(BUILD_REQUIRES)
	$(VENV)-backends/bin/pip install --quiet --no-build-isolation -C build-dir=build/backends --editable '.[dev]'
	@touch $@

$(VENV)-cuda/installed: $(VENV)/build-tools $(NATIVE)
	@$(PYTHON) -m venv $(VENV)-cuda
	CMAKE_ARGS="-DGGML_CUDA=ON $(CUDA)" $(VENV)-cuda/bin/pip install --quiet --no-cache-dir --no-binary llama-cpp-python \
	  $(BUILD_REQUIRES)
	$(VENV)-cuda/bin/pip install --quiet --no-build-isolation -C build-dir=build/cuda --editable '.[dev]'
	@touch $@

$(VENV)/build-tools: pyproject.toml
	@for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit 0; done; \
	  echo "make: no C++ compiler found; install one (Debian: apt install g++, macOS: xcode-select --install)." >&2; exit 1
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is not Python 3.10 or later; name one: make PYTHON=python3.12." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot create $(VENV); install its venv module (Debian: apt install python3-venv)." >&2; exit 1; }
	@echo "Installing the build tools; llama-cpp-python compiles for about 4 minutes when pip has no wheel of it yet."
	$(PIP) install --quiet $(BUILD_REQUIRES)
	@touch $@
