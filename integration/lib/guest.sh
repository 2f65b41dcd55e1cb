# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash
# Debian's cloud kernel and an initramfs for it, built under DIR; sourced after packages.sh. The kernel is
# unpacked, not installed: a container, or a machine that boots something else, is as good a host.

GUEST_MODULES="virtio_pci virtio_blk ext4 crc32c crc32c_generic"

# The package that holds today's kernel: the one named here is empty and depends on it.
guest_kernel_package() {
    apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-/ && !found { print $2; found = 1 }'
}

# fetch_guest_kernel DIR: leaves DIR/vmlinuz, DIR/modules (a list, in the order to load them) and DIR/ko.
fetch_guest_kernel() {
    local dir=$1 package
    package=$(guest_kernel_package)
    if [ -z "$package" ]; then
        apt_update
        package=$(guest_kernel_package)
    fi
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64: is this an amd64 Debian?"
    [ "$(cat "$dir/package" 2>/dev/null)" != "$package" ] || return 0
    say "fetching $package"
    rm -rf "$dir"
    mkdir -p "$dir/tree"
    (cd "$dir" && download_package "$package" && dpkg-deb -x "$package"_*.deb tree) || fail "$package could not be fetched"
    rm -f "$dir"/*.deb
    list_guest_modules "$dir" "${package#linux-image-}"
    mv "$dir/tree/boot/vmlinuz-${package#linux-image-}" "$dir/vmlinuz"
    # Last, so that an interrupted run starts afresh.
    echo "$package" >"$dir/package"
}

# Old lists name files the mirror no longer has.
download_package() {
    apt-get -qq download "$1" 2>/dev/null || { apt_update && apt-get -qq download "$1"; }
}

# Asks kmod, which knows dependencies and what is built in, and puts the files where the initramfs takes them.
list_guest_modules() {
    local dir=$1 version=$2 module file
    # Debian moved the modules below /usr; kmod looks where it was built to look.
    if [ -d "$dir/tree/usr/lib/modules" ]; then
        mkdir -p "$dir/tree/lib"
        ln -sfn ../usr/lib/modules "$dir/tree/lib/modules"
    else
        mkdir -p "$dir/tree/usr/lib"
        ln -sfn ../../lib/modules "$dir/tree/usr/lib/modules"
    fi
    depmod -b "$dir/tree" "$version" || fail "depmod failed on the guest's modules"
    mkdir -p "$dir/ko"
    for module in $GUEST_MODULES; do
        modprobe -d "$dir/tree" -S "$version" --show-depends "$module" 2>/dev/null || true
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' >"$dir/files"
    while read -r file; do
        case $file in
        *.ko) cp "$file" "$dir/ko/" ;;
        *.ko.xz) xz -dc "$file" >"$dir/ko/$(basename "$file" .xz)" ;;
        *.ko.zst) zstd -qdc "$file" >"$dir/ko/$(basename "$file" .zst)" ;;
        *) fail "a module packed in a way unknown here: $file" ;;
        esac
    done <"$dir/files"
    sed 's/.*\///; s/\.ko.*/.ko/' "$dir/files" >"$dir/modules"
}

# build_guest_initramfs DIR INIT: packs busybox, the modules and INIT into DIR/initramfs.
build_guest_initramfs() {
    local dir=$1 init=$2 busybox root=$1/root
    busybox=$(command -v busybox) || fail "no busybox on this machine"
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,proc,sys,tmp,disk,modules}
    cp "$busybox" "$root/bin/busybox"
    cp "$init" "$root/init"
    chmod 755 "$root/init" "$root/bin/busybox"
    cp "$dir"/ko/*.ko "$root/modules/" 2>/dev/null || true
    cp "$dir/modules" "$root/modules/list"
    (cd "$root" && find . -print0 | cpio --quiet -0 -o -H newc -R 0:0) >"$dir/initramfs" || fail "cpio failed"
}
