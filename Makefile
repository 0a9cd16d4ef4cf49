# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test bench lint wheel wheels torch-versions triton-versions integrations side-by-side kills sanitize large fuzz soak clean

demo: $(VENV)/.built  ## train a continual-learning stream on real data (about two minutes)
	$(RUN)/python -m fastcl demo --out out

test: $(VENV)/.built  ## build and run the tests
	$(RUN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

bench: $(VENV)/.built  ## every op against eager torch, torch.compile and the limit of this machine
	$(RUN)/python -m pytest bench -q -s --benchmark-json out/bench.json

lint: $(VENV)/.built
	$(RUN)/pip install -q ruff clang-format
	$(RUN)/ruff check . && $(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run --Werror csrc/*/*.h csrc/*/*.cpp csrc/*.[ch]*

wheel: $(VENV)/.built  ## sdist and wheel in dist/
	$(RUN)/pip install -q build && $(RUN)/python -m build --no-isolation

wheels: $(VENV)/.built  ## sdist and one manylinux wheel in dist/, tried under several Pythons and torches (downloads gigabytes)
	$(RUN)/pip install -q build && PYTHON=$(abspath $(RUN))/python bash .ci/wheels

torch-versions: ## one build under several torch versions (downloads gigabytes; not part of CI)
	bash .ci/torch-versions

triton-versions: $(VENV)/.built  ## the GPU kernels in the interpreter and compiled, under Triton 3.6 and 3.9
	PYTHON=$(abspath $(RUN))/python bash .ci/triton-versions

integrations: $(VENV)/.built  ## the plugins in avalanche-lib and Lightning themselves (downloads them; not part of CI)
	PYTHON=$(abspath $(RUN))/python bash .ci/integrations

side-by-side: $(VENV)/.built  ## Avalanche's plugins and scikit-learn's mixture beside ours (downloads the former; a quiet machine)
	PYTHON=$(abspath $(RUN))/python bash .ci/integrations install
	PYTHONPATH=$(abspath out/integrations) $(RUN)/python -W ignore bench/side_by_side.py --out bench/results/side_by_side.md

kills: $(VENV)/.built  ## 50 SIGKILLs a method at random moments, resumed: equal to the bit to runs never killed
	OMP_NUM_THREADS=1 $(RUN)/python .ci/kills

sanitize: $(VENV)/.built  ## the kernels under AddressSanitizer, UBSan and ThreadSanitizer (half an hour; not part of CI)
	PYTHON=$(abspath $(RUN))/python bash .ci/sanitize

large: $(VENV)/.built  ## every kernel past 2^31 elements (minutes, up to 9 GiB; not part of CI)
	FASTCL_LARGE=1 $(RUN)/python -m pytest -q -m large tests/test_catalogue.py tests/test_large.py

fuzz: $(VENV)/.built  ## thousands of random examples of every op against its float64 reference (hours; not part of CI)
	PYTHON=$(abspath $(RUN))/python bash .ci/fuzz

soak: $(VENV)/.built  ## 10,000 steps of every op with memory flat, 100 tasks exact (a quarter of an hour; not part of CI)
	FASTCL_SOAK=10000 OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q tests/test_soak.py

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install -q $(TORCH) "setuptools>=77" "pybind11>=3" ninja numpy wheel
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
	$(RUN)/pip install -q -e ".[test]" --no-build-isolation
	mkdir -p out && touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info fastcl/*.so
