use std::process::ExitCode;

fn main() -> ExitCode {
    cartouche::cli::main()
}
