# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# dm-crypt on the disk, with discards let through, and ext4 on that. The host sees an image full of noise.

IMAGE=sparse
IMAGE_MIB=192

at_filled() { was=$(allocated_mib); }

# 64 MiB of files were removed before fstrim.
at_trimmed() {
    shrunk_by 60
    fetch_status
    [ "$(status_number requests discard)" -gt 0 ] || fail "no discard came through dm-crypt"
}

# at_closed SUM MARK...: of the whole disk, and the words that the guest wrote inside, over and over.
at_closed() { sum=$1 mark=${*:2}; }

check_image() {
    same_on_host $IMAGE_MIB "$sum"
    [ "$(head -c 4 "$image")" = LUKS ] || fail "the image does not begin with LUKS's header"
    ! grep -qaF "$mark" "$image" || fail "the image has the guest's plain text in it"
}
