# make demo: everything from a fresh machine to a steered model.   make test: all tests.   They set themselves up in .venv
PYTHON ?= python3
PY := .venv/bin/python
BASE ?= demo-run
WORKERS ?= 2
OLDEST := transformers==4.57.6
IN_MEMORY := sh tools/in_memory.sh
TOUCHING := families engines methods golden interventions suffix generation api steering placed joint loading templates sampling kv export imports lean prepacked

.PHONY: demo demo-small real-model test test-oldest test-more check demo-model clean

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --no-compile -r requirements.txt
	touch $@

.venv/.tested: .venv/.installed requirements-test.txt
	$(PY) -m pip install --quiet --no-compile -r requirements-test.txt
	touch $@

# a real model: fits, texts, curves, a page, and what it showed; the small one where the real one cannot be had
demo: .venv/.installed
	VENV=.venv BASE_DIR=$(BASE) sh examples/demo.sh

# all ten combinations of method and form on the small model that comes with the code
demo-small: .venv/.installed
	VENV=.venv BASE_DIR=$(BASE)-small sh examples/demo_small.sh

# what make demo steers, for tests: they are skipped without it
real-model: .venv/.installed
	$(PY) tools/real_model.py --base_dir $(BASE)

# with CI=true all cases of each matrix, and the full counts of fuzzing, kills and random sequences
test: .venv/.tested
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(IN_MEMORY) $(PY) -m pytest -n $(WORKERS) --dist worksteal tests

# environments over the libraries of .venv: each has those besides what is installed in it
.venv-%/.made: .venv/.tested
	$(PYTHON) -m venv .venv-$*
	$(PY) -c "import site; print(site.getsitepackages()[0])" > "$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/newest.pth"
	touch $@

# the oldest transformers that is supported: engine, methods, goldens and what loads models
.venv-oldest/.tested: .venv-oldest/.made
	.venv-oldest/bin/python -m pip install --quiet --no-compile "$(OLDEST)"
	touch $@

# what touches the library: of each matrix as many cases as show every value of every parameter; all of them with CI=true
test-oldest: .venv-oldest/.tested
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(IN_MEMORY) .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal $(patsubst %,tests/test_%.py,$(TOUCHING))

# what needs a library that other tests do without: torchao slows every start of transformers, lm-evaluation-harness has 25 packages
test-more: .venv-more/.made
	.venv-more/bin/python -m pip install --quiet --no-compile lm_eval==0.4.13
	OMP_NUM_THREADS=1 CI=true $(IN_MEMORY) .venv-more/bin/python -m pytest tests/test_lm_eval.py
	.venv-more/bin/python -m pip install --quiet --no-compile torchao==0.18.0
	OMP_NUM_THREADS=1 CI=true $(IN_MEMORY) .venv-more/bin/python -m pytest tests/test_quantised.py

check: .venv/.tested
	$(PY) -m ruff check .
	$(PY) -m mypy spilt
	$(PY) -m vulture

# rebuild the demo's model and data from nothing (up to an hour)
demo-model: .venv/.installed
	$(PY) tools/demo/build.py

clean:
	rm -rf .venv .venv-oldest .venv-more demo-run demo-run-small
