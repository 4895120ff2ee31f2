# make demo: the whole pipeline on 5,000 MNIST digits.   make test: every test.   Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out runs/demo

test: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest

bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pytest benchmarks --benchmark-enable

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
