// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line, and the file it may name: raw [`Options`] as typed, and the [`Settings`] that have
//! been checked and do not change any more.

mod file;
pub mod invocation;
mod options;
pub mod size;

use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::path::PathBuf;

use rustix::fs::{Gid, Uid};

pub use file::FileError;
pub use options::{
    Arguments, Barrier, Cache, Discard, Format, LogFormat, LogLevel, Mode, Options, Populate,
};
use size::{SizeError, parse_size};

use crate::virtio::spin::Polling;

/// What `--print-capabilities` prints (the vhost-user backend program conventions).
pub const CAPABILITIES: &str = r#"{"type":"block","features":["blk-file","read-only"]}"#;

/// The longest serial virtio-blk carries, in bytes (virtio 1.3, 5.2.6: VIRTIO_BLK_T_GET_ID).
const SERIAL_BYTES: usize = 20;
/// More queues than this have no use on one image, and every one costs memory.
const MAX_QUEUES: u16 = 64;
/// The largest split virtqueue (virtio 1.3, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;
/// The descriptor systemd's first socket arrives on (sd_listen_fds(3)).
const LISTEN_FDS_START: RawFd = 3;

/// What the process was given besides its arguments.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Our process id.
    pub pid: u32,
    /// `$LISTEN_PID`.
    pub listen_pid: Option<String>,
    /// `$LISTEN_FDS`.
    pub listen_fds: Option<String>,
    /// CPUs we may run on.
    pub cpus: usize,
}

impl Environment {
    /// This process's.
    #[must_use]
    pub fn current() -> Self {
        Self {
            pid: std::process::id(),
            listen_pid: std::env::var("LISTEN_PID").ok(),
            listen_fds: std::env::var("LISTEN_FDS").ok(),
            cpus: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        }
    }
}

/// Where frontends come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// A socket of our own.
    Path(SocketOptions),
    /// An inherited descriptor, listening or connected.
    Fd(RawFd),
}

/// A socket file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SocketOptions {
    /// Where.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Owner, if not us.
    pub owner: Option<Uid>,
    /// Group, if not ours.
    pub group: Option<Gid>,
}

impl SocketOptions {
    /// A socket only its owner may use.
    #[must_use]
    pub fn private(path: PathBuf) -> Self {
        Self { path, mode: 0o600, owner: None, group: None }
    }
}

/// What the process is to do, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The devices it serves, at least one.
    pub devices: Vec<Config>,
    /// Least important messages logged.
    pub log_level: LogLevel,
    /// Format of the log.
    pub log_format: LogFormat,
}

/// A device's checked configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The image.
    pub blk_file: PathBuf,
    /// Where frontends come from.
    pub endpoint: Endpoint,
    /// Offer VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// Do not look for other formats in the image.
    pub format_raw: bool,
    /// How data moves.
    pub mode: Mode,
    /// The guest starts with a write-back cache.
    pub write_back: bool,
    /// Queues offered, 1..=64.
    pub num_queues: u16,
    /// Largest queue, a power of two.
    pub queue_size: u16,
    /// Worker threads, 1..=`num_queues`.
    pub threads: u16,
    /// How long workers look before they sleep.
    pub polling: Polling,
    /// `--pin-memory`.
    pub pin_memory: bool,
    /// First byte of the image the guest sees.
    pub offset: u64,
    /// Most bytes the guest sees.
    pub size_limit: Option<u64>,
    /// Logical block size, 512 or 4096 bytes.
    pub block_size: u32,
    /// `--discard unmap`.
    pub unmap: bool,
    /// `--barrier strict`.
    pub strict: bool,
    /// At most 20 bytes of printable ASCII.
    pub serial: Option<String>,
    /// Most extents cached.
    pub max_extents: usize,
    /// `--populate all`.
    pub populate: bool,
    /// The control socket.
    pub control: Option<SocketOptions>,
}

/// What is wrong with a device's options. One line, with the fix.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error("--{option} {value}: must be {least} to {most}")]
    Range { option: &'static str, value: u64, least: u64, most: u64 },
    #[error("--queue-size {value}: must be a power of two from 2 to {MAX_QUEUE_SIZE}")]
    QueueSize { value: u32 },
    #[error("--block-size {value}: must be 512 or 4096")]
    BlockSize { value: u32 },
    #[error("--{option} {text}: {source}")]
    Size { option: &'static str, text: String, source: SizeError },
    #[error("--size-limit 0: must be at least one block")]
    ZeroLimit,
    #[error("--serial: {bytes} bytes are too many; at most {SERIAL_BYTES}")]
    SerialLength { bytes: usize },
    #[error("--serial: only printable ASCII characters")]
    SerialText,
    #[error("--socket-mode {text}: must be octal permissions such as 0660")]
    SocketMode { text: String },
    #[error("--socket-{kind} {name}: not in /etc/{file}; give a number instead")]
    NoSuchAccount { kind: &'static str, name: String, file: &'static str },
    #[error(
        "no socket to serve: give --socket-path or --fd, or start by systemd socket activation"
    )]
    NoEndpoint,
    #[error("--socket-mode, --socket-owner and --socket-group need --socket-path")]
    NeedsPath,
    #[error("--fd {fd}: must be an inherited descriptor, 3 or above")]
    Descriptor { fd: RawFd },
    #[error("LISTEN_FDS={count}: exactly one socket is expected from systemd")]
    ListenFds { count: String },
    #[error(
        "--populate all: with --mode filesystem there is no extent map to load; leave one of them out"
    )]
    NothingToPopulate,
    #[error("--control-path and --socket-path are the same: {}", path.display())]
    SamePath { path: PathBuf },
}

