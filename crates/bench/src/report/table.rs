//! Reports as tables of Markdown, for terminals and documents.

use std::fmt::Write;

use super::{FLOOR, Figure, Report, Unit};

/// One row for each figure, one column for each subject: the median, and its ratio.
pub(crate) fn overview(report: &Report, prefixes: &[&str]) -> String {
    let wanted = select(report, prefixes);
    let mut subjects: Vec<&str> = Vec::new();
    for figure in &wanted {
        if !subjects.contains(&figure.subject.as_str()) {
            subjects.push(&figure.subject);
        }
    }
    // In the order of the report's own list.
    let place = |name: &str| report.subjects.iter().position(|info| info.name == name);
    subjects.sort_by_key(|name| place(name).unwrap_or(usize::MAX));
    let mut text = format!("| figure | {} |\n| --- |", subjects.join(" | "));
    text.push_str(&" --- |".repeat(subjects.len()));
    let mut rows: Vec<(&str, Option<u64>)> = Vec::new();
    for figure in &wanted {
        if !rows.contains(&(figure.name.as_str(), figure.at)) {
            rows.push((&figure.name, figure.at));
        }
    }
    for (name, at) in rows {
        let of = |subject: &&str| report.find(name, at, subject);
        let unit = subjects
            .iter()
            .find_map(of)
            .map_or(Unit::Number, |f| f.unit);
        let cells = subjects
            .iter()
            .map(|subject| of(subject).map_or_else(String::new, cell));
        let cells: Vec<String> = cells.collect();
        let _ = write!(
            text,
            "\n| {} | {} |",
            label(name, at, unit),
            cells.join(" | ")
        );
    }
    text.push('\n');
    text
}

/// One row for each figure of each subject, with everything that is known of it.
pub(crate) fn details(report: &Report, prefixes: &[&str]) -> String {
    let mut text = String::from(
        "| figure | subject | n | median | its interval | p95 | p99 | ratio | its interval |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for figure in select(report, prefixes) {
        let n = number;
        let (ratio, spread) = figure
            .ratio
            .as_ref()
            .map_or_else(Default::default, |ratio| {
                (
                    format!("{} of {}", n(ratio.median), ratio.to),
                    format!("{} - {}", n(ratio.low), n(ratio.high)),
                )
            });
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} - {} | {} | {} | {ratio} | {spread} |",
            label(&figure.name, figure.at, figure.unit),
            figure.subject,
            figure.samples,
            n(figure.median),
            n(figure.low),
            n(figure.high),
            n(figure.p95),
            n(figure.p99),
        );
    }
    text
}

/// Those whose names begin so; all, if nothing is named.
fn select<'a>(report: &'a Report, prefixes: &[&str]) -> Vec<&'a Figure> {
    let is_wanted = |figure: &&Figure| {
        prefixes.is_empty()
            || prefixes
                .iter()
                .any(|prefix| figure.name.starts_with(prefix))
    };
    report.figures.iter().filter(is_wanted).collect()
}

fn label(name: &str, at: Option<u64>, unit: Unit) -> String {
    let at = at.map_or_else(String::new, |at| format!(" at {at}"));
    let unit = match unit {
        Unit::Number => String::new(),
        unit => format!(", {}", unit.symbol()),
    };
    format!("{name}{at}{unit}")
}

fn cell(figure: &Figure) -> String {
    let ratio = figure.ratio.as_ref();
    let ratio = ratio.map_or_else(String::new, |ratio| match ratio.to.as_str() {
        FLOOR => format!(" ({:.2}x)", ratio.median),
        other => format!(" ({:.2}x of {other})", ratio.median),
    });
    format!("{}{ratio}", number(figure.median))
}

/// With as many digits as mean something.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn an_overview_has_a_column_for_each_subject() {
        insta::assert_snapshot!(overview(&example(), &[]));
    }

    #[test]
    fn details_have_the_spread() {
        insta::assert_snapshot!(details(&example(), &["life"]));
    }
}
