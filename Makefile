# Without PYTHON the targets create an environment, .venv, and update it when pyproject.toml changes.
# With PYTHON, as in make test PYTHON=python, they use the environment of that Python without changing it.

ifeq ($(origin PYTHON),undefined)
PYTHON := .venv/bin/python
demo: .venv/demo.stamp
lint unit timm-suite: .venv/test.stamp
docs: .venv/docs.stamp
clients: .venv/clients.stamp
endif

.PHONY: help demo test lint unit timm-suite clients docs clean

help:
	@echo 'make demo        fine-tune a small AiT on real digits, in less than three minutes on two cores'
	@echo 'make test        lint, formatting, types and all tests'
	@echo 'make timm-suite  the model tests of the installed timm alone'
	@echo 'make clients     tests with Lightning, transformers, peft and other training libraries'
	@echo 'make docs        the documentation, in the folder site'
	@echo 'make clean       remove environments, caches and outputs'

demo:
	$(PYTHON) -m timm_ait.demo $(ARGS)

test: lint unit

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

unit:
	$(PYTHON) -m pytest -ra $(ARGS)

timm-suite:
	$(PYTHON) tests/timm_suite.py $(ARGS)

# fastai has a process of its own, since it replaces Tensor.as_subclass, which torch.compile needs.
clients:
	$(PYTHON) -m pytest -ra tests/clients --ignore tests/clients/test_fastai.py $(ARGS)
	$(PYTHON) -m pytest -ra tests/clients/test_fastai.py $(ARGS)

docs:
	$(PYTHON) -m mkdocs build --strict $(ARGS)

clean:
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist output site *.egg-info

.venv/%.stamp: pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[$*]'
	touch $@
