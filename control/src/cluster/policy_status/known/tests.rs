use weft_proto::security::Action;

use super::*;
use crate::translate::tests::{objects, translated};

const POLICY: &str = "apiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
                      metadata: {name: p, namespace: shop, generation: 3}\n";

fn told(upserts: Vec<Object>, deletes: Vec<ObjectKey>, read: u64) -> Input {
    Input::Objects { delta: Delta { upserts, deletes }, read: Some(read) }
}

fn known(text: &str) -> Known {
    let mut known = Known::new(TrustDomain::new("cluster.local").unwrap());
    known.apply(told(objects(text), Vec::new(), 10));
    known
}

fn name() -> Name {
    ("shop".to_owned(), "p".to_owned())
}

/// Status, reason and message, of `Accepted` and of `Programmed`.
fn due(known: &Known) -> Option<[(bool, String, String); 2]> {
    let conditions = known.due(&name(), Timestamp::UNIX_EPOCH)?;
    let kinds: Vec<&str> = conditions.iter().map(|condition| condition.kind.as_str()).collect();
    assert_eq!(kinds, ["Accepted", "Programmed"]);
    let said = conditions.into_iter().map(|condition| {
        assert_eq!(condition.observed_generation, Some(3));
        (condition.is_true(), condition.reason, condition.message)
    });
    Some(said.collect::<Vec<_>>().try_into().unwrap())
}

#[test]
fn says_whether_a_policy_was_understood() {
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n";
    let targets = "spec: {targetRefs: [{kind: Service, name: web}]}\n";
    let listing = |accounts: usize| {
        let accounts: Vec<String> =
            (100..100 + accounts).map(|number| format!("somebody-{number}")).collect();
        format!("spec: {{rules: [{{from: [{{serviceAccounts: [{}]}}]}}]}}\n", accounts.join(", "))
    };
    for (rest, holds, reason, words) in [
        ("spec: {}\n".to_owned(), true, "Accepted", ""),
        ("spec: {rules: [{from: []}]}\n".to_owned(), false, "Invalid", "spec.rules[0].from"),
        ("spec: {moods: []}\n".to_owned(), false, "Invalid", "moods"),
        (String::new(), false, "Invalid", "missing"),
        (targets.to_owned(), false, "TargetNotFound", "no Service web"),
        (format!("{targets}{service}"), true, "Accepted", ""),
        // Nobody knows whom it is about, whatever else is wrong with it.
        (targets.replace("spec: {", "spec: {moods: [], "), false, "TargetNotFound", "no Service web"),
        (listing(700), true, "Accepted", ""),
        (listing(900), false, "TooLarge", "32768 bytes"),
    ] {
        let [(is, why, message), programmed] = due(&known(&format!("{POLICY}{rest}"))).unwrap();
        assert_eq!((is, why.as_str()), (holds, reason), "{rest}: {message}");
        assert!(message.contains(words), "{rest}: {message}");
        let expected = if holds { "Programmed" } else { "NotAccepted" };
        assert_eq!((programmed.0, programmed.1.as_str()), (holds, expected), "{rest}");

        let translation = translated(&format!("{POLICY}{rest}"));
        let problem = translation.problems.get("AuthorizationPolicy shop/p");
        assert_eq!(problem.map(String::as_str).unwrap_or_default(), message, "{rest}");
        let mut own = translation.policies.values().filter(|policy| policy.namespace == "shop");
        let denies = own.next().is_some_and(|policy| policy.action() == Action::Deny);
        assert_eq!(denies, !holds, "{rest}");
    }
}

/// The policy with what is written of it: `Accepted` of a generation, and `Programmed` with its message.
fn carrying(generation: i64, accepted: &str, programmed: &str) -> String {
    let condition = |kind: &str, status: &str, message: &str| {
        format!(
            "{{type: {kind}, status: '{status}', reason: {kind}, message: '{message}', observedGeneration: {generation}}}"
        )
    };
    let ours = [condition("Accepted", accepted, ""), condition("Programmed", "True", programmed)].join(", ");
    format!("{POLICY}spec: {{}}\nstatus: {{conditions: [{{type: Other, status: 'True'}}, {ours}]}}\n")
}

#[test]
fn what_is_said_already_is_not_written_again() {
    assert_eq!(due(&known(&carrying(3, "True", "whatever"))), None);
    assert!(due(&known(&carrying(2, "True", "whatever"))).is_some());
    assert!(due(&known(&carrying(3, "False", "whatever"))).is_some());
}

#[test]
fn a_service_that_comes_or_goes_concerns_the_policies_that_target_it() {
    let mut known = known(&format!("{POLICY}spec: {{targetRefs: [{{kind: Service, name: web}}]}}\n"));
    let service = objects("apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n");
    let key = service[0].key();
    let concerned: BTreeSet<Name> = [name()].into();
    assert_eq!(known.apply(told(service.clone(), Vec::new(), 10)), concerned);
    assert_eq!(known.apply(told(service, Vec::new(), 10)), BTreeSet::new());
    assert_eq!(known.apply(told(Vec::new(), vec![key], 10)), concerned);
}

