//! What can happen in a world at a moment, and the fair course of things without faults.
//!
//! `explore` takes every action in turn, `simulate` draws one. A fault costs one of the budget.

use kvlite_core::sched::migrate::OWNER;

use crate::world::World;

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Deliver { from: i32, to: i32 },
    Answer { engine: i32, at: usize },
    Decode { engine: i32, request: u64 },
    Tick { engine: i32, request: u64 },
    Notice { who: i32, peer: i32 },
    Replay { request: u64, to: i32 },
    Fault(Fault),
}

/// One thing that goes wrong, or that somebody decides at a bad moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    Kill { engine: i32 },
    GiveUp { engine: i32 },
    Cut { one: i32, other: i32 },
    Cancel { request: u64 },
    CutChoice { request: u64 },
    TimeOut { engine: i32, request: u64 },
    Refuse { engine: i32, at: usize },
    Drop { from: i32, to: i32 },
    Double { from: i32, to: i32 },
    Overtake { from: i32, to: i32 },
    Spoil { from: i32, to: i32 },
    Order { request: u64, to: i32 },
}

impl World {
    /// Everything that can happen without a fault.
    pub fn regular(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        actions.extend(self.links.keys().map(|&(from, to)| Action::Deliver { from, to }));
        actions.extend(self.cuts.iter().map(|&(who, peer)| Action::Notice { who, peer }));
        for (engine, process) in (0..).zip(&self.engines) {
            let Some(process) = process else { continue };
            actions.extend((0..process.todo.len()).map(|at| Action::Answer { engine, at }));
            let running = process.live.iter().filter(|(_, live)| !live.is_frozen);
            actions.extend(running.map(|(&request, _)| Action::Decode { engine, request }));
            for (request, _, _, _, state) in process.mover.moves() {
                let asks = matches!(state, "tailed" | "reclaiming" | "claiming");
                let action = Action::Tick { engine, request };
                let waits = !matches!(state, "exporting" | "queued" | "staging") && !actions.contains(&action);
                if waits && !(asks && self.is_asking(engine, request)) {
                    actions.push(action);
                }
            }
        }
        for &request in &self.waiting {
            let engines = (0..self.engines.len() as i32).filter(|engine| !self.lost.contains(engine));
            actions.extend(engines.map(|to| Action::Replay { request, to }));
        }
        actions
    }

    /// Every fault that can happen now.
    pub fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let num_engines = self.engines.len() as i32;
        for (engine, process) in (0..).zip(&self.engines) {
            let Some(process) = process else {
                faults.extend((!self.lost.contains(&engine)).then_some(Fault::GiveUp { engine }));
                continue;
            };
            faults.push(Fault::Kill { engine });
            faults.extend((!self.lost.contains(&engine)).then_some(Fault::GiveUp { engine }));
            faults.extend((engine + 1..num_engines).map(|other| Fault::Cut { one: engine, other }));
            faults.extend((0..process.todo.len()).map(|at| Fault::Refuse { engine, at }));
            faults.extend(process.live.keys().map(|&request| Fault::TimeOut { engine, request }));
        }
        for &(from, to) in self.links.keys() {
            if self.is_frame(from, to, 0) {
                faults.push(Fault::Drop { from, to });
                faults.push(Fault::Double { from, to });
                if from != OWNER && to != OWNER {
                    faults.push(Fault::Spoil { from, to });
                }
            }
            faults.extend(self.is_frame(from, to, 1).then_some(Fault::Overtake { from, to }));
        }
        for (&request, _) in self.streams.iter().filter(|(_, stream)| !stream.is_over) {
            faults.push(Fault::Cancel { request });
            faults.push(Fault::CutChoice { request });
            faults.extend((0..num_engines).map(|to| Fault::Order { request, to }));
        }
        faults
    }

    pub fn act(&mut self, action: Action) {
        match action {
            Action::Deliver { from, to } => self.deliver(from, to, 0, false),
            Action::Answer { engine, at } => self.on(engine, |process, now_ms| process.answer(at, 1, false, now_ms)),
            Action::Decode { engine, request } => self.on(engine, |process, _| process.decode(request)),
            Action::Tick { engine, request } => self.on(engine, |process, now_ms| {
                let effects = process.mover.tick_one(request, now_ms);
                process.apply(effects);
            }),
            Action::Notice { who, peer } => self.notice(who, peer),
            Action::Replay { request, to } => self.replay(request, to),
            Action::Fault(fault) => self.fail(fault),
        }
        self.check_copies();
    }

    fn fail(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { engine } => self.kill(engine),
            Fault::GiveUp { engine } => self.give_up(engine),
            Fault::Cut { one, other } => self.cut(one, other),
            Fault::Cancel { request } => self.cancel(request),
            Fault::CutChoice { request } => self.cut_choice(request, 0),
            Fault::TimeOut { engine, request } => self.on(engine, |process, _| process.time_out(request)),
            Fault::Refuse { engine, at } => self.on(engine, |process, now_ms| process.answer(at, 1, true, now_ms)),
            Fault::Drop { from, to } => drop(self.links.get_mut(&(from, to)).and_then(|queue| queue.pop_front())),
            Fault::Double { from, to } => {
                let queue = self.links.get_mut(&(from, to)).expect("it holds a frame");
                let again = queue[0].clone();
                queue.push_back(again);
            }
            Fault::Overtake { from, to } => self.deliver(from, to, 1, false),
            Fault::Spoil { from, to } => self.deliver(from, to, 0, true),
            Fault::Order { request, to } => {
                self.order(request, to, false);
            }
        }
        self.links.retain(|_, queue| !queue.is_empty());
    }

    /// The fair course without faults: everything is noticed, delivered, answered and computed until all is at rest.
    pub fn settle(&mut self) {
        for _ in 0..400 {
            if self.is_at_rest() {
                break;
            }
            for engine in 0..self.engines.len() as i32 {
                if self.engines[engine as usize].is_none() {
                    self.give_up(engine);
                    self.restart(engine);
                }
            }
            for action in self.regular() {
                let is_there = match action {
                    Action::Answer { engine, at } => self.engine(engine).is_some_and(|process| at < process.todo.len()),
                    Action::Notice { who, peer } => self.cuts.contains(&(who, peer)),
                    _ => true,
                };
                let in_queue = match action {
                    Action::Deliver { from, to } => self.links.get(&(from, to)).map_or(0, |queue| queue.len()),
                    _ => usize::from(is_there),
                };
                for _ in 0..in_queue {
                    self.act(action);
                }
            }
            self.now_ms += 1;
        }
    }
}
