//! AuthorizationPolicies and default-inbound annotations as they are read.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};
use weft_api::{
    AuthorizationPolicy, DefaultInbound, Namespace, Pod,
    authorization_policy::{Action, PolicySpec, Principal, Target, Unintelligible},
    inbound_choice,
};

fn spec(spec: &Value) -> Result<PolicySpec, Unintelligible> {
    let object = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
    serde_json::from_value::<AuthorizationPolicy>(object).unwrap().spec
}

fn from(source: Value) -> Value {
    json!({"rules": [{"from": [source]}]})
}

#[test]
fn what_is_understood() {
    let read = spec(&json!({})).unwrap();
    assert_eq!((read.action, read.target, read.rules.len()), (Action::Allow, Target::Namespace, 0));
    assert_eq!(spec(&json!({"rules": null})).unwrap().rules.len(), 0);
    assert_eq!(spec(&json!({"selector": {}})).unwrap().target, Target::Namespace);
    let own = json!({"targetRefs": [{"kind": "Namespace", "name": "shop"}]});
    assert_eq!(spec(&own).unwrap().target, Target::Namespace);
    let services = json!({"targetRefs": [{"kind": "Service", "name": "a"}, {"group": "", "kind": "Service", "name": "b"}]});
    assert_eq!(spec(&services).unwrap().target, Target::Services(["a".to_owned(), "b".to_owned()].into()));

    for (text, expected) in [
        ("*", Principal::Any),
        ("spiffe://*", Principal::Any),
        ("spiffe://cluster.local/ns/a/sa/b", Principal::Exact("cluster.local/ns/a/sa/b".to_owned())),
        ("spiffe://cluster.local/ns/a/*", Principal::Prefix("cluster.local/ns/a/".to_owned())),
        ("*/sa/web", Principal::Suffix("/sa/web".to_owned())),
    ] {
        let read = spec(&from(json!({"principals": [text]}))).unwrap();
        assert_eq!(read.rules[0].from[0].principals, [expected], "{text}");
    }
    let account = spec(&from(json!({"serviceAccounts": ["web", "ops/web"]}))).unwrap();
    let namespaces: Vec<_> =
        account.rules[0].from[0].service_accounts.iter().map(|a| a.namespace.as_deref()).collect();
    assert_eq!(namespaces, [None, Some("ops")]);
}

