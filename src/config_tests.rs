// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use clap::{CommandFactory, Parser};

use super::*;

fn environment() -> Environment {
    Environment { pid: 7, cpus: 4, ..Environment::default() }
}

fn resolve_in(environment: &Environment, arguments: &[&str]) -> Result<Config, String> {
    let all = ["extentd", "--blk-file", "/i"].iter().chain(arguments);
    let arguments = Arguments::try_parse_from(all).map_err(|error| error.to_string())?;
    let settings = arguments.resolve(environment)?;
    let [config] = settings.devices.try_into().unwrap();
    Ok(config)
}

fn resolve(arguments: &[&str]) -> Result<Config, String> {
    resolve_in(&environment(), &[&["--socket-path", "/s"], arguments].concat())
}

#[test]
fn the_command_line_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn the_defaults_are_the_documented_ones() {
    let config = resolve(&[]).unwrap();
    let expected = Config {
        blk_file: "/i".into(),
        endpoint: Endpoint::Path(SocketOptions::private("/s".into())),
        read_only: false,
        format_raw: false,
        mode: Mode::Auto,
        write_back: true,
        num_queues: 16,
        queue_size: 1024,
        threads: 4,
        polling: Polling::Auto,
        pin_memory: false,
        offset: 0,
        size_limit: None,
        block_size: 512,
        unmap: true,
        strict: false,
        serial: None,
        max_extents: 1 << 20,
        populate: false,
        control: None,
    };
    assert_eq!(config, expected);
}

#[test]
fn good_values_are_taken() {
    let config = resolve(&[
        "--socket-mode=0660",
        "--socket-owner=root",
        "--socket-group=12345",
        "--read-only",
        "--format=raw",
        "--mode=direct",
        "--cache=writethrough",
        "--discard=ignore",
        "--barrier=strict",
        "--num-queues=64",
        "--queue-size=32768",
        "--threads=64",
        "--offset=1MiB",
        "--size-limit=2G",
        "--block-size=4096",
        "--poll-us=50",
        "--serial=12345678901234567890",
        "--max-extents=1",
        "--populate=all",
        "--pin-memory",
        "--control-path=/c",
    ])
    .unwrap();
    let Endpoint::Path(socket) = &config.endpoint else { panic!("not a path") };
    assert_eq!(socket.mode, 0o660);
    assert_eq!(socket.owner, Some(Uid::from_raw(0)));
    assert_eq!(socket.group, Some(Gid::from_raw(12345)));
    assert!(
        config.read_only
            && config.format_raw
            && !config.write_back
            && !config.unmap
            && config.strict
            && config.populate
            && config.pin_memory
    );
    assert_eq!((config.num_queues, config.queue_size, config.threads), (64, 32768, 64));
    assert_eq!(config.polling, Polling::Fixed(std::time::Duration::from_micros(50)));
    assert_eq!((config.offset, config.size_limit), (1 << 20, Some(2 << 30)));
    assert_eq!(config.control, Some(SocketOptions::private("/c".into())));
}

