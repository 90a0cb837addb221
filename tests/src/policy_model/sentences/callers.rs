//! Whom a rule matches: callers, by who they are and where they come from, and ports.

use super::{ELSEWHERE, EVERYBODY, IDENTIFIED, NEARLY, SHOP, Sentence, say};

pub fn all() -> Vec<Sentence> {
    [matching(), identities(), addresses_and_ports()].into_iter().flatten().collect()
}

fn matching() -> Vec<Sentence> {
    vec![
        say("a rule without from and to matches everybody").policy("{rules: [{}]}").allowed(&EVERYBODY),
        say("an Allow without rules matches nobody").policy("{}").denied(&EVERYBODY),
        say("one of the rules has to match")
            .policy("{rules: [{from: [{namespaces: [shop]}]}, {to: [{ports: [81]}]}]}")
            .allowed(&["shop/web 80", "shop/web 81", "nobody 81"])
            .denied(&["bank/teller 80", "nobody 80"]),
        say("one of from and one of to")
            .policy("{rules: [{from: [{namespaces: [shop]}, {serviceAccounts: [teller]}], to: [{ports: [80]}, {ports: [81]}]}]}")
            .allowed(&["shop/web 80", "shop/web 81", "bank/teller 80", "bank/teller 81"])
            .denied(&["shop/web 82", "bank/other 80", "nobody 81"]),
        say("every list of an item has to hold")
            .policy("{rules: [{from: [{namespaces: [shop], serviceAccounts: [shop/web, shop/job], cidrs: [10.42.1.0/24]}]}]}")
            .allowed(&["shop/web 80", "shop/job@10.42.1.200 80"])
            .denied(&["shop/other 80", "shop/web@10.42.2.1 80", "bank/web 80", "nobody 80"]),
        say("two identity lists of one item are both asked")
            .policy("{rules: [{from: [{namespaces: [shop], principals: ['*/sa/web']}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["shop/job 80", "bank/web 80"]),
    ]
}

fn identities() -> Vec<Sentence> {
    let principals = |list: &str| format!("{{rules: [{{from: [{{principals: [{list}]}}]}}]}}");
    vec![
        say("a principal is a whole SPIFFE ID")
            .policy(&principals("'spiffe://cluster.local/ns/shop/sa/web'"))
            .allowed(&["shop/web 80"])
            .denied(&["shop/web-admin 80", "shop/we 80", ELSEWHERE, "nobody 80"]),
        say("what begins so, with * at the end")
            .policy(&principals("'spiffe://cluster.local/ns/shop*'"))
            .allowed(&["shop/web 80", "shopping/web 80"])
            .denied(&["bank/web 80", ELSEWHERE, "nobody 80"]),
        say("what ends so, with * at the beginning")
            .policy(&principals("'*/sa/web'"))
            .allowed(&["shop/web 80", "bank/web 80", ELSEWHERE])
            .denied(&["shop/other-web 80", "nobody 80"]),
        say("the end may begin with the scheme's last letter").policy(&principals("'*/cluster.local/ns/shop/sa/web'")).allowed(&["shop/web 80"]).denied(&["shop/job 80"]),
        say("* alone is whoever has an identity").policy(&principals("'*'")).allowed(&IDENTIFIED).denied(&["nobody 80"]),
        say("so is the scheme alone").policy(&principals("'spiffe://*'")).allowed(&IDENTIFIED).denied(&["nobody 80"]),
        say("namespaces are whole names, of the mesh's own trust domain")
            .policy(SHOP)
            .allowed(&["shop/web 80", "shop/job 81"])
            .denied(&["shopping/web 80", "sho/web 80", ELSEWHERE, NEARLY, "nobody 80"]),
        say("so are service accounts, those without a namespace being of the policy's")
            .policy("{rules: [{from: [{serviceAccounts: [teller, shop/web]}]}]}")
            .allowed(&["bank/teller 80", "shop/web 80"])
            .denied(&["shop/teller 80", "bank/web 80", "bank/teller-2 80", ELSEWHERE, NEARLY, "nobody 80"]),
        say("not*: the caller is none of them")
            .policy("{rules: [{from: [{notNamespaces: [shop, test]}]}]}")
            .allowed(&["bank/teller 80", "shopping/web 80", ELSEWHERE])
            .denied(&["shop/web 80", "test/x 80"]),
        say("none of any of the lists")
            .policy("{rules: [{from: [{namespaces: [shop], notServiceAccounts: [shop/job], notPrincipals: ['*/sa/web']}]}]}")
            .allowed(&["shop/other 80"])
            .denied(&["shop/job 80", "shop/web 80", "bank/other 80"]),
        say("who shows no identity is in no positive list of a Deny")
            .policy("{action: Deny, rules: [{from: [{namespaces: [shop], notServiceAccounts: [shop/job]}]}]}")
            .policy("{rules: [{}]}")
            .allowed(&["nobody 80", "shop/job 80", "bank/teller 80"])
            .denied(&["shop/web 80"]),
        say("a Deny of all but some denies who shows no identity")
            .policy("{action: Deny, rules: [{from: [{notNamespaces: [shop]}]}]}")
            .policy("{rules: [{}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", "bank/teller 80", ELSEWHERE]),
        say("an Allow of all but some does not admit him")
            .policy("{rules: [{from: [{notPrincipals: ['*/sa/web']}]}]}")
            .allowed(&["shop/job 80"])
            .denied(&["nobody 80", "shop/web 80"]),
        say("nor does one with other lists besides")
            .policy("{rules: [{from: [{notServiceAccounts: [x], cidrs: [10.0.0.0/8]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", "bank/x 80"]),
        say("an Audit of all but some does not match him")
            .policy("{action: Audit, rules: [{from: [{notNamespaces: [shop]}]}]}")
            .allowed(&["bank/teller 80"])
            .audited(&["nobody 80", "shop/web 80"]),
        say("without any identity list he is as good as others")
            .policy("{rules: [{from: [{cidrs: [10.42.0.0/16], notCidrs: [10.42.9.0/24]}], to: [{notPorts: [81]}]}]}")
            .allowed(&["nobody 80", "shop/web 80"])
            .denied(&["nobody@10.42.9.1 80", "nobody@192.0.2.1 80", "nobody 81"]),
    ]
}

