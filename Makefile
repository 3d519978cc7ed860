# make demo           fine-tune a tiny model on this machine, in under two minutes
# make test           the tests that need no GPU, the notebooks among them; without slow duplicates
# make test-long      every test that needs no GPU
# make gpu-test       the tests that need a CUDA device, and the kernels' tests on it; without slow duplicates
# make gpu-test-long  every test that needs a CUDA device
# make test-readers   loads adapters with the programs that read them: vLLM, SGLang and mlx-lm, at one release each
# make test-peft      PEFT's own tests with this package's code in the place of PEFT's, for the table in docs/versions.md; half an hour
# make lint           ruff (check and format), import-linter (the order of the rooms), mypy (types)
# make docs           builds the documentation site into build/site/html; a warning is an error
# make docs-serve     builds it and shows it at http://localhost:8000
# make test-docs      builds it and opens every page in Chromium (`apt-get install chromium`)
# make notebooks      runs the notebooks and writes their outputs into them
# make matrix         a part of the tests with other versions of the libraries, for the table in docs/versions.md
# make installed      everything that tests need, into .venv
# make mutants        breaks the package on purpose and lists what no test notices: SAMPLE breaks, of PATHS
# make clean          removes .venv, the site, and what the examples wrote
# make help           prints these lines
#
# Each target makes what it needs of .venv first and leaves it there. Any pin can be replaced:
#   make test TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0 PYTHON=python3.12

TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
PEFT ?= peft==0.21.0
ACCELERATE ?= accelerate==1.15.0
TRITON ?= triton==3.9.0
PINS = $(TRANSFORMERS) $(PEFT) $(ACCELERATE) safetensors==0.8.0 numpy==2.4.6 jinja2==3.1.6 bitsandbytes==0.50.2 torchao==0.18.0 \
       ipykernel==7.4.0 ipywidgets==8.1.9 matplotlib==3.11.2 \
       hypothesis==6.170.17 nbmake==1.5.5 pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 setuptools==84.2.1 \
       rich==15.0.0 typer==0.29.2 gguf==0.19.0 \
       datasets==5.2.0 trl==1.16.0 \
       deepspeed==0.19.8 hjson==3.1.0
LINTERS = ruff==0.17.5 import-linter==2.17 mypy==2.4.1
MUTANTS = mutmut==3.8.1
# what builds the documentation site and looks at it. Docstrings are read, not imported: no torch
DOCS = zensical==0.0.73 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 griffelib==2.4.1 ruff==0.17.5 \
       mkdocs==1.6.1 mkdocs-autorefs==1.4.5 markdown==3.11.3 pymdown-extensions==13.1.2 pygments==2.21.0 jinja2==3.1.6 nbformat==5.11.1 \
       nbconvert==7.17.2 latex2mathml==3.81.1 playwright==1.65.2 pytest==9.2.0 pytest-timeout==2.4.0
# programs that read adapters. They are installed without what they depend on, which is CUDA and other releases of torch: only
# their loading code runs, on a CPU. READERS_IMPORT is what that code imports.
READERS = vllm==0.33.0 sglang==0.5.23 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
READERS_IMPORT = torchvision==0.28.0 compressed-tensors==0.20.1 mistral_common==1.13.1 tiktoken==0.14.0 sentencepiece==0.2.3 \
       xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2 llguidance==1.9.1 interegular==0.3.3 partial-json-parser==0.2.1.1.post7 \
       openai==3.57.0 openai-harmony==0.0.8 fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 uvloop==0.23.0 watchfiles==1.3.0 \
       aiohttp==3.14.5 aiohappyeyeballs==2.7.1 aiosignal==1.4.0 frozenlist==1.8.0 multidict==7.2.1 propcache==0.5.4 yarl==1.25.1 \
       requests==2.34.2 urllib3==2.8.0 certifi==2026.10.19.post1 charset-normalizer==3.5.3 jiter==0.19.0 distro==1.9.0 sniffio==1.3.1 \
       blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 depyf==0.20.0 astor==0.8.1 einops==0.8.2 ijson==3.6.0 \
       loguru==0.7.3 msgspec==0.23.0 opentelemetry-api==1.45.2 orjson==3.13.0 prometheus_client==0.26.0 py-cpuinfo==9.0.0 \
       pybase64==1.5.1 pycountry==26.2.16 pydantic-extra-types==2.11.1 python-json-logger==4.2.0 setproctitle==1.3.8 zstandard==0.25.0
