//! Fetching: a miss becomes verified bytes.
