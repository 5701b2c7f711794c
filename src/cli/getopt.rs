//! A command line as getopt_long(3) reads it: what scripts that were written for C programs rely on.
//!
//! Clusters (`-tv`), values in place (`-e4`, `--shared=4`) or behind (`-e 4`, `--shared 4`), also empty ones; options behind
//! operands; `--` ends options; unambiguous beginnings of long names. Errors are worded as glibc words them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// An option that the program knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opt {
    /// Its letter.
    pub(super) short: Option<char>,
    /// Its name; identifies it.
    pub(super) long: &'static str,
    /// What its value is called; None when it takes none.
    pub(super) value: Option<&'static str>,
    /// What it does, for help and manual.
    pub(super) help: &'static str,
}

/// A piece of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// An option, by its long name, and its value.
    Option(&'static str, Option<OsString>),
    /// Anything else.
    Operand(OsString),
}

/// Reads `args` (without the program's name), in their order: what was read, and what was wrong behind it, as glibc would
/// print it after the program's name. So `--help` works in front of an error.
pub(super) fn parse(table: &'static [Opt], args: &[OsString]) -> (Vec<Item>, Option<String>) {
    let mut items = Vec::new();
    let wrong = parse_into(table, args, &mut items).err();
    (items, wrong)
}

fn parse_into(table: &'static [Opt], args: &[OsString], items: &mut Vec<Item>) -> Result<(), String> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            items.extend(args.by_ref().map(|rest| Item::Operand(rest.clone())));
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            items.push(long_option(table, long, &mut args)?);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            cluster(table, &bytes[1..], &mut args, items)?;
        } else {
            items.push(Item::Operand(arg.clone()));
        }
    }
    Ok(())
}

fn shown(bytes: &[u8]) -> String {
    OsStr::from_bytes(bytes).to_string_lossy().into_owned()
}

fn long_option(
    table: &'static [Opt],
    text: &[u8],
    rest: &mut std::slice::Iter<'_, OsString>,
) -> Result<Item, String> {
    let (name, value) = match text.iter().position(|b| *b == b'=') {
        Some(at) => (&text[..at], Some(OsString::from_vec(text[at + 1..].to_vec()))),
        None => (text, None),
    };
    let begins = |opt: &&Opt| opt.long.as_bytes().starts_with(name);
    let exact = table.iter().find(|opt| opt.long.as_bytes() == name);
    let opt = match exact {
        Some(opt) => opt,
        None => {
            let mut candidates = table.iter().filter(begins);
            match (candidates.next(), candidates.next()) {
                (Some(only), None) => only,
                (None, _) => return Err(format!("unrecognized option '--{}'", shown(name))),
                (Some(_), Some(_)) => {
                    let all: Vec<String> =
                        table.iter().filter(begins).map(|opt| format!(" '--{}'", opt.long)).collect();
                    return Err(format!(
                        "option '--{}' is ambiguous; possibilities:{}",
                        shown(text),
                        all.concat()
                    ));
                }
            }
        }
    };
    let value = match (opt.value, value) {
        (None, Some(_)) => return Err(format!("option '--{}' doesn't allow an argument", opt.long)),
        (None, None) => None,
        (Some(_), Some(value)) => Some(value),
        (Some(_), None) => match rest.next() {
            Some(value) => Some(value.clone()),
            None => return Err(format!("option '--{}' requires an argument", opt.long)),
        },
    };
    Ok(Item::Option(opt.long, value))
}

fn cluster(
    table: &'static [Opt],
    letters: &[u8],
    rest: &mut std::slice::Iter<'_, OsString>,
    items: &mut Vec<Item>,
) -> Result<(), String> {
    for (at, letter) in letters.iter().enumerate() {
        let letter = char::from(*letter);
        let Some(opt) = table.iter().find(|opt| opt.short == Some(letter)) else {
            return Err(format!("invalid option -- '{letter}'"));
        };
        if opt.value.is_none() {
            items.push(Item::Option(opt.long, None));
            continue;
        }
        let value = match &letters[at + 1..] {
            [] => match rest.next() {
                Some(value) => value.clone(),
                None => return Err(format!("option requires an argument -- '{letter}'")),
            },
            behind => OsString::from_vec(behind.to_vec()),
        };
        items.push(Item::Option(opt.long, Some(value)));
        break;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Opt] = &[
        Opt { short: Some('e'), long: "shared", value: Some("NUM"), help: "" },
        Opt { short: Some('s'), long: "snapshot", value: None, help: "" },
        Opt { short: Some('t'), long: "persistent", value: None, help: "" },
        Opt { short: Some('x'), long: "export-name", value: Some("NAME"), help: "" },
        Opt { short: None, long: "fork", value: None, help: "" },
        Opt { short: None, long: "image", value: None, help: "" },
        Opt { short: None, long: "image-opts", value: None, help: "" },
    ];

    fn read(args: &[&str]) -> Result<String, String> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let (items, wrong) = parse(TABLE, &args);
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let show = |item: &Item| match item {
            Item::Option(name, None) => format!("{name};"),
            Item::Option(name, Some(value)) => format!("{name}={};", value.display()),
            Item::Operand(text) => format!("[{}]", text.display()),
        };
        Ok(items.iter().map(show).collect())
    }

    #[test]
    fn every_way_to_write_an_option_is_read() {
        let check = |args: &[&str], want: &str| assert_eq!(read(args).as_deref(), Ok(want), "{args:?}");
        check(&["-ts", "disk"], "persistent;snapshot;[disk]");
        check(&["-te4", "disk"], "persistent;shared=4;[disk]");
        check(&["-te", "4", "disk"], "persistent;shared=4;[disk]");
        check(&["--shared=4", "--shared", "5"], "shared=4;shared=5;");
        check(&["disk", "-x", "", "-t"], "[disk]export-name=;persistent;");
        check(&["--export-name=", "--export-name=a=b"], "export-name=;export-name=a=b;");
        check(&["--exp=x", "--per", "--fo"], "export-name=x;persistent;fork;");
        check(&["--image", "--image-o"], "image;image-opts;");
        check(&["-x", "-t", "-t"], "export-name=-t;persistent;");
        check(&["-t", "--", "-t", "--fork"], "persistent;[-t][--fork]");
        check(&["-", ""], "[-][]");
        check(&[], "");
    }

    #[test]
    fn errors_are_glibcs() {
        let check = |args: &[&str], want: &str| assert_eq!(read(args), Err(want.to_owned()), "{args:?}");
        check(&["--bogus=1"], "unrecognized option '--bogus'");
        check(&["-Z"], "invalid option -- 'Z'");
        check(&["-tZ"], "invalid option -- 'Z'");
        check(&["--shared"], "option '--shared' requires an argument");
        check(&["--shar"], "option '--shared' requires an argument");
        check(&["-te"], "option requires an argument -- 'e'");
        check(&["--fork=3"], "option '--fork' doesn't allow an argument");
        check(&["--s=3"], "option '--s=3' is ambiguous; possibilities: '--shared' '--snapshot'");
    }
}
