//! Processes that die or are given up, links that end, and what follows: restarts and replays.

use kvlite_core::sched::migrate::OWNER;

use super::World;
use crate::engine::{Engine, Wire};

impl World {
    /// A process dies; its peers notice later.
    pub fn kill(&mut self, engine: i32) {
        if self.engines[engine as usize].take().is_none() {
            return;
        }
        for peer in self.others(engine) {
            self.cuts.insert((peer, engine));
            self.cuts.remove(&(engine, peer));
            self.links.remove(&(peer, engine));
        }
        self.cuts.remove(&(engine, OWNER));
        self.links.remove(&(OWNER, engine));
    }

    fn others(&self, engine: i32) -> Vec<i32> {
        (0..self.engines.len() as i32).filter(|&peer| peer != engine && self.engines[peer as usize].is_some()).collect()
    }

    /// The owner takes an engine for dead, rightly or not.
    pub fn give_up(&mut self, engine: i32) {
        if !self.lost.insert(engine) {
            return;
        }
        self.links.remove(&(engine, OWNER));
        if self.engines[engine as usize].is_some() {
            self.cuts.insert((engine, OWNER));
        }
        let effects = self.owner.engine_down(engine);
        self.carry_out(effects);
    }

    /// The link between two engines ends; both notice later.
    pub fn cut(&mut self, one: i32, other: i32) {
        self.cuts.insert((one, other));
        self.cuts.insert((other, one));
    }

    /// `who` notices that its link to `peer` has ended.
    pub fn notice(&mut self, who: i32, peer: i32) {
        if !self.cuts.remove(&(who, peer)) {
            return;
        }
        self.links.remove(&(peer, who));
        if peer == OWNER {
            let now_ms = self.now_ms;
            let mut process = self.engines[who as usize].clone().expect("the living notice");
            let effects = process.mover.link_down(OWNER, now_ms);
            process.apply(effects);
            assert!(
                process.mover.moves().is_empty() && process.arriving.is_empty(),
                "without an owner nothing is held"
            );
            self.kill(who);
        } else {
            self.notice_peer(who, peer);
            self.flush(who);
        }
    }

    /// A new process in the place of one that is dead and given up.
    pub fn restart(&mut self, engine: i32) {
        if self.engines[engine as usize].is_none() && self.lost.remove(&engine) {
            self.engines[engine as usize] = Some(Engine::new(engine, self.limits.clone(), self.fenced));
        }
    }

    /// Replays a request that waits on an engine that the owner has not given up.
    pub fn replay(&mut self, request: u64, to: i32) {
        if self.lost.contains(&to) || !self.waiting.remove(&request) {
            return;
        }
        let epoch = self.owner.replay(request, to).expect("it waits for this");
        let stream = &self.streams[&request];
        let (choices, max_tokens) = (stream.choices.clone(), stream.max_tokens);
        // All tokens came, the word of the end did not: the owner knows the limit as well.
        for (choice, sequence) in (0..).zip(&choices) {
            if !sequence.ended && sequence.outputs.len() >= max_tokens {
                self.owner.finish(request, to, epoch, choice);
                self.end_choice(request, choice);
            }
        }
        let stream = &self.streams[&request];
        if !stream.is_over {
            let choices = stream.choices.clone();
            self.push(OWNER, to, Wire::Add { request, epoch, choices, max_tokens });
        }
        let due = self.owner.due();
        self.carry_out(due);
    }
}
