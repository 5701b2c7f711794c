//! `conbd check IMAGE`: checks a qcow2 image that nobody uses, and repairs it; exit codes as `qemu-img check`.

use super::{Failure, run_coroutine, with_sources, write_out};
use crate::block::qcow2::FormatError;
use crate::block::qcow2::check::{CheckError, CheckReport, Repair, co_check};
use crate::block::{FileNode, FileOptions};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Exit code for an image of a format without checks; the same as `qemu-img check`.
const EXIT_NO_CHECKS: u8 = 63;

/// What is repaired.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RepairArg {
    /// clusters that nothing uses are freed
    Leaks,
    /// everything that can be
    All,
}

/// Check a qcow2 image for wrong reference counts, leaks and broken tables, and repair it
///
/// The image is locked; nobody else may write it. Without --repair it is not changed. Repairing is safe against a crash
/// of the host at any moment.
///
/// Exits with 0 when all is right (or was repaired), 1 when it could not be checked, 2 when it is corrupt, 3 when it only
/// has leaks, 63 when it is not qcow2: as qemu-img check does.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  conbd check disk.qcow2\n  conbd check disk.qcow2 --repair all --json")]
pub(crate) struct CheckArgs {
    /// The image
    image: PathBuf,

    /// Repair it
    #[arg(long, short = 'r', value_enum, value_name = "WHAT")]
    repair: Option<RepairArg>,

    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &CheckArgs) -> Result<u8, Failure> {
    let repair = match args.repair {
        None => Repair::Nothing,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    let options =
        FileOptions { read_only: repair == Repair::Nothing, growable: true, ..FileOptions::new(&args.image) };
    let file = FileNode::open(&options).map_err(|e| Failure::failed(with_sources(&e)))?;
    let report = run_coroutine(move || co_check(&file, repair))
        .map_err(|e| Failure::failed(format!("cannot start an event loop: {e}")))?
        .map_err(|e| match e {
            CheckError::Format(FormatError::NotQcow2) => Failure {
                code: EXIT_NO_CHECKS,
                message: format!(
                    "image {:?} is not qcow2: only qcow2 images have something to check (a raw one is all data)",
                    args.image
                ),
            },
            e => Failure::failed(format!("image {:?}: {e}", args.image)),
        })?;
    let text = if args.json { as_json(args, &report) } else { as_text(&report) };
    write_out(&text)?;
    Ok(report.exit_code())
}

fn as_json(args: &CheckArgs, r: &CheckReport) -> String {
    let value = json!({
        "filename": args.image.to_string_lossy(),
        "format": "qcow2",
        "check-errors": r.check_errors,
        "corruptions": r.corruptions,
        "leaks": r.leaks,
        "corruptions-fixed": r.corruptions_fixed,
        "leaks-fixed": r.leaks_fixed,
        "image-end-offset": r.image_end_offset,
        "total-clusters": r.total_clusters,
        "allocated-clusters": r.allocated_clusters,
        "compressed-clusters": r.compressed_clusters,
        "problems": r.problems,
    });
    format!("{value:#}\n")
}

fn as_text(r: &CheckReport) -> String {
    let mut out = String::new();
    for problem in &r.problems {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{problem}");
    }
    if r.corruptions_fixed + r.leaks_fixed > 0 {
        let _ = writeln!(
            out,
            "repaired: {} corruptions, {} leaked clusters (listed above)",
            r.corruptions_fixed, r.leaks_fixed
        );
    }
    let _ = match (r.corruptions, r.leaks) {
        (0, 0) => writeln!(out, "no errors are in the image"),
        (0, leaks) => {
            writeln!(
                out,
                "{leaks} clusters are leaked: space is wasted, no data is harmed; --repair leaks frees them"
            )
        }
        (n, leaks) => writeln!(
            out,
            "{n} corruptions and {leaks} leaked clusters: do not write to the image before --repair all"
        ),
    };
    let _ = writeln!(
        out,
        "{} of {} clusters are allocated, {} of them compressed; the image ends at byte {}",
        r.allocated_clusters, r.total_clusters, r.compressed_clusters, r.image_end_offset
    );
    out
}
