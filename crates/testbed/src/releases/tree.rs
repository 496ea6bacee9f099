//! [`Suite::tree`]: packages unpacked as the root of a system would have them, to compile against
//! or to put into a guest. Owns that nothing in it leads out of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::{COMPLETE, Suite};

impl Suite {
    /// A directory like the root of a system, with these packages and all that they depend on, and
    /// with those that are wanted alone; what is there is not fetched again. Links between its
    /// files stay in it.
    pub fn tree(&self, packages: &[&str], alone: &[&str]) -> anyhow::Result<PathBuf> {
        let root = self.cache.join("root");
        let _one_at_a_time = self.lock()?;
        if root.join(COMPLETE).exists() {
            return Ok(root);
        }
        println!(
            "Fetching {} of Debian {} into {}",
            [packages, alone].concat().join(", "),
            self.release,
            self.cache.display()
        );
        // Perhaps half of what was a newer or an older one.
        for left in [&root, &self.cache.join("cache/archives")] {
            let _ = fs::remove_dir_all(left);
        }
        self.download(packages)
            .with_context(|| format!("cannot fetch packages of Debian {}", self.release))?;
        for package in alone {
            self.download_and_extract(package, &root)
                .with_context(|| format!("cannot fetch {package} of Debian {}", self.release))?;
        }
        keep_links_inside(&root, &root)?;
        fs::remove_dir_all(self.cache.join("cache/archives"))?;
        fs::write(root.join(COMPLETE), "")?;
        Ok(root)
    }
}

/// Makes absolute symbolic links in a directory, and below it, those of a system with this root.
fn keep_links_inside(root: &Path, directory: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            keep_links_inside(root, &path)?;
        } else if let Ok(target) = fs::read_link(&path)
            && let Ok(target) = target.strip_prefix("/")
        {
            fs::remove_file(&path)?;
            symlink(root.join(target), &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::Architecture;

    #[test]
    fn links_of_a_tree_stay_in_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("usr/lib")).unwrap();
        fs::create_dir(root.join("lib")).unwrap();
        fs::write(root.join("lib/libm.so.6"), "x").unwrap();
        symlink("/lib/libm.so.6", root.join("usr/lib/libm.so")).unwrap();
        symlink("libm.so", root.join("usr/lib/relative.so")).unwrap();
        keep_links_inside(root, root).unwrap();
        assert_eq!(fs::read(root.join("usr/lib/relative.so")).unwrap(), b"x");
        let relative = fs::read_link(root.join("usr/lib/relative.so"));
        assert_eq!(relative.unwrap(), Path::new("libm.so"));
    }

    #[test]
    fn a_suite_of_an_architecture_has_a_cache_and_options_of_its_own() {
        let all = [Architecture::X86_64, Architecture::Aarch64];
        let suite = Suite::of_architectures("rust", "sid", &all);
        assert!(suite.directory().ends_with("rust-amd64-arm64-sid"));
        let options = suite.options();
        assert!(options.contains(&"--option=APT::Architecture=amd64".to_owned()));
        assert!(options.contains(&"--option=APT::Architectures=amd64,arm64".to_owned()));
        let native = Suite::new("rust", "sid").options();
        assert!(!native.iter().any(|option| option.contains("APT::Arch")));
    }
}
