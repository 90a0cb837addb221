//! What the plugin must know and cannot be told on each call: a file that the agent writes, readable by root alone.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Where the file is, below the directory of network configurations. Runtimes do not look into directories there.
pub const FILE: &str = "weft.d/cni.json";

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The agent's socket.
    pub socket: PathBuf,
    /// The API server, `ADDRESS:PORT`, for when the agent does not answer.
    pub api_server: String,
    /// PEM of the certificates that the API server's must chain to.
    pub api_ca: String,
    /// A token that may get Pods and Namespaces.
    pub api_token: String,
    /// Namespaces whose pods start even where nobody can say whether they belong to the mesh.
    pub excluded_namespaces: Vec<String>,
}

impl Settings {
    /// Reads the file.
    pub fn read(path: &Path) -> io::Result<Settings> {
        serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::other)
    }
}
