# make demo and make test are all that a reader needs: each target sets up .venv by itself when it is missing or stale.
PYTHON  ?= python3
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.ready
QUIET   := TF_CPP_MIN_LOG_LEVEL=3
# What is installed besides the requirements: an engine (tensorflow, jax or torch) and the tools of development.
EXTRAS  ?= tensorflow,dev
# A second engine that is too large for everyone, for the tests of it: make test TORCH=torch==2.13.0 (.ci/run does).
# Where pip would fetch the build for graphics cards, name the small one:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test TORCH=torch==2.13.0+cpu
TORCH   ?=
# Tests run in this many processes at once; most of them wait for one core at a time.
JOBS    ?= 2
DETECTOR := retinanet_nb/assets/shapes.keras

ifneq "$(TORCH)" ""
# without the signs that make would take for its own
TORCH_STAMP := $(VENV)/.$(subst =,-,$(TORCH))
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-engines docs lab fuzz bench readme constraints shapes-detector mend merge-driver clean FORCE

# The stamp holds the checkout's path. The commands in a virtual environment carry absolute paths, so that a moved one is stale.
ifneq "$(shell cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
STALE := FORCE
endif

help:  ## this list
	@echo "retinanet_nb: RetinaNet as a book that runs"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'
	@echo
	@echo "  Each sets up $(VENV) by itself. Another Python: make install PYTHON=python3.12"

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt $(STALE)
	@if [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" != "$(CURDIR)" ]; then \
	    echo "The checkout has moved: making $(VENV) afresh"; rm -rf $(VENV); fi
	@if ! $(PY) -c '' 2>/dev/null; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { \
	        echo "Python 3.11.4 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make install PYTHON=python3.11"; exit 1; }; \
	    echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv --clear $(VENV) || { \
	        echo "$(PYTHON) could not make a virtual environment. On Debian and Ubuntu, install its package python3-venv."; exit 1; }; \
	fi
	@rm -f $(STAMP)
	@echo "Installing the package and its pinned requirements into $(VENV) (about 110 packages, TensorFlow among them: a few minutes)"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]' || { \
	    echo "The installation failed (see above). TensorFlow has wheels for Python 3.11 to 3.13; $(PY) is $$($(PY) --version)."; exit 1; }
	@$(MAKE) --no-print-directory mend merge-driver
	@printf '%s\n' "$(CURDIR)" > $(STAMP)
	@echo "Set up: $(VENV)"

# PyTorch stays out of constraints.txt: which build there is depends on the machine and the index.
$(VENV)/.torch%: $(STAMP)
	@echo "Installing $(TORCH) for the tests of that engine"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt '$(TORCH)'
	@touch '$@'

install: $(STAMP) mend  ## set up .venv, the site's link and the merge driver for notebooks
	@echo "Ready: $$($(PY) --version), $$($(PY) -m pip list 2>/dev/null | awk '/^(keras|tensorflow|jax|torch|nbdev) /{ printf "%s%s %s", s, $$1, $$2; s = ", " }')"

# nbs/_quarto.yml is a symbolic link. Some checkouts (Windows, archives) write a link as a file that holds its target.
mend:
	@if ! cmp -s _quarto.yml nbs/_quarto.yml; then \
	    rm -f nbs/_quarto.yml; \
	    ln -s ../_quarto.yml nbs/_quarto.yml 2>/dev/null || cp _quarto.yml nbs/_quarto.yml; \
	    echo "Mended nbs/_quarto.yml: the checkout had not made it a link to ../_quarto.yml"; \
	fi

# Merging by cells instead of by lines (see CONTRIBUTING.md). Writes to this checkout's own git configuration only.
merge-driver:
	@if [ "$$(git rev-parse --show-toplevel 2>/dev/null)" = "$$(pwd -P)" ]; then \
	    git config --local merge.nbdev-merge.name "notebooks, cell by cell" && \
	    git config --local merge.nbdev-merge.driver \
	        'if [ -x $(VENV)/bin/nbdev_merge ]; then $(VENV)/bin/nbdev_merge %O %A %B %P; else git merge-file %A %O %B; fi' \
	    || echo "The merge driver for notebooks could not be set; merging works line by line"; \
	else echo "Not a git checkout: no merge driver for notebooks"; fi

demo: $(STAMP)  ## draw a data set, train a small detector on it, write a gallery (minutes)
	@$(QUIET) $(VENV)/bin/retinanet_demo $(ARGS)

test: $(STAMP) $(TORCH_STAMP)  ## all tests, every notebook executed (RETINANET_DATA=... adds those on real pictures)
	@$(QUIET) $(PY) -m pytest -q -n $(JOBS) --dist worksteal tests $(ARGS)

# A part of make test. An engine that isn't installed is left out, and said; TORCH=... installs PyTorch.
test-engines: $(STAMP) $(TORCH_STAMP)  ## contract, training, saving, same detections on TensorFlow, JAX, PyTorch
	@$(QUIET) $(PY) -m pytest -q -rs tests/test_engines.py tests/test_machines.py $(ARGS)

docs: $(STAMP) mend  ## check the book and render the site into _docs (needs Quarto)
	@$(QUIET) $(PY) tests/book.py docs

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab nbs

fuzz: $(STAMP)  ## 10,000 damaged files through every reader (ARGS="--seed 7 --cases 500")
	@$(QUIET) $(PY) tests/fuzz.py $(ARGS)

bench: $(STAMP)  ## what each optimisation gives on this machine
	@$(QUIET) $(PY) tests/bench.py $(ARGS)

readme: $(STAMP)  ## make README.md from nbs/index.ipynb
	@$(PY) tests/book.py readme

constraints: $(STAMP)  ## pin in constraints.txt what is installed in .venv now
	@$(PY) tests/book.py constraints
	@touch $(STAMP)

shapes-detector: $(STAMP)  ## train again the small detector that the package carries
	@$(QUIET) $(VENV)/bin/retinanet_demo --out runs/shapes-detector --epochs 20 --detector $(DETECTOR) --replace $(ARGS)

clean:  ## remove what make wrote; leaves .venv, runs and downloads
	rm -rf _proc _docs build dist .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
