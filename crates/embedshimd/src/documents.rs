//! `embedshimd documents`: man pages and shell completions, made from the command line's
//! definition. For packages; hidden from operators. Owns the layout below `/usr/share`.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::{Cli, Documents, EXIT_CODES};
use crate::outcome::{Code, Failure};

const PROGRAM: &str = "embedshimd";
/// The section of man pages for system administration.
const SECTION: &str = "8";

/// Where each shell looks for completions, and under which name.
const COMPLETIONS: [(Shell, &str, &str); 3] = [
    (Shell::Bash, "bash-completion/completions", PROGRAM),
    (Shell::Fish, "fish/vendor_completions.d", "embedshimd.fish"),
    (Shell::Zsh, "zsh/vendor-completions", "_embedshimd"),
];

/// The files of an installation that an operator may look for.
const FILES: [(&str, &str); 4] = [
    ("/etc/embedshim/config.toml", "configuration; optional"),
    (
        "/run/embedshim",
        "state directory: sockets, locks, task records",
    ),
    (
        "/run/embedshim/embedshimd.log",
        "log of a daemon that systemd has not started",
    ),
    (
        "/usr/share/doc/embedshim/operating.md",
        "how to operate, upgrade and repair",
    ),
];

/// Writes all documents into the directory.
pub(crate) fn run(options: &Documents) -> Result<Code, Failure> {
    let directory = &options.directory;
    write_pages(&directory.join("man/man8"))
        .and_then(|()| write_completions(directory))
        .with_context(|| format!("cannot write into {}", directory.display()))?;
    Ok(Code::Ok)
}

/// Writes a page for the program and one for each command.
fn write_pages(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut program = visible(&Cli::command()).disable_help_subcommand(true);
    program.build();
    let commands = program.get_subcommands();
    for command in [&program].into_iter().chain(commands) {
        let name = page_name(command);
        fs::write(
            directory.join(format!("{name}.{SECTION}")),
            render(command)?,
        )?;
    }
    Ok(())
}

fn write_completions(directory: &Path) -> io::Result<()> {
    for (shell, below, name) in COMPLETIONS {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut visible(&Cli::command()), PROGRAM, &mut text);
        let directory = directory.join(below);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(name), text)?;
    }
    Ok(())
}

/// A copy without hidden commands and options: `clap_complete` offers those, too.
fn visible(command: &Command) -> Command {
    let options = command
        .get_arguments()
        .filter(|option| !option.is_hide_set());
    let commands = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut copy = Command::new(command.get_name().to_owned())
        .args(options.cloned())
        .subcommands(commands.map(visible))
        .subcommand_required(command.is_subcommand_required_set());
    if let Some(about) = command.get_about() {
        copy = copy.about(about.clone());
    }
    if let Some(about) = command.get_long_about() {
        copy = copy.long_about(about.clone());
    }
    if let Some(version) = command.get_version() {
        copy = copy.version(version.to_owned());
    }
    copy
}

/// The name of the page of a command that is built, such as `embedshimd-serve`.
fn page_name(command: &Command) -> &str {
    command.get_display_name().unwrap_or(command.get_name())
}

/// The man page of a command, with the sections that `clap_mangen` does not know.
fn render(command: &Command) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone())
        .section(SECTION)
        .source(concat!("embedshim ", env!("CARGO_PKG_VERSION")))
        .manual("embedshim");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let codes = EXIT_CODES.lines().skip(1);
    let codes = codes.filter_map(|line| line.trim().split_once("  "));
    write_list(&mut page, "EXIT STATUS", codes)?;
    write_list(&mut page, "FILES", FILES.into_iter())?;
    Ok(page)
}

/// Writes a section with a tagged paragraph for each entry.
fn write_list<'a>(
    page: &mut impl Write,
    title: &str,
    entries: impl Iterator<Item = (&'a str, &'a str)>,
) -> io::Result<()> {
    writeln!(page, ".SH \"{title}\"")?;
    for (tag, text) in entries {
        writeln!(page, ".TP\n\\fB{tag}\\fR\n{text}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let options = Documents {
            directory: directory.path().to_owned(),
        };
        assert_eq!(run(&options).unwrap(), Code::Ok);
        directory
    }

    #[test]
    fn each_command_of_the_help_has_a_page_with_exit_codes() {
        let directory = written();
        let mut pages: Vec<String> = fs::read_dir(directory.path().join("man/man8"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        pages.sort();
        assert_eq!(
            pages,
            [
                "embedshimd-config.8",
                "embedshimd-events.8",
                "embedshimd-inspect.8",
                "embedshimd-keep.8",
                "embedshimd-metrics.8",
                "embedshimd-pins.8",
                "embedshimd-probe.8",
                "embedshimd-ps.8",
                "embedshimd-report.8",
                "embedshimd-serve.8",
                "embedshimd-status.8",
                "embedshimd-upgrade.8",
                "embedshimd-watch.8",
                "embedshimd.8"
            ]
        );
        for page in pages {
            let text = fs::read_to_string(directory.path().join("man/man8").join(&page)).unwrap();
            assert!(text.contains(".SH NAME\n"), "{page}: {text}");
            assert!(
                text.contains(".TP\n\\fB7\\fR\nprobe: it would run"),
                "{page}: {text}"
            );
            assert!(!text.contains("understands"), "{page}: {text}");
        }
    }

    #[test]
    fn completions_offer_what_the_help_shows_and_nothing_else() {
        let directory = written();
        for (_, below, name) in COMPLETIONS {
            let text = fs::read_to_string(directory.path().join(below).join(name)).unwrap();
            assert!(text.contains("state-dir"), "{name}: {text}");
            for hidden in ["documents", "understands", "keeper-watchdog"] {
                assert!(!text.contains(hidden), "{name} has {hidden}: {text}");
            }
        }
    }
}
