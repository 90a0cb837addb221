//! Which endpoint of a service gets the next connection: the less loaded of two chosen at random.
//!
//! Two random choices come close to picking the least loaded of all, at a cost that does not grow with their number.

/// How many random draws may land on an unusable item before every item is looked at once.
const DRAWS: usize = 4;

/// Picks from `len` items. `random(n)` returns a uniform number below n; `usable` says whether an item may be picked;
/// `load` is what is compared. `None` where no item is usable.
pub fn pick(
    len: usize,
    mut random: impl FnMut(usize) -> usize,
    usable: impl Fn(usize) -> bool,
    load: impl Fn(usize) -> u64,
) -> Option<usize> {
    if len == 0 {
        return None;
    }
    let mut draw = || (0..DRAWS).map(|_| random(len)).find(|&i| usable(i));
    match (draw(), draw()) {
        (Some(a), Some(b)) => Some(if load(b) < load(a) { b } else { a }),
        (Some(only), None) | (None, Some(only)) => Some(only),
        (None, None) => {
            let start = random(len);
            (0..len).map(|i| (start + i) % len).find(|&i| usable(i))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small deterministic generator, so that a failure can be repeated.
    pub(crate) fn lcg() -> impl FnMut(usize) -> usize {
        let mut state = 42u64;
        move |n| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        }
    }

    #[test]
    fn nothing_usable() {
        assert_eq!(pick(0, lcg(), |_| true, |_| 0), None);
        assert_eq!(pick(5, lcg(), |_| false, |_| 0), None);
    }

    #[test]
    fn finds_the_one_usable_item_among_many() {
        for wanted in 0..100 {
            assert_eq!(pick(100, lcg(), |i| i == wanted, |_| 0), Some(wanted));
        }
    }

    #[test]
    fn evens_out_load() {
        let mut load = [0u64; 10];
        let mut random = lcg();
        for _ in 0..10_000 {
            let i = pick(10, &mut random, |_| true, |i| load[i]).expect("usable");
            load[i] += 1;
        }
        assert!(load.iter().all(|&l| l.abs_diff(1000) < 20), "{load:?}");
    }
}
