//! `weft-cni`, the CNI plugin (CNI specification 1.1.0): asks the agent of its node to protect a pod before its first
//! process starts. Where the agent does not answer it asks the API server whether the pod belongs to the mesh at all: one
//! that does is not started, one that does not is not held up.
#![forbid(unsafe_code)]

mod fallback;

use std::{
    io::{Read, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use serde_json::{Value, json};
use weft_cni::{
    VERSIONS, http,
    install::Installation,
    protocol::{self, AddReply, AddRequest, ErrorReply},
    settings::Settings,
};

/// Where runtimes look for network configurations.
const CONF_DIR: &str = "/etc/cni/net.d";
/// For the agent to hear of the pod from the controller, and to protect it.
const ANSWER: Duration = Duration::from_secs(15);
const MAX_CONFIG: u64 = 1 << 20;

/// An error as the specification has it, section "Error".
#[derive(Debug)]
struct Failure {
    code: u32,
    message: String,
}

/// Section "Error": the codes used here.
const INCOMPATIBLE_VERSION: u32 = 1;
const INVALID_ENVIRONMENT: u32 = 4;
const UNREADABLE: u32 = 6;
const INVALID_CONFIG: u32 = 7;
const TRY_AGAIN_LATER: u32 = 11;
const UNAVAILABLE: u32 = 50;

impl Failure {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        // By a container runtime.
        None => plugin(),
        Some("uninstall") => uninstall(arguments.next().unwrap_or_else(|| CONF_DIR.to_owned()).into()),
        Some(_) => {
            eprintln!(
                "weft-cni is called by container runtimes (CNI 1.1.0), without arguments.\n\n\
                 weft-cni uninstall [DIR]   take it out of the network configurations in DIR ({CONF_DIR}), and remove it"
            );
            ExitCode::from(2)
        }
    }
}

/// For the day when no agent keeps the plugin in place any more.
fn uninstall(conf_dir: PathBuf) -> ExitCode {
    let own = std::env::current_exe().ok();
    let bin_dir = own.as_deref().and_then(Path::parent).unwrap_or(Path::new("/opt/cni/bin")).to_owned();
    match (Installation { conf_dir, bin_dir }).remove() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-cni: {error}");
            ExitCode::FAILURE
        }
    }
}

fn plugin() -> ExitCode {
    let mut text = String::new();
    let config = match std::io::stdin().take(MAX_CONFIG).read_to_string(&mut text) {
        Ok(_) => serde_json::from_str::<Value>(&text).map_err(|e| Failure::new(UNREADABLE, e.to_string())),
        Err(error) => Err(Failure::new(UNREADABLE, error.to_string())),
    };
    let version =
        config.as_ref().ok().and_then(|config| config["cniVersion"].as_str()).unwrap_or("1.1.0").to_owned();
    let outcome = config.and_then(|config| run(&config));
    let (answer, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(answer)) => (answer, ExitCode::SUCCESS),
        Err(Failure { code, message }) => (
            json!({"cniVersion": version, "code": code, "msg": format!("weft: {message}")}),
            ExitCode::FAILURE,
        ),
    };
    // The runtime has hung up: there is nobody to tell.
    let _ = writeln!(std::io::stdout(), "{answer}");
    code
}

fn run(config: &Value) -> Result<Option<Value>, Failure> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    match variable("CNI_COMMAND").as_str() {
        "VERSION" => {
            let version = config["cniVersion"].as_str().unwrap_or("1.1.0");
            Ok(Some(json!({"cniVersion": version, "supportedVersions": VERSIONS})))
        }
        "ADD" => {
            speaks(config)?;
            let needed = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"];
            let missing: Vec<_> = needed.into_iter().filter(|name| variable(name).is_empty()).collect();
            if !missing.is_empty() {
                return Err(Failure::new(INVALID_ENVIRONMENT, format!("not set: {}", missing.join(", "))));
            }
            add(config, &variable("CNI_ARGS"), &variable("CNI_NETNS")).map(Some)
        }
        "STATUS" => status(config).map(|()| None),
        // Nothing is kept for an attachment. What protects a pod the agent keeps in the kernel, and looks after until the
        // pod's network is gone.
        "DEL" | "GC" => Ok(None),
        // That protection outlives the agent; an agent that has just started may not know the pod again yet. A runtime may
        // take an error for a pod that is broken for good, and that is not known here. `weft check` has more to say.
        "CHECK" => Ok(None),
        other => Err(Failure::new(INVALID_ENVIRONMENT, format!("CNI_COMMAND is {other:?}"))),
    }
}

