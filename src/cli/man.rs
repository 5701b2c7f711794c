//! `conbd gen-man DIR` (hidden): writes the man pages, from clap's definitions and from `config/conbd.toml`.
//!
//! So an option or key that exists is in its page, with the same words as in `--help`. What is in `man/` is
//! compared with this by a test.

use super::{EXIT_OK, Failure, definition};
use clap::Args;
use std::fmt::Write as _;
use std::path::PathBuf;

/// The documented example; every key with its default.
const EXAMPLE: &str = include_str!("../../config/conbd.toml");

/// Write the man pages to a folder
#[derive(Debug, Args)]
pub(crate) struct GenManArgs {
    /// The folder; it must exist
    dir: PathBuf,
}

pub(crate) fn run(args: &GenManArgs) -> Result<u8, Failure> {
    for (name, text) in [("conbd.1", conbd_1()), ("conbd.toml.5", conbd_toml_5())] {
        let path = args.dir.join(name);
        std::fs::write(&path, text)
            .map_err(|e| Failure::failed(format!("cannot write {}: {e}", path.display())))?;
    }
    Ok(EXIT_OK)
}

/// Text as roff wants it: escapes, and no line that begins like a request.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (i, line) in text.lines().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if line.starts_with(['.', '\'']) {
            out.push_str("\\&");
        }
        out.push_str(&line.replace('\\', "\\e").replace('-', "\\-"));
    }
    out
}

fn header(page: &str, section: u8, what: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        ".\\\" Written by `make man`; change src/cli or config/conbd.toml instead.\n\
         .TH {page} {section} \"\" \"conbd {version}\" \"conbd\"\n.SH NAME\n{}\n",
        escape(what)
    )
}

fn option_name(arg: &clap::Arg) -> String {
    let value = || {
        let names =
            arg.get_value_names().map(|n| n.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
        names.unwrap_or_else(|| arg.get_id().to_string().to_uppercase())
    };
    if arg.is_positional() {
        return format!("\\fI{}\\fR", escape(&value()));
    }
    let mut names = Vec::new();
    if let Some(short) = arg.get_short() {
        names.push(format!("\\fB\\-{short}\\fR"));
    }
    if let Some(long) = arg.get_long() {
        names.push(format!("\\fB\\-\\-{}\\fR", escape(long)));
    }
    let mut text = names.join(", ");
    if arg.get_action().takes_values() {
        let _ = write!(text, " \\fI{}\\fR", escape(&value()));
    }
    text
}

fn options(out: &mut String, command: &clap::Command) {
    for arg in command.get_arguments().filter(|a| !a.is_hide_set()) {
        let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(out, ".TP\n{}\n{}", option_name(arg), escape(&help));
        let defaults: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
        if !defaults.is_empty() && arg.get_action().takes_values() {
            let _ = writeln!(out, "[default: {}]", escape(&defaults.join(" ")));
        }
        let values: Vec<_> = arg.get_possible_values();
        if arg.get_action().takes_values() && !values.is_empty() {
            for value in values {
                let help = value.get_help().map(ToString::to_string).unwrap_or_default();
                let _ = writeln!(out, ".br\n\\fB{}\\fR: {}", escape(value.get_name()), escape(&help));
            }
        }
    }
}

/// The options of `qemu-nbd`, which are no clap options.
fn qemu_options(out: &mut String) {
    for opt in super::qemu_nbd::OPTIONS {
        let short = opt.short.map_or(String::new(), |c| format!("\\fB\\-{c}\\fR, "));
        let value = opt.value.map_or(String::new(), |value| format!("=\\fI{}\\fR", escape(value)));
        let _ = writeln!(out, ".TP\n{short}\\fB\\-\\-{}\\fR{value}\n{}", escape(opt.long), escape(opt.help));
    }
}

fn conbd_1() -> String {
    let mut command = definition();
    command.build();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut out = header("CONBD", 1, "conbd - network block device server");
    out.push_str(".SH SYNOPSIS\n");
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set() && s.get_name() != "help") {
        let positional: Vec<_> = sub
            .get_positionals()
            .map(|a| if a.is_required_set() { option_name(a) } else { format!("[{}]", option_name(a)) })
            .collect();
        let _ =
            writeln!(out, "\\fBconbd {}\\fR [options] {}\n.br", escape(sub.get_name()), positional.join(" "));
    }
    let _ = writeln!(out, ".SH DESCRIPTION\n{}", escape(&about));
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set() && s.get_name() != "help") {
        let _ = writeln!(out, ".SH CONBD {}", escape(&sub.get_name().to_uppercase()));
        let about = sub.get_long_about().or(sub.get_about()).map(ToString::to_string).unwrap_or_default();
        for paragraph in about.split("\n\n") {
            let _ = writeln!(out, "{}\n.PP", escape(paragraph));
        }
        match sub.get_name() {
            "qemu-nbd" => qemu_options(&mut out),
            _ => options(&mut out, sub),
        }
        if let Some(after) = sub.get_after_long_help().or(sub.get_after_help()) {
            let _ = writeln!(out, ".PP\n.nf\n{}\n.fi", escape(&after.to_string()));
        }
    }
    if let Some(after) = command.get_after_help() {
        let _ = writeln!(out, ".SH EXIT STATUS\n{}", escape(&after.to_string()));
    }
    out.push_str(
        ".SH ENVIRONMENT\n.TP\n\\fBCONBD_LOG\\fR\nLog level or filter; wins over \\fB\\-\\-log\\-level\\fR and the \
         configuration file.\n.TP\n\\fBNO_COLOR\\fR\nIf set, no colours on a terminal.\n\
         .SH SEE ALSO\n\\fBconbd.toml\\fR(5), \\fBqemu\\-nbd\\fR(8), \\fBnbdinfo\\fR(1), \\fBnbdcopy\\fR(1), \\fBnbd\\-client\\fR(8)\n",
    );
    out
}

