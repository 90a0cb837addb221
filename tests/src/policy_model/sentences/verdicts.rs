//! What comes of all that is about a pod: Deny, Allow and Audit together, and the default where they do not speak.

use super::{ELSEWHERE, EVERYBODY, IDENTIFIED, NEARLY, SHOP, Sentence, say};

pub fn all() -> Vec<Sentence> {
    [verdicts(), defaults(), audits()].into_iter().flatten().collect()
}

fn verdicts() -> Vec<Sentence> {
    vec![
        say("a matching Deny denies, whatever Allows say")
            .policy("{action: Deny, rules: [{from: [{serviceAccounts: [shop/job]}]}]}")
            .policy(SHOP)
            .allowed(&["shop/web 80"])
            .denied(&["shop/job 80", "bank/teller 80", "nobody 80"]),
        say("one of several Allows is enough")
            .policy(SHOP)
            .policy("{rules: [{to: [{ports: [81]}]}]}")
            .policy("{}")
            .allowed(&["shop/web 80", "nobody 81"])
            .denied(&["nobody 80"]),
        say("where an Allow is, no default is asked").mesh("deny", "all-unauthenticated").policy(SHOP).allowed(&["shop/web 80"]).denied(&["nobody 80"]),
        say("also not as a pod's annotation has it").pod_says("deny").policy("{rules: [{}]}").allowed(&EVERYBODY),
        say("a Deny that names identities asks for one")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80", "test/x 80"]),
        say("in any of its rules, negated or not")
            .policy("{action: Deny, rules: [{to: [{ports: [99]}]}, {from: [{cidrs: [192.0.2.0/24]}, {notServiceAccounts: [shop/web], cidrs: [192.0.2.0/24]}]}]}")
            .allowed(&["shop/web 80", "bank/teller 80"])
            .denied(&["nobody 80", "shop/web 99", "shop/web@192.0.2.1 80"]),
        say("one that names none does not").policy("{action: Deny, rules: [{from: [{cidrs: [192.0.2.0/24]}]}]}").allowed(&["nobody 80"]),
        say("one about other pods does not")
            .policy("{action: Deny, selector: {matchLabels: {app: web}}, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&["nobody 80"]),
        say("an Allow may still admit who shows none")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .policy("{rules: [{to: [{ports: [80]}]}]}")
            .allowed(&["nobody 80"])
            .denied(&["test/x 80", "nobody 81"]),
        say("a default that is stricter stays")
            .namespace_says("cluster-authenticated")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE]),
        say("that of audit does not")
            .namespace_says("audit")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80"]),
    ]
}

fn defaults() -> Vec<Sentence> {
    vec![
        say("all-unauthenticated admits all")
            .namespace_says("all-unauthenticated")
            .mesh("deny", "all-unauthenticated")
            .allowed(&EVERYBODY),
        say("audit admits all, on trial").mesh("audit", "all-unauthenticated").audited(&EVERYBODY),
        say("all-authenticated asks for an identity")
            .namespace_says("all-authenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("cluster-authenticated for one of the own trust domain")
            .namespace_says("cluster-authenticated")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE, NEARLY]),
        say("deny admits nobody").namespace_says("deny").denied(&EVERYBODY),
        say("a namespace may be laxer than the mesh's default")
            .mesh("deny", "all-authenticated")
            .namespace_says("all-authenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("and not laxer than its floor")
            .mesh("deny", "all-authenticated")
            .namespace_says("audit")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("nor may the mesh's default be").mesh("all-unauthenticated", "deny").denied(&EVERYBODY),
        say("a pod may be stricter")
            .namespace_says("audit")
            .pod_says("all-authenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("and not laxer")
            .namespace_says("all-authenticated")
            .pod_says("all-unauthenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("audit is stricter than nothing").pod_says("audit").audited(&EVERYBODY),
        say("a value that nobody knows is deny, of a namespace").namespace_says("allow").denied(&EVERYBODY),
        say("and of a pod").pod_says("").denied(&EVERYBODY),
        say("a floor of all-authenticated refuses whom policies allow")
            .mesh("all-unauthenticated", "all-authenticated")
            .policy("{rules: [{}]}")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("one of cluster-authenticated also other trust domains")
            .mesh("audit", "cluster-authenticated")
            .policy("{rules: [{}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE, NEARLY]),
        say("one of deny as much as that")
            .mesh("audit", "deny")
            .policy("{rules: [{}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE, NEARLY]),
        say("and where no Allow is, everybody").mesh("audit", "deny").denied(&EVERYBODY),
    ]
}

fn audits() -> Vec<Sentence> {
    let audit = "{action: Audit, rules: [{from: [{namespaces: [shop]}]}]}";
    vec![
        say("an Audit denies nobody, and whom it would is audited")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["bank/teller 80", "nobody 80"]),
        say("matching one of several is enough")
            .policy(audit)
            .policy("{action: Audit, rules: [{to: [{ports: [81]}]}]}")
            .policy("{action: Audit}")
            .allowed(&["shop/web 80", "nobody 81"])
            .audited(&["nobody 80"]),
        say("whom an Allow admits is on trial all the same")
            .policy("{rules: [{to: [{ports: [80]}]}]}")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["nobody 80"])
            .denied(&["shop/web 81"]),
        say("who is denied is not").policy("{action: Deny, rules: [{}]}").policy(audit).denied(&EVERYBODY),
        say("an Audit is no Allow: the default decides")
            .namespace_says("all-authenticated")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["bank/teller 80"])
            .denied(&["nobody 80"]),
        say("nor does it admit where the default denies")
            .namespace_says("deny")
            .policy(audit)
            .denied(&EVERYBODY),
        say("the default audit is joined by Audits")
            .namespace_says("audit")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["bank/teller 80", "nobody 80"]),
        say("it is not in effect where an Allow is")
            .namespace_says("audit")
            .policy("{rules: [{}]}")
            .allowed(&EVERYBODY),
        say("an Audit that names identities leaves the default as it is")
            .policy("{action: Audit, rules: [{from: [{notNamespaces: [shop]}]}, {}]}")
            .allowed(&EVERYBODY),
        say("one about other pods is none")
            .policy("{action: Audit, selector: {matchLabels: {app: web}}}")
            .allowed(&EVERYBODY),
    ]
}
