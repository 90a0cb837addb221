//! That `cargo xtask bench control` works, at a size where it takes a moment. It asserts no speed.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../benches/scale/measure/mod.rs"]
mod measure;
mod support;

use std::path::Path;

use measure::Sizes;

#[tokio::test]
async fn a_small_cluster_is_measured() {
    let sizes = Sizes { nodes: 4, pods: 40, services: 5, agents: 2, churn: 20, seconds: 1 };
    let figures = measure::run(Path::new(support::BINARY), sizes, false).await.unwrap();
    // Every change arrived at every agent, and those on the agents' own nodes entered the mesh.
    assert_eq!((figures.changes, figures.lost, figures.ended), (20, 0, 0));
    assert_eq!(figures.arrivals.len(), 40);
    // Pods, Services, Nodes, the settings, and the pods of one node.
    assert_eq!(figures.first_resources, 40 + 5 + 4 + 1 + 10);
    assert!(figures.messages > 0 && figures.reports > 0 && figures.writes > 0, "{figures:?}");
    // Pods say that they entered it.
    assert!(figures.conditions > 0, "{figures:?}");
    assert!(figures.memory_peak > 0 && figures.states > 0, "{figures:?}");
    // Both outputs hold every figure.
    let json = figures.json();
    for figure in json["figures"].as_array().unwrap() {
        assert!(figure["value"].is_number(), "{figure}");
        assert!(figures.table().contains(figure["name"].as_str().unwrap()), "{figure}");
    }
}
