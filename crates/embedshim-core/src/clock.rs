//! The clock of exits, and numbers drawn from it. Owns that no successor draws a number again.

use std::sync::atomic::{AtomicU64, Ordering};

pub use exit_monitor::BootTime;

/// Numbers that no process of this boot gets twice: they are its microseconds, each at most once.
///
/// A successor need not know where its predecessor was: the clock has gone on.
#[derive(Debug, Default)]
pub struct Numbers(AtomicU64);

impl Numbers {
    /// The next one.
    pub fn draw(&self) -> u64 {
        let now = BootTime::now().0 / 1000;
        let older = self.0.fetch_max(now, Ordering::Relaxed);
        if older < now {
            now
        } else {
            self.0.fetch_add(1, Ordering::Relaxed) + 1
        }
    }

    /// This one was drawn by a predecessor.
    pub fn skip(&self, drawn: u64) {
        self.0.fetch_max(drawn, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_is_drawn_twice() {
        let numbers = Numbers::default();
        let ahead = BootTime::now().0;
        numbers.skip(ahead);
        let drawn: Vec<u64> = (0..1000).map(|_| numbers.draw()).collect();
        assert!(drawn.iter().all(|&number| number > ahead));
        assert!(drawn.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
