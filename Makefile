# make demo: the whole pipeline on 5,000 MNIST digits.   make test: every test.   Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench soak clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out runs/demo

test: $(VENV)/.with-tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.with-tests
	$(PIP) --no-build-isolation -e ".[bench]"
	$(BIN)/python -m pytest benchmarks --benchmark-enable

# Kills, mutated tars, a faulty S3: under 30 minutes on 2 cores; the table is for docs/reliability.md. Where there is no
# atheris to install, without it.
soak: $(VENV)/.with-tests
	$(PIP) --no-build-isolation -e ".[soak]" || echo "no atheris here: left out"
	$(BIN)/python -m tests.soak.run --out runs/soak

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11
	$(PIP) --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.with-tests: $(VENV)/.installed
	$(PIP) --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
