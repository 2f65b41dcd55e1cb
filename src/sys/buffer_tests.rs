// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;
use crate::engine::io::BounceSlot;
use vm_memory::Bytes;

const PAGE: u32 = 4096;

fn memory() -> Arc<Memory> {
    // Two regions that touch each other for the guest, and one apart.
    let regions = [
        (GuestAddress(0x1_0000), 0x4000),
        (GuestAddress(0x1_4000), 0x4000),
        (GuestAddress(0x10_0000), 0x4000),
    ];
    Arc::new(Memory::from_ranges(&regions).unwrap())
}

fn buffers() -> Buffers {
    let bounce = BouncePool::new(4, 2 * PAGE).unwrap();
    Buffers { guests: GuestBuffers::new(4), bounce }
}

fn guest(tag: u32, at: u64, len: u32) -> Buf {
    Buf::Guest { tag: Tag(tag), at, len }
}

fn bounce(slot: u32, at: u32, len: u32) -> Buf {
    Buf::Bounce { slot: BounceSlot(slot), at, len }
}

fn lens(buffers: &Buffers, buf: Buf) -> Option<Vec<usize>> {
    buffers.spans(buf).map(|spans| spans.map(|span| span.len).collect())
}

#[test]
fn ranges_are_cut_out_of_the_pieces() {
    let mut buffers = buffers();
    let pieces = [
        (GuestAddress(0x1_0000), 100),
        (GuestAddress(0x1_1000), 200),
        (GuestAddress(0x10_0000), 50),
    ];
    buffers.guests.set(Tag(1), &memory(), &pieces, 1).unwrap();
    assert_eq!(lens(&buffers, guest(1, 0, 350)), Some(vec![100, 200, 50]));
    assert_eq!(lens(&buffers, guest(1, 99, 202)), Some(vec![1, 200, 1]));
    assert_eq!(lens(&buffers, guest(1, 100, 200)), Some(vec![200]));
    assert_eq!(lens(&buffers, guest(1, 150, 10)), Some(vec![10]));
    assert_eq!(lens(&buffers, guest(1, 349, 1)), Some(vec![1]));
    assert_eq!(lens(&buffers, guest(1, 350, 0)), Some(vec![]));
    assert!(buffers.spans(guest(1, 100, 200)).unwrap().single().is_some());
    assert!(buffers.spans(guest(1, 99, 2)).unwrap().single().is_none());
}

#[test]
fn ranges_outside_the_data_are_refused() {
    let mut buffers = buffers();
    buffers.guests.set(Tag(0), &memory(), &[(GuestAddress(0x1_0000), 512)], 1).unwrap();
    for buf in [
        guest(0, 0, 513),
        guest(0, 512, 1),
        guest(0, u64::MAX, 1),
        guest(0, u64::MAX, 0),
        guest(1, 0, 1),
        guest(4, 0, 1),
        guest(u32::MAX, 0, 1),
        bounce(4, 0, 1),
        bounce(u32::MAX, 0, 1),
        bounce(0, 0, 2 * PAGE + 1),
        bounce(0, 2 * PAGE, 1),
        bounce(0, u32::MAX, u32::MAX),
    ] {
        assert_eq!(lens(&buffers, buf), None, "{buf:?}");
        assert_eq!(buffers.zero(buf), None, "{buf:?}");
        assert_eq!(buffers.copy(buf, bounce(0, 0, buf.len())), None, "{buf:?}");
    }
}

