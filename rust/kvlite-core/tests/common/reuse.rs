//! The engine's promises about reuse, checked as plans are read and run: what a blended draw has read, what the report said,
//! who may be served from whose segments.

use std::collections::{BTreeMap, BTreeSet};

use kvlite_core::cache::SegmentState;
use kvlite_core::plan::Cause;
use kvlite_core::{Core, CoreConfig, ReuseReport, SpanOutcome};

use super::blending::{Oracle, Recipe, Stay};
use super::device::Drawn;
use super::hashes::Naive;
use super::{Asked, PUBLIC};

/// How often the interesting things happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub blends: u64,
    pub placed_rows: u64,
    pub chosen_rows: u64,
    pub hits: u64,
    pub made: u64,
    pub holes: u64,
    /// Spans inside the KV that an earlier blend has left, and blends that replayed an earlier one's rows.
    pub recipe_hits: u64,
    pub replays: u64,
    pub resumed_blends: u64,
    pub repaired_rows: u64,
    pub precomputed: u64,
    pub precompute_errors: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Seen) {
        let Seen { blends, placed_rows, chosen_rows, hits, made, holes, .. } = *other;
        let Seen { recipe_hits, replays, resumed_blends, precomputed, precompute_errors, .. } = *other;
        self.blends += blends;
        self.placed_rows += placed_rows;
        self.chosen_rows += chosen_rows;
        self.hits += hits;
        self.made += made;
        self.holes += holes;
        self.recipe_hits += recipe_hits;
        self.replays += replays;
        self.resumed_blends += resumed_blends;
        self.repaired_rows += other.repaired_rows;
        self.precomputed += precomputed;
        self.precompute_errors += precompute_errors;
    }
}

impl Seen {
    /// A simulation in which one of them is rare says little.
    pub fn check(&self) {
        let Seen { blends, placed_rows, chosen_rows, hits, made, holes, .. } = *self;
        let Seen { recipe_hits, replays, resumed_blends, precomputed, .. } = *self;
        let rows_suffice = blends > 10_000 && placed_rows > 20_000 && chosen_rows > 10_000;
        let spans_suffice = hits.min(made).min(holes).min(precomputed) > 1_000 && recipe_hits > 200;
        let repairs_suffice = self.repaired_rows > 500;
        assert!(
            rows_suffice && spans_suffice && repairs_suffice && replays.min(resumed_blends) > 100,
            "too little happened: {self:?}"
        );
    }
}

/// Where one choice of a blended request is.
#[derive(Clone, Debug, Default)]
pub enum Progress {
    /// Nothing was drawn in this stay.
    #[default]
    Open,
    /// Goes by what choice 0 has read.
    Forked,
    /// What it has read is explained.
    Explained,
}

/// What is known of one choice's blend.
#[derive(Clone, Debug, Default)]
pub struct BlendTold {
    pub stay: Stay,
    pub progress: Progress,
    /// Reused rows of this stay that have not been computed again.
    pub left: BTreeSet<usize>,
}

impl BlendTold {
    /// The next stay.
    pub fn next(&self, hit: usize, is_forked: bool) -> BlendTold {
        let progress = if is_forked { Progress::Forked } else { Progress::Open };
        let stay = Stay { hit, placed: Vec::new(), repaired: self.stay.repaired.clone() };
        BlendTold { stay, progress, left: BTreeSet::new() }
    }
}

/// The oracle, and who asked for which text as a segment.
#[derive(Default)]
pub struct Reuse {
    pub oracle: Oracle,
    asked_for: BTreeMap<(u32, Vec<i32>), BTreeSet<i32>>,
    let_go: BTreeSet<(u32, Vec<i32>)>,
    /// A plan has failed, perhaps a maker's; or pins leave too little room for one.
    pub makers_may_fail: bool,
    pub seen: Seen,
}

impl Reuse {
    pub fn new(config: &CoreConfig) -> Reuse {
        Reuse { oracle: Oracle::new(&config.canonical_prefix), ..Reuse::default() }
    }

    /// Remembers that somebody dropped or unpinned a segment.
    pub fn let_go(&mut self, tenant: u32, ids: &[i32]) {
        self.let_go.insert((tenant, ids.to_vec()));
    }

    /// Whether the segment of a precomputing request was dropped or unpinned at some time.
    pub fn is_let_go(&self, asked: &Asked) -> bool {
        // It may have waited for a public one.
        let let_go = |tenant: u32| self.let_go.contains(&(tenant, asked.prompt.clone()));
        asked.precompute.is_some() && (let_go(asked.tenant) || let_go(PUBLIC))
    }

    /// Whether a precomputing request may end with an error.
    pub fn may_fail(&mut self, asked: &Asked) -> bool {
        let may_fail = asked.precompute.is_some() && self.makers_may_fail;
        self.seen.precompute_errors += u64::from(may_fail);
        may_fail
    }

