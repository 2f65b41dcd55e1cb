# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# shellcheck shell=bash
# Installs the Debian packages the scripts here need; sourced after lib/common.sh. Does nothing, and asks
# for nothing, when everything is there. No mirror is named here: apt's own sources say which one to use.

# What a boot needs besides QEMU.
# shellcheck disable=SC2034
PACKAGES_BOOT=(gcc libc6-dev pkg-config e2fsprogs busybox-static cpio kmod util-linux mount xz-utils zstd)
# What the guest of guest.sh works with, and what it leaves is checked with.
# shellcheck disable=SC2034
PACKAGES_GUEST=("${PACKAGES_BOOT[@]}" fio xfsprogs cryptsetup-bin)
# What the tests make their images and disks with, and what checks these scripts.
# shellcheck disable=SC2034
PACKAGES_TEST=("${PACKAGES_BOOT[@]}" xfsprogs btrfs-progs shellcheck kcov valgrind)
# The oldest QEMU that is compared with.
QEMU_MAJOR=10

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" >/dev/null
}

# A machine may have stale lists, or none: they are fetched once, and only when something is missing.
apt_update() {
    [ -n "${APT_UPDATED:-}" ] || apt_get update || fail "apt-get update failed: see the lines above"
    APT_UPDATED=1
}

missing_packages() {
    local package
    for package in "$@"; do
        # shellcheck disable=SC2016
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

qemu_is_new() {
    local version
    command -v qemu-storage-daemon >/dev/null || return 1
    version=$(qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\)\..*/\1/p')
    [ "${version:-0}" -ge "$QEMU_MAJOR" ]
}

qemu_candidate_is_new() {
    local version
    version=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: \([0-9]*:\)\{0,1\}\([0-9]*\).*/\2/p')
    [ "${version:-0}" -ge "$QEMU_MAJOR" ]
}

codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# mirror_of SUITE: the first mirror apt fetches that suite from, or nothing.
mirror_of() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$1" '$1 == suite && !found { print $2; found = 1 }'
}

# add_backports FOR: adds the release's backports from the mirror the release itself comes from.
add_backports() {
    local suite mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg options=""
    suite=$(codename)-backports
    [ -z "$(mirror_of "$suite")" ] || return 0
    mirror=$(mirror_of "$(codename)")
    [ -n "$mirror" ] || fail "apt's sources name no mirror for $(codename): add one, or install $1 by hand"
    if [ -e "$keyring" ]; then options="[signed-by=$keyring] "; fi
    echo "deb $options$mirror $suite main" | as_root tee "/etc/apt/sources.list.d/$suite.list" >/dev/null
    APT_UPDATED=
    apt_update
}

install_qemu() {
    local from=()
    if qemu_is_new; then return; fi
    apt_update
    if ! qemu_candidate_is_new; then
        add_backports "QEMU $QEMU_MAJOR or newer"
        from=(-t "$(codename)-backports")
    fi
    say "installing QEMU"
    apt_get install -y --no-install-recommends "${from[@]}" qemu-system-x86 qemu-utils ||
        fail "QEMU could not be installed: see the lines above"
    qemu_is_new || fail "QEMU $QEMU_MAJOR or newer is needed, and this Debian has none to offer"
}

# Whether this release, or what was added to it, has the package at all.
is_known() { apt-cache policy "$1" | grep -q '^ *Candidate: [^(]'; }

# install_packages PACKAGE...: what is missing of these, and QEMU.
install_packages() {
    local missing package
    mapfile -t missing < <(missing_packages "$@")
    command -v apt-get >/dev/null || fail "this is not a Debian machine: there is no apt-get"
    # Administration tools are not on everybody's PATH.
    PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
    if [ "${#missing[@]}" -gt 0 ]; then
        say "installing ${missing[*]}"
        apt_update
        for package in "${missing[@]}"; do
            is_known "$package" || add_backports "$package"
        done
        apt_get install -y --no-install-recommends "${missing[@]}" || fail "packages could not be installed: see the lines above"
    fi
    install_qemu
}