fn addresses_and_ports() -> Vec<Sentence> {
    vec![
        say("addresses are of one family or the other")
            .policy("{rules: [{from: [{cidrs: [10.42.1.10/32, 'fd00:10:42::/48']}]}]}")
            .allowed(&["nobody 80", "shop/web@fd00:10:42:1::7 80"])
            .denied(&["nobody@10.42.1.11 80", "nobody@fd00:10:43::7 80"]),
        say("0.0.0.0/0 is all of IPv4 and nothing of IPv6")
            .policy("{rules: [{from: [{cidrs: [0.0.0.0/0]}]}]}")
            .allowed(&["nobody@203.0.113.9 80"])
            .denied(&["nobody@fd00::1 80"]),
        say("::/0 the other way round").policy("{rules: [{from: [{cidrs: ['::/0']}]}]}").allowed(&["nobody@fd00::1 80"]).denied(&["nobody 80"]),
        say("notCidrs alone match everybody else")
            .policy("{action: Deny, rules: [{from: [{notCidrs: [10.42.0.0/16]}]}]}")
            .allowed(&["nobody 80", "shop/web 80"])
            .denied(&["shop/web@10.43.0.1 80", "nobody@fd00::1 80"]),
        say("ports and notPorts both count")
            .policy("{rules: [{to: [{ports: [80, 81], notPorts: [81]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["shop/web 81", "shop/web 82"]),
        say("notPorts alone are all the others").policy("{rules: [{to: [{notPorts: [81]}]}]}").allowed(&["nobody 80", "nobody 65535"]).denied(&["nobody 81"]),
        say("an item with an L7 field never allows")
            .policy("{rules: [{to: [{methods: [GET]}, {ports: [81], paths: [/a]}, {ports: [82]}]}]}")
            .allowed(&["shop/web 82"])
            .denied(&["shop/web 80", "shop/web 81"]),
        say("nor does a rule with nothing else").policy("{rules: [{to: [{notHosts: [a.example]}]}]}").denied(&EVERYBODY),
        say("in a Deny it is taken as fulfilled")
            .policy("{action: Deny, rules: [{from: [{namespaces: [shop]}], to: [{notMethods: [GET]}]}]}")
            .allowed(&["bank/teller 80"])
            .denied(&["shop/web 80", "shop/web 81"]),
        say("its ports still count")
            .policy("{action: Deny, rules: [{to: [{ports: [80], hosts: [a.example]}, {notPorts: [80, 81], notPaths: [/a]}]}]}")
            .allowed(&["shop/web 81"])
            .denied(&["shop/web 80", "nobody 82"]),
        say("on trial it would not allow either")
            .policy("{action: Audit, rules: [{to: [{methods: [GET]}, {ports: [81]}]}]}")
            .allowed(&["shop/web 81"])
            .audited(&["shop/web 80"]),
    ]
}
