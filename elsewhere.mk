# fastnn on other processors and systems, by other compilers and beside other torches (tools/elsewhere.py). Included by
# the Makefile. ARGS=--all runs all of an emulated processor's tests, and what follows -- is for pytest.

.PHONY: test-aarch64 test-baseline test-clang test-torches check-macos

test-aarch64: $(VENV)/test.stamp  ## Build for 64-bit ARM, count instructions, run the models and a sample of tests emulated
	$(RUN) tools/elsewhere.py aarch64 $(ARGS)

test-baseline: $(VENV)/test.stamp  ## Run the models and a sample of tests as on x86-64 without AVX
	$(RUN) tools/elsewhere.py baseline $(ARGS)

test-clang: $(VENV)/test.stamp  ## Build by clang (CXX=clang++-19: by that one) and run the operators' tests
	$(RUN) tools/elsewhere.py clang $(ARGS)

test-torches: $(VENV)/venv.stamp  ## Run all tests beside the oldest and the newest torch
	$(RUN) tools/elsewhere.py torches $(ARGS)

check-macos: $(VENV)/test.stamp  ## Compile and link for macOS on ARM
	$(RUN) tools/elsewhere.py macos $(ARGS)
