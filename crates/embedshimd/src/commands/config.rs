//! `embedshimd config`: whether a daemon would start with the configuration, and which values it
//! would have. Reads what a daemon reads; asks none.

use super::table::Table;
use super::words::{dash, visible};
use crate::cli;
use crate::config::origins::Setting;
use crate::config::{Config, effective};
use crate::outcome::{Code, Failure, print};

/// Checks, or shows.
pub(crate) fn run(options: &cli::Config) -> Result<Code, Failure> {
    let file = options.file.as_deref();
    match options.command {
        cli::ConfigCommand::Check => {
            Config::load(file)?;
            print("the configuration is valid")?;
        }
        cli::ConfigCommand::Show => print(&render(&effective(file)?))?,
    }
    Ok(Code::Ok)
}

/// The settings for people.
pub(super) fn render(settings: &[Setting]) -> String {
    let mut table = Table::new(["KEY", "VALUE", "FROM"]);
    for setting in settings {
        table.push([
            setting.key.clone(),
            setting.value.as_deref().map_or_else(dash, visible),
            visible(&setting.origin.to_string()),
        ]);
    }
    table.to_string()
}
