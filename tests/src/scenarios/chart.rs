//! The story of the chart in `manifests/weft`: Helm and `weft install`, which reads it with an engine of its own, make the
//! same objects of it and refuse the same settings. Needs no cluster. Helm's part is the program that `HELM_BIN` names:
//! Helm's packages in `tests/kubernetes/helm`, built by `cargo xtask`, or a whole Helm.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};
use weft_testbed::Bed;
use weft_testbed::binaries::binary;
use weft_testbed::cluster::Builder;

use crate::runner::Scenario;

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "kubernetes_chart",
    "Helm and `weft install` make the same objects of the chart, and refuse the same settings",
    chart,
)];

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/weft");

/// What a person may type and both understand alike.
#[derive(Clone, Copy, Debug)]
struct Settings<'a> {
    namespace: &'a str,
    /// Content of a file of settings.
    values: &'a str,
    /// `--set` of both.
    set: &'a [&'a str],
    /// `--set-json` of Helm, `--set` of ours.
    json: &'a [&'a str],
}

const DEFAULT: Settings = Settings { namespace: "weft-system", values: "", set: &[], json: &[] };

/// Beside these, every setting is changed on its own.
const COMBINATIONS: [Settings; 4] = [
    DEFAULT,
    Settings {
        namespace: "mesh-2",
        set: &[
            "image.repository=example.org:5000/team/weft",
            "image.tag=1.10",
            "image.pullPolicy=Always",
            "mesh.trustDomain=example.org",
            "mesh.clusterId=a cluster: \"east\" #1",
            "mesh.podNetworks=",
            "mesh.serviceNetworks=fd00::/108",
            "control.log=it's",
            "control.resources.requests.cpu=2",
            "control.resources.requests.memory=null",
            "agent.log=-",
            "agent.drainDeadline=10000000",
            "agent.resources.limits.memory=64Mi",
            "agent.resources.limits.cpu=1.50",
            "cni.confDir=/etc/cni of mine: {here}",
        ],
        json: &[
            r#"control.tolerations=[]"#,
            r#"agent.tolerations=[{"key": "a", "operator": "Exists", "tolerationSeconds": 10000000}, {"key": "<&>"}]"#,
            r#"agent.resources={"requests": {"memory": "1Gi"}, "claims": [{"name": "c"}]}"#,
        ],
        ..DEFAULT
    },
    Settings {
        // A number and a boolean, were they not quoted.
        namespace: "123",
        values: r#"
mesh: {podNetworks: "10.0.0.0/8,fd00::/8", externalNetworks: 'it''s, "quoted"', clusterId: "true"}
control:
  tolerations: [{key: node, operator: Equal, value: "true", effect: NoSchedule}, {flag: true, none: null, half: 0.5}]
  resources: {limits: {cpu: 1}, requests: null}
agent:
  drainDeadline: 12345678
  log: |
    info,
      proxy=debug
"#,
        ..DEFAULT
    },
    Settings {
        namespace: "true",
        values: "mesh: {clusterDomain: a}",
        set: &["mesh.clusterDomain=b"],
        ..DEFAULT
    },
];

/// Settings that do not exist or are of another type.
const REFUSED_SET: [&str; 10] = [
    "nothing=a",
    "mesh.trustdomain=a",
    "mesh.trustDomain.name=a",
    "mesh=a",
    "mesh=null",
    "agent.tolerations=a",
    "agent.tolerations=null",
    "agent.resources=a",
    "agent.drainDeadline=soon",
    "agent.drainDeadline=7.5",
];
const REFUSED_VALUES: [&str; 7] = [
    "image: {tag: 1.10}",
    "image: {tag: null}",
    "image: {digest: a}",
    "mesh: [trustDomain]",
    "control: {log: true}",
    "agent: {drainDeadline: '7'}",
    "agent: {tolerations: {operator: Exists}}",
];

fn chart(cluster: Builder) -> Result<()> {
    let engines = Engines::new(&Bed::new(cluster.name())?)?;
    engines.lint()?;
    for settings in COMBINATIONS {
        engines.agree(&settings).with_context(|| format!("{settings:#?}"))?;
    }
    engines.every_setting_alone()?;
    for setting in REFUSED_SET {
        engines.both_refuse(&Settings { set: &[setting], ..DEFAULT }).context(setting)?;
    }
    for values in REFUSED_VALUES {
        engines.both_refuse(&Settings { values, ..DEFAULT }).context(values)?;
    }
    Ok(())
}

/// Both readers of the chart.
struct Engines {
    helm: PathBuf,
    weft: PathBuf,
    values: PathBuf,
}

