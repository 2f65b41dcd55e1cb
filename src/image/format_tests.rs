// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

#[test]
fn what_qemu_img_makes_is_recognised() {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [
        ("qcow2", Format::Qcow2),
        ("vmdk", Format::Vmdk),
        ("vhdx", Format::Vhdx),
        ("vdi", Format::Vdi),
        ("vpc", Format::Vhd),
        ("qed", Format::Qed),
    ] {
        let path = dir.path().join(name);
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", name])
            .args([path.as_os_str(), "8M".as_ref()])
            .status();
        if !made.is_ok_and(|status| status.success()) {
            println!("skipped {name}: qemu-img does not make one here");
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(Format::detect(&bytes[..HEAD], &[]), Some(format), "{name}");
        assert_eq!(Format::detect(&bytes[..HEAD], &[]).unwrap().qemu_name(), name);
    }
}

#[test]
fn a_fixed_vhd_is_known_by_its_footer_and_raw_bytes_are_not_taken_for_anything() {
    let mut footer = [0; 512];
    footer[..8].copy_from_slice(b"conectix");
    assert_eq!(Format::detect(&[0; HEAD], &footer), Some(Format::Vhd));
    assert_eq!(Format::detect(&[0; HEAD], &[0; 512]), None);
    assert_eq!(Format::detect(b"QF", &[]), None);
    assert_eq!(Format::detect(&[], &[]), None);
}
