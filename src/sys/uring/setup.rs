// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a ring: the best flags this kernel knows, and the fence against misuse of it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, opcode, squeue};

/// The most entries the kernel lets a completion queue have (IORING_MAX_CQ_ENTRIES), halved: the
/// completion queue is twice as large as what may be in flight, so that it never overflows.
const MAX_OPS: u32 = 32768;

/// The most entries of the submission queue. A batch beyond it costs a second system call.
const MAX_SQ: u32 = 4096;

/// The kernel's names of what a ring may still register, which the crate keeps to itself:
/// IORING_REGISTER_BUFFERS, IORING_UNREGISTER_BUFFERS, IORING_UNREGISTER_FILES, IORING_REGISTER_FILES_UPDATE, IORING_REGISTER_SYNC_CANCEL.
const REGISTER_BUFFERS: u8 = 0;
const UNREGISTER_BUFFERS: u8 = 1;
const UNREGISTER_FILES: u8 = 3;
const FILES_UPDATE: u8 = 6;
const SYNC_CANCEL: u8 = 24;

/// A place among the fixed files that nothing is in.
pub(super) const NO_FILE: RawFd = -1;

/// The fixed files: the image's place is 0, the device's 1, those of the watches follow.
pub(super) struct Files<'a> {
    pub(super) image: BorrowedFd<'a>,
    pub(super) device: Option<BorrowedFd<'a>>,
    pub(super) watches: usize,
}

/// The device's place.
pub(super) const DEVICE: u32 = 1;

/// The place of the first watched file.
pub(super) const FIRST_WATCHED: usize = 2;

/// How completions come back to the thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TaskRun {
    /// Only inside our own `io_uring_enter` (since 6.1): no interruptions, good batches.
    Deferred,
    /// At any kernel entry, without interrupting the thread (since 5.19).
    Cooperative,
    /// By interrupting the thread.
    Forced,
}

impl TaskRun {
    /// All ways, the best one first.
    pub(super) const ALL: [Self; 3] = [Self::Deferred, Self::Cooperative, Self::Forced];

    fn apply(self, builder: &mut Builder) {
        match self {
            Self::Deferred => {
                builder.setup_single_issuer().setup_defer_taskrun();
                builder.setup_taskrun_flag().setup_submit_all();
            }
            Self::Cooperative => {
                builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
            }
            Self::Forced => {}
        }
    }
}

/// A ring for at most `ops` operations in flight with `files` as its fixed files; its completions come back
/// in one of these `ways`.
///
/// It is restricted to reads, writes, fsyncs, fallocates and polls of its fixed files: a bug in here cannot make the
/// kernel touch another file of this process. Restrictions work together with all the flags used,
/// as the ring is made disabled and enabled last; by then this thread is its single issuer.
///
/// # Errors
///
/// `EINVAL` if `ops` is 0 or beyond what a ring can hold; `EOPNOTSUPP` if the kernel is older than
/// 6.0; else what the kernel said.
pub(super) fn ring(ops: u32, files: Files<'_>, ways: &[TaskRun]) -> io::Result<(IoUring, TaskRun)> {
    if ops == 0 || ops > MAX_OPS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let (uring, task_run) = best(ops.next_power_of_two(), ways)?;
    if !uring.params().is_feature_ext_arg() {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    let device = files.device.map_or(NO_FILE, |device| device.as_raw_fd());
    let watched = std::iter::repeat_n(NO_FILE, files.watches);
    let table: Vec<_> = [files.image.as_raw_fd(), device].into_iter().chain(watched).collect();
    let submitter = uring.submitter();
    submitter.register_files(&table)?;
    // What would block goes to threads of the kernel's, by default four for each CPU. In a frozen
    // filesystem file writes would keep all of them, and raw I/O that needs one too would never end:
    // nor would a lease break, which waits for it (R2). A kernel before 5.15 cannot be told.
    let _ = submitter.register_iowq_max_workers(&mut [ops, 0]);
    // A kernel that does not know what is allowed here is older than 6.0.
    let unknown = |_| io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    let pins = uring.params().is_feature_no_iowait();
    submitter.register_restrictions(&mut restrictions(pins)).map_err(unknown)?;
    submitter.register_enable_rings()?;
    Ok((uring, task_run))
}

/// The ring with the first of `ways` that the kernel knows.
fn best(ops: u32, ways: &[TaskRun]) -> io::Result<(IoUring, TaskRun)> {
    let mut result = Err(io::Error::from_raw_os_error(libc::EINVAL));
    for &task_run in ways {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_r_disabled().setup_cqsize(ops * 2);
        task_run.apply(&mut builder);
        result = builder.build(ops.min(MAX_SQ)).map(|uring| (uring, task_run));
        match &result {
            // An unknown flag; anything else would not get better with fewer of them.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            _ => break,
        }
    }
    result
}

/// With lists of pieces of registered memory only if the kernel `pins`, see [`pin`](super::Ring::pin): an older one does not know them, and
/// refuses all restrictions if it is told of an operation that it does not know.
fn restrictions(pins: bool) -> Vec<Restriction> {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let mut allowed = vec![
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::ReadFixed::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::WriteFixed::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::register_op(REGISTER_BUFFERS),
        Restriction::register_op(UNREGISTER_BUFFERS),
        Restriction::register_op(UNREGISTER_FILES),
        Restriction::register_op(FILES_UPDATE),
        Restriction::register_op(SYNC_CANCEL),
        Restriction::sqe_flags_allowed(fixed),
        Restriction::sqe_flags_required(fixed),
    ];
    if pins {
        let lists = [opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE];
        allowed.extend(lists.map(Restriction::sqe_op));
    }
    allowed
}
