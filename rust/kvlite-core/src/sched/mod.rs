//! What a step may hold: the price of prefill chunks, the room that admission must leave, who is preempted.
//!
//! Owns nothing: pure functions over numbers that `core` gathers. Knows neither blocks by name nor plans nor time.
//! Sources: chunked prefill beside decodes, Sarathi-Serve (arXiv 2403.02310); memory-centric admission, BatchLLM
//! (arXiv 2412.03594). Called by `core::schedule` and `core::admit`. Beside it: `migrate`, the protocol that moves requests
//! between engines, its `frames`, and `cost`; `groups`, who shares a prefix; `policy`, who comes first.

pub mod batching;
pub mod cost;
pub mod frames;
pub mod groups;
pub mod migrate;
pub mod policy;

/// Steps that a request may be held back while a running neighbour computes blocks that both begin with.
pub const HOLD_LIMIT_STEPS: u32 = 8;

/// The same, where others go on meanwhile and nobody waits for a token.
pub const WORKLOAD_HOLD_LIMIT_STEPS: u32 = 64;

/// `Pass::share` of rows that run through all layers.
pub const FULL_SHARE: u64 = 1 << 16;

/// What rows of a pass through the model cost.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Part of a token's price at the row's position, in 1 / `FULL_SHARE`.
    pub share: u64,
    /// Keys that a row looks at beside its attention.
    pub keys: u64,
}

impl Pass {
    /// Rows as in any prefill.
    pub const FULL: Pass = Pass { share: FULL_SHARE, keys: 0 };
}

/// What is left of a step's budget. One token at key position p costs `1 + p / c0`; cost is kept in units of 1 / c0.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    tokens: u32,
    cost: u64,
    full_cost: u64,
    c0: u64,
}

impl Budget {
    /// `tokens` of budget; `c0` is `attention_cost_tokens`.
    pub fn new(tokens: u32, c0: u32) -> Budget {
        let cost = u64::from(tokens) * u64::from(c0);
        Budget { tokens, cost, full_cost: cost, c0: u64::from(c0) }
    }

    /// Whether nothing has been spent yet.
    pub fn is_untouched(&self) -> bool {
        self.cost == self.full_cost
    }

    /// Tokens left.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Longest chunk of at most `wanted` tokens that starts at position `start`; with `at_least_one`, never 0 while a
    /// token is left, so that the partly done prefill goes on at any context length. O(log wanted).
    pub fn chunk_len(&self, start: u32, wanted: u32, at_least_one: bool) -> u32 {
        let (mut fits, mut limit) = (0, wanted.min(self.tokens));
        while fits < limit {
            let middle = limit - (limit - fits) / 2;
            if self.price(start, middle) <= self.cost { fits = middle } else { limit = middle - 1 }
        }
        if at_least_one { fits.max(wanted.min(self.tokens).min(1)) } else { fits }
    }

    /// Charges a chunk.
    pub fn spend(&mut self, start: u32, len: u32) {
        self.tokens -= len;
        self.cost = self.cost.saturating_sub(self.price(start, len));
    }

    /// Charges as many of `positions`, in order, as the budget pays for; returns how many. `at_least_one` as in
    /// `chunk_len`. O(rows).
    pub fn take_rows(&mut self, positions: &[u32], pass: Pass, at_least_one: bool) -> usize {
        let mut count = 0;
        for &position in positions.iter().take(self.tokens as usize) {
            let price = ((self.c0 + u64::from(position)) * pass.share).div_ceil(FULL_SHARE) + pass.keys;
            if price > self.cost && !(at_least_one && count == 0) {
                break;
            }
            self.cost = self.cost.saturating_sub(price);
            count += 1;
        }
        self.tokens -= count as u32;
        count
    }

    /// Charges work beside the rows, as much as looking at `keys` costs.
    pub fn spend_keys(&mut self, keys: u64) {
        self.cost = self.cost.saturating_sub(keys);
    }

    fn price(&self, start: u32, len: u32) -> u64 {
        let (start, len) = (u64::from(start), u64::from(len));
        len * self.c0 + len * start + len * len.saturating_sub(1) / 2
    }
}

/// Output tokens for which admission sets room aside for one sequence: `reserve_tokens`, and four times more with each
/// preemption, because a victim should come back later and stay. Overload thus costs a request few preemptions.
pub fn reserve_of(preemptions: u32, reserve_tokens: u32, block_size: u32) -> u32 {
    match preemptions {
        0 => reserve_tokens,
        times => reserve_tokens.max(block_size).saturating_mul(1 << (2 * times).min(24)),
    }
}

