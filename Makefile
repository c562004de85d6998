# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-gpu test-slow test-torch test-buckets lint soak mutate bench bench-gpu wheel docs lock \
        oldest newest licenses clean

# Versions from requirements.lock, which has those of all platforms with their checksums.
$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(VENV)/installed  ## trains a tiny autoencoder on photographs and writes demo-run/index.html
	$(VENV)/bin/dcae-jax demo --workdir=demo-run

test: $(VENV)/installed  ## everything fast
	$(PY) -m pytest -n 2 --dist loadgroup -m 'not slow and not torch'

# Six processes share the card and its compile cache: compiling takes most of the time.
test-gpu: export JAX_PLATFORMS =
test-gpu: export DCAE_TEST_GPU ?= 1
test-gpu: $(VENV)/installed  ## the numerical tests, on this machine's GPU; see docs/gpu.md
	$(PY) -m pytest -n 6 --dist loadgroup

test-torch: $(VENV)/installed  ## parity with PyTorch, which must be installed in .venv
	$(PY) -m pytest -m 'torch and not slow'

test-slow: $(VENV)/installed  ## full-size and long tests
	$(PY) -m pytest -n 2 --dist loadgroup -m slow

lint: $(VENV)/installed  ## style, formatting, who imports whom, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/pyright --pythonpath $(PY)

test-buckets: $(VENV)/installed  ## jobs in emulated GCS and S3, whose requests fail
	$(PY) -m pip install -q --disable-pip-version-check gcsfs s3fs gcp-storage-emulator 'moto[server]'
	$(PY) -m pytest -s tests/reliability/test_killed_buckets.py tests/reliability/test_data_in_stores.py

soak: $(VENV)/installed  ## 200 kills, each run compared bit for bit with one that was not killed
	$(PY) tests/reliability/soak.py --kills=200

mutate: $(VENV)/installed  ## plants 300 small faults, and counts those that the fast tests notice
	$(PY) tests/mutation/mutate.py --count=300

bench: $(VENV)/installed  ## beside PyTorch, which must be installed in .venv; into docs/benchmarks.md
	$(PY) benchmarks/run.py

bench-gpu: $(VENV)/installed  ## on this machine's GPU; ARGS='--tier=1 --limit=480', or --tiny anywhere
	$(PY) benchmarks/gpu.py $(ARGS)

wheel: $(VENV)/installed  ## dist/*.whl, with configs/ inside
	$(PY) -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

lock:  ## resolves requirements.lock again; needs uv
	uv pip compile -q --universal --extra dev --generate-hashes --upgrade \
	    --no-annotate --no-header --no-emit-index-url -o requirements.lock pyproject.toml

oldest:  ## the fast tests with the oldest versions that pyproject.toml allows; needs uv
	rm -rf $(VENV)-oldest
	uv venv -q $(VENV)-oldest
	uv pip install -q --python $(VENV)-oldest --resolution lowest-direct -e '.[dev]'
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadgroup -m 'not slow and not torch'

newest:  ## a smoke test with the newest Python and packages there are; see .ci/newest
	.ci/newest

licenses: $(VENV)/installed  ## of all that an installation brings along
	$(PY) -m pip install -q --disable-pip-version-check pip-licenses
	$(VENV)/bin/pip-licenses --format=markdown --with-urls

.PHONY: docs
docs: $(VENV)/installed  ## the documentation site, into site/
	$(PY) -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-oldest dist demo-run
