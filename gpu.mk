# What is known of the GPU kernels without a GPU, and on one. Included by the Makefile.

.PHONY: gpu gpu-rehearse gpu-check gpu-check-tritons gpu-roofline

# Older ones that pyproject.toml allows; each gets a folder of its own.
TRITONS := 3.5.1 3.6.0 3.7.1 3.8.0

gpu:  ## On a machine with a GPU: build, test and measure with its own Python, in under nine minutes
	$(PYTHON) tools/gpu_run.py $(ARGS)

gpu-rehearse: $(VENV)/test.stamp  ## Every step of `make gpu` without a GPU
	$(RUN) tools/gpu_run.py --rehearse $(ARGS)

gpu-check: $(VENV)/test.stamp  ## Compile every Triton kernel for every kind of GPU and check what comes out
	PYTHONPATH=. $(RUN) tools/gpu_check.py $(ARGS)

gpu-check-tritons: $(VENV)/test.stamp $(TRITONS:%=$(VENV)/triton-%)  ## With older Tritons too: all that waits, of the rest a sample
	for version in $(TRITONS); do \
	    export PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version:.; \
	    $(RUN) -m pytest -n0 tests/test_gpu_launch.py && \
	    $(RUN) tools/gpu_check.py --waiting --target sm_80 --target sm_90 \
	        --write benchmarks/results/gpu_check_triton_$${version%.*}.md $(ARGS) || exit 1; \
	done

$(VENV)/triton-%: | $(VENV)/test.stamp
	$(PIP) install --no-deps --target $@ triton==$*

gpu-roofline: $(VENV)/test.stamp  ## Predict what an H100 gives
	PYTHONPATH=. $(RUN) tools/gpu_roofline.py --write benchmarks/results/gpu_roofline.md $(ARGS)
