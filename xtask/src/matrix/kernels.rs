//! Which kernels there are, and where from: Debian's cloud kernels, fetched and verified by apt, or
//! any other by its path.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use testbed::architecture::Architecture;
use testbed::releases::Suite;

/// The series of which each is run when nothing else is asked for, and the suites that have them.
const SERIES: [(&str, &str); 5] = [
    ("5.10", "bullseye"),
    ("6.1", "bookworm"),
    ("6.12", "trixie"),
    ("6.16", "trixie-backports"),
    (NEWEST, "trixie-backports"),
];
/// The same for an architecture that is emulated in several times the time.
const SERIES_OF_OTHERS: [&str; 3] = ["6.1", "6.12", NEWEST];
/// The newest of any series.
const NEWEST: &str = "newest";
/// Where other series are looked for.
const SUITES: [&str; 5] = ["trixie-backports", "trixie", "bookworm", "bullseye", "sid"];

/// A kernel to boot.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) image: PathBuf,
}

/// The kernels that were asked for, fetched if they are not there yet.
pub(crate) fn of(wishes: &[String], architecture: Architecture) -> anyhow::Result<Vec<Kernel>> {
    let all = || SERIES.iter().map(|(series, _)| *series);
    let is_native = Architecture::native() == Some(architecture);
    let wishes: Vec<&str> = match wishes {
        [] if is_native => all().collect(),
        [] => SERIES_OF_OTHERS.to_vec(),
        wishes => wishes.iter().map(String::as_str).collect(),
    };
    let kernels = wishes.into_iter().map(|wish| one(wish, architecture));
    kernels.collect()
}

fn one(wish: &str, architecture: Architecture) -> anyhow::Result<Kernel> {
    if wish.contains('/') {
        let image = fs::canonicalize(wish).with_context(|| format!("kernel {wish}"))?;
        let name = image
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        return Ok(Kernel { name, image });
    }
    match SERIES.iter().find(|(series, _)| *series == wish) {
        Some((_, suite)) => debian(wish, &[suite], architecture),
        None => debian(wish, &SUITES, architecture),
    }
}

/// The packages of a release with kernels for an architecture.
fn suite_of(suite: &'static str, architecture: Architecture) -> Suite {
    if Architecture::native() == Some(architecture) {
        Suite::new("kernels", suite)
    } else {
        Suite::of_architectures("kernels", suite, &[architecture])
    }
}

fn debian(
    series: &str,
    suites: &[&'static str],
    architecture: Architecture,
) -> anyhow::Result<Kernel> {
    for suite in suites {
        let suite = suite_of(suite, architecture);
        let _one_at_a_time = suite.lock()?;
        let cached = suite.directory().join(series);
        if let Some(kernel) = in_cache(&cached) {
            return Ok(kernel);
        }
        let names = suite.package_names("linux-")?;
        let Some(package) = newest_of(&names, series, architecture) else {
            continue;
        };
        println!("Fetching {package} of Debian {}", suite.name());
        let unpacked = suite.download_and_unpack(package)?;
        let image = find_image(&unpacked)
            .with_context(|| format!("package {package} has no kernel image"))?;
        fs::create_dir_all(&cached)?;
        let version = version_of(package, architecture).unwrap_or(series);
        fs::rename(image, cached.join(version))?;
        fs::remove_dir_all(unpacked)?;
        return in_cache(&cached).context("the kernel is not where it was put");
    }
    bail!(
        "Debian {} has no cloud kernel {series} for {}",
        suites.join(", "),
        architecture.debian()
    )
}

fn in_cache(directory: &Path) -> Option<Kernel> {
    let image = fs::read_dir(directory).ok()?.flatten().next()?.path();
    let name = image.file_name()?.to_string_lossy().into_owned();
    Some(Kernel { name, image })
}

/// `6.12.117+deb13` of `linux-image-6.12.117+deb13-cloud-amd64`. Newer ones have the image in
/// `linux-binary-*`.
fn version_of(package: &str, architecture: Architecture) -> Option<&str> {
    let rest = package
        .strip_prefix("linux-binary-")
        .or_else(|| package.strip_prefix("linux-image-"))?;
    let version = rest.strip_suffix(architecture.debian())?;
    let version = version.strip_suffix("-cloud-")?;
    version
        .starts_with(|first: char| first.is_ascii_digit())
        .then_some(version)
}

fn newest_of<'a>(
    names: &'a [String],
    series: &str,
    architecture: Architecture,
) -> Option<&'a String> {
    let version_of = |name| version_of(name, architecture);
    let is_of_series = |version: &str| {
        series == NEWEST
            || version
                .strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(['.', '-', '+']))
    };
    names
        .iter()
        .filter(|name| version_of(name.as_str()).is_some_and(is_of_series))
        // Among equals, the one that has the image itself.
        .max_by_key(|name| {
            (
                numbers(version_of(name).unwrap_or_default()),
                name.starts_with("linux-binary-"),
            )
        })
}

/// The numbers in a version, to compare 6.9 with 6.12.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

fn find_image(directory: &Path) -> Option<PathBuf> {
    let entries: Vec<PathBuf> = fs::read_dir(directory)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    let is_image = |path: &&PathBuf| {
        path.is_file()
            && path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    };
    entries.iter().find(is_image).cloned().or_else(|| {
        entries
            .iter()
            .filter(|path| path.is_dir() && !path.is_symlink())
            .find_map(|path| find_image(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_by_its_numbers() {
        let names = [
            "linux-image-6.1.0-47-cloud-amd64",
            "linux-image-6.12.9+deb13-cloud-amd64",
            "linux-image-6.12.117+deb13-cloud-amd64",
            "linux-image-6.12.117+deb13-cloud-amd64-dbg",
            "linux-image-7.3.4+deb13-cloud-amd64",
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-image-7.4.0+deb13-amd64",
            "linux-image-cloud-amd64",
            "linux-image-6.12.118+deb13-cloud-arm64",
        ]
        .map(str::to_owned);
        let newest_for = |series, architecture| {
            let newest = newest_of(&names, series, architecture);
            newest.map(String::as_str)
        };
        let newest = |series| newest_for(series, Architecture::X86_64);
        assert_eq!(newest("6.1"), Some("linux-image-6.1.0-47-cloud-amd64"));
        assert_eq!(
            newest("6.12"),
            Some("linux-image-6.12.117+deb13-cloud-amd64")
        );
        assert_eq!(newest(NEWEST), Some("linux-binary-7.3.4+deb13-cloud-amd64"));
        assert_eq!(newest("6.2"), None);
        assert_eq!(
            newest_for(NEWEST, Architecture::Aarch64),
            Some("linux-image-6.12.118+deb13-cloud-arm64")
        );
    }
}