# what PEFT's own tests import
PEFT_TESTS_IMPORT = parameterized==0.9.0 scipy==1.17.1

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2
# processes that share one GPU; most of their time they compile
GPU_WORKERS ?= 15
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# a stamp's name holds a checksum of the pins it was made with, so other pins install what differs and the same ones do not
PINNED := $(firstword $(shell printf '%s' '$(TORCH) $(TRITON) $(PINS)' | cksum))
DEMO_READY = $(VENV)/ready-demo_$(PINNED)
TEST_READY = $(VENV)/ready-test_$(PINNED)
LINT_READY = $(VENV)/ready-lint_$(subst $() ,_,$(subst ==,-,$(LINTERS)))
READERS_VENV = $(VENV)/readers
READERS_READY = $(VENV)/ready-readers_$(firstword $(shell printf '%s' '$(READERS) $(READERS_IMPORT)' | cksum))
DOCS_VENV = $(VENV)/docs
DOCS_READY = $(VENV)/ready-docs_$(firstword $(shell printf '%s' '$(DOCS)' | cksum))
PEFT_TESTS = $(VENV)/peft-tests
PEFT_TESTS_READY = $(VENV)/ready-peft-tests_$(firstword $(shell printf '%s' '$(PEFT) $(PEFT_TESTS_IMPORT)' | cksum))
MUTANTS_READY = $(VENV)/ready-mutants_$(subst ==,-,$(MUTANTS))

# DeepSpeed has no wheels. Its build imports hjson and torch: those of this environment, where an isolated build would fetch
# a torch of its own. Without its kernels it needs no compiler, and the tests use none of them.
DEEPSPEED_WITHOUT_KERNELS = DS_BUILD_OPS=0 DS_ACCELERATOR=cpu

# whether torch is a build that requires triton, as an exit code
REQUIRES_TRITON = import importlib.metadata as m; raise SystemExit('triton' not in str(m.requires('torch')))

.PHONY: demo test test-long test-readers test-peft gpu-test gpu-test-long lint docs docs-serve test-docs notebooks matrix installed mutants clean help

demo: $(DEMO_READY)
	$(BIN)/python examples/finetune.py

# workers of one thread each: two workers of two threads each fight over two cores. A file's tests stay on one worker, so
# that what they share is made once (xdist 3.8 does not group by mark under pytest 9.2). The kernels' tests go alone:
# without a GPU they run in Triton's interpreter, which must be chosen before Triton is first imported.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(MARKED)" -n $(WORKERS)
test: MARKED = not gpu and not long and not readers and not docs and not peft_tests
test-long: MARKED = not gpu and not readers and not docs and not peft_tests
test test-long: $(TEST_READY)
	$(PYTEST) --dist loadfile --ignore tests/ops
	$(PYTEST) tests/ops

# one process a reader: each keeps a process group and settings of its own. pytest ends with 5 where a reader is not installed,
# as llama.cpp, which has to be compiled: $(READERS_VENV)/bin/python -m pip install --no-deps llama-cpp-python==0.3.36 diskcache
test-readers: $(READERS_READY)
	for test in tests/readers/test_*.py; do \
		OMP_NUM_THREADS=1 $(READERS_VENV)/bin/python -m pytest --timeout 900 $$test || [ $$? = 5 ] || exit 1; \
	done

