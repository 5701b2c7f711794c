# conbd: what a developer types. `make help` lists it.
#
# Every cargo call is --locked: Cargo.lock is the truth about dependencies.

CARGO ?= cargo
# The engine that builds and runs images: the first of these that is installed.
CONTAINER ?= $(firstword $(foreach e,docker podman buildah,$(if $(shell command -v $(e) 2>/dev/null),$(e))))
IMAGE ?= conbd:latest

.DEFAULT_GOAL := help
.PHONY: help build run test build-deps test-deps test-kernel test-foreign test-container quick fuzz checklist fmt lint doc man bench bench-micro bench-count docker clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: build-deps ## Build the release binary: target/release/conbd
	$(CARGO) build --release --locked

run: build ## Serve a demo disk on loopback, and print its URI and what to try
	@scripts/demo.sh

test: ## Everything CI runs: tools, formatting, lints, docs, all tests, man pages
	@scripts/test.sh

build-deps: ## Install what the build needs beside Rust (apt, as root), if missing
	@scripts/build-deps.sh

test-deps: build-deps ## Install the clients that the tests drive (apt, as root), if missing
	@scripts/test-deps.sh

quick: build-deps ## The tests that need no other program
	$(CARGO) test --locked --lib --bins --test it

SECONDS ?= 60
fuzz: build-deps ## Mutate dialogues of real clients for SECONDS (60) and see what the NBD code makes of them
	CONBD_FUZZ_SECONDS=$(SECONDS) $(CARGO) test --locked --test it nbd_fuzz -- --nocapture

checklist: build-deps ## Write docs/protocol.md from tests/it/nbd_checklist.rs
	CONBD_WRITE_CHECKLIST=1 $(CARGO) test --locked --test it nbd_checklist

fmt: ## Format the code
	$(CARGO) fmt --all

lint: build-deps ## clippy, warnings are errors
	$(CARGO) clippy --locked --all-targets -- -D warnings

doc: build-deps ## API documentation, warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

man: build-deps ## Regenerate man/ from the command line's definitions and config/conbd.toml
	$(CARGO) run --locked --quiet -- gen-man man

test-kernel: build ## A real Linux kernel and QEMU as clients, in an emulated machine (downloads a kernel)
	@scripts/kernel-test.sh

test-container: build-deps ## The Dockerfile, both stages, with buildah on stand-in bases (as root; minutes; a Debian mirror)
	@scripts/container-test.sh

test-foreign: build ## Test suites of nbd, libnbd and QEMU against conbd, and raw-socket torture; SUITES="torture nbd libnbd iotests"
	@scripts/foreign-test.sh

bench: build ## Compare with the other NBD servers installed, side by side; QUICK=1 for two minutes (docs/performance.md)
	@scripts/bench.py

bench-micro: build-deps ## The criterion benches: co_switch, co_mutex, event_loop, wire, serve (serving in-process)
	$(CARGO) bench --locked

bench-count: build-deps ## Instructions of the hot parts, by valgrind, against benches/counts.json; UPDATE=1 writes that, PARTS="co_switch ..." counts these
	@scripts/test-deps.sh valgrind:valgrind
	@scripts/bench-count.py

docker: ## Build the container image $(IMAGE) with docker, podman or buildah
	@test -n "$(CONTAINER)" || { echo "make docker: none of docker, podman, buildah is installed; install one, or name it: make docker CONTAINER=..." >&2; exit 1; }
	$(CONTAINER) $(if $(filter buildah,$(notdir $(CONTAINER))),build --format docker,build) -t $(IMAGE) .

clean: ## Remove what was built
	$(CARGO) clean
