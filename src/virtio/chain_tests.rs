// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 1 << 20;
const TABLE: u64 = 0x1000;
const INDIRECT: u64 = 0x8000;
const BUFFERS: u64 = 0x2_0000;
const SIZE: u16 = 16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const IS_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

type Raw = (u64, u32, u16, u16);

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn put(memory: &Memory, table: u64, index: usize, (addr, len, flags, next): Raw) {
    let descriptor = Descriptor::new(addr, len, flags, next);
    memory.write_obj(descriptor, GuestAddress(table + 16 * index as u64)).unwrap();
}

/// Parses the chain at 0 of a table that begins with these descriptors.
fn parse(descriptors: &[Raw]) -> Result<(Parts, Chain), Malformed> {
    parse_in(&memory(), descriptors)
}

fn parse_in(memory: &Memory, descriptors: &[Raw]) -> Result<(Parts, Chain), Malformed> {
    for (index, descriptor) in descriptors.iter().enumerate() {
        put(memory, TABLE, index, *descriptor);
    }
    let mut chain = Chain::default();
    let table = Table::new(memory, GuestAddress(TABLE), u32::from(SIZE));
    chain.parse(&table, 0).map(|parts| (parts, chain))
}

fn header(memory: &Memory, at: u64, kind: u32, sector: u64) {
    memory.write_obj(kind.to_le(), GuestAddress(at)).unwrap();
    memory.write_obj(sector.to_le(), GuestAddress(at + 8)).unwrap();
}

#[test]
fn the_usual_read() {
    let memory = memory();
    header(&memory, BUFFERS, 0, 77);
    let (parts, chain) = parse_in(
        &memory,
        &[
            (BUFFERS, 16, NEXT, 1),
            (BUFFERS + 0x1000, 4096, NEXT | WRITE, 2),
            (BUFFERS + 0x3000, 1, WRITE, 0),
        ],
    )
    .unwrap();
    assert_eq!(parts.header, Some(Header { kind: 0, sector: 77 }));
    assert_eq!(parts.status, GuestAddress(BUFFERS + 0x3000));
    assert_eq!((parts.readable, parts.writable), (0, 4096));
    assert_eq!(chain.writable_data(), &[(GuestAddress(BUFFERS + 0x1000), 4096)]);
}

#[test]
fn an_indirect_table_is_the_whole_chain() {
    let memory = memory();
    header(&memory, BUFFERS, 1, 5);
    put(&memory, INDIRECT, 0, (BUFFERS, 16, NEXT, 1));
    put(&memory, INDIRECT, 1, (BUFFERS + 0x1000, 512, NEXT, 2));
    put(&memory, INDIRECT, 2, (BUFFERS + 0x3000, 1, WRITE, 0));
    let (parts, chain) = parse_in(&memory, &[(INDIRECT, 48, IS_INDIRECT, 0)]).unwrap();
    assert_eq!(parts.header, Some(Header { kind: 1, sector: 5 }));
    assert_eq!(chain.readable_data(), &[(GuestAddress(BUFFERS + 0x1000), 512)]);
    // Nested, empty, of broken size, not alone, out of range.
    put(&memory, INDIRECT, 0, (INDIRECT, 48, IS_INDIRECT, 0));
    for first in [
        (INDIRECT, 48, IS_INDIRECT, 0),
        (INDIRECT, 0, IS_INDIRECT, 0),
        (INDIRECT, 47, IS_INDIRECT, 0),
        (INDIRECT, 48, IS_INDIRECT | NEXT, 1),
    ] {
        assert_eq!(parse_in(&memory, &[first]).unwrap_err(), Malformed::Indirect);
    }
    let outside = parse_in(&memory, &[(u64::MAX - 15, 32, IS_INDIRECT, 0)]);
    assert_eq!(outside.unwrap_err(), Malformed::Unreadable);
}

#[test]
fn what_is_malformed() {
    let status = (BUFFERS, 1, WRITE, 0);
    assert_eq!(parse(&[(BUFFERS, 16, NEXT, 0)]).unwrap_err(), Malformed::TooLong);
    let index = Malformed::Index { index: 99, entries: u32::from(SIZE) };
    assert_eq!(parse(&[(BUFFERS, 16, NEXT, 99)]).unwrap_err(), index);
    assert_eq!(parse(&[(BUFFERS, 16, 0, 0)]).unwrap_err(), Malformed::NoStatus);
    assert_eq!(parse(&[(BUFFERS, 0, WRITE, 0)]).unwrap_err(), Malformed::NoStatus);
    let order = parse(&[(BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 16, 0, 0)]);
    assert_eq!(order.unwrap_err(), Malformed::Order);
    let big = parse(&[(0, u32::MAX, NEXT, 1), status]);
    assert_eq!(big.unwrap_err(), Malformed::TooBig);
    let (parts, _) = parse(&[(BUFFERS, 15, NEXT, 1), status]).unwrap();
    assert_eq!(parts.header, None);
    let (parts, _) = parse(&[(MEMORY - 8, 16, NEXT, 1), status]).unwrap();
    assert_eq!(parts.header, None);
}

