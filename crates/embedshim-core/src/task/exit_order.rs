//! [`ExitOrder`]: the exit of an init is the last of its container (invariant 5; containerd
//! 892dc54bd, 421a4b568). Owns which events that lets out, and which execs may still start. Pure.

use crate::event::EventKind;

/// How far a container's exits have come.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ExitOrder {
    running_execs: usize,
    init: InitExit,
}

#[derive(Clone, Debug, Default, PartialEq)]
enum InitExit {
    /// The init has not ended.
    #[default]
    Alive,
    /// It has ended: no exec starts any more.
    Ended,
    /// Its event waits for execs that run.
    Waiting(EventKind),
    /// Its event is let out.
    Due,
    /// Its event is emitted.
    Emitted,
}

impl ExitOrder {
    /// Counts an exec as running. False if the init has ended: the exec must not start (containerd
    /// e7357916b).
    pub(crate) fn enter_exec(&mut self) -> bool {
        if self.has_init_ended() {
            return false;
        }
        self.running_execs += 1;
        true
    }

    /// An exec does not run any more. Gives the init's event if it waited for that.
    pub(crate) fn leave_exec(&mut self) -> Option<EventKind> {
        self.running_execs = self.running_execs.saturating_sub(1);
        if self.running_execs > 0 || !matches!(self.init, InitExit::Waiting(_)) {
            return None;
        }
        match std::mem::replace(&mut self.init, InitExit::Due) {
            InitExit::Waiting(event) => Some(event),
            _ => None,
        }
    }

    /// No exec starts from here on.
    pub(crate) fn init_ended(&mut self) {
        if self.init == InitExit::Alive {
            self.init = InitExit::Ended;
        }
    }

    /// The init's event is due: gives it back, or keeps it until no exec runs.
    pub(crate) fn init_exited(&mut self, event: EventKind) -> Option<EventKind> {
        if self.running_execs > 0 {
            self.init = InitExit::Waiting(event);
            return None;
        }
        self.init = InitExit::Due;
        Some(event)
    }

    /// The init's event is emitted.
    pub(crate) fn emitted(&mut self) {
        self.init = InitExit::Emitted;
    }

    /// Whether no exec may start any more.
    pub(crate) fn has_init_ended(&self) -> bool {
        self.init != InitExit::Alive
    }

    /// Whether the last event of the container is emitted.
    pub(crate) fn is_over(&self) -> bool {
        self.init == InitExit::Emitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Invariant 5: whatever comes when, the init's event is let out once, after the last exec
        /// that had started, and no exec starts after the init's end.
        #[test]
        fn the_init_is_last_and_once(steps in proptest::collection::vec(0..4_u8, 0..60)) {
            let mut order = ExitOrder::default();
            let (mut running, mut has_ended, mut is_published, mut let_out) = (0_usize, false, false, 0);
            for step in steps {
                match step {
                    0 => {
                        prop_assert_eq!(order.enter_exec(), !has_ended);
                        running += usize::from(!has_ended);
                    }
                    1 if running > 0 => {
                        running -= 1;
                        let event = order.leave_exec();
                        let_out += usize::from(event.is_some());
                        prop_assert_eq!(event.is_some(), is_published && running == 0 && let_out == 1);
                    }
                    2 => {
                        order.init_ended();
                        has_ended = true;
                    }
                    3 if has_ended && !is_published => {
                        is_published = true;
                        let event = order.init_exited(EventKind::Oom);
                        prop_assert_eq!(event.is_some(), running == 0);
                        let_out += usize::from(event.is_some());
                    }
                    _ => {}
                }
                prop_assert!(let_out <= 1);
                prop_assert_eq!(let_out == 1, is_published && running == 0);
            }
        }
    }
}
