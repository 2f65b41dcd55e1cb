// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::virtio::limits::MemoryLimits;

#[derive(Debug, PartialEq, Eq)]
enum Told {
    Fd(u64, VringFd, bool),
    Disable(u32),
    Enable(u32),
    Base(u32, u32),
}

#[derive(Default)]
struct Recorder {
    told: Mutex<Vec<Told>>,
    kick: Mutex<Option<Notifier>>,
    /// Whether a drain goes on for as long as somebody waits for it.
    stuck: bool,
}

impl Recorder {
    fn tell(&self, told: Told) {
        self.told.lock().unwrap().push(told);
    }
}

impl Hooks for Recorder {
    fn vring_fd(&self, queue: u64, which: VringFd, fd: Option<Notifier>, _: &dyn Fn() -> bool) {
        self.tell(Told::Fd(queue, which, fd.is_some()));
        if which == VringFd::Kick {
            *self.kick.lock().unwrap() = fd;
        }
    }
    fn disable(&self, queue: u32, alive: &dyn Fn() -> bool) {
        while self.stuck && alive() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.tell(Told::Disable(queue));
    }
    fn enable(&self, queue: u32) {
        self.tell(Told::Enable(queue));
    }
    fn set_base(&self, queue: u32, base: u32) {
        self.tell(Told::Base(queue, base));
    }
}

struct Rig {
    front: UnixStream,
    back: UnixStream,
    exit: Arc<OwnedFd>,
    hooks: Arc<Recorder>,
    memory: Arc<GuestRegions>,
    relay: JoinHandle<Result<(), RelayError>>,
}

fn rig(hooks: Recorder) -> Rig {
    rig_over(UnixStream::pair().unwrap(), hooks)
}

fn rig_over((front, relay_front): (UnixStream, UnixStream), hooks: Recorder) -> Rig {
    let (back, relay_back) = UnixStream::pair().unwrap();
    for end in [&front, &back] {
        end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    let exit = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let hooks = Arc::new(hooks);
    let memory = Arc::new(GuestRegions::new().unwrap());
    let relay = Relay {
        front: Arc::new(relay_front),
        back: relay_back,
        exit: Arc::clone(&exit),
        memory: Arc::clone(&memory),
        inspections: Arc::default(),
        account: Account::new(MemoryLimits { regions: 3, bytes: 1 << 20 }),
    };
    let told = Arc::clone(&hooks);
    let relay = std::thread::spawn(move || relay.run(&*told));
    Rig { front, back, exit, hooks, memory, relay }
}

impl Rig {
    /// Ends by the frontend's close.
    fn close(self) -> (Result<(), RelayError>, Arc<Recorder>) {
        drop(self.front);
        (self.relay.join().unwrap(), self.hooks)
    }
    /// Ends by itself.
    fn end(self) -> RelayError {
        self.relay.join().unwrap().unwrap_err()
    }
}

fn message(request: FrontendReq, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let header = [request as u32, 1, size].map(u32::to_ne_bytes).concat();
    [header, payload.to_vec()].concat()
}

fn state(request: FrontendReq, queue: u32, number: u32) -> Vec<u8> {
    message(request, &[queue.to_ne_bytes(), number.to_ne_bytes()].concat())
}

fn region(size: u64, offset: u64) -> Vec<u8> {
    [0u64, 0, size, 0, offset].map(u64::to_ne_bytes).concat()
}

/// Receives `len` bytes and the fds that come with the first of them.
fn receive(socket: &mut UnixStream, len: usize) -> (Vec<u8>, Vec<File>) {
    let mut bytes = vec![0; len];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(&*socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights.map(File::from));
        }
    }
    socket.read_exact(&mut bytes[got.bytes..]).unwrap();
    (bytes, files)
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[&OwnedFd]) {
    use std::os::fd::AsRawFd;
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    assert_eq!(socket.send_with_fds(&[bytes], &raw).unwrap(), bytes.len());
}

