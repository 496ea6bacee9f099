//! docs/benchmarks.md, made of a report: what was measured, on what, the tables and the plots.

use std::fmt::Write;
use std::fs;

use testbed::products::workspace;

use super::plots::{Plot, Scale};
use super::{Report, table};

/// Where the plots are, below docs.
const PLOTS: &str = "plots";

/// A part of the page.
struct Section {
    title: &'static str,
    text: &'static str,
    /// What the names of its figures begin with.
    figures: &'static [&'static str],
    plots: &'static [Plot],
}

const SECTIONS: [Section; 9] = [
    Section {
        title: "A container's life",
        text: "Create, Start, an exec of `true` (Exec, Start, Wait, Delete), Kill, from its answer to \
               that of Wait, Delete; before it containerd's launcher and a connection, after it Shutdown and \
               the launcher again. The floor is the same calls of runc without any shim, with \
               `kill(2)` and a pidfd in place of Kill and Wait; the launchers' floor is a static \
               `true`. Containers run a static `sleep`, without streams.",
        figures: &["life", "launcher"],
        plots: &[Plot {
            file: "life",
            figure: "life",
            title: "A container's life with one exec, of the floor's: median and its interval",
            across: None,
            scale: Scale::Ratio,
        }],
    },
    Section {
        title: "What a life costs",
        text: "Counted in the kernel, by tracepoints: system calls, context switches (all, and those \
               that the process asked for by waiting), time on a processor. `shim` is our daemon with \
               its keeper, or the shims of others; `launcher` what containerd executes; `runtime` is \
               runc with its children. Means of ten lives.",
        figures: &["counts"],
        plots: &[Plot {
            file: "calls",
            figure: "counts/calls/shim and launcher",
            title: "System calls of shim and launcher in a life",
            across: None,
            scale: Scale::Linear,
        }],
    },
    Section {
        title: "Many lives at once",
        text: "Lives per second (without an exec), 1 to 32 at once, and how long a State of another \
               container of the same shim takes meanwhile; `state` is that of an idle shim.",
        figures: &["rate", "state"],
        plots: &[
            Plot {
                file: "rate",
                figure: "rate",
                title: "Lives per second, of the floor's: more is better",
                across: Some("lives at once"),
                scale: Scale::Ratio,
            },
            Plot {
                file: "state",
                figure: "state beside lives",
                title: "State of another container meanwhile: median",
                across: Some("lives at once"),
                scale: Scale::Logarithmic,
            },
        ],
    },
    Section {
        title: "Exits at once",
        text: "The containers are killed by `kill(2)`, all in one loop; a Wait for each is on its way, \
               each on a connection of its own. From the first kill to each answer, and to the last.",
        figures: &["exits", "exit that"],
        plots: &[],
    },
    Section {
        title: "Memory",
        text: "Anonymous memory of daemon and keeper, or of all shims together, with so many idle \
               containers; and ten seconds after they were deleted.",
        figures: &["memory"],
        plots: &[Plot {
            file: "memory",
            figure: "memory",
            title: "Anonymous memory with so many idle containers",
            across: Some("containers"),
            scale: Scale::Linear,
        }],
    },
    Section {
        title: "A killed daemon",
        text: "From `kill -9` of the daemon to the first answer to State, and to the last of one on \
               each connection. The containers of other shims are destroyed then.",
        figures: &["killed"],
        plots: &[],
    },
    Section {
        title: "Output",
        text: "`dd` in a container writes zeros to a fifo, a log file (`file://`) or a terminal. The \
               floor is the same program without container and shim; that bounds what a shim can do \
               with a terminal, but no fifo, since a shim's can hold more.",
        figures: &["output"],
        plots: &[],
    },
    Section {
        title: "Growth",
        text: "With thousands of idle containers, each one small process of a runtime of the tests; \
               the life beside them is runc's. And lives on a machine with many mounts.",
        figures: &["growth", "mounts"],
        plots: &[
            Plot {
                file: "growth-memory",
                figure: "growth/memory",
                title: "Anonymous memory of daemon and keeper",
                across: Some("containers"),
                scale: Scale::Linear,
            },
            Plot {
                file: "growth-life",
                figure: "growth/life",
                title: "A life beside idle containers, of the floor's",
                across: Some("containers"),
                scale: Scale::Ratio,
            },
            Plot {
                file: "mounts",
                figure: "mounts/life",
                title: "A life on a machine with many mounts, of the floor's",
                across: Some("mounts"),
                scale: Scale::Ratio,
            },
        ],
    },
    Section {
        title: "Through containerd",
        text: "`ctr run --rm ... true`, by each containerd with our shim and with its own in turn. ctr \
               and containerd are in the times of both.",
        figures: &["ctr run"],
        plots: &[],
    },
];

/// Writes the page and its plots.
pub(crate) fn write(report: &Report) -> anyhow::Result<()> {
    let docs = workspace().join("docs");
    fs::create_dir_all(docs.join(PLOTS))?;
    for plot in SECTIONS.iter().flat_map(|section| section.plots) {
        if let Some(svg) = plot.draw(report)? {
            fs::write(docs.join(PLOTS).join(format!("{}.svg", plot.file)), svg)?;
        }
    }
    fs::write(docs.join("benchmarks.md"), compose(report))?;
    println!("docs/benchmarks.md and its plots are written");
    Ok(())
}

fn compose(report: &Report) -> String {
    let mut text = String::from("# Benchmarks\n\n");
    text.push_str(INTRODUCTION);
    let _ = writeln!(text, "\nThis run: {}.\n", report.machine.sentence());
    text.push_str("| subject | what it is |\n| --- | --- |\n");
    for info in &report.subjects {
        let skipped = info.skipped.as_ref();
        let skipped = skipped.map_or_else(String::new, |why| format!("; not measured: {why}"));
        let row = format!("| {} | {}{skipped} |", info.name, info.what);
        let _ = writeln!(text, "{}", row.replace('\n', " "));
    }
    for section in &SECTIONS {
        let has = |name: &str| {
            section
                .figures
                .iter()
                .any(|prefix| name.starts_with(prefix))
        };
        if !report.figures.iter().any(|figure| has(&figure.name)) {
            continue;
        }
        let _ = write!(text, "\n## {}\n\n{}\n\n", section.title, wrap(section.text));
        for plot in section.plots {
            if report
                .figures
                .iter()
                .any(|figure| figure.name == plot.figure)
            {
                let _ = writeln!(text, "![{}]({PLOTS}/{}.svg)\n", plot.title, plot.file);
            }
        }
        text.push_str(&table::overview(report, section.figures));
    }
    text.push_str("\n## All figures with their spread\n\n");
    text.push_str(&table::details(report, &[]));
    text
}

const INTRODUCTION: &str = "\
Written by `cargo xtask bench --page`; do not edit. The subjects take turns in one run, so that what
slows the machine down for a while slows down all; read the ratios to the floor, in parentheses,
which are medians of the quotients of each round. The interval of a median is where it is with 95 %
probability, whatever the distribution. All subjects share one cgroup's part of the processors.

Counts hardly depend on the machine's load. Times do, and on a machine as busy as the load below
says, ratios do as well: who waits for another process more often, waits for more turns.
";

/// Lines of 100 columns.
fn wrap(text: &str) -> String {
    let mut wrapped = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > 100 {
            wrapped.push('\n');
            column = 0;
        } else if column > 0 {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += width;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn the_page_says_where_and_what() {
        insta::assert_snapshot!(compose(&example()));
    }
}
