# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# ext4 or XFS made, used, trimmed and checked by the guest; each on the other one on the host, once over an image
# full of random bytes and once over a sparse one.

# XFS is not made smaller than 300 MiB.
IMAGE_MIB=512
HOST_SPARE_MIB=256
if [ "$SCENARIO" = ext4 ]; then
    HOST_KIND=xfs
else
    IMAGE=sparse
    DIRECT_SHARE=30
fi

at_made() {
    local now
    fetch_status
    [ "$(status_number requests discard)" -gt 0 ] || fail "mkfs discarded nothing"
    now=$(allocated_mib)
    [ "$now" -lt 100 ] || fail "mkfs discarded the disk, and the image still takes up $now MiB"
}

at_filled() { was=$(allocated_mib); }

# 128 MiB of files were removed before fstrim.
at_trimmed() {
    shrunk_by 120
    fetch_status
    discards=$(status_number requests discard)
}

check_counts() {
    [ "$(status_number requests discard)" -gt "$discards" ] || fail "a filesystem mounted with -o discard discarded nothing"
}

check_image() {
    mount_image "$SCENARIO"
    (cd "$inside" && sha256sum --check --quiet --strict SHA256SUMS) || fail "the host reads other bytes than the guest wrote"
    [ "$(wc -l <"$inside/SHA256SUMS")" = 4 ] || fail "the list of files is not the guest's"
    unmount_image
}
