# What continuous integration runs, by name. `make test` does its own set-up on Debian and Ubuntu.

CARGO ?= cargo
DENY_VERSION := 0.20.2
TOOLS := $(CURDIR)/target/tools

.PHONY: all setup test unit check fmt clippy doc deny advisories demo

all: check

## setup: install what the tests need besides Rust (QEMU, guest kernels, promtool, tshark, Chromium); does nothing if it is there
setup:
	sh tests/setup.sh

## test: set up, then run every test, the real guests under QEMU included
test: setup
	$(CARGO) test --locked

## unit: the tests that need nothing but Rust
unit:
	$(CARGO) test --locked --lib --test architecture --test config --test session

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
