//! Where each value of the configuration is from, and which key was meant by one that there is not.
//! Owns the list of keys; decides no value.

use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// All keys, each after its section.
pub(crate) const KEYS: &[(&str, &str)] = &[
    ("monitor", "backend"),
    ("monitor", "capacity"),
    ("monitor", "btf"),
    ("monitor", "loader"),
    ("runtime", "deadline_seconds"),
    ("log", "level"),
    ("log", "format"),
    ("metrics", "listen"),
    ("metrics", "textfile"),
    ("metrics", "textfile_seconds"),
    ("sandbox", "enabled"),
    ("sandbox", "cri_root"),
    ("sandbox", "cri_state"),
    ("sandbox", "containerd"),
    ("sandbox", "events"),
    ("sandbox", "unprivileged_ports"),
    ("sandbox", "unprivileged_ping"),
    #[cfg(feature = "otel")]
    ("telemetry", "endpoint"),
    #[cfg(feature = "otel")]
    ("telemetry", "root_ratio"),
];
/// The section of traces.
const TELEMETRY: &str = "telemetry";
/// A key that is less alike than this was not meant.
const ALIKE: f64 = 0.7;

/// A value, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Such as `monitor.capacity`.
    pub(crate) key: String,
    /// As the file has it; `None` where there is none by default.
    pub(crate) value: Option<String>,
    pub(crate) origin: Origin,
}

/// Where a value is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Default,
    /// This line of the file.
    File(PathBuf, usize),
    /// A variable of the environment.
    Variable(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}, line {line}", path.display()),
            Self::Variable(name) => f.write_str(name),
        }
    }
}

/// Every setting of a configuration with these values, which was read from this text or from no
/// file.
pub(crate) fn settings(values: &toml::Table, file: Option<(&Path, &str)>) -> Vec<Setting> {
    let all = KEYS.iter().map(|(section, key)| {
        let value = values.get(*section).and_then(|section| section.get(key));
        let line = file.and_then(|(_, text)| line_of(text, section, key));
        let origin = file
            .zip(line)
            .map(|((path, _), line)| Origin::File(path.to_owned(), line));
        Setting {
            key: format!("{section}.{key}"),
            value: value.map(ToString::to_string),
            origin: origin.unwrap_or(Origin::Default),
        }
    });
    all.collect()
}

/// The line that sets this key.
fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let table = DeTable::parse(text).ok()?;
    let (_, section) = find(table.get_ref(), section)?;
    let DeValue::Table(section) = section else {
        return None;
    };
    let (start, _) = find(section, key)?;
    Some(text.get(..start)?.matches('\n').count() + 1)
}

/// The value of a key, and where the key begins.
fn find<'a>(table: &'a DeTable<'_>, key: &str) -> Option<(usize, &'a DeValue<'a>)> {
    let (name, value) = table.iter().find(|(name, _)| name.get_ref() == key)?;
    Some((name.span().start, value.get_ref()))
}

/// What is wrong with a file that has settings of traces, in a build without them.
pub(crate) fn needs_otel(text: &str) -> Option<String> {
    let table = DeTable::parse(text).ok()?;
    let (_, section) = find(table.get_ref(), TELEMETRY)?;
    let keys = match section {
        DeValue::Table(section) => section.keys().map(Spanned::get_ref).collect(),
        _ => Vec::new(),
    };
    let mut names: Vec<String> = keys
        .iter()
        .map(|key| format!("{TELEMETRY}.{key}"))
        .collect();
    names.sort_unstable();
    if names.is_empty() {
        names.push(TELEMETRY.to_owned());
    }
    Some(format!(
        "{}: this embedshimd was built without the feature otel",
        names.join(", ")
    ))
}

/// What was perhaps meant, if this error is about a key or a section that there is not.
pub(crate) fn suggestion(error: &str) -> Option<&'static str> {
    let (_, rest) = error.split_once("unknown field `")?;
    let (unknown, _) = rest.split_once('`')?;
    let names = KEYS.iter().flat_map(|(section, key)| [*section, *key]);
    let rated = names.map(|name| (strsim::jaro_winkler(unknown, name), name));
    let (likeness, name) = rated.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (likeness >= ALIKE).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_has_its_origin() {
        let text = "[monitor]\n# more\ncapacity = 99\n\n[metrics]\nlisten = \"127.0.0.1:1\"\n";
        let values: toml::Table = text.parse().unwrap();
        let path = Path::new("/etc/embedshim/config.toml");
        let settings = settings(&values, Some((path, text)));
        // Those of a feature are not in every build.
        let lines: Vec<String> = settings
            .iter()
            .filter(|setting| !setting.key.starts_with(TELEMETRY))
            .map(|setting| format!("{} {:?} {}", setting.key, setting.value, setting.origin))
            .collect();
        insta::assert_snapshot!("origins", lines.join("\n"));
    }

    #[test]
    fn settings_of_traces_are_refused_by_name_in_a_build_without_them() {
        let text =
            "[telemetry]\nroot_ratio = 1\nendpoint = \"http://c\"\n[log]\nlevel = \"info\"\n";
        let refused = needs_otel(text).unwrap();
        assert!(
            refused.starts_with("telemetry.endpoint, telemetry.root_ratio: ")
                && refused.ends_with("built without the feature otel"),
            "{refused}"
        );
        assert!(
            needs_otel("telemetry = 1")
                .unwrap()
                .starts_with("telemetry: ")
        );
        assert_eq!(needs_otel("[log]\nlevel = \"info\"\n"), None);
    }

    #[test]
    fn what_was_meant_is_suggested_and_nothing_far_fetched() {
        let about = |key: &str| suggestion(&format!("unknown field `{key}`, expected one of"));
        assert_eq!(about("bakend"), Some("backend"));
        assert_eq!(about("metric"), Some("metrics"));
        assert_eq!(about("deadline"), Some("deadline_seconds"));
        assert_eq!(about("xyzzy"), None);
        assert_eq!(suggestion("something else"), None);
    }
}
