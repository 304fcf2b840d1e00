//! System calls that need `unsafe`; the only place where it is allowed.
