//! The part of the story about policies: one on trial, and the same in force.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_testbed::{Agent, poll, programs};

use crate::screen::Screen;
use crate::story::{OldConnection, Shop};

const FILE: &str = "policy-shop-cache.yaml";
const NEWS: Duration = Duration::from_secs(5);

pub fn who_may_call(screen: &Screen, shop: &Shop) -> Result<()> {
    screen.step("Who may call whom: on trial");
    screen.say(
        "Only `web` is to call the cache. Before that is in force, we would like to know whom it would deny:",
    );
    let manifest = |action: &str| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata:\n  name: cache\n  namespace: shop\nspec:\n  selector:\n    matchLabels: {{app: cache}}\n  \
             action: {action}\n  rules:\n  - from:\n    - serviceAccounts: [web]\n"
        )
    };
    screen.diff("", &manifest("Audit"));
    shop.cluster.directory().write(FILE, &manifest("Audit"))?;
    let south = shop.cluster.agent("south")?;
    let mut open = OldConnection::open(shop)?;
    let line = poll::until_some(NEWS, "the agent tells of the client", || {
        open = OldConnection::open(shop)?;
        newest(south, &["connection would be denied", "shop/cache"])
    });
    screen.quote(&short(line.as_deref().unwrap_or_default()), "would be denied");
    screen.check("the client is let in, counted and told of: nothing breaks yet", line.map(drop))?;

    screen.step("Who may call whom: in force");
    screen.diff(&manifest("Audit"), &manifest("Allow"));
    open.ping()?;
    let begin = Instant::now();
    shop.cluster.directory().write(FILE, &manifest("Allow"))?;
    let cut = poll::until(NEWS, "the open connection ends", || Ok(open.ping().is_err()));
    let took = begin.elapsed();
    let cut = cut.and_then(|()| {
        ensure!(took < Duration::from_secs(1), "it took {took:?}");
        Ok(())
    });
    let text =
        format!("the client's open connection to redis is cut, {} ms after the change", took.as_millis());
    screen.check(&text, cut)?;
    let denied = OldConnection::open(shop).is_err();
    let denied = if denied { Ok(()) } else { Err(anyhow::anyhow!("a new connection was let in")) };
    screen.check("and a new one is refused before redis hears of it", denied)?;
    screen.say("The client's own agent knows why, and says so; strangers are told nothing:");
    let why = poll::until_some(NEWS, "the client's agent says why", || {
        newest(shop.cluster.agent("north")?, &["denied_by_peer", "shop/cache"])
    });
    screen.quote(&short(why.as_deref().unwrap_or_default()), "denied by policy shop/cache");
    screen.check("its access log names the policy", why.map(drop))?;
    let others = programs::curl_page(&shop.client, shop.web.at(80), &shop.page);
    screen.check("what the policy is not about goes on: nginx answers the client", others.map(drop))?;
    shop.cluster.directory().remove(FILE)?;
    let back = poll::until(NEWS, "redis answers again", || Ok(OldConnection::open(shop).is_ok()));
    screen.check("without the policy, redis answers again", back)
}

/// The newest line of an agent's log with all of these words.
fn newest(agent: &Agent, words: &[&str]) -> Result<Option<String>> {
    let log = agent.log().context("the agent's log")?;
    Ok(log.lines().rev().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned))
}

fn short(line: &str) -> String {
    [" src.addr", " dst.addr", " security"]
        .iter()
        .fold(line.to_owned(), |text, word| text.replace(word, &format!("\n {word}")))
}
