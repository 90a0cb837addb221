//! `weft-agent`: carries the traffic of this node's enrolled pods. Reads the settings and wires the parts; the life of a
//! connection is in `worker`, `outbound` and `inbound`, what the controller says in `state`, which pods are enrolled in
//! `enroll`.
#![forbid(unsafe_code)]

mod admin;
mod affinity;
mod authorization;
mod cni;
mod config;
mod connection;
mod controller;
mod convert;
mod enroll;
mod existing;
mod http;
mod identities;
mod inbound;
mod kubelet;
mod logging;
mod metrics;
mod outbound;
mod place;
mod pod;
mod prepare;
mod seen;
mod state;
mod succession;
mod trust;
mod worker;

use std::{collections::BTreeSet, process::ExitCode, sync::Arc};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tracing::{debug, info, warn};
use weft_api::agent::{KubeletStatus, PluginStatus};
use weft_kernel::{Kernel, Options, preflight};
use weft_proto::node::EnrollmentReport;
use weft_transport::Limits;

use crate::{
    config::{Config, Settings},
    controller::Controller,
    enroll::{Enroller, Enrollment},
    metrics::Metrics,
    seen::Seen,
    state::Snapshot,
    worker::{Shared, Workers},
};

/// Gives memory back after a burst, which the C library's allocator does not; how soon is set in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The agent of one node: carries the traffic of enrolled pods over mutual TLS.
#[derive(Parser)]
#[command(
    name = "weft-agent",
    version,
    after_help = "Examples:\n  \
        weft-agent --node east --control 10.0.0.1:15012 --control-ca root.pem --token-file token\n  \
        weft-agent preflight\n  \
        curl --unix-socket /run/weft/agent.sock http://agent/config_dump"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Subcommand)]
enum Command {
    /// Print what this kernel offers of what the agent needs; exit status 1 where something is missing
    Preflight(KernelFlags),
    /// Ask the agent in this container whether it is ready; for a probe
    Ready(Admin),
    /// Print what the agent of this node says of itself, as JSON; `weft check` reads it
    Status(Admin),
    /// Take the CNI plugin out of this node's network configuration, and have the kernel's part removed when the agent
    /// stops. For an uninstallation, once no pod of the node is in the mesh; refused before
    Retire(Admin),
    /// Let this node believe the controller again although its state is older than what the node has seen. For after a
    /// cluster's store was restored from a back-up
    ForgetVersions(Admin),
    /// Take every pod of this node out of the mesh at once: removes the pinned kernel programs and maps. For a node
    /// whose agent is gone for good; new connections are plain TCP from then on
    BreakGlass(KernelFlags),
}

#[derive(clap::Args)]
struct Admin {
    /// The agent's admin socket
    #[arg(long, env = "WEFT_ADMIN_SOCKET", default_value = config::ADMIN_SOCKET, value_name = "PATH")]
    admin_socket: std::path::PathBuf,
}

#[derive(clap::Args)]
struct KernelFlags {
    /// Name under which the kernel programs and maps are pinned
    #[arg(long, env = "WEFT_INSTANCE", default_value = "weft")]
    instance: String,
    /// Where bpffs is mounted
    #[arg(long, env = "WEFT_BPFFS", default_value = "/sys/fs/bpf", value_name = "DIR")]
    bpffs: std::path::PathBuf,
    /// The kubelet's cgroup2 cgroup [default: found by the kubelet's process]
    #[arg(long, env = "WEFT_KUBELET_CGROUP", value_name = "PATH")]
    kubelet_cgroup: Option<String>,
}

impl KernelFlags {
    fn options(self) -> Options {
        Options {
            instance: self.instance,
            bpffs: self.bpffs,
            kubelet_cgroup: config::given(self.kubelet_cgroup),
            ..Options::default()
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Preflight(flags)) => {
            let report = preflight::run(&flags.options());
            println!("{report}");
            return if report.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Some(Command::Ready(admin)) => admin::ready(&admin.admin_socket),
        Some(Command::Status(admin)) => admin::status(&admin.admin_socket),
        Some(Command::Retire(admin)) => admin::retire(&admin.admin_socket),
        Some(Command::ForgetVersions(admin)) => admin::forget_versions(&admin.admin_socket),
        Some(Command::BreakGlass(flags)) => Kernel::break_glass(&flags.options()).map_err(Into::into),
        None => run(cli.settings),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: Settings) -> anyhow::Result<()> {
    let config = Arc::new(settings.resolve()?);
    let _logging = logging::start(&config.log, config.log_json)?;
    if !nix::unistd::geteuid().is_root() {
        bail!("must run as root: it loads kernel programs and enters the pods' network namespaces");
    }
    let options = Options {
        instance: config.instance.clone(),
        bpffs: config.bpffs.clone(),
        pods_cgroup: config.pods_cgroup.clone(),
        kubelet_cgroup: config.kubelet_cgroup.clone(),
        debug_log: config.ebpf_log,
        ..Options::default()
    };
    raise_descriptor_limit();
    let report = preflight::run(&options);
    if !report.ok() {
        bail!("this kernel lacks what the agent needs:\n{report}");
    }
    let kernel = Arc::new(Kernel::open(options.clone()).context("preparing the kernel's part")?);
    // Control traffic, admin and metrics have a runtime of their own, so that the data path never waits for them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(config, kernel, options))
}

/// To the hard limit: every connection has two sockets, and the usual soft limit of 1024 is that of programs that call
/// `select`.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    match raised {
        Ok(limit) => debug!(limit, "open files"),
        Err(error) => warn!(%error, "the limit of open files stays as it was"),
    }
}

