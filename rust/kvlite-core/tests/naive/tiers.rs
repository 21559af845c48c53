//! The obvious host tier: which entries lie there, and which keep a copy there. Part of the oracle of `tests/model.rs`.

use super::segments::ATTENTION_COST_TOKENS;
use super::{Naive, Path};
use kvlite_core::BlockId;
use kvlite_core::cache::BlockCounts;

/// Tokens that a swap costs; so large that first blocks are not worth it, and deeper ones are.
pub const SWAP_COST_TOKENS: u32 = 2;

/// A block of the host: an entry that lies there, the twin of one on the device, or what is neither any more.
pub struct HostBlock {
    pub id: u64,
    /// None until the cache has said which one it took.
    pub block: Option<BlockId>,
    pub readers: u32,
    pub is_written: bool,
    pub idle_since: u64,
}

impl HostBlock {
    pub fn is_idle(&self) -> bool {
        self.readers == 0 && !self.is_written
    }
}

impl Naive {
    pub fn host_used(&self) -> usize {
        self.entries.iter().filter(|entry| entry.host.is_some()).count() + self.orphans.len()
    }

    pub fn host_counts(&self) -> BlockCounts {
        let all = || self.entries.iter().filter_map(|entry| entry.host.as_ref()).chain(&self.orphans);
        let cached = all().filter(|host| host.is_idle()).count();
        let in_transfer = all().filter(|host| host.is_written).count();
        let used = self.host_used();
        BlockCounts { free: self.regime.host_blocks - used, cached, owned: used - cached - in_transfer, in_transfer }
    }

    pub fn host_of(&mut self, id: u64) -> Option<&mut HostBlock> {
        let of_entries = self.entries.iter_mut().filter_map(|entry| entry.host.as_mut());
        of_entries.chain(&mut self.orphans).find(|host| host.id == id)
    }

    /// The oldest cached entry leaves the device.
    pub fn evict_entry(&mut self, at: usize) {
        let path = self.entries[at].path.clone();
        let tick = self.tick();
        self.leave_device(at);
        let entry = &mut self.entries[at];
        if let Some(host) = &mut entry.host {
            (entry.on_host, entry.released, entry.block) = (true, None, host.block.expect("twins have names"));
            host.idle_since = tick;
            return;
        }
        let (att, size) = (ATTENTION_COST_TOKENS as usize, self.regime.block_size);
        let has_tail = self.entries.iter().any(|other| other.path != path && other.path.starts_with(&path));
        let is_worth = has_tail || size * (att + path.len() - size) > SWAP_COST_TOKENS as usize * att;
        if self.room == 0 || !is_worth || !self.make_room_on_host() {
            return self.drop_path(&path);
        }
        self.room -= 1;
        let at = self.position(&path).expect("it lies on the device");
        let host = HostBlock { id: tick, block: None, readers: 0, is_written: true, idle_since: 0 };
        self.entries[at].host = Some(host);
        (self.entries[at].on_host, self.entries[at].released) = (true, None);
        self.owed.push(tick);
    }

    fn make_room_on_host(&mut self) -> bool {
        if self.host_used() < self.regime.host_blocks {
            return true;
        }
        let idle = |on_host: bool| {
            let idle_since = |at: &usize| self.entries[*at].host.as_ref().map(|host| host.idle_since);
            let is_idle = |at: &usize| {
                let entry = &self.entries[*at];
                entry.on_host == on_host && entry.host.as_ref().is_some_and(HostBlock::is_idle)
            };
            (0..self.entries.len()).filter(is_idle).min_by_key(idle_since)
        };
        match (idle(false), idle(true)) {
            (Some(twin), _) => self.entries[twin].host = None,
            (None, Some(node)) => self.drop_path(&self.entries[node].path.clone()),
            (None, None) => return false,
        }
        true
    }

    /// Forgets an entry and all below it.
    pub fn drop_path(&mut self, path: &Path) {
        for at in (0..self.entries.len()).rev() {
            if self.entries[at].path.starts_with(path) {
                let gone = self.entries.swap_remove(at);
                assert!(gone.users == 0 && (gone.on_host || gone.path == *path), "{:?} is in use", gone.path);
                self.orphans.extend(gone.host.filter(|host| !host.is_idle()));
            }
        }
    }

    pub fn end_write(&mut self, id: u64, done: bool) {
        let tick = self.tick();
        let host = self.host_of(id).expect("a block that is written stays");
        (host.is_written, host.idle_since) = (false, tick);
        self.orphans.retain(|host| !host.is_idle());
        let Some(at) = self.entries.iter().position(|entry| entry.host.as_ref().is_some_and(|host| host.id == id))
        else {
            return;
        };
        if !done && self.entries[at].on_host {
            self.drop_path(&self.entries[at].path.clone());
        } else if !done {
            self.entries[at].host = None;
        }
    }

    pub fn end_read(&mut self, id: u64) {
        let tick = self.tick();
        let host = self.host_of(id).expect("a block that is read stays");
        host.readers -= 1;
        if host.readers == 0 {
            host.idle_since = tick;
        }
        self.orphans.retain(|host| !host.is_idle());
    }

    pub fn clear(&mut self) {
        while let Some(at) = self.victim() {
            self.leave_device(at);
            (self.entries[at].on_host, self.entries[at].released) = (true, None);
        }
        for entry in &mut self.entries {
            let is_gone = entry.on_host;
            self.orphans.extend(entry.host.take().filter(|host| !host.is_idle()));
            entry.users = if is_gone { u32::MAX } else { entry.users };
        }
        self.entries.retain(|entry| entry.users != u32::MAX);
        self.segments.retain(|segment| !segment.is_cached());
    }
}
