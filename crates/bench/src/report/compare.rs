//! Which figures are worse in a later report: only what is beyond the spread of both.

use std::fmt::Write;

use super::table::number;
use super::{Figure, Report};

/// A figure of our own that changed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Change {
    pub(crate) name: String,
    pub(crate) is_worse: bool,
}

/// Less than this is not worth a word, however narrow the spread is.
const NOTEWORTHY: f64 = 0.02;

/// What changed from one report to another, of figures that both have.
pub(crate) fn changes(before: &Report, after: &Report) -> Vec<Change> {
    let pairs = after.figures.iter().filter_map(|new| {
        let old = before.find(&new.name, new.at, &new.subject)?;
        change(old, new)
    });
    pairs.collect()
}

/// As text, what is worse first.
pub(crate) fn describe(before: &Report, after: &Report) -> String {
    let changes = changes(before, after);
    let mut text = String::new();
    if before.machine.kernel != after.machine.kernel
        || before.machine.processors != after.machine.processors
    {
        text.push_str(
            "The reports are of different machines: ratios can be compared, times not.\n",
        );
    }
    for (is_worse, title) in [(true, "worse"), (false, "better")] {
        let those = changes.iter().filter(|change| change.is_worse == is_worse);
        let lines: Vec<&str> = those.map(|change| change.name.as_str()).collect();
        let _ = writeln!(text, "{title}, beyond the spread: {}", lines.len());
        for line in lines {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

/// Their ratios are compared if both have one: a busy machine is in both of its numbers.
fn change(old: &Figure, new: &Figure) -> Option<Change> {
    let (what, old_at, new_at) = match (&old.ratio, &new.ratio) {
        (Some(a), Some(b)) if a.to == b.to => (
            format!("ratio to {}", a.to),
            (a.median, a.low, a.high),
            (b.median, b.low, b.high),
        ),
        _ => (
            "median".into(),
            (old.median, old.low, old.high),
            (new.median, new.low, new.high),
        ),
    };
    let (old_median, old_low, old_high) = old_at;
    let (new_median, new_low, new_high) = new_at;
    let is_apart = new_low > old_high || new_high < old_low;
    let share = if old_median == 0.0 {
        f64::INFINITY
    } else {
        (new_median / old_median - 1.0).abs()
    };
    if !is_apart || share < NOTEWORTHY {
        return None;
    }
    let has_grown = new_median > old_median;
    let at = new.at.map_or_else(String::new, |at| format!(" at {at}"));
    Some(Change {
        name: format!(
            "{}{at}, {}: {what} {} ({} - {}) was {} ({} - {})",
            new.name,
            new.subject,
            number(new_median),
            number(new_low),
            number(new_high),
            number(old_median),
            number(old_low),
            number(old_high),
        ),
        is_worse: has_grown != new.unit.is_more_better(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::super::{OURS, Unit};
    use super::*;

    fn scaled(factor: f64, is_concerned: impl Fn(&Figure) -> bool) -> Report {
        let mut report = example();
        for figure in report
            .figures
            .iter_mut()
            .filter(|figure| is_concerned(figure))
        {
            for value in [&mut figure.median, &mut figure.low, &mut figure.high] {
                *value *= factor;
            }
            if let Some(ratio) = &mut figure.ratio {
                for value in [&mut ratio.median, &mut ratio.low, &mut ratio.high] {
                    *value *= factor;
                }
            }
        }
        report
    }

    #[test]
    fn the_same_report_has_no_changes() {
        assert_eq!(changes(&example(), &example()), []);
    }

    #[test]
    fn a_slower_machine_is_no_change() {
        // All times double, so no ratio changes.
        let mut slower = example();
        for figure in &mut slower.figures {
            if figure.ratio.is_some() {
                figure.median *= 2.0;
                figure.low *= 2.0;
                figure.high *= 2.0;
            }
        }
        assert_eq!(changes(&example(), &slower), []);
    }

    #[test]
    fn more_is_worse_for_times_and_counts_and_better_for_rates() {
        let ours = |figure: &Figure| figure.subject == OURS;
        let found = changes(&example(), &scaled(1.5, ours));
        let worse = found.iter().filter(|change| change.is_worse).count();
        assert_eq!((found.len(), worse), (4, 2));
        let rates = |figure: &Figure| ours(figure) && figure.unit == Unit::PerSecond;
        let found = changes(&example(), &scaled(0.5, rates));
        assert!(found.len() == 2 && found.iter().all(|change| change.is_worse));
    }

    #[test]
    fn what_is_within_the_spread_is_no_change() {
        assert_eq!(changes(&example(), &scaled(1.005, |_| true)), []);
    }

    #[test]
    fn changes_say_what_was_and_what_is() {
        let later = scaled(1.5, |figure| figure.subject == OURS);
        insta::assert_snapshot!(describe(&example(), &later));
    }
}
