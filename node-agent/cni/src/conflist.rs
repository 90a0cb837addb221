//! Getting into a list of network plugins, and out of it. Pure: text in, text out. Everything else in the list stays as it
//! is, fields that nobody here knows included.

use std::path::Path;

use serde_json::{Value, json};

use crate::{PLUGIN, VERSIONS};

/// Why a configuration cannot be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    #[error("is no JSON: {0}")]
    Json(String),
    #[error("is no list of plugins; only .conflist files can be chained")]
    NoList,
    #[error("has cniVersion {0}, with which plugins cannot be chained; 0.3.1 to 1.1.0 can")]
    Version(String),
}

/// The list with our plugin last, or None where it is there already, just so.
pub fn insert(text: &str, settings: &Path) -> Result<Option<String>, ConflistError> {
    let mut list = parse(text)?;
    // Every pod of the node would fail, those outside the mesh too.
    if let Some(version) = list["cniVersion"].as_str().filter(|v| !v.is_empty() && !VERSIONS.contains(v)) {
        return Err(ConflistError::Version(version.to_owned()));
    }
    let ours = json!({"type": PLUGIN, "settings": settings});
    let plugins = plugins(&mut list)?;
    if plugins.last() == Some(&ours) && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1 {
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(ours);
    Ok(Some(print(&list)))
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

    #[test]
    fn what_is_no_list_is_left_alone() {
        for text in ["", "[]", "{}", r#"{"type": "bridge"}"#, r#"{"plugins": 1}"#] {
            assert!(insert(text, Path::new("/s")).is_err(), "{text}");
            assert!(remove(text).is_err(), "{text}");
        }
    }
}
