//! `Service`: what each tenant got, as `fair` counts it, and who got least.
//!
//! A virtual token counter (VTC, arXiv 2401.00588): a tenant that comes to wait is lifted to the level, which is never below
//! the least served of those who wait, so that idleness earns nothing. Against floods of ever new tenants the level also
//! rises with all service, by its share per account, as in generalised processor sharing: then newcomers start ahead of
//! nobody for long. Must not know requests. Invariants: the level never falls; who waits has an account. Called by `turns.rs`.

use rustc_hash::FxHashMap;

/// Parts of a token in which service is counted, so that a share of one token among many accounts is not lost.
const UNIT: u64 = 1 << 16;

/// One tenant.
#[derive(Clone, Copy, Debug)]
struct Account {
    tenant: u32,
    served: u64,
    /// Sequences that wait.
    waiting: u32,
    /// When it began to wait: decides between equals.
    since: u64,
}

/// See the module's header.
pub(super) struct Service {
    accounts: Vec<Account>,
    by_tenant: FxHashMap<u32, usize>,
    level: u64,
    next_since: u64,
    limit: usize,
}

impl Service {
    /// `limit`: accounts beyond which idle ones are forgotten.
    pub fn new(limit: usize) -> Service {
        let by_tenant = FxHashMap::default();
        Service { accounts: Vec::new(), by_tenant, level: 0, next_since: 0, limit }
    }

    /// One more sequence of `tenant` waits. O(accounts) when it is the first.
    pub fn enter(&mut self, tenant: u32) {
        let at = self.account(tenant);
        if self.accounts[at].waiting == 0 {
            self.raise_level();
            let account = &mut self.accounts[at];
            account.served = account.served.max(self.level);
            account.since = self.next_since;
            self.next_since += 1;
        }
        self.accounts[at].waiting += 1;
    }

    /// One less.
    pub fn leave(&mut self, tenant: u32) {
        let at = self.account(tenant);
        self.accounts[at].waiting -= 1;
    }

    /// Weighed tokens of service.
    pub fn charge(&mut self, tenant: u32, tokens: u64) {
        let at = self.account(tenant);
        self.accounts[at].served += tokens * UNIT;
        self.level += tokens * UNIT / self.accounts.len() as u64;
    }

    /// Who of those that wait got least. Forgets whoever would be lifted to the level anyway. O(accounts).
    pub fn least(&mut self) -> Option<u32> {
        let tenant = self.least_waiting()?.tenant;
        self.raise_level();
        let mut at = 0;
        while let Some(&account) = self.accounts.get(at) {
            if account.waiting == 0 && account.served <= self.level { self.forget(at) } else { at += 1 }
        }
        Some(tenant)
    }

    fn least_waiting(&self) -> Option<&Account> {
        let waiting = self.accounts.iter().filter(|account| account.waiting > 0);
        waiting.min_by_key(|account| (account.served, account.since))
    }

    fn raise_level(&mut self) {
        let least = self.least_waiting().map_or(0, |account| account.served);
        self.level = self.level.max(least);
    }

    /// Index of the tenant's account, opened at the level if there is none.
    fn account(&mut self, tenant: u32) -> usize {
        if let Some(&at) = self.by_tenant.get(&tenant) {
            return at;
        }
        if self.accounts.len() >= self.limit {
            let idle = self.accounts.iter().enumerate().filter(|(_, account)| account.waiting == 0);
            let least = idle.min_by_key(|(_, account)| account.served).map(|(at, _)| at);
            least.into_iter().for_each(|at| self.forget(at));
        }
        self.accounts.push(Account { tenant, served: self.level, waiting: 0, since: 0 });
        self.by_tenant.insert(tenant, self.accounts.len() - 1);
        self.accounts.len() - 1
    }

    fn forget(&mut self, at: usize) {
        self.by_tenant.remove(&self.accounts.swap_remove(at).tenant);
        if let Some(moved) = self.accounts.get(at) {
            self.by_tenant.insert(moved.tenant, at);
        }
    }

    /// Checks that the accounts know who waits; `waiting`: the tenant of each sequence, in runs.
    pub fn audit(&self, waiting: impl Iterator<Item = u32>) {
        let mut counts: Vec<(u32, u32)> = Vec::new();
        for tenant in waiting {
            match counts.last_mut().filter(|(last, _)| *last == tenant) {
                Some((_, count)) => *count += 1,
                None => counts.push((tenant, 1)),
            }
        }
        let known = self.accounts.iter().filter(|account| account.waiting > 0);
        let mut known: Vec<_> = known.map(|account| (account.tenant, account.waiting)).collect();
        known.sort_unstable();
        assert_eq!(known, counts, "the accounts know who waits");
        let mut named = self.accounts.iter().enumerate();
        assert!(named.all(|(at, account)| self.by_tenant[&account.tenant] == at), "accounts are found by tenant");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_gets_equal_service_whatever_each_request_costs() {
        let mut service = Service::new(100);
        let cost = |tenant: u32, turn: u64| 1 + (u64::from(tenant) * 31 + turn * 7) % (10 * u64::from(tenant) + 5);
        let mut served = [0u64; 4];
        (0..4).for_each(|tenant| service.enter(tenant));
        for turn in 0..2_000 {
            let tenant = service.least().expect("somebody waits");
            let tokens = cost(tenant, turn);
            service.charge(tenant, tokens);
            served[tenant as usize] += tokens;
            let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
            assert!(most - least <= 2 * 34, "{served:?}: twice the largest request apart at most");
            service.audit(0..4);
        }
    }

    #[test]
    fn a_tenant_that_comes_back_starts_level_with_those_who_waited() {
        let mut service = Service::new(100);
        service.enter(1);
        service.charge(1, 10);
        service.leave(1);
        service.enter(2);
        for _ in 0..50 {
            assert_eq!(service.least(), Some(2));
            service.charge(2, 10);
        }
        service.enter(1);
        let turns = (0..8).map(|_| {
            let tenant = service.least().expect("both wait");
            service.charge(tenant, 10);
            tenant
        });
        let turns: Vec<u32> = turns.collect();
        assert_eq!(turns.iter().filter(|&&tenant| tenant == 1).count(), 4, "{turns:?}");
    }

    #[test]
    fn debt_is_remembered_while_it_counts_and_the_table_has_a_limit() {
        let mut service = Service::new(8);
        service.enter(0);
        service.charge(7, 1_000); // Has run out of turn, and is ahead.
        service.enter(7);
        assert_eq!(service.least(), Some(0));
        service.leave(7);
        for tenant in 100..200 {
            service.charge(tenant, 1);
        }
        assert!(service.accounts.len() <= 8, "{} accounts", service.accounts.len());
        service.enter(7);
        assert_eq!(service.least(), Some(0), "those with least debt were forgotten first");
    }
}