fn conbd_toml_5() -> String {
    let mut out = header("CONBD.TOML", 5, "conbd.toml - configuration of conbd serve");
    out.push_str(".SH DESCRIPTION\n");
    let mut comment = String::new();
    for line in EXAMPLE.lines() {
        let is_comment = line.starts_with("# ") || line == "#";
        if is_comment {
            let text = line.trim_start_matches('#').trim_start();
            let _ = writeln!(comment, "{text}");
        } else if line.is_empty() {
            // A blank line ends the file's own introduction; later ones follow a key.
            out.push_str(&escape(&comment));
            if !comment.is_empty() {
                out.push('\n');
            }
            comment.clear();
        } else if line.starts_with('[') {
            let introduction = std::mem::take(&mut comment);
            let _ = writeln!(out, ".SH {}\n{}", escape(line), escape(introduction.trim_end()));
        } else {
            let key = line.trim_start_matches('#');
            let _ = writeln!(out, ".TP\n\\fB{}\\fR\n{}", escape(key), escape(comment.trim_end()));
            comment.clear();
        }
    }
    out.push_str(".SH SEE ALSO\n\\fBconbd\\fR(1)\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_of_every_command_is_in_the_page() {
        let page = conbd_1();
        let mut command = definition();
        command.build();
        for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
            for arg in sub.get_arguments() {
                if let Some(long) = arg.get_long() {
                    assert!(page.contains(&format!("\\-\\-{}", escape(long))), "{} --{long}", sub.get_name());
                }
            }
        }
    }

    #[test]
    fn no_line_of_text_begins_like_a_request() {
        assert_eq!(escape(".TH\n'x\na-b\\c"), "\\&.TH\n\\&'x\na\\-b\\ec");
    }

    #[test]
    fn the_pages_in_the_repository_are_current() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("man");
        for (name, text) in [("conbd.1", conbd_1()), ("conbd.toml.5", conbd_toml_5())] {
            let stored = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
            assert!(stored == text, "man/{name} is out of date; run: make man");
        }
    }
}
