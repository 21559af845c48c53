//! Random reads and writes of the host tier, applied to the cache and to the list; part of `tests/model.rs`.

use super::naive::tiers::HostBlock;
use super::{BlockId, BlockState, Pair};

impl Pair {
    /// Tells the list which blocks the cache took for what the last allocation owes.
    pub fn name_demotions(&mut self) {
        let owed = std::mem::take(&mut self.naive.owed);
        let demotions: Vec<_> = self.cache.take_demotions().collect();
        assert_eq!(demotions.len(), owed.len(), "copies to the host");
        for (demotion, id) in demotions.into_iter().zip(owed) {
            assert!((demotion.source as usize) < self.naive.regime.num_blocks, "only the device's blocks are demoted");
            assert!(self.cache.is_on_host(demotion.target));
            self.naive.host_of(id).expect("it is written").block = Some(demotion.target);
            if let Some(entry) = self.naive.entries.iter_mut().find(|entry| entry.on_host && entry.has_host(id)) {
                entry.block = demotion.target;
            }
            self.writes.push((id, demotion.target));
            self.seen.demoted += 1;
        }
    }

    pub fn step_host(&mut self) {
        match self.random.below(3) {
            0 => {
                if !self.writes.is_empty() {
                    // Plans end in the order in which they were written.
                    let (id, block) = self.writes.remove(0);
                    let done = self.random.below(5) > 0;
                    self.cache.end_write(block, done);
                    self.naive.end_write(id, done);
                    self.seen.lost += usize::from(!done);
                }
            }
            1 => {
                let nodes = self.naive.entries.iter_mut().filter(|entry| entry.on_host);
                let mut hosts: Vec<&mut HostBlock> = nodes.filter_map(|entry| entry.host.as_mut()).collect();
                hosts.retain(|host| !host.is_written);
                if !hosts.is_empty() && self.reads.len() < 3 {
                    let at = self.random.index(hosts.len());
                    let (id, block) = (hosts[at].id, hosts[at].block.expect("named"));
                    hosts[at].readers += 1;
                    self.cache.begin_read(block);
                    self.reads.push((id, block));
                }
            }
            _ => {
                if !self.reads.is_empty() {
                    let at = self.random.index(self.reads.len());
                    let (id, block) = self.reads.swap_remove(at);
                    self.cache.end_read(block);
                    self.naive.end_read(id);
                }
            }
        }
    }

    /// The hits of a look-up by tier: those of the device, those of the host that can be read, and whether more arrive.
    pub fn split_both(&mut self, hits: &[BlockId]) {
        let (mut on_device, mut on_host) = (hits.to_vec(), Vec::new());
        let arrives = self.cache.split_hits(&mut on_device, &mut on_host);
        let first = hits.iter().position(|&block| self.cache.is_on_host(block)).unwrap_or(hits.len());
        let is_written = |&&block: &&BlockId| self.cache.state(block) != BlockState::InTransfer;
        let readable = hits[first..].iter().take_while(is_written).count();
        assert_eq!(on_device, hits[..first]);
        assert_eq!(on_host, hits[first..first + readable]);
        assert_eq!(arrives, first + readable < hits.len());
        self.seen.host_hits += on_host.len();
    }
}
