#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The part of guest.sh that needs root: guest-scenario.sh BINARIES GUEST SCENARIO, the directory with extentd and
# extentctl, the one with the guest's kernel and initramfs, and which half of integration/scenarios to play.
set -euo pipefail
NAME=guest
here=$(dirname "$0")
# shellcheck source=integration/lib/common.sh
. "$here/common.sh"
# shellcheck source=integration/lib/host.sh
. "$here/host.sh"

# shellcheck disable=SC2034
binaries=$1
guest=$2
SCENARIO=$3
STARTED=$SECONDS
half=$SCENARIO
case $SCENARIO in ext4 | xfs) half=filesystem ;; esac

# What a scenario may want otherwise. A "written" image is all mapped, a "sparse" one all holes.
HOST_KIND=ext4
IMAGE=written
IMAGE_MIB=256
# Beyond the image, for the filesystem itself.
HOST_SPARE_MIB=128
CPUS=2
MEMORY_MIB=768
QUEUES=2
DAEMON_OPTIONS=()
QEMU_OPTIONS=(-no-reboot)
# The share of data segments that must have gone straight to the device, in percent.
DIRECT_SHARE=50
# For the whole guest: far more than it takes, since the machine may be busy.
LIMIT_SECONDS=600
# For losetup, about the loop device under the host's filesystem.
LOOP_OPTIONS=()
WORK_ROOT=/var/tmp

# roomy_work_root MIB: the disk, or memory where the disk has no room for so much.
roomy_work_root() {
    local free
    for WORK_ROOT in /var/tmp /dev/shm; do
        free=$(df --output=avail -BM "$WORK_ROOT" 2>/dev/null | sed -n 's/^ *\([0-9]*\)M$/\1/p')
        [ "${free:-0}" -lt "$1" ] || return 0
    done
    fail "neither /var/tmp nor /dev/shm has room for $1 MiB"
}

# What the scenario's own half may define: "before_guest" once there is an image; "at_PLACE VALUE..." for each place
# the guest stops at, with extentd serving; "check_counts" with the status of extentd before it ends, and
# "check_image" after that.
before_guest() { :; }
check_counts() { :; }
check_image() { :; }

# Anything but zeros.
make_image() {
    truncate -s "${IMAGE_MIB}M" "$image"
    [ "$IMAGE" = written ] || return 0
    head -c "${IMAGE_MIB}M" /dev/urandom | dd of="$image" bs=1M conv=notrunc,fsync status=none || fail "no room for the image"
}

# What the image takes up on the host's filesystem.
allocated_mib() { echo $(($(stat -c %b "$image") / 2048)); }

# shrunk_by MIB: at least so much less is allocated than when "was" was taken, which is taken anew.
shrunk_by() {
    local now
    now=$(allocated_mib)
    [ "$now" -le $((was - $1)) ] || fail "the image takes up $now MiB after $was MiB: that is not $1 MiB less"
    was=$now
}

# zeros_on_host MIB MIB: from, and how many.
zeros_on_host() {
    cmp -s -n $(($2 << 20)) -i $(($1 << 20)):0 "$image" /dev/zero || fail "the host does not read zeros in the $2 MiB from MiB $1"
}

# same_on_host MIB SUM: the first so many of the image are what the guest's disk_sum read.
same_on_host() {
    [ "$(head -c "$1M" "$image" | md5sum)" = "$2  -" ] || fail "the host reads other bytes than the guest wrote"
}

# note WORD...: into the log, which says when things happened.
note() { printf '%(%T)T %s\n' -1 "$*" >>"$work/guest.log"; }

# Reads what the guest says, and answers, until it is done or QEMU is gone.
converse() {
    local deadline=$((SECONDS + LIMIT_SECONDS)) line="" part over=
    ok=
    while :; do
        # Not all of a line may be there yet.
        if read -r part <&"$from_guest"; then
            line+=$part
            note "$line"
            heard "$line"
            line=""
            continue
        fi
        line+=$part
        [ -z "$over" ] || break
        # Once more: it may have said something since.
        ! gone "$qemu" || over=1
        ! gone "$daemon" || fail "extentd ended under the guest"
        [ "$SECONDS" -lt "$deadline" ] || fail "the guest was not done after $LIMIT_SECONDS s"
        sleep 0.1
    done
    await_qemu 1
    [ -n "$ok" ] || fail "the guest ended before it was done"
}

heard() {
    local words
    read -ra words <<<"$1"
    case ${words[0]:-} in
    at)
        "at_${words[1]}" "${words[@]:2}"
        echo go >&"$to_guest"
        ;;
    failed) fail "in the guest: ${1#failed }" ;;
    ok) ok=1 ;;
    *) fail "the guest talks nonsense: $1" ;;
    esac
}

start_guest() {
    mkfifo "$work/to-guest"
    touch "$work/from-guest"
    # The first open both ways, so that neither end waits for the other.
    exec {to_guest}<>"$work/to-guest" {from_guest}<"$work/from-guest"
    start_qemu "$guest/vmlinuz" "$guest/scenarios.initramfs" "scenario=$SCENARIO half=$half" "$CPUS" "$MEMORY_MIB" "$QUEUES" \
        -chardev "file,id=talk,path=$work/from-guest,input-path=$work/to-guest" -serial chardev:talk "${QEMU_OPTIONS[@]}"
}

check_status() {
    ! gone "$daemon" || fail "extentd ended by itself"
    check_segments direct "$DIRECT_SHARE"
    [ "$(status_word lease)" = held ] || fail "the lease is not held: $(cat "$work/status")"
    [ "$(status_number requests errors)" = 0 ] || fail "requests failed: $(cat "$work/status")"
    grep -q '"error":null' "$work/status" || fail "a flush failed: $(cat "$work/status")"
    check_counts
}

# shellcheck disable=SC1090
. "$here/../scenarios/$half.host.sh"
make_work guest "$WORK_ROOT"
make_host_filesystem "$HOST_KIND" $((IMAGE_MIB + HOST_SPARE_MIB)) || fail "no loop device to be had here: $refusal"
[ "${#LOOP_OPTIONS[@]}" -eq 0 ] || losetup "${LOOP_OPTIONS[@]}" "$(findmnt -no SOURCE "$hostfs")" || fail "losetup ${LOOP_OPTIONS[*]} failed"
note "the host's filesystem is there"
make_image
before_guest
note "the image is there"
start_daemon --mode direct "${DAEMON_OPTIONS[@]}"
start_guest
converse
note "the guest is gone"
check_status
stop_daemon
note "extentd is gone"
check_image
check_host_filesystem
say "$SCENARIO: $((SECONDS - STARTED)) s (direct_segments=$share%)"
