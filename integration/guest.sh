#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What a real guest may do with its disk: guest.sh [SCENARIO...], all of them unless some are named. Installs what is
# missing and builds; then, for each, an image on a filesystem on a loop device, extentd on it and Debian's kernel in
# QEMU, where fio, mkfs, fstrim, cryptsetup and the like do what integration/scenarios says; and checks on the host what
# the guest left. Root, or sudo. The last line is "guest: ok (...)" or "guest: FAILED: scenario: reason".
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=guest
# raw     the disk itself: discarded, zeroed, unmapped; fio with trims and verification
# ext4, xfs   made, filled, trimmed, checked
# cache   the write cache switched on and off under load
# reboot  in place, in the middle of writes
# queues  eight CPUs, eight queues
# crypt   dm-crypt on the disk
# fill    a sparse image of 6 GiB filled up, without a stall
SCENARIOS=(raw ext4 xfs cache reboot queues crypt fill)
# shellcheck source=integration/lib/common.sh
. integration/lib/common.sh
# shellcheck source=integration/packages.sh
. integration/packages.sh
# shellcheck source=integration/lib/initramfs.sh
. integration/lib/initramfs.sh

chosen=("${@:-${SCENARIOS[@]}}")
for scenario in "${chosen[@]}"; do
    [[ " ${SCENARIOS[*]} " = *" $scenario "* ]] || fail "there is no scenario \"$scenario\": there are ${SCENARIOS[*]}"
done
find_cargo
install_packages "${PACKAGES_GUEST[@]}"
say "building"
cargo build --release --locked --quiet --package extentd || fail "cargo build failed"
target=$(target_directory)
guest=${target:?}/guest
fetch_guest_kernel "$guest"
begin_initramfs "$guest" scenarios resources/guest/scenario
add_modules "$guest" "${MODULES_GUEST[@]}"
add_programs "${PROGRAMS_GUEST[@]}"
for half in integration/scenarios/*.guest.sh; do
    cp "$half" "$root/scenarios/$(basename "$half" .guest.sh)"
done
pack_initramfs
for scenario in "${chosen[@]}"; do
    as_root integration/lib/guest-scenario.sh "$target/release" "$guest" "$scenario" || exit
done
say "ok (scenarios=${#chosen[@]}, seconds=$SECONDS)"
