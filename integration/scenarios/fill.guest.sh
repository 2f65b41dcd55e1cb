# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

load_modules ext4 crc32c crc32c_generic
must mkfs.ext4 -q -F -m 0 -i 65536 /dev/vda
must mount -t ext4 /dev/vda /disk
# Every 259 bytes say which file they are of, and which MiB of it; that being no divisor of anything, no two blocks of a
# MiB are alike. A reader beside the writer notices what else stands still.
n=0
while [ $n -lt 12 ]; do
    n=$((n + 1))
    at file $n
    run_fio fill$n --output-format=json --filename=/disk/file$n --size=495m --rw=write --bs=1m --iodepth=8 --fallocate=none \
        --verify=pattern --verify_pattern="0x$(printf %0502d $n)%o" --do_verify=0 --end_fsync=1 --exitall \
        --name=pulse --ioengine=libaio --direct=1 --filename=/dev/vda --rw=randread --bs=4k --thinktime=50ms --time_based --runtime=600
done
longest=$(cat /tmp/fill*.fio | tr -d ' \n' | grep -o '"lat_ns":{"min":[0-9]*,"max":[0-9]*' | sed 's/.*://' | sort -n | tail -n 1)
[ "$longest" ] || die "fio told no latencies"
at filled $((longest / 1000000))
must umount /disk
must e2fsck -fn /dev/vda
