//! The text of all metrics for the textfile collector of `node_exporter`, which takes the older
//! format of Prometheus alone, and has metrics of a process by the same names. Pure.

use std::borrow::Cow;
use std::fmt::Write;

/// How the collector's own metrics of a process begin, and what ours are called instead.
const PROCESS: [&str; 2] = ["process_", "embedshim_process_"];

/// The older format of a text in that of `OpenMetrics`.
pub(crate) fn textfile(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            text.push_str(&renamed(line));
            text.push('\n');
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("HELP"), Some(_), words) => help = words,
            (Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    "gauge" | "histogram" | "summary" => ("", kind),
                    _ => ("", "untyped"),
                };
                let name = format!("{}{suffix}", renamed(name));
                // Writing to a string cannot fail.
                if let Some(help) = help.take() {
                    let _ = writeln!(text, "# HELP {name} {help}");
                }
                let _ = writeln!(text, "# TYPE {name} {kind}");
            }
            // Units and the end are not in that format.
            _ => {}
        }
    }
    text
}

fn renamed(name: &str) -> Cow<'_, str> {
    let [theirs, ours] = PROCESS;
    match name.strip_prefix(theirs) {
        Some(rest) => Cow::Owned(format!("{ours}{rest}")),
        None => Cow::Borrowed(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_format_has_every_sample_under_a_type_that_it_knows() {
        let open_metrics = "\
# HELP embedshim_build The version of the daemon.
# TYPE embedshim_build info
embedshim_build_info{version=\"0.1.0\"} 1
# HELP embedshim_exits Exits.
# TYPE embedshim_exits counter
embedshim_exits_total{backend=\"bpf\"} 7
# HELP embedshim_call_duration_seconds Time.
# TYPE embedshim_call_duration_seconds histogram
# UNIT embedshim_call_duration_seconds seconds
embedshim_call_duration_seconds_sum 0.5
embedshim_call_duration_seconds_count 1
embedshim_call_duration_seconds_bucket{le=\"+Inf\"} 1
# HELP process_cpu_seconds User and system time.
# TYPE process_cpu_seconds counter
# UNIT process_cpu_seconds seconds
process_cpu_seconds_total 1.5
# HELP embedshim_tasks Tasks by state.
# TYPE embedshim_tasks gauge
embedshim_tasks{state=\"running\"} 3
# EOF
";
        insta::assert_snapshot!("textfile", textfile(open_metrics));
    }
}
