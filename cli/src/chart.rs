//! The Helm chart in `manifests/weft`, rendered without Helm: one source for `weft install` and for those who use Helm.
//! Its templates keep to what this file understands of Helm's language: `{{ .Values.a.b }}` for strings, `{{ toJson
//! .Values.a.b }}` for any value, and the same of `.Release.Namespace` and `.Chart.AppVersion`. Everything else is an error
//! here, so that nothing can mean one thing to Helm and another to us; the scenario `kubernetes_chart` compares the two.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The defaults, with their comments.
pub const VALUES: &str = include_str!("../../manifests/weft/values.yaml");

/// The ConfigMap that holds what an installation's settings differ in from the defaults.
pub const SETTINGS: &str = "weft-settings";

/// Every template, in the order in which its objects are applied.
pub const TEMPLATES: [(&str, &str); 4] = [
    ("crds.yaml", include_str!("../../manifests/weft/templates/crds.yaml")),
    ("control-rbac.yaml", include_str!("../../manifests/weft/templates/control-rbac.yaml")),
    ("control.yaml", include_str!("../../manifests/weft/templates/control.yaml")),
    ("agent.yaml", include_str!("../../manifests/weft/templates/agent.yaml")),
];

/// How commands are told settings.
#[derive(Debug, Clone, Default, Args)]
pub struct Settings {
    /// YAML file with settings that differ from the defaults; may be given several times, the last one wins.
    #[arg(short = 'f', long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// One setting, as in mesh.trustDomain=example.org; wins over files. The value is all that follows the sign, commas
    /// included.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Settings {
    /// The defaults with these laid over them.
    pub fn values(&self) -> Result<Values> {
        let mut values = Values::default();
        self.apply(&mut values)?;
        Ok(values)
    }

    /// Lays these over `values`.
    pub fn apply(&self, values: &mut Values) -> Result<()> {
        for path in &self.values {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            values.merge(&text).with_context(|| path.display().to_string())?;
        }
        for setting in &self.set {
            values.set(setting).with_context(|| format!("--set {setting}"))?;
        }
        Ok(())
    }
}

/// Settings, each of which has a default.
#[derive(Debug, Clone)]
pub struct Values {
    all: Map<String, Value>,
    /// What was laid over the defaults.
    changed: Map<String, Value>,
}

impl Default for Values {
    fn default() -> Self {
        let all = serde_yaml_ng::from_str(VALUES).expect("the chart's own values are a map");
        Self { all, changed: Map::new() }
    }
}

impl Values {
    /// Lays the settings of a YAML file over these. An unknown one is an error: it would be a misspelt one.
    pub fn merge(&mut self, yaml: &str) -> Result<()> {
        let Some(over) = serde_yaml_ng::from_str::<Option<Map<String, Value>>>(yaml)? else { return Ok(()) };
        self.lay(over)
    }

    fn lay(&mut self, over: Map<String, Value>) -> Result<()> {
        overlay(&mut self.changed, over.clone());
        merge(&mut self.all, over, "")
    }

    /// Sets one, written `a.b=value`. What is a string takes the text as it stands, so that a tag may be 1.10 and a list
    /// of networks has its commas; for the others it is a number, a boolean, or YAML in brackets or braces.
    pub fn set(&mut self, setting: &str) -> Result<()> {
        let (path, text) = setting.split_once('=').context("expected KEY=VALUE")?;
        let mut over = match self.get(path) {
            Some(Value::String(_)) if !is_free(path) => Value::String(text.to_owned()),
            _ => typed(text)?,
        };
        for key in path.rsplit('.') {
            over = Value::Object(Map::from_iter([(key.to_owned(), over)]));
        }
        let Value::Object(over) = over else { bail!("expected KEY=VALUE") };
        self.lay(over)
    }

    /// A setting that is text.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.get(path)?.as_str()
    }

    fn get(&self, path: &str) -> Option<&Value> {
        let mut keys = path.split('.');
        let first = self.all.get(keys.next()?)?;
        keys.try_fold(first, |value, key| value.get(key))
    }
}

/// Requests and limits are Kubernetes' own, with keys and values of all kinds.
fn is_free(path: &str) -> bool {
    path.split('.').any(|key| key == "resources")
}

/// The scalars of Helm's `--set`, which takes 1.5 for a string as Kubernetes' quantities want it; and YAML's lists and maps.
fn typed(text: &str) -> Result<Value> {
    if text.starts_with(['[', '{']) {
        return Ok(serde_yaml_ng::from_str(text)?);
    }
    Ok(match text {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        _ if text.starts_with('0') && text != "0" => text.into(),
        _ => text.parse::<i64>().map_or_else(|_| text.into(), Value::from),
    })
}

