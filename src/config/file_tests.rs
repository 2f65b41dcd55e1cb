// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::io::Write;

use super::super::{Mode, SocketOptions};
use super::*;
use crate::virtio::spin::Polling;

fn environment() -> Environment {
    Environment { pid: 7, cpus: 4, ..Environment::default() }
}

fn read_as(
    text: &str,
    log: (Option<LogLevel>, Option<LogFormat>),
    environment: &Environment,
) -> Result<Settings, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    read(file.path(), log, environment).map_err(|error| {
        let error = error.to_string();
        let place = format!("{}: ", file.path().display());
        error.strip_prefix(&place).unwrap_or_else(|| panic!("{error}")).to_owned()
    })
}

fn read_text(text: &str) -> Result<Settings, String> {
    read_as(text, (None, None), &environment())
}

#[test]
fn a_device_has_the_options_of_the_command_line() {
    let settings = read_text(
        r#"
        log-level = "warn"
        log-format = "json"

        [[device]]
        blk-file = "/a"
        socket-path = "/a.sock"

        [[device]]
        blk-file = "/b"   # a comment
        fd = 7
        control-path = '/b.ctl'
        read-only = true
        mode = "direct"
        num-queues = 4
        poll-us = 50
        offset = "1 MiB"
        size-limit = 4096
        serial = "-1"

        [[device]]
        blk-file = "/c"
        socket-path = "/c.sock"
        socket-mode = "0660"
        read-only = false
        poll-us = "auto"
        "#,
    )
    .unwrap();
    assert_eq!((settings.log_level, settings.log_format), (LogLevel::Warn, LogFormat::Json));
    let [a, b, c] = settings.devices.try_into().unwrap();
    // The first has the defaults, and so the others where they say nothing.
    let Ok([only]) = <[Config; 1]>::try_from(
        Arguments::try_parse_from(["extentd", "--blk-file=/a", "--socket-path=/a.sock"])
            .unwrap()
            .resolve(&environment())
            .unwrap()
            .devices,
    ) else {
        panic!("not one device")
    };
    assert_eq!(a, only);
    let expected = Config {
        blk_file: "/b".into(),
        endpoint: Endpoint::Fd(7),
        control: Some(SocketOptions::private("/b.ctl".into())),
        read_only: true,
        mode: Mode::Direct,
        num_queues: 4,
        polling: Polling::Fixed(std::time::Duration::from_micros(50)),
        offset: 1 << 20,
        size_limit: Some(4096),
        serial: Some("-1".to_owned()),
        ..only.clone()
    };
    assert_eq!(b, expected);
    let socket = SocketOptions { mode: 0o660, ..SocketOptions::private("/c.sock".into()) };
    let expected = Config { blk_file: "/c".into(), endpoint: Endpoint::Path(socket), ..only };
    assert_eq!(c, expected);
}

#[test]
fn the_example_is_a_good_one() {
    let text = include_str!("../../resources/examples/devices.toml");
    // The group may be none of this machine's.
    let settings = read_text(&text.replace("\"kvm\"", "\"36\"")).unwrap();
    assert_eq!(settings.devices.len(), 3);
    assert!(settings.devices.iter().filter(|device| device.read_only).count() == 1);
}

#[test]
fn the_command_line_decides_on_the_log() {
    let device = "[[device]]\nblk-file = 'a'\nsocket-path = 's'\n";
    let log = |text: &str, said| {
        let settings = read_as(text, said, &environment()).unwrap();
        (settings.log_level, settings.log_format)
    };
    assert_eq!(log(device, (None, None)), (LogLevel::Info, LogFormat::Text));
    let said = (Some(LogLevel::Trace), Some(LogFormat::Text));
    let text = format!("log-level = 'off'\nlog-format = 'json'\n{device}");
    assert_eq!(log(&text, said), (LogLevel::Trace, LogFormat::Text));
    assert_eq!(log(&text, (None, None)), (LogLevel::Off, LogFormat::Json));
}

