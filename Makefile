# Two commands on a fresh machine (Python 3.11, pip, a C compiler): `make demo` and `make test`.
# Both set up .venv once, from the versions pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
OUT := out
# Real third-party data, where it is at hand; tests that need it say so and skip without it
export NETSUKE_DATA ?= $(abspath $(wildcard ../shared/data))

PROMPT := 'class Stack:\n    """A simple stack."""\n\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self'

.PHONY: demo test lint bench pages fuzz clean

.venv/ready: constraints.txt pyproject.toml $(shell find native -name "*.[ch]" -o -name "*.cpp" -o -name CMakeLists.txt)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/ready
	@mkdir -p $(OUT)
	$(BIN)/netsuke fit pycode --device pi-zero-2w --storage 4MB -o $(OUT)/pycode-4mb.netsuke
	$(BIN)/netsuke run $(OUT)/pycode-4mb.netsuke --tokens 48 --temperature 0.6 --top-p 0.9 --seed 4 --prompt "$$(printf $(PROMPT))"

test: .venv/ready
	$(BIN)/pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check src tests recipes benchmarks
	$(BIN)/ruff format --check src tests recipes benchmarks

bench: .venv/ready
	$(BIN)/python benchmarks/plan.py --json
	$(BIN)/python benchmarks/quantization.py --json
	$(BIN)/python benchmarks/allocation.py --json
	$(BIN)/python benchmarks/sparse.py --json
	$(BIN)/netsuke bench lm -o benchmarks/results/lm.json
	$(BIN)/python benchmarks/serve_load.py --json

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
