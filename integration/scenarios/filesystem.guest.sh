# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

# shellcheck disable=SC2154
kind=$scenario
load_modules "$kind" loop crc32c crc32c_generic
force=-f
[ "$kind" = xfs ] || force=-F

check() {
    case $kind in
    ext4) must e2fsck -fn /dev/vda ;;
    xfs) must xfs_repair -n /dev/vda ;;
    esac
}

# remount OPTION...: checked in between, and past the page cache afterwards.
remount() {
    cd /
    must umount /disk
    check
    must mount -t "$kind" "$@" /dev/vda /disk
    cd /disk || die "no /disk"
}

must "mkfs.$kind" -q "$force" /dev/vda
at made
must mount -t "$kind" /dev/vda /disk
cd /disk || die "no /disk"

# Trimmed all the while: what fio writes next to free blocks must survive it.
while [ ! -e /tmp/enough ]; do
    must fstrim /disk
done &
trimmer=$!
run_fio direct --directory=/disk --numjobs=4 --nrfiles=4 --size=12m --iodepth=8 --rw=randrw --bsrange=4k-64k --fsync=32 \
    --fallocate=none --verify=crc32c --verify_fatal=1
run_fio buffered --directory=/disk --direct=0 --numjobs=2 --size=8m --rw=randwrite --bs=4k --end_fsync=1 \
    --fallocate=none --verify=crc32c --verify_fatal=1
touch /tmp/enough
wait $trimmer

for n in 0 1 2 3 4 5 6 7; do
    head -c 16m /dev/urandom >file$n || die "no room for file$n"
done
sha256sum file[4-7] >SHA256SUMS
remount
at filled
rm direct.* buffered.* file[0-3]
# XFS frees what was removed when it finds the time, but no later than this.
remount
must fstrim /disk
at trimmed

# fio trims no regular files, so the file is made a disk; its holes reach /dev/vda as discards.
remount -o discard
head -c 16m /dev/zero >disk
loop=$(losetup -f)
must losetup "$loop" disk
run_fio trims --filename="$loop" --numjobs=2 --offset_increment=8m --size=4m --iodepth=8 --rw=randtrimwrite --bs=16k \
    --verify=crc32c --verify_fatal=1 --trim_percentage=30 --trim_verify_zero=1 --trim_backlog=32
must losetup -d "$loop"
rm disk
remount
must sha256sum -c SHA256SUMS
cd /
must umount /disk
