//! The map: device ranges to extents.
