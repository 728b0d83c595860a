# make chat   set everything up and fine-tune the embedded model on the conversations in data_templates/
# make test   set everything up and run the tests
PYTHON ?= python3

chat: .venv/installed
	.venv/bin/accelerate launch -q -m align.sft recipes/chat.yaml

test: .venv/installed
	.venv/bin/python -m pytest --ignore=tests/real -n 3 --dist loadfile --no-loadscope-reorder

# All tests, the long ones too, with every example of the fuzz tests.
test-all: .venv/installed
	ALIGN_FUZZ=8 .venv/bin/python -m pytest -m "slow or not slow"

# The tests on published data sets, which skip what is not beside the project in ../shared.
test-real: .venv/installed
	.venv/bin/python -m pytest tests/real

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (PyTorch and what stands on it: a few minutes, once)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: chat test test-all test-real lint install
