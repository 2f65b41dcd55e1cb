// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

#[test]
fn lists_of_locks_are_read_for_one_file() {
    let dev = rustix::fs::makedev(254, 0);
    let text = "1: OFDLCK ADVISORY  WRITE -1 fe:00:77 0 99\n\
        1: -> OFDLCK ADVISORY  WRITE -1 fe:00:77 5 99\n\
        2: FLOCK  ADVISORY  WRITE 9737 fe:00:77 0 EOF\n\
        3: LEASE  ACTIVE    WRITE 9737 fe:00:77 0 EOF\n\
        lock:\t4: POSIX  ADVISORY  READ  12 fe:00:77 201 201\n\
        5: OFDLCK ADVISORY  READ -1 fe:00:78 100 100\n";
    let found: Vec<Listed> = listed(text, dev, 77).collect();
    let want = [Listed { exclusive: true, start: 0 }, Listed { exclusive: false, start: 201 }];
    assert_eq!(found, want);
}
