//! A real directory and a real watch, in real time.

use std::{io::Write, sync::mpsc};

use super::*;

/// Long enough for a busy machine, and shorter than the periodic look, so that inotify is what is tested.
const SOON: Duration = Duration::from_millis(2500);

fn pod(name: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\n")
}

struct Fixture {
    path: tempfile::TempDir,
    deltas: mpsc::Receiver<Delta>,
}

impl Fixture {
    fn new(text: &str) -> Self {
        let path = tempfile::tempdir().unwrap();
        fs::write(path.path().join("a.yaml"), text).unwrap();
        let directory = Directory::open(path.path()).unwrap();
        let (sender, deltas) = mpsc::channel();
        std::thread::spawn(move || run(directory, |delta, _| delta.is_empty() || sender.send(delta).is_ok()));
        // The watch has to be in place before the test changes anything.
        std::thread::park_timeout(Duration::from_millis(300));
        while deltas.try_recv().is_ok() {}
        Self { path, deltas }
    }

    /// The names in the next change.
    fn next(&self) -> Vec<String> {
        let delta = self.deltas.recv_timeout(SOON).expect("a change that is noticed");
        let upserts = delta.upserts.iter().map(|object| object.key().name);
        upserts.chain(delta.deletes.iter().map(|key| format!("-{}", key.name))).collect()
    }
}

#[test]
fn a_file_renamed_into_place_is_read() {
    let fixture = Fixture::new(&pod("a"));
    let temporary = fixture.path.path().join(".b.tmp");
    fs::write(&temporary, pod("b")).unwrap();
    fs::rename(&temporary, fixture.path.path().join("b.yaml")).unwrap();
    assert_eq!(fixture.next(), ["b"]);
    fs::remove_file(fixture.path.path().join("b.yaml")).unwrap();
    assert_eq!(fixture.next(), ["-b"]);
}

#[test]
fn a_slow_writer_is_waited_for() {
    let fixture = Fixture::new(&format!("{}---\n{}", pod("a"), pod("b")));
    let mut file = fs::File::create(fixture.path.path().join("a.yaml")).unwrap();
    // Each beginning is a valid manifest that lacks what follows: obeying it would remove `b` for a moment.
    file.write_all(pod("a").as_bytes()).unwrap();
    std::thread::park_timeout(Duration::from_millis(400));
    file.write_all(format!("---\n{}", pod("b")).as_bytes()).unwrap();
    std::thread::park_timeout(Duration::from_millis(400));
    file.write_all(format!("---\n{}", pod("c")).as_bytes()).unwrap();
    drop(file);
    assert_eq!(fixture.next(), ["c"]);
}

#[test]
fn a_directory_that_was_replaced_is_watched_again() {
    let fixture = Fixture::new(&pod("a"));
    let aside = fixture.path.path().with_extension("aside");
    fs::rename(fixture.path.path(), &aside).unwrap();
    fs::create_dir(fixture.path.path()).unwrap();
    fs::write(fixture.path.path().join("b.yaml"), pod("b")).unwrap();
    // The lost watch is made up for by the periodic look.
    let delta = fixture.deltas.recv_timeout(RESCAN + SOON).unwrap();
    assert_eq!(delta.upserts.len(), 1);
    fs::write(fixture.path.path().join("c.yaml"), pod("c")).unwrap();
    assert_eq!(fixture.next(), ["c"]);
    fs::remove_dir_all(aside).unwrap();
}
