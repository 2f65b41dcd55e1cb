// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The style that a compiler does not check: how long files and functions may be, where `unsafe` may stand,
//! what the pure core may name, what every file starts with. A breach fails with the place and the rule.

#![allow(clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a source file, its tests not counted.
const FILE_LINES: usize = 400;
/// Lines of a function, its signature counted.
const FUNCTION_LINES: usize = 70;
const SPDX: &str = "SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause";
/// The only places where `unsafe` may stand.
const UNSAFE_HOMES: &[&str] = &["src/sys/", "integration/src/rig/", "integration/src/bench/"];
/// Modules of std that reach outside the process, or make it more than one thread.
const IMPURE_STD: &[&str] = &["fs", "net", "thread", "process", "os", "env", "path"];
/// Names the pure core may not have, wherever they come from.
const IMPURE_NAMES: &[&str] = &["Instant", "SystemTime", "libc", "rustix", "io_uring", "unsafe"];

/// A file of the repository: its path from the root, and its text.
struct File {
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|extension| extension == "rs")
    }

    /// Shell, whatever its name.
    fn is_script(&self) -> bool {
        self.path.ends_with(".sh") || self.text.starts_with("#!")
    }

    fn is_toml(&self) -> bool {
        self.path.ends_with(".toml")
    }

    /// Source of a shipped crate, without its tests.
    fn is_product(&self) -> bool {
        self.is_rust()
            && (self.path.starts_with("src/") || self.path.starts_with("integration/src/"))
            && !self.path.ends_with("_tests.rs")
    }

    /// The lines before the first test module.
    fn without_tests(&self) -> String {
        let end = self.text.find("#[cfg(test)]\nmod ").unwrap_or(self.text.len());
        self.text.get(..end).unwrap_or_default().to_owned()
    }
}

/// Every text file of the repository, build results and git's own files left out.
fn files() -> Vec<File> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    collect(&root, &root, &mut found);
    assert!(found.iter().any(File::is_product), "no sources found under {}", root.display());
    found
}

fn collect(root: &Path, directory: &Path, found: &mut Vec<File>) {
    let Ok(entries) = fs::read_dir(directory) else {
        panic!("cannot list {}", directory.display())
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if name == ".git" || name == "target" || name == "Cargo.lock" {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(root, &path, found);
        } else if let Ok(text) = fs::read_to_string(&path) {
            let path = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            found.push(File { path, text });
        }
    }
}

/// Fails with all breaches at once, one a line.
fn none(rule: &str, breaches: &[String]) {
    assert!(breaches.is_empty(), "{rule}:\n  {}", breaches.join("\n  "));
}

