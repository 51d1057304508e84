//! The cases that only one of the two worlds can have, each with its reason. Everything else runs in both.

use crate::Kind;

/// (test, the world that has it, why the other cannot).
pub const CASES: &[(&str, Kind, &str)] = &[];

/// Fails for a test that runs in one world without standing in the table.
///
/// # Panics
/// Then.
pub fn assert_listed(test: &str, world: Kind) {
    let listed = CASES.iter().any(|(name, kind, _)| *name == test && *kind == world);
    assert!(listed, "{test} runs in one world: give its reason in one_world::CASES");
}
