# What continuous integration runs, by name. `make test` does its own set-up on Debian and Ubuntu.

CARGO ?= cargo
DENY_VERSION := 0.20.2
FUZZ_VERSION := 0.13.2
# What we are measured against.
PEER_VERSION := 0.3.0
# How long the soak takes.
MINUTES ?= 60
# A fuzz target, and for how many seconds it runs.
TARGET ?= gate
SECONDS ?= 600
FUZZ_TARGETS := capture config connect_line gate header muxer proxy rx_placement session tx_chains
# The session says what the gate hears.
CORPUS = $(if $(filter session,$(TARGET)),gate,$(TARGET))
TOOLS := $(CURDIR)/target/tools

# Lines of the bench, by part of their name (make bench ONLY=trip), and more for it (ARGS="--rounds 11").
ONLY ?=
ARGS ?=

.PHONY: all setup test unit vsock-test check fmt clippy doc deny advisories bench bench-quick bench-guest bench-micro peer demo fuzz fuzz-all hostile-figures soak

all: check

## setup: install what the tests need besides Rust (QEMU, guest kernels, promtool, tshark, Chromium); does nothing if it is there
setup:
	sh tests/setup.sh

## test: set up, then run every test, the real guests under QEMU included
test: setup
	$(CARGO) test --locked

## unit: the tests that need nothing but Rust
unit:
	$(CARGO) test --locked --lib --test architecture --test config --test fuzz --test hostile --test panics --test probe --test session --test webhook

## vsock-test: Linux's own tests of vsock between two guests of one sidecar (docs/linux-vsock-test.md), with figures
vsock-test: setup
	$(CARGO) test --locked --test vsock_test -- --nocapture

## check: everything that continuous integration runs
check: test fmt clippy doc deny

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

## deny: licences, duplicate and banned crates, sources
deny: $(TOOLS)/bin/cargo-deny
	$(TOOLS)/bin/cargo-deny --locked check bans licenses sources

## advisories: known vulnerabilities; needs the advisory database from the network
advisories: $(TOOLS)/bin/cargo-deny
	$(TOOLS)/bin/cargo-deny --locked check advisories

$(TOOLS)/bin/cargo-deny:
	CARGO_TARGET_DIR=$(TOOLS)/build $(CARGO) install --locked --quiet --root $(TOOLS) --no-default-features \
		--version $(DENY_VERSION) cargo-deny
	rm -rf $(TOOLS)/build

## demo: the whole program in one process
demo:
	$(CARGO) run --release -- demo

## bench: how fast it is, as ratios against a plain client and vhost-device-vsock (docs/performance.md); half an hour
bench: peer
	$(CARGO) bench --locked --bench speed -- $(addprefix --only ,$(ONLY)) $(ARGS)

## bench-quick: the most important lines of it, in less than three minutes
bench-quick: peer
	$(CARGO) bench --locked --bench speed -- --quick $(addprefix --only ,$(ONLY)) $(ARGS)

## bench-guest: against vhost-device-vsock with real Linux guests under QEMU; less than five minutes
bench-guest: peer
	$(CARGO) bench --locked --bench guest -- $(addprefix --only ,$(ONLY)) $(ARGS)

## bench-micro: headers, the muxer, the ring, credit; each by itself
bench-micro:
	$(CARGO) bench --locked --bench micro

## peer: install vhost-device-vsock, as a program to compare with
peer: $(TOOLS)/peer/bin/vhost-device-vsock

$(TOOLS)/peer/bin/vhost-device-vsock:
	CARGO_TARGET_DIR=$(TOOLS)/build $(CARGO) install --locked --quiet --root $(TOOLS)/peer --version $(PEER_VERSION) vhost-device-vsock
	rm -rf $(TOOLS)/build

## hostile-figures: what floods of one guest cost another, as ratios
hostile-figures:
	$(CARGO) bench --locked --bench hostile

## soak: everything at once for MINUTES, in release; fails on a lost byte or a leak (docs/soak.md)
soak:
	SOAK_SECONDS=$$(($(MINUTES) * 60)) $(CARGO) test --locked --release --test soak -- --nocapture

## fuzz: one fuzz target for some time (make fuzz TARGET=session SECONDS=600); needs a nightly compiler
fuzz: $(TOOLS)/bin/cargo-fuzz
	mkdir -p fuzz/corpus/$(TARGET)
	cd fuzz && PATH=$(TOOLS)/bin:$$PATH $(CARGO) +nightly fuzz run --sanitizer none $(TARGET) corpus/$(TARGET) ../tests/corpus/$(CORPUS) \
		-- -max_total_time=$(SECONDS) -max_len=2048 -timeout=60 -rss_limit_mb=1024

## fuzz-all: every fuzz target, one after the other (make fuzz-all SECONDS=600)
fuzz-all:
	set -e; for target in $(FUZZ_TARGETS); do $(MAKE) fuzz TARGET=$$target SECONDS=$(SECONDS); done

$(TOOLS)/bin/cargo-fuzz:
	CARGO_TARGET_DIR=$(TOOLS)/build $(CARGO) install --locked --quiet --root $(TOOLS) --version $(FUZZ_VERSION) cargo-fuzz
	rm -rf $(TOOLS)/build
