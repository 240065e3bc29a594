# make demo: everything from a fresh machine to steered text.   make test: all tests.   Both set themselves up in .venv
PYTHON ?= python3
PY := .venv/bin/python
BASE ?= demo-run

.PHONY: demo curves test check demo-model clean

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/.tested: .venv/.installed requirements-test.txt
	$(PY) -m pip install --quiet -r requirements-test.txt
	touch $@

# fit and apply all ten combinations of method and form on the demo, then look at the texts
demo: .venv/.installed
	VENV=.venv BASE_DIR=$(BASE) sh examples/run_spilt.sh

# measure them over a sweep of strengths: curves, fits and report.html
curves: .venv/.installed
	VENV=.venv BASE_DIR=$(BASE) MODE=loss MULTIPLIERS=sweep sh examples/run_spilt.sh

test: .venv/.tested
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests

check: .venv/.tested
	$(PY) -m ruff check .
	$(PY) -m mypy spilt

# rebuild the demo's model and data from nothing (up to an hour)
demo-model: .venv/.installed
	$(PY) tools/demo/build.py

clean:
	rm -rf .venv demo-run
