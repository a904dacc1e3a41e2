# Two commands: `make demo` does the main job on a real network, `make test` proves the code. Both need Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check fix clean torchao bench-quick

demo: $(VENV)/demo.stamp
	$(BIN)/pcq demo

test: $(VENV)/test.stamp check
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torchvision goes in without its dependencies: its index build asks for a CUDA torch, and pcq runs it beside any torch.
$(VENV)/base.stamp: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pcq needs Python 3.11 or newer; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torchvision
	touch $@

$(VENV)/demo.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[digits]'
	touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# torchao's PARQ, the peer of the comparisons, has an environment of its own: .venv-torchao.
AO := .venv-torchao
torchao: $(AO)/stamp
$(AO)/stamp: constraints.txt
	$(PYTHON) -m venv $(AO)
	$(AO)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy pillow pyyaml safetensors pydantic rich
	$(AO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchao==0.18.0
	touch $@

# Every method on Fashion-MNIST with a LeNet; torchao's rows need `make torchao` first.
QUICK := build/bench-quick
bench-quick: $(VENV)/test.stamp
	$(BIN)/python -m tests.benchmarks.cifar10 tests/benchmarks/quick.yaml --data fashion-mnist --float $(QUICK) --work $(QUICK) \
		--jobs 2 --torchao $(AO)/bin/python --out $(QUICK)/table

clean:
	rm -rf $(VENV) $(AO) build dist *.egg-info