#[test]
fn what_is_not_says_where_and_is_about_what_it_can() {
    let web = json!({"matchLabels": {"app": "web"}});
    let with = |mut spec: Value| {
        spec["selector"] = web.clone();
        spec
    };
    for (text, words) in [
        (json!({"moods": []}), "moods"),
        (json!({"action": "allow"}), "action"),
        (json!({"action": "Deny"}), "denies nobody"),
        (json!({"rules": [{"whom": []}]}), "rules[0]"),
        (json!({"rules": [{"from": []}]}), "rules[0].from"),
        (json!({"rules": [{"from": null}]}), "rules[0].from"),
        (json!({"rules": [{"from": [{}]}]}), "says nothing"),
        (json!({"rules": [{"to": [{}]}]}), "says nothing"),
        (from(json!({"princpals": ["*"]})), "princpals"),
        (from(json!({"principals": []})), "from[0].principals"),
        (from(json!({"principals": ["cluster.local/ns/a/sa/b"]})), "spiffe://"),
        (from(json!({"principals": ["spiffe://cluster.local/ns/a/sa/b/"]})), "TRUST_DOMAIN"),
        (from(json!({"principals": ["spiffe://Cluster.local/ns/a/sa/b"]})), "TRUST_DOMAIN"),
        (from(json!({"principals": ["spiffe://cluster.local/ns/a"]})), "TRUST_DOMAIN"),
        (from(json!({"principals": ["spiffe://a*/ns/b/sa/c"]})), "*"),
        (from(json!({"principals": ["**"]})), "*"),
        (from(json!({"principals": ["*://a/ns/b/sa/c"]})), "*"),
        (from(json!({"namespaces": ["shop/"]})), "namespace"),
        (from(json!({"serviceAccounts": ["a/b/c"]})), "service account"),
        (from(json!({"cidrs": ["10.0.0.1"]})), "range"),
        (from(json!({"cidrs": ["10.0.0.1/8"]})), "bits"),
        (from(json!({"cidrs": ["::ffff:10.0.0.0/104"]})), "IPv4"),
        (json!({"rules": [{"to": [{"ports": [0]}]}]}), "port"),
        (json!({"rules": [{"to": [{"ports": [65536]}]}]}), "port"),
        (json!({"rules": [{"to": [{"ports": ["http"]}]}]}), "ports[0]"),
    ] {
        let Unintelligible { why, target } = spec(&with(text.clone())).unwrap_err();
        assert!(why.contains(words), "{text}: {why}");
        assert_eq!(target, Target::Labels([("app".to_owned(), "web".to_owned())].into()), "{text}");
    }
    for text in [
        json!(null),
        json!("everybody"),
        json!({"selector": {}, "targetRefs": [{"kind": "Namespace", "name": "shop"}]}),
        json!({"selector": {"matchExpressions": []}}),
        json!({"selector": {"matchLabels": {"app": 7}}}),
        json!({"targetRefs": []}),
        json!({"targetRefs": [{"kind": "Namespace", "name": "other"}]}),
        json!({"targetRefs": [{"kind": "Gateway", "name": "a", "group": "gateway.networking.k8s.io"}]}),
        json!({"targetRefs": [{"kind": "Service", "name": "a"}, {"kind": "Namespace", "name": "shop"}]}),
    ] {
        assert_eq!(spec(&text).unwrap_err().target, Target::Namespace, "{text}");
    }
    let long = "x".repeat(100_000);
    assert!(spec(&from(json!({"principals": [long]}))).unwrap_err().why.len() <= 200);
    let missing = serde_json::from_value::<AuthorizationPolicy>(json!({"metadata": {"name": "p"}})).unwrap();
    assert!(missing.spec.is_err());
}

#[test]
fn who_may_call_where_no_policy_speaks() {
    use DefaultInbound::*;
    let annotated = |value: Option<&str>| {
        let annotations = value.map_or(json!({}), |value| json!({"policy.weft.dev/default-inbound": value}));
        json!({"metadata": {"name": "x", "annotations": annotations}})
    };
    for (mesh, floor, namespace, pod, expected, problem) in [
        (AllUnauthenticated, AllUnauthenticated, None, None, AllUnauthenticated, false),
        (Deny, AllUnauthenticated, None, None, Deny, false),
        (Deny, AllUnauthenticated, Some("audit"), None, Audit, false),
        (Deny, AllAuthenticated, Some("audit"), None, AllAuthenticated, false),
        (AllUnauthenticated, ClusterAuthenticated, None, None, ClusterAuthenticated, false),
        (AllUnauthenticated, AllUnauthenticated, Some("all-authenticated"), Some("deny"), Deny, false),
        (AllUnauthenticated, AllUnauthenticated, Some("deny"), Some("all-unauthenticated"), Deny, true),
        (AllUnauthenticated, AllUnauthenticated, Some("audit"), Some("all-unauthenticated"), Audit, true),
        (AllUnauthenticated, AllUnauthenticated, Some("Deny"), None, Deny, true),
        (AllUnauthenticated, AllUnauthenticated, Some(""), None, Deny, true),
        (AllUnauthenticated, AllUnauthenticated, Some("audit"), Some("nobody"), Deny, true),
    ] {
        let (namespace_object, pod_object): (Namespace, Pod) = (
            serde_json::from_value(annotated(namespace)).unwrap(),
            serde_json::from_value(annotated(pod)).unwrap(),
        );
        let choice = inbound_choice(mesh, floor, Some(&namespace_object), &pod_object);
        let row = format!("{mesh:?} {floor:?} {namespace:?} {pod:?}: {:?}", choice.problem);
        assert_eq!((choice.default, choice.problem.is_some()), (expected, problem), "{row}");
    }
    for default in DefaultInbound::ALL {
        assert_eq!(default.as_str().parse(), Ok(default));
    }
}