#[test]
fn where_a_request_begins_is_guessed() {
    let memory = memory();
    header(&memory, BUFFERS, 0, 77);
    header(&memory, BUFFERS + 16, 0, u64::MAX);
    put(&memory, INDIRECT, 0, (BUFFERS, 16, NEXT, 1));
    put(&memory, INDIRECT, 1, (INDIRECT, 16, IS_INDIRECT, 1));
    let heads = [
        ((BUFFERS, 16, NEXT, 1), Some(77 * 512)),
        ((INDIRECT, 48, IS_INDIRECT, 0), Some(77 * 512)),
        // No such byte of a disk; a header, and a table, that are not in memory.
        ((BUFFERS + 16, 16, NEXT, 1), None),
        ((MEMORY - 12, 16, NEXT, 1), None),
        ((u64::MAX, 16, NEXT, 1), None),
        ((u64::MAX - 15, 32, IS_INDIRECT, 0), None),
    ];
    let table = Table::new(&memory, GuestAddress(TABLE), u32::from(SIZE));
    for (index, (descriptor, begins)) in (0u16..).zip(heads) {
        put(&memory, TABLE, usize::from(index), descriptor);
        assert_eq!(table.glimpse(index), begins, "{descriptor:x?}");
    }
    assert_eq!(table.glimpse(SIZE), None);
}

/// Cuts `len` bytes into pieces at the given places.
fn cut(len: u32, places: &[u32]) -> Vec<u32> {
    let mut places: Vec<u32> = places.iter().map(|place| place % (len + 1)).collect();
    places.sort_unstable();
    let mut pieces = Vec::new();
    let mut from = 0;
    for place in places.into_iter().chain([len]) {
        pieces.push(place - from);
        from = place;
    }
    pieces
}

fn hostile() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        3 => 0..MEMORY,
        1 => Just(TABLE),
        1 => Just(INDIRECT),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..5000u32, 1 => any::<u32>(), 1 => (0..20u32).prop_map(|n| n * 16)];
    let flags = prop_oneof![5 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![6 => 0..SIZE, 1 => any::<u16>()];
    (address, len, flags, next)
}

proptest! {
    /// However a request is cut into descriptors, the same bytes are found.
    #[test]
    fn any_layout(
        data in 0u32..9000,
        out in any::<bool>(),
        readable_cuts in prop::collection::vec(any::<u32>(), 0..6),
        writable_cuts in prop::collection::vec(any::<u32>(), 0..6),
    ) {
        let memory = memory();
        let (readable, writable) = if out { (16 + data, 1) } else { (16, data + 1) };
        header(&memory, BUFFERS, 7, 1 << 40);
        let mut descriptors = Vec::new();
        let mut at = BUFFERS;
        for (len, flags) in cut(readable, &readable_cuts)
            .into_iter()
            .map(|len| (len, NEXT))
            .chain(cut(writable, &writable_cuts).into_iter().map(|len| (len, NEXT | WRITE)))
        {
            descriptors.push((at, len, flags, descriptors.len() as u16 + 1));
            at += u64::from(len);
        }
        descriptors.last_mut().unwrap().2 &= !NEXT;
        let (parts, chain) = parse_in(&memory, &descriptors).unwrap();
        prop_assert_eq!(parts.header, Some(Header { kind: 7, sector: 1 << 40 }));
        prop_assert_eq!(parts.readable, u64::from(readable - 16));
        prop_assert_eq!(parts.writable, u64::from(writable - 1));
        let mut at = BUFFERS + 16;
        for (start, len) in chain.readable_data().iter().chain(chain.writable_data()) {
            prop_assert_eq!(start.0, at);
            prop_assert!(*len > 0);
            at += u64::from(*len);
        }
        prop_assert_eq!(parts.status.0, at);
    }

    /// Whatever is in the tables, an answer comes, of bounded size, and its parts add up.
    #[test]
    fn hostile_tables(
        direct in prop::collection::vec(hostile(), SIZE as usize),
        indirect in prop::collection::vec(hostile(), 20),
        head in 0..SIZE + 2,
    ) {
        let memory = memory();
        for (index, raw) in direct.into_iter().enumerate() {
            put(&memory, TABLE, index, raw);
        }
        for (index, raw) in indirect.into_iter().enumerate() {
            put(&memory, INDIRECT, index, raw);
        }
        let table = Table::new(&memory, GuestAddress(TABLE), u32::from(SIZE));
        prop_assert!(table.glimpse(head).is_none_or(|at| at.is_multiple_of(SECTOR)));
        let mut chain = Chain::default();
        if let Ok(parts) = chain.parse(&table, head) {
            let pieces = chain.readable_data().len() + chain.writable_data().len();
            prop_assert!(pieces <= MAX_DESCRIPTORS as usize);
            prop_assert_eq!(parts.readable, total(chain.readable_data()));
            prop_assert_eq!(parts.writable, total(chain.writable_data()));
            prop_assert!(parts.readable + parts.writable < 1 << 32);
            prop_assert!(chain.readable_data().iter().all(|(_, len)| *len > 0));
        }
    }
}
