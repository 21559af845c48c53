//! `Turns`: which line of the queue comes next.
//!
//! Owns the tickets of lines that take turns by arrival, and by `service.rs` the accounts of those that take them by service.
//! Must not know who takes a line's turn. Invariants: a line has a ticket per sequence that waits in it, none earlier than
//! the sequence's own rank would be in order; so no line gains a turn by its order, by aborts or by coming back. Called by
//! `queue.rs`.

use std::collections::BTreeSet;

use super::service::Service;
use crate::sched::policy::Lines;
use crate::sequence::Rank;

/// One way of taking turns.
pub(super) enum Turns {
    Common { waiting: usize },
    ByArrival(Tickets),
    LeastServed(Service),
}

impl Turns {
    /// `max_lines`: lines that the accounts of service remember.
    pub fn new(lines: Lines, max_lines: usize) -> Turns {
        match lines {
            Lines::Common => Turns::Common { waiting: 0 },
            Lines::ByArrival => Turns::ByArrival(Tickets::default()),
            Lines::LeastServed => Turns::LeastServed(Service::new(max_lines)),
        }
    }

    pub fn enter(&mut self, line: u32, rank: Rank) {
        match self {
            Turns::Common { waiting } => *waiting += 1,
            Turns::ByArrival(tickets) => tickets.give(line, rank),
            Turns::LeastServed(service) => service.enter(line),
        }
    }

    /// A sequence with this rank leaves the line without its turn.
    pub fn withdraw(&mut self, line: u32, rank: Rank) {
        match self {
            Turns::Common { waiting } => *waiting -= 1,
            Turns::ByArrival(tickets) => tickets.take_back(line, rank),
            Turns::LeastServed(service) => service.leave(line),
        }
    }

    /// Somebody of the line takes its turn.
    pub fn take(&mut self, line: u32) {
        match self {
            Turns::Common { waiting } => *waiting -= 1,
            Turns::ByArrival(tickets) => tickets.take_back(line, (i64::MIN, 0)),
            Turns::LeastServed(service) => service.leave(line),
        }
    }

    /// Whose turn it is; none: nobody waits.
    pub fn next(&mut self) -> Option<u32> {
        match self {
            Turns::Common { waiting } => (*waiting > 0).then_some(0),
            Turns::ByArrival(tickets) => tickets.in_order.first().map(|&(_, _, line)| line),
            Turns::LeastServed(service) => service.least(),
        }
    }

    #[inline]
    pub fn charge(&mut self, line: u32, tokens: u64) {
        if let Turns::LeastServed(service) = self {
            service.charge(line, tokens);
        }
    }

    /// Checks the invariants against the sequences that wait, (line, rank) each, line by line in order of rank.
    pub fn audit(&self, waiting: impl Iterator<Item = (u32, Rank)>) {
        match self {
            Turns::Common { waiting: count } => assert_eq!(waiting.count(), *count, "the queue knows its length"),
            Turns::ByArrival(tickets) => tickets.audit(waiting),
            Turns::LeastServed(service) => service.audit(waiting.map(|(line, _)| line)),
        }
    }
}

/// A ticket's number, beside its rank; choices of one request share a rank.
type Serial = u64;

/// Turns that lines have coming: each sequence brings one with its own rank, and whoever of the line is served uses the
/// oldest. O(log waiting) per change.
#[derive(Default)]
pub(super) struct Tickets {
    by_line: BTreeSet<(u32, Rank, Serial)>,
    in_order: BTreeSet<(Rank, Serial, u32)>,
    next: Serial,
}

impl Tickets {
    fn give(&mut self, line: u32, rank: Rank) {
        self.by_line.insert((line, rank, self.next));
        self.in_order.insert((rank, self.next, line));
        self.next += 1;
    }

    /// The line's oldest ticket that is not older than `rank`: one of a sequence that leaves is among those, since tickets
    /// are used up oldest first.
    fn take_back(&mut self, line: u32, rank: Rank) {
        let &ticket = self.by_line.range((line, rank, 0)..).next().expect("a ticket per sequence, none earlier");
        let (owner, rank, serial) = ticket;
        assert_eq!(owner, line, "a line has a ticket per sequence");
        self.by_line.remove(&ticket);
        self.in_order.remove(&(rank, serial, line));
    }

    fn audit(&self, waiting: impl Iterator<Item = (u32, Rank)>) {
        assert_eq!(self.by_line.len(), self.in_order.len(), "both orders hold the same tickets");
        let mut tickets = self.by_line.iter();
        for (line, rank) in waiting {
            let &(owner, due, _) = tickets.next().expect("a ticket per sequence");
            assert_eq!(owner, line, "line {line} has a ticket per sequence");
            assert!(due >= rank, "line {line}: a turn at {due:?} comes before the {rank:?} that it stands for");
        }
        assert_eq!(tickets.next(), None, "no ticket without a sequence");
    }
}
