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

/// Connections at a time; more are told so and closed.
const MAX_CLIENTS: usize = 16;

/// A connection's number, never used again: a late answer finds nobody else.
pub(super) type ClientId = u64;

/// The control socket.
#[derive(Debug)]
pub(super) struct Clients {
    /// Where they come in.
    pub(super) door: Door,
    /// A client's token in the epoll set is this plus its number.
    first_token: u64,
    next: ClientId,
    connections: BTreeMap<ClientId, Connection>,
    /// Requests that need the helper, oldest first. The first one is with it: one at a time, so
    /// that the keeper's jobs wait for one piece of work at most.
    jobs: VecDeque<(ClientId, Command)>,
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
            connections: BTreeMap::new(),
            jobs: VecDeque::new(),
        })
    }

    /// Somebody connects.
    pub(super) fn accept(&mut self, poll: &Poll, now: Duration) {
        let Some(stream) = self.door.accept(poll, now) else { return };
        let Ok(mut connection) = Connection::new(stream) else { return };
        if self.connections.len() >= MAX_CLIENTS {
            connection.refuse(&"too many clients; close one");
            connection.step();
            return;
        }
        let id = self.next;
        self.next += 1;
        if poll.add(&connection, self.first_token + id, Interest::Read).is_ok() {
            self.connections.insert(id, connection);
        }
    }

    /// The client a token belongs to.
    pub(super) fn client(&self, token: u64) -> ClientId {
        token.saturating_sub(self.first_token)
    }

    /// Something happened on a connection. Returns a request, to be answered with
    /// [`reply`](Self::reply).
    pub(super) fn ready(&mut self, poll: &Poll, id: ClientId) -> Option<Command> {
        let connection = self.connections.get_mut(&id)?;
        let token = self.first_token + id;
        // Events come while it waits for an answer only if it has hung up.
        let watched = match connection.step() {
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
    pub(super) fn reply(&mut self, poll: &Poll, id: ClientId, line: &str) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.reply(line);
        // It is sent, and the next request read, when the loop comes round: one client that asks
        // all the time does not keep the others waiting.
        if poll.change(connection, self.first_token + id, Interest::Write).is_err() {
            self.close(poll, id);
        }
    }

    fn close(&mut self, poll: &Poll, id: ClientId) {
        if let Some(connection) = self.connections.remove(&id) {
            // Closing it takes it out of the set as well.
            let _ = poll.remove(&connection);
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
    ) -> Option<(ClientId, Command)> {
        self.reply(poll, id, line);
        self.jobs.pop_front();
        self.jobs.retain(|(waiting, _)| self.connections.contains_key(waiting));
        self.jobs.front().copied()
    }
}