async fn serve(config: Arc<Config>, kernel: Arc<Kernel>, options: Options) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new(kernel.clone()));
    let seen = Arc::new(Seen::open(config.admin_socket.with_extension("seen"))?);
    let trust = Arc::new(trust::Keeper::new(config.trust_file.clone()));
    let endpoint = controller::endpoint(&config, &seen, &trust)?;
    let controller = Controller::new(&endpoint)?;

    let (update_tx, update_rx) = mpsc::channel(1);
    let (connected_tx, connected) = watch::channel(false);
    let (trouble_tx, trouble) = watch::channel(String::new());
    let (snapshot_tx, snapshots) = watch::channel(Arc::new(Snapshot::default()));
    let (identity_tx, wanted) = watch::channel(BTreeSet::new());
    let (report_tx, reports) = watch::channel(EnrollmentReport::default());
    let (status_tx, enrollment) = watch::channel(Enrollment::default());
    let (drain, draining) = watch::channel(false);

    let (identities, settled) =
        identities::start(controller.clone(), wanted, trust.subscribe(), metrics.clone());
    tokio::spawn(reconnect_with(trust.subscribe(), controller.clone()));
    let workers = Workers::start(Shared {
        config: config.clone(),
        metrics: metrics.clone(),
        snapshots: snapshots.clone(),
        identities: identities.clone(),
        limits: Limits::default(),
        draining: draining.clone(),
    })?;
    tokio::spawn(state::run(
        kernel.clone(),
        metrics.clone(),
        seen.clone(),
        trust.clone(),
        update_rx,
        snapshot_tx,
    ));
    let (asked_tx, asked) = mpsc::channel(16);
    if let Some(socket) = &config.cni_socket {
        cni::serve(socket, asked_tx)?;
    }
    let (retire, retiring) = watch::channel(false);
    let (plugin_tx, plugin) = watch::channel(PluginStatus::NotManaged);
    if let Some(install) = &config.cni_install {
        plugin_tx.send_replace(PluginStatus::Unknown);
        tokio::spawn(cni::keep_installed(install.clone(), plugin_tx, retiring.clone()));
    }
    let (kubelet_tx, kubelet) = watch::channel(KubeletStatus::default());
    tokio::spawn(kubelet::keep_recognised(kernel.clone(), options.clone(), kubelet_tx, draining.clone()));
    let enroller = Enroller {
        kernel,
        workers,
        metrics: metrics.clone(),
        snapshots: snapshots.clone(),
        identities: identity_tx,
        report: report_tx,
        status: status_tx,
        max_connections_per_pod: config.max_connections_per_pod,
        draining: draining.clone(),
        asked,
    };
    let enrolling = tokio::spawn(enroller.run());
    let reporting = enroll::report_upward(controller, reports, settled, connected.clone(), draining.clone());
    tokio::spawn(reporting);
    tokio::spawn(watch_connection(connected.clone(), metrics.clone()));
    let xds = weft_xds::ClientConfig {
        server: endpoint,
        node: config.node.clone(),
        types: state::TYPES.to_vec(),
        backoff: weft_xds::Backoff::default(),
        trouble: trouble_tx,
    };
    let mut xds = tokio::spawn(weft_xds::run(xds, update_tx, connected_tx));
    let views = http::Views {
        metrics,
        snapshots,
        enrollment: enrollment.clone(),
        identities,
        connected,
        trouble,
        seen: seen.clone(),
        trust: trust.clone(),
        plugin,
        kubelet,
        node: config.node.clone(),
        drain: drain.clone(),
        retire,
    };
    http::start(views, config.metrics_listen, config.ready_listen, &config.admin_socket)?;

    tokio::select! {
        stop = until_told_to_stop(draining) => stop?,
        () = succession::outlived(&config.admin_socket) => {
            bail!("the agent that had taken over from this one is gone; to be started again");
        }
        // It ends by itself only where its settings are unusable.
        ended = &mut xds => ended?.context("the controller cannot be reached with these settings")?,
    }
    drain.send_replace(true);
    info!(deadline = ?config.drain_deadline, "draining: no new connections, open ones may end");
    match tokio::time::timeout(config.drain_deadline, enrolling).await {
        Ok(_) => info!("drained"),
        Err(_) => warn!("the deadline has passed; what is still open is cut"),
    }
    if *retiring.borrow() {
        Kernel::break_glass(&options).context("removing the kernel's part")?;
        seen.forget()?;
        trust.forget()?;
        info!("retired: nothing of the mesh is left on this node");
    }
    Ok(())
}

/// SIGTERM, SIGINT, or the admin interface.
async fn until_told_to_stop(mut draining: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM"),
        _ = interrupt.recv() => info!("SIGINT"),
        _ = draining.wait_for(|d| *d) => info!("told to drain"),
    }
    Ok(())
}

/// No connection to the controller outlives the roots that it was proven by by more than what is under way.
async fn reconnect_with(mut trust: watch::Receiver<Option<Arc<trust::Trust>>>, controller: Controller) {
    while trust.changed().await.is_ok() {
        controller.reconnect();
    }
}

async fn watch_connection(mut connected: watch::Receiver<bool>, metrics: Arc<Metrics>) {
    loop {
        let up = *connected.borrow_and_update();
        metrics.xds_connected.set(i64::from(up));
        if connected.changed().await.is_err() {
            return;
        }
    }
}
