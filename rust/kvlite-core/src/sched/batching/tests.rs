//! The order against its definition, and against all orders there are.

use super::*;
use crate::ids::TenantId;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

const BLOCK: usize = 2;

#[derive(Clone, Debug)]
struct Asked {
    tenant: u32,
    tokens: Vec<Token>,
    output: u32,
}

fn asked(rng: &mut Rng, count: u64, num_blocks: u64) -> Vec<Asked> {
    let one = |rng: &mut Rng| {
        let num_tokens = 1 + rng.below(num_blocks * BLOCK as u64);
        let tokens = (0..num_tokens).map(|at| if at % 2 == 0 { rng.below(2) as Token } else { 7 }).collect();
        Asked { tenant: rng.below(2) as u32, tokens, output: 1 + rng.below(5) as u32 }
    };
    (0..count).map(|_| one(rng)).collect()
}

fn arranged(batching: &mut Batching, asked: &[Asked], running: &[Asked]) -> Vec<usize> {
    batching.clear();
    for each in asked.iter().chain(running) {
        batching.add(Label::exact(TenantId(each.tenant)), &each.tokens, each.output);
    }
    batching.arrange(running.len()).iter().map(|&at| at as usize).collect()
}

/// Blocks that two prompts begin with, compared token by token.
fn shared(a: &Asked, b: &Asked) -> usize {
    let alike = |(x, y): &(&[Token], &[Token])| x == y;
    let blocks = a.tokens.chunks_exact(BLOCK).zip(b.tokens.chunks_exact(BLOCK));
    if a.tenant == b.tenant { blocks.take_while(alike).count() } else { 0 }
}

/// The order by its definition: `members` share `depth` blocks; returns it with their output and their work from there.
fn naive(asked: &[Asked], members: &[usize], depth: usize, running: &[Asked]) -> (Vec<usize>, u64, u64) {
    let mut parts: Vec<Vec<usize>> = vec![];
    for &member in members {
        let is_kin = |part: &&mut Vec<usize>| shared(&asked[part[0]], &asked[member]) > depth;
        match parts.iter_mut().find(is_kin) {
            Some(part) => part.push(member),
            None => parts.push(vec![member]),
        }
    }
    let mut found = vec![];
    for part in parts {
        // Who runs below branches off too, so a lone prompt beside it hangs on a node.
        let others = part.iter().map(|&member| &asked[member]).chain(running);
        let kin = others.map(|other| shared(&asked[part[0]], other)).filter(|&blocks| blocks > depth);
        let is_current = running.iter().any(|other| shared(&asked[part[0]], other) > depth);
        let least = kin.min().unwrap_or(depth);
        if part.len() == 1 && !is_current {
            let one = &asked[part[0]];
            let work = one.tokens.len() - depth * BLOCK;
            found.push((false, part.clone(), u64::from(one.output), work as u64, part[0]));
            continue;
        }
        let (order, output, below) = naive(asked, &part, least, running);
        let edge = if is_current { 0 } else { (least - depth) * BLOCK };
        found.push((is_current, order, output, below + edge as u64, part[0]));
    }
    found.sort_by(|a, b| {
        let ratio = (b.2 * a.3.max(1)).cmp(&(a.2 * b.3.max(1)));
        b.0.cmp(&a.0).then(ratio).then(a.4.cmp(&b.4))
    });
    let (output, work) = found.iter().fold((0, 0), |sums, part| (sums.0 + part.2, sums.1 + part.3));
    (found.into_iter().flat_map(|part| part.1).collect(), output, work)
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    let Some(last) = count.checked_sub(1) else { return vec![vec![]] };
    let shorter = permutations(last);
    let with_last = |order: &Vec<usize>, at: usize| [&order[..at], &[last], &order[at..]].concat();
    shorter.iter().flat_map(|order| (0..count).map(move |at| with_last(order, at))).collect()
}

