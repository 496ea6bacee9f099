//! [`Durable`]: a thing in the state directory that a successor or a client needs. [`DurableSet`]:
//! all of them. Owns noticing that one was removed or replaced, by a clean-up of `/run` for
//! example, and that all of them are recreated, in order.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;

use super::file_id::FileId;

/// How often the set looks whether all its files are where they were.
const CHECK_PERIOD: Duration = Duration::from_secs(2);

/// A file or a directory that can be made again from what this process knows.
#[async_trait(?Send)]
pub(crate) trait Durable {
    /// Names it in log lines. Unique within a set.
    fn name(&self) -> &'static str;

    /// Where it is. `None` for files of another process, which are not checked.
    fn path(&self) -> Option<&Path>;

    /// Whether it is complete as long as it is at its path. A directory is not: it may have been
    /// emptied.
    fn is_single_file(&self) -> bool {
        false
    }

    /// Makes it again. A repetition after a failure is harmless.
    async fn recreate(&self) -> anyhow::Result<()>;
}

/// Everything durable, in the order in which it is recreated.
pub(crate) struct DurableSet<'a> {
    members: Vec<Box<dyn Durable + 'a>>,
    /// The file of each member when it was last known to be complete.
    ids: Vec<Option<FileId>>,
}

impl<'a> DurableSet<'a> {
    /// A set whose files are at their paths now.
    pub(crate) fn new(members: Vec<Box<dyn Durable + 'a>>) -> Self {
        let ids = ids(&members);
        Self { members, ids }
    }

    /// Waits until a member is not at its path, or another file is. Returns the names of all such
    /// members.
    pub(crate) async fn removed(&self) -> Vec<&'static str> {
        loop {
            tokio::time::sleep(CHECK_PERIOD).await;
            let removed = self.removed_now();
            if !removed.is_empty() {
                return removed;
            }
        }
    }

    fn removed_now(&self) -> Vec<&'static str> {
        let members = self.members.iter().zip(&self.ids);
        members
            .filter(|(member, before)| {
                member.path().is_some_and(|path| {
                    let now = FileId::at(path);
                    now.is_none() || now != **before
                })
            })
            .map(|(member, _)| member.name())
            .collect()
    }

    /// Recreates the `removed` members, and those that may be incomplete. After a failure the
    /// members that are still missing are found by [`Self::removed`] again.
    pub(crate) async fn recreate(&mut self, removed: &[&str]) -> anyhow::Result<()> {
        for member in &self.members {
            if !member.is_single_file() || removed.contains(&member.name()) {
                member.recreate().await.with_context(|| member.name())?;
            }
        }
        self.ids = ids(&self.members);
        Ok(())
    }
}

fn ids(members: &[Box<dyn Durable + '_>]) -> Vec<Option<FileId>> {
    let ids = members.iter().map(|member| FileId::at(member.path()?));
    ids.collect()
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    struct TestFile<'a> {
        name: &'static str,
        path: Option<PathBuf>,
        is_single: bool,
        recreated: &'a RefCell<Vec<&'static str>>,
        fails: &'a Cell<bool>,
    }

    #[async_trait(?Send)]
    impl Durable for TestFile<'_> {
        fn name(&self) -> &'static str {
            self.name
        }

        fn path(&self) -> Option<&Path> {
            self.path.as_deref()
        }

        fn is_single_file(&self) -> bool {
            self.is_single
        }

        async fn recreate(&self) -> anyhow::Result<()> {
            anyhow::ensure!(!self.fails.get(), "no room");
            self.recreated.borrow_mut().push(self.name);
            match &self.path {
                Some(path) => Ok(fs::write(path, "")?),
                None => Ok(()),
            }
        }
    }

    #[tokio::test]
    async fn everything_that_may_be_incomplete_is_recreated_in_order_until_it_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let (recreated, fails) = (RefCell::new(Vec::new()), Cell::new(true));
        let path = |name: &str| Some(directory.path().join(name));
        let member = |name: &'static str, path: Option<PathBuf>, is_single| {
            if let Some(path) = &path {
                fs::write(path, "").unwrap();
            }
            let (recreated, fails) = (&recreated, &fails);
            Box::new(TestFile {
                name,
                path,
                is_single,
                recreated,
                fails,
            }) as Box<dyn Durable>
        };
        let mut set = DurableSet::new(vec![
            member("lock", path("lock"), true),
            member("records", path("records"), false),
            member("socket", path("socket"), true),
            member("keeper", None, false),
        ]);
        assert_eq!(set.removed_now(), Vec::<&str>::new());
        fs::remove_file(directory.path().join("socket")).unwrap();
        assert_eq!(set.removed_now(), ["socket"]);
        set.recreate(&["socket"]).await.unwrap_err();
        assert_eq!(set.removed_now(), ["socket"], "it is still missing");
        fails.set(false);
        set.recreate(&["socket"]).await.unwrap();
        assert_eq!(*recreated.borrow(), ["records", "socket", "keeper"]);
        assert_eq!(set.removed_now(), Vec::<&str>::new());
        // Another file at the path is as bad as none.
        fs::write(directory.path().join("new"), "").unwrap();
        fs::rename(directory.path().join("new"), directory.path().join("lock")).unwrap();
        assert_eq!(set.removed_now(), ["lock"]);
    }
}