#[test]
fn messages_and_fds_pass_in_order_however_they_are_cut() {
    let mut rig = rig(Recorder::default());
    let file = memfd(8192);
    let table = message(FrontendReq::ADD_MEM_REG, &region(4096, 4096));
    send(&rig.front, &table[..5], &[&file]);
    for byte in &table[5..] {
        rig.front.write_all(&[*byte]).unwrap();
    }
    // Two in one go, the second one with an fd.
    rig.front.write_all(&message(FrontendReq::GET_FEATURES, &[])).unwrap();
    send(&rig.front, &table, &[&file]);
    let (bytes, files) = receive(&mut rig.back, table.len());
    assert_eq!(bytes, table);
    assert_eq!(files[0].metadata().unwrap().ino(), File::from(file).metadata().unwrap().ino());
    let (bytes, files) = receive(&mut rig.back, 12);
    assert!(bytes == message(FrontendReq::GET_FEATURES, &[]) && files.is_empty());
    assert_eq!(receive(&mut rig.back, table.len()).1.len(), 1);
    rig.back.write_all(&message(FrontendReq::GET_FEATURES, &[7; 8])).unwrap();
    assert_eq!(receive(&mut rig.front, 20).0, message(FrontendReq::GET_FEATURES, &[7; 8]));
    rig.close().0.unwrap();
}

#[test]
fn the_crate_gets_a_silent_kick_and_we_keep_the_real_one() {
    let mut rig = rig(Recorder::default());
    let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let kick_message = message(FrontendReq::SET_VRING_KICK, &3u64.to_ne_bytes());
    send(&rig.front, &kick_message, &[&kick]);
    let (_, files) = receive(&mut rig.back, kick_message.len());
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    let nothing = rustix::io::read(&files[0], &mut [0u8; 8]);
    assert_eq!(nothing, Err(Errno::AGAIN));
    let ours = rig.hooks.kick.lock().unwrap().take().unwrap();
    assert_eq!(rustix::io::read(ours.as_fd(), &mut [0u8; 8]), Ok(8));
    // Polling instead of a kick.
    let none = message(FrontendReq::SET_VRING_KICK, &0x103u64.to_ne_bytes());
    send(&rig.front, &none, &[]);
    assert!(receive(&mut rig.back, none.len()).1.is_empty());
    let (end, hooks) = rig.close();
    end.unwrap();
    let expected = [Told::Fd(3, VringFd::Kick, true), Told::Fd(3, VringFd::Kick, false)];
    assert_eq!(*hooks.told.lock().unwrap(), expected);
}

#[test]
fn the_crate_gets_the_call_fd_and_we_a_copy() {
    let mut rig = rig(Recorder::default());
    let call = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let call_message = message(FrontendReq::SET_VRING_CALL, &0u64.to_ne_bytes());
    send(&rig.front, &call_message, &[&call]);
    assert_eq!(receive(&mut rig.back, call_message.len()).1.len(), 1);
    let (end, hooks) = rig.close();
    end.unwrap();
    assert_eq!(*hooks.told.lock().unwrap(), [Told::Fd(0, VringFd::Call, true)]);
}

#[test]
fn a_ring_is_drained_before_the_crate_hears_that_it_is_disabled() {
    let mut rig = rig(Recorder { stuck: true, ..Recorder::default() });
    let disable = state(FrontendReq::SET_VRING_ENABLE, 2, 0);
    rig.front.write_all(&disable).unwrap();
    rig.back.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    rig.back.read_exact(&mut [0; 1]).unwrap_err();
    // The frontend gives up: the drain is not waited for any longer.
    rig.close().0.unwrap();
}

#[test]
fn enable_and_base_are_told() {
    let mut rig = rig(Recorder::default());
    let messages = [
        state(FrontendReq::SET_VRING_ENABLE, 2, 1),
        state(FrontendReq::SET_VRING_BASE, 1, 5),
        state(FrontendReq::SET_VRING_ENABLE, 2, 0),
    ]
    .concat();
    rig.front.write_all(&messages).unwrap();
    assert_eq!(receive(&mut rig.back, messages.len()).0, messages);
    let (end, hooks) = rig.close();
    end.unwrap();
    let expected = [Told::Enable(2), Told::Base(1, 5), Told::Disable(2)];
    assert_eq!(*hooks.told.lock().unwrap(), expected);
}

