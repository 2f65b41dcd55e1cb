// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

fn extent(start: u64, blocks: u64, state: State) -> Extent {
    let range = FileRange::new(start * 4096, (start + blocks) * 4096);
    Extent { range, device: DeviceOffset(1 << 30), state }
}

#[test]
fn a_sample_is_spread_over_extents_and_inside_them() {
    let one = spread(&[extent(0, 1000, State::Mapped)], 4096, 64);
    assert_eq!(one.len(), 64);
    assert_eq!(one[0], (0, DeviceOffset(1 << 30)));
    assert!(one[63].0 > 900 * 4096 && one.iter().all(|(at, _)| at % 4096 == 0));
    let many: Vec<Extent> = (0..600).map(|n| extent(n * 2, 1, State::Mapped)).collect();
    let sample = spread(&many, 4096, 64);
    assert!(sample.len() <= 64 && sample.len() >= 32);
    assert!(sample.last().unwrap().0 > 1000 * 4096);
}

#[test]
fn only_extents_with_a_place_are_sampled() {
    let extents = [
        extent(0, 4, State::Opaque),
        extent(4, 4, State::Unwritten),
        extent(8, 2, State::Shared),
        extent(10, 0, State::Mapped),
    ];
    let sample = spread(&extents, 4096, 64);
    assert_eq!(sample.iter().map(|(at, _)| at / 4096).collect::<Vec<_>>(), [8, 9]);
    assert!(spread(&[], 4096, 64).is_empty());
}
