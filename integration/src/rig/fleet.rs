// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One extentd that serves several devices.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{Client, ClientOptions};
use super::daemon::{Daemon, Status};
use super::wait::{self, PATIENCE};

/// A device's image, and the lines of its table besides those that name image and sockets.
pub type Device<'a> = (&'a Path, &'a str);

/// A running extentd and its devices.
#[derive(Debug)]
pub struct Fleet {
    /// The process; its sockets are the first device's.
    pub daemon: Daemon,
    dir: PathBuf,
}

impl Fleet {
    /// Starts the extentd at `program`, with its file, its log and its sockets in `dir`, and waits for the first
    /// device's socket.
    pub fn start(program: &str, dir: &Path, devices: &[Device<'_>]) -> io::Result<Fleet> {
        let config = dir.join("devices.toml");
        let table = |(index, (image, more)): (usize, &Device<'_>)| {
            format!(
                "[[device]]\nblk-file = {image:?}\nsocket-path = {:?}\ncontrol-path = {:?}\n{more}\n",
                socket(dir, index),
                control(dir, index)
            )
        };
        std::fs::write(&config, devices.iter().enumerate().map(table).collect::<String>())?;
        let (socket, control) = (socket(dir, 0), control(dir, 0));
        let daemon = Daemon::start_config(Path::new(program), dir, &config, socket, control)?;
        Ok(Fleet { daemon, dir: dir.to_owned() })
    }

    /// The vhost-user socket of device `index`.
    pub fn socket(&self, index: usize) -> PathBuf {
        socket(&self.dir, index)
    }

    /// A frontend of device `index`, once there is its socket.
    pub fn connect(&self, index: usize, options: &ClientOptions) -> io::Result<Client> {
        let socket = self.socket(index);
        wait::until("a device's socket", PATIENCE, || socket.exists().then_some(()))?;
        Client::connect(&socket, options)
    }

    /// The state of device `index`.
    pub fn status(&self, index: usize) -> io::Result<Status> {
        Status::of(&control(&self.dir, index))
    }

    /// Waits until `ready` holds of it.
    pub fn await_status(
        &self,
        index: usize,
        limit: Duration,
        ready: impl Fn(&Status) -> bool,
    ) -> io::Result<Status> {
        let mut last = None;
        wait::until("a device's state", limit, || {
            last = self.status(index).ok();
            last.clone().filter(&ready)
        })
        .map_err(|error| io::Error::other(format!("device {index}: {error}; last: {last:?}")))
    }
}

fn socket(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("{index}.sock"))
}

fn control(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("{index}.ctl"))
}
