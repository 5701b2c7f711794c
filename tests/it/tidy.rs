//! The rules of the house, as a test: who may import whom, where foreign crates and `unsafe` may be named, and
//! that ARCHITECTURE.md describes the files that are there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The floors: module of the crate, and the modules it may name. `lib.rs` and `main.rs` are checked apart.
const FLOORS: &[(&str, &[&str])] = &[
    ("util", &[]),
    ("aio", &["util"]),
    ("co", &["aio", "util"]),
    ("block", &["co", "aio", "util"]),
    ("nbd", &["block", "co", "aio", "util"]),
    ("telemetry", &["util"]),
    ("config", &["nbd", "block", "co", "aio", "util"]),
    ("reload", &["config", "nbd", "block", "co", "aio", "util"]),
    ("daemon", &["reload", "config", "telemetry", "nbd", "block", "co", "aio", "util"]),
    ("cli", &["daemon", "config", "telemetry", "nbd", "block", "co", "aio", "util"]),
];

/// Foreign crates with one door: the crate, and the only paths (prefixes) below `src` that may name it.
const DOORS: &[(&str, &[&str])] = &[
    ("may", &["co/backend.rs"]),
    ("generator", &["co/backend.rs"]),
    ("mio", &["aio/"]),
    ("openssl", &["nbd/tls.rs", "nbd/channel.rs"]),
    ("io_uring", &["aio/engine/"]),
    ("clap", &["cli/", "config.rs"]),
    ("tracing_subscriber", &["telemetry.rs"]),
];

/// Files that do no I/O, read no clock and never yield: what is fuzzed.
const PURE: &[&str] = &[
    "nbd/access.rs",
    "nbd/proto.rs",
    "nbd/wire.rs",
    "nbd/handshake.rs",
    "nbd/option.rs",
    "nbd/request.rs",
    "block/qcow2/header.rs",
    "block/qcow2/entry.rs",
    "block/qcow2/snapshot.rs",
    "block/qcow2/bitmap.rs",
    "block/qcow2/inflate.rs",
    "block/qcow2/error.rs",
];

/// Path fragments that a pure file must not contain.
const IMPURE: &[&str] = &[
    "crate::aio",
    "crate::co",
    "crate::block::Blo",
    "std::net",
    "std::fs",
    "std::io::Read",
    "std::io::Write",
    "std::time",
    "std::thread",
    "std::os",
    "rustix::",
    "libc::read",
    "libc::write",
    "mio::",
    "co_read",
    "co_write",
    "co_yield",
];

/// Longest ARCHITECTURE.md, in lines: what is not read is not true for long.
const ARCHITECTURE_LINES: usize = 300;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Every Rust file below `dir`, by its path relative to `dir`.
fn sources(dir: &str) -> BTreeMap<String, String> {
    let base = root().join(dir);
    let mut files = Vec::new();
    rust_files(&base, &mut files);
    assert!(!files.is_empty(), "no sources below {dir}");
    files
        .into_iter()
        .map(|p| {
            let name = p.strip_prefix(&base).unwrap().to_str().unwrap().to_owned();
            let text = fs::read_to_string(&p).unwrap();
            (name, text)
        })
        .collect()
}