#[test]
fn pieces_outside_memory_are_refused_and_leave_the_tag_unset() {
    let mut buffers = buffers();
    for (addr, len) in [
        (0x0, 1),
        (0xffff, 2),
        (0x1_7fff, 2),
        (0x1_8000, 1),
        (0x10_3fff, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (0x1_0000, u32::MAX),
    ] {
        buffers.guests.set(Tag(0), &memory(), &[(GuestAddress(0x1_0000), 512)], 1).unwrap();
        let pieces = [(GuestAddress(0x1_0000), 16), (GuestAddress(addr), len)];
        let result = buffers.guests.set(Tag(0), &memory(), &pieces, 1);
        assert_eq!(result, Err(BadAddress::Outside { addr, len }));
        assert_eq!(lens(&buffers, guest(0, 0, 1)), None);
    }
}

#[test]
fn a_piece_may_cross_regions() {
    let mut buffers = buffers();
    buffers.guests.set(Tag(0), &memory(), &[(GuestAddress(0x1_3f00), 0x200)], 1).unwrap();
    let spans: Vec<_> = buffers.spans(guest(0, 0, 0x200)).unwrap().collect();
    assert_eq!(spans.iter().map(|span| span.len).sum::<usize>(), 0x200);
}

#[test]
fn alignment_is_that_of_what_is_contiguous() {
    let mut guests = GuestBuffers::new(1);
    let mut aligned = |pieces: &[(u64, u32)]| {
        let pieces: Vec<_> = pieces.iter().map(|&(addr, len)| (GuestAddress(addr), len)).collect();
        guests.set(Tag(0), &memory(), &pieces, 512).unwrap()
    };
    assert!(aligned(&[]));
    assert!(aligned(&[(0x1_0000, 512), (0x1_1000, 1024)]));
    assert!(aligned(&[(0x1_0000, 100), (0x1_0064, 412), (0x1_0200, 0), (0x1_0200, 512)]));
    assert!(!aligned(&[(0x1_0004, 512)]));
    assert!(!aligned(&[(0x1_0000, 100), (0x1_1000, 412)]));
}

#[test]
fn the_guard_is_held_as_long_as_the_tag_is_set() {
    let memory = memory();
    let mut guests = GuestBuffers::new(2);
    let pieces = [(GuestAddress(0x1_0000), 512)];
    guests.set(Tag(0), &memory, &pieces, 1).unwrap();
    guests.set(Tag(0), &memory, &pieces, 1).unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    guests.clear(Tag(0));
    assert_eq!(Arc::strong_count(&memory), 1);
    guests.clear(Tag(0));
    guests.clear(Tag(77));
}

#[test]
fn all_tags_have_their_data_in_one_memory_at_a_time() {
    let (before, after) = (memory(), memory());
    let mut guests = GuestBuffers::new(2);
    let pieces = [(GuestAddress(0x1_0000), 512)];
    guests.set(Tag(0), &before, &pieces, 1).unwrap();
    guests.set(Tag(1), &before, &pieces, 1).unwrap();
    assert_eq!(guests.set(Tag(2), &after, &pieces, 1), Err(BadAddress::OtherMemory));
    guests.clear(Tag(2));
    // Nor is a tag kept that was to have its data elsewhere.
    assert_eq!(guests.set(Tag(1), &after, &pieces, 1), Err(BadAddress::OtherMemory));
    assert_eq!(Arc::strong_count(&before), 2);
    guests.clear(Tag(1));
    guests.clear(Tag(0));
    assert_eq!(Arc::strong_count(&before), 1);
    guests.set(Tag(1), &after, &pieces, 1).unwrap();
    assert_eq!(Arc::strong_count(&after), 2);
}

#[test]
fn data_in_flight_are_not_let_go() {
    let memory = memory();
    let mut guests = GuestBuffers::new(1);
    let pieces = [(GuestAddress(0x1_0000), 512)];
    guests.set(Tag(0), &memory, &pieces, 1).unwrap();
    guests.pin(Tag(0));
    let again = guests.set(Tag(0), &memory, &pieces, 1);
    assert_eq!(again, Err(BadAddress::InFlight { tag: 0 }));
    let cleared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guests.clear(Tag(0))));
    assert_eq!(cleared.is_err(), cfg!(debug_assertions));
    assert_eq!(Arc::strong_count(&memory), 2);
    guests.unpin(Tag(0));
    guests.clear(Tag(0));
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn the_table_grows_to_a_limit() {
    let (mut guests, memory) = (GuestBuffers::new(1), memory());
    assert_eq!(guests.set(Tag(1000), &memory, &[], 1), Ok(true));
    for tag in [1 << 17, u32::MAX] {
        let refused = guests.set(Tag(tag), &memory, &[], 1);
        assert_eq!(refused, Err(BadAddress::NoSuchTag { tag }));
    }
}

