//! What the engine reads in plans, and every promise to it checked as it reads.

use kvlite_core::FinishReason;
use kvlite_core::PolicyKind;
use kvlite_core::plan::{Cause, PlanView, Region, SAMPLE};
use kvlite_core::sched::policy::{Fcfs, Policy, Priority};

use super::device::Drawn;
use super::engine::Engine;
use super::hashes::LAYERS;
use super::mix;
use super::reuse::Progress;

impl Engine {
    pub(super) fn read(&mut self, idx: usize) {
        let layout = self.core.layout().clone();
        let arena = self.arenas[idx].clone();
        let plan = PlanView::new(&layout, &arena);
        for &value in &arena[..layout.region(Region::DonePlanId).offset] {
            self.digest = mix(self.digest ^ u64::from(value as u32));
        }
        for [row, position, token] in plan.rows::<3>(Region::Committed) {
            let (handle, choice) = self.rows[row as usize].expect("tokens come from rows that somebody holds");
            let told = self.told.get_mut(&handle).expect("rows belong to requests");
            assert_eq!(told.finished[choice as usize], None, "nothing follows the end of {handle}/{choice}");
            let output = &mut told.outputs[choice as usize];
            assert_eq!(output.len(), position as usize, "positions of {handle}/{choice} come one by one");
            output.push(token);
            let drawn = told.texts[choice as usize].tokens.get(self.asked[&handle].prompt.len() + position as usize);
            assert!(told.faulted || drawn == Some(&token), "{handle}/{choice} commits {token}, {drawn:?} was drawn");
        }
        for [handle, choice, reason] in plan.rows::<3>(Region::Finished) {
            let reason = FinishReason::from_code(reason).expect("a known reason");
            let choices =
                if choice < 0 { 0..self.asked[&handle].n as usize } else { choice as usize..choice as usize + 1 };
            assert!(choice >= 0 || !self.told[&handle].admitted, "-1 is for requests that never ran");
            for choice in choices {
                self.end(handle, choice, reason);
            }
        }
        for [handle, choice, row, cause, cached_len] in plan.rows::<5>(Region::Admitted) {
            self.admit(handle, choice as usize, row as usize, cause, cached_len);
        }
        self.device.meet(&plan);
        self.overlap.plan(&plan);
    }

    /// A sample must come from exactly the KV that its text has, whoever computed it.
    pub(super) fn check_draw(&mut self, sample: &Drawn) {
        let Drawn { handle, choice, kind, position, token, hidden } = *sample;
        let (asked, position) = (&self.asked[&handle], position as usize);
        let told = self.told.get_mut(&handle).expect("rows belong to requests");
        if told.faulted {
            return;
        }
        let of_choice = choice as usize;
        if told.texts[of_choice].tokens.is_empty() {
            told.texts[of_choice].tokens = asked.prompt.clone();
        }
        match told.blends[of_choice].progress {
            Progress::Explained => {}
            _ if asked.blend.is_none() => {}
            Progress::Forked => told.texts[of_choice] = told.texts[0].cut(asked.prompt.len()),
            Progress::Open => {
                let (stay, tokens) = (&told.blends[of_choice].stay, &told.texts[of_choice].tokens);
                let (text, recipe) = self.reuse.explain(sample, asked, stay, tokens);
                told.texts[of_choice] = text;
                told.blends[of_choice].left = recipe.left();
            }
        }
        told.blends[of_choice].progress = Progress::Explained;
        let text = &mut told.texts[of_choice];
        text.settle(position + 1);
        assert_eq!(hidden, text.hidden[position], "{handle}/{choice} reads wrong KV at position {position}");
        if kind == SAMPLE {
            assert_eq!(position + 1, text.tokens.len(), "{handle}/{choice} draws its next token");
            text.tokens.push(token);
        }
    }

    /// A decode step computes some reused rows again that no step before it has; its own row comes after them.
    pub(super) fn check_repair(&mut self, handle: i32, choice: usize, rows: &[usize]) {
        let told = self.told.get_mut(&handle).expect("rows belong to requests");
        let asked = &self.asked[&handle];
        if told.faulted {
            return;
        }
        let max = asked.blend.as_ref().map_or(0, |blend| blend.decode_rows as usize);
        assert!(rows.len() <= max, "{handle}/{choice} repairs {rows:?}, at most {max} at a time");
        let text = &mut told.texts[choice];
        text.settle(text.tokens.len() - 1);
        for &row in rows {
            assert!(told.blends[choice].left.remove(&row), "{handle}/{choice} repairs row {row}, which needs none");
            told.blends[choice].stay.repaired.insert(row);
            text.compute(row, LAYERS);
        }
        self.reuse.seen.repaired_rows += rows.len() as u64;
    }