/// Whether pods can be added at all. That the agent does not answer is no reason to say no: pods outside the mesh start
/// without it, and those of the mesh are each told why they wait. Runtimes report a no as the whole node's network being
/// down. Kubernetes then keeps every pod from starting there, and evicts those that run after a while: the controller, too,
/// without which an agent cannot protect anything. After a reboot nothing would ever come up.
fn status(config: &Value) -> Result<(), Failure> {
    settings(config).map(drop).map_err(|failure| Failure { code: UNAVAILABLE, ..failure })
}

/// A configuration that names no version is from before there was one, and passes: only its form of addresses differs.
fn speaks(config: &Value) -> Result<(), Failure> {
    match config["cniVersion"].as_str() {
        None | Some("") => Ok(()),
        Some(version) if VERSIONS.contains(&version) => Ok(()),
        Some(version) => Err(Failure::new(
            INCOMPATIBLE_VERSION,
            format!("cniVersion is {version}; this plugin speaks {}", VERSIONS.join(", ")),
        )),
    }
}

fn settings(config: &Value) -> Result<Settings, Failure> {
    let path =
        config["settings"].as_str().ok_or_else(|| Failure::new(INVALID_CONFIG, "`settings` is missing"))?;
    Settings::read(&PathBuf::from(path)).map_err(|error| {
        Failure::new(
            TRY_AGAIN_LATER,
            format!("{path}: {error}; the agent of this node writes it when it starts"),
        )
    })
}

/// A variable among `CNI_ARGS`, which are `KEY=VALUE;KEY=VALUE`.
fn argument<'a>(arguments: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value).filter(|value| !value.is_empty())
}

/// Hands on the result of the plugins before, once the pod is protected or known not to need it.
fn add(config: &Value, arguments: &str, netns: &str) -> Result<Value, Failure> {
    let mut result = config["prevResult"].clone();
    if !result.is_object() {
        return Err(Failure::new(
            INVALID_CONFIG,
            "prevResult is missing: this plugin is chained after others",
        ));
    }
    result["cniVersion"] = config["cniVersion"].clone();
    let Some(pod_uid) = argument(arguments, "K8S_POD_UID") else {
        // Not a pod of Kubernetes: nobody could have labelled it.
        return match argument(arguments, "K8S_POD_NAME") {
            None => Ok(result),
            Some(_) => Err(Failure::new(
                INVALID_ENVIRONMENT,
                "CNI_ARGS has no K8S_POD_UID: is the container runtime too old?",
            )),
        };
    };
    let namespace = argument(arguments, "K8S_POD_NAMESPACE").unwrap_or_default();
    let name = argument(arguments, "K8S_POD_NAME").unwrap_or_default();
    let settings = settings(config)?;
    let request = AddRequest {
        pod_uid: pod_uid.to_owned(),
        pod: format!("{namespace}/{name}"),
        netns: netns.to_owned(),
        addresses: addresses(&result),
    };
    match ask(&settings, protocol::ADD, &request) {
        Ok(_) => Ok(result),
        Err(why) => fallback::decide(&settings, namespace, name, pod_uid, &why)
            .map(|()| result)
            .map_err(|message| Failure::new(TRY_AGAIN_LATER, message)),
    }
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}

fn ask(settings: &Settings, path: &str, request: &impl serde::Serialize) -> Result<AddReply, String> {
    let body = serde_json::to_vec(request).map_err(|error| error.to_string())?;
    let answer = http::over_socket(&settings.socket, path, &body, ANSWER).map_err(|error| {
        format!("the Weft agent of this node does not answer at {}: {error}", settings.socket.display())
    })?;
    if answer.status != 200 {
        let reason = serde_json::from_slice::<ErrorReply>(&answer.body).map(|reply| reply.error);
        return Err(format!(
            "the Weft agent of this node says: {}",
            reason.unwrap_or_else(|_| answer.status.to_string())
        ));
    }
    serde_json::from_slice(&answer.body).map_err(|error| format!("the agent's answer: {error}"))
}
