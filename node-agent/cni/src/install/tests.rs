//! On a directory of its own each, with what a container runtime would read there.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::{Value, json};

use super::*;

/// With an order and spaces that no program of ours would choose.
const LONE: &str = "{ \"type\":\"bridge\",\n\t\"name\": \"net\", \"cniVersion\": \"0.4.0\" }";

/// A node with this one network.
fn node_with(name: &str, text: &str) -> (tempfile::TempDir, Installation) {
    let dir = tempfile::tempdir().unwrap();
    let node = Installation { conf_dir: dir.path().join("conf"), bin_dir: dir.path().join("bin") };
    for dir in [&node.conf_dir, &node.bin_dir] {
        fs::create_dir(dir).unwrap();
    }
    let path = node.conf_dir.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    (dir, node)
}

impl Installation {
    /// What is in the directory of network configurations, and who may read it.
    fn contents(&self) -> BTreeMap<String, (u32, String)> {
        let file = |path: PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, (mode_of(&path).unwrap(), fs::read_to_string(&path).unwrap()))
        };
        self.files().unwrap().into_iter().map(file).collect()
    }

    /// The plugins that a pod would get.
    fn plugins(&self) -> Value {
        let text = fs::read_to_string(self.network().unwrap()).unwrap();
        let network: Value = serde_json::from_str(&text).unwrap();
        let plugins = network["plugins"].as_array().cloned().unwrap_or_else(|| vec![network]);
        plugins.iter().map(|plugin| plugin["type"].clone()).collect()
    }
}

#[test]
fn a_node_is_as_it_was_after_removal() {
    let dir = tempfile::tempdir().unwrap();
    let node = Installation { conf_dir: dir.path().join("conf"), bin_dir: dir.path().join("bin") };
    for dir in [&node.conf_dir, &node.bin_dir] {
        fs::create_dir(dir).unwrap();
    }
    assert!(matches!(node.join(), Err(InstallError::NoNetwork(_))));
    let list =
        "{\n  \"name\": \"net\",\n  \"plugins\": [\n    {\n      \"type\": \"bridge\"\n    }\n  ]\n}\n";
    let (first, second) = (node.conf_dir.join("10-a.conflist"), node.conf_dir.join("20-b.conflist"));
    fs::write(&first, list).unwrap();
    fs::write(&second, list).unwrap();
    fs::set_permissions(&first, Permissions::from_mode(0o600)).unwrap();
    // None of these is a configuration, for a runtime.
    fs::write(node.conf_dir.join("00-half.conflist.tmp"), "half").unwrap();
    fs::create_dir(node.conf_dir.join("00-directory.conf")).unwrap();

    let program = dir.path().join("program");
    fs::write(&program, "the plugin").unwrap();
    node.put_program(&program).unwrap();
    node.put_settings(&Settings::default()).unwrap();
    assert!(node.join().unwrap());
    assert!(!node.join().unwrap(), "again");
    assert!(fs::read_to_string(&first).unwrap().contains(PLUGIN));
    assert_eq!(fs::read_to_string(&second).unwrap(), list, "the runtime does not use this one");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&node.conf_dir.join(settings::FILE)), 0o600);
    assert_eq!(mode(&node.bin_dir.join(PLUGIN)), 0o755);
    assert_eq!(mode(&first), 0o600, "as it was");

    // Another component writes its configuration anew.
    fs::write(&first, list).unwrap();
    assert!(node.join().unwrap());
    node.remove().unwrap();
    node.remove().unwrap();
    assert_eq!(fs::read_to_string(&first).unwrap(), list);
    assert_eq!(fs::read_dir(&node.bin_dir).unwrap().count(), 0);
    assert!(!node.conf_dir.join("weft.d").exists());
    assert_eq!(mode(&first), 0o600, "still as it was");
}

