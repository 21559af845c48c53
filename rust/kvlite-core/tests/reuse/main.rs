//! Blended reuse, scenario by scenario, with plans read and completed by hand; the simulation has the oracle.

mod driver;
mod makers;
mod phases;
mod recipes;