/// The text without comments and string literals, so that prose may name anything. Keeps the lines.
fn code(text: &str) -> String {
    #[derive(PartialEq)]
    enum In {
        Code,
        Line,
        Block(u32),
        Str,
        RawStr(usize),
    }
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut state = In::Code;
    let mut i = 0;
    while i < chars.len() {
        let c = chars[i];
        if c == '\n' {
            out.push('\n');
            if state == In::Line {
                state = In::Code;
            }
            i += 1;
            continue;
        }
        match &mut state {
            In::Code => match (c, at(i + 1)) {
                ('/', '/') => state = In::Line,
                ('/', '*') => {
                    state = In::Block(1);
                    i += 1;
                }
                ('"', _) => state = In::Str,
                ('r', '"' | '#') if !out.ends_with(|p: char| p.is_alphanumeric() || p == '_') => {
                    let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
                    if at(i + 1 + hashes) == '"' {
                        state = In::RawStr(hashes);
                        i += 1 + hashes;
                    } else {
                        out.push(c);
                    }
                }
                // A character literal, not a lifetime.
                ('\'', '\\') => i += (i + 2..).take_while(|&j| at(j) != '\'' || j == i + 2).count() + 2,
                ('\'', _) if at(i + 2) == '\'' => i += 2,
                _ => out.push(c),
            },
            In::Line => {}
            In::Block(depth) => match (c, at(i + 1)) {
                ('/', '*') => {
                    *depth += 1;
                    i += 1;
                }
                ('*', '/') => {
                    *depth -= 1;
                    i += 1;
                    if *depth == 0 {
                        state = In::Code;
                    }
                }
                _ => {}
            },
            In::Str => match c {
                '\\' if at(i + 1) != '\n' => i += 1,
                '"' => state = In::Code,
                _ => {}
            },
            In::RawStr(hashes) => {
                if c == '"' && (1..=*hashes).all(|k| at(i + k) == '#') {
                    i += *hashes;
                    state = In::Code;
                }
            }
        }
        i += 1;
    }
    out
}

fn is_ident(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `code` names the crate or module `name` as a path root (`name::` or `use name;`).
fn names_root(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].trim_end_matches(' ');
        let fresh = !code[..at].ends_with(is_ident);
        let rooted = !before.ends_with("::") || before.ends_with(" ::");
        let after = &code[at + name.len()..];
        let path = after.starts_with("::");
        let import = before.ends_with("use") && after.trim_start().starts_with([';', ' ']);
        fresh && rooted && (path || import)
    })
}

/// Modules of this crate that `code` names through `crate::`, also in a `use crate::{a, b::c}` group.
fn crate_modules(code: &str) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(is_ident) {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut item = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        out.insert(std::mem::take(&mut item));
                        continue;
                    }
                    _ => {}
                }
                item.push(c);
            }
            out.insert(item);
        } else {
            out.insert(rest.to_owned());
        }
    }
    out.into_iter().map(|s| s.trim_start().chars().take_while(|c| is_ident(*c)).collect()).collect()
}

/// The floor that a file below `src` belongs to.
fn floor(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn imports_go_down_only() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        if file == "lib.rs" || file == "main.rs" {
            continue;
        }
        let (_, allowed) = FLOORS.iter().find(|(name, _)| *name == floor(&file)).unwrap_or_else(|| {
            panic!("src/{file} belongs to no floor: add it to FLOORS and to ARCHITECTURE.md")
        });
        let code = code(&text);
        for used in crate_modules(&code) {
            if FLOORS.iter().any(|(n, _)| *n == used)
                && used != floor(&file)
                && !allowed.contains(&used.as_str())
            {
                wrong.push(format!("src/{file} imports crate::{used}"));
            }
        }
        // `super` must not climb out of the floor: that would hide an import from the check above.
        let depth = file.matches('/').count() + usize::from(!file.ends_with("mod.rs"));
        let climbs = "super::".repeat(depth + usize::from(code.contains("mod tests")));
        if code.contains(&climbs) && climbs.len() > "super::".len() * 2 {
            wrong.push(format!("src/{file} climbs out of its floor with {climbs}"));
        }
    }
    assert!(wrong.is_empty(), "imports that do not go down:\n{}", wrong.join("\n"));
}

#[test]
fn main_is_only_the_command_line() {
    let code = code(&fs::read_to_string(root().join("src/main.rs")).unwrap());
    for (floor, _) in FLOORS.iter().filter(|(f, _)| *f != "cli") {
        assert!(!code.contains(&format!("conbd::{floor}")), "main.rs uses {floor} past cli");
    }
}

