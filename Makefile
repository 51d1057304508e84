# The commands that this project promises; `make help` lists them.
# Cargo needs no other. Servers for tests and demo run on free ports of 127.0.0.1 and end with the command.

CONFIG ?= configs/embedded.toml
PROFILE ?= dev
ARGS ?=

# What a configuration of ours takes besides itself. Any other names servers of its own.
SERVERS_configs/rabbitmq.toml := postgres rabbitmq
SERVERS_configs/nats.toml := postgres nats
SERVERS := $(SERVERS_$(patsubst ./%,%,$(CONFIG)))

# Where cargo puts programs, also when CARGO_TARGET_DIR or a configuration file moves it. Asked only when needed.
TARGET = $(shell cargo metadata --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
programs = $(TARGET)/$(patsubst dev,debug,$(1))
servers = $(call programs,$(1))/pillarbox-servers

.DEFAULT_GOAL := help
.PHONY: help demo run test soak simulate bench bench-long check

## help       this list
help:
	@sed -n 's/^## /make /p' Makefile

## demo       both services, one process, one minute: CONFIG=configs/embedded.toml (default), configs/rabbitmq.toml, configs/nats.toml
demo: PROGRAM := demo
demo: shop-program

## run        both services until Ctrl-C, with the same CONFIG
run: PROGRAM := shop
run: shop-program

# One build for both programs: two would compile the database driver twice, with different features.
.PHONY: shop-program
shop-program:
	cargo build --profile $(PROFILE) -p pillarbox-shop $(if $(SERVERS),-p pillarbox-testkit) --bins
ifeq ($(SERVERS),)
	$(call programs,$(PROFILE))/$(PROGRAM) --config $(CONFIG) $(ARGS)
else
	$(call servers,$(PROFILE)) --demo $(SERVERS) -- $(call programs,$(PROFILE))/$(PROGRAM) --config $(CONFIG) $(ARGS)
endif

## test       installs missing test servers (SETUP=no forbids it), then runs all tests: one seed of each fault test
test: export PILLARBOX_REQUIRE_SERVERS = 1
test:
	testkit/install-servers.sh
	cargo test --workspace --no-run
	$(call servers,dev) postgres rabbitmq nats -- cargo test --workspace $(ARGS)

## soak       the same tests with many seeds and long cases: PILLARBOX_SOAK=1, optimised
soak: export PILLARBOX_REQUIRE_SERVERS = 1
soak: export PILLARBOX_SOAK = 1
soak:
	testkit/install-servers.sh
	cargo test --workspace --release --no-run
	$(call servers,release) postgres rabbitmq nats -- cargo test --workspace --release $(ARGS) -- --nocapture

## simulate   the deterministic simulation for long: SEEDS=1000000 (default), FROM=0, PROFILE=release; a failing seed prints its command
simulate: export PILLARBOX_SEEDS = $(or $(SEEDS),1000000)
simulate: export PILLARBOX_FROM = $(or $(FROM),0)
simulate:
	cargo test --profile $(PROFILE) -p pillarbox-core --all-features --lib -- --nocapture simulation::tests::a_

## bench      measures the relay against a raw client, and the consumer with batches and workers
bench:
	testkit/install-servers.sh
	cargo build --release -p pillarbox-benches -p pillarbox-testkit --bins
	$(call servers,release) postgres rabbitmq -- $(call programs,release)/pillarbox-benches $(ARGS)

## bench-long what takes long to measure, about an hour, one after the other, into REPORT=docs/benchmarks (a text and a plot)
bench-long: REPORT ?= docs/benchmarks
bench-long:
	testkit/install-servers.sh
	cargo build --release -p pillarbox-benches -p pillarbox-testkit --bins
	$(call servers,release) postgres rabbitmq -- benches/long.sh $(call programs,release)/pillarbox-benches $(REPORT)

## check      format, lints and documentation, as CI asks for them
check: export RUSTDOCFLAGS = -D warnings
check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo doc --workspace --no-deps
