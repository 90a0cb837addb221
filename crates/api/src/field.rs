//! Deserializers of single fields, so that an impossible value is reported at its own path and line.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de};

/// `null` is the same as an absent field to Kubernetes, also where the field is a list, a map or a boolean.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Whether `name` is a DNS subdomain (RFC 1123), as names of Kubernetes objects are. Identifiers join names with '/',
/// so one that had a '/' could pretend to be another object.
pub fn is_dns_subdomain(name: &str) -> bool {
    let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    let label = |l: &str| !l.is_empty() && !l.starts_with('-') && !l.ends_with('-');
    name.len() <= 253 && name.bytes().all(valid) && name.split('.').all(label)
}

/// The name of an object: a DNS subdomain.
pub(crate) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    if is_dns_subdomain(&name) { Ok(name) } else { Err(not_a_name(&name)) }
}

/// A reference to an object by name; absent, `null` and the empty string are all "none".
pub(crate) fn optional_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    match Option::<String>::deserialize(deserializer)? {
        Some(name) if name.is_empty() => Ok(None),
        Some(name) if !is_dns_subdomain(&name) => Err(not_a_name(&name)),
        other => Ok(other),
    }
}

fn not_a_name<E: de::Error>(name: &str) -> E {
    E::custom(format_args!(
        "{name:?} is not a name: lower-case letters, digits, '-' and '.', starting and ending with a letter or digit"
    ))
}

/// An IP address, where the empty string is none. IPv4-mapped IPv6 addresses are read as the IPv4 address they mean.
pub(crate) fn optional_ip<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(deserializer)? {
        Some(text) if text.is_empty() => Ok(None),
        Some(text) => parse_ip(&text).map(Some),
        None => Ok(None),
    }
}

/// An IP address that must be there.
pub(crate) fn ip<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpAddr, D::Error> {
    parse_ip(&String::deserialize(deserializer)?)
}

fn parse_ip<E: de::Error>(text: &str) -> Result<IpAddr, E> {
    let address: IpAddr =
        text.parse().map_err(|_| E::custom(format_args!("{text:?} is not an IP address")))?;
    Ok(address.to_canonical())
}

/// A range of addresses, where the empty string is none. Bits behind the prefix are dropped.
pub(crate) fn optional_network<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<IpNet>, D::Error> {
    match Option::<String>::deserialize(deserializer)? {
        Some(text) if text.is_empty() => Ok(None),
        Some(text) => parse_network(&text).map(Some),
        None => Ok(None),
    }
}

/// Ranges of addresses.
pub(crate) fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default();
    texts.iter().map(|text| parse_network(text)).collect()
}

fn parse_network<E: de::Error>(text: &str) -> Result<IpNet, E> {
    let network: IpNet =
        text.parse().map_err(|_| E::custom(format_args!("{text:?} is not a range of addresses")))?;
    Ok(network.trunc())
}

/// An address within a list: transparent, but read like [`ip`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ip(#[serde(deserialize_with = "ip")] pub IpAddr);

/// A port by number, or by the name that the pod gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IntOrString {
    Int(u16),
    String(String),
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = IntOrString;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port number or a port name")
            }

            fn visit_u64<E: de::Error>(self, v: u64) -> Result<IntOrString, E> {
                let port =
                    u16::try_from(v).map_err(|_| E::custom(format_args!("{v} is not a port number")))?;
                Ok(IntOrString::Int(port))
            }

            fn visit_i64<E: de::Error>(self, v: i64) -> Result<IntOrString, E> {
                let v = u64::try_from(v).map_err(|_| E::custom(format_args!("{v} is not a port number")))?;
                self.visit_u64(v)
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<IntOrString, E> {
                Ok(IntOrString::String(v.to_owned()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// Transport protocol of a port. Absent means TCP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum Protocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
}
