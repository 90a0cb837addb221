//! The API server, and the clock of this machine beside its.

use super::{
    report::{Check, Outcome},
    view::View,
};

/// ServiceCIDRs, by which the ranges of Services are known, are there since then.
const LOWEST: (u32, u32) = (1, 33);
/// Certificates are valid from a minute before they are made.
pub const MAX_SKEW: f64 = 60.0;
/// Less is no trouble, but a sign that nobody keeps the clock.
pub const NOTABLE_SKEW: f64 = 5.0;
pub const CLOCK_HINT: &str = "keep clocks with NTP (`timedatectl status` on the machine says whether that works); \
    certificates and tokens are refused where clocks disagree by a minute";

pub fn checks(view: &View) -> Vec<Check> {
    let version = &view.server.version;
    let supported = format!("Kubernetes is {}.{} or newer", LOWEST.0, LOWEST.1);
    vec![
        Check::success(format!("the API server answers ({version})")),
        if view.server.numbers >= LOWEST {
            Check::success(supported)
        } else {
            Check::error(
                supported,
                format!("it is {version}"),
                "upgrade the cluster; ServiceCIDRs are needed",
            )
        },
        // The answer has whole seconds, and took its time.
        Check::of(
            Outcome::Warning,
            "this machine's clock agrees with the API server's",
            if view.own_skew.abs() > NOTABLE_SKEW {
                vec![format!("it is {}", by(view.own_skew))]
            } else {
                Vec::new()
            },
            CLOCK_HINT,
        ),
    ]
}

/// "3.0 s ahead", "2 min behind".
pub fn by(skew: f64) -> String {
    let side = if skew > 0.0 { "ahead" } else { "behind" };
    match skew.abs() {
        amount if amount < 120.0 => format!("{amount:.0} s {side}"),
        amount if amount < 7200.0 => format!("{:.0} min {side}", amount / 60.0),
        amount => format!("{:.0} h {side}", amount / 3600.0),
    }
}
