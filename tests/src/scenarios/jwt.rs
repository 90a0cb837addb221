//! Tokens that an API server would not issue, made of one that it has issued: with the cluster's own key, which the bed
//! holds, or with another.

use anyhow::{Context as _, Result, anyhow};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;

/// The claims of a token.
pub fn claims(token: &str) -> Result<Value> {
    let part = token.split('.').nth(1).context("not a token")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part)?)?)
}

/// `token` with other claims and the signature that it had.
pub fn unsigned(token: &str, claims: &Value) -> Result<String> {
    let (head, rest) = token.split_once('.').context("not a token")?;
    let (_, signature) = rest.split_once('.').context("not a token")?;
    Ok(format!("{head}.{}.{signature}", URL_SAFE_NO_PAD.encode(claims.to_string())))
}

/// `token` with other claims, signed by the P-256 key `key` (PEM); its header, which names the cluster's key, stays.
pub fn signed(token: &str, claims: &Value, key: &str) -> Result<String> {
    let (head, _) = token.split_once('.').context("not a token")?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| anyhow!("the key: {error}"))?;
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der())?;
    let text = format!("{head}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let signature = key.sign(&SystemRandom::new(), text.as_bytes())?;
    Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
}
