//! The `conbd` program: parses the command line and maps errors to exit codes.

fn main() -> std::process::ExitCode {
    conbd::cli::main()
}