#[test]
fn bad_values_name_the_fix() {
    assert!(resolve(&["--poll-us=1001"]).unwrap_err().contains("auto, or 0 to 1000 microseconds"));
    for (arguments, message) in [
        (&["--num-queues=0"][..], "--num-queues 0: must be 1 to 64"),
        (&["--num-queues=65"], "--num-queues 65: must be 1 to 64"),
        (&["--threads=0"], "--threads 0: must be 1 to 16"),
        (&["--num-queues=2", "--threads=3"], "--threads 3: must be 1 to 2"),
        (&["--queue-size=0"], "--queue-size 0: must be a power of two from 2 to 32768"),
        (&["--queue-size=1000"], "--queue-size 1000: must be a power of two from 2 to 32768"),
        (&["--queue-size=65536"], "--queue-size 65536: must be a power of two from 2 to 32768"),
        (&["--block-size=1024"], "--block-size 1024: must be 512 or 4096"),
        (&["--size-limit=0"], "--size-limit 0: must be at least one block"),
        (&["--offset=lots"], "--offset lots: must be a number of bytes, with KiB, MiB, GiB or TiB"),
        (&["--offset=8388608TiB"], "--offset 8388608TiB: is larger than any file"),
        (&["--serial=123456789012345678901"], "--serial: 21 bytes are too many; at most 20"),
        (&["--serial=a\tb"], "--serial: only printable ASCII"),
        (&["--populate=all", "--mode=filesystem"], "--populate all: with --mode filesystem there"),
        (&["--max-extents=0"], "--max-extents 0: must be 1 to"),
        (&["--socket-mode=999"], "--socket-mode 999: must be octal permissions such as 0660"),
        (&["--socket-mode=7777"], "--socket-mode 7777: must be octal"),
        (&["--socket-owner=no-such-user"], "--socket-owner no-such-user: not in /etc/passwd"),
        (&["--socket-group=4294967295"], "--socket-group 4294967295: not in /etc/group"),
        (&["--control-path=/s"], "--control-path and --socket-path are the same: /s"),
    ] {
        let error = resolve(arguments).unwrap_err();
        assert!(error.starts_with(message), "{arguments:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn the_socket_comes_from_one_place() {
    let bare = environment();
    let listening = |pid: &str, fds: &str| Environment {
        listen_pid: Some(pid.to_owned()),
        listen_fds: Some(fds.to_owned()),
        ..environment()
    };
    let endpoint = |environment: &Environment, arguments: &[&str]| {
        resolve_in(environment, arguments).map(|config| config.endpoint)
    };
    assert_eq!(endpoint(&bare, &["--fd=5"]), Ok(Endpoint::Fd(5)));
    assert_eq!(endpoint(&listening("7", "1"), &[]), Ok(Endpoint::Fd(3)));
    assert_eq!(endpoint(&listening("7", "1"), &["--fd=9"]), Ok(Endpoint::Fd(9)));
    for (environment, arguments, message) in [
        (&bare, &[][..], "no socket to serve"),
        (&listening("8", "1"), &[], "no socket to serve"),
        (&listening("7", "0"), &[], "no socket to serve"),
        (&listening("7", "2"), &[], "LISTEN_FDS=2: exactly one"),
        (&bare, &["--fd=1"], "--fd 1: must be an inherited descriptor"),
    ] {
        let error = endpoint(environment, arguments).unwrap_err();
        assert!(error.starts_with(message), "{error}");
    }
    assert!(
        endpoint(&bare, &["--fd=5", "--socket-path=/s"]).unwrap_err().contains("cannot be used")
    );
    assert!(
        endpoint(&bare, &["--fd=5", "--socket-mode=0660"])
            .unwrap_err()
            .contains("need --socket-path")
    );
}

#[test]
fn options_of_later_work_are_absent() {
    for option in ["--connect", "--iops", "--metrics", "--sandbox"] {
        assert!(resolve(&[option, "x"]).unwrap_err().contains("unexpected argument"), "{option}");
    }
}

#[test]
fn the_log_is_the_process_s() {
    let settings = |arguments: &[&str]| {
        let all = ["extentd", "--blk-file=/i", "--socket-path=/s"];
        let arguments = Arguments::try_parse_from(all.iter().chain(arguments)).unwrap();
        let settings = arguments.resolve(&environment()).unwrap();
        (settings.log_level, settings.log_format)
    };
    assert_eq!(settings(&[]), (LogLevel::Info, LogFormat::Text));
    assert_eq!(
        settings(&["--log-level=debug", "--log-format=json"]),
        (LogLevel::Debug, LogFormat::Json)
    );
}

#[test]
fn accounts_are_looked_up() {
    let text = "root:x:0:0:root:/root:/bin/sh\nkvm:x:104:\nbroken\n";
    assert_eq!(account_in(text, "kvm"), Some(104));
    assert_eq!(account_in(text, "root"), Some(0));
    assert_eq!(account_in(text, "broken"), None);
    assert_eq!(account_in(text, "nobody"), None);
}
