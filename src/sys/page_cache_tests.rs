// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;

use super::*;

fn cached_file() -> File {
    let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
    file.write_all(&vec![7; 64 << 10]).unwrap();
    file.sync_all().unwrap();
    file.rewind().unwrap();
    file.read_exact(&mut vec![0; 64 << 10]).unwrap();
    file
}

#[test]
fn dropping_clean_pages_empties_the_cache_and_both_counters_see_it() {
    let file = cached_file();
    let page = page_size();
    let all = (64 << 10) / page;
    assert_eq!(pages(file.as_fd(), FileRange::ALL).unwrap().cached, all);
    assert_eq!(mincore(file.as_fd(), FileRange::ALL).unwrap(), all);
    assert_eq!(mincore(file.as_fd(), FileRange::new(0, page)).unwrap(), 1);
    drop_clean(file.as_fd(), FileRange::ALL).unwrap();
    assert!(!has_clean_only(file.as_fd()));
    assert_eq!(pages(file.as_fd(), FileRange::ALL).unwrap().cached, 0);
    assert_eq!(mincore(file.as_fd(), FileRange::ALL).unwrap(), 0);
}

#[test]
fn written_back_pages_are_no_longer_dirty() {
    let mut file = cached_file();
    file.rewind().unwrap();
    file.write_all(&[1; 4096]).unwrap();
    let range = FileRange::new(0, 4096);
    match pages(file.as_fd(), range).unwrap().unwritten {
        Some(unwritten) => assert_eq!(unwritten, 1),
        None => return println!("skipped: no cachestat(2) here"),
    }
    assert!(!has_clean_only(file.as_fd()));
    file.sync_data().unwrap();
    assert!(has_clean_only(file.as_fd()));
    assert_eq!(pages(file.as_fd(), range).unwrap(), Pages { cached: 1, unwritten: Some(0) });
    assert_eq!(pages(file.as_fd(), FileRange::new(0, 0)).unwrap().cached, 0);
}

#[test]
fn a_page_counts_that_reaches_out_of_the_range() {
    let file = cached_file();
    let part = FileRange::new(4096 + 512, 4096 + 1024);
    match count(file.as_fd(), part) {
        Ok(pages) => assert_eq!(pages, 1),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            return println!("skipped: no cachestat(2) here");
        }
        Err(error) => panic!("{error}"),
    }
    assert_eq!(count(file.as_fd(), FileRange::new(512, 4096 + 512)).unwrap(), 2);
    drop_clean(file.as_fd(), FileRange::ALL).unwrap();
    assert_eq!(count(file.as_fd(), part).unwrap(), 0);
}
