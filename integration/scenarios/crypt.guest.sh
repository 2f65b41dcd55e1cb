# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

load_modules ext4 crc32c crc32c_generic dm_crypt xts ecb aes_generic aesni_intel sha256_generic algif_skcipher
mark="plain text of the guest"

open_disk() {
    must cryptsetup open --allow-discards --key-file /tmp/key /dev/vda plain
    [ -b /dev/mapper/plain ] || die "no /dev/mapper/plain"
}

head -c 64 /dev/urandom >/tmp/key
must cryptsetup luksFormat --type luks2 --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /tmp/key /dev/vda
open_disk
must mkfs.ext4 -q -F /dev/mapper/plain
must mount -t ext4 /dev/mapper/plain /disk
run_fio crypt --directory=/disk --numjobs=2 --size=16m --iodepth=8 --rw=randrw --bsrange=4k-64k --fsync=64 --fallocate=none \
    --verify=crc32c --verify_fatal=1
yes "$mark" | head -c 16m >/disk/marked
head -c 16m /dev/urandom >/disk/kept
head -c 64m /dev/urandom >/disk/gone
(cd /disk && sha256sum marked kept >SHA256SUMS)
sync
at filled
rm /disk/gone
sync
must fstrim /disk
at trimmed
must umount /disk
must cryptsetup close plain
open_disk
must e2fsck -fn /dev/mapper/plain
must mount -t ext4 /dev/mapper/plain /disk
(cd /disk && must sha256sum -c SHA256SUMS)
grep -qF "$mark" /disk/marked || die "the mark is not in the file"
must umount /disk
must cryptsetup close plain
at closed "$(disk_sum 192)" "$mark"
