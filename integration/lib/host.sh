# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash
# The host's half of a run with a guest: a filesystem on a loop device, extentd on an image in it, QEMU.
# Sourced after common.sh, by scripts that are root; they set "binaries", the directory with extentd and
# extentctl. Everything made here is gone afterwards, on every path.

PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
# What is mounted here stays here: a program that took a copy of the machine's mounts (tests do) would keep our
# filesystems in use after we have unmounted them, and fsck would find them half written.
if [ -z "${OWN_MOUNTS:-}" ] && unshare --mount true 2>/dev/null; then
    OWN_MOUNTS=1 exec unshare --mount "$0" "$@"
fi
work=
daemon=
qemu=
# Whatever else was started and has to be stopped.
helpers=

# make_work NAME [DIRECTORY]: the run's own directory, and the names of everything in it.
make_work() {
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    work=$(mktemp -d "${2:-/var/tmp}/extentd-$1.XXXXXX")
    hostfs=$work/hostfs
    inside=$work/inside
    image=$hostfs/image
    socket=$work/blk.sock
    control=$work/control.sock
    mkdir "$hostfs" "$inside"
}

cleanup() {
    local pid
    set +e
    trap '' INT TERM
    for pid in $helpers $qemu $daemon; do
        stop_process "$pid"
    done
    [ -n "$work" ] || return 0
    unmount "$inside" 2 || umount --lazy "$inside"
    unmount "$hostfs" 2 || umount --lazy "$hostfs"
    rm -rf --one-file-system "$work"
}

# Asks, waits 5 s, insists.
stop_process() {
    kill -TERM "$1" 2>/dev/null || return 0
    wait_gone "$1" 5 || kill -KILL "$1" 2>/dev/null
    wait "$1" 2>/dev/null || true
}

# gone PID: a zombie is gone as well, its status waits for us.
gone() {
    local state
    state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || true
    case $state in '' | Z) return 0 ;; esac
    return 1
}

# wait_gone PID SECONDS
wait_gone() {
    local ticks=$(($2 * 20))
    until gone "$1"; do
        ticks=$((ticks - 1))
        [ "$ticks" -gt 0 ] || return 1
        sleep 0.05
    done
}

# unmount DIRECTORY SECONDS: a mount is busy for a while after its last user, until the kernel has taken apart
# what that one had open.
unmount() {
    local ticks=$(($2 * 10))
    until ! mountpoint -q "$1" || umount "$1" 2>/dev/null; do
        ticks=$((ticks - 1))
        [ "$ticks" -gt 0 ] || return 1
        sleep 0.1
    done
}

on_failure() {
    local log
    for log in console guest extentd qemu fsck; do
        [ -s "$work/$log.log" ] || continue
        printf -- '--- the end of the %s log ---\n' "$log"
        tail -n 30 "$work/$log.log" | tr -d '\r'
    done
    echo '---'
}

# make_host_filesystem KIND MIB: on a loop device, which goes away with its mount. Fails where there is none
# to be had; "refusal" says why.
make_host_filesystem() {
    hostfs_kind=$1
    truncate -s "$2M" "$work/hostfs.img"
    make_filesystem "$1" "$work/hostfs.img"
    mount -o loop "$work/hostfs.img" "$hostfs" 2>"$work/mount.log" && return 0
    # shellcheck disable=SC2034
    refusal=$(sed -n "s|^mount: [^:]*: ||p" "$work/mount.log")
    return 1
}

# make_filesystem KIND FILE OPTION...
make_filesystem() {
    local kind=$1 file=$2 force=-F
    shift 2
    [ "$kind" = ext4 ] || force=-f
    "mkfs.$kind" -q "$force" "$@" "$file" || fail "mkfs.$kind failed on $(basename "$file")"
}

# check_filesystem KIND FILE WHAT: changes nothing.
check_filesystem() {
    case $1 in
    ext4) e2fsck -fn "$2" >"$work/fsck.log" 2>&1 ;;
    xfs) xfs_repair -n -f "$2" >"$work/fsck.log" 2>&1 ;;
    *) fail "nothing is known here that checks $1" ;;
    esac || fail "the $3 filesystem is damaged: $(tail -n 3 "$work/fsck.log")"
}

