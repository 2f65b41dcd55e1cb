# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash
# What the scripts here share; sourced. NAME (the script's name in its messages) is set by the caller.

say() { printf '%s: %s\n' "$NAME" "$*"; }

# Ends the script with the one line that says what went wrong; it is always the last one. It names the scenario,
# where there is one.
fail() {
    on_failure
    printf '%s: FAILED: %s\n' "$NAME" "${SCENARIO:+$SCENARIO: }${*//$'\n'/ }"
    exit 1
}

# A command that nobody expected to fail ends the script the same way.
set -E
trap 'fail "\"$BASH_COMMAND\" failed (line $LINENO of ${BASH_SOURCE[0]##*/})"' ERR

# What to show before that line; a script with logs to show replaces it.
on_failure() { :; }

# Runs a command as root: directly when we are, through sudo when we are not.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        fail "\"$1\" needs root: run this as root, or install sudo"
    fi
}

# rustup's own directory is not on the PATH of a shell that was not logged in since the installation.
find_cargo() {
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    command -v cargo >/dev/null ||
        fail "no cargo for user \"$(id -un)\": install a Rust toolchain for that user (and do not start this with sudo: it asks for it)"
}

# The directory cargo builds into, which may be anywhere.
target_directory() {
    cargo metadata --format-version 1 --no-deps --offline 2>/dev/null |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}