/// What one sequence still takes and would give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Demand {
    /// Blocks from now to its declared end.
    pub remaining: u64,
    /// Blocks that it holds and did not find as hits.
    pub held: u64,
}

/// The banker's check: whether an order exists in which everybody reaches the declared end with `available` blocks.
///
/// Serving the smallest remainder first is optimal, because each end only adds blocks. Blocks published by one sequence
/// and used by another count as held by the first: where sharing delays their return the check is optimistic, and the
/// leader's exemption from preemption still guarantees progress. O(n log n), sorts `demands`.
pub fn everyone_can_finish(mut available: u64, demands: &mut [Demand]) -> bool {
    demands.sort_unstable();
    for demand in demands {
        if demand.remaining > available {
            return false;
        }
        available += demand.held;
    }
    true
}

/// A running sequence as a candidate for preemption.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Tokens whose KV would be lost or parked.
    pub computed: u32,
    /// Index in the running list, oldest first.
    pub position: usize,
}

/// Least computed first; among equals the youngest. The caller leaves out the leader and whoever is in the plan already.
pub fn victim(candidates: impl Iterator<Item = Candidate>) -> Option<Candidate> {
    candidates.min_by_key(|candidate| (candidate.computed, usize::MAX - candidate.position))
}

/// How many entries two paths have in common, where an entry names all before it: equal at one place, they are equal up to
/// there. O(log length).
fn common_len<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let (mut shared, mut limit) = (0, a.len().min(b.len()));
    while shared < limit {
        let middle = limit - (limit - shared) / 2;
        if a[middle - 1] == b[middle - 1] { shared = middle } else { limit = middle - 1 }
    }
    shared
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_the_longest_whose_price_fits() {
        for (start, wanted, tokens, c0) in
            [(0, 500, 256, 64), (1000, 300, 256, 64), (100_000, 10, 8, 100), (7, 3, 9, 1)]
        {
            let budget = Budget::new(tokens, c0);
            let price = |len: u32| (0..len).map(|i| u64::from(c0) + u64::from(start + i)).sum::<u64>();
            let by_hand =
                (0..=wanted.min(tokens)).rev().find(|&len| price(len) <= u64::from(tokens) * u64::from(c0)).unwrap();
            assert_eq!(budget.chunk_len(start, wanted, false), by_hand);
            assert_eq!(budget.chunk_len(start, wanted, true), by_hand.max(1));
        }
    }

    #[test]
    fn rows_cost_what_the_same_chunk_costs_and_a_share_of_it_in_a_scoring_round() {
        let rows: Vec<u32> = (100..400).collect();
        let budget = Budget::new(64, 50);
        let whole = budget.chunk_len(100, 300, false);
        let half = Pass { share: FULL_SHARE / 2, keys: 0 };
        let (mut by_row, mut by_half) = (budget, budget);
        assert_eq!(by_row.take_rows(&rows, Pass::FULL, false) as u32, whole);
        let halves = by_half.take_rows(&rows, half, false) as u32;
        assert!(whole < halves && halves <= 2 * whole, "{halves} at half the price of {whole}");
        assert_eq!(by_row.take_rows(&rows, Pass::FULL, false), 0);
        assert_eq!(by_row.take_rows(&rows, Pass::FULL, true), 1);
        by_half = budget;
        by_half.spend_keys(64 * 50);
        assert_eq!((by_half.take_rows(&rows, half, false), by_half.is_untouched()), (0, false));
    }

    #[test]
    fn keys_that_rows_score_cost_as_much_as_keys_that_they_attend_to() {
        let mut budget = Budget::new(64, 50);
        let (attending, scoring) = ([300; 64], Pass { keys: 100, ..Pass::FULL });
        let (mut twin, rows) = (budget, [200; 64]);
        assert_eq!(budget.take_rows(&rows, scoring, false), twin.take_rows(&attending, Pass::FULL, false));
        assert_eq!(budget.take_rows(&[0; 64], Pass::FULL, false), twin.take_rows(&[0; 64], Pass::FULL, false));
    }

    #[test]
    fn a_spent_budget_gives_no_chunk_even_to_the_partly_done_prefill() {
        let mut budget = Budget::new(4, 1);
        budget.spend(0, 4);
        assert_eq!(budget.chunk_len(0, 5, true), 0);
    }

    #[test]
    fn the_bankers_check_finds_an_order_if_one_exists() {
        let demand = |remaining, held| Demand { remaining, held };
        assert!(everyone_can_finish(2, &mut [demand(5, 4), demand(2, 3)]));
        assert!(!everyone_can_finish(2, &mut [demand(6, 4), demand(2, 3)]));
        assert!(!everyone_can_finish(1, &mut [demand(2, 9), demand(2, 9)]));
    }
}
