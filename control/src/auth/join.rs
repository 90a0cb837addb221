//! Join tokens: what an agent shows to prove which node it is. A token names the node and its own expiry and carries
//! an HMAC of both under a key that never leaves the state directory, so nothing has to be remembered per token.
//!
//! `weft.v1.NODE.EXPIRY.MAC`: the node in base64url, the expiry in seconds since 1970, the HMAC-SHA256 of everything
//! before the last dot in base64url. Changing the key revokes every token.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{hmac, rand};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use weft_api::field::is_dns_subdomain;

use super::Refused;
use crate::state_dir::{Access, StateDir, StateError};

const KEY_FILE: &str = "token.key";
const KEY_LENGTH: usize = 32;
const PREFIX: &str = "weft.v1";

/// Why no token can be made for a node.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("{0:?} is not a node's name: lower-case letters, digits, '-' and '.'")]
    Node(String),
    #[error("a token that expires in {0:?} is not possible")]
    Ttl(Duration),
}

pub struct TokenKey(hmac::Key);

impl TokenKey {
    /// The state directory's key, made if there is none. The server and `weft-control token` may do so at once.
    pub fn load_or_create(state: &StateDir) -> Result<Self, StateError> {
        let invalid = |why: &str| StateError::Invalid { path: state.path(KEY_FILE), why: why.to_owned() };
        if state.read_private(KEY_FILE)?.is_none() {
            let mut key = [0; KEY_LENGTH];
            rand::fill(&mut key).map_err(|_| invalid("the system gives no random numbers"))?;
            state.create(KEY_FILE, &key, Access::Private)?;
        }
        let key = state.read_private(KEY_FILE)?.unwrap_or_default();
        if key.len() != KEY_LENGTH {
            return Err(invalid("is damaged; remove it to make another, which revokes every join token"));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &key)))
    }

    pub fn issue(&self, node: &str, ttl: Duration, now: SystemTime) -> Result<String, TokenError> {
        if !is_dns_subdomain(node) {
            return Err(TokenError::Node(node.to_owned()));
        }
        let expiry = now.checked_add(ttl).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let expiry = expiry.filter(|_| !ttl.is_zero()).ok_or(TokenError::Ttl(ttl))?.as_secs();
        let signed = format!("{PREFIX}.{}.{expiry}", BASE64.encode(node));
        let mac = BASE64.encode(hmac::sign(&self.0, signed.as_bytes()));
        Ok(format!("{signed}.{mac}"))
    }

    /// The node that `token` proves. Nothing in a token is looked at before its HMAC, which is compared in constant
    /// time.
    pub fn verify(&self, token: &str, now: SystemTime) -> Result<String, Refused> {
        let (signed, mac) = token.rsplit_once('.').ok_or(Refused::Malformed)?;
        let mac = BASE64.decode(mac).map_err(|_| Refused::Malformed)?;
        let fields =
            signed.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.')).ok_or(Refused::Malformed)?;
        hmac::verify(&self.0, signed.as_bytes(), &mac).map_err(|_| Refused::Forged)?;
        let (node, expiry) = fields.split_once('.').ok_or(Refused::Malformed)?;
        let node = BASE64.decode(node).ok().and_then(|node| String::from_utf8(node).ok());
        let node = node.ok_or(Refused::Malformed)?;
        let expiry: u64 = expiry.parse().map_err(|_| Refused::Malformed)?;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if now >= expiry { Err(Refused::Expired { node }) } else { Ok(node) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::tests::temporary;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_token_proves_its_node_until_it_expires() {
        let (_guard, state) = temporary();
        let key = TokenKey::load_or_create(&state).unwrap();
        let now = SystemTime::now();
        let token = key.issue("node-1", HOUR, now).unwrap();
        assert!(token.starts_with("weft.v1."), "{token}");
        assert_eq!(key.verify(&token, now), Ok("node-1".to_owned()));
        // The same key after a restart.
        assert_eq!(TokenKey::load_or_create(&state).unwrap().verify(&token, now), Ok("node-1".to_owned()));
        let expired = Refused::Expired { node: "node-1".to_owned() };
        assert_eq!(key.verify(&token, now + HOUR + HOUR), Err(expired));
    }

    #[test]
    fn nothing_of_it_can_be_changed() {
        let (_guard, state) = temporary();
        let (_other_guard, other) = temporary();
        let key = TokenKey::load_or_create(&state).unwrap();
        let now = SystemTime::now();
        let token = key.issue("node-1", HOUR, now).unwrap();
        for i in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(key.verify(&changed, now).is_err(), "byte {i}: {changed}");
        }
        let mac = token.rsplit_once('.').unwrap().1;
        let forged = format!("weft.v1.{}.99999999999.{mac}", BASE64.encode("node-1"));
        assert_eq!(key.verify(&forged, now), Err(Refused::Forged));
        let foreign = TokenKey::load_or_create(&other).unwrap().issue("node-1", HOUR, now).unwrap();
        assert_eq!(key.verify(&foreign, now), Err(Refused::Forged));
        for malformed in
            ["", "weft.v1", "weft.v1..", "a.b.c", "weft.v2.bm9kZQ.1.AA", "....", "weft.v1.a.b.\u{e9}"]
        {
            assert!(key.verify(malformed, now).is_err(), "{malformed}");
        }
        assert!(key.verify(&token[..token.len() - 1], now).is_err());
    }

    #[test]
    fn only_names_of_nodes_get_one() {
        let (_guard, state) = temporary();
        let key = TokenKey::load_or_create(&state).unwrap();
        for bad in ["", "a/b", "A", "a b"] {
            assert!(key.issue(bad, HOUR, SystemTime::now()).is_err(), "{bad:?}");
        }
        assert!(key.issue("a", Duration::ZERO, SystemTime::now()).is_err());
        assert!(key.issue("a", Duration::MAX, SystemTime::now()).is_err());
    }

    #[test]
    fn a_damaged_key_is_not_used() {
        let (_guard, state) = temporary();
        state.write(KEY_FILE, b"", Access::Private).unwrap();
        assert!(TokenKey::load_or_create(&state).is_err());
    }
}
