# make live   set everything up in .venv, then drive and explain until Ctrl-C
# make test   set everything up, then run every check and test
# make quick  the checks and the fast tests, in two minutes
# make setup  the shared first half of all; a second run takes seconds
# make licences   list the licence of every package that is installed

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell command -v python$(v) 2>/dev/null)) $(shell command -v python3 2>/dev/null))
LIVE_ARGS ?=

.PHONY: setup live test quick check bench clean

setup: $(VENV)/.installed ros2_ws/install/.built

$(VENV)/.installed: requirements/base.txt requirements/ros.txt setup.py
	@test -n "$(PYTHON)" || { echo "No Python found; install Python 3.10, 3.11 or 3.12 (Debian, Ubuntu: apt install python3 python3-venv python3-dev)." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { echo "$(PYTHON) is $$($(PYTHON) -V); carla_digr needs Python 3.10 to 3.12: install one and run make PYTHON=python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; install the package python3-venv." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "The headers of $(PYTHON) are missing; install the package python3-dev." >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "No C++ compiler found; install the package g++." >&2; exit 1; }
	@test -d $(VENV) || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the pinned dependencies (a few minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/base.txt -r requirements/ros.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.tools: $(VENV)/.installed requirements/test.txt requirements/atari.txt requirements/ray.txt
	@echo "Installing what tests and checks need"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/test.txt
	@touch $@

# Launch files and configs are installed with the package, so a new one asks for a new build too.
ROS_SOURCES := $(shell find ros2_ws/src ros2_ws/wheels ros2_ws/cmake launch configs -type f -not -path '*/__pycache__/*' 2>/dev/null)

# As a drive's first start would, which comes up at once then; the code lies in the user's cache.
COMPILE := from carla_digr.simulator.server import Server; Server('127.0.0.1', 0, all_sensors=False)

ros2_ws/install/.built: $(VENV)/.installed $(ROS_SOURCES)
	@echo "Building the ROS 2 workspace and compiling the embedded highway"
	@mkdir -p ros2_ws/log
	@$(BIN)/python -c "$(COMPILE)" & compiling=$$!; AMENT_PREFIX_PATH="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/colcon --log-base ros2_ws/log build \
		--symlink-install --base-paths ros2_ws/src ros2_ws/wheels --build-base ros2_ws/build --install-base ros2_ws/install \
		--event-handlers console_direct- --cmake-args -DBUILD_TESTING=OFF \
		-DCMAKE_PROJECT_INCLUDE="$(CURDIR)/ros2_ws/cmake/wheel_targets.cmake" >ros2_ws/log/make.log 2>&1 \
		|| { cat ros2_ws/log/make.log >&2; exit 1; }; wait $$compiling
	@touch $@

live: setup
	@$(BIN)/carla-digr live $(LIVE_ARGS)

check: setup $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Of all that is installed; tests/package/test_licences.py holds those of what a drive needs.
.PHONY: licences
licences: setup $(VENV)/.tools
	$(BIN)/pip-licenses --from=mixed --order=license

# The page is tested in a real browser. As root (a container, a CI machine) it is installed where it is missing.
.PHONY: browser
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium for the browser tests"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "No Chromium found for the browser tests; install the package chromium." >&2; exit 1; fi

# What does not share the clock runs side by side, a file at a time and one thread a process; three, as those over the
# wire wait much. Nodes wait half of their time, so two of them run beside each other, but for those whose pace counts.
# What runs only while nothing else would (SCHED_IDLE) takes minutes beside others, and seconds alone.
# Where two cores were not enough for all, or a neighbour took them, what failed must hold with the machine to itself.
LIVE_TESTS := tests/browser tests/faults tests/ros
TIMED_TESTS := tests/unit/test_hot_paths.py tests/unit/test_questions.py
ALONE_AGAIN := --last-failed --last-failed-no-failures none
tested = $(BIN)/python -m pytest $(1) $(2) || $(BIN)/python -m pytest $(1) $(ALONE_AGAIN)
test: export OMP_NUM_THREADS := 1
test: setup browser check licences
	$(call tested,tests/unit tests/package tests/wire -m "not alone",-n 3 --dist loadfile)
	$(call tested,$(LIVE_TESTS) -m "not alone",-n 2 --dist loadfile)
	$(call tested,$(LIVE_TESTS) $(TIMED_TESTS) -m alone)

quick: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m "not slow" -n 2 --dist loadfile

bench: setup $(VENV)/.tools
	$(BIN)/python -m pytest tests/bench -s

clean:
	rm -rf $(VENV) ros2_ws/build ros2_ws/install ros2_ws/log
