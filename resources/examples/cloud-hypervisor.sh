#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A guest on a disk of extentd's: cloud-hypervisor.sh SOCKET KERNEL [more options]. The guest's
# memory must be shared, or extentd cannot reach it.
set -eu
socket=$1
kernel=$2
shift 2
exec cloud-hypervisor \
    --cpus boot=4 --memory size=2G,shared=on \
    --kernel "$kernel" --cmdline "console=ttyS0 root=/dev/vda1" --serial tty --console off \
    --disk vhost_user=on,socket="$socket",num_queues=4,queue_size=256 \
    "$@"
