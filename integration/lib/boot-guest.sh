#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The part of boot.sh that needs root: boot-guest.sh BINARIES GUEST, the directory with extentd and extentctl
# and the one with the guest's kernel and initramfs. Everything made here is gone afterwards, on every path.
set -euo pipefail
NAME=boot
# shellcheck source=integration/lib/common.sh
. "$(dirname "$0")/common.sh"
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

binaries=$1
guest=$2
IMAGE_MIB=512
QEMU_SECONDS=180
# The share of data segments that must have gone straight to the device, in percent.
DIRECT_SHARE=90

work=$(mktemp -d /var/tmp/extentd-boot.XXXXXX)
hostfs=$work/hostfs
inside=$work/inside
socket=$work/blk.sock
control=$work/control.sock
daemon=
qemu=

cleanup() {
    local pid
    set +e
    trap '' INT TERM
    for pid in $qemu $daemon; do
        stop_process "$pid"
    done
    unmount "$inside"
    unmount "$hostfs"
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Asks, waits 5 s, insists.
stop_process() {
    kill -TERM "$1" 2>/dev/null || return 0
    wait_gone "$1" 5 || kill -KILL "$1" 2>/dev/null
    wait "$1" 2>/dev/null
}

# wait_gone PID SECONDS: a zombie is gone as well, its status waits for us.
wait_gone() {
    local ticks=$(($2 * 20)) state
    while [ "$ticks" -gt 0 ]; do
        state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || true
        case $state in '' | Z) return 0 ;; esac
        sleep 0.05
        ticks=$((ticks - 1))
    done
    return 1
}

# A mount may be busy for a moment after its last user.
unmount() {
    local tries
    for tries in 1 2 3 4 5; do
        mountpoint -q "$1" || return 0
        umount "$1" 2>/dev/null && return 0
        sleep "0.$tries"
    done
    umount --lazy "$1"
}

on_failure() {
    local log
    for log in console extentd qemu; do
        [ -s "$work/$log.log" ] || continue
        printf -- '--- the end of the %s log ---\n' "$log"
        tail -n 30 "$work/$log.log" | tr -d '\r'
    done
    echo '---'
}

# ext4 on a loop device (which goes away with its mount), or a plain directory where there are none.
make_host_filesystem() {
    mkdir "$hostfs" "$inside"
    truncate -s $((IMAGE_MIB + 256))M "$work/hostfs.img"
    mkfs.ext4 -q -F "$work/hostfs.img" || fail "mkfs.ext4 failed"
    if mount -o loop "$work/hostfs.img" "$hostfs" 2>"$work/mount.log"; then
        expected=direct
    else
        expected=filesystem
        say "no loop device to be had here ($(sed -n "s|^mount: [^:]*: ||p" "$work/mount.log")): the image lies in $work, in filesystem mode"
    fi
}

# ext4 with the host's files in it. It is copied with its holes filled in: an image all mapped.
make_image() {
    local seed=$work/seed file
    mkdir "$seed"
    for file in 1 2 3; do
        head -c $((file * 1000003)) /dev/urandom >"$seed/from-host$file"
    done
    (cd "$seed" && sha256sum from-host? >from-host.sha256)
    truncate -s ${IMAGE_MIB}M "$work/sparse.img"
    mkfs.ext4 -q -F -d "$seed" "$work/sparse.img" || fail "mkfs.ext4 failed on the image"
    dd if="$work/sparse.img" of="$image" bs=4M conv=fsync status=none || fail "no room for the image"
    rm -r "$seed" "$work/sparse.img"
}

start_daemon() {
    local ticks=200
    "$binaries/extentd" --blk-file "$image" --socket-path "$socket" --control-path "$control" --mode "$expected" \
        --serial boot-test >"$work/extentd.log" 2>&1 &
    daemon=$!
    until [ -S "$socket" ]; do
        kill -0 "$daemon" 2>/dev/null || fail "extentd ended before it listened"
        ticks=$((ticks - 1))
        [ "$ticks" -gt 0 ] || fail "extentd does not listen after 10 s"
        sleep 0.05
    done
}

