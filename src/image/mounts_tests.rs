// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::path::Path;

use super::*;

#[test]
fn mountinfo_is_read_with_and_without_optional_fields() {
    let text = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
        99 27 0:51 / /mnt/a\\040b rw shared:7 master:2 - overlay over \
        rw,lowerdir=/l,upperdir=/srv/up\\040per,workdir=/w\n\
        nonsense\n";
    let mounts = parse_mountinfo(text);
    assert_eq!(mounts.len(), 2);
    assert_eq!((mounts[0].id, mounts[0].device, mounts[0].kind.as_str()), (27, (254, 0), "ext4"));
    assert_eq!(mounts[0].options, ["rw", "discard"]);
    assert_eq!(mounts[1].point, Path::new("/mnt/a b"));
    assert_eq!(mounts[1].option_path("upperdir").unwrap(), Path::new("/srv/up per"));
    assert_eq!(mounts[1].option_path("upper"), None);
}

#[test]
fn this_machines_own_mounts_are_all_understood() {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(parse_mountinfo(&text).len(), text.lines().count());
}

#[test]
fn only_swap_files_are_listed() {
    let text = "Filename\tType\tSize\tUsed\tPriority\n\
        /dev/sda2 partition 1 0 -2\n/var/swap\\040file file 1 0 -3\n";
    assert_eq!(parse_swaps(text), [Path::new("/var/swap file")]);
}

#[test]
fn export_tables_of_all_three_kinds() {
    let kernel = "# Version 1.1\n# Path Client(Flags) # IPs\n/srv/nfs\t*(rw,wdelay)\n";
    assert_eq!(parse_exports(kernel), [Path::new("/srv/nfs")]);
    let etc = "  # comment\n\n\"/with space\" host(rw)\n/srv\\040x 10.0.0.0/8(ro)\n-sec=sys\n";
    assert_eq!(parse_exports(etc), [Path::new("/with space"), Path::new("/srv x")]);
}

#[test]
fn a_bind_mount_does_not_hide_where_a_file_lies() {
    let text = "30 1 8:1 / /data rw - ext4 /dev/sda1 rw\n\
        31 1 8:1 /dir /mnt/bind rw - ext4 /dev/sda1 rw\n\
        32 1 8:2 / /other rw - ext4 /dev/sda2 rw\n";
    let mounts = parse_mountinfo(text);
    let image = Place::new(Path::new("/mnt/bind/vm/a.img"), &mounts[1]).unwrap();
    let upper = |path: &str, mount: usize| Place::new(Path::new(path), &mounts[mount]).unwrap();
    assert!(image.is_below(&upper("/data/dir", 0)));
    assert!(image.is_below(&upper("/data", 0)));
    assert!(!image.is_below(&upper("/data/di", 0)));
    assert!(!image.is_below(&upper("/other/dir", 2)));
    assert_eq!(Place::new(Path::new("/elsewhere"), &mounts[0]), None);
}

#[test]
fn an_upper_directory_named_from_elsewhere_is_known_by_its_end() {
    let place =
        Place { device: (254, 1), path: "/var/lib/containers/overlay/ab12/diff/disk.img".into() };
    assert!(
        place.is_below_any(Path::new("ab12/diff")) && place.is_below_any(Path::new("../ab12/diff"))
    );
    assert!(
        !place.is_below_any(Path::new("cd34/diff")) && !place.is_below_any(Path::new("12/diff"))
    );
    assert!(!place.is_below_any(Path::new(".")));
    assert!(!place.is_below_any(Path::new("diff/disk.img")), "the image itself is no directory");
}
