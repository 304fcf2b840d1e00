//! The program `firstread-build`.

fn main() {}
