# Three commands from a fresh clone; each makes .venv and installs what it needs on first use, nothing global.
#   make train                 the whole job on the CPU, then runs/toy/report.md      make train ARGS="--seed 7 --run runs/seven"
#   make rl                    after that: zero-vision SFT, joint RL, RFT of that model, then runs/rl/report.md
#   make test                  all tests                                              make test ARGS="tests/test_moe.py"

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train rl test

train: .venv/ready-to-train
	.venv/bin/python train_small.py $(ARGS)

rl: .venv/ready-to-train
	.venv/bin/python train_small.py rl $(ARGS)

test: .venv/ready-to-test
	.venv/bin/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready-to-train: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) . && rm -rf build k25.egg-info
	touch $@

.venv/ready-to-test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) ".[test]" && rm -rf build k25.egg-info
	touch $@ .venv/ready-to-train
