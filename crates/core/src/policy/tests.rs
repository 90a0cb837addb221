use super::*;

fn id(text: &str) -> SpiffeId {
    format!("spiffe://{text}").parse().expect("valid")
}

fn exact(principals: &[&str]) -> Match {
    let patterns = principals.iter().map(|p| Pattern::Exact((*p).into())).collect();
    Match { principals: (patterns, Vec::new()), ..Match::default() }
}

fn port(port: u16) -> Match {
    Match { ports: (vec![port], Vec::new()), ..Match::default() }
}

fn policy(name: &str, action: Action, rules: &[&[Match]]) -> Policy {
    // Every match is a clause of its own here.
    let rules = rules.iter().map(|clauses| Rule(clauses.iter().map(|m| vec![m.clone()]).collect())).collect();
    Policy { name: name.into(), action, rules }
}

const WEB: &str = "cluster.local/ns/shop/sa/web";
const DB: &str = "cluster.local/ns/shop/sa/db";

fn decide(policies: &[Policy], caller: Option<&str>, port: u16) -> (Verdict, Option<String>) {
    let identity = caller.map(id);
    let source = "10.0.0.1".parse().expect("valid");
    let attempt = Attempt { identity: identity.as_ref(), source, port };
    let Decision { verdict, policy } = Guard::new(policies.iter().cloned().map(Arc::new)).decide(&attempt);
    (verdict, policy.map(|name| name.to_string()))
}

#[test]
fn deny_wins_and_an_allow_denies_the_rest() {
    use Verdict::*;
    let allow = policy("a/allow", Action::Allow, &[&[exact(&[WEB])]]);
    let deny = policy("a/deny", Action::Deny, &[&[exact(&[WEB]), port(81)]]);
    let named = |verdict, name: &str| (verdict, Some(name.to_owned()));
    let all = [allow.clone(), deny.clone()];
    assert_eq!(decide(&[], None, 80), (Allowed, None));
    assert_eq!(decide(&all, Some(WEB), 80), named(Allowed, "a/allow"));
    assert_eq!(decide(&all, Some(WEB), 81), named(Denied, "a/deny"));
    assert_eq!(decide(&all, Some(DB), 80), named(Denied, "a/allow"));
    assert_eq!(decide(&all, None, 80), named(Denied, "a/allow"));
    assert_eq!(decide(&[deny], Some(DB), 81), (Allowed, None));
    let nobody = policy("b/nobody", Action::Allow, &[]);
    assert_eq!(decide(std::slice::from_ref(&nobody), Some(WEB), 80), named(Denied, "b/nobody"));
    assert_eq!(decide(&[allow.clone(), nobody.clone()], Some(WEB), 80), named(Allowed, "a/allow"));
    assert_eq!(decide(&[allow, nobody], Some(DB), 80), (Denied, None), "no single policy is to blame");
}

#[test]
fn audits_are_told_of_and_change_nothing() {
    use Verdict::*;
    let audit = policy("a/trial", Action::Audit, &[&[exact(&[WEB])]]);
    let named = |verdict, name: &str| (verdict, Some(name.to_owned()));
    assert_eq!(decide(std::slice::from_ref(&audit), Some(WEB), 80), (Allowed, None));
    assert_eq!(decide(std::slice::from_ref(&audit), Some(DB), 80), named(Audited, "a/trial"));
    // What an Allow admits today is tried all the same; what a Deny denies is denied.
    let allow = policy("a/allow", Action::Allow, &[&[]]);
    assert_eq!(decide(&[allow.clone(), audit.clone()], Some(DB), 80), named(Audited, "a/trial"));
    let deny = policy("a/deny", Action::Deny, &[&[]]);
    assert_eq!(decide(&[allow, audit, deny], Some(DB), 80), named(Denied, "a/deny"));
}

#[test]
fn a_policy_that_cannot_be_understood_denies_everybody() {
    let unknown = Policy::unintelligible("a/newer".into());
    for caller in [None, Some(WEB)] {
        assert_eq!(decide(std::slice::from_ref(&unknown), caller, 80).0, Verdict::Denied);
    }
}

#[test]
fn patterns_match_identities_alone() {
    let with = |pattern: Pattern, negated: bool| {
        let (list, none) = (vec![pattern], Vec::new());
        let principals = if negated { (none, list) } else { (list, none) };
        policy("a/allow", Action::Allow, &[&[Match { principals, ..Match::default() }]])
    };
    for (pattern, matched, other) in [
        (Pattern::Exact(WEB.into()), WEB, DB),
        (Pattern::Prefix("cluster.local/ns/shop/".into()), WEB, "cluster.local/ns/shop2/sa/web"),
        (Pattern::Suffix("/sa/web".into()), WEB, DB),
    ] {
        let allowed =
            |negated, caller| decide(&[with(pattern.clone(), negated)], caller, 80).0 == Verdict::Allowed;
        assert!(allowed(false, Some(matched)) && !allowed(false, Some(other)), "{pattern:?}");
        assert!(!allowed(true, Some(matched)) && allowed(true, Some(other)), "not {pattern:?}");
        assert!(!allowed(false, None) && allowed(true, None), "{pattern:?} of a caller without identity");
    }
    assert_eq!(decide(&[with(Pattern::Presence, false)], Some(WEB), 80).0, Verdict::Allowed);
    assert_eq!(decide(&[with(Pattern::Presence, false)], None, 80).0, Verdict::Denied);
}

#[test]
fn a_rule_is_found_by_caller_only_if_it_lists_all_of_them() {
    let prefix = Match { principals: (vec![Pattern::Prefix("c".into())], Vec::new()), ..Match::default() };
    let lists = |clauses: Vec<Vec<Match>>| Rule(clauses).callers().map(|callers| callers.len());
    assert_eq!(lists(vec![vec![exact(&[WEB, DB])]]), Some(2));
    assert_eq!(lists(vec![vec![port(80)], vec![exact(&[WEB]), exact(&[DB])]]), Some(2));
    assert_eq!(lists(vec![vec![exact(&[WEB]), prefix.clone()]]), None);
    assert_eq!(lists(vec![vec![exact(&[WEB]), port(80)]]), None, "the second match is for anybody");
    assert_eq!(lists(vec![vec![prefix], vec![exact(&[WEB])]]), Some(1));
    assert_eq!(lists(vec![]), None);
    for (prefix, is_listed) in [
        ("cluster.local/ns/shop/sa/", true),
        ("cluster.local/ns/sa/sa/", true),
        ("cluster.local/ns/sa/", false),
        ("cluster.local/ns/shop/sa/w", false),
        ("cluster.local/", false),
        ("a/b/c/sa/", false),
    ] {
        let principals = (vec![Pattern::Prefix(prefix.into())], Vec::new());
        let rule = Rule(vec![vec![Match { principals, ..Match::default() }]]);
        assert_eq!(rule.callers().is_some(), is_listed, "{prefix}");
        let policy = Policy { name: "a/allow".into(), action: Action::Allow, rules: vec![rule] };
        for caller in
            [WEB, DB, "cluster.local/ns/sa/sa/web", "cluster.local/ns/shop2/sa/web", "other/ns/shop/sa/w"]
        {
            let expected = if caller.starts_with(prefix) { Verdict::Allowed } else { Verdict::Denied };
            assert_eq!(
                decide(std::slice::from_ref(&policy), Some(caller), 80).0,
                expected,
                "{prefix} {caller}"
            );
        }
    }
}
