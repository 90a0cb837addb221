//! How the programs touch their contexts.

/// Reads one word of a context field. Volatile, so that the compiler neither merges nor narrows loads, which the
/// verifier refuses for context fields.
macro_rules! load {
    ($field:expr) => {
        // SAFETY: a field of a context that the kernel passed to this program.
        unsafe { core::ptr::read_volatile(&raw const $field) }
    };
}

/// Writes one word of a context field. Volatile, so that no two stores are merged.
macro_rules! store {
    ($field:expr, $value:expr) => {
        // SAFETY: a field that programs of this kind may write, of a context that the kernel passed to this program.
        unsafe { core::ptr::write_volatile(&raw mut $field, $value) }
    };
}
