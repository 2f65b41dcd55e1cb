// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Planning against a slow oracle: every byte of a request is moved exactly once, by the route its
//! block's state demands.

use proptest::prelude::*;

use super::*;
use crate::engine::extent::ExtentMap;

const BLOCKS: u64 = 24;

fn geometry(fs_block: u32, (dev_block, write_block): (u32, u32), file_size: u64) -> Geometry {
    Geometry {
        file_size,
        fs_block,
        file_align: 512,
        dev_block,
        write_block,
        mem_align: 512,
        bounce_bytes: 8192,
        bounce_slots: 2,
        ops: 8,
        zeroes_bytes: 4 << 20,
        punch_bytes: 256 << 20,
        lease_fresh: None,
        raw: crate::engine::RawLimits::default(),
    }
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![
        3 => Just(State::Mapped),
        1 => Just(State::Hole),
        1 => Just(State::Unwritten),
        1 => Just(State::Shared),
        1 => Just(State::Opaque),
    ]
}

/// One entry per filesystem block: its state and its own place, so that no two blocks join by chance.
fn view(mode: Mode, block: u64, states: &[State]) -> View {
    let mut map = ExtentMap::new();
    for (i, state) in (0u64..).zip(states) {
        let range = FileRange::new(i * block, (i + 1) * block);
        let device = DeviceOffset((1000 + i * 2) * block);
        map.replace(range, &[Extent { range, device, state: *state }]);
    }
    View { mode, map }
}

proptest! {
    #[test]
    fn pieces_cover_a_request_once_and_follow_the_states(
        direct in any::<bool>(),
        states in prop::collection::vec(state(), BLOCKS as usize),
        write in any::<bool>(),
        mem_aligned in any::<bool>(),
        (dev_block, write_block) in prop_oneof![Just((512, 512)), Just((512, 4096)), Just((4096, 4096))],
        start in 0..BLOCKS * 8 - 1,
        sectors in 1u64..100,
    ) {
        let fs_block = 4096u64;
        let size = BLOCKS * fs_block - 1024;
        let g = geometry(4096, (dev_block, write_block), size);
        let mode = if direct { Mode::Direct } else { Mode::Filesystem };
        // The last block of the file is cut short, so it is never raw.
        let mut states = states;
        states[BLOCKS as usize - 1] = State::Opaque;
        let view = view(mode, fs_block, &states);
        let all = FileRange::new(start * 512, (start * 512 + sectors * 512).min(size));
        prop_assume!(!all.is_empty());
        let mut hint = Hint::default();
        let access = Access { write, zeroes: false, locked: true, mem_aligned, base: 0, longest: u64::MAX };
        let mut rest = all;
        while !rest.is_empty() {
            let piece = next(&view, &g, access, rest, &mut hint).unwrap();
            prop_assert_eq!(piece.range.start, rest.start);
            prop_assert!(piece.range.end > rest.start && piece.range.end <= rest.end);
            prop_assert!(piece.unit.contains(&piece.range) && piece.unit.end <= size);
            prop_assert!(piece.bounce || (mem_aligned && !piece.partial()) || piece.route == Route::Zero);
            if piece.bounce {
                prop_assert!(piece.unit.len() <= u64::from(g.bounce_bytes));
            }
            for at in (piece.range.start..piece.range.end).step_by(512) {
                let block = at / fs_block;
                let state = if direct { states[block as usize] } else { State::Opaque };
                match piece.route {
                    Route::Device(place) => {
                        prop_assert!(state == State::Mapped || (state == State::Shared && !write));
                        let there = place.0 + (at - piece.unit.start);
                        prop_assert_eq!(there, (1000 + block * 2) * fs_block + at % fs_block);
                        prop_assert_eq!(piece.unit.start / fs_block, (piece.unit.end - 1) / fs_block);
                    }
                    Route::Zero => {
                        prop_assert!(!write && matches!(state, State::Hole | State::Unwritten));
                    }
                    Route::File => {
                        let right = if write { state != State::Mapped } else { state == State::Opaque };
                        prop_assert!(right);
                    }
                }
            }
            let unit = match piece.route {
                Route::Device(_) => u64::from(if write { write_block } else { dev_block }),
                Route::File if write => fs_block,
                Route::File | Route::Zero => 512,
            };
            prop_assert!(piece.unit.start.is_multiple_of(unit));
            prop_assert!(piece.unit.end.is_multiple_of(unit) || piece.unit.end == size);
            rest.start = piece.range.end;
        }
    }

    #[test]
    fn a_write_that_needs_nothing_is_whole_blocks_or_all_mapped(
        direct in any::<bool>(),
        states in prop::collection::vec(state(), BLOCKS as usize),
        start in 0..BLOCKS * 8 - 1,
        sectors in 1u64..40,
        write_block in prop_oneof![Just(512), Just(4096)],
    ) {
        let g = geometry(4096, (512, write_block), BLOCKS * 4096);
        let mode = if direct { Mode::Direct } else { Mode::Filesystem };
        let view = view(mode, 4096, &states);
        let all = FileRange::new(start * 512, (start * 512 + sectors * 512).min(BLOCKS * 4096));
        let access = Access { write: true, zeroes: false, locked: false, mem_aligned: true, base: 0, longest: u64::MAX };
        let free = if direct {
            let blocks = all.start / 4096..all.end.div_ceil(4096);
            all.aligned(u64::from(write_block))
                && blocks.into_iter().all(|b| states[b as usize] == State::Mapped)
        } else {
            all.aligned(4096)
        };
        let need = next(&view, &g, access, all, &mut Hint::default()).err();
        prop_assert_eq!(need, (!free).then_some(Need::Lock));
    }
}

