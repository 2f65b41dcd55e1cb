// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::os::fd::IntoRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;

use super::*;

fn at(directory: &tempfile::TempDir) -> SocketOptions {
    SocketOptions::private(directory.path().join("s"))
}

#[test]
fn a_socket_is_private_and_goes_with_its_owner() {
    let directory = tempfile::tempdir().unwrap();
    let options = at(&directory);
    let listener = Listener::bind(&options).unwrap();
    let mode = std::fs::metadata(&options.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert!(listener.accept().unwrap().is_none());
    let _client = UnixStream::connect(&options.path).unwrap();
    assert!(listener.accept().unwrap().is_some());
    drop(listener);
    assert!(!options.path.exists());
}

#[test]
fn mode_and_owner_are_changed_on_request() {
    let directory = tempfile::tempdir().unwrap();
    let uid = rustix::process::getuid();
    let options = SocketOptions { mode: 0o666, owner: Some(uid), ..at(&directory) };
    let _listener = Listener::bind(&options).unwrap();
    let metadata = std::fs::metadata(&options.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o666);
    assert_eq!(metadata.uid(), uid.as_raw());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let options = at(&directory);
    // The standard library's listener leaves its file behind, like a killed daemon.
    drop(UnixListener::bind(&options.path).unwrap());
    assert!(options.path.exists());
    probe(&options.path).unwrap();
    let listener = Listener::bind(&options).unwrap();
    assert!(matches!(probe(&options.path), Err(SocketError::InUse { .. })));
    let error = Listener::bind(&options).unwrap_err();
    assert!(error.to_string().starts_with("socket in use: "), "{error}");
    assert!(options.path.exists());
    drop(listener);
}

#[test]
fn what_is_not_a_stale_stream_socket_stays() {
    let directory = tempfile::tempdir().unwrap();
    let options = at(&directory);
    std::fs::write(&options.path, "precious").unwrap();
    assert!(matches!(Listener::bind(&options), Err(SocketError::NotASocket { .. })));
    assert_eq!(std::fs::read(&options.path).unwrap(), b"precious");
    std::fs::remove_file(&options.path).unwrap();
    let _datagram = UnixDatagram::bind(&options.path).unwrap();
    assert!(matches!(Listener::bind(&options), Err(SocketError::InUse { .. })));
}

#[test]
fn somebody_elses_socket_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let options = at(&directory);
    let first = Listener::bind(&options).unwrap();
    std::fs::remove_file(&options.path).unwrap();
    let second = Listener::bind(&options).unwrap();
    drop(first);
    assert!(UnixStream::connect(&options.path).is_ok());
    drop(second);
    assert!(!options.path.exists());
}

#[test]
fn of_many_that_start_at_once_one_wins() {
    let directory = tempfile::tempdir().unwrap();
    let options = at(&directory);
    drop(UnixListener::bind(&options.path).unwrap());
    let made: Vec<_> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| Listener::bind(&options))).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1);
    assert!(UnixStream::connect(&options.path).is_ok());
}

#[test]
fn errors_are_one_line_with_the_path() {
    let options = SocketOptions::private("/no/such/directory/s".into());
    let error = Listener::bind(&options).unwrap_err().to_string();
    assert!(error.contains("/no/such/directory/s") && error.lines().count() == 1, "{error}");
    let long = SocketOptions::private(std::env::temp_dir().join("x".repeat(200)));
    let error = Listener::bind(&long).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn an_inherited_socket_is_recognised() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listening = UnixListener::bind(&path).unwrap().into_raw_fd();
    assert!(matches!(inherit(listening), Ok(Inherited::Listening(_))));
    assert!(path.exists(), "an inherited socket's file is not ours to remove");
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert!(matches!(inherit(ours.into_raw_fd()), Ok(Inherited::Connected(_))));
    let file = File::open("/dev/null").unwrap().into_raw_fd();
    assert!(matches!(inherit(file), Err(SocketError::WrongKind { .. })));
    assert!(matches!(inherit(100_000), Err(SocketError::Inherit { .. })));
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    assert!(matches!(inherit(datagram.into_raw_fd()), Err(SocketError::WrongKind { .. })));
}

/// A killed process is told from a living one, whatever still holds its sockets open.
#[test]
fn a_killed_process_is_seen_to_be_dying() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pid = Pid::from_child(&child);
    assert!(!is_dying(pid) && !is_dying(rustix::process::getpid()));
    child.kill().unwrap();
    let process = Process::open(pid).unwrap();
    assert!(ends_soon(&process));
    // Not waited for yet: a zombie.
    assert!(is_dying(pid));
    child.wait().unwrap();
}
