// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command lines as their users see them: built binaries, their sockets, output and status.
//! No privileges are needed: the images are served through the filesystem.

// Outside of `#[test]` functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod daemon;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use daemon::{Daemon, EXTENTCTL, EXTENTD, PATIENCE, Scratch, wait_for};
use serde_json::Value;

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs extentd, which must fail with this status and one line that begins like this.
#[track_caller]
fn refused(arguments: &[&str], status: i32, line: &str) {
    let output = run(EXTENTD, arguments);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    assert!(said.starts_with("extentd: ") && said.contains(line), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty());
}

/// Asks a control socket one thing.
fn ask(path: &Path, line: &str) -> Value {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A line that is too long is answered, and the connection closed, before it is out.
    let _ = stream.write_all(format!("{line}\n").as_bytes());
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).unwrap();
    serde_json::from_str(&reply).unwrap()
}

const STATUS: &str = r#"{"v":1,"cmd":"status"}"#;

/// VHOST_USER_GET_FEATURES and its answer: whether somebody serves this connection.
fn is_served(stream: &mut UnixStream) -> bool {
    let header: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A connection that was closed at once may fail either way.
    stream.write_all(&header).is_ok() && stream.read_exact(&mut [0; 20]).is_ok()
}

/// Closes a connection, also for a process that another test forks at this very moment and that
/// still has a copy.
fn hang_up(stream: &UnixStream) {
    stream.shutdown(std::net::Shutdown::Both).unwrap();
}

