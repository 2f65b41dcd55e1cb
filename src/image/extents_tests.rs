// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

const MIB: u64 = 1 << 20;
const BOUNDS: Bounds = Bounds {
    file_size: 10 * MIB + 100,
    device_size: 64 * MIB,
    fs_block: 4096,
    unit: 4096,
    write_block: 512,
};
/// A filesystem with four blocks in a page.
const SMALL: Bounds = Bounds { fs_block: 1024, write_block: 1024, ..BOUNDS };

fn raw(logical: u64, physical: u64, length: u64, flags: u32) -> RawExtent {
    RawExtent { logical, physical, length, flags }
}

fn one(flags: u32) -> State {
    translate(&[raw(0, MIB, 4096, flags)], FileRange::new(0, MIB), &BOUNDS)[0].state
}

#[test]
fn flags_become_states_and_unknown_ones_are_opaque() {
    assert_eq!(one(0), State::Mapped);
    assert_eq!(one(fiemap::LAST | fiemap::MERGED), State::Mapped);
    assert_eq!(one(fiemap::UNWRITTEN | fiemap::LAST), State::Unwritten);
    assert_eq!(one(fiemap::SHARED), State::Shared);
    assert_eq!(one(fiemap::SHARED | fiemap::UNWRITTEN), State::Opaque);
    for bit in 0..32 {
        let flag = 1 << bit;
        let known = fiemap::LAST | fiemap::MERGED | fiemap::UNWRITTEN | fiemap::SHARED;
        if flag & known == 0 {
            assert_eq!(one(flag), State::Opaque, "{flag:#x}");
        }
    }
    let opaque = [
        fiemap::UNKNOWN,
        fiemap::DELALLOC,
        fiemap::ENCODED,
        fiemap::DATA_ENCRYPTED,
        fiemap::NOT_ALIGNED,
        fiemap::DATA_INLINE,
        fiemap::DATA_TAIL,
    ];
    assert!(opaque.iter().all(|&flag| one(flag) == State::Opaque));
}

#[test]
fn extents_are_clipped_to_the_range_with_their_place() {
    let got = translate(&[raw(0, MIB, MIB, 0)], FileRange::new(8192, 16384), &BOUNDS);
    let want = Extent {
        range: FileRange::new(8192, 16384),
        device: DeviceOffset(MIB + 8192),
        state: State::Mapped,
    };
    assert_eq!(got, [want]);
}

#[test]
fn what_is_not_whole_blocks_or_outside_the_device_is_opaque() {
    let states = |extent| {
        let got = translate(&[extent], FileRange::new(0, MIB), &BOUNDS);
        got.iter().map(|e| (e.range, e.state)).collect::<Vec<_>>()
    };
    let block = FileRange::new(0, 4096);
    assert_eq!(states(raw(0, MIB + 1, 4096, 0)), [(block, State::Opaque)]);
    assert_eq!(states(raw(0, MIB, 100, 0)), [(block, State::Opaque)]);
    assert_eq!(states(raw(512, MIB, 512, 0)), [(block, State::Opaque)]);
    assert_eq!(states(raw(0, 64 * MIB - 512, 4096, 0)), [(block, State::Opaque)]);
    assert_eq!(states(raw(0, 0, 4096, 0)), [(block, State::Opaque)]);
}

#[test]
fn the_block_the_file_ends_in_is_opaque() {
    let range = FileRange::new(9 * MIB, 10 * MIB + 4096);
    let got = translate(&[raw(9 * MIB, 2 * MIB, 2 * MIB, 0)], range, &BOUNDS);
    assert_eq!(got.len(), 2);
    assert_eq!((got[0].range, got[0].state), (FileRange::new(9 * MIB, 10 * MIB), State::Mapped));
    assert_eq!(got[1].range, FileRange::new(10 * MIB, 10 * MIB + 4096));
    assert_eq!(got[1].state, State::Opaque);
}

#[test]
fn rounded_neighbours_do_not_overlap() {
    let raws = [raw(0, MIB, 6144, 0), raw(6144, 2 * MIB, 6144, 0)];
    let got = translate(&raws, FileRange::new(0, MIB), &BOUNDS);
    assert_eq!(got[0].range, FileRange::new(0, 8192));
    assert_eq!(got[1].range, FileRange::new(8192, 12288));
    assert!(got.iter().all(|e| e.state == State::Opaque));
}

#[test]
fn holes_fill_what_lies_between() {
    let range = FileRange::new(0, 16384);
    let extents = translate(&[raw(4096, MIB, 4096, 0)], range, &BOUNDS);
    let all = with_holes(&extents, range);
    let states: Vec<State> = all.iter().map(|e| e.state).collect();
    assert_eq!(states, [State::Hole, State::Mapped, State::Hole]);
    assert_eq!(all[2].range, FileRange::new(8192, 16384));
}

#[test]
fn a_page_of_blocks_in_several_extents_is_opaque_as_a_whole() {
    let raws = [
        raw(1024, MIB, 9 * 1024, 0),
        raw(10 * 1024, 2 * MIB, 6 * 1024, 0),
        raw(16 * 1024, 3 * MIB, 3 * 1024, fiemap::UNWRITTEN),
        raw(20 * 1024, 4 * MIB, 1024, 0),
    ];
    let got = translate(&raws, FileRange::new(0, MIB), &SMALL);
    let got: Vec<_> =
        got.iter().map(|e| (e.range.start >> 10, e.range.end >> 10, e.state)).collect();
    let want = [
        (0, 4, State::Opaque),
        (4, 8, State::Mapped),
        (8, 12, State::Opaque),
        (12, 16, State::Mapped),
        (16, 20, State::Opaque),
        (20, 24, State::Opaque),
    ];
    assert_eq!(got, want);
    let second = translate(&raws, FileRange::new(4096, MIB), &SMALL)[0];
    assert_eq!(second.device, DeviceOffset(MIB + 3 * 1024));
    let fourth = translate(&raws, FileRange::new(12288, MIB), &SMALL)[0];
    assert_eq!(fourth.device, DeviceOffset(2 * MIB + 2 * 1024));
}
