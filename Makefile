# The recipes people and CI run alike. `make help` lists them.
# Set-up installs what is missing (apt, as root or through sudo) and does nothing the second time.
SHELL := /bin/bash
.DEFAULT_GOAL := help
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Beside the tests it runs only when asked for: make campaign ROUNDS=10 (a round takes half an hour and more on 2 cores)
ROUNDS ?= 3

.PHONY: help demo test campaign fuzz build bench lint fmt clean setup

help: ## What there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

demo: ## Boot an image, look around, stop, start, delete; needs root or sudo
	@scripts/setup.sh packages kernel image
	@$(MAKE) --no-print-directory build
	@scripts/demo.sh

test: ## Everything: lint, unit, property, end-to-end and SDK tests
	@scripts/test.sh

campaign: ## All kill -9, power loss, fault and property tests for ROUNDS rounds
	@scripts/setup.sh
	@$(MAKE) --no-print-directory build
	@scripts/campaign.sh $(ROUNDS)

fuzz: ## What is read from compressed memory, 10 minutes each of input nobody would write; needs nightly and cargo-fuzz
	@scripts/fuzz.sh

build: ## target/release/doze, guest program inside
	@scripts/setup.sh packages
	cargo build --release --locked -p doze
	@echo "built $(TARGET)/release/doze"

bench: ## Boot, standby, copies, the server's footprint, connection tracking, and the codec beside zstd and lz4
	@scripts/setup.sh packages kernel image
	@$(MAKE) --no-print-directory build
	@scripts/bench.sh

lint: ## rustfmt, clippy, dependency direction, cargo-deny
	@scripts/setup.sh packages deny
	@scripts/lint.sh

fmt: ## Format everything
	cargo fmt --all

clean: ## Remove what was built and fetched
	cargo clean
	rm -rf .cache

setup: ## System packages, kernel, demo image, SDK clients
	@scripts/setup.sh
