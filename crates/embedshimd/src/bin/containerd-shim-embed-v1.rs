//! The launcher that containerd executes for every container. `shim_api::bootstrap` does its work.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim_api::bootstrap::run(std::env::args_os().skip(1))
}
