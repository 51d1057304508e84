//! One file for each command.

pub(crate) mod completions;
pub(crate) mod dead_letters;
pub(crate) mod destinations;
pub(crate) mod migrate;
pub(crate) mod pause;
pub(crate) mod relay;
pub(crate) mod replay;
pub(crate) mod resume;
pub(crate) mod status;
