# `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12 and g++: they install what is missing, here.
VENV := .venv
PY := $(VENV)/bin/python
# uv makes the environment; a private copy is installed when the machine has none.
UV := $(shell command -v uv || echo .uv/bin/uv)
PYTHON := $(shell for python in python3.12 python3.11; do $$python -c '' 2>/dev/null && echo $$python && break; done)
export NO_ALBUMENTATIONS_UPDATE := 1
# Every module that runs is compiled once and kept, also where the environment forbids that: here some hundred processes import them.
export PYTHONDONTWRITEBYTECODE :=
# What the tests use.
EXTRAS := aws,dev,docker,kubernetes,lora,semantic,site,tensorboard
COMMA := ,

.PHONY: setup python demo test test-runs test-parts test-killed test-slow test-oldest test-trainer loss-curve chaos cluster-test speedup mutants lint encoders base text-decoder shapes shapes-changes samplers sweeps site site-test leaderboard findings audit lock clean

setup: $(VENV)/.ready

python:
	@: $(if $(PYTHON),,$(error no Python 3.11 or 3.12 here: install python3.11 and python3.11-venv, or those of 3.12, and run make again))

.uv/bin/uv: | python
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

$(VENV)/.ready: requirements.lock pyproject.toml | python $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(PY) --require-hashes --no-deps -r requirements.lock
	$(UV) pip install --quiet --python $(PY) --no-deps --editable .
	touch $@

demo: setup
	$(VENV)/bin/unidiffuser demo

# Tests of runs that have servers of their own: those that are driven by a browser or killed, and a deployment's. Those of plans are
# done beside the former, so that the three jobs take about as long.
KILLED := tests/pipelines/test_chaos.py tests/pipelines/pages/test_browser.py
PLANNED := tests/pipelines/planning
DEPLOYED := tests/pipelines/servers/test_deploy.py

# Three at a time: runs of whole recipes wait for their servers most of the time. One thread each: where several processes have more
# threads than there are cores, OpenMP's threads wait for each other most of the time.
test: export OMP_NUM_THREADS := 1
test: setup
	$(MAKE) --no-print-directory --jobs 3 lint test-runs test-parts test-killed

test-runs: setup
	$(PY) -m pytest tests/pipelines $(addprefix --ignore=,$(KILLED) $(PLANNED) $(DEPLOYED))
	$(PY) -m pytest $(DEPLOYED)

test-parts: setup
	$(PY) -m pytest --ignore tests/pipelines

test-killed: setup
	$(PY) -m pytest $(KILLED) $(PLANNED)

# Deployments whose processes are killed, which is mostly waiting; a forced run; benchmarks at tiny sizes.
test-slow: setup
	$(PY) -m pytest -m slow

# The same tests with the oldest versions that pyproject.toml admits, in an environment of their own; `make test` has the newest.
OLDEST := .venv-oldest
test-oldest: export OMP_NUM_THREADS := 1
test-oldest: python | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) $(OLDEST)
	$(UV) pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[$(EXTRAS)]'
	touch $(OLDEST)/.ready
	$(MAKE) --no-print-directory --jobs 3 --keep-going VENV=$(OLDEST) test-runs test-parts test-killed

# Every change of a training from which it must go on without losing a step; workers and nodes that are lost; both optimizers on every
# ZeRO stage, with one and two workers, against plain torch: some minutes.
test-trainer: setup
	$(PY) -m pytest -m trainer
	$(PY) -m tests.training.equal --json docs/results/trainer-equal.json

# Kills at random moments, fifty over select, download and filter, 32 over whole recipes as deployments, twenty while checkpoints
# are written: an hour. Then sixty runs of select, download, filter, encode and train on a cluster that loses a machine, gets one or
# is cut from one, or whose store is out of order: some hours. These make networks, so they want root and Linux.
chaos: setup
	$(PY) -m tests.training.chaos $$(mktemp -d) --kills 20 --json docs/results/chaos-checkpoints.json
	$(PY) -m tests.pipelines.chaos data $$(mktemp -d) --kills 50 --json docs/results/chaos-data.json
	$(PY) -m tests.pipelines.chaos deployed $$(mktemp -d) --kills 32 --json docs/results/chaos-deployed.json
	unshare --net --pid --fork --kill-child --mount-proc \
		$(PY) -m tests.stages.chaos $$(mktemp -d) --rounds 3 --json docs/results/chaos-nodes.json

