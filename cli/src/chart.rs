//! The Helm chart in `manifests/weft`, rendered without Helm: one source for `weft install` and for those who use Helm.
//! Its templates keep to what this file understands of Helm's language: `{{ .Values.a.b }}`, the same with `toJson`,
//! `{{ .Release.Namespace }}` and `{{ .Chart.AppVersion }}`.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// The defaults, with their comments.
pub const VALUES: &str = include_str!("../../manifests/weft/values.yaml");

/// Every template, in the order in which its objects are applied.
pub const TEMPLATES: [(&str, &str); 4] = [
    ("crds.yaml", include_str!("../../manifests/weft/templates/crds.yaml")),
    ("control-rbac.yaml", include_str!("../../manifests/weft/templates/control-rbac.yaml")),
    ("control.yaml", include_str!("../../manifests/weft/templates/control.yaml")),
    ("agent.yaml", include_str!("../../manifests/weft/templates/agent.yaml")),
];

/// Settings, each of which has a default.
#[derive(Debug, Clone)]
pub struct Values(Map<String, Value>);

impl Default for Values {
    fn default() -> Self {
        Self(serde_yaml_ng::from_str(VALUES).expect("the chart's own values are a map"))
    }
}

impl Values {
    /// Lays the settings of a YAML file over these. An unknown one is an error: it would be a misspelt one.
    pub fn merge(&mut self, yaml: &str) -> Result<()> {
        let Some(over) = serde_yaml_ng::from_str::<Option<Map<String, Value>>>(yaml)? else { return Ok(()) };
        merge(&mut self.0, over, "")
    }

    /// Sets one, written `a.b=value`; the value is read as YAML.
    pub fn set(&mut self, setting: &str) -> Result<()> {
        let (path, value) = setting.split_once('=').context("expected KEY=VALUE")?;
        let value: Value = serde_yaml_ng::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        let mut over = value;
        for key in path.rsplit('.') {
            over = Value::Object(Map::from_iter([(key.to_owned(), over)]));
        }
        let Value::Object(over) = over else { bail!("expected KEY=VALUE") };
        merge(&mut self.0, over, "")
    }

    fn get(&self, path: &str) -> Option<&Value> {
        let mut keys = path.split('.');
        let first = self.0.get(keys.next()?)?;
        keys.try_fold(first, |value, key| value.get(key))
    }
}

fn merge(base: &mut Map<String, Value>, over: Map<String, Value>, at: &str) -> Result<()> {
    for (key, value) in over {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        let Some(known) = base.get_mut(&key) else {
            let others = base.keys().cloned().collect::<Vec<_>>().join(", ");
            let place = if at.is_empty() { "there is".to_owned() } else { format!("{at} has") };
            bail!("there is no setting {path}; {place}: {others}");
        };
        match (known, value) {
            // Requests and limits are Kubernetes' own, with keys of all kinds.
            (Value::Object(known), Value::Object(value)) if key != "resources" => merge(known, value, &path)?,
            (known, value) => {
                ensure!(
                    known.is_object() == value.is_object() && known.is_array() == value.is_array(),
                    "{path} is of another type: its default is {known}"
                );
                *known = value;
            }
        }
    }
    Ok(())
}

/// Fills a template in.
pub fn render(template: &str, values: &Values, namespace: &str) -> Result<String> {
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
    Ok(match value {
        Value::String(text) if !json => text,
        value => value.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let mut values = Values::default();
        values.set("image.tag=1.0").unwrap();
        values.merge("agent: {tolerations: [{key: a}]}\ncontrol: {resources: {limits: {cpu: 1}}}").unwrap();
        let text = "{{ .Release.Namespace }}:{{.Values.image.tag}} {{ toJson .Values.agent.tolerations }} \
                    {{ toJson .Values.control.resources }} {{ toJson .Values.mesh.trustDomain }}";
        let rendered = render(text, &values, "ns").unwrap();
        assert_eq!(rendered, "ns:1.0 [{\"key\":\"a\"}] {\"limits\":{\"cpu\":1}} \"cluster.local\"");
        for wrong in ["{{ .Values.image.no }}", "{{ .Values }}", "{{ if }}", "{{ .Values.image.tag"] {
            assert!(render(wrong, &values, "ns").is_err(), "{wrong}");
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
}
