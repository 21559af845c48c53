"""One token per row of logits: greedy or seeded Gumbel-max. See README.md."""
