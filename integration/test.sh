#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Passes the tests: installs what is missing, then everything from the formatting to a guest on the served image.
# The first step that fails ends it. Root, or sudo. The last line is "test: ok (...)" or "test: FAILED: step".
set -euo pipefail
cd "$(dirname "$0")/.."
NAME="test"
# shellcheck source=integration/lib/common.sh
. integration/lib/common.sh
# shellcheck source=integration/packages.sh
. integration/packages.sh
# shellcheck source=integration/lib/leftovers.sh
. integration/lib/leftovers.sh

# Any newer version will do; these are known to build with the toolchain this is developed on.
NEXTEST_VERSION=0.9.143
DENY_VERSION=0.20.2
SEEDS=10000
CUTS=200
KILLS=20
STARTED=$SECONDS
steps=0

# step NAME COMMAND...: runs it, says how long it took. "set -e" is off inside: functions chain with "&&".
step() {
    local what=$1 began=$SECONDS
    shift
    say "$what …"
    "$@" || fail "$what (after $((SECONDS - began)) s)"
    say "$what: $((SECONDS - began)) s"
    steps=$((steps + 1))
}

# A minimal toolchain comes without these two.
install_components() {
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 && return
    command -v rustup >/dev/null || fail "cargo fmt and cargo clippy are missing: install rustfmt and clippy for this toolchain"
    rustup --quiet component add rustfmt clippy
}

# install_tool CRATE VERSION OPTION...: built in place, unoptimised since that is quicker than it will ever save.
install_tool() {
    local crate=$1 version=$2
    shift 2
    ! cargo "${crate#cargo-}" --version >/dev/null 2>&1 || return 0
    CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$target/tools \
        cargo install --quiet --locked --debug --version "$version" "$@" "$crate" &&
        rm -rf "$target/tools"
}

install_tools() {
    install_components &&
        install_tool cargo-nextest "$NEXTEST_VERSION" --no-default-features --features default-no-update &&
        install_tool cargo-deny "$DENY_VERSION"
}

check_scripts() {
    shellcheck --external-sources integration/*.sh integration/lib/*.sh integration/scenarios/*.sh .ci/run &&
        shellcheck --external-sources --shell=sh resources/guest/*
}

check_documentation() {
    RUSTDOCFLAGS="-D warnings --allow rustdoc::private_intra_doc_links" cargo doc --quiet --locked --workspace --all-features --no-deps --document-private-items
}

# Tests that need loop devices run as root; as anybody else each test binary goes through sudo.
run_tests() {
    if [ "$(id -u)" -ne 0 ]; then
        local host
        host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
        export "CARGO_TARGET_${host}_RUNNER=sudo --preserve-env --"
    fi
    cargo nextest run --locked --workspace --all-features
}

# Other seeds each time: no run proves more by going where the last one went. It prints its base, which SIM_BASE sets.
simulate() {
    local base
    base=${SIM_BASE:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
    cargo run --quiet --release --locked --package integration -- \
        sim --base "$base" --seeds "$SEEDS"
}

exhaust() {
    cargo run --quiet --release --locked --package integration -- sim --exhaustive
}

# The daemon that is shipped, built by itself: together with the test tool it would get the tool's feature.
build_extentd() {
    cargo build --quiet --release --locked --package extentd --bin extentd
}

guard() {
    build_extentd &&
        cargo run --quiet --release --locked --package integration -- guard --extentd "$target/release/extentd"
}

crash_hosts() {
    build_extentd &&
        cargo run --quiet --release --locked --package integration -- \
            crash --cuts "$CUTS" --kills "$KILLS" --extentd "$target/release/extentd"
}

# A harness that cannot lose proves nothing: without this rule it has to.
crash_mutant() {
    cargo run --quiet --release --locked --package integration -- \
        crash --cuts "$CUTS" --kills "$KILLS" --mutant "$1"
}

find_cargo
install_packages "${PACKAGES_TEST[@]}"
target=$(target_directory)
: "${target:?}"
remember_attached
step "tools" install_tools
step "formatting" cargo fmt --all --check
step "scripts" check_scripts
step "clippy" cargo clippy --quiet --locked --workspace --all-targets --all-features -- -D warnings
# The fourth check, advisories, would need a database from the network: see deny.toml.
step "licences, bans and sources" cargo deny --log-level error check licenses bans sources
step "documentation" check_documentation
step "unit and device tests" run_tests
step "documentation tests" cargo test --quiet --locked --workspace --doc
step "simulator" simulate
step "every interleaving of small scripts" exhaust
step "what the hot path may cost" guard
step "coverage of the core" integration/coverage.sh
step "power cuts and kills" crash_hosts
step "power cuts notice a missing fdatasync" crash_mutant no-metadata-fsync
step "the canary notices a discard that does not wait" crash_mutant no-drain
step "guest" integration/boot.sh
step "what a guest may do" integration/guest.sh
step "nothing left behind" nothing_left
say "ok (steps=$steps, seconds=$((SECONDS - STARTED)))"
