// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

#[test]
fn a_number_without_a_device_is_an_error() {
    let (path, error) = open_number(rustix::fs::makedev(7, 999_999), true).unwrap_err();
    assert_eq!((path, error.kind()), (PathBuf::new(), io::ErrorKind::NotFound));
    assert!(kernel_name(rustix::fs::makedev(7, 999_999)).is_err());
    assert!(is_anonymous(rustix::fs::makedev(0, 23)));
    assert!(!is_anonymous(rustix::fs::makedev(7, 0)));
}