    /// A pinned segment is there when the request that wanted it so ends.
    pub fn check_precomputed(&mut self, handle: i32, asked: &Asked, core: &Core) {
        let info = core.segment(asked.tenant, &asked.prompt);
        let is_ready = info.is_some_and(|info| info.state == SegmentState::Ready && info.pinned);
        // A public one serves as well, and is not the tenant's to pin.
        let is_public = self.asked_for.contains_key(&(PUBLIC, asked.prompt.clone())) && asked.tenant != PUBLIC;
        let must_stay = asked.precompute == Some(true) && !self.is_let_go(asked) && !is_public;
        assert!(is_ready || !must_stay, "{handle} pinned a segment that is not there: {info:?}");
        self.seen.precomputed += 1;
    }

    /// A report must add up on the first admission.
    pub fn admit(&mut self, handle: i32, asked: &Asked, hit: usize, report: &ReuseReport, cause: i32) {
        if cause == Cause::New as i32 {
            self.seen.blends += 1;
            self.check_report(handle, asked, hit, report);
        } else if cause == Cause::Resumed as i32 {
            self.seen.resumed_blends += 1;
        }
    }

    /// Learns of a request that may lead to segments.
    pub fn ask(&mut self, handle: i32, asked: &Asked) {
        let mut ask = |ids: &[i32]| {
            self.asked_for.entry((asked.tenant, ids.to_vec())).or_default().insert(handle);
        };
        if let Some(pinned) = asked.precompute {
            ask(&asked.prompt);
            self.makers_may_fail |= pinned;
        }
        for &(start, len) in asked.blend.iter().flat_map(|blend| &blend.spans) {
            ask(&asked.prompt[start as usize..(start + len) as usize]);
        }
    }

    /// Whether somebody else whose segments `tenant` may read has asked for `ids`.
    fn may_hit(&self, handle: i32, tenant: u32, ids: &[i32]) -> bool {
        let by_others = |tenant: u32| {
            let askers = self.asked_for.get(&(tenant, ids.to_vec()));
            askers.is_some_and(|askers| askers.iter().any(|&asker| asker != handle))
        };
        by_others(tenant) || by_others(PUBLIC)
    }

    /// A report must add up, and serve nobody from a segment that no one of his tenant has asked for.
    fn check_report(&mut self, handle: i32, asked: &Asked, hit: usize, report: &ReuseReport) {
        let blend = asked.blend.as_ref().expect("only blended requests have reports");
        let ReuseReport { prefix_tokens, blended_tokens, recomputed_tokens, computed_tokens, spans } = report;
        assert_eq!(*prefix_tokens as usize, hit, "{handle}: the report and `admitted` agree on the hit");
        let sum = prefix_tokens + blended_tokens + recomputed_tokens + computed_tokens;
        assert_eq!(sum as usize, asked.prompt.len(), "{handle}: the report covers the prompt: {report:?}");
        assert_eq!(spans.len(), blend.spans.len());
        for (&(start, len), outcome) in blend.spans.iter().zip(&**spans) {
            let span = start as usize..(start + len) as usize;
            let is_inside = span.end <= hit;
            match outcome {
                SpanOutcome::Prefix => assert!(is_inside, "{handle}: span {span:?} ends behind the hit {hit}"),
                SpanOutcome::Recipe => {
                    assert!(is_inside, "{handle}: span {span:?} ends behind the hit {hit}");
                    self.seen.recipe_hits += 1;
                }
                SpanOutcome::Hit => {
                    // Or the same text stands elsewhere in this prompt, and was made for that span.
                    let is_twin = |&&(at, len): &&(u32, u32)| {
                        at != start && asked.prompt[at as usize..(at + len) as usize] == asked.prompt[span.clone()]
                    };
                    let has_twin = blend.spans.iter().any(|span| is_twin(&span));
                    let may_hit = has_twin || self.may_hit(handle, asked.tenant, &asked.prompt[span]);
                    assert!(
                        may_hit,
                        "{handle}: a hit on a text that nobody else of its tenant asked for: {asked:?} {report:?}"
                    );
                    self.seen.hits += 1;
                }
                SpanOutcome::Made => self.seen.made += 1,
                SpanOutcome::Hole => self.seen.holes += 1,
            }
        }
    }

    /// The KV behind the first draw of a stay. `tokens` are all that were known then.
    pub fn explain(&mut self, sample: &Drawn, asked: &Asked, stay: &Stay, tokens: &[i32]) -> (Naive, Recipe) {
        let Drawn { handle, choice, hidden, .. } = *sample;
        let (naive, recipe, is_replay) = self.oracle.explain(asked, stay, tokens, hidden).unwrap_or_else(|| {
            panic!("{handle}/{choice} read KV that no rule explains: {stay:?} {asked:?} {tokens:?}")
        });
        self.seen.placed_rows += stay.placed.iter().map(|(start, end)| (end - start) as u64).sum::<u64>();
        self.seen.chosen_rows += recipe.chosen.len() as u64;
        self.seen.replays += u64::from(is_replay);
        (naive, recipe)
    }
}
