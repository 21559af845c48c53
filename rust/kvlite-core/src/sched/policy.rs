//! In which order waiting requests are admitted.
//!
//! A policy says whose turn it is and which of that turn's requests is the cheapest; it neither admits nor allocates, sees no
//! block and no time, and keeps nothing. Each one's doc names its objective and the bound on waiting that it guarantees.
//! What all of them share is `core::queue`'s: a request that `max_passes` later ones of its turn have passed goes first, and
//! what a cost says loses weight with every pass. `tests/simulate.rs` checks the bound for every policy.

use crate::config::PolicyKind;

/// Later arrivals that one level of priority may let pass.
pub const PRIORITY_STRIDE: i64 = 1024;

/// What an output token counts for beside a prompt token in the service that `fair` balances. Source: VTC (arXiv 2401.00588).
pub const OUTPUT_WEIGHT: u64 = 2;

/// Who takes turns with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    /// Nobody: all requests are one line.
    Common,
    /// Tenants, each as often and as early as its requests have come: whom a tenant sends in is its own affair.
    ByArrival,
    /// Tenants, the one that got the least service first.
    LeastServed,
}

/// What a policy is told of a waiting request, as of the last look at the cache. Lengths in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Prompt, and output that it has already.
    pub known: u32,
    /// From the beginning, found in the cache.
    pub cached: u32,
    /// Behind that, to be reused from segments.
    pub blended: u32,
    /// Of the blended ones, computed again.
    pub recomputed: u32,
}

impl Waiting {
    /// Rows that it would compute, reading and placing not counted.
    pub fn work(&self) -> u32 {
        self.known - self.cached - self.blended + self.recomputed
    }
}

/// An order among waiting requests.
pub trait Policy: Send + Sync {
    /// The place in line, given once, at arrival, and kept through preemptions. Smaller is sooner; no two requests share
    /// `arrival`, which also decides between equal ranks.
    fn rank(&self, arrival: u64, _priority: i32) -> i64 {
        i64::try_from(arrival).expect("arrivals are counted one by one")
    }

    /// Who takes turns.
    fn lines(&self) -> Lines {
        Lines::Common
    }

    /// Whether `cost` chooses among the requests of a turn; else the rank does, and the cache is not asked.
    fn compares(&self) -> bool {
        false
    }

    /// Smaller is sooner, 0 the least there is; in any unit that is the same for all.
    fn cost(&self, _waiting: &Waiting) -> u64 {
        0
    }
}

/// Arrival order.
///
/// Objective: fairness among requests, and no surprise. Waiting bound: nobody is passed at all, not even by a request that
/// would fit where the head of the queue does not.
pub struct Fcfs;

impl Policy for Fcfs {}

/// Arrival order, shifted by priority (a lower value is sooner, as in vLLM).
///
/// Objective: levels of urgency, aged: a level is worth `PRIORITY_STRIDE` places. The head of the queue is never overtaken.
/// Waiting bound: see `may_be_passed_by`; with equal priorities nobody is passed at all.
pub struct Priority;

impl Priority {
    /// How many later arrivals of priority `other` may be admitted before a request of priority `own`:
    /// (own - other) * `PRIORITY_STRIDE`, and none that is not more urgent.
    pub fn may_be_passed_by(own: i32, other: i32) -> u64 {
        let levels = (i64::from(own) - i64::from(other)).max(0);
        (levels * PRIORITY_STRIDE) as u64
    }
}

impl Policy for Priority {
    fn rank(&self, arrival: u64, priority: i32) -> i64 {
        Fcfs.rank(arrival, 0) + i64::from(priority) * PRIORITY_STRIDE
    }
}

/// The largest reused share of the prompt first (KVShare, arXiv 2503.16525).
///
/// Objective: time to the first token of those who reuse. A long prompt of which nine tenths are found goes before a short
/// cold one that costs less; `CacheAware` repairs that. Waiting bound: `max_passes` later requests of the same tenant, none
/// of another tenant's turn.
pub struct HitRate;

impl Policy for HitRate {
    fn lines(&self) -> Lines {
        Lines::ByArrival
    }

    fn compares(&self) -> bool {
        true
    }

