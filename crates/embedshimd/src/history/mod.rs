//! What has become of tasks and sandboxes since this daemon began, as far as it remembers. In
//! memory alone: a successor begins with nothing.

mod hearing;
mod lines;
mod ring;

pub(crate) use hearing::Remembered;
pub(crate) use ring::{Batch, History};

#[cfg(test)]
pub(crate) use ring::{CAPACITY, tests};
