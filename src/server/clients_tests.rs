// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::*;

const STATUS: &[u8] = b"{\"v\":1,\"cmd\":\"status\"}\n";
const CHECK: &[u8] = b"{\"v\":1,\"cmd\":\"check\"}\n";
const START: Duration = Duration::from_secs(1000);
const SECOND: Duration = Duration::from_secs(1);

/// A control socket whose clock is the test's.
struct Bench {
    clients: Clients,
    poll: Poll,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c");
        let options = SocketOptions { path: path.clone(), mode: 0o600, owner: None, group: None };
        let poll = Poll::new().unwrap();
        let clients = Clients::bind(&options, &poll, 10).unwrap();
        Self { clients, poll, path, _directory: directory }
    }

    /// The next client, which is accepted at `now`, and its number.
    fn connect(&mut self, now: Duration) -> (UnixStream, ClientId) {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.clients.accept(&self.poll, now);
        (stream, self.clients.next - 1)
    }

    /// What the loop does when something has happened on a connection.
    fn ready(&mut self, id: ClientId, now: Duration) -> Option<Command> {
        self.clients.ready(&self.poll, id, now)
    }

    fn tick(&mut self, now: Duration) {
        self.clients.tick(&self.poll, now);
    }
}

/// All that has been said to a client, and whether that was all.
fn heard(stream: &mut UnixStream) -> (String, bool) {
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes).is_ok();
    (String::from_utf8(bytes).unwrap(), ended)
}

#[test]
fn the_longest_idle_client_makes_room() {
    let mut bench = Bench::new();
    let seconds = (0..).map(|second| START + SECOND * second);
    let mut clients: Vec<_> = seconds.take(MAX_CLIENTS).map(|now| bench.connect(now)).collect();
    // The first has asked something since, the second is in the middle of a line.
    let now = START + SECOND * 20;
    clients[0].0.write_all(STATUS).unwrap();
    assert_eq!(bench.ready(0, now), Some(Command::Status));
    bench.clients.reply(&bench.poll, 0, "one\n", now);
    assert_eq!(bench.ready(0, now), None);
    clients[1].0.write_all(&STATUS[..5]).unwrap();
    assert_eq!(bench.ready(1, now), None);
    let (mut late, id) = bench.connect(now + SECOND);
    assert_eq!(heard(&mut clients[0].0), ("one\n".to_owned(), false));
    assert!(!heard(&mut clients[1].0).1);
    let (said, ended) = heard(&mut clients[2].0);
    assert!(ended && said.contains("more clients came"), "{said}");
    assert_eq!(bench.clients.clients.len(), MAX_CLIENTS);
    late.write_all(STATUS).unwrap();
    assert_eq!(bench.ready(id, now + SECOND), Some(Command::Status));
}

#[test]
fn clients_that_all_wait_for_the_helper_lock_nobody_out_and_do_not_pile_up() {
    let mut bench = Bench::new();
    let mut streams = Vec::new();
    for turn in 0..100 {
        let (mut stream, id) = bench.connect(START + SECOND * turn);
        stream.write_all(CHECK).unwrap();
        let command = bench.ready(id, START + SECOND * turn).unwrap();
        assert_eq!(bench.clients.queue(id, command).is_some(), turn == 0);
        streams.push(stream);
        assert!(bench.clients.clients.len() <= MAX_CLIENTS);
        assert!(bench.clients.jobs.len() <= MAX_CLIENTS + 1);
    }
    // The helper, which had the first all the time, comes back.
    let now = START + SECOND * 200;
    let next = bench.clients.answered(&bench.poll, 0, "late\n", now);
    assert_eq!(next, Some((84, Command::Check)));
}

#[test]
fn half_a_line_times_out_also_if_a_byte_comes_now_and_then() {
    let mut bench = Bench::new();
    let (mut idle, _) = bench.connect(START);
    let (mut slow, id) = bench.connect(START);
    assert_eq!(bench.clients.deadline(), None);
    for byte in 0..20 {
        slow.write_all(&STATUS[byte..=byte]).unwrap();
        let now = START + SECOND * u32::try_from(byte).unwrap();
        assert_eq!(bench.ready(id, now), None);
        bench.tick(now);
    }
    assert_eq!(bench.clients.deadline(), Some(START + UNFINISHED));
    assert!(!heard(&mut slow).1);
    bench.tick(START + UNFINISHED);
    let (said, ended) = heard(&mut slow);
    assert!(ended && said.contains("nothing was finished in 30 s"), "{said}");
    // Who begins nothing may stay.
    bench.tick(START * 1000);
    assert!(!heard(&mut idle).1);
    assert_eq!(bench.clients.deadline(), None);
}

#[test]
fn an_answer_that_is_not_read_times_out() {
    let mut bench = Bench::new();
    let (mut deaf, id) = bench.connect(START);
    deaf.write_all(STATUS).unwrap();
    assert_eq!(bench.ready(id, START), Some(Command::Status));
    // The helper may take its time: that is no fault of the client's.
    let answered = START + SECOND * 100;
    bench.tick(answered);
    let line = format!("{}\n", "x".repeat(4 << 20));
    bench.clients.reply(&bench.poll, id, &line, answered);
    assert_eq!(bench.ready(id, answered), None);
    assert_eq!(bench.clients.deadline(), Some(answered + UNFINISHED));
    bench.tick(answered + UNFINISHED);
    let (said, ended) = heard(&mut deaf);
    assert!(ended && said.len() < line.len());
    assert!(bench.clients.clients.is_empty());
}

/// One that pipelines requests and reads the answers is always in the middle of something, and late with nothing.
#[test]
fn a_client_that_gets_on_with_it_never_times_out() {
    let mut bench = Bench::new();
    let (mut busy, id) = bench.connect(START);
    busy.write_all(&STATUS.repeat(100)).unwrap();
    for turn in 0..100 {
        let now = START + SECOND * 20 * turn;
        assert_eq!(bench.ready(id, now), Some(Command::Status));
        bench.clients.reply(&bench.poll, id, "one\n", now);
        bench.tick(now + SECOND);
    }
    assert_eq!(bench.ready(id, START + SECOND * 2000), None);
    assert_eq!(heard(&mut busy), ("one\n".repeat(100), false));
}
