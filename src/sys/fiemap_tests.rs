// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

fn abi(logical: u64, length: u64, flags: u32) -> Abi {
    Abi { logical, physical: 1 << 20, length, reserved64: [0; 2], flags, reserved: [0; 3] }
}

#[test]
fn a_full_answer_is_complete_only_with_the_last_extent() {
    assert!(check(&[abi(0, 4096, 0)], 2).unwrap().complete);
    assert!(!check(&[abi(0, 4096, 0)], 1).unwrap().complete);
    assert!(check(&[abi(0, 4096, LAST)], 1).unwrap().complete);
    assert!(check(&[], 1).unwrap().complete);
}

#[test]
fn nonsense_is_refused() {
    assert!(check(&[abi(0, 0, 0)], 2).is_err());
    assert!(check(&[abi(4096, 4096, 0), abi(0, 4096, 0)], 3).is_err());
    assert!(check(&[abi(0, 8192, 0), abi(4096, 4096, 0)], 3).is_err());
    assert!(check(&[abi(u64::MAX, 1, 0)], 3).is_err());
    assert!(check(&[abi(0, u64::MAX, 0)], 3).is_err());
}
