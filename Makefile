# fastnn: everything a developer runs. `make help` lists the targets.
# All of it happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
CXX ?= g++
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help build docs examples test test-integrations fuzz-semantics fuzz-networks fuzz-models fuzz-upstream lint format bench bench-conv bench-layers bench-rnn \
    bench-mlp bench-frozen bench-zoo bench-step bench-epoch bench-memory bench-scaling bench-overhead bench-processes results \
    sweep-conv sweep-mlp wheel wheels clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=$(PYTHON) and CXX=$(CXX) to build with; ARGS= for pytest (-n0: in one process) or the benchmark programs."

build: $(VENV)/build.stamp  ## Build the extension and install fastnn into .venv, editable

test: $(VENV)/test.stamp $(VENV)/bench.stamp  ## Run the tests, the benchmark programs' too
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

test-integrations: $(VENV)/integrations.stamp  ## Run fused models in Lightning, skorch, transformers and other libraries
	$(RUN) -m pytest -n0 tests/integrations $(ARGS)

fuzz-semantics: $(VENV)/test.stamp  ## Run random forwards fused and not, with changes between the calls (ARGS=, five minutes)
	$(RUN) tests/semantics.py --first 0 --count 5000 --kind fuse --brief $(ARGS)

fuzz-networks: $(VENV)/test.stamp  ## Run thousands of random networks against the reference (ARGS=, three minutes)
	$(RUN) tests/random_networks.py $(ARGS)

fuzz-models: $(VENV)/test.stamp  ## Compare hundreds of random models, fused, with themselves (ARGS=, ten seconds)
	$(RUN) tests/random_models.py $(ARGS)

fuzz-upstream: $(VENV)/test.stamp  ## Run every function of torch in a fused model, on PyTorch's own samples (ARGS=, six minutes)
	$(RUN) tests/upstream_samples.py $(ARGS)

lint: $(VENV)/lint.stamp  ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')
	$(RUN) -m mypy

format: $(VENV)/lint.stamp  ## Rewrite the sources in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

results: $(VENV)/rivals.stamp  ## Measure all that README and docs show, and write it there (an hour; ARGS=--short: a rehearsal)
	$(RUN) -m benchmarks.results $(ARGS)

bench: $(VENV)/bench.stamp  ## Measure the three models against stock PyTorch (under five minutes)
	$(RUN) -m benchmarks.report $(ARGS)

bench-conv: $(VENV)/rivals.stamp  ## Compare conv_relu_max_pool with every rival, in bfloat16 too
	$(RUN) -m benchmarks.compare conv_relu_max_pool $(ARGS)
	$(RUN) -m benchmarks.compare conv_relu_max_pool --dtype bfloat16 $(ARGS)

bench-layers: $(VENV)/bench.stamp  ## Compare convolution layers of published networks with stock PyTorch
	$(RUN) -m benchmarks.layers $(ARGS)

bench-rnn: $(VENV)/rivals.stamp  ## Compare the recurrent layers with every rival
	$(RUN) -m benchmarks.compare rnn --seconds 3 $(ARGS)

bench-mlp: $(VENV)/rivals.stamp  ## Compare mlp with every rival
	$(RUN) -m benchmarks.compare mlp $(ARGS)

bench-frozen: $(VENV)/rivals.stamp  ## Compare the whole models, frozen too, with every rival, and single steps' latencies
	$(RUN) -m benchmarks.compare models $(ARGS)
	$(RUN) -m benchmarks.latency

bench-zoo: $(VENV)/rivals.stamp  ## Compare real models, fused and frozen, with stock in both formats and every rival
	$(RUN) -m benchmarks.zoo $(ARGS)

bench-step: $(VENV)/rivals.stamp  ## Compare whole training steps with stock, compile and JAX
	$(RUN) -m benchmarks.step $(ARGS)

bench-epoch: $(VENV)/rivals.stamp  ## Compare whole loops over data in memory with stock and JAX, and threads
	$(RUN) -m benchmarks.epoch $(ARGS)

bench-memory: $(VENV)/bench.stamp  ## Measure memory and time of training steps
	$(RUN) -m benchmarks.memory $(ARGS)

bench-scaling: $(VENV)/bench.stamp  ## Measure time against batch, length, channels, hidden size and threads
	$(RUN) -m benchmarks.scaling $(ARGS)

