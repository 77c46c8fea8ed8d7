# make demo: train on handwritten digits and look at what the model draws, in minutes.
# make test: the test suite; make test-everywhere: as it runs on other CPUs, too.
# Both set up .venv first, once; the demo without the extras.

PYTHON ?= python3
BIN := .venv/bin
RUN := digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-everywhere slow lint

demo: .venv/ready
	$(BIN)/python train.py configs/digits.yml --run-name $(RUN)
	$(BIN)/python sample.py lightning_logs/$(RUN) --class-label all --num-images 8 --output-dir samples/$(RUN)
	@echo
	@echo "images:      samples/$(RUN)/grid.png"
	@echo "checkpoint:  lightning_logs/$(RUN)/checkpoints/last.ckpt"
	@echo "TensorBoard: $(BIN)/tensorboard --logdir lightning_logs"
	@echo "next:        $(BIN)/python sample.py lightning_logs/$(RUN) --class-label 3 --num-images 8 --output-dir samples/threes"

test: .venv/tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-everywhere: .venv/tests
	tests/everywhere.sh $(BIN)/python

slow: .venv/tests
	$(BIN)/python -m pytest -m slow

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed, this is %d.%d: make PYTHON=/path/to/python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/tests: .venv/ready requirements-extras.txt requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
