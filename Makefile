# Two commands on a fresh machine (Python 3.11, pip, a C compiler): `make demo` and `make test`.
# Both set up .venv once, from the versions pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
OUT := out
# Real third-party data, where it is at hand; tests that need it say so and skip without it
export NETSUKE_DATA ?= $(abspath $(wildcard ../shared/data))

PROMPT := 'class Stack:\n    """A simple stack."""\n\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self'

# Compilers and emulators of other processors: Debian's packages, for tests that are skipped (and say so) without them
TOOLS := gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
  gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user

.PHONY: tools demo test lint bench pages fuzz clean

.venv/ready: constraints.txt pyproject.toml $(shell find native src/netsuke/graph/kernels -name "*.[ch]" -o -name "*.cpp" -o -name CMakeLists.txt)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/ready
	@mkdir -p $(OUT)
	$(BIN)/netsuke fit pycode --device pi-zero-2w --storage 4MB -o $(OUT)/pycode-4mb.netsuke
	$(BIN)/netsuke run $(OUT)/pycode-4mb.netsuke --tokens 48 --temperature 0.6 --top-p 0.9 --seed 4 --prompt "$$(printf $(PROMPT))"

tools:
	@if (command -v arm-none-eabi-gcc && command -v qemu-system-arm && command -v qemu-aarch64) > /dev/null; then :; \
	elif command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
	  (timeout 300 apt-get update && timeout 900 apt-get install -y --no-install-recommends $(TOOLS)) > build-tools.log 2>&1 \
	    && rm -f build-tools.log || echo "no emulators: Debian's packages could not be installed; their tests are skipped"; \
	else echo "no emulators (apt-get install $(TOOLS)): their tests are skipped"; fi

# One thread for each of the two workers: with two each, PyTorch's threads wait for one another (10 minutes, not 4)
test: .venv/ready tools
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check src tests recipes benchmarks
	$(BIN)/ruff format --check src tests recipes benchmarks

bench: .venv/ready
	$(BIN)/python benchmarks/plan.py --json
	$(BIN)/python benchmarks/quantization.py --json
	$(BIN)/python benchmarks/allocation.py --json
	$(BIN)/python benchmarks/methods.py --json
	$(BIN)/python benchmarks/matrix.py --json
	$(BIN)/python benchmarks/carved.py --json
	$(BIN)/python benchmarks/sparse.py --json
	$(BIN)/netsuke bench lm -o benchmarks/results/lm.json
	$(BIN)/python benchmarks/serve_load.py --json
	$(BIN)/python benchmarks/instructions.py
	$(BIN)/python benchmarks/litert.py --json
	$(BIN)/python benchmarks/control.py
	$(BIN)/python benchmarks/forecast.py --json
	$(BIN)/python benchmarks/ecg.py --json

# The generated parts of README.md and docs/; docs/demo.txt is what `make demo` printed
pages: .venv/ready
	(echo '$$ make demo'; COLUMNS=110 $(MAKE) -s demo 2>&1) > docs/demo.part && mv docs/demo.part docs/demo.txt
	$(BIN)/netsuke reproduce --page
	$(BIN)/python benchmarks/pages.py

# The native engine on spoiled artifacts, under sanitizers (2 minutes; needs cmake and a C compiler only)
FUZZ_COUNT ?= 200000
FUZZ_SEED ?= 1
fuzz:
	cmake -S native -B build/native-tests/sanitized -DNS_PYTHON=OFF -DNS_TESTS=ON -DNS_SANITIZE=address,undefined
	cmake --build build/native-tests/sanitized --target fuzz
	build/native-tests/sanitized/fuzz $(FUZZ_SEED) $(FUZZ_COUNT)

clean:
	rm -rf .venv $(OUT) build