/// The text with comments, strings and character literals blanked; every line keeps its number.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        let rest = chars.get(at..).unwrap_or_default();
        let after_word = at > 0 && chars.get(at - 1).is_some_and(|&c| is_word(c));
        let length = if rest.starts_with(&['/', '/']) {
            rest.iter().take_while(|&&c| c != '\n').count()
        } else if rest.starts_with(&['/', '*']) {
            comment_length(rest)
        } else if c == '"' {
            string_length(rest)
        } else if c == '\'' {
            character_length(rest)
        } else if (c == 'r' || c == 'b' || c == 'c') && !after_word {
            raw_string_length(rest)
        } else {
            0
        };
        if length == 0 {
            code.push(c);
            at += 1;
        } else {
            code.extend(rest.iter().take(length).map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at += length;
        }
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// A block comment; they nest.
fn comment_length(rest: &[char]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(ahead) = rest.get(at..).filter(|ahead| !ahead.is_empty()) {
        if ahead.starts_with(&['/', '*']) {
            depth += 1;
            at += 2;
        } else if ahead.starts_with(&['*', '/']) {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// A string with escapes, from its opening quote.
fn string_length(rest: &[char]) -> usize {
    let mut at = 1;
    while let Some(&c) = rest.get(at) {
        match c {
            '"' => return at + 1,
            '\\' => at += 2,
            _ => at += 1,
        }
    }
    rest.len()
}

/// A character literal; 0 for a lifetime or a label.
fn character_length(rest: &[char]) -> usize {
    match (rest.get(1), rest.get(2)) {
        (Some('\\'), Some(_)) => {
            let close = rest.iter().skip(3).position(|&c| c == '\'');
            close.map_or(rest.len(), |close| close + 4)
        }
        (Some(_), Some('\'')) => 3,
        _ => 0,
    }
}

/// `r"…"`, `r#"…"#`, also with `b` or `c` before; 0 for anything else.
fn raw_string_length(rest: &[char]) -> usize {
    let prefix = rest.iter().take(2).take_while(|&&c| matches!(c, 'r' | 'b' | 'c')).count();
    if rest.get(prefix - 1) != Some(&'r') {
        return 0;
    }
    let hashes = rest.iter().skip(prefix).take_while(|&&c| c == '#').count();
    if rest.get(prefix + hashes) != Some(&'"') {
        return 0;
    }
    let mut close = vec!['"'];
    close.resize(hashes + 1, '#');
    let start = prefix + hashes + 1;
    let body = rest.get(start..).unwrap_or_default();
    let length = body.windows(close.len()).position(|window| window == close);
    length.map_or(rest.len(), |length| start + length + close.len())
}

/// Where `word` stands by itself in `code`, as byte offsets.
fn word_offsets<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = code.get(..at).and_then(|text| text.chars().next_back());
        let after = code.get(at + word.len()..).and_then(|text| text.chars().next());
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

/// The line, from 1, of a byte offset.
fn line_of(code: &str, offset: usize) -> usize {
    code.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

/// Every function with a body: its name, first line and number of lines.
fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for at in word_offsets(code, "fn") {
        let rest = code.get(at..).unwrap_or_default();
        let name: String = rest
            .chars()
            .skip(2)
            .skip_while(|c| c.is_whitespace())
            .take_while(|&c| is_word(c))
            .collect();
        if let (false, Some(length)) = (name.is_empty(), body_end(rest)) {
            let lines = rest.get(..length).unwrap_or_default().lines().count();
            found.push((name, line_of(code, at), lines));
        }
    }
    found
}

/// Where the body that follows a signature ends; `None` for a declaration.
fn body_end(rest: &str) -> Option<usize> {
    let (mut round, mut curly) = (0_i32, 0_i32);
    for (at, c) in rest.char_indices() {
        match c {
            '(' | '[' => round += 1,
            ')' | ']' => round -= 1,
            '{' => curly += 1,
            '}' => {
                curly -= 1;
                if curly == 0 && round == 0 {
                    return Some(at + 1);
                }
            }
            ';' if curly == 0 && round == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The modules of std that `code` names: `std::fs::File`, `use std::{fs, io}`.
fn std_modules(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for at in word_offsets(code, "std") {
        let Some(rest) = code.get(at + 3..).and_then(|rest| rest.strip_prefix("::")) else {
            continue;
        };
        let Some(group) = rest.strip_prefix('{') else {
            found.push(rest.chars().take_while(|&c| is_word(c)).collect());
            continue;
        };
        let mut depth = 0;
        let mut names = String::new();
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                _ if depth == 0 => names.push(c),
                _ => {}
            }
        }
        found.extend(
            names.split(',').map(|name| name.trim().chars().take_while(|&c| is_word(c)).collect()),
        );
    }
    found
}

#[test]
fn files_are_short() {
    let breaches: Vec<String> = files()
        .iter()
        .filter(|file| file.is_product())
        .map(|file| (&file.path, file.without_tests().lines().count()))
        .filter(|&(_, lines)| lines > FILE_LINES)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    none(
        &format!("a file has one duty and at most {FILE_LINES} lines without its tests"),
        &breaches,
    );
}

#[test]
fn functions_are_short() {
    let mut breaches = Vec::new();
    for file in files().iter().filter(|file| file.is_product()) {
        for (name, line, lines) in functions(&code_only(&file.without_tests())) {
            if lines > FUNCTION_LINES {
                breaches.push(format!("{}:{line}: {name} has {lines} lines", file.path));
            }
        }
    }
    none(&format!("a function has at most {FUNCTION_LINES} lines"), &breaches);
}

#[test]
fn every_file_names_its_licence() {
    let breaches: Vec<String> = files()
        .iter()
        .filter(|file| file.is_rust() || file.is_script() || file.is_toml())
        .filter(|file| {
            let skip = usize::from(file.text.starts_with("#!"));
            !file.text.lines().nth(skip).is_some_and(|line| line.ends_with(SPDX))
        })
        .map(|file| file.path.clone())
        .collect();
    none("the first line (after a #! line) is the licence", &breaches);
}

/// A file of tests that no module names compiles nowhere, and nobody misses it.
#[test]
fn every_file_of_tests_is_run() {
    let files = files();
    let orphans: Vec<String> = files
        .iter()
        .filter(|file| file.path.ends_with("_tests.rs"))
        .filter(|file| {
            let name = file.path.rsplit('/').next().unwrap_or_default();
            let module = name.trim_end_matches(".rs");
            let named = [format!("\"{name}\"]"), format!("/{name}\"]"), format!("mod {module};")];
            !files.iter().any(|other| named.iter().any(|text| other.text.contains(text.as_str())))
        })
        .map(|file| file.path.clone())
        .collect();
    none("no module includes this file of tests", &orphans);
}

#[test]
fn unsafe_stays_at_home() {
    let mut breaches = Vec::new();
    for file in files().iter().filter(|file| file.is_rust()) {
        if UNSAFE_HOMES.iter().any(|home| file.path.starts_with(home)) {
            continue;
        }
        let code = code_only(&file.text);
        for at in word_offsets(&code, "unsafe") {
            breaches.push(format!("{}:{}", file.path, line_of(&code, at)));
        }
    }
    none(&format!("unsafe stands only under {UNSAFE_HOMES:?}"), &breaches);
}

#[test]
fn the_core_is_pure() {
    let mut breaches = Vec::new();
    for file in files().iter().filter(|file| file.is_rust() && file.path.starts_with("src/engine/"))
    {
        let code = code_only(&file.text);
        for module in
            std_modules(&code).iter().filter(|module| IMPURE_STD.contains(&module.as_str()))
        {
            breaches.push(format!("{}: std::{module}", file.path));
        }
        for name in IMPURE_NAMES {
            breaches.extend(
                word_offsets(&code, name)
                    .map(|at| format!("{}:{}: {name}", file.path, line_of(&code, at))),
            );
        }
    }
    none("src/engine has no I/O, clock, thread or unsafe", &breaches);
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, or this file would be a breach.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("unimple", "mented!"),
    ];
    let mut breaches = Vec::new();
    for file in files() {
        for mark in marks {
            let lines = file
                .text
                .lines()
                .enumerate()
                .filter(|(_, line)| word_offsets(line, mark).next().is_some());
            breaches.extend(lines.map(|(at, _)| format!("{}:{}: {mark}", file.path, at + 1)));
        }
    }
    none("what is not done is not hinted at", &breaches);
}

#[test]
fn scripts_name_no_hosts() {
    let mut breaches = Vec::new();
    for file in files().iter().filter(|file| file.is_script() || file.is_toml()) {
        let lines = file
            .text
            .lines()
            .enumerate()
            .filter(|(_, line)| line.contains("http://") || line.contains("https://"));
        breaches
            .extend(lines.map(|(at, line)| format!("{}:{}: {}", file.path, at + 1, line.trim())));
    }
    none("mirrors and registries are the machine's own, never named here", &breaches);
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut breaches = Vec::new();
    for file in files().iter().filter(|file| file.path.ends_with(".md")) {
        let here = root.join(&file.path);
        let targets =
            file.text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        for target in targets.filter(|target| !target.is_empty() && !target.contains("://")) {
            if !here.parent().is_some_and(|directory| directory.join(target).exists()) {
                breaches.push(format!("{}: {target}", file.path));
            }
        }
    }
    none("a page links only to what is there", &breaches);
}

#[test]
fn the_scanner_sees_code_only() {
    let source = "fn a<'l>(x: &'l str) -> char { /* } /* } */ */ let _ = \"}\\\"\"; // }\n    '}'\n}\n\
                  fn b(x: [u8; 2]);\nlet r = br#\"fn c() { unsafe \"#; let q = '\\'';\nuse std::{fmt, fs::{self, File}};\n";
    let code = code_only(source);
    assert_eq!(code.lines().count(), source.lines().count());
    assert_eq!(functions(&code), [("a".to_owned(), 1, 3)]);
    assert_eq!(word_offsets(&code, "unsafe").count(), 0);
    assert_eq!(std_modules(&code), ["fmt", "fs"]);
    assert_eq!(line_of(&code, code.find("let q").unwrap_or(0)), 5);
}
