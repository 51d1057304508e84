//! An event's way from commit to effect, in both worlds.

mod way;
