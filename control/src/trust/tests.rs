//! One rotation from beginning to end, and what holds it up.

use super::*;

const NOW: SystemTime = UNIX_EPOCH;

fn now() -> SystemTime {
    SystemTime::now()
}

fn rotation() -> Rotation {
    Rotation { after: Some(Duration::from_secs(365 * 86400)), overlap: Duration::from_secs(60) }
}

fn nodes(nodes: &[(&str, u64)]) -> Settled {
    nodes.iter().map(|(node, serial)| ((*node).to_owned(), *serial)).collect()
}

fn record() -> Record {
    Record::new("cluster.local", now()).unwrap()
}

/// What comes next, with a request and the nodes' serials, so many seconds after the last change.
fn step(record: &Record, request: Option<&str>, settled: &Settled, since: u64) -> Option<Record> {
    let rotation = rotation();
    let since = Duration::from_secs(since);
    let circumstances = Circumstances { rotation: &rotation, request, given: None, settled, since };
    record.step(&circumstances, "cluster.local", now()).unwrap().map(|(next, _)| next)
}

fn roots(record: &Record) -> Vec<Vec<u8>> {
    Authorities::try_from(record).unwrap().bundle().roots
}

fn signer(record: &Record) -> Vec<u8> {
    Authorities::try_from(record).unwrap().signer.der().to_vec()
}

#[test]
fn a_rotation() {
    let steady = record();
    assert_eq!((steady.phase(), roots(&steady).len()), (Phase::Steady, 1));
    assert!(step(&steady, None, &nodes(&[("a", 0)]), 9999).is_none(), "nobody asked");

    let announced = step(&steady, Some("1"), &nodes(&[("a", 0)]), 0).unwrap();
    assert_eq!((announced.phase(), roots(&announced).len()), (Phase::Announced, 2));
    assert_eq!(signer(&announced), signer(&steady), "nobody believes the new one yet");
    assert!(announced.serial > steady.serial);
    let (all, some) = (
        nodes(&[("a", announced.serial), ("b", announced.serial + 1)]),
        nodes(&[("a", announced.serial), ("b", steady.serial)]),
    );
    assert!(step(&announced, Some("1"), &some, 3600).is_none(), "a node does not believe it yet");
    assert_eq!(announced.waiting(&some).collect::<Vec<_>>(), ["b"]);
    assert!(
        step(&announced, Some("1"), &all, 79).is_none(),
        "callers that are no agents have not heard of it"
    );

    let retiring = step(&announced, Some("1"), &all, 80).unwrap();
    assert_eq!((retiring.phase(), roots(&retiring).len()), (Phase::Retiring, 2));
    assert_eq!(signer(&retiring), roots(&announced)[1]);
    assert!(!String::from_utf8(retiring.to_json().unwrap()).unwrap().contains(steady.signer.key.trim()));
    assert!(step(&retiring, Some("1"), &all, 3600).is_none(), "certificates are not renewed");
    let all = nodes(&[("a", retiring.serial), ("b", retiring.serial)]);
    assert!(
        step(&retiring, Some("1"), &all, 79).is_none(),
        "callers that are no agents have not renewed theirs"
    );

    let done = step(&retiring, Some("1"), &all, 80).unwrap();
    assert_eq!((done.phase(), roots(&done)), (Phase::Steady, vec![signer(&retiring)]));
    assert_ne!(signer(&done), signer(&steady));
    assert!(step(&done, Some("1"), &all, 9999).is_none(), "a request is obeyed once");
    assert!(step(&done, Some("2"), &all, 0).is_some());
    assert!(done.serial > retiring.serial && retiring.serial > announced.serial);
}

#[test]
fn age_is_a_reason_where_it_is_set() {
    let record = record();
    let settled = Settled::new();
    let later = now() + Duration::from_secs(366 * 86400);
    let at = |rotation: &Rotation| {
        let circumstances =
            Circumstances { rotation, request: None, given: None, settled: &settled, since: Duration::ZERO };
        record.step(&circumstances, "cluster.local", later).unwrap().is_some()
    };
    assert!(at(&rotation()));
    assert!(!at(&Rotation { after: None, ..rotation() }));
}

/// It has no valid certificate any more by then, and cannot be cut off.
#[test]
fn a_node_that_is_silent_for_longer_than_certificates_last_holds_nothing_up() {
    let announced = step(&record(), Some("1"), &Settled::new(), 0).unwrap();
    let silent = nodes(&[("gone", 0)]);
    assert!(step(&announced, None, &silent, SILENCE.as_secs() - 1).is_none());
    let retiring = step(&announced, None, &silent, SILENCE.as_secs()).unwrap();
    assert!(step(&retiring, None, &silent, SILENCE.as_secs()).is_some());
}

#[test]
fn serials_grow_whatever_the_clock_says() {
    let mut record = record();
    record.serial += 1000;
    let settled = Settled::new();
    let rotation = rotation();
    let circumstances = Circumstances {
        rotation: &rotation,
        request: Some("1"),
        given: None,
        settled: &settled,
        since: Duration::ZERO,
    };
    let (next, _) = record.step(&circumstances, "cluster.local", NOW).unwrap().unwrap();
    assert_eq!(next.serial, record.serial + 1);
}

#[test]
fn a_record_is_read_as_it_was_written_or_not_at_all() {
    let record = step(&record(), Some("1"), &Settled::new(), 0).unwrap();
    let text = record.to_json().unwrap();
    assert_eq!(Record::parse(&text).unwrap(), record);
    assert!(Record::parse(b"{}").is_err());
    let newer = String::from_utf8(text).unwrap().replace("\"version\": 1", "\"version\": 2");
    assert!(Record::parse(newer.as_bytes()).unwrap_err().contains("has version 2"));
    let mixed =
        Record { signer: Pair { key: record.next.clone().unwrap().key, ..record.signer.clone() }, ..record };
    assert!(Authorities::try_from(&mixed).unwrap_err().contains("does not belong to the key"));
}

#[test]
fn a_given_root_is_announced_and_a_given_intermediate_signs_at_once() {
    let settled = Settled::new();
    let rotation = rotation();
    let first = record();
    let given = |given: Pair, record: &Record, since: u64| {
        let since = Duration::from_secs(since);
        let circumstances = Circumstances {
            rotation: &rotation,
            request: Some("1"),
            given: Some(&given),
            settled: &settled,
            since,
        };
        record.step(&circumstances, "cluster.local", now()).unwrap().map(|(next, _)| next)
    };
    let theirs = Pair::generate("example.org").unwrap();
    let announced = given(theirs.clone(), &first, 0).unwrap();
    assert_eq!((announced.phase(), announced.next.clone()), (Phase::Announced, Some(theirs.clone())));
    let retiring = given(theirs.clone(), &announced, 80).unwrap();
    let steady = given(theirs.clone(), &retiring, 80).unwrap();
    assert_eq!((steady.phase(), steady.signer.clone()), (Phase::Steady, theirs.clone()));
    // Neither age nor a request concerns it.
    assert!(given(theirs.clone(), &steady, 9999).is_none());
    let intermediate = Pair { key: "another".to_owned(), chain: "below".to_owned(), ..theirs };
    let signs = given(intermediate.clone(), &steady, 0).unwrap();
    assert_eq!((signs.phase(), signs.signer.clone()), (Phase::Steady, intermediate));
    assert!(signs.serial > steady.serial);
}
