# `make demo` and `make test` do all of their own set-up, in .venv, and repeat only what has changed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
# On a machine with few cores, threads that spin at a barrier slow the others down.
export OMP_WAIT_POLICY := passive

OPERATOR_TESTS := $(addprefix tests/ops/test_,$(addsuffix .py,gate assign dense dispatch combine linear grouped_linear))
CMAKE := $(VENV)/bin/cmake -G Ninja -S . -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
	-DTOPN_GATING_TORCH="$$($(RUN) -c 'import torch; print(torch.__path__[0])')"

.PHONY: demo demo-distributed demo-transformers test test-models bench bench-layer router-bench lint kernels sanitize barriers mutants wheel install-check hub-check wheel-check cuda-check sass clean

demo: $(VENV)/built
	PYTHONPATH=. $(RUN) examples/language_model $(ARGS)

demo-distributed: $(VENV)/built
	PYTHONPATH=. OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc-per-node=2 examples/language_model \
		--steps=300 --out=demo-distributed.png $(ARGS)

demo-transformers: $(VENV)/built
	PYTHONPATH=. $(RUN) examples/transformers $(ARGS)

test: $(VENV)/built $(VENV)/kernels lint
	$(RUN) -m pytest -n auto --maxprocesses 8 $(ARGS)

# Every class of models of transformers with experts that take an implementation, whole and tiny.
test-models: $(VENV)/built
	$(RUN) -m pytest tests/models $(ARGS)

bench: $(VENV)/built
	PYTHONPATH=. $(RUN) benchmarks/peers $(ARGS)

bench-layer: $(VENV)/built
	PYTHONPATH=. $(RUN) benchmarks/layer $(ARGS)

# Times every kernel, without torch, and the machine's bandwidth. Needs Google Benchmark (Debian: libbenchmark-dev).
router-bench: $(VENV)/kernels
	$(VENV)/bin/cmake --build build/cmake --target router_bench
	build/cmake/benchmarks/router_bench $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# Builds the kernels without torch and compares the CUDA kernels, run on the host, with the CPU's.
kernels: $(VENV)/kernels
	$(VENV)/bin/ctest --test-dir build/cmake --parallel 2 --output-on-failure

# Runs the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, with the CPU kernels and with the CUDA kernels
# on the host, and the emulator's own tests under these and under ThreadSanitizer. `make barriers` runs the kernels under
# ThreadSanitizer.
sanitize: $(VENV)/installed
	$(CMAKE) -B build/address -DTOPN_GATING_SANITIZE=address
	$(VENV)/bin/cmake --build build/address --parallel 2 --target test_simt topn_gating_simt
	build/address/simt/test_simt
	CFLAGS="$(ADDRESS)" LDFLAGS="$(ADDRESS)" TOPN_GATING_CUDA=0 $(RUN) setup.py --quiet build \
		--build-base build/address/python --build-lib build/address/site
	cd build/address/site && LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
		TOPN_GATING_SIMT=$(abspath build/address/libtopn_gating_simt.so) TOPN_GATING_SIMT_SCHEDULES=1 \
		$(abspath $(RUN)) -m pytest -q -n 2 -k "not same_for_any_schedule and not 1024" \
		$(addprefix $(CURDIR)/,$(OPERATOR_TESTS))
	$(CMAKE) -B build/thread -DTOPN_GATING_SANITIZE=thread -DTOPN_GATING_TORCH=
	$(VENV)/bin/cmake --build build/thread --parallel 2 --target test_simt
	build/thread/simt/test_simt

ADDRESS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
PRELOAD := $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell gcc -print-file-name=$(library)))

# Tests the kernels under ThreadSanitizer, then leaves out each barrier of the CUDA kernels in turn: a test must fail.
barriers:
	$(PYTHON) tests/kernels/delete_barriers.py

# Changes single tokens of the kernels and of the package, which the tests must notice; ARGS="--count 200" is the full check.
mutants: $(VENV)/built $(VENV)/kernels
	$(RUN) tests/mutants.py $(ARGS)

