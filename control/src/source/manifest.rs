//! One manifest file's text to objects: YAML or JSON, several documents, lists of objects. Pure; which files there are
//! and what happens to a malformed one is the directory's business.

use std::{collections::BTreeSet, fmt, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use weft_api::{FieldError, Kind, Object};

/// What a file holds.
#[derive(Debug, Default, PartialEq)]
pub struct Manifest {
    /// In the file's order.
    pub objects: Vec<Object>,
    /// `apiVersion kind` of the objects that Weft does not read.
    pub ignored: BTreeSet<String>,
}

/// Where and why a file is no valid manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("document {document}, line {line}, {}: {message}", field(.path))]
pub struct ManifestError {
    /// Counted from 1, as a reader of the file counts.
    pub document: usize,
    pub line: usize,
    /// As in `spec.ports[0].port`; `.` is the document itself.
    pub path: String,
    pub message: String,
}

fn field(path: &str) -> String {
    if path == "." { "the document itself".to_owned() } else { format!("field {path}") }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Yaml,
    Json,
}

impl Format {
    /// By the file's name; None for what is no manifest. Hidden files are none: editors keep their scratch there.
    pub fn of(file_name: &str) -> Option<Self> {
        if file_name.starts_with('.') {
            return None;
        }
        match file_name.rsplit_once('.')?.1 {
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// Reads every document, or says where the first mistake is.
pub fn parse(text: &str, format: Format) -> Result<Manifest, ManifestError> {
    let mut manifest = Manifest::default();
    match format {
        Format::Yaml => parse_yaml(text, &mut manifest)?,
        Format::Json => parse_json(text, &mut manifest)?,
    }
    Ok(manifest)
}

/// Reads one object whose kind is known, as the API server sends it.
pub fn read(kind: Kind, value: &serde_json::Value) -> Result<Object, FieldError> {
    let mut track = serde_path_to_error::Track::new();
    let read = KindSeed(Some(kind)).deserialize(serde_path_to_error::Deserializer::new(value, &mut track));
    let path = track.path().to_string();
    match read {
        Ok(Some(object)) => object.validate().map(|()| object),
        Ok(None) => Err(FieldError { path, message: "is no object".to_owned() }),
        Err(error) => Err(FieldError { message: words(&error, &path), path }),
    }
}

/// Every document is read twice: first for its kind, then as that kind, so that an error of the second reading has the
/// line and the path of the field.
fn parse_yaml(text: &str, manifest: &mut Manifest) -> Result<(), ManifestError> {
    let documents =
        serde_yaml_ng::Deserializer::from_str(text).zip(serde_yaml_ng::Deserializer::from_str(text));
    let mut starts = document_lines(text);
    for (i, (probe, document)) in documents.enumerate() {
        let start = starts.next().unwrap_or(1);
        let locate = |error: serde_path_to_error::Error<serde_yaml_ng::Error>| {
            let line = error.inner().location().map_or(start, |location| location.line());
            let path = error.path().to_string();
            ManifestError { document: i + 1, line, message: words(error.inner(), &path), path }
        };
        let shape = serde_path_to_error::deserialize::<_, Option<Shape>>(probe).map_err(locate)?;
        let Some(shape) = shape else { continue };
        shape.check().map_err(|message| mistake(i + 1, start, message))?;
        let mut track = serde_path_to_error::Track::new();
        let read = shape
            .reader(manifest)
            .deserialize(serde_path_to_error::Deserializer::new(document, &mut track))
            .map_err(|error| locate(serde_path_to_error::Error::new(track.path(), error)))?;
        keep(read, i + 1, start, manifest)?;
    }
    Ok(())
}

fn parse_json(text: &str, manifest: &mut Manifest) -> Result<(), ManifestError> {
    let mut offset = 0;
    let mut document = 0;
    while !text[offset..].trim_start().is_empty() {
        document += 1;
        let rest = &text[offset..];
        let before = text[..offset].matches('\n').count();
        let start = before + 1 + usize::from(rest.starts_with('\n'));
        let locate = |error: serde_path_to_error::Error<serde_json::Error>| {
            let path = error.path().to_string();
            let line = before + error.inner().line().max(1);
            ManifestError { document, line, message: words(error.inner(), &path), path }
        };
        let mut probe = serde_json::Deserializer::from_str(rest);
        let shape = serde_path_to_error::deserialize::<_, Option<Shape>>(&mut probe).map_err(locate)?;
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<IgnoredAny>();
        stream.next();
        let length = stream.byte_offset();
        if let Some(shape) = shape {
            shape.check().map_err(|message| mistake(document, start, message))?;
            let mut track = serde_path_to_error::Track::new();
            let mut deserializer = serde_json::Deserializer::from_str(&rest[..length]);
            let read = shape
                .reader(manifest)
                .deserialize(serde_path_to_error::Deserializer::new(&mut deserializer, &mut track))
                .map_err(|error| locate(serde_path_to_error::Error::new(track.path(), error)))?;
            keep(read, document, start, manifest)?;
        }
        offset += length.max(1);
    }
    Ok(())
}

/// A mistake of a document as a whole.
fn mistake(document: usize, line: usize, message: String) -> ManifestError {
    ManifestError { document, line, path: ".".to_owned(), message }
}

/// The reader's words without the position it appends and the path that serde_yaml puts in front: both are said once,
/// in the manifest's own terms.
fn words(error: &impl fmt::Display, path: &str) -> String {
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or_default();
    match text.split_once(": ") {
        Some((prefix, rest)) if path.starts_with(prefix) => rest.to_owned(),
        _ => text.to_owned(),
    }
}

fn keep(
    objects: Vec<Object>,
    document: usize,
    line: usize,
    manifest: &mut Manifest,
) -> Result<(), ManifestError> {
    let of_list = objects.len() > 1;
    for (i, object) in objects.iter().enumerate() {
        object.validate().map_err(|FieldError { path, message }| {
            let path = if of_list { format!("items[{i}].{path}") } else { path };
            ManifestError { document, line, path, message }
        })?;
    }
    manifest.objects.extend(objects);
    Ok(())
}

/// The lines on which YAML documents start, for errors that concern one as a whole.
fn document_lines(text: &str) -> impl Iterator<Item = usize> {
    let (mut documents, mut told) = (0, 0);
    let mut has_content = false;
    text.lines().enumerate().filter_map(move |(i, line)| {
        if line == "---" || line.starts_with("--- ") {
            documents += usize::from(has_content);
            has_content = true;
        } else if !line.trim().is_empty() && !line.trim_start().starts_with(['#', '%']) {
            has_content = true;
        } else {
            return None;
        }
        let starts = documents == told;
        told += usize::from(starts);
        starts.then_some(i + 1)
    })
}

/// The first reading: what a document, or each item of a list, is.
#[derive(Deserialize)]
struct Shape {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    #[serde(default)]
    items: Option<Vec<ItemShape>>,
}

#[derive(Deserialize)]
struct ItemShape {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
}

impl Shape {
    /// Whoever wrote a policy meant to forbid something: one under a name that is not known is not overlooked.
    fn check(&self) -> Result<(), String> {
        let items = self.items.iter().flatten().map(|item| (&item.api_version, &item.kind));
        for (api_version, kind) in items.chain([(&self.api_version, &self.kind)]) {
            if api_version.starts_with("policy.weft.dev/") && Kind::find(api_version, kind).is_none() {
                return Err(format!("there is no {kind} in {api_version}"));
            }
        }
        Ok(())
    }

    /// What to read the document as; notes what Weft does not read.
    fn reader(&self, manifest: &mut Manifest) -> Reader {
        let mut find = |api_version: &str, kind: &str| {
            let found = Kind::find(api_version, kind);
            if found.is_none() {
                manifest.ignored.insert(format!("{api_version} {kind}"));
            }
            found
        };
        match &self.items {
            Some(items) if self.kind == "List" => {
                Reader::List(items.iter().map(|item| find(&item.api_version, &item.kind)).collect())
            }
            None if self.kind == "List" => Reader::List(Vec::new()),
            _ => Reader::One(find(&self.api_version, &self.kind)),
        }
    }
}

/// The second reading: a document whose kind is known.
enum Reader {
    One(Option<Kind>),
    List(Vec<Option<Kind>>),
}

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Vec<Object>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Object>, D::Error> {
        match self {
            Self::One(kind) => Ok(KindSeed(kind).deserialize(deserializer)?.into_iter().collect()),
            Self::List(kinds) => deserializer.deserialize_map(ListVisitor(kinds)),
        }
    }
}

/// One object of a kind, or nothing of one that Weft does not read.
struct KindSeed(Option<Kind>);

impl<'de> DeserializeSeed<'de> for KindSeed {
    type Value = Option<Object>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<Object>, D::Error> {
        Ok(Some(match self.0 {
            None => return IgnoredAny::deserialize(deserializer).map(|_| None),
            Some(Kind::Namespace) => Object::Namespace(Arc::new(Deserialize::deserialize(deserializer)?)),
            Some(Kind::Pod) => Object::Pod(Arc::new(Deserialize::deserialize(deserializer)?)),
            Some(Kind::Service) => Object::Service(Arc::new(Deserialize::deserialize(deserializer)?)),
            Some(Kind::EndpointSlice) => {
                Object::EndpointSlice(Arc::new(Deserialize::deserialize(deserializer)?))
            }
            Some(Kind::Node) => Object::Node(Arc::new(Deserialize::deserialize(deserializer)?)),
            Some(Kind::ServiceCidr) => Object::ServiceCidr(Arc::new(Deserialize::deserialize(deserializer)?)),
            Some(Kind::AuthorizationPolicy) => {
                Object::AuthorizationPolicy(Arc::new(Deserialize::deserialize(deserializer)?))
            }
        }))
    }
}

/// The map of a `kind: List`, of which only `items` matters.
struct ListVisitor(Vec<Option<Kind>>);

impl<'de> Visitor<'de> for ListVisitor {
    type Value = Vec<Object>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Vec<Object>, A::Error> {
        let mut objects = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                objects = map.next_value_seed(ItemsSeed(std::mem::take(&mut self.0)))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(objects)
    }
}

struct ItemsSeed(Vec<Option<Kind>>);

impl<'de> DeserializeSeed<'de> for ItemsSeed {
    type Value = Vec<Object>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Object>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ItemsSeed {
    type Value = Vec<Object>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sequence of objects")
    }

    fn visit_unit<E>(self) -> Result<Vec<Object>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Object>, A::Error> {
        let mut objects = Vec::new();
        for kind in self.0 {
            match seq.next_element_seed(KindSeed(kind))? {
                Some(object) => objects.extend(object),
                None => break,
            }
        }
        Ok(objects)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(manifest: &Manifest) -> Vec<String> {
        manifest.objects.iter().map(|object| object.key().to_string()).collect()
    }

    fn refused(text: &str) -> ManifestError {
        match parse(text, Format::Yaml) {
            Ok(manifest) => panic!("accepted: {manifest:?}"),
            Err(error) => error,
        }
    }

    #[test]
    fn several_documents_lists_and_unknown_kinds() {
        let text = "# a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n---\n\
            apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a, namespace: shop}\n\
            - apiVersion: apps/v1\n  kind: Deployment\n  metadata: {name: A_B}\n\
            - apiVersion: v1\n  kind: Service\n  metadata: {name: b}\n---\napiVersion: v1\nkind: List\nitems:\n";
        let manifest = parse(text, Format::Yaml).unwrap();
        assert_eq!(names(&manifest), ["Namespace shop", "Pod shop/a", "Service default/b"]);
        assert_eq!(manifest.ignored.iter().collect::<Vec<_>>(), ["apps/v1 Deployment"]);
    }

    #[test]
    fn json_documents_follow_each_other() {
        let text = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop"}}
            {"kind":"List","apiVersion":"v1","items":[{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}]}
        "#;
        assert_eq!(names(&parse(text, Format::Json).unwrap()), ["Namespace shop", "Pod default/a"]);
        let error = parse("{}\n", Format::Json).unwrap_err();
        assert_eq!((error.document, error.line), (1, 1));
        let text = "{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"shop\"}}\n\
            {\"apiVersion\":\"v1\",\"kind\":\"Pod\",\n\"metadata\":{\"name\":7}}\n";
        let error = parse(text, Format::Json).unwrap_err();
        assert_eq!((error.document, error.line, error.path.as_str()), (2, 3, "metadata.name"));
        assert!(parse("{\"apiVersion\":\"v1\",\"kind\":", Format::Json).is_err());
    }

    #[test]
    fn mistakes_are_found_where_they_are() {
        let good = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n---\n";
        for (text, document, line, path, words) in [
            (
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  nodeName: [1]\n",
                2,
                11,
                "spec.nodeName",
                "invalid type",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nstatus:\n  podIP: 10.0.0.300\n",
                2,
                11,
                "status.podIP",
                "not an IP address",
            ),
            (
                "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: a\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: B\n",
                2,
                16,
                "items[1].metadata.name",
                "is not a name",
            ),
            ("kind: Pod\n", 2, 6, ".", "missing field `apiVersion`"),
            ("apiVersion: v1\nkind: Pod\nmetadata: {name: a\n", 2, 9, "metadata", "did not find"),
            ("just text\n", 2, 6, ".", "invalid type"),
            ("apiVersion: v1\nkind: Pod\n", 2, 6, ".", "missing field `metadata`"),
            ("apiVersion: policy.weft.dev/v9\nkind: AuthorizationPolicy\n", 2, 5, ".", "there is no"),
        ] {
            let error = refused(&format!("{good}{text}"));
            assert_eq!(
                (error.document, error.line, error.path.as_str()),
                (document, line, path),
                "{text}: {error}"
            );
            assert!(error.message.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn the_words_say_document_line_and_field() {
        let error = refused("apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nstatus:\n  podIP: here\n");
        assert_eq!(
            error.to_string(),
            "document 1, line 6, field status.podIP: \"here\" is not an IP address"
        );
    }

    #[test]
    fn what_a_whole_slice_gets_wrong() {
        let error = refused(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\naddressType: IPv4\n\
             endpoints: [{addresses: [fd00::1]}]\n",
        );
        assert_eq!((error.document, error.line, error.path.as_str()), (1, 1, "endpoints[0].addresses[0]"));
    }

    #[test]
    fn only_manifests_are_read() {
        for (name, format) in [
            ("a.yaml", Some(Format::Yaml)),
            ("a.yml", Some(Format::Yaml)),
            ("a.json", Some(Format::Json)),
            (".a.yaml", None),
            ("a.yaml~", None),
            (".a.yaml.swp", None),
            ("a.txt", None),
            ("yaml", None),
        ] {
            assert_eq!(Format::of(name), format, "{name}");
        }
    }
}
