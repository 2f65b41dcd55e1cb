// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `/proc/self/mountinfo`, `/proc/swaps` and the NFS export tables, parsed (R5, R5a).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mount {
    /// As statx's `stx_mnt_id`.
    pub(super) id: u64,
    /// Major and minor number of `st_dev`.
    pub(super) device: (u32, u32),
    /// Which directory of the filesystem is mounted.
    pub(super) root: PathBuf,
    /// Where.
    pub(super) point: PathBuf,
    /// Type of the filesystem, as `ext4`.
    pub(super) kind: String,
    /// What the filesystem itself was told, split at commas, still escaped.
    pub(super) options: Vec<String>,
}

impl Mount {
    /// The value of a `key=value` option of the filesystem, unescaped.
    pub(super) fn option_path(&self, key: &str) -> Option<PathBuf> {
        self.options
            .iter()
            .find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
            .map(unescape)
    }
}

/// A path as its filesystem sees it, whatever it was reached through (bind mounts).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Place {
    device: (u32, u32),
    path: PathBuf,
}

impl Place {
    /// Where an absolute path without symbolic links lies, if `mount` is the mount it lies on.
    pub(super) fn new(path: &Path, mount: &Mount) -> Option<Self> {
        let inside = path.strip_prefix(&mount.point).ok()?;
        Some(Self { device: mount.device, path: mount.root.join(inside) })
    }

    /// Whether it lies below some directory whose path ends like this one, `..` and `.` left out.
    pub(super) fn is_below_any(&self, tail: &Path) -> bool {
        let tail: PathBuf =
            tail.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let named = tail.components().next().is_some();
        named && self.path.ancestors().skip(1).any(|directory| directory.ends_with(&tail))
    }

    /// Whether it lies in this directory or below.
    pub(super) fn is_below(&self, directory: &Self) -> bool {
        self.device == directory.device && self.path.starts_with(&directory.path)
    }
}

/// Every line that makes sense; the kernel writes no others.
pub(super) fn parse_mountinfo(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_mount).collect()
}

fn parse_mount(line: &str) -> Option<Mount> {
    // The optional fields in the middle end with a lone dash.
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let (major, minor) = left.nth(1)?.split_once(':')?;
    let root = unescape(left.next()?);
    let point = unescape(left.next()?);
    let mut right = right.split(' ');
    let kind = right.next()?.to_owned();
    let options = right.nth(1)?.split(',').map(str::to_owned).collect();
    let device = (major.parse().ok()?, minor.parse().ok()?);
    Some(Mount { id, device, root, point, kind, options })
}

/// Undoes the kernel's octal escapes (`\040` for a space).
fn unescape(text: &str) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        let octal = rest.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            (*first == b'\\').then(|| u8::from_str_radix(digits, 8).ok()).flatten()
        });
        let (byte, taken) = match octal {
            Some(byte) => (byte, 4),
            None => (*first, 1),
        };
        out.push(byte);
        bytes = bytes.get(taken..).unwrap_or_default();
    }
    PathBuf::from(OsString::from_vec(out))
}

/// The files of `/proc/swaps`.
pub(super) fn parse_swaps(text: &str) -> Vec<PathBuf> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let path = fields.next()?;
            (fields.next()? == "file").then(|| unescape(path))
        })
        .collect()
}

/// The directories of an NFS export table: `/proc/fs/nfsd/exports`, `etab` or `/etc/exports`.
pub(super) fn parse_exports(text: &str) -> Vec<PathBuf> {
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            // /etc/exports allows quotes around a path with spaces.
            let path = match line.strip_prefix('"') {
                Some(quoted) => quoted.split('"').next()?,
                None => line.split_whitespace().next()?,
            };
            path.starts_with('/').then(|| unescape(path))
        })
        .collect()
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
