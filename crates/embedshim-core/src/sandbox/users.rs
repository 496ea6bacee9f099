//! [`Users`]: which users and groups of a pod's own user namespace are which of the node's. Owns
//! what of that is refused; makes no namespace.

/// The kernel takes no more ranges.
const MAX_RANGES: usize = 340;
/// The user and the group of a process that owns nothing.
const UNPRIVILEGED: u32 = 65_535;

/// Some ids of a user namespace, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id as the pod's containers have it.
    pub inside: u32,
    /// The same as the node has it.
    pub outside: u32,
    /// How many there are.
    pub size: u32,
}

/// The mapping of a user namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Users {
    /// Of users.
    pub users: Vec<IdRange>,
    /// Of groups.
    pub groups: Vec<IdRange>,
}

impl Users {
    /// Why there can be no namespace with this mapping, if so.
    pub(super) fn fault(&self) -> Option<String> {
        [("uids", &self.users), ("gids", &self.groups)]
            .into_iter()
            .find_map(|(what, ranges)| {
                let fault = fault_of(ranges)?;
                Some(format!("{what} of the user namespace: {fault}"))
            })
    }

    /// The lines of `/proc/PID/uid_map` and of `gid_map`.
    pub(super) fn maps(&self) -> [String; 2] {
        [&self.users, &self.groups].map(|ranges| {
            let line = |range: &IdRange| {
                let IdRange {
                    inside,
                    outside,
                    size,
                } = range;
                format!("{inside} {outside} {size}\n")
            };
            ranges.iter().map(line).collect()
        })
    }

    /// The node's user and group that are the namespace's root.
    pub(super) fn root(&self) -> Option<(u32, u32)> {
        let root = |ranges: &[IdRange]| {
            let range = ranges.iter().find(|range| range.inside == 0)?;
            Some(range.outside)
        };
        Some((root(&self.users)?, root(&self.groups)?))
    }

    /// The user and the group inside that a process gets which owns nothing.
    pub(super) fn unprivileged(&self) -> (u32, u32) {
        let last = |ranges: &[IdRange]| {
            let lasts = ranges.iter().filter(|range| range.inside <= UNPRIVILEGED);
            let lasts = lasts.map(|range| range.inside.saturating_add(range.size - 1));
            lasts.max().unwrap_or(0).min(UNPRIVILEGED)
        };
        (last(&self.users), last(&self.groups))
    }
}

/// The same of the node.
pub(super) const fn unprivileged() -> (u32, u32) {
    (UNPRIVILEGED, UNPRIVILEGED)
}

fn fault_of(ranges: &[IdRange]) -> Option<String> {
    if ranges.is_empty() || ranges.len() > MAX_RANGES {
        return Some(format!("{} ranges, 1 to {MAX_RANGES} can be", ranges.len()));
    }
    ranges.iter().find_map(|range| {
        let is_over = |first: u32| first.checked_add(range.size).is_none();
        let is_bad = range.size == 0 || is_over(range.inside) || is_over(range.outside);
        is_bad.then(|| format!("{range:?} is no range"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(inside: u32, outside: u32, size: u32) -> IdRange {
        IdRange {
            inside,
            outside,
            size,
        }
    }

    fn users(ranges: &[IdRange]) -> Users {
        Users {
            users: ranges.to_vec(),
            groups: vec![range(0, 300_000, 1 << 16)],
        }
    }

    #[test]
    fn a_mapping_is_checked() {
        assert_eq!(users(&[range(0, 1000, 1)]).fault(), None);
        for bad in [
            vec![],
            vec![range(0, 0, 0)],
            vec![range(1, 0, u32::MAX)],
            vec![range(0, 1, u32::MAX)],
            vec![range(0, 0, 1); MAX_RANGES + 1],
        ] {
            assert!(users(&bad).fault().is_some(), "{bad:?}");
        }
    }

    #[test]
    fn root_and_the_unprivileged_are_of_the_mapping() {
        let whole = users(&[range(0, 200_000, 1 << 16)]);
        assert_eq!(whole.root(), Some((200_000, 300_000)));
        assert_eq!(whole.unprivileged(), (UNPRIVILEGED, UNPRIVILEGED));
        assert_eq!(whole.maps()[0], "0 200000 65536\n");
        let few = users(&[range(0, 1, 10), range(1000, 11, 10)]);
        assert_eq!(few.unprivileged(), (1009, UNPRIVILEGED));
        assert_eq!(users(&[range(1, 1, 1)]).root(), None);
    }
}