check_host_filesystem() {
    unmount "$hostfs" 30 || fail "the host's filesystem is still in use 30 s after extentd has ended"
    check_filesystem "$hostfs_kind" "$work/hostfs.img" "host's"
}

# mount_image KIND: what the guest left, as the host's own kernel sees it, under "inside".
mount_image() {
    local norecovery=noload
    [ "$1" = ext4 ] || norecovery=norecovery
    check_filesystem "$1" "$image" "image's"
    mount -t "$1" -o "loop,ro,$norecovery" "$image" "$inside" || fail "the image does not mount on the host"
}

unmount_image() {
    unmount "$inside" 30 || fail "the image does not unmount on the host"
}

# start_daemon OPTION...
start_daemon() {
    local ticks=200
    # shellcheck disable=SC2154
    "$binaries/extentd" --blk-file "$image" --socket-path "$socket" --control-path "$control" "$@" >"$work/extentd.log" 2>&1 &
    daemon=$!
    until [ -S "$socket" ]; do
        ! gone "$daemon" || fail "extentd ended before it listened"
        ticks=$((ticks - 1))
        [ "$ticks" -gt 0 ] || fail "extentd does not listen after 10 s"
        sleep 0.05
    done
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

# start_qemu KERNEL INITRAMFS WORDS CPUS MIB QUEUES OPTION...: the served image as /dev/vda, WORDS on the
# kernel's command line. A guest that panics reboots. Its timers tick all the time: on a busy machine an emulated
# CPU now and then misses the interrupt of a timer, and one that then waits for nothing else sleeps for 19 s.
start_qemu() {
    local kernel=$1 initramfs=$2 words=$3 cpus=$4 mib=$5 queues=$6
    shift 6
    qemu-system-x86_64 -accel tcg -machine q35,memory-backend=mem -cpu max -smp "$cpus" -m "$mib" \
        -object "memory-backend-memfd,id=mem,size=${mib}M,share=on" \
        -chardev "socket,id=blk,path=$socket" -device "vhost-user-blk-pci,chardev=blk,num-queues=$queues" \
        -kernel "$kernel" -initrd "$initramfs" -append "console=ttyS0 panic=-1 loglevel=4 nohz=off highres=off${words:+ $words}" \
        -nodefaults -no-user-config -display none -serial "file:$work/console.log" "$@" >"$work/qemu.log" 2>&1 &
    qemu=$!
}

# await_qemu SECONDS: until the guest has powered off.
await_qemu() {
    local status=0 pid=$qemu
    wait_gone "$pid" "$1" || fail "the guest was not done after $1 s"
    qemu=
    wait "$pid" || status=$?
    [ "$status" -eq 0 ] || fail "QEMU ended with status $status"
}

# Leaves the status of extentd, all on one line, in the file "status".
fetch_status() {
    timeout 10 "$binaries/extentctl" status -c "$control" --json >"$work/status.json" 2>>"$work/extentd.log" ||
        fail "extentctl status failed"
    tr -d ' \n' <"$work/status.json" >"$work/status"
}

# status_word KEY
status_word() {
    { grep -o "\"$1\":\"[^\"]*\"" "$work/status" || true; } | sed -n '1s/.*:"\(.*\)"/\1/p'
}

# status_number SECTION KEY: a count of that section, or nothing. The device's stand before its threads'.
status_number() {
    { grep -o "\"$1\":{[^}]*}" "$work/status" || true; } | sed -n "1s/.*\"$2\":\([0-9]*\).*/\1/p"
}

# check_segments MODE SHARE: extentd is in that mode, and at least SHARE percent of the segments went straight
# to the device. Leaves "mode" and "share".
check_segments() {
    local direct file zero total
    fetch_status
    mode=$(status_word mode)
    direct=$(status_number segments direct) file=$(status_number segments file) zero=$(status_number segments zero)
    [[ "$direct $file $zero" =~ ^[0-9]+\ [0-9]+\ [0-9]+$ ]] || fail "the status has no segments: $(cat "$work/status")"
    total=$((direct + file + zero))
    [ "$total" -gt 0 ] || fail "extentd counts not a single segment"
    share=$((direct * 100 / total))
    [ "$mode" = "$1" ] || fail "the mode is \"$mode\", not \"$1\": $(cat "$work/status")"
    [ "$mode" = filesystem ] || [ "$share" -ge "$2" ] || fail "only $share % of the segments went direct ($direct of $total)"
}