#[test]
fn foreign_crates_have_one_door() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        let code = code(&text);
        for (name, doors) in DOORS {
            if names_root(&code, name) && !doors.iter().any(|d| file.starts_with(d)) {
                wrong.push(format!("src/{file} names {name}, whose door is {doors:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn pure_files_are_pure() {
    let files = sources("src");
    let mut wrong = Vec::new();
    for name in PURE {
        let text = files.get(*name).unwrap_or_else(|| panic!("src/{name} is gone: mend PURE"));
        let code = code(text);
        wrong
            .extend(IMPURE.iter().filter(|w| code.contains(**w)).map(|w| format!("src/{name} contains {w}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn architecture() -> String {
    fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()
}

/// Paths below `src` in backquotes, as `src/…` in a section (or in the whole document).
fn named_paths(text: &str) -> BTreeSet<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter(|p| p.starts_with("src/"))
        .map(|p| p.trim_end_matches('/').to_owned())
        .collect()
}

fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let marker = format!("## {heading}\n");
    let start = text.find(&marker).unwrap_or_else(|| panic!("ARCHITECTURE.md has no section \"{heading}\""));
    let body = &text[start + marker.len()..];
    &body[..body.find("\n## ").unwrap_or(body.len())]
}

#[test]
fn unsafe_lives_only_where_architecture_lists_it() {
    let text = architecture();
    let listed = named_paths(section(&text, "Unsafe code"));
    let found: BTreeSet<String> = sources("src")
        .into_iter()
        .filter(|(_, text)| {
            let code = code(text);
            code.match_indices("unsafe").any(|(at, _)| {
                let after = code[at + "unsafe".len()..].chars().next();
                !code[..at].ends_with(is_ident) && !after.is_some_and(is_ident)
            })
        })
        .map(|(file, _)| format!("src/{file}"))
        .collect();
    assert_eq!(
        found, listed,
        "left: files with unsafe code; right: the section \"Unsafe code\" of ARCHITECTURE.md"
    );
}

#[test]
fn the_code_map_names_every_source_file_and_nothing_else() {
    let text = architecture();
    assert!(
        text.lines().count() < ARCHITECTURE_LINES,
        "ARCHITECTURE.md is longer than {ARCHITECTURE_LINES} lines"
    );
    let missing: Vec<_> = named_paths(&text).into_iter().filter(|p| !root().join(p).exists()).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:?}");
    let map = section(&text, "Code map");
    let words: BTreeSet<&str> = map.split(|c: char| !(is_ident(c) || c == '.' || c == '/')).collect();
    let unnamed: Vec<_> = sources("src")
        .into_keys()
        .filter(|file| {
            let name = file.rsplit('/').next().unwrap();
            // A directory's mod.rs is named by its directory.
            let dir = file.strip_suffix("/mod.rs").map(|d| format!("{}/", d.rsplit('/').next().unwrap()));
            !words.contains(name)
                && !dir.is_some_and(|d| words.contains(d.as_str()) || words.contains(d.trim_end_matches('/')))
        })
        .collect();
    assert!(unnamed.is_empty(), "the code map of ARCHITECTURE.md does not name {unnamed:?}");
}

#[test]
fn every_file_says_what_it_is_and_nothing_is_left_undone() {
    let mut wrong = Vec::new();
    for dir in ["src", "tests", "benches"] {
        for (file, text) in sources(dir) {
            if !text.starts_with("//!") {
                wrong.push(format!("{dir}/{file} does not begin with //!"));
            }
            let code = code(&text);
            for word in ["todo!", "unimplemented!", "dbg!", "#[ignore"] {
                if code.contains(word) {
                    wrong.push(format!("{dir}/{file} contains {word}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The checks above stand on this reader of Rust text.
#[test]
fn the_reader_of_rust_text_is_not_fooled() {
    let text = "use crate::{aio::X, co}; // crate::nbd\n/* crate::cli /* nested */ crate::cli */ let s = \"crate::cli\";\n\
                let r = r#\"crate::cli \" \"#; let c = '\"'; crate::block::f::<'a>(); let q = '\\''; xcrate::cli";
    let modules = crate_modules(&code(text));
    assert_eq!(modules.into_iter().collect::<Vec<_>>(), ["aio", "block", "co"]);
    assert!(names_root("use may::x;", "may"));
    assert!(names_root("fn f() { may::go() }", "may"));
    assert!(!names_root("use crate::may::x; dismay::y(); may_be::z()", "may"));
}
