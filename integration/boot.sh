#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The main job, on a fresh Debian machine with a Rust toolchain: installs what is missing, builds, serves an
# image on ext4 on a loop device, boots Debian's kernel on it in QEMU, and checks on the host what the guest wrote.
# Root, or sudo. The last line is "boot: ok (...)" or "boot: FAILED: reason".
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=boot
# shellcheck source=integration/lib/common.sh
. integration/lib/common.sh
# shellcheck source=integration/packages.sh
. integration/packages.sh
# shellcheck source=integration/lib/initramfs.sh
. integration/lib/initramfs.sh

find_cargo
install_packages "${PACKAGES_BOOT[@]}"
say "building"
cargo build --release --locked --quiet --package extentd || fail "cargo build failed"
target=$(target_directory)
guest=${target:?}/guest
fetch_guest_kernel "$guest"
begin_initramfs "$guest" boot resources/guest/init
add_modules "$guest" "${MODULES_BOOT[@]}"
pack_initramfs
as_root integration/lib/boot-guest.sh "$target/release" "$guest" || exit
