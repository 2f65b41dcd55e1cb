# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

at start
must blkdiscard --offset 129MiB --length 30MiB /dev/vda
reads_zeros 129 30
at discarded
must blkdiscard -z --offset 161MiB --length 30MiB /dev/vda
reads_zeros 161 30
at zeroed
must fallocate --punch-hole --offset 193MiB --length 30MiB /dev/vda
reads_zeros 193 30
at unmapped

# Each job has a region of its own. The trims of the first are of what it wrote, and have to read as zeros.
run_fio trims --filename=/dev/vda --numjobs=4 --offset_increment=16m --size=8m --iodepth=16 --rw=randtrimwrite --bs=16k \
    --verify=crc32c --verify_fatal=1 --trim_percentage=30 --trim_verify_zero=1 --trim_backlog=64
run_fio mixed --filename=/dev/vda --numjobs=4 --offset=64m --offset_increment=16m --size=16m --iodepth=16 --rw=randrw \
    --bsrange=512-64k --blockalign=512 --verify=crc32c --verify_fatal=1
at written "$(disk_sum 128)"