#[test]
fn the_runtime_picks_the_first_by_name_and_so_do_we() {
    let dir = tempfile::tempdir().unwrap();
    let node = Installation { conf_dir: dir.path().to_owned(), bin_dir: dir.path().to_owned() };
    for name in ["20.conflist", "10.conf", "10.conflist", ".hidden.conflist"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    for name in [".hidden.conflist", "10.conf", "10.conflist", "20.conflist"] {
        assert_eq!(node.network().unwrap(), dir.path().join(name));
        fs::remove_file(dir.path().join(name)).unwrap();
    }
}

#[test]
fn a_lone_plugin_gets_company_and_is_given_back_as_it_was() {
    for name in ["10-net.conf", "10-net.json"] {
        let (_dir, node) = node_with(name, LONE);
        fs::write(node.conf_dir.join("20-other.conf"), "{}").unwrap();
        let before = node.contents();
        node.put_settings(&Settings::default()).unwrap();
        assert!(node.join().unwrap());
        assert!(!node.join().unwrap(), "again");
        assert_eq!(node.plugins(), json!(["bridge", PLUGIN]));
        assert_eq!(mode_of(&node.network().unwrap()).unwrap(), 0o640, "as secret as it was");

        // New settings, and somebody else who is chained.
        let list = node.network().unwrap();
        let mut changed: Value = serde_json::from_str(&fs::read_to_string(&list).unwrap()).unwrap();
        changed["plugins"][1] = json!({"type": "bandwidth"});
        fs::write(&list, changed.to_string()).unwrap();
        assert!(node.join().unwrap());
        assert_eq!(node.plugins(), json!(["bridge", "bandwidth", PLUGIN]));

        node.remove().unwrap();
        assert_eq!(node.contents(), before);
        node.remove().unwrap();
        assert_eq!(node.contents(), before, "twice");
        assert!(!node.conf_dir.join("weft.d").exists());
    }
}

#[test]
fn what_the_owner_of_a_lone_plugin_writes_counts() {
    let (_dir, node) = node_with("10-net.conf", LONE);
    let original = node.network().unwrap();
    node.join().unwrap();
    let new = LONE.replace("bridge", "ptp");
    fs::write(&original, &new).unwrap();
    assert!(node.join().unwrap());
    assert_eq!(node.plugins(), json!(["ptp", PLUGIN]));
    // It had the file open when that was renamed.
    let newer = LONE.replace("bridge", "macvlan");
    fs::write(with(&original, SAVED), &newer).unwrap();
    assert!(node.join().unwrap());
    assert_eq!(node.plugins(), json!(["macvlan", PLUGIN]));
    // Half of a file is no reason to take the pods' network away, nor is what cannot be chained.
    for bad in ["{", &LONE.replace("0.4.0", "0.2.0")] {
        fs::write(&original, bad).unwrap();
        assert!(matches!(node.join(), Err(InstallError::Conflist { .. })));
        assert_eq!(fs::read_to_string(&original).unwrap(), bad, "left alone");
    }
    // It is written anew just before the plugin is taken out.
    fs::write(&original, &new).unwrap();
    node.remove().unwrap();
    assert_eq!(node.contents().into_values().map(|(_, text)| text).collect::<Vec<_>>(), [new]);
}

#[test]
fn a_lone_plugin_that_is_gone_leaves_nothing_of_ours() {
    let (_dir, node) = node_with("10-net.conf", LONE);
    let (original, before) = (node.network().unwrap(), node.contents());
    let (list, saved) = (with(&original, LIST), with(&original, SAVED));
    node.join().unwrap();
    fs::remove_file(&saved).unwrap();
    assert!(!node.join().unwrap(), "pods still start, protected");
    node.remove().unwrap();
    assert_eq!(node.contents(), BTreeMap::new());

    fs::write(&original, LONE).unwrap();
    fs::set_permissions(&original, Permissions::from_mode(0o640)).unwrap();
    node.join().unwrap();
    fs::remove_file(&list).unwrap();
    assert!(matches!(node.join(), Err(InstallError::NoNetwork(_))));
    node.remove().unwrap();
    assert_eq!(node.contents(), before, "it is not ours to keep");
}

/// Each way in which an agent can die half-way through.
#[test]
fn what_was_begun_is_finished_or_undone() {
    let begun: [fn(&Path); 3] = [
        // Coming: the list is there, and the original still under its name.
        |original| fs::rename(with(original, SAVED), original).unwrap(),
        // The same, with a list of what the original was before.
        |original| {
            fs::rename(with(original, SAVED), original).unwrap();
            fs::write(
                with(original, LIST),
                conflist::wrap(&LONE.replace("bridge", "old"), Path::new("/s")).unwrap(),
            )
            .unwrap();
        },
        // Going: both files are gone, the list's turn was last.
        |original| {
            fs::write(original, LONE).unwrap();
            fs::set_permissions(original, Permissions::from_mode(0o640)).unwrap();
            fs::remove_file(with(original, SAVED)).unwrap();
        },
    ];
    for die in begun {
        let (_dir, node) = node_with("10-net.conf", LONE);
        let (original, before) = (node.network().unwrap(), node.contents());
        node.join().unwrap();
        let joined = node.contents();
        die(&original);
        node.join().unwrap();
        assert_eq!(node.contents(), joined);
        die(&original);
        node.remove().unwrap();
        assert_eq!(node.contents(), before);
    }
}

/// As long as there is no pod without a network there is none that would start without ours, either: the list holds both.
#[test]
fn a_runtime_finds_the_network_at_every_moment() {
    let (_dir, node) = node_with("10-net.conf", LONE);
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let runtime = scope.spawn(|| {
            let (mut alone, mut chained) = (0, 0);
            while !done.load(Ordering::Relaxed) {
                let path = node.network().unwrap();
                // Renamed since: a runtime hears of that and looks again.
                let Ok(text) = fs::read_to_string(&path) else { continue };
                let network: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(network["name"], "net", "{}", path.display());
                *if text.contains(PLUGIN) { &mut chained } else { &mut alone } += 1;
            }
            (alone, chained)
        });
        for _ in 0..200 {
            node.join().unwrap();
            node.remove().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        runtime.join().unwrap()
    });
    assert!(seen.0 > 0 && seen.1 > 0, "{seen:?}");
}
