# Every target sets up what it needs in .venv and is quick when called again.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# A pip that an environment variable points elsewhere would install outside .venv.
PIP := env -u PIP_TARGET -u PIP_PREFIX -u PIP_USER $(PY) -m pip install --quiet --disable-pip-version-check
DEMO_DIR ?= out/demo
OPERATORS := mean_pool cosine_similarity cosine_topk mnrl_loss mnrl_options packed_attention \
	dropout_add_layer_norm embedding_layer_norm bias_gelu layer_norm_mean_pool bert_layer
OPERATOR_TESTS := $(patsubst %,tests/test_%.py,packed_attention dropout_add_layer_norm embedding_layer_norm bias_gelu \
	layer_norm_mean_pool philox mean_pool cosine_similarity cosine_topk mnrl_loss)

.PHONY: help demo test clients sanitize check bench kernels gpu clean
help:
	@echo 'make demo     train, evaluate, save and use the reference encoder on the built-in data'
	@echo 'make test     all tests'
	@echo 'make clients  tests with KeyBERT, BERTopic, mteb and LangChain, which it installs'
	@echo 'make sanitize tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make check    lint, formatting and types'
	@echo 'make bench    benchmarks against sentence-transformers and PyTorch; writes bench/results/ and README.md;'
	@echo '              with DATA=folder of texts, PEERS=folder for other runtimes (set up there), encode as well'
	@echo 'make kernels  compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942 and check the machine code'
	@echo 'make gpu      operator tests and benchmarks on the GPU of this machine'
	@echo 'make clean    remove .venv and what was built or trained'
	@echo 'TORCH="torch==x.y" chooses another torch (now: $(TORCH)); PYTHON=... another interpreter'

# torch goes first and alone, so that the build that TORCH names is the one that stays.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[plots]'
	@touch $@

$(VENV)/.tools: $(VENV)/.runtime
	$(PIP) --editable '.[plots,test,check]'
	@touch $@

demo: $(VENV)/.runtime
	$(PY) -m triton_st train --fp16 --learning-rate 2e-3 --output-dir $(DEMO_DIR) --overwrite-output-dir

# One thread for each of as many processes as there are cores: tests of threads ask for their own.
test: $(VENV)/.tools
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

clients: $(VENV)/.tools
	$(PIP) --editable '.[plots,test,check,clients]'
	$(PY) -m pytest tests/test_clients.py

# Needs g++ with libasan and libubsan, which come with it on most systems. They are loaded before Python, which knows
# nothing of them; what Python itself never frees is not reported. The kernels are built apart, with these flags.
SANITIZERS = $(foreach name,libasan libubsan libstdc++,$(shell g++ -print-file-name=$(name).so))
sanitize: $(VENV)/.tools
	TRITON_ST_CXXFLAGS='-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer' \
	LD_PRELOAD='$(SANITIZERS)' ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PY) -m pytest -k 'not triton and not reference' $(OPERATOR_TESTS) tests/test_bert_layer.py tests/test_mnrl_loss_cpp.py

check: $(VENV)/.tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.tools
	$(PY) -m pytest bench --benchmark-only --benchmark-json=bench/results/bench.json
	$(if $(PEERS),$(PY) -m bench.encode_peers $(PEERS) --data $(DATA))
	$(if $(PEERS),$(PY) -m bench.encode --data $(DATA) --peers $(PEERS))
	$(PY) -m bench.report
	$(PY) -m bench.readme

kernels: $(VENV)/.tools
	$(PY) -m triton_st.kernels.aot

gpu: $(VENV)/.tools
	TRITON_ST_TEST_DEVICE=cuda $(PY) -m pytest $(OPERATOR_TESTS)
	TRITON_ST_TEST_DEVICE=cuda $(PY) -m pytest bench --benchmark-only

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