#[test]
fn mistakes_name_the_place_and_the_fix() {
    const A: &str = "[[device]]\nblk-file = '/a'\nsocket-path = '/a.sock'\n";
    let b = |rest: &str| format!("{A}[[device]]\nblk-file = '/b'\n{rest}\n");
    let own = |rest: &str| b(&format!("socket-path = '/b.sock'\n{rest}"));
    for (text, message) in [
        (String::new(), "no device in it; begin one for each image"),
        ("device = []".to_owned(), "no device in it"),
        ("device = 3".to_owned(), "device: must be a list of tables"),
        ("device = [3]".to_owned(), "device: must be a list of tables"),
        ("[device]\nblk-file = '/a'".to_owned(), "device: must be a list of tables; begin each"),
        ("[[device]]\nblk-file = /a".to_owned(), "line 2: "),
        (format!("{A}fd = 3\nfd = 4"), "line 5: duplicate key"),
        (format!("mode = 'auto'\n{A}"), "unknown key mode; outside of a [[device]] only"),
        (format!("{A}[other]\n"), "unknown key other; outside of a [[device]] only"),
        (format!("log-level = 'loud'\n{A}"), "invalid value 'loud' for '--log-level <LEVEL>'"),
        (format!("log-level = 3.5\n{A}"), "log-level: must be a text in quotes or a whole number"),
        (own("blk_file = 1"), "device 2 (/b): unknown key blk_file; keys are extentd's options"),
        (own("help = true"), "device 2 (/b): unknown key help; keys are"),
        (own("config = 'x'"), "device 2 (/b): unknown key config; keys are"),
        (own("log-level = 'info'"), "device 2 (/b): unknown key log-level; keys are"),
        (own("print-capabilities = true"), "device 2 (/b): unknown key print-capabilities"),
        (own("read-only = 'yes'"), "device 2 (/b): read-only: must be true or false"),
        (own("socket-mode = 0o660"), "device 2 (/b): socket-mode: must be octal permissions in"),
        (own("socket-mode = 660"), "device 2 (/b): socket-mode: must be octal permissions in"),
        (own("read-only = 1"), "device 2 (/b): read-only: must be true or false"),
        (own("threads = true"), "device 2 (/b): threads: must be a text in quotes or a whole"),
        (own("threads = 1.5"), "device 2 (/b): threads: must be a text in quotes or a whole"),
        (own("serial = ['x']"), "device 2 (/b): serial: must be a text in quotes or a whole"),
        (own("num-queues = -1"), "device 2 (/b): invalid value '-1' for '--num-queues <N>'"),
        (own("num-queues = 65"), "device 2 (/b): --num-queues 65: must be 1 to 64"),
        (own("mode = 'fast'"), "device 2 (/b): invalid value 'fast' for '--mode <MODE>'"),
        (own("offset = 'far'"), "device 2 (/b): --offset far: must be a number of bytes"),
        (own("fd = 5"), "device 2 (/b): the argument '--fd <N>' cannot be used with"),
        (own("control-path = '/b.sock'"), "device 2 (/b): --control-path and --socket-path are"),
        (b("fd = 1"), "device 2 (/b): --fd 1: must be an inherited descriptor, 3 or above"),
        (b(""), "device 2 (/b): no socket to serve: give socket-path or fd"),
        (format!("{A}[[device]]\nfd = 3"), "device 2 (without a blk-file): the following required"),
        (b("socket-path = '/a.sock'"), "device 2 (/b): socket-path /a.sock is device 1's already"),
        (own("control-path = '/a.sock'"), "device 2 (/b): control-path /a.sock is device 1's"),
    ] {
        let error = read_text(&text).unwrap_err();
        assert!(error.starts_with(message), "{text:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let twice = "[[device]]\nblk-file = '/a'\nfd = 3\n[[device]]\nblk-file = '/b'\nfd = 3";
    assert!(read_text(twice).unwrap_err().starts_with("device 2 (/b): fd 3 is device 1's already"));
}

#[test]
fn many_devices_share_the_cpus() {
    for (cpus, devices, threads) in
        [(64, 1, 64), (64, 4, 64), (64, 32, 8), (64, 300, 2), (2, 300, 2), (1, 300, 1), (0, 2, 1)]
    {
        assert_eq!(share(cpus, devices), threads, "{cpus} CPUs, {devices} devices");
    }
    let device = |n: usize| format!("[[device]]\nblk-file = '/{n}'\nfd = {}\n", n + 3);
    let threads = |count: usize| {
        let text: String = (0..count).map(device).collect();
        read_text(&text).unwrap().devices.last().unwrap().threads
    };
    assert_eq!((threads(1), threads(4), threads(5), threads(100)), (4, 4, 3, 2));
}

#[test]
fn systemd_s_socket_is_for_a_single_device() {
    let environment = Environment {
        listen_pid: Some("7".to_owned()),
        listen_fds: Some("1".to_owned()),
        ..environment()
    };
    let read = |text: &str| read_as(text, (None, None), &environment);
    let one = read("[[device]]\nblk-file = '/a'").unwrap();
    assert_eq!(one.devices.first().unwrap().endpoint, Endpoint::Fd(3));
    let two = read("[[device]]\nblk-file = '/a'\nfd = 3\n[[device]]\nblk-file = '/b'");
    assert!(two.unwrap_err().contains("a socket from systemd is taken by a single device only"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = read(Path::new("/no/such"), (None, None), &environment()).unwrap_err();
    assert!(error.to_string().starts_with("--config /no/such: No such file"), "{error}");
}