# The source distribution, and a wheel that is built from it alone.
wheel: $(VENV)/installed
	rm -rf dist
	$(RUN) setup.py --quiet sdist
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz

# Installs the wheel as a user does and runs it from another folder.
install-check: wheel
	$(PIP) install --no-deps --upgrade --target build/site dist/*.whl
	cd build/site && PYTHONPATH=. ../../$(RUN) ../../tests/installed.py

# Lays out a repository for the Kernels Hub in build/hub and runs it, loaded from there, beside the package of this checkout.
HUB_NAMESPACE := _topn_gating_$(or $(shell git rev-parse --short=7 HEAD 2>/dev/null),local)
hub-check: $(VENV)/built
	TOPN_GATING_NAMESPACE=$(HUB_NAMESPACE) $(RUN) setup.py --quiet hub
	$(PIP) install --upgrade --target build/hub/site kernels==0.17.2
	PYTHONPATH=build/hub/site:. $(RUN) tests/from_hub.py build/hub

# Runs the wheel with other versions of torch, each in an environment of its own. The index may have old versions with CUDA alone,
# which are several gigabytes.
TORCHES := 2.10.0 2.13.0
wheel-check: wheel
	for torch in $(TORCHES); do \
		rm -rf build/wheel && $(PYTHON) -m venv build/wheel && \
		build/wheel/bin/python -m pip --disable-pip-version-check --quiet install torch==$$torch numpy dist/*.whl && \
		(cd build/wheel && bin/python ../../tests/installed.py) || exit 1; \
	done

# Compiles, links and imports the CUDA build and checks ptxas' report for spilled registers. It needs nvcc, but neither a torch
# with CUDA nor a GPU.
ifneq ($(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc)),)
cuda-check: $(VENV)/installed
	rm -rf build/cuda build/site-cuda build/ptxas.log
	TOPN_GATING_CUDA=1 NVCC_APPEND_FLAGS="-Xptxas -v" $(PIP) install --no-build-isolation --no-deps --log build/ptxas.log \
		--target build/site-cuda . || { tail -n 60 build/ptxas.log; false; }
	cd build/site-cuda && ../../$(RUN) -m topn_gating info
	cd build/site-cuda && ../../$(RUN) -m pytest ../../tests/test_build.py
	$(RUN) tests/kernels/ptxas_spills.py build/ptxas.log

# Counts the instructions of the kernels' loops over tokens in the machine code, and predicts their time on an H100. It needs nvcc,
# but no GPU. ARGS=--check compares with the table of docs/benchmarks.md, ARGS=--write writes it.
sass: $(VENV)/installed
	$(RUN) -m benchmarks.sass $(ARGS)
else
cuda-check:
	@echo "make cuda-check: there is no nvcc on this machine, so the CUDA build was not checked."

sass:
	@echo "make sass: there is no nvcc on this machine, so no machine code was counted."
endif

clean:
	rm -rf $(VENV) build topn_gating/*.so

# Peers of the tests whose routers need few of their many dependencies, which requirements-dev.txt has. torchtitan's cannot be
# imported without triton, which only a torch for CUDA brings.
$(VENV)/installed: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -r requirements-dev.txt
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation zetascale==2.8.8 megatron-core==0.16.1 deepspeed==0.19.8 \
		"torchtitan==0.3.0; python_version >= '3.11'"
	$(RUN) -c "import triton" 2>/dev/null || $(PIP) install --no-deps "triton==3.5.1; sys_platform == 'linux'"
	touch $@

$(VENV)/kernels: $(VENV)/installed CMakeLists.txt $(shell find csrc simt tests/kernels -type f) \
		$(shell find benchmarks -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
	$(CMAKE) -B build/cmake
	$(VENV)/bin/cmake --build build/cmake --parallel 2
	touch $@

# Compiles only what has changed.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc -type f)
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@
