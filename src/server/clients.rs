// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control socket and who is connected to it.

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control socket and who is connected to it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::time::Duration;

use crate::config::SocketOptions;
use crate::control::Command;
use crate::control::connection::{Connection, Step};

use super::door::Door;
use super::poll::{Interest, Poll};
use super::socket::{Listener, SocketError};

/// Connections at a time; one more takes the place of the one that is idle the longest.
const MAX_CLIENTS: usize = 16;
/// How long a client may take over a line that it has begun to send, or over an answer that it has not read.
const UNFINISHED: Duration = Duration::from_secs(30);

/// A connection's number, never used again: a late answer finds nobody else.
pub(super) type ClientId = u64;

/// The control socket.
#[derive(Debug)]
pub(super) struct Clients {
    /// Where they come in.
    door: Door,
    /// A client's token in the epoll set is this plus its number.
    first_token: u64,
    next: ClientId,
    clients: BTreeMap<ClientId, Client>,
    /// Requests that need the helper, oldest first. The first one is with it: one at a time, so
    /// that the keeper's jobs wait for one piece of work at most.
    jobs: VecDeque<(ClientId, Command)>,
}

#[derive(Debug)]
struct Client {
    connection: Connection,
    /// When it last finished something, or began what it has not finished.
    since: Duration,
    /// As the connection was then.
    unfinished: bool,
    lines: u64,
}

impl Client {
    fn new(connection: Connection, now: Duration) -> Self {
        Self { connection, since: now, unfinished: false, lines: 0 }
    }

    /// Something has happened on the connection.
    fn note(&mut self, now: Duration) {
        let (unfinished, lines) = (self.connection.is_unfinished(), self.connection.lines());
        // A byte now and then of the same line is no progress.
        if !(unfinished && self.unfinished) || lines != self.lines {
            self.since = now;
        }
        (self.unfinished, self.lines) = (unfinished, lines);
    }

    /// When it must have finished.
    fn deadline(&self) -> Option<Duration> {
        self.unfinished.then(|| self.since + UNFINISHED)
    }

    /// Orders those that may have to make room: first the ones that want nothing, the longest idle of them first.
    fn worth(&self) -> (bool, bool, Duration) {
        (self.connection.is_busy(), self.unfinished, self.since)
    }
}

impl Clients {
    /// Makes the socket; `token` names it in the epoll set, and all numbers above are ours too.
    pub(super) fn bind(
        options: &SocketOptions,
        poll: &Poll,
        token: u64,
    ) -> Result<Self, SocketError> {
        let mut door = Door::new(Listener::bind(options)?, token);
        door.open(poll).map_err(|source| {
            let path = options.path.clone();
            SocketError::Io { action: "watch", path, source }
        })?;
        Ok(Self {
            door,
            first_token: token + 1,
            next: 0,
            clients: BTreeMap::new(),
            jobs: VecDeque::new(),
        })
    }

    /// Somebody connects.
    pub(super) fn accept(&mut self, poll: &Poll, now: Duration) {
        let Some(stream) = self.door.accept(poll, now) else { return };
        let Ok(connection) = Connection::new(stream) else { return };
        if self.clients.len() >= MAX_CLIENTS {
            let oldest = self.clients.iter().min_by_key(|(_, client)| client.worth());
            if let Some((&id, _)) = oldest {
                self.dismiss(poll, id, "more clients came than there is room for; connect again");
            }
        }
        let id = self.next;
        self.next += 1;
        if poll.add(&connection, self.first_token + id, Interest::Read).is_ok() {
            self.clients.insert(id, Client::new(connection, now));
        }
    }

    /// The client a token belongs to.
    pub(super) fn client(&self, token: u64) -> ClientId {
        token.saturating_sub(self.first_token)
    }

    /// Something happened on a connection. Returns a request, to be answered with
    /// [`reply`](Self::reply).
    pub(super) fn ready(&mut self, poll: &Poll, id: ClientId, now: Duration) -> Option<Command> {
        let client = self.clients.get_mut(&id)?;
        let token = self.first_token + id;
        let step = client.connection.step();
        client.note(now);
        let connection = &client.connection;
        // Events come while it waits for an answer only if it has hung up.
        let watched = match step {
            Step::Answer(command) => match poll.change(connection, token, Interest::Nothing) {
                Ok(()) => return Some(command),
                Err(error) => Err(error),
            },
            Step::Read => poll.change(connection, token, Interest::Read),
            Step::Write => poll.change(connection, token, Interest::Write),
            Step::Wait | Step::Gone => Err(io::ErrorKind::NotConnected.into()),
        };
        if watched.is_err() {
            self.close(poll, id);
        }
        None
    }

    /// Answers a request.
    pub(super) fn reply(&mut self, poll: &Poll, id: ClientId, line: &str, now: Duration) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.connection.reply(line);
        client.note(now);
        // It is sent, and the next request read, when the loop comes round: one client that asks
        // all the time does not keep the others waiting.
        if poll.change(&client.connection, self.first_token + id, Interest::Write).is_err() {
            self.close(poll, id);
        }
    }

    /// When [`tick`](Self::tick) wants to be called.
    pub(super) fn deadline(&self) -> Option<Duration> {
        let unfinished = self.clients.values().filter_map(Client::deadline);
        unfinished.chain(self.door.deadline()).min()
    }

    /// Lets those go that did not finish in time.
    pub(super) fn tick(&mut self, poll: &Poll, now: Duration) {
        self.door.tick(poll, now);
        let late = |client: &Client| client.deadline().is_some_and(|at| at <= now);
        let late: Vec<ClientId> =
            self.clients.iter().filter(|(_, client)| late(client)).map(|(id, _)| *id).collect();
        for id in late {
            let seconds = UNFINISHED.as_secs();
            self.dismiss(poll, id, &format!("nothing was finished in {seconds} s; connect again"));
        }
    }

    /// Tells a client why, as far as it can be told without waiting, and closes.
    fn dismiss(&mut self, poll: &Poll, id: ClientId, why: &str) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.connection.refuse(&why);
            client.connection.step();
        }
        self.close(poll, id);
    }

    fn close(&mut self, poll: &Poll, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        // Closing it takes it out of the set as well.
        let _ = poll.remove(&client.connection);
        // The first is with the helper, however long that takes; the others must not pile up behind it.
        let first = self.jobs.pop_front();
        self.jobs.retain(|(waiting, _)| *waiting != id);
        if let Some(first) = first {
            self.jobs.push_front(first);
        }
    }

    /// Queues a request for the helper; returns it if the helper is free.
    pub(super) fn queue(&mut self, id: ClientId, command: Command) -> Option<(ClientId, Command)> {
        self.jobs.push_back((id, command));
        if self.jobs.len() == 1 { self.jobs.front().copied() } else { None }
    }

    /// The helper's answer; returns what it is to do next.
    pub(super) fn answered(
        &mut self,
        poll: &Poll,
        id: ClientId,
        line: &str,
        now: Duration,
    ) -> Option<(ClientId, Command)> {
        self.reply(poll, id, line, now);
        self.jobs.pop_front();
        self.jobs.front().copied()
    }
}

#[cfg(test)]
#[path = "clients_tests.rs"]
mod tests;