/// Blocks that are not computed when the cache holds the last prompt alone.
fn saved(asked: &[Asked], order: &[usize]) -> usize {
    order.windows(2).map(|pair| shared(&asked[pair[0]], &asked[pair[1]])).sum()
}

/// Blocks that are not computed when the cache holds everything before.
fn saved_by_infinite_cache(asked: &[Asked]) -> usize {
    let best = |at: usize| asked[..at].iter().map(|before| shared(before, &asked[at])).max().unwrap_or(0);
    (0..asked.len()).map(best).sum()
}

#[test]
fn no_order_saves_more_and_a_cache_of_one_path_saves_what_an_infinite_one_does() {
    let (mut rng, mut batching) = (Rng(1), Batching::new(BLOCK as u32));
    let mut most = 0;
    for round in 0..200 {
        let asked = asked(&mut rng, round % 7, 5);
        let order = arranged(&mut batching, &asked, &[]);
        let best = permutations(asked.len()).iter().map(|order| saved(&asked, order)).max().unwrap();
        assert_eq!(saved(&asked, &order), best, "{asked:?}");
        assert_eq!(best, saved_by_infinite_cache(&asked), "{asked:?}");
        most = most.max(best);
    }
    assert!(most > 5, "{most}");
}

#[test]
fn the_order_is_that_of_its_definition() {
    let (mut rng, mut batching) = (Rng(2), Batching::new(BLOCK as u32));
    for round in 0..400 {
        let asked = asked(&mut rng, round % 40, 6);
        let running = self::asked(&mut rng, round % 3, 6);
        let order = arranged(&mut batching, &asked, &running);
        let members: Vec<usize> = (0..asked.len()).collect();
        assert_eq!(order, naive(&asked, &members, 0, &running).0, "{asked:?} behind {running:?}");
    }
}

#[test]
fn much_output_for_little_prompt_comes_first_among_groups_and_inside_them() {
    let mut batching = Batching::new(BLOCK as u32);
    let one = |first: Token, own: Token, output| Asked {
        tenant: 0,
        tokens: vec![first, first, first, first, own, own],
        output,
    };
    let asked = [one(1, 1, 4), one(2, 2, 8), one(1, 3, 5), one(2, 4, 9), one(3, 5, 90)];
    assert_eq!(arranged(&mut batching, &asked, &[]), [4, 3, 1, 2, 0]);
    assert_eq!(arranged(&mut batching, &asked, &[one(1, 9, 1)]), [2, 0, 4, 3, 1], "who runs goes on first");
}

#[test]
fn ended_members_tell_how_long_the_others_of_their_group_will_be() {
    let mut batching = Batching::new(BLOCK as u32);
    let one = |first: Token, own: Token| Asked { tenant: 0, tokens: vec![first, first, own, own], output: 100 };
    let asked = [one(1, 1), one(1, 2), one(2, 3), one(2, 4)];
    assert_eq!(arranged(&mut batching, &asked, &[]), [0, 1, 2, 3]);
    let homes = batching.homes().to_vec();
    assert!(homes[0] == homes[1] && homes[1] != homes[2] && !homes.contains(&NO_HOME));
    for home in [homes[0], homes[2]] {
        batching.ended(home, if home == homes[0] { 5 } else { 50 });
    }
    assert_eq!(arranged(&mut batching, &asked, &[]), [2, 3, 0, 1], "5 tokens against 50");
    assert_eq!((batching.estimate(homes[0], 100), batching.estimate(homes[0], 3)), (5, 3));
    assert_eq!(batching.estimate(NO_HOME, 100), 28, "what all had is what is known of a stranger");
}

#[test]
fn an_order_of_very_many_long_nested_prompts_is_found() {
    let mut batching = Batching::new(1);
    let nested = |len: usize| Asked { tenant: 0, tokens: vec![1; len], output: 1 };
    let asked: Vec<Asked> = (1..2000).rev().map(nested).collect();
    let order = arranged(&mut batching, &asked, &[]);
    assert_eq!(order.len(), asked.len());
}
