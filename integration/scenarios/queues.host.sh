# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash disable=SC2034,SC2154
# Eight virtual CPUs with a queue each, and a thread of extentd's for each queue.

HOST_KIND=xfs
HOST_SPARE_MIB=192
CPUS=8
QUEUES=8
MEMORY_MIB=1024
DAEMON_OPTIONS=(--threads 8)

# at_used SUM: while the guest is there; the threads go with it.
at_used() {
    local used
    sum=$1
    fetch_status
    used=$(grep -o '"worker":[0-9]*,"queues":\[[^]]*\],"requests":{"read":[0-9]*,"write":[1-9][0-9]*' "$work/status" | wc -l)
    [ "$used" = 8 ] || fail "of 8 queues $used had writes: $(cat "$work/status")"
}

check_image() { same_on_host 128 "$sum"; }
