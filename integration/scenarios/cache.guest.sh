# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=sh

cache=/sys/block/vda/cache_type

# set_cache SETTING: and see that it is what was set.
set_cache() {
    echo "$1" >$cache || die "cache_type does not become \"$1\""
    [ "$(cat $cache)" = "$1" ] || die "cache_type is \"$(cat $cache)\" and not \"$1\""
}

write_64() {
    must dd if=/dev/urandom of=/dev/vda bs=4k count=64 seek=1024 oflag=direct conv=notrunc
}

[ "$(cat $cache)" = "write back" ] || die "the cache is not on to begin with"
set_cache "write through"
at off
write_64
at written_off
set_cache "write back"
at on
write_64
at written_on
must dd if=/dev/urandom of=/dev/vda bs=4k count=1 seek=1024 conv=notrunc,fsync
at flushed_on

# Two rounds, and as many flips as fit, but enough of them.
while [ ! -e /tmp/enough ]; do
    run_fio "round" --filename=/dev/vda --numjobs=2 --offset_increment=32m --size=32m --iodepth=16 --rw=randwrite \
        --bsrange=4k-64k --blockalign=4k --fsync=64 --verify=crc32c --verify_fatal=1
    touch /tmp/round
done &
writer=$!
flips=0
until [ $flips -ge 40 ] && [ -e /tmp/round ]; do
    set_cache "write through"
    usleep 50000
    set_cache "write back"
    usleep 50000
    flips=$((flips + 2))
done
touch /tmp/enough
wait $writer
at flipped $flips
at sum "$(disk_sum 80)"
