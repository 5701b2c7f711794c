//! The command line: one file per subcommand (owner: CLI helper).

/// Runs the program and returns its exit code.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
