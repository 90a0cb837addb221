//! What was measured, as a table and as JSON. Pure.

use std::time::Duration;

use serde_json::{Value, json};

use super::Sizes;

/// What must hold. For people: no test asserts a speed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Aim {
    None,
    Below(f64),
    AtMost(f64),
}

#[derive(Debug, Clone)]
pub struct Figures {
    pub sizes: Sizes,
    /// From the start of the process.
    pub ready: Duration,
    /// From when all agents connect at once until the last of them has everything.
    pub first_state: Duration,
    /// Of one agent.
    pub first_bytes: u64,
    pub first_resources: u64,
    /// Resident memory in bytes: when ready, with the agents in sync, after the churn, and at its highest.
    pub memory_ready: u64,
    pub memory_agents: u64,
    pub memory_end: u64,
    pub memory_peak: u64,
    /// Pods replaced, and in what time.
    pub changes: usize,
    pub churned: Duration,
    /// Processor time a second, of weft-control and of the measuring process.
    pub cores: f64,
    pub own_cores: f64,
    /// To all agents, because of the changes.
    pub messages: u64,
    pub bytes: u64,
    /// States that the controller published.
    pub states: u64,
    /// Reports of agents, and what the controller wrote: NodeEnrollments, and conditions of Pods.
    pub reports: u64,
    pub writes: u64,
    pub conditions: u64,
    /// From a change to each agent, shortest first.
    pub arrivals: Vec<Duration>,
    /// Arrivals that were missed, and streams that ended. Neither should be.
    pub lost: usize,
    pub ended: usize,
}

struct Row {
    name: &'static str,
    unit: &'static str,
    value: f64,
    aim: Aim,
}

impl Figures {
    pub fn new(sizes: Sizes) -> Self {
        let none = Duration::ZERO;
        Self {
            sizes,
            ready: none,
            first_state: none,
            first_bytes: 0,
            first_resources: 0,
            memory_ready: 0,
            memory_agents: 0,
            memory_end: 0,
            memory_peak: 0,
            changes: 0,
            churned: none,
            cores: 0.0,
            own_cores: 0.0,
            messages: 0,
            bytes: 0,
            states: 0,
            reports: 0,
            writes: 0,
            conditions: 0,
            arrivals: Vec::new(),
            lost: 0,
            ended: 0,
        }
    }

    /// In milliseconds; of 100 arrivals `percent` were at least this early.
    fn percentile(&self, percent: usize) -> f64 {
        let index = (self.arrivals.len() * percent).div_ceil(100).saturating_sub(1);
        self.arrivals.get(index).map_or(f64::NAN, |arrival| arrival.as_secs_f64() * 1e3)
    }

    fn rows(&self) -> Vec<Row> {
        let each = |total: u64| total as f64 / (self.changes * self.sizes.agents) as f64;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let row = |name, unit, value, aim| Row { name, unit, value, aim };
        vec![
            row("start-to-ready", "s", self.ready.as_secs_f64(), Aim::None),
            row("first-state-all-agents", "s", self.first_state.as_secs_f64(), Aim::None),
            row("first-state-resources", "an agent", self.first_resources as f64, Aim::None),
            row("first-state-size", "MB an agent", megabytes(self.first_bytes), Aim::None),
            row("memory-ready", "MB RSS", megabytes(self.memory_ready), Aim::None),
            row("memory-agents", "MB RSS", megabytes(self.memory_agents), Aim::None),
            row("memory-end", "MB RSS", megabytes(self.memory_end), Aim::Below(1000.0)),
            row("memory-peak", "MB RSS", megabytes(self.memory_peak), Aim::Below(1000.0)),
            row("cpu", "cores", self.cores, Aim::Below(1.0)),
            row("messages", "a change and agent", each(self.messages), Aim::AtMost(1.0)),
            row("bytes", "a change and agent", each(self.bytes), Aim::None),
            row("arrival-p50", "ms", self.percentile(50), Aim::None),
            row("arrival-p99", "ms", self.percentile(99), Aim::Below(200.0)),
            row("arrival-max", "ms", self.percentile(100), Aim::None),
            row("lost", "arrivals", (self.lost + self.ended) as f64, Aim::AtMost(0.0)),
            row("changes", "a second", self.changes as f64 / self.churned.as_secs_f64(), Aim::None),
            row("states", "published", self.states as f64, Aim::None),
            row("reports", "of agents", self.reports as f64, Aim::None),
            row("writes", "of NodeEnrollments", self.writes as f64, Aim::None),
            row("conditions", "written on Pods", self.conditions as f64, Aim::None),
            row("bench-cpu", "cores", self.own_cores, Aim::None),
        ]
    }

    pub fn json(&self) -> Value {
        let Sizes { nodes, pods, services, agents, churn, seconds } = self.sizes;
        // Not a number becomes null.
        let rows = self.rows().into_iter().map(|row| {
            let met = row.aim.is_met(row.value);
            json!({"name": row.name, "unit": row.unit, "value": (row.value * 1e4).round() / 1e4, "met": met})
        });
        json!({
            "source": "kubernetes, with a stand-in for the API server",
            "sizes": {"nodes": nodes, "pods": pods, "services": services, "agents": agents, "churn": churn, "seconds": seconds},
            "figures": rows.collect::<Vec<_>>(),
        })
    }

    pub fn table(&self) -> String {
        let mut rows = vec![["what", "value", "unit", "aim"].map(str::to_owned)];
        rows.extend(self.rows().into_iter().map(|row| {
            [row.name.to_owned(), number(row.value), row.unit.to_owned(), row.aim.remark(row.value)]
        }));
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let [a, b, c] = std::array::from_fn(width);
        let lines = rows.iter().map(|[name, value, unit, aim]| {
            format!("{:<a$}  {value:>b$}  {unit:<c$}  {aim}", name).trim_end().to_owned() + "\n"
        });
        let Sizes { nodes, pods, services, agents, churn, seconds } = self.sizes;
        format!(
            "{}{pods} pods on {nodes} nodes behind {services} Services; {agents} agents; {churn} pods replaced a second for {seconds} s.\n\
             A change is a pod replaced: the new pod, its Service's slice, the end of the old pod. The API server is a\n\
             stand-in in memory, the agents are simulated, weft-control is the program itself. Bytes are those of messages,\n\
             before TLS. Arrival is from the change in the API server to the new pod's name at an agent.\n",
            lines.collect::<String>()
        )
    }
}

impl Aim {
    /// None where there is no aim.
    fn is_met(self, value: f64) -> Option<bool> {
        match self {
            Self::None => None,
            Self::Below(most) => Some(value < most),
            Self::AtMost(most) => Some(value <= most),
        }
    }

    fn remark(self, value: f64) -> String {
        let text = match self {
            Self::None => return String::new(),
            Self::Below(most) => format!("< {most}"),
            Self::AtMost(most) => format!("<= {most}"),
        };
        format!("{text} {}", if self.is_met(value) == Some(true) { "met" } else { "NOT MET" })
    }
}

/// Three digits where it is small, none behind the point where it is large or whole.
fn number(value: f64) -> String {
    match value.abs() {
        whole if whole.fract() == 0.0 => format!("{value:.0}"),
        0.0..10.0 => format!("{value:.2}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
