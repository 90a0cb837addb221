//! Weft's own words in Istio's messages: extensions, which whoever does not know them leaves alone.

use prost::{DecodeError, Message};
use prost_types::Any;

use crate::{service::ServiceTraits, workload::Extension};

const SERVICE: &str = "weft.dev/service";
const SERVICE_TYPE: &str = "type.googleapis.com/weft.service.v1.ServiceTraits";
const DRAINING: &str = "weft.dev/draining";

/// Puts `traits` into a Service's extensions. None where there is nothing to say.
pub fn from_traits(traits: &ServiceTraits) -> Option<Extension> {
    (*traits != ServiceTraits::default()).then(|| Extension {
        name: SERVICE.to_owned(),
        config: Some(Any { type_url: SERVICE_TYPE.to_owned(), value: traits.encode_to_vec() }),
    })
}

/// What a Service's extensions say.
pub fn traits(extensions: &[Extension]) -> Result<ServiceTraits, DecodeError> {
    let config = extensions.iter().find(|e| e.name == SERVICE).and_then(|e| e.config.as_ref());
    config.map_or(Ok(ServiceTraits::default()), |config| ServiceTraits::decode(config.value.as_slice()))
}

/// Says of a Workload that is not healthy that it is ending, and serves until it has.
pub fn draining() -> Extension {
    Extension { name: DRAINING.to_owned(), config: None }
}

/// Whether a Workload's extensions say so.
pub fn is_draining(extensions: &[Extension]) -> bool {
    extensions.iter().any(|e| e.name == DRAINING)
}
