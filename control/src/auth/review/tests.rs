//! What the API server may answer, and who that is.

use serde_json::{Value, json};

use super::*;

fn agent() -> Account {
    Account { namespace: "weft-system".to_owned(), name: "weft-agent".to_owned() }
}

fn answer(user: &str, extra: Value) -> Value {
    json!({"authenticated": true, "audiences": ["weft"], "user": {"username": user, "extra": extra}})
}

fn decided(status: Value) -> Result<Caller, &'static str> {
    decide(serde_json::from_value(status).unwrap(), &agent()).map_err(|refused| refused.reason())
}

const AGENT_USER: &str = "system:serviceaccount:weft-system:weft-agent";

#[test]
fn only_the_agents_account_with_its_node_is_a_node() {
    let bound = json!({NODE_NAME: ["n1"], POD_UID: ["1"]});
    assert_eq!(decided(answer(AGENT_USER, bound.clone())), Ok(Caller::Node("n1".to_owned())));
    for (namespace, name) in [("shop", "weft-agent"), ("weft-system", "weft-control"), ("shop", "web")] {
        let user = format!("system:serviceaccount:{namespace}:{name}");
        let account = Account { namespace: namespace.to_owned(), name: name.to_owned() };
        assert_eq!(decided(answer(&user, bound.clone())), Ok(Caller::Account(account)));
    }
    for unbound in [
        json!(null),
        json!({}),
        json!({NODE_NAME: ["n1"]}),
        json!({POD_UID: ["1"]}),
        json!({NODE_NAME: [], POD_UID: ["1"]}),
        json!({NODE_NAME: ["n1", "n2"], POD_UID: ["1"]}),
        json!({NODE_NAME: [""], POD_UID: ["1"]}),
        json!({NODE_NAME: ["n1/n2"], POD_UID: ["1"]}),
    ] {
        assert_eq!(decided(answer(AGENT_USER, unbound.clone())), Err("token_without_node"), "{unbound}");
    }
}

#[test]
fn what_the_api_server_does_not_vouch_for_is_refused() {
    let good = answer(AGENT_USER, json!({NODE_NAME: ["n1"], POD_UID: ["1"]}));
    let changed = |field: &str, value: Value| {
        let mut status = good.clone();
        status[field] = value;
        decided(status)
    };
    assert_eq!(changed("authenticated", json!(false)), Err("token_rejected"));
    assert_eq!(changed("authenticated", json!(null)), Err("token_rejected"));
    assert_eq!(changed("audiences", json!(null)), Err("token_rejected"));
    assert_eq!(changed("audiences", json!(["https://kubernetes.default.svc"])), Err("token_rejected"));
    assert_eq!(changed("user", json!(null)), Err("token_rejected"));
    assert_eq!(decided(json!({})), Err("token_rejected"));
    for user in ["admin", "system:node:n1", "system:serviceaccount:web", "system:serviceaccount:a/b:web", ""]
    {
        assert_eq!(decided(answer(user, json!({}))), Err("not_an_account"), "{user}");
    }
}
