# What is known of the GPU kernels without a GPU, and on one. Included by the Makefile.

.PHONY: gpu gpu-rehearse gpu-check gpu-roofline tune

gpu:  ## On a machine with a GPU: build, test and measure with its own Python, in under nine minutes
	$(PYTHON) tools/gpu_run.py $(ARGS)

gpu-rehearse: $(VENV)/test.stamp  ## Every step of `make gpu` without a GPU
	$(RUN) tools/gpu_run.py --rehearse $(ARGS)

gpu-check: $(VENV)/test.stamp  ## Compile every Triton kernel for every kind of GPU and check what comes out
	PYTHONPATH=. $(RUN) tools/gpu_check.py $(ARGS)

gpu-roofline: $(VENV)/test.stamp  ## Predict what an H100 gives
	PYTHONPATH=. $(RUN) tools/gpu_roofline.py --write benchmarks/results/gpu_roofline.md $(ARGS)

tune:  ## On a machine with a GPU: look for faster configurations and write them to fastnn/kernels/tuned.json
	PYTHONPATH=. $(PYTHON) tools/gpu_tune.py $(ARGS)
