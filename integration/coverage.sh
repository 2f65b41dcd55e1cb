#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# How much of the pure core its own unit tests and the simulator reach. Fails below 95 % of lines and names those
# that nothing reached. The last line is "coverage: src/engine N% of lines". Not a step of test.sh: the compiler's
# own llvm-tools have to be there, and a toolchain without rustup cannot fetch them.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME="coverage"
# shellcheck source=integration/lib/common.sh
. integration/lib/common.sh

LEAST=95
SEEDS=${SEEDS:-300}

find_cargo
target=$(target_directory)
: "${target:?}"

# The compiler's counts can be read by the LLVM it was built with, and by little else.
tools=$(rustc --print target-libdir)/../bin
if ! [ -x "$tools/llvm-cov" ] || ! [ -x "$tools/llvm-profdata" ]; then
    command -v rustup >/dev/null || fail "llvm-cov of this compiler is missing, and there is no rustup to fetch it"
    rustup --quiet component add llvm-tools
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Only what is of this workspace counts lines: what it depends on need not be built again for it.
CARGO_TARGET_DIR=$target/coverage
RUSTC_WORKSPACE_WRAPPER=$CARGO_TARGET_DIR/rustc
export CARGO_TARGET_DIR RUSTC_WORKSPACE_WRAPPER
mkdir -p "$CARGO_TARGET_DIR"
printf '#!/bin/sh\nexec "$@" -C instrument-coverage\n' >"$RUSTC_WORKSPACE_WRAPPER"
chmod +x "$RUSTC_WORKSPACE_WRAPPER"

# executable KIND NAME CARGO-ARGUMENT...: builds and names the program.
executable() {
    local kind=$1 name=$2
    shift 2
    cargo "$@" --quiet --locked --message-format=json |
        sed -n "s/.*\"kind\":\[\"$kind\"\].*\"name\":\"$name\".*\"executable\":\"\([^\"]*\)\".*/\1/p" | tail -n 1
}

say "building …"
tests=$(executable lib extentd test --no-run --package extentd --lib)
program=$(executable bin integration build --package integration --bin integration)
[ -x "$tests" ] || fail "the unit tests were not built"
[ -x "$program" ] || fail "the simulator was not built"

say "unit tests and simulator …"
LLVM_PROFILE_FILE=$work/run-%p-%m.profraw "$tests" --quiet engine:: >"$work/tests.log" ||
    fail "the unit tests failed: $(tail -n 20 "$work/tests.log")"
LLVM_PROFILE_FILE=$work/run-%p-%m.profraw "$program" sim --seeds "$SEEDS" >"$work/sim.log" || true
grep -q 'violations=0' "$work/sim.log" || fail "the simulator failed: $(tail -n 20 "$work/sim.log")"

"$tools/llvm-profdata" merge --sparse --output="$work/all.profdata" "$work"/run-*.profraw
"$tools/llvm-cov" export --format=lcov --instr-profile="$work/all.profdata" \
    --ignore-filename-regex='_tests\.rs$|/testing\.rs$' \
    --object="$tests" --object="$program" --sources src/engine >"$work/lines"

# The same line counts once, in whichever program it was reached.
awk -v least="$LEAST" '
    /^SF:/ { sub(/^SF:/, ""); sub(/^.*\/src\/engine\//, ""); file = $0 }
    /^DA:/ { sub(/^DA:/, ""); split($0, part, ","); key = file ":" part[1]; hits[key] += part[2] }
    END {
        for (key in hits) {
            total++
            if (hits[key] > 0) reached++; else print "not reached: src/engine/" key | "sort -t: -k2,2 -k3,3n"
        }
        close("sort -t: -k2,2 -k3,3n")
        percent = total ? 100 * reached / total : 0
        printf "coverage: src/engine %.1f%% of lines\n", percent
        exit percent < least
    }' "$work/lines" || fail "less than $LEAST %: see the lines above"
