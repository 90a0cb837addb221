//! A real directory, read when the test says so.

use std::fs;

use super::*;

const SHOP: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";

fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nstatus: {{podIP: {ip}}}\n"
    )
}

struct Fixture {
    path: tempfile::TempDir,
}

impl Fixture {
    fn new(files: &[(&str, &str)]) -> Self {
        let fixture = Self { path: tempfile::tempdir().unwrap() };
        files.iter().for_each(|(name, text)| fixture.write(name, text));
        fixture
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path.path().join(name), text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.path.path().join(name)).unwrap();
    }

    fn open(&self) -> Directory {
        Directory::open(self.path.path()).unwrap()
    }
}

/// What is in force, by key.
fn in_force(directory: &Directory) -> Vec<String> {
    directory.objects.keys().map(ToString::to_string).collect()
}

/// `+key` and `-key` of a rescan.
fn rescan(directory: &mut Directory) -> Vec<String> {
    let delta = directory.rescan(&HashSet::new());
    let upserts = delta.upserts.iter().map(|object| format!("+{}", object.key()));
    upserts.chain(delta.deletes.iter().map(|key| format!("-{key}"))).collect()
}

#[test]
fn changes_are_told_apart() {
    let fixture = Fixture::new(&[("a.yaml", SHOP), ("b.yml", &pod("web", "10.1.0.1"))]);
    let mut directory = fixture.open();
    assert_eq!(in_force(&directory), ["Namespace shop", "Pod shop/web"]);
    assert!(rescan(&mut directory).is_empty());
    fixture.write("b.yml", &pod("web", "10.1.0.2"));
    fixture
        .write("c.json", r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"db","namespace":"shop"}}"#);
    fixture.write("notes.txt", "not a manifest");
    assert_eq!(rescan(&mut directory), ["+Pod shop/db", "+Pod shop/web"]);
    fixture.remove("b.yml");
    assert_eq!(rescan(&mut directory), ["-Pod shop/web"]);
}

#[test]
fn a_malformed_file_keeps_its_last_good_version_and_disturbs_nothing_else() {
    let fixture = Fixture::new(&[("a.yaml", SHOP), ("b.yaml", &pod("web", "10.1.0.1"))]);
    let mut directory = fixture.open();
    // The file's first document is good and different; the file counts as a whole.
    fixture.write("b.yaml", &format!("{}---\n{}", pod("web", "10.1.0.9"), pod("db", "here")));
    fixture.write("c.yaml", &pod("cache", "10.1.0.3"));
    fixture.write("d.yaml", "{");
    assert_eq!(rescan(&mut directory), ["+Pod shop/cache"]);
    assert_eq!(in_force(&directory), ["Namespace shop", "Pod shop/cache", "Pod shop/web"]);
    let complaint = "document 2, line 9, field status.podIP: \"here\" is not an IP address";
    assert_eq!(directory.complaints()["b.yaml"], complaint);
    assert_eq!(directory.complaints().len(), 2, "{:?}", directory.complaints());
    assert!(rescan(&mut directory).is_empty());

    fixture.write("b.yaml", &format!("{}---\n{}", pod("web", "10.1.0.9"), pod("db", "10.1.0.2")));
    fixture.remove("d.yaml");
    assert_eq!(rescan(&mut directory), ["+Pod shop/db", "+Pod shop/web"]);
    assert!(directory.complaints().is_empty());
    // Malformed, then deleted: that is an order.
    fixture.write("b.yaml", "{");
    assert!(rescan(&mut directory).is_empty());
    fixture.remove("b.yaml");
    assert_eq!(rescan(&mut directory), ["-Pod shop/db", "-Pod shop/web"]);
}

#[test]
fn a_malformed_file_stops_the_start_with_the_same_words() {
    let fixture = Fixture::new(&[("a.yaml", SHOP), ("b.yaml", &pod("web", "here"))]);
    let error = Directory::open(fixture.path.path()).unwrap_err().to_string();
    assert!(
        error.contains("b.yaml: document 1, line 4, field status.podIP: \"here\" is not an IP address"),
        "{error}"
    );
    let error = Directory::open(&fixture.path.path().join("missing")).unwrap_err().to_string();
    assert!(error.contains("cannot read the directory"), "{error}");
}

#[test]
fn an_emptied_directory_is_not_obeyed_until_it_is_filled() {
    let fixture = Fixture::new(&[("a.yaml", SHOP), ("b.yaml", &pod("web", "10.1.0.1"))]);
    let mut directory = fixture.open();
    fixture.remove("a.yaml");
    fixture.remove("b.yaml");
    for _ in 0..3 {
        assert!(rescan(&mut directory).is_empty());
        assert_eq!(in_force(&directory), ["Namespace shop", "Pod shop/web"]);
        assert_eq!(directory.complaints().len(), 1);
    }
    // Files without objects do not fill it.
    fixture.write("a.yaml", "# all gone\n");
    assert!(rescan(&mut directory).is_empty());
    fixture.write("c.yaml", SHOP);
    assert_eq!(rescan(&mut directory), ["-Pod shop/web"]);
    assert!(directory.complaints().is_empty());
}

