//! Where a task stands between the reservation of its id and the release of it, and whether its
//! record is still written. Changes neither: that is [`Task`](super::task::Task)'s.

/// Where a task is between the reservation of its id and the release of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) stage: Stage,
    /// A clean-up removes it: nothing is reported of it any more.
    pub(super) is_given_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its `Create` is in flight: clients cannot see it.
    Creating,
    /// Its `Create` was cut short by the death of a daemon. Whether the container is taken over or
    /// removed is being found out: who wants the id waits.
    HalfCreated,
    /// It was taken over, and clients see it. What has to follow from that is in flight.
    Adopted,
    /// It is a task.
    Live,
    /// Its id is free.
    Released,
}

/// Whether changes of a task are still written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recording {
    /// A change replaces the record.
    On,
    /// The record was removed. An exec's operation can end after that, and must not bring it back:
    /// by then the id may belong to another task.
    Ended,
}

impl Standing {
    pub(super) fn is_undecided(self) -> bool {
        matches!(self.stage, Stage::HalfCreated | Stage::Adopted)
    }
}