#[test]
fn what_is_not_cached_is_asked_for_before_a_lock_is() {
    let g = geometry(4096, (512, 512), 1 << 20);
    let mut view = view(Mode::Direct, 4096, &[State::Hole; 4]);
    view.map.remove(FileRange::new(8192, 12288));
    let access = Access {
        write: true,
        zeroes: false,
        locked: false,
        mem_aligned: true,
        base: 0,
        longest: u64::MAX,
    };
    let mut hint = Hint::default();
    let mut ask = |start, end| next(&view, &g, access, FileRange::new(start, end), &mut hint).err();
    assert_eq!(ask(0, 16384), Some(Need::Map));
    assert_eq!(ask(0, 8192), Some(Need::Lock));
    assert_eq!(ask(16384, 20480), Some(Need::Map));
}

/// However much of it is still to come: many small extents must not be walked through before each piece.
#[test]
fn a_read_needs_no_more_than_its_beginning() {
    let g = geometry(4096, (512, 512), 1 << 20);
    let mut view =
        view(Mode::Direct, 4096, &[State::Hole, State::Mapped, State::Shared, State::Opaque]);
    view.map.remove(FileRange::new(8192, 12288));
    let access = Access {
        write: false,
        zeroes: false,
        locked: false,
        mem_aligned: true,
        base: 0,
        longest: u64::MAX,
    };
    let mut hint = Hint::default();
    let mut ask = |start, end| next(&view, &g, access, FileRange::new(start, end), &mut hint).err();
    assert_eq!(ask(0, 16384), None);
    assert_eq!(ask(4096 + 512, 16384), None);
    assert_eq!(ask(8192, 16384), Some(Need::Map));
    assert_eq!(ask(12288, 20480), None);
    assert_eq!(ask(16384, 20480), Some(Need::Map));
}

/// A file of 4096 + 700 bytes: the guest sees one sector of its last block, and what lies behind that is never transferred.
#[test]
fn a_file_that_ends_inside_a_sector() {
    let g = geometry(4096, (512, 512), 4096 + 700);
    let view = view(Mode::Direct, 4096, &[State::Mapped, State::Opaque]);
    let access = Access {
        write: true,
        zeroes: false,
        locked: true,
        mem_aligned: true,
        base: 0,
        longest: u64::MAX,
    };
    let last = FileRange::new(4096, 4096 + 512);
    for access in [access, Access { write: false, ..access }, Access { zeroes: true, ..access }] {
        let piece = next(&view, &g, access, last, &mut Hint::default()).unwrap();
        assert_eq!((piece.route, piece.unit, piece.range), (Route::File, last, last));
    }
    assert_eq!(file_unit(&g, last, 4096), last);
}
