# make demo | test | test-fast | test-native | test-rpc | test-vulkan | test-cuda | test-asan | test-tsan |
# test-libraries | nightly | soak | fuzz | wheels | docs | lint | format | clean
# Needs a C++ compiler, make, Python 3.10 or later with venv; everything else is installed into .venv.

PYTHON ?= python3
# An older release (make test-fast LLAMA_CPP_PYTHON=0.3.33) or another ggml (make test-fast GGML=rpc) has an environment
# and build folders of its own. The targets test-rpc, test-vulkan and test-cuda set GGML themselves.
GGML   ?= $(firstword $(patsubst test-%,%,$(filter test-rpc test-vulkan test-cuda,$(MAKECMDGOALS))))
VENV   := .venv$(if $(LLAMA_CPP_PYTHON),-$(LLAMA_CPP_PYTHON))$(if $(GGML),-$(GGML))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
BUILD   = build/$(1:.venv-%=%)# of an environment; pyproject.toml names that of .venv

# The installation is editable, so only changes of libllama's sources and of dependencies install it again.
NATIVE := pyproject.toml CMakeLists.txt $(wildcard cmake/*.* native/*.cpp native/*.h patches/*) native patches
# A build without isolation, in .venv, keeps its include paths, and so its compiled objects for the next build. Its
# requirements are the strings of pyproject.toml's first table, and one release (the newest by default).
RELEASES       = $(shell sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' cmake/releases.txt)
BUILD_REQUIRES = $(shell sed -n '/^\[build-system\]/,/^]/s/^ *\("[^"]*"\),$$/\1/p' pyproject.toml) cmake ninja \
  llama-cpp-python==$(or $(LLAMA_CPP_PYTHON),$(firstword $(RELEASES)))

SANITIZERS_asan := ADDRESS UNDEFINED
SANITIZERS_tsan := THREAD
# pytest's own handler of crashes would replace the sanitizer's. LeakSanitizer cannot see pointers in Python's memory
# pools.
define sanitized
@rm -f $(call BUILD,$(VENV)-$(1))/report.*
@options=log_path=$(CURDIR)/$(call BUILD,$(VENV)-$(1))/report; status=0; \
  LD_PRELOAD="$$(gcc -print-file-name=$(2)) $$(gcc -print-file-name=libstdc++.so)" \
  PYTHONMALLOC=malloc ASAN_OPTIONS=$$options UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  LSAN_OPTIONS=suppressions=$(CURDIR)/tests/faults/leaks.supp:print_suppressions=0 \
  TSAN_OPTIONS=$$options:ignore_noninstrumented_modules=1:suppressions=$(CURDIR)/tests/faults/races.supp \
  $(VENV)-$(1)/bin/python -m pytest -p no:faulthandler --capture=sys $(3) || status=1; \
  cat $(call BUILD,$(VENV)-$(1))/report.* 2>/dev/null && status=1; exit $$status
endef

.PHONY: demo test test-fast test-native test-rpc test-vulkan test-cuda test-asan test-tsan test-libraries nightly soak fuzz wheels docs lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo
	@$(BIN)/adaskip-cpp demo

# Tiny models compute on one thread each, so two tests run side by side. Real models need the whole machine. Each process
# begins with one half of the files, so that most fixtures of files are made once.
SIDE_BY_SIDE = -n 2 --dist worksteal
test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not model"
	@$(BIN)/python -m pytest -m model

test-fast: $(VENV)/installed-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not model and not slow"

# Tests of native/ alone: everything that another release of llama-cpp-python can change. Its environment has no more
# packages than these tests need.
test-native: $(VENV)/installed-$(if $(LLAMA_CPP_PYTHON),test-native,dev)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not model and not slow" tests/native \
	  $(addprefix tests/engine/,test_library.py test_behaviour.py test_embedding.py)

# Runs on two rpc-servers of this machine. ggml sees them as devices, so layers are divided between them.
GGML_rpc := -DGGML_RPC=ON
test-rpc: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n 2 --rpc-servers=2 tests/native/test_backends.py

# Needs Vulkan's headers, a shader compiler and a device (Debian: libvulkan-dev glslc spirv-headers, and
# mesa-vulkan-drivers for a software device, which is number 0). llama-cpp-python with its shaders compiles for 10
# minutes on 2 cores.
GGML_vulkan := -DGGML_VULKAN=ON
test-vulkan: $(VENV)/installed-dev
	@GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest -n 2 tests/native/test_backends.py

# Needs CUDA's toolkit, but no device: ggml is compiled for CUDA, and the tests run on the CPU, and on a device if there is
# one. CUDA has the options: the architecture, and without a driver -DGGML_CUDA_NO_VMM=ON, which needs no libcuda.so.1.
# 86-virtual (PTX alone) with -DGGML_CUDA_FA=OFF compiles fastest: half an hour on 2 cores.
CUDA ?= -DCMAKE_CUDA_ARCHITECTURES=86
GGML_cuda = -DGGML_CUDA=ON $(CUDA)
test-cuda: $(VENV)/installed-dev
	@$(BIN)/python -c 'import adaskip_cpp, llama_cpp; info = llama_cpp.llama_print_system_info().decode(); \
	  print(f"{info}\nhas a device: {llama_cpp.llama_supports_gpu_offload()}"); exit("CUDA : " not in info)'
	@$(BIN)/python -m pytest -n 2 tests/native/test_skip.py tests/native/test_backends.py

# Need gcc, and its runtimes must be loaded before Python. Only libllama is instrumented, so errors in ggml are not found.
# Reports are files, because llama-cpp-python closes stderr at times. UndefinedBehaviorSanitizer cannot write a file beside
# AddressSanitizer. It ends the process instead, and --capture=sys lets its output through. All tests run in one process,
# because pytest-xdist's processes end without a search for leaks.
test-asan: $(VENV)-asan/installed
	$(call sanitized,asan,libasan.so,tests/native -m "not model and not slow")

test-tsan: $(VENV)-tsan/installed
	$(call sanitized,tsan,libtsan.so,tests/native/test_threads.py)

# Libraries that take a llama_cpp.Llama or open one, at the releases that docs/libraries.md names, and lm-eval, a client of
# the server. Those that require llama-cpp-python are installed without what they require, so that it stays as it is.
LIBRARIES       := guidance==0.3.1 instructor==1.17.0 langchain-community==0.4.2 outlines==1.3.3 "llama-index-core<0.15" \
  "lm-eval[api]==0.4.13"
LIBRARIES_ALONE := llama-index-llms-llama-cpp==0.7.0 llm-gguf==0.2
test-libraries: $(VENV)-libraries/installed
	@$(VENV)-libraries/bin/python -m pytest tests/libraries tests/serving/test_clients.py

# The random tests of `make test`, for hours instead of seconds: sequences of calls, Ctrl-C, processes that die. The
# tests of Vulkan too, if there is a shader compiler.
nightly: $(VENV)/installed-dev test-libraries
	@$(BIN)/python -m pytest -n 2 --sequences-seconds=600 tests/native/test_sequences.py tests/native/test_several_sequences.py
	@$(BIN)/python -m pytest --sigint-trials=1000 tests/faults/test_interrupts.py
	@for i in $$(seq 30); do $(BIN)/python -m pytest tests/serving/test_server_load.py || exit 1; done
	@if command -v glslc >/dev/null; then $(MAKE) --no-print-directory test-vulkan GGML=vulkan; else echo "No glslc: no test-vulkan."; fi

# Random sequences of calls on models that stay open, OPERATIONS calls in all. Shows the process's memory at the end.
soak: $(VENV)/installed-dev
	@PYTHONPATH=tests $(BIN)/python tests/faults/soak.py --operations $(or $(OPERATIONS),100000) $(if $(SEED),--seed $(SEED))

# make fuzz TARGET=plan SECONDS=600, all targets by default. build/fuzz keeps the corpus and the findings of each target.
fuzz: $(VENV)/installed-dev $(VENV)/atheris
	@for target in $(or $(TARGET),$(sort $(notdir $(wildcard tests/faults/seeds/*)))); do \
	  found=build/fuzz/$$target; mkdir -p $$found/corpus; \
	  PYTHONPATH=tests $(BIN)/python tests/faults/fuzz.py $$target -max_total_time=$(or $(SECONDS),600) -max_len=20000 \
	    -timeout=150 -rss_limit_mb=0 -keep_seed=1 -artifact_prefix=$$found/ $$found/corpus tests/faults/seeds/$$target || exit 1; \
	done

# Wheels of all platforms into dist/, compiled by zig on Linux, each with tests/installation/native_smoke.c in build/wheels. A platform
# takes 6 minutes of CPU time. make wheel-macosx_11_0_arm64 builds one. ZIG_<tag> is zig's name of the platform.
ZIG_manylinux_2_17_x86_64  := x86_64-linux-gnu.2.17
ZIG_manylinux_2_17_aarch64 := aarch64-linux-gnu.2.17
ZIG_macosx_11_0_arm64      := aarch64-macos.11.0
ZIG_macosx_10_15_x86_64    := x86_64-macos.10.15
ZIG_win_amd64              := x86_64-windows-gnu
wheels:
	@failed=; for tag in $(patsubst ZIG_%,%,$(sort $(filter ZIG_%,$(.VARIABLES)))); do \
	  $(MAKE) --no-print-directory wheel-$$tag || failed="$$failed $$tag"; \
	done; [ -z "$$failed" ] || \
	  { echo "make: no wheel of$$failed; on a machine of that platform, pip wheel --no-deps . builds one." >&2; exit 1; }

wheel-%: $(VENV)-wheels/installed
	@rm -f dist/adaskip_cpp-*-py3-none-$*.whl
	_PYTHON_HOST_PLATFORM=$* $(VENV)-wheels/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist \
	  -C build-dir=$(call BUILD,$(VENV)-wheels)/$* -C cmake.define.CMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/zig.cmake \
	  -C cmake.define.ZIG=$(CURDIR)/$(VENV)-wheels/bin/zig -C cmake.define.ZIG_TARGET=$(ZIG_$*) .
	@$(VENV)-wheels/bin/cmake --build $(call BUILD,$(VENV)-wheels)/$* --target native_smoke
	@$(VENV)-wheels/bin/python -m pytest --noconftest -k $* tests/installation/test_wheels.py

# The user documentation, with an API reference from the docstrings, into build/site. Its environment has no native code.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md docs examples cmake/releases.txt
docs: .venv-docs/installed
	@mkdir -p build/pages/cmake
	@for page in $(PAGES); do ln -sfn $(CURDIR)/$$page build/pages/$$page; done
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(wildcard native/*.cpp native/*.h)

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard native/*.cpp native/*.h)

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/installed-%: $(VENV)/build-tools $(NATIVE)
	$(PIP) install --quiet --no-build-isolation $(if $(VENV:.venv=),-C build-dir=$(call BUILD,$(VENV))) \
	  --editable '.[$*]'
	@touch $@

$(VENV)/atheris: $(VENV)/build-tools
	$(PIP) install --quiet "atheris>=2.2"
	@touch $@

# Environments with another libllama, and all other packages from $(VENV).
$(VENV)-asan/installed $(VENV)-tsan/installed: $(VENV)-%/installed: $(VENV)/installed-dev
	@$(BIN)/python -m venv --without-pip $(VENV)-$*
	@$(BIN)/python -c 'import site, sysconfig as s; \
	  open(s.get_path("purelib", vars={"base": "$(VENV)-$*"}) + "/rest.pth", "w").write(site.getsitepackages()[0])'
	CC=gcc CXX=g++ CXXFLAGS=-D_GLIBCXX_ASSERTIONS $(PIP) --python $(VENV)-$*/bin/python install --quiet --no-deps \
	  --no-build-isolation -C build-dir=$(call BUILD,$(VENV)-$*) -C cmake.build-type=Debug \
	  $(foreach name,$(SANITIZERS_$*),-C cmake.define.LLAMA_SANITIZE_$(name)=ON) --editable .
	@touch $@

# Beside everything from $(VENV), whose .pth files name our own sources.
$(VENV)-libraries/installed: $(VENV)/installed-dev
	@$(PYTHON) -m venv $(VENV)-libraries
	@$(BIN)/python -c 'import site, sysconfig as s; open(s.get_path("purelib", vars={"base": "$(VENV)-libraries"}) \
	  + "/rest.pth", "w").write(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")'
	$(VENV)-libraries/bin/pip --disable-pip-version-check install --quiet $(LIBRARIES)
	$(VENV)-libraries/bin/pip --disable-pip-version-check install --quiet --no-deps $(LIBRARIES_ALONE)
	@touch $@

$(VENV)-wheels/installed: $(VENV)/build-tools
	@$(PYTHON) -m venv $(VENV)-wheels
	$(VENV)-wheels/bin/pip install --quiet $(BUILD_REQUIRES) "ziglang==0.17.1" "lief>=1,<2" "pytest>=8"
	@ln -sf "$$($(VENV)-wheels/bin/python -c 'import ziglang; print(ziglang.__path__[0])')/zig" $(VENV)-wheels/bin/zig
	@touch $@

.venv-docs/installed: pyproject.toml
	@$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --upgrade "pip>=25.1"
	.venv-docs/bin/pip install --quiet --group docs
	@touch $@

# Another ggml needs --no-cache-dir: pip would use a cached llama-cpp-python, whatever its ggml.
$(VENV)/build-tools: pyproject.toml cmake/releases.txt
	@for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit 0; done; \
	  echo "make: no C++ compiler found; install one (Debian: apt install g++, macOS: xcode-select --install)." >&2; exit 1
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; name another Python: make PYTHON=python3.12." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot create $(VENV); install its venv module (Debian: apt install python3-venv)." >&2; exit 1; }
	@echo "Installing the build tools; llama-cpp-python compiles for about 4 minutes when pip has no wheel of it yet."
	CMAKE_ARGS="$$CMAKE_ARGS -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/cmake/lean.cmake $(GGML_$(GGML))" $(PIP) install \
	  --quiet $(if $(GGML),--no-cache-dir --no-binary llama-cpp-python) $(BUILD_REQUIRES)
	@touch $@