gpu-test: MARKED = gpu and not long
gpu-test-long: MARKED = gpu
gpu-test gpu-test-long: $(TEST_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(MARKED)" -n $(GPU_WORKERS) --dist load --maxschedchunk 1

test-peft: $(PEFT_TESTS_READY)
	PEFT_SOURCES=$(abspath $(PEFT_TESTS))/$(subst ==,-,$(PEFT)) PYTHONPATH=$(abspath $(PEFT_TESTS))/imports OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m peft_tests --timeout 0 -n $(WORKERS) tests/peft_tests

# mypy reads the types of torch, transformers and peft, so it needs them installed
lint: $(TEST_READY) $(LINT_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

installed: $(TEST_READY)

docs: $(DOCS_READY)
	$(DOCS_VENV)/bin/python docs/site/build_site.py

docs-serve: docs
	$(DOCS_VENV)/bin/python -m http.server --bind localhost --directory build/site/html 8000

# without the conftest.py of tests, which imports torch
test-docs: docs
	$(DOCS_VENV)/bin/python -m pytest --confcutdir tests/docs tests/docs/test_in_a_browser.py

notebooks: $(TEST_READY)
	$(BIN)/python tests/examples/notebook_outputs.py

matrix:
	$(PYTHON) tests/versions/matrix.py

# all breaks would take a day: a sample of them, each a few seconds
SAMPLE ?= 100
SEED ?= 0
mutants: $(TEST_READY) $(MUTANTS_READY)
	OMP_NUM_THREADS=1 nice $(BIN)/python tests/mutants/run.py --sample $(SAMPLE) --seed $(SEED) $(PATHS)

help:
	@sed -n 's/^# make/make/p' Makefile

clean:
	rm -rf $(VENV) .venv-* build/site moe-lora-demo moe-lora-trl

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first, alone: what follows then finds it and leaves it. Its CUDA builds require the triton they were made
# with; its CPU builds require none, and we import triton wherever there is one.
$(DEMO_READY): Makefile pyproject.toml | $(BIN)/python
	rm -f $(VENV)/ready-demo* $(VENV)/ready-test*
	$(PIP) $(TORCH)
	$(BIN)/python -c "$(REQUIRES_TRITON)" || $(PIP) '$(TRITON); platform_system == "Linux"'
	printf '%s\n' $(PINS) > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt --editable '.[cli,examples]'
	touch '$@'

$(TEST_READY): $(DEMO_READY)
	$(PIP) --constraint $(VENV)/constraints.txt --editable '.[test]'
	$(PIP) --constraint $(VENV)/constraints.txt hjson
	$(DEEPSPEED_WITHOUT_KERNELS) $(PIP) --constraint $(VENV)/constraints.txt --use-pep517 --no-build-isolation deepspeed
	touch '$@'

# its own environment finds the packages of this one behind its own
$(READERS_READY): $(TEST_READY)
	$(BIN)/python -m venv $(READERS_VENV)
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
		> "$$($(READERS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/tests.pth"
	$(READERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(READERS_IMPORT) $(READERS)
	touch '$@'

$(DOCS_READY): Makefile
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS)
	touch '$@'

# the wheel of PEFT has no tests; its sources have
$(PEFT_TESTS_READY): $(TEST_READY)
	rm -rf $(PEFT_TESTS)
	$(PIP) --no-deps --target $(PEFT_TESTS)/imports $(PEFT_TESTS_IMPORT)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest $(PEFT_TESTS) $(PEFT)
	tar --extract --gzip --file $(PEFT_TESTS)/peft-*.tar.gz --directory $(PEFT_TESTS)
	touch '$@'

$(LINT_READY): Makefile | $(BIN)/python
	$(PIP) $(LINTERS)
	touch '$@'

$(MUTANTS_READY): Makefile | $(BIN)/python
	$(PIP) $(MUTANTS)
	touch '$@'