# The demo's recipe, smaller, on a Ray cluster of a head and three nodes, which loses two of these and the head, against the same on
# this machine alone. It makes networks, and Redis keeps what the head knows, so it wants root, Linux and Debian's redis-server.
cluster-test: setup
	unshare --net --pid --fork --kill-child --mount-proc \
		$(PY) -m tests.pipelines.cluster $$(mktemp -d) --json docs/results/cluster.json

# What one, two and three nodes give to download, filter and encode: eight minutes; root, Debian's redis-server and iproute2.
speedup: setup
	unshare --net --pid --fork --kill-child --mount-proc \
		$(PY) -m tests.pipelines.speedup $$(mktemp -d) --json docs/results/speedup.json

# Three hundred small faults, drawn by a seed, each against the tests that run its line: hours on 2 cores, resumable.
mutants: setup
	$(PY) -m tests.mutants runs/mutants --json docs/results/mutants.json

# Rewrites the loss curves that `make test` compares with, and prints how far they have moved.
loss-curve: setup
	$(PY) -m tests.training.curve

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Retrains the small encoders that the project ships: a few hours on 2 cores, resumable.
encoders: setup
	$(PY) -m examples.encoders

# Trains the small network that the demo starts from, by the demo's own stages on a larger little web: within two hours on 2 cores,
# resumable.
base: setup
	$(PY) -m examples.little_web.base

# Trains the text decoder alone on captions of the demo's kind, and keeps its BLEU-4: a few minutes on 2 cores.
text-decoder: setup
	$(PY) -m benchmarks.text_decoder --json docs/results/text-decoder.json

# One small network, five distributions, against a known truth (docs/results/shapes.md): 90 minutes on two slow cores that other
# work kept busy too, and half to two thirds of that to measure it; resumable.
shapes: setup
	$(VENV)/bin/unidiffuser run configs/shapes.yaml
	$(PY) -m examples.shapes

# What single changes of that recipe give, each in a short training of its own: three hours on 2 slow cores, resumable.
shapes-changes: setup
	$(PY) -m benchmarks.shapes_changes --json docs/results/shapes-changes.json

# Every sampler against a known truth: some seconds.
samplers: setup
	$(PY) -m benchmarks.samplers --json docs/results/samplers.json

# Guidance, samplers and robustness of the newest network of `make shapes`: an hour on 2 cores, resumable. Of any other network:
# python -m benchmarks.sweeps CHECKPOINT --name NAME --prompts FILE
sweeps: setup
	$(PY) -m benchmarks.sweeps shapes/train-shapes --name shapes --scenes --count 400 --guidance 1

# The pages as HTML that works without a network, in runs/site/html; every link is checked.
site: setup
	$(PY) -m website build

# Every command on the pages that needs no cluster and no server, in their order, in a clone and a store of their own, and the
# notebook: the better part of an hour.
site-test: setup
	$(PY) -m website walk

# docs/results/leaderboard.md from the results beside it.
leaderboard: setup
	$(PY) -m website leaderboard

# What outside tools really do (findings/README.md), each in an environment of its own: some minutes, and a package registry.
findings:
	@for script in findings/*.sh; do echo "$$script"; bash $$script || exit 1; done

# What is known against the pinned packages, and the list of them in CycloneDX, runs/sbom.cdx.json. It fails where the advisories
# cannot be asked. The tools have environments of their own, and a package registry brings them.
audit: setup | $(UV)
	$(PY) -m infra.audit $(UV) requirements.lock runs

# Pins every dependency with hashes; run it after changing pyproject.toml.
# The other trackers hold back packages of ours: who wants one installs it beside them.
lock: | $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		$(patsubst %,--extra %,$(subst $(COMMA), ,$(EXTRAS))) pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) $(OLDEST) .uv runs