fn merge(base: &mut Map<String, Value>, over: Map<String, Value>, at: &str) -> Result<()> {
    for (key, value) in over {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        let Some(known) = base.get_mut(&key) else {
            let others = base.keys().cloned().collect::<Vec<_>>().join(", ");
            let place = if at.is_empty() { "there is".to_owned() } else { format!("{at} has") };
            bail!("there is no setting {path}; {place}: {others}");
        };
        let expected = type_of(known);
        ensure!(
            type_of(&value) == expected,
            "{path} is to be of type {expected}, not {}: its default is {known}",
            type_of(&value)
        );
        match (known, value) {
            (Value::Object(known), Value::Object(value)) if is_free(&path) => merge_free(known, value),
            (Value::Object(known), Value::Object(value)) => merge(known, value, &path)?,
            (known, value) => *known = value,
        }
    }
    Ok(())
}

/// Maps are merged; everything else replaces what was there.
fn overlay(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Object(known)), Value::Object(value)) => overlay(known, value),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// As Helm does it: maps are merged, and null takes a default away.
fn merge_free(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Object(known)), Value::Object(value)) => merge_free(known, value),
            (Some(_), Value::Null) => drop(base.remove(&key)),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// The name of a value's type in a JSON schema.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Everything that is installed, as YAML. In the order in which it can be applied.
pub fn manifest(values: &Values, namespace: &str) -> Result<String> {
    let mut text = namespace_object(namespace);
    // Helm keeps settings in its own way, so the chart has no such object.
    let settings = serde_json::json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": SETTINGS, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "weft"}},
        "data": {"settings": Value::from(values.changed.clone()).to_string()},
    });
    text.push_str(&format!(
        "---\n# What differs from the defaults, for weft upgrade.\n{}",
        serde_yaml_ng::to_string(&settings)?
    ));
    for (name, template) in TEMPLATES {
        let rendered = render(template, values, namespace).with_context(|| name.to_string())?;
        text.push_str(&format!("---\n# {name}\n{}\n", rendered.trim()));
    }
    Ok(text)
}

/// The same, object by object.
pub fn objects(values: &Values, namespace: &str) -> Result<Vec<Value>> {
    let text = manifest(values, namespace)?;
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    documents.map(|document| Ok(Value::deserialize(document)?)).collect()
}

/// Helm makes the namespace itself, so the chart has none. The agent needs more than any restricted profile allows.
fn namespace_object(name: &str) -> String {
    // Quoted: 123 would be a number.
    let name = Value::from(name);
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels:\n    weft.dev/mesh: disabled\n    \
         pod-security.kubernetes.io/enforce: privileged\n"
    )
}

