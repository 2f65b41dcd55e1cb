# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# A sparse image of 6 GiB, filled with 5.8 GiB of files: no request may take more than 2 s, on top of what the host's
# own disk was seen to take at the same time.

IMAGE=sparse
IMAGE_MIB=6144
HOST_SPARE_MIB=256
# Everything is written for the first time.
DIRECT_SHARE=0
# A cache of gigabytes under the disk would make each flush as long as writing them out takes.
LOOP_OPTIONS=(--direct-io=on)
FILES=12
FILE_MIB=495
STALL_MS=2000
roomy_work_root $((IMAGE_MIB + 2 * HOST_SPARE_MIB))

# One small write after the other, beside the image's filesystem and not in it.
before_guest() {
    fio --name=probe --output="$work/probe.json" --output-format=json --filename="$work/probe" --size=16m --ioengine=psync \
        --direct=1 --rw=randwrite --bs=4k --thinktime=50ms --time_based --runtime="$LIMIT_SECONDS" >"$work/probe.log" 2>&1 &
    helpers=$!
}

# So that the log says when it got there.
at_file() { :; }

# at_filled MS: the longest that a request of the guest's took.
at_filled() {
    local disk now
    stop_process "$helpers"
    helpers=
    disk=$(longest_ms "$work/probe.json")
    [ -n "$disk" ] || fail "the host's disk was not watched: $(tail -n 1 "$work/probe.log")"
    say "the longest request of the guest took $1 ms, of the host's own $disk ms"
    [ "$1" -le $((STALL_MS + disk)) ] || fail "a request took $1 ms, and the host's disk alone $disk ms"
    now=$(allocated_mib)
    [ "$now" -ge $((FILES * FILE_MIB)) ] || fail "$((FILES * FILE_MIB)) MiB of files take up $now MiB"
}

# longest_ms FILE: of all that fio's report says took the longest.
longest_ms() {
    local longest
    longest=$(tr -d ' \n' <"$1" | { grep -o '"lat_ns":{"min":[0-9]*,"max":[0-9]*' || true; } | sed 's/.*://' | sort -n | tail -n 1)
    [ -z "$longest" ] || echo $((longest / 1000000))
}

check_image() {
    local n
    mount_image ext4
    for n in $(seq "$FILES"); do
        [ "$(stat -c %s "$inside/file$n")" = $((FILE_MIB << 20)) ] || fail "file$n is not as long as the guest made it"
        fio --name=verify --output="$work/verify.log" --filename="$inside/file$n" --readonly --rw=read --bs=1m --iodepth=8 \
            --ioengine=libaio --direct=1 --verify=pattern --verify_pattern="0x$(printf %0502d "$n")%o" --verify_fatal=1 >>"$work/verify.log" 2>&1 ||
            fail "the host reads other bytes in file$n than the guest wrote: $(grep -m 1 -e 'verify:' -e 'err=' "$work/verify.log")"
    done
    unmount_image
}