sweep-conv: $(VENV)/bench.stamp  ## Compare random convolution layers with stock PyTorch (about fifteen minutes)
	$(RUN) -m benchmarks.sweep conv_relu_max_pool $(ARGS)

sweep-mlp: $(VENV)/bench.stamp  ## Compare random chains of linear layers with stock PyTorch
	$(RUN) -m benchmarks.sweep mlp $(ARGS)

bench-processes: $(VENV)/bench.stamp  ## Measure as many processes of one thread as there are cores against one alone
	$(RUN) -m benchmarks.processes $(ARGS)

bench-overhead: $(VENV)/bench.stamp  ## Measure what a call of each op costs before any work
	$(RUN) -m benchmarks.overhead $(ARGS)

EXAMPLES := digits signals anomalies forecast translate stream search yours

examples: $(VENV)/examples.stamp  ## Run the examples in a short form, each with its drawing in build/
	@mkdir -p build
	for name in $(EXAMPLES); do \
	    $(RUN) examples/$$name.py --short --output build/$$name.png || exit 1; \
	done

wheel: $(VENV)/wheel.stamp  ## Build the source distribution and, from it, a wheel for this Python and this system, into dist/
	rm -rf dist
	CXX="$(CXX)" $(RUN) -m build --no-isolation --outdir dist/unrepaired
	mv dist/unrepaired/*.tar.gz dist
ifeq ($(shell uname),Linux)
	PATH="$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair --exclude 'libtorch*' --wheel-dir dist dist/unrepaired/*.whl
	@ls dist/*manylinux_2_28* > /dev/null 2>&1 || echo "fastnn: this wheel asks for the C library that it was built" \
	    "with. Wheels of manylinux_2_28 take the tool chain of a container: 'make wheels', which needs docker."
else
	mv dist/unrepaired/*.whl dist
endif
	rm -r dist/unrepaired

wheels: $(VENV)/wheel.stamp  ## Build the wheels of a release for this processor, in the container of cibuildwheel (ARGS=--only cp313-manylinux_x86_64: one)
	$(RUN) -m cibuildwheel --output-dir dist $(ARGS)

docs: $(VENV)/docs.stamp  ## Build the documentation into build/docs; a warning is an error
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs $(ARGS)
	@echo "The documentation is in build/docs/index.html."

clean:  ## Remove everything that was built, .venv included
	rm -rf $(VENV) build dist docs/_generated *.egg-info fastnn/_C.* .pytest_cache .hypothesis .benchmarks .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv with what a build needs: pyproject.toml's own list, so that it is kept in one place.
$(VENV)/venv.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fastnn: Python 3.10 or newer is needed: make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	    { echo "fastnn: $(PYTHON) has no venv: 'apt-get install python3-venv' on Debian and Ubuntu" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sysconfig as s; (pathlib.Path(s.get_path("include")) / "Python.h").stat()' \
	    2> /dev/null || { echo "fastnn: $(PYTHON) has no C headers: 'apt-get install python3-dev' on Debian and" \
	    "Ubuntu, 'dnf install python3-devel' on Fedora" >&2; exit 1; }
	@command -v $(firstword $(CXX)) > /dev/null || \
	    { echo "fastnn: no C++ compiler ('$(CXX)' not found): 'apt-get install g++' on Debian and Ubuntu," \
	    "'dnf install gcc-c++' on Fedora, 'xcode-select --install' on macOS; or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet build
	$(RUN) -c 'import build; print(*build.ProjectBuilder(".").build_system_requires, sep="\n")' | \
	    $(PIP) install -r /dev/stdin
	@touch $@

$(VENV)/build.stamp: $(VENV)/venv.stamp $(SOURCES)
	CXX="$(CXX)" $(RUN) -W ignore::UserWarning setup.py -q build_ext --inplace
	CXX="$(CXX)" $(PIP) install --no-build-isolation --editable .
	@touch $@

# One stamp an extra of pyproject.toml: test, lint, bench, rivals, examples, integrations, docs, wheel.
$(VENV)/%.stamp: $(VENV)/build.stamp
	$(PIP) install --no-build-isolation --editable ".[$*]"
	@touch $@

include gpu.mk
include elsewhere.mk
