//! Responses as bytes on the wire, and the gRPC method around them. Not by tonic's own encoder: that keeps the buffer of
//! the largest message of a stream for as long as the stream lives, which after a first state is tens of megabytes for
//! each client. Here a response is made once into a buffer of its own size; and a whole state, which all clients ask for
//! at once when the controller has been away, is made once for all of them.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes};
use futures_util::{Stream, StreamExt, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message;
use prost_types::Any;
use tonic::codec::Codec;
use tonic::codegen::http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use tonic::codegen::{Body, BoxFuture, Context, Poll, Service as Call, StdError};
use tonic::metadata::{GRPC_CONTENT_TYPE, MetadataMap};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;
use weft_proto::discovery::aggregated_discovery_service_server::SERVICE_NAME;
use weft_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};

use crate::server::Server;
use crate::{MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, Resources, Version};

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Number of the field `resources` of a response.
const RESOURCES: u32 = 2;
/// A whole state of fewer bytes is not kept for others.
const LARGE: usize = 256 << 10;

/// A response that is decided and not yet encoded.
pub(crate) struct Decided {
    /// What it holds but for resources.
    pub head: DeltaDiscoveryResponse,
    pub upserts: Vec<(String, Version, Bytes)>,
    /// All there is of the type, if `upserts` are that.
    pub whole: Option<Resources>,
}

/// The last large state that was encoded as a whole, by its type and content.
#[derive(Default)]
pub(crate) struct Whole(Mutex<Option<(String, Resources, Bytes)>>);

/// A response as pieces of a gRPC stream: all but the resources, and these.
pub(crate) type Pieces = [Bytes; 2];

impl Decided {
    pub(crate) fn encode(&self, last: &Whole) -> Result<Pieces, Status> {
        let resources = match &self.whole {
            Some(whole) => last.encode(self, whole),
            None => self.resources(),
        };
        let head = self.head.encode_to_vec();
        let length = head.len() + resources.len();
        if length > MAX_RESPONSE_BYTES {
            return Err(Status::out_of_range(format!(
                "a response of {length} bytes, more than {MAX_RESPONSE_BYTES}"
            )));
        }
        let mut start = Vec::with_capacity(head.len() + 5);
        start.put_u8(0); // not compressed
        start.put_u32(length as u32);
        start.put_slice(&head);
        Ok([start.into(), resources])
    }

    /// Fields of a message may come in any order and in pieces, so the resources can be encoded apart from the rest.
    fn resources(&self) -> Bytes {
        let type_url = &self.head.type_url;
        let resource = |(name, version, value): &(String, Version, Bytes)| Resource {
            name: name.clone(),
            version: version.as_str().to_owned(),
            resource: Some(Any { type_url: type_url.clone(), value: value.to_vec() }),
            aliases: Vec::new(),
        };
        // The lengths and tags of the fields are under 32 bytes.
        let sizes = self.upserts.iter().map(|(name, version, value)| {
            name.len() + version.as_str().len() + type_url.len() + value.len() + 32
        });
        let mut encoded = Vec::with_capacity(sizes.sum());
        for upsert in &self.upserts {
            prost::encoding::message::encode(RESOURCES, &resource(upsert), &mut encoded);
        }
        encoded.shrink_to_fit();
        encoded.into()
    }
}

impl Whole {
    /// The resources of `decided`, which are `whole`, from the last time or anew. Others who want the same wait meanwhile
    /// instead of doing it too.
    fn encode(&self, decided: &Decided, whole: &Resources) -> Bytes {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let type_url = &decided.head.type_url;
        if let Some((of, known, encoded)) = &*last
            && of == type_url
            && known.ptr_eq(whole)
        {
            return encoded.clone();
        }
        let encoded = decided.resources();
        if encoded.len() >= LARGE {
            *last = Some((type_url.clone(), whole.clone(), encoded.clone()));
        }
        encoded
    }
}

/// The gRPC service to add to a tonic router.
#[derive(Clone)]
pub struct Service(pub(crate) Arc<Server>);

impl tonic::server::NamedService for Service {
    const NAME: &'static str = SERVICE_NAME;
}

