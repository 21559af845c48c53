//! In which order waiting requests are admitted.
//!
//! A policy orders; it neither admits nor allocates, and sees no time. Each one's doc names its objective and the bound
//! on waiting that it guarantees; `tests/simulate.rs` checks the bound for every policy. Called by `core::add`.

use crate::config::PolicyKind;

/// Later arrivals that one level of priority may let pass.
pub const PRIORITY_STRIDE: i64 = 1024;

/// An order among requests, given once, at arrival, and kept through preemptions.
pub trait Policy: Send + Sync {
    /// Smaller is sooner; no two requests share `arrival`, which also decides between equal ranks.
    fn rank(&self, arrival: u64, priority: i32) -> i64;

    /// How many later arrivals of priority `other` may be admitted before a request of priority `own`: the waiting bound.
    fn may_be_passed_by(&self, own: i32, other: i32) -> u64;
}

/// Arrival order, shifted by priority (a lower value is sooner, as in vLLM).
///
/// Objective: fairness among equals; a priority level is worth `PRIORITY_STRIDE` places. The head of the queue is never
/// overtaken, not even by a request that would fit where the head does not. Waiting bound: a request of priority p is
/// passed by at most (p - q) * PRIORITY_STRIDE later arrivals of each priority q < p and by none of q >= p; with equal
/// priorities nobody is passed at all.
pub struct Fcfs;

impl Policy for Fcfs {
    fn rank(&self, arrival: u64, priority: i32) -> i64 {
        let arrival = i64::try_from(arrival).expect("arrivals are counted one by one");
        arrival + i64::from(priority) * PRIORITY_STRIDE
    }

    fn may_be_passed_by(&self, own: i32, other: i32) -> u64 {
        let levels = (i64::from(own) - i64::from(other)).max(0);
        (levels * PRIORITY_STRIDE) as u64
    }
}

/// The policy that a configuration names.
pub fn policy(kind: PolicyKind) -> Box<dyn Policy> {
    match kind {
        PolicyKind::Fcfs => Box::new(Fcfs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_passed_more_often_than_the_bound_says() {
        for own in -3..=3 {
            for other in -3..=3 {
                for arrival in [0, 1, 1_023, 1_024, 1_025, 5_000_000_007] {
                    let rank = Fcfs.rank(arrival, own);
                    let later = arrival + 1..arrival + 8 * PRIORITY_STRIDE as u64;
                    let passing = later.filter(|&later| Fcfs.rank(later, other) < rank).count() as u64;
                    let bound = Fcfs.may_be_passed_by(own, other);
                    assert!(passing <= bound, "{passing} of priority {other} pass {own}, the bound is {bound}");
                    assert!(bound == 0 || passing > 0, "a lower value does go first");
                }
            }
        }
    }
}
