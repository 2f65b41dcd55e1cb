# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# The guest reboots in place, in the middle of writes: the same QEMU, the same extentd, the same session. Each life finds
# what the ones before it have synced.

HOST_KIND=xfs
IMAGE=sparse
IMAGE_MIB=320
HOST_SPARE_MIB=256
QEMU_OPTIONS=()
REBOOTS=3

# at_alive LIFE FILES: how often it had booted before, and how many files of earlier lives it found intact.
at_alive() {
    [ "$1" -eq "$lives" ] || fail "life $1 of the guest was to be life $lives"
    [ "$2" -eq $((lives * 4)) ] || fail "in life $1 the guest found $2 files of earlier lives"
    lives=$((lives + 1))
}

# Its writes are in flight when the guest says so, and then it is gone.
at_leaving() {
    fetch_status
    [ "$(status_number requests write)" -gt 0 ] || fail "the guest reboots, and had written nothing"
}

before_guest() { lives=0; }

check_counts() {
    [ "$lives" -eq $((REBOOTS + 1)) ] || fail "the guest lived $lives times"
    grep -q '"sessions":1,' "$work/status" || fail "QEMU has connected anew: $(cat "$work/status")"
}

check_image() {
    mount_image ext4
    (cd "$inside" && sha256sum --check --quiet --strict SHA256SUMS) || fail "the host reads other bytes than the guest wrote"
    [ "$(wc -l <"$inside/SHA256SUMS")" = $(((REBOOTS + 1) * 4)) ] || fail "the list of files is not the guest's"
    unmount_image
}