    fn cost(&self, waiting: &Waiting) -> u64 {
        let new = u64::from(waiting.known - waiting.cached - waiting.blended);
        (new << 20) / u64::from(waiting.known.max(1))
    }
}

/// The least work first: rows to compute, a blend's recomputed ones among them.
///
/// Objective: mean time to the first token, as shortest-job-first has it, and fewer evictions of what is about to be hit.
/// Waiting bound: as `HitRate`. Source: the longest-prefix order of SGLang, which has no bound and counts hits instead of work.
pub struct CacheAware;

impl Policy for CacheAware {
    fn lines(&self) -> Lines {
        Lines::ByArrival
    }

    fn compares(&self) -> bool {
        true
    }

    fn cost(&self, waiting: &Waiting) -> u64 {
        waiting.work().into()
    }
}

/// The tenant that got the least service first, its least work first.
///
/// Objective: equal service among tenants that wait, however many requests each sends. Service is uncached prompt tokens,
/// counted at admission, and `OUTPUT_WEIGHT` per output token; who comes back starts level with those who wait, so idleness
/// earns nothing. A tenant's own order is the cache-aware one (DLPM, arXiv 2501.14312), because what it saves is its own
/// service. Waiting bounds: `max_passes` later requests of the same tenant; the service of two tenants while both wait
/// differs by at most twice the largest that is charged between two turns (VTC); and a tenant that is ahead by
/// d tokens waits for at most d and one request more per other tenant, newcomers included (`core::service`).
pub struct Fair;

impl Policy for Fair {
    fn lines(&self) -> Lines {
        Lines::LeastServed
    }

    fn compares(&self) -> bool {
        true
    }

    fn cost(&self, waiting: &Waiting) -> u64 {
        CacheAware.cost(waiting)
    }
}

/// Who begins alike comes together, groups with much output for little prompt first (BatchLLM, arXiv 2412.03594).
///
/// Objective: throughput: every shared prefix is computed and stored once, read once per step, and gone when its group is
/// done; later prefill finds decodes beside it. The order is `sched::batching`'s, kept by `core::arrange`; a rank only says
/// who is older. Waiting bound: `max_passes` later requests, whoever they belong to.
pub struct PrefixGrouped;

impl Policy for PrefixGrouped {}

/// The policy that a configuration names.
pub fn policy(kind: PolicyKind) -> Box<dyn Policy> {
    match kind {
        PolicyKind::Fcfs => Box::new(Fcfs),
        PolicyKind::Priority => Box::new(Priority),
        PolicyKind::HitRate => Box::new(HitRate),
        PolicyKind::CacheAware => Box::new(CacheAware),
        PolicyKind::Fair => Box::new(Fair),
        PolicyKind::PrefixGrouped => Box::new(PrefixGrouped),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn under_priority_nobody_is_passed_more_often_than_the_bound_says() {
        for own in -3..=3 {
            for other in -3..=3 {
                for arrival in [0, 1, 1_023, 1_024, 1_025, 5_000_000_007] {
                    let rank = Priority.rank(arrival, own);
                    let later = arrival + 1..arrival + 8 * PRIORITY_STRIDE as u64;
                    let passing = later.filter(|&later| Priority.rank(later, other) < rank).count() as u64;
                    let bound = Priority::may_be_passed_by(own, other);
                    assert!(passing <= bound, "{passing} of priority {other} pass {own}, the bound is {bound}");
                    assert!(bound == 0 || passing > 0, "a lower value does go first");
                }
            }
        }
    }

    #[test]
    fn a_long_prompt_of_hits_goes_before_a_short_cold_one_by_share_and_not_by_work() {
        let long = Waiting { known: 10_000, cached: 9_000, blended: 0, recomputed: 0 };
        let short = Waiting { known: 100, ..Waiting::default() };
        let blend = Waiting { known: 1_000, cached: 100, blended: 800, recomputed: 120 };
        assert!(HitRate.cost(&long) < HitRate.cost(&short));
        assert!(CacheAware.cost(&short) < CacheAware.cost(&long));
        assert_eq!(CacheAware.cost(&blend), 220, "100 new rows and those that are computed again");
        assert_eq!(HitRate.cost(&blend), HitRate.cost(&long), "both reuse nine tenths");
    }
}