    fn end(&mut self, handle: i32, choice: usize, reason: FinishReason) {
        let asked = &self.asked[&handle];
        let told = self.told.get_mut(&handle).expect("ends belong to requests");
        assert_eq!(told.finished[choice], None, "{handle}/{choice} ends once");
        told.finished[choice] = Some(reason);
        let output = &told.outputs[choice];
        let too_late = (1..output.len()).find(|&len| asked.natural_end(&output[..len]).is_some());
        assert!(too_late.is_none(), "{handle}/{choice} went on after its end: {output:?}");
        for holder in &mut self.rows {
            if *holder == Some((handle, choice as u32)) {
                *holder = None;
            }
        }
        let is_natural = asked.natural_end(output) == Some(reason);
        let why = match reason {
            _ if told.asked_to_finish[choice] == Some(reason) => true,
            FinishReason::Cancelled => told.aborted || self.reuse.is_let_go(asked),
            FinishReason::Error => told.faulted || self.reuse.may_fail(asked),
            FinishReason::Timeout => asked.deadline_ms.is_some_and(|deadline| deadline <= self.now_ms),
            FinishReason::Stop if asked.precompute.is_some() => {
                self.reuse.check_precomputed(handle, asked, &self.core);
                true
            }
            FinishReason::Stop | FinishReason::Length => is_natural,
        };
        assert!(why, "{handle}/{choice} ended with {reason:?} after {output:?}; nobody asked: {asked:?}");
        let wants_logprobs = asked.prompt_logprobs && choice == 0 && is_natural;
        if wants_logprobs && !told.faulted {
            let rows = &told.logprobs[..asked.prompt.len() - 1];
            assert!(rows.iter().all(|&count| count == 1), "{handle}: each prompt position is asked for once: {rows:?}");
        }
    }

    fn admit(&mut self, handle: i32, choice: usize, row: usize, cause: i32, cached_len: i32) {
        // Whoever held the row without having finished was preempted; whoever resumes leaves a former row behind.
        let resumes = cause == Cause::Resumed as i32;
        for holder in self.rows.iter_mut().filter(|holder| **holder == Some((handle, choice as u32))) {
            assert!(resumes, "{handle}/{choice} already has a row");
            *holder = None;
        }
        self.rows[row] = Some((handle, choice as u32));
        let asked = &self.asked[&handle];
        assert!((cached_len as usize) <= asked.prompt.len());
        let takes_hits = (asked.use_cache && !asked.prompt_logprobs) || cause == Cause::Imported as i32;
        assert!(takes_hits || cached_len == 0, "{handle} wants no hit");
        let told = self.told.get_mut(&handle).expect("admissions belong to requests");
        told.blends[choice] = told.blends[choice].next(cached_len as usize, cause == Cause::Forked as i32);
        if asked.blend.is_some() {
            let report = self.core.reuse_report(handle).expect("a live blended request has its report");
            self.reuse.admit(handle, asked, cached_len as usize, report, cause);
        }
        if cause != Cause::New as i32 {
            told.resumed += u32::from(resumes);
            told.admitted = true;
            return;
        }
        assert!((cached_len as usize) < asked.prompt.len(), "at least one prompt token is computed");
        told.admitted = true;
        told.cached_len[choice] = cached_len;
        self.check_order(handle);
    }

    /// Who was passed by this first admission, and whether the policy's bound allows that.
    fn check_order(&mut self, handle: i32) {
        if self.is_workload {
            return; // No bound holds, and no pass counts.
        }
        let config = self.core.config();
        let (policy, max_passes) = (config.policy, u64::from(config.max_passes));
        let (asked, arrival) = (&self.asked[&handle], self.told[&handle].arrival);
        let rank = |arrival, priority| match policy {
            PolicyKind::Priority => Priority.rank(arrival, priority),
            _ => Fcfs.rank(arrival, priority),
        };
        for (other, told) in &mut self.told {
            if told.admitted || told.moved || told.finished[0].is_some() {
                continue;
            }
            let other = &self.asked[other];
            if other.blend.is_some() || other.precompute.is_some() {
                continue; // It may be outside the queue.
            }
            let is_late = rank(told.arrival, other.priority) < rank(arrival, asked.priority);
            if is_late && matches!(policy, PolicyKind::Fcfs | PolicyKind::Priority) {
                panic!("{handle} overtook the head of the queue");
            }
            if is_late && other.tenant == asked.tenant {
                told.passes += 1;
                assert!(told.passes <= max_passes, "{handle} is one too many before another of its tenant");
            }
            if told.arrival < arrival && policy == PolicyKind::Priority {
                let passed_by = told.passed_by.entry(asked.priority).or_default();
                *passed_by += 1;
                let bound = Priority::may_be_passed_by(other.priority, asked.priority);
                assert!(*passed_by <= bound, "the waiting bound holds");
            }
        }
    }
}
