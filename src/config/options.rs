// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options as typed.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

use crate::virtio::spin::Polling;

/// Serve a file-backed disk image to a guest over vhost-user, straight from the disk's sectors.
#[derive(Debug, Parser)]
#[command(name = "extentd", version, about, max_term_width = 100)]
pub struct Arguments {
    /// The one device to serve; none if a file lists them.
    #[command(flatten)]
    pub device: Option<Options>,
    /// Serve the devices that this TOML file lists, all in this process: a `[[device]]` for each, with
    /// the options above for keys. Only log options may be given beside it.
    #[arg(long, value_name = "FILE", conflicts_with = "Options")]
    pub config: Option<PathBuf>,
    /// Print what this backend can do as JSON and exit; everything else is ignored.
    #[arg(long)]
    pub print_capabilities: bool,
    /// Least important messages logged to stderr [default: info].
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Format of the log [default: text].
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

// No comment that documents it: it would become the program's description.
#[derive(Debug, Args)]
#[allow(missing_docs)]
pub struct Options {
    /// Disk image: a regular file or a block device.
    #[arg(long, value_name = "PATH", required = false, required_unless_present = "config")]
    pub blk_file: PathBuf,
    /// Listen for the frontend on this Unix socket; a stale socket is replaced, a live one is an
    /// error.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,
    /// Permissions of the socket, octal [default: 0600].
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<String>,
    /// Owner of the socket: a name in /etc/passwd or a number.
    #[arg(long, value_name = "USER")]
    pub socket_owner: Option<String>,
    /// Group of the socket: a name in /etc/group or a number.
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Inherited Unix socket, listening or connected. Without this and --socket-path, the socket
    /// systemd passes (LISTEN_FDS) is used.
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,
    /// Offer a read-only disk.
    #[arg(long)]
    pub read_only: bool,
    /// Format of the image; `raw` also serves a file that looks like qcow2, VMDK, VHDX or VDI.
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// How data moves; `direct` refuses to start when direct mode cannot be had.
    #[arg(long, value_name = "MODE", default_value = "auto")]
    pub mode: Mode,
    /// Write cache the guest starts with.
    #[arg(long, value_name = "CACHE", default_value = "writeback")]
    pub cache: Cache,
    /// What a FLUSH holds back: `drain` waits for the writes before it, `strict` also keeps every
    /// later request waiting until it has ended.
    #[arg(long, value_name = "BARRIER", default_value = "drain")]
    pub barrier: Barrier,
    /// Whether blocks that the guest discards, or zeroes and allows to be unmapped, go back to the
    /// filesystem. `ignore` offers no DISCARD and writes zeros in place.
    #[arg(long, value_name = "DISCARD", default_value = "unmap")]
    pub discard: Discard,
    /// Request queues offered, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub num_queues: u32,
    /// Largest queue accepted, in descriptors: a power of two, at most 32768.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub queue_size: u32,
    /// Worker threads, at most --num-queues [default: the CPUs, at most --num-queues].
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// How long a worker looks for more work before it sleeps, in microseconds, at most 1000; `auto`
    /// tries whether it pays.
    #[arg(long, value_name = "auto|N", default_value = "auto")]
    pub poll_us: Polling,
    /// Pin the guest's memory, which makes each request cheaper. All of it stays in the host's memory then; not for
    /// guests with a balloon, free page reporting or postcopy migration, which would lose data.
    #[arg(long)]
    pub pin_memory: bool,
    /// Where in the image the disk begins, in bytes; suffixes KiB, MiB, GiB, TiB.
    #[arg(long, value_name = "BYTES", default_value = "0")]
    pub offset: String,
    /// Size of the disk at most, in bytes; suffixes KiB, MiB, GiB, TiB [default: all of the image].
    #[arg(long, value_name = "BYTES")]
    pub size_limit: Option<String>,
    /// Logical block size the guest sees, in bytes: 512 or 4096.
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    pub block_size: u32,
    /// Serial number of the disk, at most 20 bytes [default: made from the image's identity].
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,
    /// How much of the image's extent map is loaded before the first frontend is let in; `all` also keeps
    /// it in memory.
    #[arg(long, value_name = "HOW", default_value = "lazy")]
    pub populate: Populate,
    /// Extents of the image's map kept in memory at most, 17 bytes each.
    #[arg(long, value_name = "N", default_value_t = 1 << 20)]
    pub max_extents: usize,
    /// Control socket for extentctl, mode 0600.
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,
}

/// `--format`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    /// The file's bytes are the disk's.
    Raw,
}

/// `--mode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// Direct when it can be had, else through the filesystem.
    Auto,
    /// Direct, or do not start.
    Direct,
    /// Always through the filesystem.
    Filesystem,
}

/// `--populate`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Populate {
    /// Nothing: what is asked for is loaded when it is asked for.
    Lazy,
    /// Everything, or do not start.
    All,
}

/// `--cache`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Cache {
    /// Writes are durable after a FLUSH.
    Writeback,
    /// Writes are durable when they complete.
    Writethrough,
}

/// `--barrier`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Barrier {
    /// Later requests go on meanwhile, as on any disk.
    Drain,
    /// Later requests wait.
    Strict,
}

/// `--discard`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Discard {
    /// The file is punched.
    Unmap,
    /// The file keeps its blocks.
    Ignore,
}

/// `--log-level`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Only what went wrong.
    Error,
    /// And what may.
    Warn,
    /// And what happens: modes, sessions.
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

/// `--log-format`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
