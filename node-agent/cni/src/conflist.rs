//! Getting into a list of network plugins, and out of it; and making a list of a configuration that is none. Pure: text in,
//! text out. Everything else stays as it is, fields that nobody here knows included.

use std::path::Path;

use serde_json::{Value, json};

use crate::{PLUGIN, VERSIONS};

/// Why a configuration cannot be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    #[error("is no JSON: {0}")]
    Json(String),
    #[error("is no list of plugins")]
    NoList,
    #[error("names no plugin: `type` is missing")]
    NoPlugin,
    #[error("has cniVersion {0}, with which plugins cannot be chained; 0.3.1 to 1.1.0 can")]
    Version(String),
}

/// The list with our plugin last, or None where it is there already, just so.
pub fn insert(text: &str, settings: &Path) -> Result<Option<String>, ConflistError> {
    let mut list = parse(text)?;
    Ok(put_last(&mut list, settings)?.then(|| print(&list)))
}

/// A list of the one plugin that this configuration is, with ours after it. It means what the configuration means: see
/// ConfListFromConf in libcni.
pub fn wrap(text: &str, settings: &Path) -> Result<String, ConflistError> {
    let plugin = parse(text)?;
    if !plugin["type"].is_string() {
        return Err(ConflistError::NoPlugin);
    }
    let mut list = json!({"name": plugin["name"].as_str().unwrap_or_default()});
    if let Some(version) = plugin.get("cniVersion") {
        list["cniVersion"] = version.clone();
    }
    list["plugins"] = json!([plugin]);
    put_last(&mut list, settings)?;
    Ok(print(&list))
}

/// Whether the list has this configuration of one plugin in it, as it is now, whatever else is in the list.
pub fn wraps(list: &str, text: &str) -> bool {
    let (Ok(mut list), Ok(plugin)) = (parse(list), parse(text)) else { return false };
    let same = ["name", "cniVersion"].iter().all(|field| list[*field].as_str() == plugin[*field].as_str());
    same && plugins(&mut list).is_ok_and(|plugins| plugins.contains(&plugin))
}

