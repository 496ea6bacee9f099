//! [`PeekOff`]: `SO_PEEK_OFF` of socket(7), which nix has no name for: how far `MSG_PEEK` has
//! looked, kept by the socket itself.

use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// Where the next `MSG_PEEK` looks, counted from the first byte that is not consumed; -1 looks
    /// at the first byte and keeps no count.
    PeekOff,
    Both,
    libc::SOL_SOCKET,
    libc::SO_PEEK_OFF,
    i32
);
