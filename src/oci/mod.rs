//! OCI documents: parsing only.
