//! Sources: where stored bytes come from. Untrusted.