/// Puts our plugin last; false where it is already.
fn put_last(list: &mut Value, settings: &Path) -> Result<bool, ConflistError> {
    // Every pod of the node would fail, those outside the mesh too.
    if let Some(version) = list["cniVersion"].as_str().filter(|v| !v.is_empty() && !VERSIONS.contains(v)) {
        return Err(ConflistError::Version(version.to_owned()));
    }
    let ours = json!({"type": PLUGIN, "settings": settings});
    let plugins = plugins(list)?;
    if plugins.last() == Some(&ours) && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1 {
        return Ok(false);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(ours);
    Ok(true)
}

/// The list without our plugin, or None where it is not there.
pub fn remove(text: &str) -> Result<Option<String>, ConflistError> {
    let mut list = parse(text)?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    Ok((plugins.len() != before).then(|| print(&list)))
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn parse(text: &str) -> Result<Value, ConflistError> {
    serde_json::from_str(text).map_err(|error| ConflistError::Json(error.to_string()))
}

fn plugins(list: &mut Value) -> Result<&mut Vec<Value>, ConflistError> {
    list.get_mut("plugins").and_then(Value::as_array_mut).ok_or(ConflistError::NoList)
}

fn print(list: &Value) -> String {
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "net", "new-field": {"b": 1, "a": 2},
        "plugins": [{"type": "bridge", "x": [1]}, {"type": "portmap"}]}"#;

    #[test]
    fn goes_in_last_once_and_comes_out_again() {
        let settings = Path::new("/etc/cni/net.d/weft.d/cni.json");
        let inserted = insert(LIST, settings).unwrap().unwrap();
        let list: Value = serde_json::from_str(&inserted).unwrap();
        let types: Vec<_> = list["plugins"].as_array().unwrap().iter().map(|p| p["type"].clone()).collect();
        assert_eq!(types, ["bridge", "portmap", "weft-cni"]);
        assert_eq!(list["new-field"], json!({"b": 1, "a": 2}));
        assert_eq!(insert(&inserted, settings).unwrap(), None, "twice");
        let removed: Value = serde_json::from_str(&remove(&inserted).unwrap().unwrap()).unwrap();
        assert_eq!(removed, serde_json::from_str::<Value>(LIST).unwrap());
        assert_eq!(remove(LIST).unwrap(), None);
    }

    #[test]
    fn comes_last_again_after_others_and_with_new_settings() {
        let inserted = insert(LIST, Path::new("/old")).unwrap().unwrap();
        let mut list: Value = serde_json::from_str(&inserted).unwrap();
        list["plugins"].as_array_mut().unwrap().push(json!({"type": "bandwidth"}));
        let again: Value =
            serde_json::from_str(&insert(&list.to_string(), Path::new("/new")).unwrap().unwrap()).unwrap();
        let plugins = again["plugins"].as_array().unwrap();
        assert_eq!(plugins.len(), 4);
        assert_eq!(plugins[3], json!({"type": "weft-cni", "settings": "/new"}));
    }

    #[test]
    fn a_list_that_cannot_chain_is_refused() {
        for (version, goes_in) in
            [("0.2.0", false), ("1.2.0", false), ("0.3.1", true), ("1.1.0", true), ("", true)]
        {
            let mut list: Value = serde_json::from_str(LIST).unwrap();
            list["cniVersion"] = json!(version);
            assert_eq!(insert(&list.to_string(), Path::new("/s")).is_ok(), goes_in, "{version:?}");
        }
    }

    const LONE: &str = r#"{"cniVersion": "0.4.0", "name": "net", "type": "bridge", "new-field": {"b": 1},
        "capabilities": {"portMappings": true}}"#;

    #[test]
    fn a_lone_plugin_becomes_a_list_that_means_the_same() {
        let settings = Path::new("/s");
        let wrapped = wrap(LONE, settings).unwrap();
        let list: Value = serde_json::from_str(&wrapped).unwrap();
        let lone: Value = serde_json::from_str(LONE).unwrap();
        let ours = json!({"type": "weft-cni", "settings": "/s"});
        assert_eq!(list, json!({"cniVersion": "0.4.0", "name": "net", "plugins": [lone, ours]}));
        assert_eq!(insert(&wrapped, settings).unwrap(), None);
        // As libcni has it where they are missing: no version, and an empty name.
        let list: Value = serde_json::from_str(&wrap(r#"{"type": "bridge"}"#, settings).unwrap()).unwrap();
        assert_eq!(list, json!({"name": "", "plugins": [{"type": "bridge"}, ours]}));
        for (text, why) in [
            (LONE.replace("0.4.0", "0.2.0"), ConflistError::Version("0.2.0".to_owned())),
            (LIST.to_owned(), ConflistError::NoPlugin),
            ("[]".to_owned(), ConflistError::NoPlugin),
        ] {
            assert_eq!(wrap(&text, settings), Err(why), "{text}");
        }
    }

    #[test]
    fn a_list_is_known_as_made_of_a_lone_plugin_until_that_changes() {
        let wrapped = wrap(LONE, Path::new("/s")).unwrap();
        assert!(wraps(&wrapped, LONE));
        let mut list: Value = serde_json::from_str(&wrapped).unwrap();
        list["plugins"].as_array_mut().unwrap().insert(1, json!({"type": "bandwidth"}));
        assert!(wraps(&list.to_string(), LONE), "somebody else is chained, too");
        for (old, new) in
            [("0.4.0", "1.0.0"), (r#""net""#, r#""other""#), ("bridge", "ptp"), ("true", "false")]
        {
            assert!(!wraps(&wrapped, &LONE.replace(old, new)), "{new}");
        }
        for text in ["", "{", "{}"] {
            assert!(!wraps(&wrapped, text) && !wraps(text, LONE), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_list_is_left_alone() {
        for text in ["", "[]", "{}", r#"{"type": "bridge"}"#, r#"{"plugins": 1}"#] {
            assert!(insert(text, Path::new("/s")).is_err(), "{text}");
            assert!(remove(text).is_err(), "{text}");
        }
    }
}
