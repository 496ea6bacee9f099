//! What a daemon does with what its predecessor left.

pub(super) mod adopt;
pub(super) mod finish;
pub(super) mod half_created;
pub(super) mod unreported;
