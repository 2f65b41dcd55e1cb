// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::io::Read;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

/// What is said of descriptors that are in a socket; they are all there afterwards.
fn look_at(fds: &[&OwnedFd]) -> Result<Vec<Kind>, InspectError> {
    let (here, mut there) = UnixStream::pair().unwrap();
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    here.send_with_fds(&[b"message".as_slice()], &raw).unwrap();
    let inspections = Arc::new(Inspections::default());
    inspector::start().unwrap();
    let before = open_files();
    let told = inspections.inspect(there.as_fd(), 7, &|| true);
    while inspections.0.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
    assert_eq!(open_files(), before, "in this process's table nothing came or went");
    let mut bytes = [0; 7];
    there.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"message");
    told
}

fn open_files() -> Vec<std::path::PathBuf> {
    // In the order of their numbers; the directory itself is among them.
    let mut links: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|link| !link.starts_with("/proc"))
        .collect();
    links.sort();
    links
}

fn file(path: &str) -> OwnedFd {
    File::options().read(true).write(true).open(path).unwrap().into()
}

#[test]
fn memfds_and_eventfds_are_known_from_everything_else() {
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    assert_eq!(look_at(&[&memory, &event]).unwrap(), [Kind::Memory, Kind::Event]);
    if let Ok(huge) = memfd_create("ram", MemfdFlags::HUGETLB) {
        assert_eq!(look_at(&[&huge]).unwrap(), [Kind::Memory]);
    }
    if let Ok(shared) = tempfile::tempfile_in("/dev/shm") {
        assert_eq!(look_at(&[&shared.into()]).unwrap(), [Kind::Memory]);
    }
    let (reader, writer) = io::pipe().unwrap();
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let others = [file("/dev/zero"), file("/proc/self/comm"), reader.into(), writer.into(), set];
    for other in &others {
        let told = look_at(&[&memory, other]).unwrap();
        assert!(matches!(told.as_slice(), [Kind::Memory, Kind::Other(_)]), "{told:?}");
    }
}

/// A name can be had by any file.
#[test]
fn a_file_that_calls_itself_a_memfd_is_judged_by_where_it_is() {
    let dir = tempfile::tempdir_in("/proc/self/cwd").unwrap();
    let path = dir.path().join("memfd:ram");
    let file = File::create(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let fd = OwnedFd::from(file);
    let expected = fcntl_get_seals(&fd).is_ok()
        || mount_type(&fd, None).is_some_and(|name| LOCAL.contains(&name.as_str()));
    let told = look_at(&[&fd]).unwrap();
    assert_eq!(told == [Kind::Memory], expected, "{told:?}");
}

#[test]
fn more_descriptors_than_a_message_has_are_too_many() {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let many = [&event; MOST_WITH_A_MESSAGE + 1];
    assert!(matches!(look_at(&many), Err(InspectError::TooMany)));
    assert_eq!(look_at(&many[1..]).unwrap().len(), MOST_WITH_A_MESSAGE);
}

/// `/proc/…/fdinfo` of an epoll set waits for its lock, so it is not read.
#[test]
fn what_has_no_path_is_refused_by_its_name() {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let told = look_at(&[&set]).unwrap();
    assert_eq!(told, [Kind::Other("called anon_inode:[eventpoll]".to_owned())]);
}

/// What another process shows counts where this one's list has no such mount.
#[test]
fn the_type_of_a_mount_is_found_in_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mountinfo");
    let list = b"24 1 8:1 / /a\xff\\040-\\040b rw shared:1 master:2 - ext4 /dev/sda rw\n\
                 241 24 0:30 / /c rw - fuse.x ext4 rw\n";
    std::fs::write(&path, list).unwrap();
    let list = path.to_str().unwrap();
    assert_eq!(type_in(list, "24").as_deref(), Some("ext4"));
    assert_eq!(type_in(list, "241").as_deref(), Some("fuse.x"));
    assert_eq!(type_in(list, "2"), None);
    assert_eq!(type_in("/nowhere", "24"), None);
}
