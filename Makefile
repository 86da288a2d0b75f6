# Two commands do all set-up by themselves: `make run` and `make test`. `make help` lists the others.

VIDEO ?=
OUTPUT ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
export PYTHONPATH := $(CURDIR)

.PHONY: help run test setup ui notebook bench lint format lock docs-check infra clean
.DEFAULT_GOAL := help

help:
	@echo "make run [VIDEO=path] [OUTPUT=path] [ARGS='--scale 4']   upscale a video (a sample clip by default)"
	@echo "make test         all tests        make lint    ruff and mypy      make bench   benchmarks"
	@echo "make setup        environment      make format  ruff format        make lock    renew requirements.lock"
	@echo "make ui           Prefect UI       make notebook  JupyterLab          make docs-check  README commands as written"
	@echo "make infra        templates and pages of the AWS installation, checked"
	@echo "make clean        removes what was made"

setup: $(READY)

$(READY): requirements.lock pyproject.toml deployments/environment.sh
	@sh deployments/environment.sh

run: $(READY)
	@sh deployments/run.sh "$(VIDEO)" "$(OUTPUT)" $(ARGS)

# Two files at a time: many tests wait for processes to start.
test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --durations 25

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python tests/benchmarks/whole_job.py

ui: $(READY)
	$(BIN)/python -m deployments.local_ui

# JupyterLab refuses to run as root unless it is told to; it listens to this machine alone.
notebook: $(READY)
	$(BIN)/jupyter lab --ip 127.0.0.1 --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

docs-check: $(READY)
	$(BIN)/python -m tests.readme_commands

# Renews what is made from the stacks, and checks it. CDK has an environment of its own.
infra: $(READY)
	@sh infra/aws/environment.sh
	$(BIN)/python -m infra.aws.synthesis
	$(BIN)/python docs/make_aws_docs.py
	$(BIN)/pytest -q tests/infra/aws/test_synthesis.py tests/infra/aws/test_templates.py tests/infra/aws/test_docs.py

# Resolves pyproject.toml anew. torch is not in the lock: deployments/environment.sh installs the build for the machine.
lock: $(READY)
	$(BIN)/pip install --quiet "uv>=0.9"
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra notebooks --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-annotate --no-header --quiet -o requirements.lock
	@sed -i '1i # Made by "make lock"; do not edit. torch is installed apart, in the build that fits the machine.' requirements.lock
	@sh infra/images/lock.sh

clean:
	rm -rf .venv infra/aws/.venv infra/aws/cluster/.venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache output