#[test]
fn what_is_no_eventfd_ends_the_session() {
    for request in
        [FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR]
    {
        let rig = rig(Recorder::default());
        send(&rig.front, &message(request, &[0; 8]), &[&memfd(4096)]);
        assert!(matches!(rig.end(), RelayError::BadFd { queue: 0, .. }));
    }
}

#[test]
fn a_descriptor_that_may_hold_somebody_up_ends_the_session_and_never_arrives() {
    let rig = rig(Recorder::default());
    let (reader, _writer) = std::io::pipe().unwrap();
    send(&rig.front, &message(FrontendReq::SET_VRING_CALL, &[0; 8]), &[&reader.into()]);
    let (end, hooks) = (rig.relay.join().unwrap().unwrap_err(), rig.hooks);
    assert!(matches!(end, RelayError::Frontend(WireError::Foreign(_))), "{end}");
    assert!(hooks.told.lock().unwrap().is_empty());
}

/// Waits for an end that comes by itself.
fn ends(rig: Rig) -> RelayError {
    let start = std::time::Instant::now();
    while !rig.relay.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(20), "the session goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    rig.end()
}

#[test]
fn an_out_of_band_byte_ends_the_session() {
    let rig = rig(Recorder::default());
    rustix::net::send(&rig.front, b"x", rustix::net::SendFlags::OOB).unwrap();
    let end = ends(rig);
    assert!(matches!(end, RelayError::Frontend(WireError::Urgent)), "{end}");
}

/// With an offset for peeks there is always something to read and never anything to be peeked at.
#[test]
fn a_socket_that_is_readable_for_nothing_ends_the_session() {
    let (front, relay_front) = UnixStream::pair().unwrap();
    crate::sys::process::set_peek_offset(relay_front.as_fd(), 1000).unwrap();
    let mut rig = rig_over((front, relay_front), Recorder::default());
    rig.front.write_all(b"x").unwrap();
    let end = ends(rig);
    assert!(matches!(end, RelayError::Frontend(WireError::Unreadable)), "{end}");
}

#[test]
fn descriptors_with_a_message_that_has_none_end_the_session() {
    let rig = rig(Recorder::default());
    send(&rig.front, &message(FrontendReq::GET_FEATURES, &[]), &[&memfd(4096)]);
    assert!(matches!(rig.end(), RelayError::UnwantedFds { request: 1, count: 1 }));
}

#[test]
fn the_descriptor_of_a_removed_region_is_closed_here() {
    let mut rig = rig(Recorder::default());
    let remove = message(FrontendReq::REM_MEM_REG, &region(4096, 0));
    send(&rig.front, &remove, &[&memfd(4096)]);
    assert!(receive(&mut rig.back, remove.len()).1.is_empty());
    rig.close().0.unwrap();
}

#[test]
fn more_memory_than_the_limits_allow_ends_the_session() {
    let add = message(FrontendReq::ADD_MEM_REG, &region(4096, 0));
    let mut many = rig(Recorder::default());
    for _ in 0..3 {
        send(&many.front, &add, &[&memfd(4096)]);
        receive(&mut many.back, add.len());
    }
    send(&many.front, &add, &[&memfd(4096)]);
    assert!(matches!(many.end(), RelayError::OverLimit(OverLimit::Regions(3))));
    let large = rig(Recorder::default());
    let add = message(FrontendReq::ADD_MEM_REG, &region((1 << 20) + 4096, 0));
    send(&large.front, &add, &[&memfd(2 << 20)]);
    assert!(matches!(large.end(), RelayError::OverLimit(OverLimit::Bytes(_))));
}

#[test]
fn the_frontend_is_told_of_no_more_regions_than_there_may_be() {
    let mut rig = rig(Recorder::default());
    let reply = message(FrontendReq::GET_MAX_MEM_SLOTS, &509_u64.to_ne_bytes());
    rig.back.write_all(&reply).unwrap();
    assert_eq!(receive(&mut rig.front, 20).0[12..], 3_u64.to_ne_bytes());
    rig.close().0.unwrap();
}

