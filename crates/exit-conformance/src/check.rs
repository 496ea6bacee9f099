//! [`Check`]: one check of the suite, and how a module lists its own. Runs none.

use std::sync::Arc;

use crate::subject::Subject;

/// One requirement, for every subject that it is about.
#[derive(Clone, Copy)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) applies: fn(&dyn Subject) -> bool,
    pub(crate) run: fn(&Arc<dyn Subject>),
}

/// Lists checks by their functions, which have a name that says what must hold.
macro_rules! checks {
    ($applies:expr; $($name:ident),+ $(,)?) => {
        [$($crate::check::Check {
            name: stringify!($name),
            applies: $applies,
            run: |subject| $crate::subject::block_on($name(subject)),
        }),+]
    };
}
pub(crate) use checks;
