.PHONY: check test test-gpu bench lock docs site notebooks
# test-gpu needs an environment with the dev group. On a machine without uv: make test-gpu PYTHON=python3
PYTHON ?= uv run python

check:  # everything that a change must pass
	.ci/run

test:
	uv run pytest -n auto

test-gpu:
	$(PYTHON) -m pytest tests/gpu

bench:  # the tokenizer beside its peers; local/bench/README.md lists the other benchmarks
	uv run --group bench local/bench/tokenizer.py

lock:  # the pinned versions and hashes of the package's dependencies
	uv export --quiet --upgrade --no-dev --no-emit-project --no-header --no-annotate --output-file requirements.lock

docs:  # links, paths and line counts in the Markdown pages
	uv run pytest tests/project/test_docs.py

site:  # the documentation as web pages, in runs/site/html
	uv run --group docs docs/site/build.py

notebooks:  # run them in full and store their outputs; ARGUMENTS=--check compares them instead
	uv run python -m tests.project.test_notebooks $(ARGUMENTS)