/// Fills a template in.
fn render(template: &str, values: &Values, namespace: &str) -> Result<String> {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (expression, after) = after.split_once("}}").context("an expression has no end")?;
        out.push_str(before);
        out.push_str(&evaluate(expression.trim(), values, namespace)?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

fn evaluate(expression: &str, values: &Values, namespace: &str) -> Result<String> {
    let (json, reference) = match expression.strip_prefix("toJson ") {
        Some(reference) => (true, reference.trim()),
        None => (false, expression),
    };
    let value = match reference {
        ".Release.Namespace" => Value::String(namespace.to_owned()),
        ".Chart.AppVersion" => Value::String(env!("CARGO_PKG_VERSION").to_owned()),
        _ => {
            let path = reference.strip_prefix(".Values.");
            let path = path.with_context(|| format!("{{{{ {expression} }}}} is not understood"))?;
            values.get(path).with_context(|| format!("there is no setting {path}"))?.clone()
        }
    };
    match value {
        value if json => Ok(value.to_string()),
        Value::String(text) => Ok(text),
        // Helm writes a file's 10000000 as 1e+07, and maps as Go does.
        _ => bail!("{{{{ {expression} }}}} is no string, and needs toJson"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SCHEMA: &str = include_str!("../../manifests/weft/values.schema.json");

    #[test]
    fn expressions() {
        let mut values = Values::default();
        values.set("image.tag=1.0").unwrap();
        values.merge("agent: {tolerations: [{key: a}]}\nmesh: {trustDomain: \"a: \\\"b\\\"\"}").unwrap();
        let text = "{{ .Release.Namespace }}:{{.Values.image.tag}} {{ toJson .Values.agent.tolerations }} \
                    {{ toJson .Values.agent.drainDeadline }} {{ toJson .Values.mesh.trustDomain }}";
        let rendered = render(text, &values, "ns").unwrap();
        assert_eq!(rendered, "ns:1.0 [{\"key\":\"a\"}] 30 \"a: \\\"b\\\"\"");
        for wrong in [
            "{{ .Values.image.no }}",
            "{{ .Values }}",
            "{{ if }}",
            "{{ .Values.image.tag",
            "{{- .Values.image.tag }}",
            "{{ .Values.image.tag | quote }}",
            "{{ .Values.agent.drainDeadline }}",
            "{{ .Values.agent.tolerations }}",
        ] {
            assert!(render(wrong, &values, "ns").is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_have_the_types_of_their_defaults() {
        for (setting, expected) in [
            ("image.tag=1.10", Some("\"1.10\"")),
            ("image.tag=", Some("\"\"")),
            ("mesh.podNetworks=10.0.0.0/8,fd00::/8", Some("\"10.0.0.0/8,fd00::/8\"")),
            ("mesh.clusterId=a=b: \"c\"", Some("\"a=b: \\\"c\\\"\"")),
            ("mesh.clusterId=true", Some("\"true\"")),
            ("agent.drainDeadline=7", Some("7")),
            ("agent.drainDeadline=7.5", None),
            ("agent.drainDeadline=", None),
            ("agent.drainDeadline=null", None),
            ("agent.tolerations=[]", Some("[]")),
            ("agent.tolerations=[{key: a}]", Some("[{\"key\":\"a\"}]")),
            ("agent.tolerations=a", None),
            ("agent.tolerations={}", None),
            (
                "control.resources={limits: {cpu: 1}}",
                Some("{\"limits\":{\"cpu\":1},\"requests\":{\"cpu\":\"50m\",\"memory\":\"64Mi\"}}"),
            ),
            ("control.resources.requests.cpu=null", Some("{\"requests\":{\"memory\":\"64Mi\"}}")),
            ("control.resources.requests=null", Some("{}")),
            ("control.resources.requests.cpu=2", Some("{\"requests\":{\"cpu\":2,\"memory\":\"64Mi\"}}")),
            (
                "control.resources.requests.cpu=1.50",
                Some("{\"requests\":{\"cpu\":\"1.50\",\"memory\":\"64Mi\"}}"),
            ),
            ("control.resources=null", None),
            ("mesh=null", None),
        ] {
            let mut values = Values::default();
            let result = values.set(setting);
            let path = setting.split_once('=').unwrap().0;
            let path = path.find("resources").map_or(path, |at| &path[..at + "resources".len()]);
            let value = result.is_ok().then(|| values.get(path).unwrap().to_string());
            assert_eq!(value.as_deref(), expected, "{setting}: {result:?}");
        }
        for wrong in ["image: {tag: 1.10}", "image: {tag: null}", "agent: {drainDeadline: '7'}", "mesh: []"] {
            assert!(Values::default().merge(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_misspelt_setting_is_an_error() {
        let mut values = Values::default();
        for wrong in ["mesh.trustdomain=a", "image=a", "agent.tolerations=a", "nothing", "a.b.c=1"] {
            assert!(values.set(wrong).is_err(), "{wrong}");
        }
        assert!(values.merge("mesh:\n  nothing: 1").unwrap_err().to_string().contains("mesh.nothing"));
        assert!(values.merge("").is_ok());
    }
    /// Helm checks values by the schema, we by the defaults: both must refuse the same.
    #[test]
    fn the_schema_says_what_the_defaults_say() {
        fn schema(value: &Value, path: &str) -> Value {
            let mut said = json!({"type": type_of(value)});
            if let Value::Object(map) = value
                && !is_free(path)
            {
                let properties: Map<_, _> = map
                    .iter()
                    .map(|(key, value)| (key.clone(), schema(value, &format!("{path}.{key}"))))
                    .collect();
                said["required"] = properties.keys().cloned().collect();
                said["properties"] = properties.into();
                said["additionalProperties"] = false.into();
            }
            said
        }
        let mut expected = schema(&Value::Object(Values::default().all), "");
        expected["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
        // What Helm gives to every chart that is a part of another.
        expected["properties"]["global"] = json!({"type": "object"});
        let found: Value = serde_json::from_str(SCHEMA).unwrap();
        assert!(
            found == expected,
            "manifests/weft/values.schema.json should be:\n{}",
            serde_json::to_string_pretty(&expected).unwrap()
        );
    }

    #[test]
    fn the_chart_is_of_this_version() {
        let chart: Value = serde_yaml_ng::from_str(include_str!("../../manifests/weft/Chart.yaml")).unwrap();
        assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    }
}