#[test]
fn a_missing_directory_is_not_obeyed_either() {
    let fixture = Fixture::new(&[("a.yaml", SHOP)]);
    let mut directory = fixture.open();
    let aside = fixture.path.path().with_extension("aside");
    fs::rename(fixture.path.path(), &aside).unwrap();
    assert!(rescan(&mut directory).is_empty());
    assert_eq!(in_force(&directory), ["Namespace shop"]);
    fs::rename(&aside, fixture.path.path()).unwrap();
    assert!(rescan(&mut directory).is_empty());
    assert!(directory.complaints().is_empty());
}

#[test]
fn an_empty_directory_to_begin_with_is_just_empty() {
    let fixture = Fixture::new(&[]);
    let mut directory = fixture.open();
    assert!(directory.is_empty());
    assert!(rescan(&mut directory).is_empty() && directory.complaints().is_empty());
    fixture.write("a.yaml", SHOP);
    assert_eq!(rescan(&mut directory), ["+Namespace shop"]);
}

#[test]
fn the_first_file_by_name_owns_an_object() {
    let fixture = Fixture::new(&[
        ("a.yaml", SHOP),
        ("b.yaml", &pod("web", "10.1.0.2")),
        ("c.yaml", &format!("{}---\n{}", pod("web", "10.1.0.3"), pod("db", "10.1.0.4"))),
    ]);
    let mut directory = fixture.open();
    assert_eq!(in_force(&directory), ["Namespace shop", "Pod shop/db", "Pod shop/web"]);
    let ip = |directory: &Directory| {
        directory.objects.values().find_map(|object| match object {
            Object::Pod(pod) if pod.metadata.name == "web" => pod.status.pod_ip,
            _ => None,
        })
    };
    assert_eq!(ip(&directory), "10.1.0.2".parse().ok());
    let complaint = &directory.complaints()["Pod shop/web"];
    assert!(complaint.contains("b.yaml and again in c.yaml"), "{complaint}");
    fixture.remove("b.yaml");
    assert_eq!(rescan(&mut directory), ["+Pod shop/web"]);
    assert_eq!(ip(&directory), "10.1.0.3".parse().ok());
    assert!(directory.complaints().is_empty());
}

#[test]
fn a_truncated_file_is_no_order_to_remove_its_objects() {
    let fixture = Fixture::new(&[("a.yaml", SHOP), ("b.yaml", &pod("web", "10.1.0.1"))]);
    let mut directory = fixture.open();
    fixture.write("b.yaml", "");
    assert!(rescan(&mut directory).is_empty());
    assert!(directory.complaints()["b.yaml"].contains("delete the file"), "{:?}", directory.complaints());
    // Everything commented out is something a person wrote.
    fixture.write("b.yaml", "# nothing\n");
    assert_eq!(rescan(&mut directory), ["-Pod shop/web"]);
}

#[test]
fn a_file_being_written_stays_as_it_was() {
    let fixture = Fixture::new(&[
        ("a.yaml", SHOP),
        ("b.yaml", &format!("{}---\n{}", pod("a", "10.1.0.1"), pod("b", "10.1.0.2"))),
    ]);
    let mut directory = fixture.open();
    // A valid beginning of what is to come.
    fixture.write("b.yaml", &pod("a", "10.1.0.9"));
    let unsettled = HashSet::from([fixture.path.path().join("b.yaml")]);
    assert!(directory.rescan(&unsettled).is_empty());
    assert_eq!(rescan(&mut directory), ["+Pod shop/a", "-Pod shop/b"]);
}

#[test]
fn what_cannot_be_read_keeps_its_last_good_version() {
    let fixture = Fixture::new(&[("a.yaml", SHOP), ("b.yaml", &pod("web", "10.1.0.1"))]);
    let mut directory = fixture.open();
    // Not UTF-8, which root can produce as well as anyone.
    fs::write(fixture.path.path().join("b.yaml"), [0xff, 0xfe]).unwrap();
    assert!(rescan(&mut directory).is_empty());
    assert!(directory.complaints()["b.yaml"].contains("UTF-8"));
    // A link to itself cannot be opened by anyone.
    fixture.remove("b.yaml");
    std::os::unix::fs::symlink("b.yaml", fixture.path.path().join("b.yaml")).unwrap();
    assert!(rescan(&mut directory).is_empty());
    assert!(directory.complaints()["b.yaml"].contains("cannot be read"));
    fixture.remove("b.yaml");
    fixture.write("b.yaml", &pod("web", "10.1.0.1"));
    assert!(rescan(&mut directory).is_empty() && directory.complaints().is_empty());
    fs::create_dir(fixture.path.path().join("folder.yaml")).unwrap();
    assert!(rescan(&mut directory).is_empty() && directory.complaints().is_empty());
}
