# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# The disk itself, full of random bytes: discarded, zeroed and unmapped, then written and trimmed by fio. The last
# half, apart from the 30 MiB in each quarter of it that the guest is after, must stay what it was.

DIRECT_SHARE=30

before_guest() {
    cp "$image" "$work/seed" || fail "no room for a copy of the image"
}

at_start() { was=$(allocated_mib); }

at_discarded() {
    fetch_status
    [ "$(status_number requests discard)" -gt 0 ] || fail "blkdiscard discarded nothing"
    shrunk_by 29
}

at_zeroed() {
    fetch_status
    zeroings=$(status_number requests write_zeroes)
    [ "$zeroings" -gt 0 ] || fail "blkdiscard -z was no request to write zeroes"
    [ "$(allocated_mib)" -ge "$was" ] || fail "blkdiscard -z, which does not unmap, gave blocks back"
}

at_unmapped() {
    fetch_status
    [ "$(status_number requests write_zeroes)" -gt "$zeroings" ] || fail "fallocate was no request to write zeroes"
    shrunk_by 29
}

at_written() { sum=$1; }

check_image() {
    local part
    for part in 129 161 193; do
        zeros_on_host "$part" 30
    done
    for part in "128 1" "159 2" "191 2" "223 33"; do
        # shellcheck disable=SC2086
        unchanged $part
    done
    same_on_host 128 "$sum"
}

# unchanged MIB MIB: from, and how many.
unchanged() {
    cmp -s -n $(($2 << 20)) -i $(($1 << 20)) "$image" "$work/seed" || fail "the $2 MiB from MiB $1 are not what they were"
}