impl Options {
    /// Checks everything that can be checked without touching the image or a socket.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn resolve(self, environment: &Environment) -> Result<Config, ConfigError> {
        let endpoint = self.endpoint(environment)?;
        let control = self.control_path.clone().map(SocketOptions::private);
        if let (Endpoint::Path(socket), Some(control)) = (&endpoint, &control)
            && socket.path == control.path
        {
            return Err(ConfigError::SamePath { path: control.path.clone() });
        }
        let num_queues = in_range("num-queues", self.num_queues, MAX_QUEUES)?;
        let threads = match self.threads {
            Some(threads) => in_range("threads", threads, num_queues)?,
            None => u16::try_from(environment.cpus).unwrap_or(num_queues).clamp(1, num_queues),
        };
        let queue_size = u16::try_from(self.queue_size)
            .ok()
            .filter(|size| (2..=MAX_QUEUE_SIZE).contains(size) && size.is_power_of_two())
            .ok_or(ConfigError::QueueSize { value: self.queue_size })?;
        if !matches!(self.block_size, 512 | 4096) {
            return Err(ConfigError::BlockSize { value: self.block_size });
        }
        if self.max_extents == 0 {
            let most = u64::MAX;
            return Err(ConfigError::Range { option: "max-extents", value: 0, least: 1, most });
        }
        let populate = self.populate == Populate::All;
        if populate && self.mode == Mode::Filesystem {
            return Err(ConfigError::NothingToPopulate);
        }
        let size_limit =
            self.size_limit.as_deref().map(|text| size("size-limit", text)).transpose()?;
        if size_limit == Some(0) {
            return Err(ConfigError::ZeroLimit);
        }
        Ok(Config {
            endpoint,
            num_queues,
            queue_size,
            threads,
            size_limit,
            control,
            offset: size("offset", &self.offset)?,
            serial: self.serial.map(serial).transpose()?,
            blk_file: self.blk_file,
            read_only: self.read_only,
            format_raw: self.format.is_some(),
            mode: self.mode,
            write_back: self.cache == Cache::Writeback,
            block_size: self.block_size,
            polling: self.poll_us,
            pin_memory: self.pin_memory,
            unmap: self.discard == Discard::Unmap,
            strict: self.barrier == Barrier::Strict,
            max_extents: self.max_extents,
            populate,
        })
    }

    fn endpoint(&self, environment: &Environment) -> Result<Endpoint, ConfigError> {
        if let Some(path) = &self.socket_path {
            let mode = self.socket_mode.as_deref().map_or(Ok(0o600), socket_mode)?;
            let owner = self.socket_owner.as_deref().map(|name| account("owner", name));
            let group = self.socket_group.as_deref().map(|name| account("group", name));
            return Ok(Endpoint::Path(SocketOptions {
                path: path.clone(),
                mode,
                owner: owner.transpose()?.map(Uid::from_raw),
                group: group.transpose()?.map(Gid::from_raw),
            }));
        }
        if (&self.socket_mode, &self.socket_owner, &self.socket_group) != (&None, &None, &None) {
            return Err(ConfigError::NeedsPath);
        }
        if let Some(fd) = self.fd {
            // 0 to 2 are stdin, stdout and the log.
            return if fd > 2 { Ok(Endpoint::Fd(fd)) } else { Err(ConfigError::Descriptor { fd }) };
        }
        // Variables meant for another process are inherited by accident (sd_listen_fds(3)).
        if environment.listen_pid.as_deref() != Some(&environment.pid.to_string()) {
            return Err(ConfigError::NoEndpoint);
        }
        match environment.listen_fds.as_deref() {
            None | Some("0") => Err(ConfigError::NoEndpoint),
            Some("1") => Ok(Endpoint::Fd(LISTEN_FDS_START)),
            Some(count) => Err(ConfigError::ListenFds { count: count.to_owned() }),
        }
    }
}

fn in_range(option: &'static str, value: u32, most: u16) -> Result<u16, ConfigError> {
    u16::try_from(value).ok().filter(|value| (1..=most).contains(value)).ok_or(ConfigError::Range {
        option,
        value: value.into(),
        least: 1,
        most: most.into(),
    })
}

fn size(option: &'static str, text: &str) -> Result<u64, ConfigError> {
    parse_size(text).map_err(|source| ConfigError::Size { option, text: text.to_owned(), source })
}

fn serial(text: String) -> Result<String, ConfigError> {
    if text.len() > SERIAL_BYTES {
        return Err(ConfigError::SerialLength { bytes: text.len() });
    }
    if !text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return Err(ConfigError::SerialText);
    }
    Ok(text)
}

fn socket_mode(text: &str) -> Result<u32, ConfigError> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| ConfigError::SocketMode { text: text.to_owned() })
}

/// A user's or group's number. Only the local files are asked: other name services would have to
/// be asked through libc, and a number always works.
fn account(kind: &'static str, name: &str) -> Result<u32, ConfigError> {
    // The highest number means "leave it as it is" to chown(2).
    if let Some(id) = name.parse().ok().filter(|id| *id != u32::MAX) {
        return Ok(id);
    }
    let file = if kind == "owner" { "passwd" } else { "group" };
    std::fs::read_to_string(format!("/etc/{file}"))
        .ok()
        .and_then(|text| account_in(&text, name))
        .ok_or_else(|| ConfigError::NoSuchAccount { kind, name: name.to_owned(), file })
}

/// Both files say `name:password:number:…`.
fn account_in(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
