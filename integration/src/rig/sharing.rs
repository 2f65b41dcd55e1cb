// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a process on the host does to have an image's blocks shared and freed without opening the
//! image for writing.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::command::{context, run};
use super::wait::{PATIENCE, until};

/// How the image is opened to be deduplicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// O_RDONLY: FIDEDUPERANGE takes that from root, the owner, and everybody who may write the
    /// file.
    ReadOnly,
    /// The access mode 3 of open(2), for ioctls only: neither a reader nor a writer to the kernel's
    /// counts.
    Neither,
}

/// FIDEDUPERANGE of the first `$n` bytes of `$ARGV[0]`, opened with the access mode `$ARGV[1]`,
/// with those of `$ARGV[2]`.
const DEDUPE: &str = r#"
my ($image, $mode, $twin, $n, $open, $go) = @ARGV;
sysopen(my $d, $image, $mode) or die "open: $!";
if ($open) {
    open(my $o, ">", $open) or die;
    close $o;
    select undef, undef, undef, 0.01 until -e $go;
}
sysopen(my $s, $twin, 0) or die "open: $!";
for (my $at = 0; $at < $n; $at += 1 << 20) {
    my $piece = $n - $at < 1 << 20 ? $n - $at : 1 << 20;
    my $b = pack("QQSSLqQQlL", $at, $piece, 1, 0, 0, fileno($d), $at, 0, 0, 0);
    ioctl($s, 0xC0189436, $b) or die "FIDEDUPERANGE: $!";
    my @said = unpack("QQSSLqQQlL", $b);
    die "FIDEDUPERANGE: status $said[8]" if $said[8];
}
"#;

/// Has the filesystem share the first `bytes` of `twin` with `image`, which frees the blocks they
/// had in `image`. Opens `image` without the right to write.
pub fn dedupe(image: &Path, twin: &Path, bytes: u64) -> io::Result<()> {
    let bytes = bytes.to_string();
    let args = ["-e", DEDUPE, "--"].map(std::ffi::OsStr::new);
    let rest = [image.as_os_str(), "0".as_ref(), twin.as_os_str(), bytes.as_ref()];
    run("perl", &[&args[..], &rest[..]].concat()).map(drop)
}

/// A process that opened the image and deduplicates it when it is told to; it ends when it has done
/// so.
#[derive(Debug)]
pub struct Waiting {
    child: std::process::Child,
    go: PathBuf,
}

impl Waiting {
    /// Starts it, and waits until it has the image open. `dir` is for its signs.
    pub fn start(
        dir: &Path,
        image: &Path,
        access: Access,
        twin: &Path,
        bytes: u64,
    ) -> io::Result<Waiting> {
        let (open, go) = (dir.join("open"), dir.join("go"));
        let mode = if access == Access::ReadOnly { "0" } else { "3" };
        let mut command = std::process::Command::new("perl");
        command.args(["-e", DEDUPE, "--"]).arg(image).arg(mode).arg(twin).arg(bytes.to_string());
        let child = super::command::spawn(command.arg(&open).arg(&go))?;
        let waiting = Waiting { child, go };
        until("the image open elsewhere", PATIENCE, || open.exists().then_some(()))?;
        Ok(waiting)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it go on, and waits for its end.
    pub fn go(mut self) -> io::Result<()> {
        File::create(&self.go)?;
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fills all the space there is in `dir` with a file of `block`s; what was freed in a transaction
/// that is not committed too.
pub fn fill_with(dir: &Path, block: &[u8]) -> io::Result<PathBuf> {
    run("sync", &["-f".as_ref(), dir.as_os_str()])?;
    // XFS keeps more back from files than it needs, and that might be just the blocks that matter.
    // Other filesystems do not know the command.
    let _ = run("xfs_io", &["-x".as_ref(), "-c".as_ref(), "resblks 128".as_ref(), dir.as_os_str()]);
    let path = dir.join("secret");
    let mut file = File::create(&path)?;
    let blocks = block.repeat((1 << 20) / block.len().max(1));
    let small = blocks.get(..4096).unwrap_or_default();
    for piece in [blocks.as_slice(), small] {
        loop {
            match file.write_all(piece) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(context("the file that fills the disk")(error)),
            }
        }
    }
    file.sync_all()?;
    Ok(path)
}