#[test]
fn memory_that_is_lost_ends_the_session() {
    use vm_memory::{Bytes, FileOffset, GuestAddress};
    let rig = rig(Recorder::default());
    let file = memfd(4096);
    let range = (GuestAddress(0), 4096, Some(FileOffset::new(file.try_clone().unwrap().into(), 0)));
    let memory = crate::virtio::Memory::from_ranges_with_files([range]).unwrap();
    rig.memory.add(&memory).unwrap();
    ftruncate(&file, 0).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    assert!(matches!(rig.end(), RelayError::MemoryLost));
}

#[test]
fn memory_that_its_file_cannot_back_ends_the_session() {
    let add = message(FrontendReq::ADD_MEM_REG, &region(4096, 8192));
    let rig = rig(Recorder::default());
    send(&rig.front, &add, &[&memfd(8192)]);
    assert!(matches!(rig.end(), RelayError::ShortMemory { region: 0, end: 12288, size: 8192 }));
}

#[test]
fn a_part_of_a_huge_page_ends_the_session() {
    let Ok(huge) = memfd_create("memory", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) else {
        println!("skipped: no huge pages");
        return;
    };
    ftruncate(&huge, 2 << 20).unwrap();
    let rig = rig(Recorder::default());
    send(&rig.front, &message(FrontendReq::ADD_MEM_REG, &region(4096, 0)), &[&huge]);
    assert!(matches!(rig.end(), RelayError::PartOfHugePage { region: 0, page: 2_097_152 }));
}

#[test]
fn odd_sized_memory_is_fine() {
    let mut rig = rig(Recorder::default());
    let add = message(FrontendReq::ADD_MEM_REG, &region(0x3b10, 0));
    send(&rig.front, &add, &[&memfd(0x3b10)]);
    receive(&mut rig.back, add.len());
    rig.close().0.unwrap();
}

#[test]
fn a_payload_of_more_than_a_message_has_ends_the_session() {
    let mut rig = rig(Recorder::default());
    let header = [FrontendReq::SET_CONFIG as u32, 1, 4097].map(u32::to_ne_bytes).concat();
    rig.front.write_all(&header).unwrap();
    let end = rig.end();
    assert!(matches!(end, RelayError::Frontend(WireError::TooBig { bytes: 4097, .. })), "{end}");
}

#[test]
fn a_message_cut_short_is_told_apart_from_a_close() {
    let mut rig = rig(Recorder::default());
    rig.front.write_all(&message(FrontendReq::SET_FEATURES, &[0; 8])[..15]).unwrap();
    let end = rig.close().0.unwrap_err();
    let partial = WireError::Partial { have: 15, need: 20 };
    assert_eq!(end.to_string(), RelayError::Frontend(partial).to_string());
}

#[test]
fn a_refusal_of_the_crate_and_the_exit_event_end_it() {
    let mut refused = rig(Recorder::default());
    refused.front.write_all(&message(FrontendReq::SET_LOG_FD, &[])).unwrap();
    receive(&mut refused.back, 12);
    drop(refused.back);
    let end = refused.relay.join().unwrap().unwrap_err();
    assert!(matches!(end, RelayError::Refused { last } if last == FrontendReq::SET_LOG_FD as u32));
    let exited = rig(Recorder::default());
    rustix::io::write(&exited.exit, &1u64.to_ne_bytes()).unwrap();
    exited.relay.join().unwrap().unwrap();
}

#[test]
fn a_frontend_that_never_reads_its_replies_blocks_nobody() {
    let mut rig = rig(Recorder::default());
    rig.back.set_nonblocking(true).unwrap();
    let reply = message(FrontendReq::GET_CONFIG, &[0; 4096]);
    while rig.back.write(&reply).is_ok() {}
    rig.front.write_all(&message(FrontendReq::GET_FEATURES, &[])).unwrap();
    rig.back.set_nonblocking(false).unwrap();
    let mut bytes = [0; 12];
    rig.back.read_exact(&mut bytes).unwrap();
    rustix::io::write(&rig.exit, &1u64.to_ne_bytes()).unwrap();
    rig.relay.join().unwrap().unwrap();
}
