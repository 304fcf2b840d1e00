//! The builder: file systems and images become firstread images.
