//! Docker as a client of containerd: Debian's dockerd of the same release as the containerd under
//! test. 20.10 has our launcher by the name of runc's shim, since it knows no other; newer ones
//! have it by the runtime's type.

pub(crate) mod life;
pub(crate) mod options;
pub(crate) mod survival;

/// What `seq` writes, with a word before each number.
fn counted(word: &str, last: usize) -> String {
    let lines = (1..=last).map(|number| format!("{word}{number}\n"));
    lines.collect::<Vec<_>>().concat()
}
