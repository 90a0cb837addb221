//! Versions of resources: a hash of the content, so that every replica of the controller, and a restarted one, gives
//! the same content the same version and a reconnecting client is sent nothing it has.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// Version of one resource's content. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(Arc<str>);

impl Version {
    /// The version Weft gives to `content`: the first 128 bits of its SHA-256, as 32 lower-case hex digits.
    pub fn of(content: &[u8]) -> Version {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let digest = Sha256::digest(content);
        let text: String = digest[..16]
            .iter()
            .flat_map(|byte| [HEX[usize::from(byte >> 4)] as char, HEX[usize::from(byte & 15)] as char])
            .collect();
        Version(text.into())
    }

    /// As it is on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A version as a peer sent it; to anyone but its maker it is opaque.
impl From<String> for Version {
    fn from(text: String) -> Version {
        Version(text.into())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_start_of_the_sha256() {
        // sha256sum of nothing, and of "weft".
        assert_eq!(Version::of(b"").as_str(), "e3b0c44298fc1c149afbf4c8996fb924");
        assert_ne!(Version::of(b"weft"), Version::of(b"Weft"));
    }
}
