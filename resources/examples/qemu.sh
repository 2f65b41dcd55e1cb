#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A guest on a disk of extentd's: qemu.sh SOCKET [more of QEMU's options]. The guest's memory must
# be shared, or extentd cannot reach it.
set -eu
socket=$1
shift
exec qemu-system-x86_64 \
    -machine q35,accel=kvm:tcg,memory-backend=memory -m 2G -smp 4 \
    -object memory-backend-memfd,id=memory,size=2G,share=on \
    -chardev socket,id=disk0,path="$socket" \
    -device vhost-user-blk-pci,chardev=disk0,num-queues=4,queue-size=256,bootindex=0 \
    "$@"
