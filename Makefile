# make demo   trains the whole chain on this machine's CPU and leaves a report
# make bench  runs the benchmarks of the CPU at small sizes, 15 minutes, and prints the table
# make docs   builds the documentation in site/
# make test   runs the tests        make lint   ruff and the type checker
# make test-distributed   trains in every layout on two processes, with DeepSpeed in an environment
#                         of its own (half an hour); RECEIPTS=benchmarks/receipts records the runs
# make test-engines   runs servers, vLLM, trackers, lm_eval, lighteval and llama.cpp, with 3 GB of
#                     packages in an environment of their own (15 minutes); RECEIPTS likewise
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Errors only: some mirrors make pip warn at every package.
INSTALL := -m pip install -qq --disable-pip-version-check
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo bench docs test test-distributed test-engines lint setup clean

demo: setup
	$(BIN)/chainforge run recipes/quickstart/chain.yaml

bench: export BENCH_RESULTS := bench
bench: setup bench/lm_eval/ready
	$(BIN)/python $(INSTALL) datasketch psutil
	$(BIN)/python benchmarks/startup.py --chain bench/runs --runs 3 --steps 2
	$(BIN)/python benchmarks/overhead.py --chain bench/runs --runs 3 --sft_steps 60 --rl_steps 4
	$(BIN)/python benchmarks/rejection_sampling.py --model bench/runs/quickstart/cold_start/model \
		--prompts 150 --naive_prompts 16 --repeats 3
	$(BIN)/python benchmarks/rewards.py --rows 1024 --out bench/rewards.json
	$(BIN)/python benchmarks/collector.py --repeats 2
	$(BIN)/python benchmarks/builder.py --rows 40000 --peer_rows 4000 --runs 2 --work bench/builder
	$(BIN)/python benchmarks/lost_work.py --chain bench/runs --kills 1
	$(BIN)/python benchmarks/busy.py --chain bench/runs --runs 1 --quiet_steps 60 --busy_steps 10
	$(BIN)/python benchmarks/evaluation.py --chain bench/runs --models cold_start --runs 2 \
		--python bench/lm_eval/bin/python
	$(BIN)/python benchmarks/table.py

docs: setup
	$(BIN)/mkdocs build --strict

# An environment over the other one, whose packages pip finds there.
bench/lm_eval/ready: $(VENV)/ready
	$(BIN)/python -m venv bench/lm_eval
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> `bench/lm_eval/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/base.pth
	bench/lm_eval/bin/python $(INSTALL) --constraint constraints.txt lm_eval==0.4.13
	touch $@

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-distributed: .venv-distributed/ready
	.venv-distributed/bin/python -m pytest tests/distributed

test-engines: .venv-engines/ready
	.venv-engines/bin/python -m pytest tests/engines

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing ChainForge and its packages into $(VENV), which takes some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

.venv-distributed/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-distributed
	.venv-distributed/bin/python $(INSTALL) \
		--constraint constraints.txt --editable '.[dev,deepspeed]'
	touch $@

# torchvision is built for CUDA, and beside a CPU's torch it breaks the import of transformers.
# lighteval needs an older latex2sympy2_extended and xxhash, so it has a folder of its own.
# Its own tasks reach for the Hub when it loads them; none is run here.
.venv-engines/ready: pyproject.toml constraints.txt tests/engines/requirements.txt
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python $(INSTALL) \
		--constraint constraints.txt --editable '.[dev]' --requirement tests/engines/requirements.txt
	.venv-engines/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-engines/bin/python $(INSTALL) --no-deps \
		--target .venv-engines/lighteval lighteval==0.13.0 latex2sympy2_extended==1.0.6 \
		xxhash==3.6.0
	find .venv-engines/lighteval/lighteval/tasks/tasks -mindepth 1 -delete
	.venv-engines/bin/python $(INSTALL) \
		aenum==3.1.15 colorlog GitPython inspect-ai==0.3.285 langcodes pycountry termcolor==2.3.0
	touch $@

clean:
	rm -rf $(VENV) .venv-distributed .venv-engines runs site