#[test]
fn zero_and_copy_touch_exactly_their_range() {
    let memory = memory();
    let mut buffers = buffers();
    let bytes: Vec<u8> = (0..0x4000_u32).map(|i| (i % 251) as u8 + 1).collect();
    memory.write_slice(&bytes, GuestAddress(0x1_0000)).unwrap();
    let from = [(GuestAddress(0x1_0003), 700), (GuestAddress(0x1_0800), 1300)];
    let to = [(GuestAddress(0x10_0001), 999), (GuestAddress(0x10_1000), 1001)];
    buffers.guests.set(Tag(0), &memory, &from, 1).unwrap();
    buffers.guests.set(Tag(1), &memory, &to, 1).unwrap();

    assert_eq!(buffers.copy(guest(0, 0, 2000), guest(1, 0, 1999)), None);
    assert_eq!(buffers.copy(guest(0, 0, 2000), bounce(2, 5, 2000)), Some(()));
    assert_eq!(buffers.copy(bounce(2, 5, 2000), guest(1, 0, 2000)), Some(()));
    let sent: Vec<u8> = [&bytes[3..703], &bytes[0x800..0x800 + 1300]].concat();
    let read = |addr: u64, len: usize| {
        let mut got = vec![0; len];
        memory.read_slice(&mut got, GuestAddress(addr)).unwrap();
        got
    };
    assert_eq!([read(0x10_0001, 999), read(0x10_1000, 1001)].concat(), sent);
    assert_eq!(read(0x10_0000, 1), [0]);
    assert_eq!(read(0x10_1000 + 1001, 1), [0]);

    assert_eq!(buffers.zero(guest(0, 699, 2)), Some(()));
    assert_eq!(read(0x1_0003 + 698, 3), [bytes[701], 0, bytes[703]]);
    assert_eq!(read(0x1_0800, 2), [0, bytes[0x801]]);
}

#[test]
fn overlapping_buffers_do_no_harm() {
    let mut buffers = buffers();
    let memory = memory();
    memory.write_slice(&[1, 2, 3, 4], GuestAddress(0x1_0000)).unwrap();
    buffers.guests.set(Tag(0), &memory, &[(GuestAddress(0x1_0000), 4)], 1).unwrap();
    assert_eq!(buffers.copy(guest(0, 0, 3), guest(0, 1, 3)), Some(()));
    let mut got = [0; 4];
    memory.read_slice(&mut got, GuestAddress(0x1_0000)).unwrap();
    assert_eq!(got, [1, 1, 2, 3]);
}

#[test]
fn a_pool_that_cannot_be_is_refused() {
    assert!(BouncePool::new(0, PAGE).is_err());
    assert!(BouncePool::new(u32::MAX, u32::MAX).is_err());
}

/// Long lists cost memory while their requests are there, and little of it afterwards.
#[test]
fn long_lists_leave_little_behind() {
    const REQUESTS: u32 = 4096;
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let pieces: Vec<_> = (0..200).map(|n| (GuestAddress(n * 1024), 512)).collect();
    let mut guests = GuestBuffers::new(0);
    for _ in 0..2 {
        for tag in (0..REQUESTS).map(Tag) {
            guests.set(tag, &memory, &pieces, 1).unwrap();
        }
        assert_eq!(guests.pieces(), 200 * REQUESTS as usize);
        let outside = [(GuestAddress(0), 8), (GuestAddress(1 << 30), 8)];
        guests.clear(Tag(0));
        guests.set(Tag(0), &memory, &outside, 1).unwrap_err();
        (1..REQUESTS).for_each(|tag| guests.clear(Tag(tag)));
        assert!(guests.pieces() == 0 && guests.is_idle());
        let room: usize = guests.requests.iter().map(|request| request.pieces.capacity()).sum();
        assert!(room == guests.kept && room <= KEEP_ALL, "{room}");
    }
}