impl Engines {
    fn new(bed: &Bed) -> Result<Engines> {
        let helm = std::env::var_os("HELM_BIN").context(
            "HELM_BIN is not set: run `cargo xtask test kubernetes_chart`, which builds the program",
        )?;
        let values = bed.dir().join("values.yaml");
        Ok(Engines { helm: helm.into(), weft: binary("weft")?.into(), values })
    }

    /// What `helm lint` finds wrong with the chart, warnings included.
    fn lint(&self) -> Result<()> {
        let output = Command::new(&self.helm).args(["lint", CHART, "--strict"]).output().context("helm")?;
        ensure!(
            output.status.success(),
            "helm lint: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    fn helm(&self, settings: &Settings) -> Result<String> {
        let arguments = self.arguments(settings, "--set-json")?;
        run(Command::new(&self.helm).args(["template", "weft", CHART]).args(arguments))
    }

    fn weft(&self, settings: &Settings) -> Result<String> {
        let arguments = self.arguments(settings, "--set")?;
        run(Command::new(&self.weft).arg("install").args(arguments))
    }

    fn arguments(&self, settings: &Settings, json: &str) -> Result<Vec<OsString>> {
        std::fs::write(&self.values, settings.values)?;
        let mut arguments: Vec<OsString> = vec!["--namespace".into(), settings.namespace.into()];
        arguments.extend(["--values".into(), self.values.clone().into()]);
        // JSON first: so Helm lays them over each other, whatever their order.
        for (flag, settings) in [(json, settings.json), ("--set", settings.set)] {
            arguments.extend(settings.iter().flat_map(|setting| [flag.into(), setting.into()]));
        }
        Ok(arguments)
    }

    /// Makes sure that both make the same objects, and returns them.
    fn agree(&self, settings: &Settings) -> Result<BTreeMap<String, Value>> {
        let helm = objects(&self.helm(settings)?).context("Helm's objects")?;
        let mut weft = objects(&self.weft(settings)?).context("the objects of weft install")?;
        // Helm makes the namespace itself where it is asked to.
        let namespace = format!("v1 Namespace {}", settings.namespace);
        ensure!(weft.remove(&namespace).is_some(), "weft install makes no {namespace}");
        // And keeps an installation's settings in its own way.
        let kept = format!("v1 ConfigMap {}/weft-settings", settings.namespace);
        ensure!(weft.remove(&kept).is_some(), "weft install makes no {kept}");
        let found = differences(&helm, &weft);
        ensure!(found.is_empty(), "Helm and weft install differ:\n  {}", found.join("\n  "));
        ensure!(helm.len() >= 10, "the chart has only {} objects", helm.len());
        Ok(helm)
    }

    /// Changes every setting of the chart to something awkward of its type, which must reach an object.
    fn every_setting_alone(&self) -> Result<()> {
        let path = Path::new(CHART).join("values.yaml");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let defaults: Value = serde_yaml_ng::from_str(&text)?;
        let untouched = self.agree(&DEFAULT)?;
        for (path, default) in settings_of(&defaults) {
            let mut values = awkward(&path, &default)?;
            for key in path.rsplit('.') {
                values = Value::Object(Map::from_iter([(key.to_owned(), values)]));
            }
            let values = values.to_string();
            let objects =
                self.agree(&Settings { values: &values, ..DEFAULT }).with_context(|| values.clone())?;
            ensure!(objects != untouched, "{values} changes no object: no template reads {path}");
        }
        Ok(())
    }

    /// Makes sure that both refuse the settings, because of what they are.
    fn both_refuse(&self, settings: &Settings) -> Result<()> {
        let reasons = [
            ("Helm", self.helm(settings), &["specifications of the schema"][..]),
            ("weft install", self.weft(settings), &["there is no setting", "is to be of type"]),
        ];
        for (who, result, expected) in reasons {
            let Err(error) = result else { bail!("{who} takes it") };
            let text = format!("{error:#}");
            ensure!(expected.iter().any(|words| text.contains(words)), "{who} refuses it with: {text}");
        }
        Ok(())
    }
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| program.clone())?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?)
}

/// Every setting with its default. Requests and limits are one: what they hold is Kubernetes' own.
fn settings_of(defaults: &Value) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for (section, settings) in defaults.as_object().into_iter().flatten() {
        for (key, default) in settings.as_object().into_iter().flatten() {
            found.push((format!("{section}.{key}"), default.clone()));
        }
    }
    found
}