impl<B> Call<Request<B>> for Service
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let server = self.0.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            if parts.uri.path() != METHOD {
                return Ok(Status::unimplemented("xDS is served as deltas of all types only").into_http());
            }
            let mut codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
            let requests = Streaming::new_request(codec.decoder(), body, None, Some(MAX_REQUEST_BYTES));
            let metadata = MetadataMap::from_headers(parts.headers);
            let request = tonic::Request::from_parts(metadata, parts.extensions, requests);
            Ok(match server.open(request).await {
                Ok(responses) => respond(responses),
                Err(status) => status.into_http(),
            })
        })
    }
}

/// The stream's status follows its last response.
fn respond(
    responses: impl Stream<Item = Result<Pieces, Status>> + Send + 'static,
) -> Response<tonic::body::Body> {
    let end = stream::iter([Err(Status::ok(""))]);
    let frames = responses.chain(end).scan(false, |ended, response| {
        let frames = match response {
            _ if *ended => return std::future::ready(None),
            Ok(pieces) => pieces.into_iter().filter(|piece| !piece.is_empty()).map(Frame::data).collect(),
            Err(status) => {
                *ended = true;
                let mut trailers = HeaderMap::new();
                // What does not fit into a header is left out; the code always does.
                let _ = status.add_header(&mut trailers);
                vec![Frame::trailers(trailers)]
            }
        };
        std::future::ready(Some(stream::iter(frames.into_iter().map(Ok::<_, Status>))))
    });
    let mut response = Response::new(tonic::body::Body::new(StreamBody::new(frames.flatten())));
    let grpc: HeaderValue = GRPC_CONTENT_TYPE;
    response.headers_mut().insert(CONTENT_TYPE, grpc);
    response
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::resource;

    fn decided(whole: &Resources, is_whole: bool) -> Decided {
        let head = DeltaDiscoveryResponse {
            system_version_info: "7".to_owned(),
            type_url: "t".to_owned(),
            nonce: "1".to_owned(),
            removed_resources: vec!["gone".to_owned()],
            resources: Vec::new(),
        };
        let upserts =
            whole.iter().map(|(name, (version, value))| (name.clone(), version.clone(), value.clone()));
        Decided { head, upserts: upserts.collect(), whole: is_whole.then(|| whole.clone()) }
    }

    fn resources(number: usize) -> Resources {
        (0..number).map(|n| (n.to_string(), resource(n.to_string().repeat(100)))).collect()
    }

    #[test]
    fn the_pieces_are_one_message() {
        for (number, is_whole) in [(0, true), (3, false), (3, true), (2000, true)] {
            let all = resources(number);
            let pieces = decided(&all, is_whole).encode(&Whole::default()).unwrap();
            let bytes = pieces.concat();
            let (prefix, message) = bytes.split_at(5);
            assert_eq!((prefix[0], prefix[1..].to_vec()), (0, (message.len() as u32).to_be_bytes().to_vec()));
            let DeltaDiscoveryResponse { resources, system_version_info, type_url, nonce, removed_resources } =
                DeltaDiscoveryResponse::decode(message).unwrap();
            let head = (system_version_info.as_str(), type_url.as_str(), nonce.as_str());
            assert_eq!((head, removed_resources), (("7", "t", "1"), vec!["gone".to_owned()]));
            let resource = resources.into_iter().map(|resource| {
                let any = resource.resource.unwrap();
                assert_eq!(any.type_url, "t");
                (resource.name, (resource.version.into(), any.value.into()))
            });
            assert_eq!(resource.collect::<Resources>(), all);
        }
    }

    #[test]
    fn a_large_state_is_encoded_once_for_all_and_again_when_it_has_changed() {
        let (last, mut all) = (Whole::default(), resources(2000));
        let encode = |all: &Resources| decided(all, true).encode(&last).unwrap()[1].clone();
        let first = encode(&all);
        assert_eq!(encode(&all.clone()).as_ptr(), first.as_ptr());
        all.insert("0".to_owned(), resource("other"));
        let second = encode(&all);
        assert_ne!(second, first);
        assert_eq!(encode(&all).as_ptr(), second.as_ptr());
        // A part is not taken for it.
        assert_ne!(decided(&all, false).encode(&last).unwrap()[1].as_ptr(), second.as_ptr());
    }
}
