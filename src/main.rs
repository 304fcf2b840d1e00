//! The program `firstread`.

fn main() {}
