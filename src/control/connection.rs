// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One client of the control socket, without ever waiting for it.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use super::{Command, MAX_LINE, RequestError, failure};

/// Bytes read at once.
const CHUNK: usize = 4096;

/// A client.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    /// What is left to be sent.
    output: Vec<u8>,
    /// A request was handed out and has no reply yet. Nothing is read meanwhile: a client that
    /// asks faster than it reads the answers has to wait.
    busy: bool,
    /// It sends nothing more.
    ended: bool,
    /// It is not to be listened to any more.
    closing: bool,
    lines: u64,
}

/// What a connection needs next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// An answer to this, with [`Connection::reply`].
    Answer(Command),
    /// Something to read.
    Read,
    /// Room to write.
    Write,
    /// The answer that is being worked on.
    Wait,
    /// Nothing: it is gone.
    Gone,
}

impl Connection {
    /// A connection over `stream`.
    ///
    /// # Errors
    /// The stream cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            busy: false,
            ended: false,
            closing: false,
            lines: 0,
        })
    }

    /// Answers the request handed out last.
    pub fn reply(&mut self, line: &str) {
        self.busy = false;
        self.output.extend_from_slice(line.as_bytes());
    }

    /// Says why, and closes when that is sent.
    pub fn refuse(&mut self, error: &impl ToString) {
        self.reply(&failure(error));
        self.closing = true;
    }

    /// How many lines have been taken: what a client that gets on with it makes grow.
    #[must_use]
    pub const fn lines(&self) -> u64 {
        self.lines
    }

    /// Whether it is the client's turn to go on with something begun: a line that it has sent in part, or an
    /// answer that it has not read.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        let nothing = self.input.is_empty() && self.output.is_empty();
        !(self.busy || nothing)
    }

    /// Whether a request of its waits for an answer.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        self.busy
    }

    /// Goes a step further without waiting: one line is taken at most, and read from the stream once, whatever there
    /// is. The caller has others to serve and comes back.
    pub fn step(&mut self) -> Step {
        if let Some(step) = self.send() {
            return step;
        }
        if self.closing {
            return Step::Gone;
        }
        if self.busy {
            return Step::Wait;
        }
        if !self.has_line()
            && !self.ended
            && let Some(step) = self.fill()
        {
            return step;
        }
        if self.has_line() {
            return self.take_line();
        }
        if self.ended {
            return Step::Gone;
        }
        if self.input.len() > MAX_LINE {
            // Where the next request would begin cannot be known.
            self.refuse(&RequestError::TooLong);
            return Step::Write;
        }
        Step::Read
    }

    /// Sends what is left to be sent; `None` if nothing is left.
    fn send(&mut self) -> Option<Step> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Some(Step::Write),
                    io::ErrorKind::Interrupted => {}
                    _ => return Some(Step::Gone),
                },
            }
        }
        None
    }

    fn has_line(&self) -> bool {
        self.input.contains(&b'\n')
    }

    fn take_line(&mut self) -> Step {
        let end = self.input.iter().position(|byte| *byte == b'\n').unwrap_or(0);
        let line: Vec<u8> = self.input.drain(..=end).collect();
        self.lines += 1;
        match Command::parse(&line) {
            Ok(command) => {
                self.busy = true;
                Step::Answer(command)
            }
            Err(error) => {
                self.reply(&failure(&error));
                Step::Write
            }
        }
    }

    fn fill(&mut self) -> Option<Step> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(count) => self.input.extend(chunk.iter().take(count)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Some(Step::Read),
                io::ErrorKind::Interrupted => {}
                _ => return Some(Step::Gone),
            },
        }
        None
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Connection::new(ours).unwrap(), theirs)
    }

    fn read_all(stream: &mut UnixStream) -> String {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    /// As far as it goes until it needs something.
    fn go(connection: &mut Connection) -> Step {
        let mut step = connection.step();
        for _ in 0..100 {
            if matches!(step, Step::Read | Step::Write) {
                step = connection.step();
            }
        }
        step
    }

    const STATUS: &[u8] = b"{\"v\":1,\"cmd\":\"status\"}\n";

    #[test]
    fn requests_are_answered_one_after_the_other() {
        let (mut connection, mut client) = pair();
        assert_eq!(connection.step(), Step::Read);
        client.write_all(&STATUS[..10]).unwrap();
        assert_eq!(connection.step(), Step::Read);
        client.write_all(&STATUS[10..]).unwrap();
        client.write_all(STATUS).unwrap();
        assert_eq!(connection.step(), Step::Answer(Command::Status));
        assert_eq!(connection.step(), Step::Wait);
        connection.reply("one\n");
        assert_eq!(connection.step(), Step::Answer(Command::Status));
        connection.reply("two\n");
        assert_eq!(connection.step(), Step::Read);
        assert_eq!(read_all(&mut client), "one\ntwo\n");
    }

    #[test]
    fn a_client_that_only_stops_sending_gets_its_answer() {
        let (mut connection, mut client) = pair();
        client.write_all(STATUS).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(connection.step(), Step::Answer(Command::Status));
        connection.reply("one\n");
        assert_eq!(connection.step(), Step::Gone);
        drop(connection);
        assert_eq!(read_all(&mut client), "one\n");
    }

    #[test]
    fn an_error_does_not_end_the_connection() {
        let (mut connection, mut client) = pair();
        client.write_all(b"hello\n").unwrap();
        client.write_all(STATUS).unwrap();
        assert_eq!(connection.step(), Step::Write);
        assert_eq!(connection.step(), Step::Answer(Command::Status));
        assert!(read_all(&mut client).starts_with("{\"v\":1,\"error\":\"not a request"));
    }

    #[test]
    fn an_endless_line_ends_it() {
        let (mut connection, mut client) = pair();
        client.write_all(&vec![b' '; MAX_LINE + 1]).unwrap();
        assert_eq!(go(&mut connection), Step::Gone);
        drop(connection);
        assert!(read_all(&mut client).contains("longer than 65536 bytes"));
    }

    #[test]
    fn a_step_takes_one_line_however_many_there_are() {
        let (mut connection, mut client) = pair();
        client.write_all(&b"\n".repeat(10_000)).unwrap();
        for lines in 1..=100 {
            assert_eq!(connection.step(), Step::Write);
            assert_eq!(connection.lines(), lines);
            assert!(connection.output.len() < 200 && connection.input.len() <= CHUNK);
        }
        assert_eq!(read_all(&mut client).lines().count(), 99);
    }

    #[test]
    fn it_is_known_whose_turn_it_is() {
        let (mut connection, mut client) = pair();
        assert_eq!(connection.step(), Step::Read);
        assert!(!connection.is_unfinished() && !connection.is_busy());
        client.write_all(&STATUS[..10]).unwrap();
        assert_eq!(connection.step(), Step::Read);
        assert!(connection.is_unfinished());
        client.write_all(&STATUS[10..]).unwrap();
        assert_eq!(connection.step(), Step::Answer(Command::Status));
        assert!(!connection.is_unfinished() && connection.is_busy());
        connection.reply("one\n");
        assert!(connection.is_unfinished() && !connection.is_busy());
        assert_eq!(connection.step(), Step::Read);
        assert!(!connection.is_unfinished());
    }

    #[test]
    fn a_slow_reader_waits_for_itself_only() {
        let (mut connection, mut client) = pair();
        client.write_all(STATUS).unwrap();
        client.write_all(STATUS).unwrap();
        assert_eq!(connection.step(), Step::Answer(Command::Status));
        let line = "x".repeat(4 << 20);
        connection.reply(&line);
        assert_eq!(connection.step(), Step::Write);
        // The second request stays where it is until the first answer is out.
        let mut got = 0;
        while got < line.len() {
            got += read_all(&mut client).len();
            connection.step();
        }
        assert_eq!(connection.step(), Step::Wait);
    }
}
