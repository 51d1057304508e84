//! One file for each command.

pub(crate) mod completions;
pub(crate) mod dead_letters;
pub(crate) mod migrate;
pub(crate) mod relay;
pub(crate) mod status;
