#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# How much of the pure core its own unit tests and the simulator reach. Fails below 95 % of lines, and names those
# that nothing reached. The last line is "coverage: src/engine N% of lines".
#
# kcov counts by the debugger's line table, so that any compiler will do. Everything is linked, also what nobody
# calls, or it would not be in that table; nothing is optimised, or lines would melt into each other.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME="coverage"
# shellcheck source=integration/lib/common.sh
. integration/lib/common.sh
# shellcheck source=integration/packages.sh
. integration/packages.sh

LEAST=95
# What is run, by package: the rules of the core all hold in it.
declare -A RUNS=([extentd]=engine:: [integration]=sim::tests::seeds_hold)

find_cargo
command -v kcov >/dev/null || install_packages kcov
target=$(target_directory)
: "${target:?}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Only what is of this workspace is built anew for it.
export RUSTC_WORKSPACE_WRAPPER=$target/coverage-rustc
mkdir -p "$target"
printf '#!/bin/sh\nexec "$@" -C link-dead-code -C opt-level=0 -C debuginfo=1\n' >"$RUSTC_WORKSPACE_WRAPPER"
chmod +x "$RUSTC_WORKSPACE_WRAPPER"

say "building …"
cargo test --quiet --locked --no-run --workspace --lib --all-features --message-format=json >"$work/built"
for package in "${!RUNS[@]}"; do
    program=$(sed -n "s/.*\"kind\":\[\"lib\"\].*\"name\":\"$package\".*\"executable\":\"\([^\"]*\)\".*/\1/p" "$work/built")
    [ -x "$program" ] || fail "the tests of $package were not built"
    say "$package: ${RUNS[$package]} …"
    kcov --include-path="$PWD/src/engine" --cobertura-only "$work/$package" "$program" --quiet "${RUNS[$package]}" \
        >"$work/log" 2>&1 || fail "the tests of $package: $(tail -n 20 "$work/log")"
    grep -q '^test result: ok\. [1-9]' "$work/log" || fail "no test of $package was run: $(tail -n 20 "$work/log")"
done

# The same line counts once, whichever program reached it. Not counted: tests, and what is only declared, for which
# derived code nobody has to call stands in the table.
awk -v least="$LEAST" '
    function look(file,    path, text, number, inside, indent) {
        path = "src/engine/" file
        while ((getline text <path) > 0) {
            number++
            if (text ~ /^mod tests \{/) inside = "end of file"
            if (inside == "" && text ~ /^ *(pub(\([a-z]+\))? )?(struct|enum) [^;]*\{$/) {
                match(text, /^ */)
                inside = substr(text, 1, RLENGTH) "}"
            }
            if (inside != "" || text ~ /^ *(#\[derive|(pub(\([a-z]+\))? )?struct )/) declared[file, number] = 1
            if (text == inside) inside = ""
            line[file, number] = text
        }
        close(path)
    }
    match($0, /filename="[^"]*"/) {
        file = substr($0, RSTART + 10, RLENGTH - 11)
        counts = file !~ /(_tests|^testing)\.rs$/
        if (counts && !seen[file]++) look(file)
    }
    counts && match($0, /line number="[0-9]+" hits="[0-9]+"/) {
        split($0, part, "\"")
        if (!declared[file, part[2]]) hits[file, part[2]] += part[4]
    }
    END {
        sort = "sort -t: -k2,2 -k3,3n"
        for (key in hits) {
            total++
            split(key, part, SUBSEP)
            if (hits[key] > 0) reached++
            else print "not reached: src/engine/" part[1] ":" part[2] ":" line[key] | sort
        }
        close(sort)
        percent = total ? 100 * reached / total : 0
        printf "coverage: src/engine %.1f%% of lines (%d of %d)\n", percent, reached, total
        exit percent < least
    }' "$work"/*/cov.xml || fail "less than $LEAST %: see the lines above"
