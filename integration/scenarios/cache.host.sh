# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# The guest switches the disk's write cache on and off while it writes. With the cache off it sends no flushes, and
# each write is durable when it ends; with the cache on, nothing is before the guest asks.

IMAGE_MIB=80
# Requests of 4 KiB, one after the other, that the guest writes in each setting.
WRITES=64

stood() {
    fetch_status
    writes=$(status_number requests write)
    asked=$(status_number requests flush)
    syncs=$(($(status_number flush device_flushes) + $(status_number flush metadata_commits)))
}

# What came since "stood" was called last, in "writes", "asked" and "syncs".
came() {
    local writes_then=$writes asked_then=$asked syncs_then=$syncs
    stood
    writes=$((writes - writes_then)) asked=$((asked - asked_then)) syncs=$((syncs - syncs_then))
    [ "$writes" -ge $WRITES ] || fail "of $WRITES writes $writes arrived"
}

at_off() { stood; }

at_written_off() {
    came
    [ "$asked" -eq 0 ] || fail "the guest asked for $asked flushes with the cache off"
    [ "$syncs" -ge $WRITES ] || fail "with the cache off $writes writes, one after the other, were made durable by $syncs syncs"
}

at_on() { stood; }

at_written_on() {
    came
    [ "$asked $syncs" = "0 0" ] || fail "with the cache on, $asked flushes and $syncs syncs came with writes that nobody flushed"
}

at_flushed_on() {
    stood
    [ "$asked" -gt 0 ] || fail "the guest flushed, and no flush arrived"
}

at_flipped() { say "the cache was switched $1 times while fio wrote"; }

at_sum() { sum=$1; }

check_image() { same_on_host $IMAGE_MIB "$sum"; }