boot_guest() {
    local status=0
    timeout --kill-after=5 "$QEMU_SECONDS" qemu-system-x86_64 -accel tcg -machine q35,memory-backend=mem -cpu max -smp 2 -m 512 \
        -object memory-backend-memfd,id=mem,size=512M,share=on \
        -chardev "socket,id=blk,path=$socket" -device vhost-user-blk-pci,chardev=blk,num-queues=2 \
        -kernel "$guest/vmlinuz" -initrd "$guest/initramfs" -append "console=ttyS0 panic=-1 loglevel=4" \
        -nodefaults -no-user-config -display none -no-reboot -serial "file:$work/console.log" >"$work/qemu.log" 2>&1 &
    qemu=$!
    wait "$qemu" || status=$?
    qemu=
    [ "$status" -ne 124 ] || fail "the guest was not done after $QEMU_SECONDS s"
    [ "$status" -eq 0 ] || fail "QEMU ended with status $status"
    tr -d '\r' <"$work/console.log" | grep '^guest:' >"$work/guest.log" || fail "the guest never got to its checks"
    if ! grep -q '^guest: ok ' "$work/guest.log"; then
        fail "in the guest: $(sed -n 's/^guest: FAILED: //p' "$work/guest.log" | grep . || echo 'it ended before it was done')"
    fi
    said=$(sed -n 's/^guest: ok //p' "$work/guest.log")
}

# number KEY: the count of that name in the status's segments, or nothing. The device's stand before its threads'.
number() {
    { grep -o '"segments":{[^}]*}' "$work/status" || true; } | sed -n "1s/.*\"$1\":\([0-9]*\).*/\1/p"
}

check_status() {
    local direct file zero total
    timeout 10 "$binaries/extentctl" status -c "$control" --json >"$work/status.json" 2>>"$work/extentd.log" ||
        fail "extentctl status failed"
    tr -d ' \n' <"$work/status.json" >"$work/status"
    mode=$({ grep -o '"mode":"[a-z]*"' "$work/status" || true; } | sed -n '1s/.*:"\(.*\)"/\1/p')
    direct=$(number direct) file=$(number file) zero=$(number zero)
    [[ "$direct $file $zero" =~ ^[0-9]+\ [0-9]+\ [0-9]+$ ]] || fail "the status has no segments: $(cat "$work/status")"
    total=$((direct + file + zero))
    [ "$total" -gt 0 ] || fail "extentd counts not a single segment"
    share=$((direct * 100 / total))
    [ "$mode" = "$expected" ] || fail "the mode is \"$mode\", not \"$expected\": $(cat "$work/status")"
    [ "$mode" = filesystem ] || [ "$share" -ge "$DIRECT_SHARE" ] ||
        fail "only $share % of the segments went direct ($direct of $total)"
}

# It must end by itself, with status 0, and leave no socket behind.
stop_daemon() {
    local status=0 pid=$daemon
    kill -TERM "$pid" || fail "extentd was gone before it was asked to end"
    wait_gone "$pid" 10 || fail "extentd does not end 10 s after SIGTERM"
    daemon=
    wait "$pid" || status=$?
    [ "$status" -eq 0 ] || fail "extentd ended with status $status"
    [ ! -e "$socket" ] || fail "extentd left its socket behind"
}

# The image as the host's own kernel sees it (or e2fsprogs, where nothing can be mounted).
check_image() {
    e2fsck -fn "$image" >"$work/fsck.log" 2>&1 || fail "the image's filesystem is damaged: $(tail -n 3 "$work/fsck.log")"
    if [ "$expected" = direct ]; then
        mount -o loop,ro,noload "$image" "$inside" || fail "the image does not mount on the host"
    else
        debugfs -R "rdump / $inside" "$image" >/dev/null 2>&1 || fail "the image cannot be read on the host"
    fi
    (cd "$inside" && sha256sum --check --quiet --strict SHA256SUMS from-host.sha256) || fail "the host reads other bytes than the guest wrote"
    [[ $said = "files=$(wc -l <"$inside/SHA256SUMS") "* ]] || fail "the list of files is not the guest's"
    unmount "$inside"
    [ "$expected" = direct ] || return 0
    unmount "$hostfs"
    e2fsck -fn "$work/hostfs.img" >"$work/fsck.log" 2>&1 || fail "the host's filesystem is damaged: $(tail -n 3 "$work/fsck.log")"
}

make_host_filesystem
image=$hostfs/image
make_image
start_daemon
say "booting the guest"
boot_guest
check_status
stop_daemon
check_image
say "ok (mode=$mode, direct_segments=$share%, ${said/ /, })"
