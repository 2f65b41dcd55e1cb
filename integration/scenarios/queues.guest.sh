# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

queues=$(find /sys/block/vda/mq -name '[0-9]*' | wc -l)
[ "$queues" = 8 ] || die "the disk has $queues queues and not 8"
run_fio queues --filename=/dev/vda --numjobs=8 --offset_increment=16m --size=16m --iodepth=8 --rw=randrw --bsrange=4k-64k \
    --blockalign=4k --cpus_allowed=0-7 --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1
at used "$(disk_sum 128)"
