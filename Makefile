# Two commands are all a fresh machine needs: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
PINNED := .venv-pinned
AOT := .venv-aot
PIP_FLAGS := --quiet --disable-pip-version-check
BROWSER := $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))
PYTEST_FLAGS ?= -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help demo test tests test-pinned test-nightly test-nightly-pinned test-cluster test-aot docs docs-serve wheel lint format libero setup setup-pinned clean

help:
	@echo "make demo         serve the embedded policy, drive it with the real openpi client in LIBERO, show the result"
	@echo "make test         lint and quick tests on the newest jax (sets up .venv and the LIBERO simulator)"
	@echo "make test-pinned  quick tests on openpi's pins: jax 0.5.3, flax 0.10.2, orbax 0.11.13, numpy 1.26"
	@echo "make test-nightly broader and slower tests on the newest jax; test-nightly-pinned on openpi's pins"
	@echo "make test-cluster evaluation and serving on a Ray cluster of three nodes on this machine"
	@echo "make test-aot     launches of a control step, compiled for a GPU that need not be there"
	@echo "make docs         the site, in out/site; make docs-serve shows it while you write"
	@echo "make wheel        the wheel, in out/dist"
	@echo "make lint format clean"

demo: libero
	$(VENV)/bin/python scripts/demo.py $(ARGS)

# the type checker keeps one core busy: tests begin beside it
test: libero
	@$(MAKE) --no-print-directory --jobs=2 lint tests

# Ray and the GPU's compiler have targets of their own, and a browser is not everywhere
ELSEWHERE := not ray and not aot$(if $(BROWSER),, and not browser)
tests: libero
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m "not nightly and $(ELSEWHERE)" $(ARGS)

test-nightly: libero
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m "nightly and $(ELSEWHERE)" $(ARGS)

# the model, the pruners and serving run on openpi's pins; what does not is marked `newest`, and what those warn of is
# theirs; openpi's client connects outside a `with`, hundreds of times, which websockets deprecates
PINNED_WARNINGS := -W default -W "ignore:connect() must be used:DeprecationWarning"
PYTEST_PINNED = $(PINNED)/bin/python -m pytest $(PYTEST_FLAGS) $(PINNED_WARNINGS)
ON_PINS := not libero and not newest and not ray and not aot
test-pinned: $(PINNED)/.ready
	$(PYTEST_PINNED) -m "not nightly and $(ON_PINS)" $(ARGS)

test-nightly-pinned: $(PINNED)/.ready
	$(PYTEST_PINNED) -m "nightly and $(ON_PINS)" $(ARGS)

# three Ray nodes on loopback, two of which play LIBERO; nightly, since Ray alone takes 340 MB
test-cluster: $(VENV)/.ray libero
	$(VENV)/bin/python -m pytest -m ray --disable-warnings --durations=8 $(ARGS)

# a room of its own: a CUDA plugin beside jax would change what every other test starts with
test-aot: $(AOT)/.ready
	$(AOT)/bin/python -m pytest -m aot tests/test_aot.py $(ARGS)

# nothing is fetched while the site is built or read
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs serve $(ARGS)

wheel: $(VENV)/.ready
	$(VENV)/bin/python -m build --wheel --no-isolation --outdir out/dist

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/rumdl check .

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	-$(VENV)/bin/rumdl fmt .

libero: $(VENV)/.ready
	@bash scripts/setup_libero.sh $(VENV)/bin/python

setup: $(VENV)/.ready

setup-pinned: $(PINNED)/.ready

# openpi-client comes without its dependencies: its numpy<2 pin is metadata only
$(VENV)/.ready: pyproject.toml requirements/openpi-client.txt
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e ".[dev,docs,rerun,vla-eval]"
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r requirements/openpi-client.txt
	@touch $@

$(VENV)/.ray: $(VENV)/.ready
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e ".[ray]"
	@touch $@

$(PINNED)/.ready: pyproject.toml requirements/openpi-client.txt requirements/pinned.txt
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh $(PINNED)
	$(PINNED)/bin/python -m pip install $(PIP_FLAGS) -e ".[dev]" -c requirements/pinned.txt
	$(PINNED)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r requirements/openpi-client.txt
	@touch $@

$(AOT)/.ready: pyproject.toml
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh $(AOT)
	$(AOT)/bin/python -m pip install $(PIP_FLAGS) -e ".[aot]" pytest hypothesis
	@touch $@

clean:
	rm -rf $(VENV) $(PINNED) $(AOT) out .pytest_cache .ruff_cache .hypothesis