#[test]
fn capabilities_are_printed_and_everything_else_is_ignored() {
    for arguments in [&["--print-capabilities"][..], &["--num-queues", "--print-capabilities", "x"]]
    {
        let output = run(EXTENTD, arguments);
        assert_eq!(output.status.code(), Some(0));
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        let expected = serde_json::json!({"type": "block", "features": ["blk-file", "read-only"]});
        assert_eq!(value, expected);
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn a_wrong_command_line_is_one_line_and_status_2() {
    let with = |option: &str, line: &str| {
        refused(&["--blk-file=/x", "--socket-path=/x/s", option], 2, line);
    };
    with("--num-queues=0", "--num-queues 0: must be 1 to 64");
    with("--num-queues=65", "--num-queues 65: must be 1 to 64");
    with("--queue-size=1000", "--queue-size 1000: must be a power of two");
    with("--metrics=/m", "unexpected argument '--metrics'");
    refused(&["--blk-file=/x"], 2, "no socket to serve");
    refused(&["--socket-path=/x"], 2, "--blk-file <PATH>");
    let output = run(EXTENTCTL, &[]);
    assert_eq!((output.status.code(), stderr(&output).lines().count()), (Some(2), 1));
}

#[test]
fn an_image_that_cannot_be_served_is_one_line_and_status_1() {
    let scratch = Scratch::new();
    let socket = format!("--socket-path={}", scratch.path("s").display());
    let cases: [(&str, &[u8], &[&str], &str); 7] = [
        ("empty", b"", &[], "is empty"),
        ("small", &[1; 511], &[], "less than one 512-byte block"),
        ("small-4k", &[1; 512], &["--block-size=4096"], "less than one 4096-byte block"),
        ("qcow2", b"QFI\xfb\0\0\0\x03", &[], "looks like a qcow2 image"),
        ("offset-end", &[1; 4096], &["--offset=4096"], "--offset 4096"),
        ("offset-odd", &[1; 4096], &["--offset=100"], "--offset 100"),
        ("limit-odd", &[1; 4096], &["--size-limit=100"], "--size-limit 100"),
    ];
    for (name, bytes, options, line) in cases {
        let mut content = bytes.to_vec();
        if name == "qcow2" {
            content.resize(4096, 0);
        }
        let image = scratch.file(name, &content);
        let image = format!("--blk-file={}", image.display());
        refused(&[&[image.as_str(), &socket], options].concat(), 1, line);
    }
    let missing = format!("--blk-file={}", scratch.path("missing").display());
    refused(&[&missing, &socket], 1, "no such file");
    let directory = format!("--blk-file={}", scratch.path("").display());
    refused(&[&directory, &socket], 1, "is a directory");
    assert!(!scratch.path("s").exists(), "a failed start leaves no socket");
}

#[test]
fn an_image_that_cannot_be_written_needs_read_only() {
    let scratch = Scratch::new();
    // A program that runs, such as this one, cannot be opened for writing, by root neither.
    let image = format!("--blk-file={}", std::env::current_exe().unwrap().display());
    let socket = format!("--socket-path={}", scratch.path("s").display());
    refused(&[&image, &socket], 1, "--read-only");
}

#[test]
fn direct_mode_that_cannot_be_had_says_why() {
    let scratch = Scratch::new();
    let image = scratch.image();
    // Whatever the filesystem: nobody may have it open.
    let _open = File::open(&image).unwrap();
    let image = format!("--blk-file={}", image.display());
    let socket = format!("--socket-path={}", scratch.path("s").display());
    refused(&[&image, &socket, "--mode=direct"], 1, "--mode direct is not to be had: ");
    assert!(!scratch.path("s").exists());
}

#[test]
fn sigterm_ends_it_and_takes_the_sockets_along() {
    let mut daemon = Daemon::start(&[]);
    assert!(fs::metadata(daemon.socket()).unwrap().file_type().is_socket());
    for path in [daemon.socket(), daemon.control()] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", daemon.log());
    assert!(!daemon.socket().exists() && !daemon.control().exists());
    let log = daemon.log();
    assert_eq!(log.lines().filter(|line| line.contains("mode=")).count(), 1, "{log}");
}

#[test]
fn sigterm_ends_a_start_that_waits_for_a_lock() {
    let first = Daemon::start(&[]);
    let socket = first.scratch().path("other");
    let mut second = Daemon::spawn(first.image(), &socket, &["--log-level=debug"]);
    // Whose it is is said at once.
    let named = format!("locked by another process, pid {} (extentd); waiting", first.pid());
    wait_for("the wait for the lock", || second.log().contains(&named));
    // Well before the minute is over that it would wait.
    assert_eq!(second.terminate(), Some(0), "{}", second.log());
    assert!(!socket.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_an_error() {
    let mut killed = Daemon::start(&[]);
    killed.kill();
    assert!(killed.socket().exists(), "a killed daemon leaves its socket");
    let live = Daemon::start_in(killed.scratch(), &[]);
    let other = live.scratch().file("other", &[1; 4096]);
    let image = format!("--blk-file={}", other.display());
    let socket = format!("--socket-path={}", live.socket().display());
    refused(&[&image, &socket], 1, "socket in use");
    let mut frontend = UnixStream::connect(live.socket()).unwrap();
    assert!(is_served(&mut frontend), "{}", live.log());
}

#[test]
fn permissions_of_the_socket_are_an_option() {
    let daemon = Daemon::start(&["--socket-mode=0666", "--socket-owner=root"]);
    let mode = fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    let mode = fs::metadata(daemon.control()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the control socket stays private");
}

#[test]
fn an_inherited_listener_is_served_and_stays() {
    let scratch = Scratch::new();
    let path = scratch.path("s");
    for activation in ["--fd 3", "LISTEN_FDS"] {
        let listener = UnixListener::bind(&path).unwrap();
        let mut daemon =
            Daemon::inherit(&scratch, listener.try_clone().unwrap().into(), activation);
        for _ in 0..2 {
            let mut frontend = UnixStream::connect(&path).unwrap();
            assert!(is_served(&mut frontend), "{activation}: {}", daemon.log());
            hang_up(&frontend);
        }
        assert_eq!(daemon.terminate(), Some(0), "{}", daemon.log());
        assert!(path.exists(), "whoever made the socket removes it");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_connected_socket_is_served_once() {
    let scratch = Scratch::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut daemon = Daemon::inherit(&scratch, ours.into(), "--fd 3");
    assert!(is_served(&mut theirs), "{}", daemon.log());
    hang_up(&theirs);
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
}

#[test]
fn an_inherited_descriptor_must_be_a_unix_socket() {
    let scratch = Scratch::new();
    let image = format!("--blk-file={}", scratch.image().display());
    refused(&[&image, "--fd=77"], 1, "--fd 77");
    let mut daemon = Daemon::inherit(&scratch, File::open("/dev/null").unwrap().into(), "--fd 3");
    assert_eq!(daemon.wait(), Some(1));
    assert!(daemon.log().contains("--fd 3: not a Unix stream socket"), "{}", daemon.log());
}

#[test]
fn one_frontend_at_a_time_and_the_next_at_once() {
    let daemon = Daemon::start(&[]);
    let mut first = UnixStream::connect(daemon.socket()).unwrap();
    assert!(is_served(&mut first));
    let mut second = UnixStream::connect(daemon.socket()).unwrap();
    assert!(!is_served(&mut second), "a second frontend is turned away");
    assert!(is_served(&mut first), "and does not disturb the first");
    for round in 0..50 {
        hang_up(&first);
        first = UnixStream::connect(daemon.socket()).unwrap();
        assert!(is_served(&mut first), "round {round}: {}", daemon.log());
    }
    let turned_away = daemon.log().matches("turned away").count();
    assert_eq!(turned_away, 1, "{}", daemon.log());
}

#[test]
fn sessions_leave_nothing_behind() {
    let daemon = Daemon::start(&[]);
    let count =
        |what: &str| fs::read_dir(format!("/proc/{}/{what}", daemon.pid())).unwrap().count();
    let settle =
        || wait_for("the session's end", || ask(daemon.control(), STATUS)["frontend"] == "none");
    let session = || {
        let mut frontend = UnixStream::connect(daemon.socket()).unwrap();
        assert!(is_served(&mut frontend));
        hang_up(&frontend);
        settle();
    };
    session();
    // The connection that asked for the status may be there for a moment longer.
    std::thread::sleep(Duration::from_millis(200));
    let before = (count("fd"), count("task"));
    for _ in 0..20 {
        session();
    }
    wait_for("no more descriptors and threads than before", || {
        let now = (count("fd"), count("task"));
        now.0 <= before.0 && now.1 <= before.1
    });
    assert_eq!(ask(daemon.control(), STATUS)["sessions"], 21);
}

#[test]
fn status_has_what_scripts_read() {
    let daemon = Daemon::start(&[]);
    let status = ask(daemon.control(), STATUS);
    for field in [
        "v",
        "mode",
        "reason",
        "lease",
        "image",
        "device",
        "capacity_bytes",
        "block_size",
        "extents",
        "requests",
        "segments",
        "flush",
        "queues",
        "lease_breaks",
        "unlinked",
        "version",
        "pid",
    ] {
        assert!(status.get(field).is_some(), "{field}: {status}");
    }
    for (group, fields) in [
        ("extents", &["cached", "mapped_bytes", "fiemap_calls", "evictions"][..]),
        ("requests", &["read", "write", "flush", "discard", "write_zeroes", "errors"]),
        ("segments", &["direct", "file", "zero", "bounced"]),
        ("flush", &["requests", "device_flushes", "metadata_commits", "error"]),
    ] {
        for field in fields {
            assert!(status[group].get(field).is_some(), "{group}.{field}: {status}");
        }
    }
    assert_eq!(status["mode"], "filesystem");
    assert_eq!(status["capacity_bytes"], 1 << 20);
    assert_eq!(status["frontend"], "none");
    let _frontend = UnixStream::connect(daemon.socket()).unwrap();
    wait_for("the session", || ask(daemon.control(), STATUS)["frontend"] == "connected");
    assert!(!ask(daemon.control(), STATUS)["queues"].as_array().unwrap().is_empty());
}

#[test]
fn an_unlinked_image_is_served_on() {
    let daemon = Daemon::start(&[]);
    assert_eq!(ask(daemon.control(), STATUS)["unlinked"], false);
    fs::remove_file(daemon.image()).unwrap();
    wait_for("unlinked", || ask(daemon.control(), STATUS)["unlinked"] == true);
    assert!(is_served(&mut UnixStream::connect(daemon.socket()).unwrap()));
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(daemon.log().matches("unlinked").count(), 1, "{}", daemon.log());
}

#[test]
fn clients_of_the_control_socket_are_bounded() {
    let daemon = Daemon::start(&[]);
    let mut clients: Vec<UnixStream> =
        (0..16).map(|_| UnixStream::connect(daemon.control()).unwrap()).collect();
    // One that asks and never reads; the main loop must not care.
    let hog = clients.first_mut().unwrap();
    hog.set_nonblocking(true).unwrap();
    let flood = format!("{STATUS}\n").repeat(100_000);
    let _ = hog.write(flood.as_bytes());
    // A client with a request comes in, and the longest idle client makes room.
    let reply = ask(daemon.control(), STATUS);
    assert_eq!(reply["mode"], "filesystem", "{reply}");
    let mut told = String::new();
    clients[1].read_to_string(&mut told).unwrap();
    assert!(told.contains("more clients came"), "{told}");
    clients.extend((0..40).map(|_| UnixStream::connect(daemon.control()).unwrap()));
    assert_eq!(ask(daemon.control(), STATUS)["mode"], "filesystem");
    let error = ask(daemon.control(), &"x".repeat(70_000));
    assert!(error["error"].as_str().unwrap().contains("longer than"), "{error}");
}

/// A client that sends lines as fast as it can and reads all that it is told has its turn, and no more than that.
#[test]
fn a_client_that_never_stops_does_not_hold_the_loop() {
    let mut daemon = Daemon::start(&[]);
    let mut flood = UnixStream::connect(daemon.control()).unwrap();
    let mut reader = flood.try_clone().unwrap();
    let reads = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    let writes = std::thread::spawn(move || {
        let lines = "\n".repeat(4096);
        while flood.write_all(lines.as_bytes()).is_ok() {}
    });
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..10 {
        assert_eq!(ask(daemon.control(), STATUS)["mode"], "filesystem");
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", daemon.log());
    writes.join().unwrap();
    // Reset or ended, as it happens.
    let _ = reads.join().unwrap();
}

#[test]
fn extentctl_shows_a_served_image() {
    let daemon = Daemon::start(&[]);
    let control = daemon.control().to_str().unwrap().to_owned();
    let json = |arguments: &[&str], status: i32| -> Value {
        let output = run(EXTENTCTL, arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(json(&["status", "-c", &control, "--json"], 0)["mode"], "filesystem");
    let check = json(&["check", "-c", &control, "--json"], 1);
    assert_eq!(check["verdict"], "filesystem");
    assert_eq!(check["size_bytes"], 1 << 20);
    let table = run(EXTENTCTL, &["status", "-c", &control]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("mode              filesystem\n"));
    let output = run(EXTENTCTL, &["status", "-c", "/no/such/socket"]);
    assert_eq!((output.status.code(), stderr(&output).lines().count()), (Some(2), 1));
}

#[test]
fn extentctl_maps_a_bare_file() {
    let scratch = Scratch::new();
    let image = scratch.path("sparse");
    let mut file = File::create(&image).unwrap();
    file.write_all(&[7; 8192]).unwrap();
    file.set_len(1 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let path = image.to_str().unwrap();
    let output = run(EXTENTCTL, &["map", path, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let map: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(map["size_bytes"], 1 << 20);
    let extents = map["extents"].as_array().unwrap();
    let sum: u64 = extents.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(sum, 1 << 20, "{map}");
    assert_eq!(extents.last().unwrap()["state"], "hole", "{map}");
    let output = run(EXTENTCTL, &["map", path]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("each cell") && text.contains("hole"), "{text}");
    let output = run(EXTENTCTL, &["check", "/no/such/image"]);
    assert_eq!((output.status.code(), stderr(&output).lines().count()), (Some(2), 1));
}
