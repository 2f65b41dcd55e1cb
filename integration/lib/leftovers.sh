# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash
# What a run may not leave behind: loop devices, mounts, processes. Sourced after common.sh.
# A process is ours if it inherited the mark; a loop device or mount, if it was not there before.

RUN_MARK=EXTENTD_TEST_RUN=$$-$RANDOM$RANDOM
# shellcheck disable=SC2163
export "$RUN_MARK"

attached() {
    as_root losetup --list --noheadings --output NAME,BACK-FILE | sed 's/^/loop device /'
    awk '{ print "mount " $5 }' /proc/self/mountinfo
}

# Processes that carry the mark. This shell and its forks do not: it was exported after they were started.
running() {
    local pid environ
    for environ in /proc/[0-9]*/environ; do
        pid=${environ//[!0-9]/}
        as_root grep -qzxF "$RUN_MARK" "$environ" 2>/dev/null || continue
        printf 'process %s (%s)\n' "$pid" "$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)"
    done
}

remember_attached() { BEFORE=$(attached | sort); }

# Loop devices with autoclear and killed processes may take a moment to go, and so may those of
# somebody else: a run beside this one has its own for seconds at a time.
nothing_left() {
    local pause left=""
    for pause in 0.1 0.2 0.4 0.8 1.6 3.2 6.4 12.8; do
        left=$(comm -13 <(echo "$BEFORE") <(attached | sort); running)
        [ -n "$left" ] || return 0
        sleep "$pause"
    done
    printf 'left behind: %s\n' "$left"
    return 1
}
