# `make demo` and `make test` each do all of their own set-up in .venv; what did not change is not done again.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
# Threads that spin at a barrier take a small machine's only other core from the work.
export OMP_WAIT_POLICY := passive

.PHONY: demo test bench lint kernels install-check cuda-check clean

demo: $(VENV)/built
	$(RUN) -m topn_gating demo $(ARGS)

test: $(VENV)/built lint
	$(RUN) -m pytest $(ARGS)

bench: $(VENV)/built
	$(RUN) -m topn_gating bench $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .

kernels: $(VENV)/installed
	$(VENV)/bin/cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release
	$(VENV)/bin/cmake --build build/cmake --parallel 2

# The package as a user installs it, imported from a folder that is not this one.
install-check: $(VENV)/built
	$(PIP) install --no-build-isolation --no-deps --upgrade --target build/site .
	cd build/site && ../../$(RUN) -m topn_gating info

# The CUDA build, for which nvcc is enough: neither torch nor the machine needs CUDA. It is compiled, linked and imported, and
# ptxas' report is read for spilled registers.
ifneq ($(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc)),)
cuda-check: $(VENV)/installed
	rm -rf build/cuda build/site-cuda build/ptxas.log
	TOPN_GATING_CUDA=1 NVCC_APPEND_FLAGS="-Xptxas -v" $(PIP) install --no-build-isolation --no-deps --log build/ptxas.log \
		--target build/site-cuda . || { tail -n 60 build/ptxas.log; false; }
	cd build/site-cuda && ../../$(RUN) -m topn_gating info
	cd build/site-cuda && ../../$(RUN) -m pytest ../../tests/test_build.py
	$(RUN) tests/ptxas_spills.py build/ptxas.log
else
cuda-check:
	@echo "make cuda-check: there is no nvcc on this machine, so the CUDA build was not checked."
endif

clean:
	rm -rf $(VENV) build topn_gating/*.so

# zeta would bring a dozen packages; the tests load one file of it, which needs what st-moe-pytorch brings.
$(VENV)/installed: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -r requirements-dev.txt
	$(PIP) install --no-deps zetascale==2.8.8
	touch $@

# ninja compiles what changed.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc -type f)
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@
