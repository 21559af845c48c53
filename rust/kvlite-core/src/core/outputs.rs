//! Replay: a request that has produced tokens elsewhere is added with them and goes on behind them.
//!
//! It waits like a preempted one: prompt and outputs are computed again, prefix and segment hits save what they can.
//! Called by the binding.

use super::{Core, NO_SLOT, Request, RequestState};
use crate::blend::Blend;
use crate::error::CoreError;
use crate::ids::Token;

impl Core {
    /// As `add`, for a request whose choices have `outputs` already; none: that choice has ended. Tokens that are committed
    /// from now on continue their positions, and the first admission of each has cause imported.
    ///
    /// Errors: as `add`; not one entry per choice, nobody left, an output that its choice could not go on from.
    pub fn add_with_outputs(
        &mut self,
        request: &Request<'_>,
        outputs: &[Option<&[Token]>],
        now_ms: i64,
    ) -> Result<i32, CoreError> {
        self.check(request)?;
        self.check_outputs(request, outputs)?;
        self.check_queue()?;
        let rank = self.take_rank(request.priority);
        let is_fresh = outputs.iter().all(|output| output.is_some_and(<[Token]>::is_empty));
        let live = outputs.iter().flatten().count() as u32;
        let state = RequestState { announced: !is_fresh, num_unfinished: live, ..request.state() };
        let index = self.register(state, request.deadline_ms, now_ms);
        let num_sequences = if is_fresh { 1 } else { outputs.len() };
        for (choice, output) in outputs.iter().take(num_sequences).enumerate() {
            let Some(output) = output else { continue };
            let mut seq = request.sequence(choice as u32, rank);
            seq.tokens.extend_from_slice(output);
            seq.arrived = true;
            seq.blend = request.blend.as_ref().map(|blend| Box::new(Blend::new(blend.rule())));
            self.join(index, seq);
        }
        self.request_mut(index).choices.resize(num_sequences, NO_SLOT);
        self.stats.requests_total += 1;
        for choice in 0..num_sequences {
            self.slot_of(index, choice).into_iter().for_each(|slot| self.enqueue(slot));
        }
        Ok(self.request(index).handle)
    }

    fn check_outputs(&self, request: &Request<'_>, outputs: &[Option<&[Token]>]) -> Result<(), CoreError> {
        if outputs.len() != request.n as usize || outputs.iter().all(Option::is_none) {
            return Err(CoreError::Outputs { count: outputs.len(), n: request.n });
        }
        for (choice, output) in outputs.iter().enumerate() {
            let Some(output) = output else { continue };
            if output.len() >= request.max_tokens as usize {
                let (len, max_tokens) = (output.len(), request.max_tokens);
                return Err(CoreError::OutputTooLong { choice, len, max_tokens });
            }
            if !output.is_empty() {
                self.check_tokens(output, request.tenant)?;
            }
        }
        Ok(())
    }
}
