# make demo   pictures with self-attention and with ΔConv, side by side, from a real ComfyUI
# make test   every test and check
#
# Both make the environment in .venv first. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup format clean

demo: setup
	$(BIN)/python -m scripts.show_demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m scripts.check_types
	$(BIN)/pytest

setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; name one: make PYTHON=python3.12")'
	@$(PYTHON) -m scripts.make_environment

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest output
