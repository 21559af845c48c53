//! Copy the KV of a request to another engine, or compute it again there: seconds of either, from measured rates.
//!
//! Owns nothing: one pure function. L tokens, h of them at the destination already, k bytes of KV per token, B bytes/s of the
//! link, P prefill tokens/s of the destination, r tokens/s that the request decodes: copying takes (L - h) k / B, and
//! what is decoded meanwhile is copied in later stages, which converges iff rho = r k / B < 1 (Llumnix, arXiv 2406.03243).

/// What is known of a request, a link and a destination. A rate of 0 is unknown.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Tokens whose KV the request has.
    pub len: u64,
    /// Of these, tokens that the destination has.
    pub hit: u64,
    /// Bytes of KV per token.
    pub kv_bytes_per_token: u64,
    /// Measured on the link.
    pub link_bytes_per_s: f64,
    /// Measured on the destination.
    pub prefill_tokens_per_s: f64,
    /// Of this one request.
    pub decode_tokens_per_s: f64,
    /// A decode step of the destination, in seconds.
    pub step_s: f64,
}

/// Which way, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// True: copy the KV. False: compute it again from the tokens.
    pub copy: bool,
    /// Seconds of all stages of a copy.
    pub copy_s: f64,
    /// Seconds of computing.
    pub replay_s: f64,
    /// The gap between two tokens to expect of the way chosen, in seconds.
    pub gap_s: f64,
}

impl Costs {
    /// The faster way. An unknown prefill rate copies, an unknown link replays; nothing left to copy copies.
    pub fn decide(&self) -> Decision {
        let missing = self.len.saturating_sub(self.hit) as f64;
        let per_token = self.kv_bytes_per_token as f64 / self.link_bytes_per_s;
        let rho = self.decode_tokens_per_s * per_token;
        let first_s = if missing > 0.0 { missing * per_token } else { 0.0 };
        // A copy that decoding outruns ends with a frozen stage as long as the one before it.
        let (copy_s, last_s) =
            if rho < 1.0 { (first_s / (1.0 - rho), first_s * rho * rho) } else { (2.0 * first_s, first_s) };
        let replay_s = if missing > 0.0 { missing / self.prefill_tokens_per_s } else { 0.0 };
        let copy = copy_s <= replay_s;
        // Freezing waits for a step boundary here, going on waits for one there: half a step each.
        let gap_s = self.step_s + if copy { last_s + finite(per_token) } else { replay_s };
        Decision { copy, copy_s, replay_s, gap_s }
    }
}

fn finite(seconds: f64) -> f64 {
    if seconds.is_finite() { seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs {
        len: 8192,
        hit: 0,
        kv_bytes_per_token: 131_072,
        link_bytes_per_s: 1.25e9,
        prefill_tokens_per_s: 200.0,
        decode_tokens_per_s: 20.0,
        step_s: 0.05,
    };

    #[test]
    fn a_slow_prefill_copies_and_a_fast_one_computes() {
        let slow = COSTS.decide();
        assert!(slow.copy && slow.copy_s < 1.0 && slow.replay_s > 40.0 && slow.gap_s < 0.06, "{slow:?}");
        let fast = Costs { prefill_tokens_per_s: 20_000.0, ..COSTS }.decide();
        assert!(!fast.copy && fast.gap_s == 0.05 + fast.replay_s, "{fast:?}");
    }

    #[test]
    fn the_gap_of_a_copy_is_flat_in_the_length_and_that_of_a_replay_is_not() {
        let gap = |len, prefill_tokens_per_s| Costs { len, prefill_tokens_per_s, ..COSTS }.decide().gap_s;
        assert!(gap(8192, 200.0) < 1.5 * gap(256, 200.0));
        assert!(gap(8192, 20_000.0) > 4.0 * gap(256, 20_000.0));
    }

    #[test]
    fn tokens_that_the_destination_has_cost_neither_way() {
        let none = Costs { hit: 8192, ..COSTS }.decide();
        assert_eq!((none.copy_s, none.replay_s), (0.0, 0.0));
        assert!(Costs { hit: 9000, ..COSTS }.decide().copy);
        let half = Costs { hit: 4096, ..COSTS }.decide();
        assert!((half.copy_s * 2.0 - COSTS.decide().copy_s).abs() < 1e-9);
    }

    #[test]
    fn a_copy_that_decoding_outruns_is_priced_as_two_blocking_ones() {
        let outrun = Costs { link_bytes_per_s: 2e6, ..COSTS }.decide();
        assert!(!outrun.copy && outrun.copy_s > 1_000.0);
    }

    #[test]
    fn unknown_rates_decide_without_a_nan() {
        assert!(Costs { prefill_tokens_per_s: 0.0, ..COSTS }.decide().copy);
        assert!(!Costs { link_bytes_per_s: 0.0, ..COSTS }.decide().copy);
        let neither = Costs { link_bytes_per_s: 0.0, prefill_tokens_per_s: 0.0, len: 0, ..COSTS }.decide();
        assert!(neither.copy && neither.gap_s.is_finite(), "{neither:?}");
    }
}
