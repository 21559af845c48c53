//! Moves of requests between two engines, as whoever carries KV would do them: stages, copies that take their time, the
//! handover, and every way to break off.
//!
//! A copy reads the source when it ends, not when it begins: what was not held by then is seen as wrong KV.

use kvlite_core::{CoreError, ExportRow, FinishReason};

use super::Asked;
use super::engine::{Engine, Told};
use super::reuse::BlendTold;

/// One stage on its way.
struct Copy {
    hold: u32,
    /// Choice and index of each block, block of the source, block of the destination.
    blocks: Vec<(u32, u32, u32, u32)>,
}

impl Copy {
    fn overlaps(&self, rows: &[ExportRow]) -> bool {
        let is_again = |&[choice, index, _]: &ExportRow| {
            self.blocks.iter().any(|block| (block.0 as i32, block.1 as i32) == (choice, index))
        };
        rows.iter().any(is_again)
    }
}

/// A request between two engines.
pub struct Move {
    pub handle: i32,
    ticket: u32,
    hits: u32,
    copies: Vec<Copy>,
    arrival: u64,
    pub num_blocks: usize,
}

impl Move {
    /// Export and reservation; a destination without room leaves the request where it is.
    pub fn begin(from: &mut Engine, to: &mut Engine, handle: i32, deadline_ms: Option<i64>) -> Result<Move, CoreError> {
        let manifest = from.core.export_begin(handle)?;
        match to.core.reserve(&manifest, None, deadline_ms) {
            Ok((ticket, hits)) => {
                let arrival = to.arrivals;
                to.arrivals += 1;
                to.core.audit();
                Ok(Move { handle, ticket, hits, copies: Vec::new(), arrival, num_blocks: 0 })
            }
            Err(error) => {
                assert!(from.core.export_abort(handle), "it lives");
                Err(error)
            }
        }
    }

    /// Starts the copy of what can go now; returns its blocks.
    pub fn stage(&mut self, from: &mut Engine, to: &mut Engine) -> Result<usize, CoreError> {
        let left = from.core.export_left(self.handle)?;
        let (hold, rows) = from.core.export_stage(self.handle, self.hits)?;
        assert!(rows.len() <= left, "export_left promises no less than what goes");
        from.core.audit();
        // A block that goes again, for its blend was made anew, has one writer at a time.
        while self.copies.iter().any(|copy| copy.overlaps(&rows)) {
            self.land(from, to);
        }
        self.copies.push(Copy { hold, blocks: Vec::new() });
        for [choice, index, block] in rows {
            let (choice, index) = (choice as u32, index as u32);
            let target = to.core.import_block(self.ticket, choice, index)?;
            to.overlap.assert_unread(target, usize::MAX);
            self.copies.last_mut().expect("just pushed").blocks.push((choice, index, block as u32, target));
        }
        to.core.audit();
        Ok(self.copies.last().map_or(0, |copy| copy.blocks.len()))
    }

    pub fn num_copies(&self) -> usize {
        self.copies.len()
    }

    /// Ends the oldest copy. False: the reservation has expired meanwhile.
    pub fn land(&mut self, from: &mut Engine, to: &mut Engine) -> bool {
        let copy = self.copies.remove(0);
        let mut is_open = true;
        self.num_blocks += copy.blocks.len();
        for (choice, index, source, target) in copy.blocks {
            to.device.fill(target, &from.device.block(source));
            is_open &= to.core.import_filled(self.ticket, choice, index).is_ok();
        }
        from.core.transfer_done(copy.hold).expect("its copy was under way");
        from.core.audit();
        to.core.audit();
        is_open
    }

    /// The copies break off, both sides forget the move. Returns whether the request goes on at the source.
    pub fn abort(self, from: &mut Engine, to: &mut Engine) -> bool {
        for copy in &self.copies {
            from.core.transfer_done(copy.hold).expect("its copy was under way");
        }
        to.core.import_cancel(self.ticket);
        assert!(!to.core.import_cancel(self.ticket), "a cancelled reservation is gone");
        let goes_on = from.core.export_abort(self.handle);
        from.core.audit();
        to.core.audit();
        goes_on
    }

    /// The destination goes on with what the source has left; returns the new handle. Err: the reservation has expired.
    pub fn hand_over(mut self, from: &mut Engine, to: &mut Engine) -> Result<i32, (Move, CoreError)> {
        while self.num_copies() > 0 {
            self.land(from, to);
        }
        let manifest = from.core.export_final(self.handle).expect("it is frozen");
        let handle = match to.core.import_commit(self.ticket, &manifest, None, to.now_ms) {
            Ok(handle) => handle,
            Err(error) => return Err((self, error)),
        };
        to.core.audit();
        assert!(from.core.export_commit(self.handle).expect("it is frozen"), "it lives until the other has it");
        assert!(!from.core.export_commit(self.handle).expect("it is gone"), "it leaves once");
        from.core.audit();
        hand_told(from, to, self.handle, handle, self.arrival);
        Ok(handle)
    }
}

