//! Blended reuse, scenario by scenario, with plans read and completed by hand; the simulation has the oracle.

mod driver;
mod makers;
mod mixes;
mod phases;
mod recipes;
