// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::io;

use tracing::subscriber::with_default;
use tracing_subscriber::fmt::MakeWriter;

use super::*;

/// A log in memory.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl io::Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Memory {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// What is in the log after `act`, a report at the end included.
fn logged(act: impl FnOnce(&Limits)) -> String {
    let (memory, limits) = (Memory::default(), Arc::<Limits>::default());
    let log = tracing_subscriber::fmt().with_ansi(false).with_target(false).without_time();
    let log = log.with_max_level(LevelFilter::INFO).with_writer(memory.clone()).finish();
    with_default(log.with(Gate(Arc::clone(&limits))), || {
        act(&limits);
        limits.say();
    });
    String::from_utf8(memory.0.lock().unwrap().clone()).unwrap()
}

#[test]
fn a_flood_is_a_few_lines_and_one_that_tells_of_the_rest() {
    let log = logged(|_| (0..1000).for_each(|number| warn!(number, "flood")));
    assert_eq!(log.lines().count(), 11, "{log}");
    let last = log.lines().last().unwrap();
    assert!(last.contains("990 lines left out, the last: flood number=999"), "{log}");
}

#[test]
fn each_device_and_each_statement_has_its_own_limit() {
    let log = logged(|limits| {
        let devices = [device_span(Path::new("/a")), device_span(Path::new("/b"))];
        for device in &devices {
            device.in_scope(|| (0..100).for_each(|_| warn!("flood")));
        }
        warn!("once");
        // What an inner span says is the device's as well.
        devices[0].in_scope(|| tracing::info_span!("inner").in_scope(|| error!("inner line")));
        limits.say();
    });
    let lines = |pattern: &str| log.lines().filter(|line| line.contains(pattern)).count();
    assert_eq!(lines("device{image=/a}"), 12, "{log}");
    assert_eq!(lines("device{image=/b}"), 11, "{log}");
    assert_eq!(lines("90 lines left out, the last: flood"), 2, "{log}");
    assert_eq!(lines("once"), 1, "{log}");
}

#[test]
fn what_is_below_the_level_counts_for_nothing() {
    let log = logged(|limits| {
        (0..1000).for_each(|_| tracing::debug!("unheard"));
        assert!(!limits.lock().pending);
    });
    assert_eq!(log, "");
}

#[test]
fn the_hosts_lines_appear_whatever_the_device_says() {
    let log = logged(|_| {
        macro_rules! flood {
            ($($text:literal)*) => { $((0..1000).for_each(|_| warn!($text)));* };
        }
        flood!("a" "b" "c" "d" "e" "f" "g" "h");
        warn!(target: "extentd::server::owner", "mode=filesystem");
        warn!(target: "extentd::server::owners", "not the host's");
    });
    assert_eq!(log.matches("mode=filesystem").count(), 1, "{log}");
    assert!(log.contains("1 lines left out, the last: not the host's"), "{log}");
    // 60 of the device's, the host's, and a report of each of nine kinds.
    assert_eq!(log.lines().count(), 70, "{log}");
}

#[test]
fn a_report_is_an_error_if_the_lines_were_and_is_cut_short() {
    let log = logged(|_| (0..11).for_each(|_| error!("{}", "ä".repeat(1000))));
    let last = log.lines().last().unwrap();
    assert!(last.trim_start().starts_with("ERROR 1 lines left out"), "{last}");
    assert!(last.len() < 300, "{last}");
}

/// Every other module of ours is the outside's: one that is new or forgotten is limited more, not less.
#[test]
fn the_hosts_modules_exist() {
    for module in HOST_MODULES {
        let path = module.replacen("extentd", "src", 1).replace("::", "/");
        let file = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
        assert!(Path::new(&format!("{file}.rs")).exists() || Path::new(&file).is_dir(), "{module}");
        assert_eq!(cause(module), Cause::Host);
        assert_eq!(cause(&format!("{module}::inner")), Cause::Host);
        assert_eq!(cause(&format!("{module}x")), Cause::Outside);
    }
    assert_eq!(cause("vhost_user_backend::handler"), Cause::Outside);
}
