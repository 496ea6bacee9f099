//! The launcher that containerd executes for every container; what it does is `shim_api::bootstrap`.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim_api::bootstrap::run(std::env::args_os().skip(1))
}
