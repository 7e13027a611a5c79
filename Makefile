# make quickstart   install into .venv and fine-tune a small model on this machine
# make test         all tests (what .ci/run runs, after make lint); TESTS=tests/unit/trainer/worker/test_loop.py runs some
# make chaos        50 random kills over one run (CHAOS_KILLS=…, CHAOS_SEED=… to repeat one); half an hour
# make matrix       every cell of the support matrix for two steps; an hour
# make families     small models of every architecture of transformers, and the table in docs/models.md; half an hour
# make hour         a new user's first hour, typed into a terminal, from a clone to an adapter (HOUR="--venv .venv": installs nothing)
# make night        that, and all other tests that are too long for every day
# make compat       tests with the oldest and the newest libraries that pyproject.toml allows; an hour (COMPAT=oldest)
# make lint         ruff, format, types, import floors
# make docs         the documentation as a site in build/site, as strict as its test builds it
# make schema       write docs/recipe.md and recipes/recipe.schema.json again from the recipe's fields

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test chaos matrix families hour night compat lint docs schema install clean
.DEFAULT_GOAL := test

# An up-to-date pip resolves in a third of the time, and it compiles one file after the other, which all cores do sooner.
# Twice quiet: once shows what setuptools warns of at every editable installation.
install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "muster needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv --upgrade-deps .venv
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile -e '.[dev]' -c constraints.txt
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ .venv/lib || true # some files are templates
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m launcher.quickstart

# Tests in one process run side by side on every core; of the others, which start processes of their own and wait for
# them half of the time, three. Those that share what is costly stay together (tests/support/sharing.py), the longest first.
ifdef TESTS
test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)
else
test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 tests/unit tests/packaging tests/storage
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder tests/ray tests/cluster tests/distributed tests/first_hour tests/gpu
endif

chaos: $(INSTALLED)
	$(BIN)/python -m pytest -o faulthandler_timeout=0 -m chaos tests/ray/test_chaos.py

matrix: $(INSTALLED)
	RANKS_START=spawn $(BIN)/python -m pytest -m night tests/distributed/test_matrix.py

families: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families $(FAMILIES)

hour: $(INSTALLED)
	$(BIN)/python -m tests.first_hour $(HOUR)

night: $(INSTALLED)
	RANKS_START=spawn $(BIN)/python -m pytest -m night

compat:
	$(PYTHON) -m tests.compat $(COMPAT)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/.site/mkdocs.yml

schema: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python docs/.site/recipe_reference.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
