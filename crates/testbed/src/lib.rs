//! A machine to test on, for the demo, the tests and the benchmarks: the packages that they need,
//! the programs that we build, an image made on the spot, and a private containerd. Depends on
//! nothing of the product, so that it can install what building that needs.

pub mod architecture;
pub mod bench;
pub mod chaos;
pub mod cross;
pub mod engines;
pub mod image;
pub mod machine;
pub mod products;
pub mod releases;
pub mod sandbox;
