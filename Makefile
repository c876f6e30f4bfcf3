# Lamina's commands. Each works from a bare clone on a machine with Python 3.11+ and make: it makes .venv, installs
# what it needs under constraints.txt, and runs. A second call finds the environment ready.
#
#   make reproduce   train two papers' models on real digits; writes report/index.html
#   make test        every test but the slow ones (make test-slow runs those)
#   make bench       comparisons of speed on this machine, with few rounds
#   make docs        the site, into site/
#   make lint        ruff, lint and format
#   make types       mypy
#   make clean       removes .venv and everything that was built

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SRC := $(VENV)/src/lamina
PARTS := __init__.py __main__.py py.typed kernels layers blocks models recipes viz
# Tests run beside each other, one a core, each with one thread: a worker holds a gigabyte or two. JOBS=0 has none.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal --benchmark-disable

.PHONY: help reproduce test test-slow bench docs lint types clean
.NOTPARALLEL:

help:
	@sed -n 's/^#  //p' Makefile

reproduce: $(READY)/recipes
	@$(BIN)/lamina reproduce vit_digits lstm_digits

test: $(READY)/test
	@$(PYTEST) -m "not slow"

test-slow: $(READY)/test
	@$(PYTEST) -m slow

bench: $(READY)/bench
	@$(BIN)/python -m pytest benchmarks --quick

docs: $(READY)/docs $(SRC)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

lint: $(READY)/test
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "to format: $(BIN)/ruff format" >&2; exit 1; }

types: $(READY)/test $(SRC)
	@cd $(VENV)/src && ../bin/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p lamina

clean:
	rm -rf $(VENV) site build dist *.egg-info report .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# mypy and the API pages want a folder that holds the package under its name; the clone's may be called anything.
$(SRC): FORCE
	@mkdir -p $@ && for part in $(PARTS); do ln -sfn ../../../$$part $@/$$part; done

# Installs $(1) into .venv. `unfinished` lies there while pip writes; found later, it means that pip was cut off.
define install
	@echo "installing $(1) into $(VENV)"
	@touch $(VENV)/unfinished; trap 'exit 130' INT TERM; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt $(2); \
	status=$$?; rm -f $(VENV)/unfinished; exit $$status
	@touch $@
endef

# One stamp an extra, in one environment, so that the first command installs no more than it needs.
$(READY)/%: $(READY)/torch pyproject.toml constraints.txt
	$(call install,lamina[$*],-e ".[$*]")

# torch comes first: installed after others, it would be replaced by another build.
$(READY)/torch: $(READY)/python constraints.txt
	$(call install,torch,"$$(grep '^torch==' constraints.txt)")

# .venv is made anew where it is missing, was cut off in the making, or came along with a moved or copied folder.
$(READY)/python: FORCE
	@if [ -e $(VENV)/unfinished ] || ! grep -qsF "venv $(CURDIR)/$(VENV)" $(VENV)/pyvenv.cfg \
	    || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  say() { echo "$$*" >&2; exit 1; }; \
	  found=$$($(PYTHON) --version 2>&1) || say "$(PYTHON) does not run: install Python 3.11 or newer, or name it: make PYTHON=python3.12"; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || say "Python 3.11 or newer is needed, $(PYTHON) is $$found: name another: make PYTHON=python3.12"; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || say "$(PYTHON) cannot make an environment: on Debian and Ubuntu, apt-get install python3-venv"; \
	  rm -f $(VENV)/pyvenv.cfg; rm -rf $(VENV); mkdir $(VENV); touch $(VENV)/unfinished; \
	  $(PYTHON) -m venv "$(CURDIR)/$(VENV)" && rm $(VENV)/unfinished; \
	fi
	@mkdir -p $(READY); [ -e $@ ] || touch $@

FORCE:
