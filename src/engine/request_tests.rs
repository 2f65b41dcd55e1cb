// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Request parsing against arithmetic in `u128`, where nothing overflows (R18).

use proptest::prelude::*;

use super::*;

/// Anything a guest may write into a field, but mostly near what matters.
fn hostile(near: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => near.saturating_sub(4)..near.saturating_add(4),
        4 => 0..64_u64,
        1 => (u64::MAX - 64)..=u64::MAX,
        1 => (u64::MAX / 512 - 4)..=(u64::MAX / 512 + 4),
        1 => any::<u64>(),
    ]
}

fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![4 => (0..300_u64).prop_map(|n| n * 512), 2 => 0..5000_u64, 1 => any::<u64>()]
}

fn kinds() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => prop_oneof![
            Just(VIRTIO_BLK_T_IN),
            Just(VIRTIO_BLK_T_OUT),
            Just(VIRTIO_BLK_T_FLUSH),
            Just(VIRTIO_BLK_T_GET_ID),
            Just(VIRTIO_BLK_T_DISCARD),
            Just(VIRTIO_BLK_T_WRITE_ZEROES),
        ],
        1 => any::<u32>(),
    ]
}

/// The range a transfer is about, if virtio allows it.
fn oracle(sector: u64, bytes: u64, limits: &Limits) -> Option<(u128, u128)> {
    let start = u128::from(sector) * 512;
    let end = start + u128::from(bytes);
    let fits = bytes > 0 && bytes.is_multiple_of(512) && end <= u128::from(limits.capacity);
    let base = u128::from(limits.base);
    (fits && base + end <= u128::from(u64::MAX)).then_some((base + start, base + end))
}

proptest! {
    #[test]
    fn parsing_is_the_oracle(
        (capacity, sector) in (0..5000_u64).prop_flat_map(|c| (Just(c), hostile(c))),
        kind in kinds(),
        readable in lengths(),
        writable in lengths(),
        base in prop_oneof![3 => (0..8_u64).prop_map(|n| n * 4096), 1 => any::<u64>()],
        read_only: bool,
    ) {
        let limits = Limits { base, capacity: capacity * 512, block_size: 512, read_only, unmap: true };
        let parsed = parse(Header { kind, sector }, readable, writable, &limits);
        let moved = match kind {
            VIRTIO_BLK_T_IN => Some(oracle(sector, writable, &limits)),
            VIRTIO_BLK_T_OUT if read_only => Some(None),
            VIRTIO_BLK_T_OUT => Some(oracle(sector, readable, &limits)),
            _ => None,
        };
        match (kind, moved) {
            (_, Some(None)) => prop_assert_eq!(parsed, Parsed::Answer(Status::IoError)),
            (_, Some(Some((start, end)))) => {
                let Parsed::Io(io) = parsed else { panic!("{parsed:?}") };
                let range = io.range();
                prop_assert_eq!((u128::from(range.start), u128::from(range.end)), (start, end));
                prop_assert_eq!(matches!(io, Kind::Read(_)), kind == VIRTIO_BLK_T_IN);
                prop_assert_eq!(io.modifies(), kind == VIRTIO_BLK_T_OUT);
            }
            (VIRTIO_BLK_T_FLUSH, None) => prop_assert_eq!(parsed, Parsed::Io(Kind::Flush)),
            (VIRTIO_BLK_T_GET_ID, None) if writable >= ID_BYTES => {
                prop_assert_eq!(parsed, Parsed::GetId);
            }
            (VIRTIO_BLK_T_GET_ID, None) => {
                prop_assert_eq!(parsed, Parsed::Answer(Status::IoError));
            }
            (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES, None) => {
                let fits = !read_only && readable <= 64 * 16;
                let error = Parsed::Answer(Status::IoError);
                prop_assert_eq!(parsed, if fits { Parsed::Segments(kind) } else { error });
            }
            (_, None) => prop_assert_eq!(parsed, Parsed::Answer(Status::Unsupported)),
        }
    }
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

proptest! {
    #[test]
    fn segments_are_the_oracle(
        list in prop::collection::vec(
            (hostile(1000), prop_oneof![4 => 0..1200_u32, 1 => any::<u32>()],
             prop_oneof![6 => 0..2_u32, 1 => any::<u32>()]),
            0..70,
        ),
        cut in 0..3_usize,
        discard: bool,
        unmap: bool,
    ) {
        let limits =
            Limits { base: 4096, capacity: 1000 * 512, block_size: 512, read_only: false, unmap };
        let kind = if discard { VIRTIO_BLK_T_DISCARD } else { VIRTIO_BLK_T_WRITE_ZEROES };
        let mut data: Vec<u8> = list.iter().flat_map(|&(s, n, f)| segment(s, n, f)).collect();
        data.truncate(data.len() - if cut == 2 { data.len().min(1) } else { 0 });
        let mut out = vec![Kind::Flush];
        let result = segments(kind, &data, &limits, &mut out);
        let mut expected = Ok(());
        if data.is_empty() || !data.len().is_multiple_of(16) || data.len() > 64 * 16 {
            expected = Err(Status::IoError);
        }
        for &(sector, count, flags) in list.iter().filter(|_| expected.is_ok()).collect::<Vec<_>>() {
            let known = if discard { flags == 0 } else { flags <= 1 };
            let there = oracle(sector, u64::from(count) * 512, &limits).is_some();
            if expected.is_ok() && !known {
                expected = Err(Status::Unsupported);
            } else if expected.is_ok() && (!there || count > MAX_SEGMENT_SECTORS) {
                expected = Err(Status::IoError);
            }
        }
        prop_assert_eq!(result, expected);
        for (kind, &(sector, count, flags)) in out.iter().zip(&list).filter(|_| result.is_ok()) {
            let start = limits.base + sector * 512;
            let range = FileRange::new(start, start + u64::from(count) * 512);
            let unmap = unmap && flags == 1;
            let zeroes = Kind::WriteZeroes { range, unmap };
            prop_assert_eq!(*kind, if discard { Kind::Discard(range) } else { zeroes });
        }
        prop_assert!(result.is_err() || out.len() == list.len());
    }
}

#[test]
fn the_status_bytes_are_virtios() {
    assert_eq!([Status::Ok, Status::IoError, Status::Unsupported].map(Status::byte), [0, 1, 2]);
}
