# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash
# Debian's cloud kernel and what a guest starts from, built under DIR; sourced after packages.sh. The kernel is
# unpacked, not installed: a container, or a machine that boots something else, is as good a host.

# What boot.sh's guest loads.
# shellcheck disable=SC2034
MODULES_BOOT=(virtio_pci virtio_blk ext4 crc32c crc32c_generic)
# What guest.sh's guest loads besides: filesystems, encrypted disks.
# shellcheck disable=SC2034
MODULES_GUEST=("${MODULES_BOOT[@]}" xfs loop dm_mod dm_crypt xts ecb aes_generic aesni_intel sha256_generic af_alg algif_skcipher)
# shellcheck disable=SC2034
PROGRAMS_GUEST=(fio mkfs.ext4 e2fsck mkfs.xfs xfs_repair fstrim blkdiscard fallocate wipefs cryptsetup)

# The package that holds today's kernel: the one named here is empty and depends on it.
guest_kernel_package() {
    apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-/ && !found { print $2; found = 1 }'
}

# fetch_guest_kernel DIR: leaves DIR/vmlinuz, and DIR/tree with all its modules.
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
    index_guest_modules "$dir/tree" "${package#linux-image-}"
    mv "$dir/tree/boot/vmlinuz-${package#linux-image-}" "$dir/vmlinuz"
    # Last, so that an interrupted run starts afresh.
    echo "$package" >"$dir/package"
}

# Old lists name files the mirror no longer has.
download_package() {
    apt-get -qq download "$1" 2>/dev/null || { apt_update && apt-get -qq download "$1"; }
}

# index_guest_modules TREE VERSION: lets kmod find the modules and their dependencies.
index_guest_modules() {
    local tree=$1
    # Debian moved the modules below /usr; kmod looks where it was built to look.
    if [ -d "$tree/usr/lib/modules" ]; then
        mkdir -p "$tree/lib"
        ln -sfn ../usr/lib/modules "$tree/lib/modules"
    else
        mkdir -p "$tree/usr/lib"
        ln -sfn ../../lib/modules "$tree/usr/lib/modules"
    fi
    depmod -b "$tree" "$2" || fail "depmod failed on the guest's modules"
}

# begin_initramfs DIR NAME INIT: busybox, with INIT as the first program, to be filled under DIR/NAME.root
# ("root" from here on) and packed by pack_initramfs.
begin_initramfs() {
    local busybox
    busybox=$(command -v busybox) || fail "no busybox on this machine"
    root=$1/$2.root
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,etc,proc,run,sys,tmp,disk,modules,scenarios,tools}
    cp "$busybox" "$root/bin/busybox"
    cp "$3" "$root/init"
    cp resources/guest/setup "$root/setup"
    chmod 755 "$root/init" "$root/bin/busybox"
}

# add_modules DIR MODULE...: with what they depend on. Of each, the file of its name lists these, in the order
# to load them. What is built in, or unknown to this kernel, is left out: the guest notices what it misses.
add_modules() {
    local dir=$1 version module file name
    shift
    version=$(sed 's/^linux-image-//' "$dir/package")
    for module in "$@"; do
        modprobe -d "$dir/tree" -S "$version" --show-depends "$module" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p' >"$root.modules" || continue
        while read -r file; do
            name=$(basename "$file")
            case $name in
            *.ko) cp "$file" "$root/modules/" ;;
            *.ko.xz) xz -dc "$file" >"$root/modules/${name%.xz}" ;;
            *.ko.zst) zstd -qdc "$file" >"$root/modules/${name%.zst}" ;;
            *) fail "a module packed in a way unknown here: $file" ;;
            esac
            echo "${name%.ko*}.ko"
        done <"$root.modules" >"$root/modules/$module"
    done
}

# add_programs PROGRAM...: this machine's own, in /tools, with the libraries they are linked to where they are here.
add_programs() {
    local program path library
    for program in "$@"; do
        path=$(command -v "$program") || fail "no $program on this machine"
        cp -L "$path" "$root/tools/$program"
        ldd "$path" | sed -n 's/.*[[:space:]]\(\/[^ ]*\) (0x.*/\1/p'
    done >"$root.libraries"
    while read -r library; do
        mkdir -p "$root${library%/*}"
        cp -L "$library" "$root$library"
    done < <(sort -u "$root.libraries")
}

# pack_initramfs: into DIR/NAME.initramfs.
pack_initramfs() {
    (cd "$root" && find . -print0 | cpio --quiet -0 -o -H newc -R 0:0) >"${root%.root}.initramfs" || fail "cpio failed"
    rm -r "$root" "$root".*
}