fn node(name: &str, has_pods: bool) -> Input {
    Input::Node { name: name.to_owned(), has_pods }
}

fn reached(nodes: &[(&str, u64)]) -> Arc<Reached> {
    Arc::new(nodes.iter().map(|(node, reached)| ((*node).to_owned(), *reached)).collect())
}

#[test]
fn is_programmed_when_every_node_with_pods_has_followed() {
    // Told with 10: who has followed to there has it.
    let mut known = known(&format!("{POLICY}spec: {{}}\n"));
    known.apply(node("n0", true));
    known.apply(node("n0", false));
    assert_eq!(known.apply(node("n1", true)), [name()].into(), "it waits for that node");
    known.apply(node("n2", true));
    let programmed = |known: &Known| due(known).map(|[_, (holds, reason, message)]| (holds, reason, message));
    let is = |holds: bool, reason: &str, message: &str| Some((holds, reason.to_owned(), message.to_owned()));
    let words = "of 2 nodes with pods in the mesh enforce it";
    let then = "2 of 2 nodes that had pods in the mesh then enforce it";
    for (nodes, expected) in [
        (reached(&[]), is(false, "Pending", &format!("0 {words}; waiting for n1, n2"))),
        (reached(&[("n0", 99), ("n1", 10)]), is(false, "Pending", &format!("1 {words}; waiting for n2"))),
        (reached(&[("n1", 12), ("n2", 9)]), is(false, "Pending", &format!("1 {words}; waiting for n2"))),
        (reached(&[("n1", 12), ("n2", 10)]), is(true, "Programmed", then)),
    ] {
        known.follow(nodes);
        assert_eq!(programmed(&known), expected);
    }

    // Written down. What is told of it again is no other generation, and its nodes need not follow that far.
    let written = carrying(3, "True", then);
    known.apply(told(objects(&written), Vec::new(), 50));
    assert!(known.pending().is_empty() && due(&known).is_none());
    // A replica that starts was told of it with 50, and believes what is written, also where a node is new.
    let mut other = self::known("");
    other.apply(told(objects(&written), Vec::new(), 50));
    for name in ["n1", "n2", "n3"] {
        assert_eq!(other.apply(node(name, true)), BTreeSet::new());
    }
    other.follow(reached(&[("n1", 12), ("n2", 10)]));
    assert!(other.pending().is_empty() && due(&other).is_none());

    // Another generation waits for all of them.
    let next = written.replace("generation: 3}\nspec", "generation: 4}\nspec");
    known.apply(told(objects(&next), Vec::new(), 60));
    assert_eq!(known.pending(), &[name()].into());
    let conditions = known.due(&name(), Timestamp::UNIX_EPOCH).unwrap();
    assert_eq!(conditions[1].message, format!("0 {words}; waiting for n1, n2"));
    // And so does another policy of the same name and number.
    let anew = POLICY.replace("name: p,", "name: p, uid: other,");
    known.apply(told(objects(&format!("{anew}spec: {{}}\n")), Vec::new(), 70));
    known.follow(reached(&[("n1", 69), ("n2", 70)]));
    assert_eq!(programmed(&known), is(false, "Pending", &format!("1 {words}; waiting for n1")));
}

#[test]
fn what_stood_for_a_policy_is_not_the_policy() {
    let mut known = known(&format!("{POLICY}spec: {{targetRefs: [{{kind: Service, name: web}}]}}\n"));
    known.apply(node("n1", true));
    known.follow(reached(&[("n1", 40)]));
    let [accepted, programmed] = due(&known).unwrap();
    assert_eq!((accepted.0, programmed.1.as_str()), (false, "NotAccepted"));
    let condition = |status: &str| {
        format!("status: {{conditions: [{{type: Accepted, status: '{status}', observedGeneration: 3}}]}}\n")
    };
    let text = |status: &str| {
        format!("{POLICY}spec: {{targetRefs: [{{kind: Service, name: web}}]}}\n{}", condition(status))
    };
    known.apply(told(objects(&text("False")), Vec::new(), 20));
    // Its Service comes: nodes that have all of its history have a Deny in its place.
    let service = objects("apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n");
    known.apply(told(service, Vec::new(), 20));
    let [accepted, programmed] = due(&known).unwrap();
    assert_eq!((accepted.0, programmed.0, programmed.1.as_str()), (true, false, "Pending"));
    // That it is accepted is history, too, and comes after the Service.
    known.apply(told(objects(&text("True")), Vec::new(), 50));
    assert_eq!(known.pending(), &[name()].into());
    assert!(due(&known).unwrap()[1].2.contains("waiting for n1"));
    known.follow(reached(&[("n1", 50)]));
    assert!(due(&known).unwrap()[1].0);
}

#[test]
fn many_nodes_are_not_all_named() {
    let mut known = known(&format!("{POLICY}spec: {{}}\n"));
    for number in 1..=8 {
        known.apply(node(&format!("n{number}"), true));
    }
    let [_, (_, _, message)] = due(&known).unwrap();
    assert!(message.ends_with("waiting for n1, n2, n3, n4, n5, 3 more"), "{message}");
}