/// What was promised to the source's client is the destination's to keep.
fn hand_told(from: &mut Engine, to: &mut Engine, old: i32, new: i32, arrival: u64) {
    let asked = from.asked[&old].clone();
    let mut told = from.told.remove(&old).expect("it lived here");
    (told.arrival, told.moved) = (arrival, true);
    for holder in from.rows.iter_mut().filter(|holder| holder.is_some_and(|(handle, _)| handle == old)) {
        *holder = None;
    }
    to.reuse.ask(new, &asked);
    to.reuse.oracle.learn(&mut from.reuse.oracle, &asked);
    to.asked.insert(new, asked);
    assert!(to.told.insert(new, told).is_none(), "handles are not reused soon");
}

/// A frozen request is replayed elsewhere from what its client has seen, as after the death of its engine. Choices that
/// ended stay so.
pub fn replay(from: &mut Engine, to: &mut Engine, handle: i32) -> Result<i32, CoreError> {
    let asked = from.asked[&handle].clone();
    let old = &from.told[&handle];
    let outputs: Vec<Option<&[i32]>> =
        old.outputs.iter().zip(&old.finished).map(|(output, end)| end.is_none().then_some(&output[..])).collect();
    let is_fresh = outputs.iter().all(|output| output.is_some_and(<[i32]>::is_empty));
    let new = to.core.add_with_outputs(&asked.request(), &outputs, to.now_ms)?;
    to.core.audit();
    let mut told = from.told.remove(&handle).expect("it lived there");
    let fresh = Told::new(to.arrivals, &asked);
    to.arrivals += 1;
    (told.arrival, told.moved, told.admitted) = (fresh.arrival, true, !is_fresh);
    let was_faulted = std::mem::take(&mut told.faulted); // What its other choices drew since was not followed.
    (told.logprobs, told.aborted) = (fresh.logprobs, false);
    told.blends = vec![BlendTold::default(); asked.n as usize];
    for (choice, text) in told.texts.iter_mut().enumerate() {
        if told.finished[choice].is_none() {
            let known = asked.prompt.len() + told.outputs[choice].len();
            let tokens: Vec<i32> = [&asked.prompt[..], &told.outputs[choice]].concat();
            let is_known = was_faulted || text.tokens.is_empty();
            assert!(is_known || text.tokens[..known] == tokens, "what was committed was drawn");
            *text = super::hashes::Naive { tokens, ..Default::default() };
        }
    }
    assert!(from.core.export_commit(handle).expect("it is frozen"), "it lives until the other has it");
    from.core.audit();
    for holder in from.rows.iter_mut().filter(|holder| holder.is_some_and(|(other, _)| other == handle)) {
        *holder = None;
    }
    to.reuse.ask(new, &asked);
    to.reuse.oracle.learn(&mut from.reuse.oracle, &asked);
    to.asked.insert(new, asked);
    assert!(to.told.insert(new, told).is_none(), "handles are not reused soon");
    Ok(new)
}

/// Moves a request in one go: the source steps until it is frozen.
pub fn move_now(from: &mut Engine, to: &mut Engine, handle: i32) -> Result<i32, CoreError> {
    to.now_ms = to.now_ms.max(from.now_ms);
    let mut moving = Move::begin(from, to, handle, None)?;
    let mut stages = || {
        moving.stage(from, to)?;
        from.core.freeze(handle)?;
        from.turn();
        while !from.core.is_frozen(handle)? {
            from.turn();
        }
        moving.stage(from, to)
    };
    match stages() {
        Ok(_) => moving.hand_over(from, to).map_err(|(moving, error)| {
            moving.abort(from, to);
            error
        }),
        Err(error) => {
            moving.abort(from, to);
            Err(error)
        }
    }
}

/// Runs one engine until that request has ended; its first choice's output and every choice's end.
pub fn finish(engine: &mut Engine, handle: i32) -> (Vec<Vec<i32>>, Vec<FinishReason>) {
    for _ in 0..500 {
        let told = &engine.told[&handle];
        if !told.finished.contains(&None) {
            return (told.outputs.clone(), told.finished.iter().flatten().copied().collect());
        }
        engine.turn();
    }
    panic!("request {handle} does not end");
}

/// Runs an engine for some steps.
pub fn turns(engine: &mut Engine, count: usize) {
    for _ in 0..count {
        engine.turn();
    }
}

/// A prompt of different tokens.
pub fn prompt(len: usize, first: i32) -> Vec<i32> {
    (0..len as i32).map(|at| (first + 7 * at) % 97).collect()
}

/// The plain request of most tests.
pub fn asked(len: usize, max_tokens: u32) -> Asked {
    Asked::new(&prompt(len, 3), max_tokens)
}
