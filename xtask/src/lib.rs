//! What demo, tests and benchmarks stand on: a machine with the needed packages, our built binaries, an image made on the
//! spot, and a private containerd. Depends on nothing of the product, so that it can install what building that needs.

pub mod chaos;
pub mod engines;
pub mod image;
pub mod machine;
pub mod products;
pub mod releases;
pub mod sandbox;
