# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

load_modules ext4 crc32c crc32c_generic
if ! mount -t ext4 /dev/vda /disk 2>/dev/null; then
    must mkfs.ext4 -q -F /dev/vda
    must mount -t ext4 /dev/vda /disk
    echo 0 >/disk/life
    touch /disk/SHA256SUMS
    sync
fi
cd /disk || die "no /disk"
life=$(cat life)
[ ! -s SHA256SUMS ] || must sha256sum -c SHA256SUMS
at alive "$life" "$(wc -l <SHA256SUMS)"

# Synced before the number of lives goes up, so that a life that is counted has its files.
for n in 1 2 3 4; do
    head -c $((n * 1000003)) /dev/urandom >"life$life.$n" || die "no room for a file"
done
sha256sum "life$life".? >>SHA256SUMS
sync
echo $((life + 1)) >life
sync
if [ "$life" -lt 3 ]; then
    rm -f noise.*
    run_fio noise --directory=/disk --numjobs=2 --size=32m --iodepth=16 --rw=randrw --bsrange=4k-64k --fallocate=none \
        --fsync=64 --time_based --runtime=600 &
    until [ -s noise.0.0 ] && [ -s noise.1.0 ]; do
        usleep 100000
    done
    usleep 500000
    at leaving
    # Reads and writes in flight.
    until [ "$(tr -d ' 0' </sys/block/vda/inflight)" ]; do
        :
    done
    reboot -f
    sleep 60
    die "the guest does not reboot"
fi
cd /
must umount /disk
must e2fsck -fn /dev/vda