/// A value of the default's type.
fn awkward(path: &str, default: &Value) -> Result<Value> {
    Ok(match default {
        // Parts of a reference to an image, where nobody can have quotes.
        Value::String(_) if ["image.repository", "image.tag"].contains(&path) => json!("0: it's {a} #1, [b]"),
        Value::String(_) => json!("a: \"it's\" \\ #1\n\té <&>\u{2028} {{ .Release.Name }}, [b] {c: d}\n"),
        Value::Number(_) => json!(123_456_789),
        Value::Bool(on) => json!(!on),
        Value::Array(_) => json!([{"key": "a: b", "tolerationSeconds": 10_000_000, "on": true}, "c"]),
        Value::Object(_) => {
            json!({"limits": {"cpu": 0.25, "example.org/device": 1}, "claims": [{"name": "yes"}]})
        }
        Value::Null => bail!("{path} has no default"),
    })
}

/// The objects of a stream of YAML documents, by apiVersion, kind, namespace and name.
fn objects(yaml: &str) -> Result<BTreeMap<String, Value>> {
    let mut objects = BTreeMap::new();
    for document in serde_yaml_ng::Deserializer::from_str(yaml) {
        let object: Value = serde::Deserialize::deserialize(document)?;
        if object.is_null() {
            continue;
        }
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let metadata = &object["metadata"];
        let key = text(&object["apiVersion"]).zip(text(&object["kind"])).zip(text(&metadata["name"]));
        let ((version, kind), name) = key.with_context(|| {
            let [version, kind] = ["apiVersion", "kind"].map(|field| &object[field]);
            format!("no object: apiVersion {version}, kind {kind}, name {}", metadata["name"])
        })?;
        let namespace = match &metadata["namespace"] {
            Value::Null => String::new(),
            Value::String(namespace) => format!("{namespace}/"),
            other => bail!("{kind} {name} is in the namespace {other}, which is no text"),
        };
        let key = format!("{version} {kind} {namespace}{name}");
        ensure!(objects.insert(key.clone(), object).is_none(), "{key} is there twice");
    }
    Ok(objects)
}

/// One line for each object or field that is not the same.
fn differences(helm: &BTreeMap<String, Value>, weft: &BTreeMap<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    for key in helm.keys().chain(weft.keys()).collect::<BTreeSet<_>>() {
        compare(helm.get(key), weft.get(key), key, &mut found);
    }
    found
}

fn compare(helm: Option<&Value>, weft: Option<&Value>, at: &str, found: &mut Vec<String>) {
    match (helm, weft) {
        (Some(Value::Object(helm)), Some(Value::Object(weft))) => {
            for key in helm.keys().chain(weft.keys()).collect::<BTreeSet<_>>() {
                compare(helm.get(key), weft.get(key), &format!("{at} .{key}"), found);
            }
        }
        (Some(Value::Array(helm)), Some(Value::Array(weft))) => {
            for i in 0..helm.len().max(weft.len()) {
                compare(helm.get(i), weft.get(i), &format!("{at} [{i}]"), found);
            }
        }
        (helm, weft) if helm == weft => {}
        (helm, weft) => {
            let say = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
            found.push(format!("{at}: Helm has {}, weft install has {}", say(helm), say(weft)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found() {
        let parse = |yaml: &str| objects(yaml).expect(yaml);
        let one = parse(
            "---\n# nothing\n---\napiVersion: v1\nkind: A\nmetadata: {name: a, namespace: n}\nx: [1, {y: 2}]",
        );
        assert_eq!(one.keys().collect::<Vec<_>>(), ["v1 A n/a"]);
        for (other, expected) in [
            ("{apiVersion: v1, kind: A, metadata: {namespace: n, name: a}, x: [1, {y: 2}]}", vec![]),
            (
                "{apiVersion: v1, kind: A, metadata: {namespace: n, name: a}, x: [1, {y: '2'}, 3], z: null}",
                vec![
                    "v1 A n/a .x [1] .y: Helm has 2, weft install has \"2\"",
                    "v1 A n/a .x [2]: Helm has nothing, weft install has 3",
                    "v1 A n/a .z: Helm has nothing, weft install has null",
                ],
            ),
        ] {
            assert_eq!(differences(&one, &parse(other)), expected, "{other}");
        }
        let moved = parse("{apiVersion: v1, kind: A, metadata: {name: a}}");
        assert_eq!(differences(&one, &moved).len(), 2);
        for wrong in ["{kind: A}", "a", "{apiVersion: v1, kind: A, metadata: {name: a, namespace: 1}}"] {
            assert!(objects(wrong).is_err(), "{wrong}");
        }
    }
}
